"""The learning rate: a pure function of the epoch and the step, so that no resume can shift it."""

import math

from .config import ScheduleConfig


def learning_rate(
    schedule: ScheduleConfig, base: float, epochs: int, epoch: int, step: int = 0, steps: int = 1
) -> float:
    """Rate of one step.

    Args:
        base: the rate at the start (optimizer.lr).
        epochs: length of the training.
        epoch: counted from 1.
        step: counted from 0 inside the epoch, of `steps`; matters to warm-up and cosine only.

    Sources: train.lua (imagenet_step, cifar_step; strict comparisons in double arithmetic),
    paper section 5.3 (milestones at 150 and 225 of 300 epochs).
    """
    done = (epoch - 1) * steps + step
    warmup = schedule.warmup_epochs * steps
    if done < warmup:
        return base * (done + 1) / warmup
    if schedule.name == "imagenet_step":
        return base * 0.1 ** ((epoch - 1) // 30)
    if schedule.name == "cifar_step":
        part = epoch / epochs
        return base * 0.1 ** (2 if part > 0.74 else 1 if part > 0.49 else 0)
    if schedule.name == "multistep":
        return base * schedule.gamma ** sum(epoch > m for m in schedule.milestones or ())
    progress = (done - warmup) / (epochs * steps - warmup)
    return schedule.min_lr + (base - schedule.min_lr) * (1 + math.cos(math.pi * progress)) / 2
