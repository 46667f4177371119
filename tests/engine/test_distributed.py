"""Runs on several ranks: the same bits, one voice, one stop.

What happens if a process dies or hangs is in test_faults.py.
"""

import json
import os
import shutil
import signal
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT, snapshot
from rank_runs import STEPS, command, on_files, settings, settings_of
from ranks import as_rank, seen_images
from run_files import assert_same_run, fingerprint, read, row_count, rows
from torchrun import Ended, Torchrun, error_lines, marked, wait_for

from resnext.config import parse_config
from resnext.engine.resume import batchnorm_change_warning

# ---------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    ("ranks", "setting"), [(2, ()), pytest.param(3, ("fp32", "0.9"), marks=pytest.mark.slow)]
)
def test_the_same_configuration_gives_the_same_bits(ranks, setting, runs, tmp_path):
    overrides = settings_of(*setting)
    runs.train(ranks, tmp_path / "run", *overrides)
    assert_same_run(tmp_path / "run", runs.whole(ranks, overrides))
    assert fingerprint(tmp_path / "run") == fingerprint(runs.whole(ranks, overrides))


def test_a_group_of_one_is_one_process(runs, tmp_path):
    """torchrun --nproc-per-node=1 gives the bits of python."""
    overrides = settings(train__epochs=1, schedule__warmup_epochs=0)
    runs.train(1, tmp_path / "a", *overrides)
    runs.train(1, tmp_path / "b", *overrides, watch={"group": True})
    assert_same_run(tmp_path / "b", tmp_path / "a")


def test_rank_0_speaks_for_all(runs):
    """Nothing is printed, logged or written twice; the run directory records the number of processes."""
    output = runs.whole(2, settings())
    ended = runs.ended[output]
    assert ended.outputs[1] == ""
    lines = ended.outputs[0].splitlines()
    logged = [2, 4, 6, 8, 9]  # run.log_interval, and the last
    steps = [line for line in lines if line.startswith("epoch ")]
    assert len(steps) == len(set(steps)) == 3 * len(logged)
    assert sum(line.startswith(" * epoch") for line in lines) == 3
    assert sum(line.startswith("finished: 3 epochs") for line in lines) == 1
    assert "global batch 24 across 2 processes" in ended.outputs[0]
    found = rows(output)
    expected = [
        row for n in (1, 2, 3) for row in [*(("step", n, step) for step in logged), ("epoch", n, None)]
    ]
    assert [(row["kind"], row["epoch"], row.get("step")) for row in found] == expected
    assert [row["images"] for row in found if row["kind"] == "step"] == [48, 48, 48, 48, 18] * 3
    counts = [(row["train"]["images"], row["val"]["images"]) for row in found if row["kind"] == "epoch"]
    assert counts == [(210, 101)] * 3
    log = [line[20:] for line in (output / "log.txt").read_text().splitlines()]
    assert log.count("processes: 2") == 1
    assert [line for line in log if line in lines] == lines
    text = (output / "config.yaml").read_text()
    assert "# processes: 2\n" in text and yaml.safe_load(text)["train"]["batch_size"] == 24
    assert read(output)["versions"]["processes"] == "2"
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"last.pt", "previous.pt", "best.pt"}


def test_a_batch_that_cannot_be_shared(runs, tmp_path):
    ended = runs.start(3, tmp_path / "run", *settings(train__bn_group=12))
    assert "train.bn_group: 12 makes 2 groups of 24 images" in ended.failed()
    assert ended.outputs == [""] * 3 and sorted(len(text.splitlines()) for text in ended.errors) == [0, 0, 1]
    assert not (tmp_path / "run").exists()


def test_torchrun_shows_one_message(tmp_path):
    """torchrun adds its own, and ends with status 1."""
    arguments = command(tmp_path / "run", *settings(train__bn_group=8))
    with Torchrun(tmp_path, 2, ROOT / "train.py", *arguments) as job:
        assert job.wait() == 1
        assert set(job.statuses()) <= {2, 128 + signal.SIGTERM} and 2 in job.statuses()
        messages = error_lines(job.error)
        assert len(messages) == 1 and messages[0].startswith("train.bn_group: 8 makes 3 groups")
        assert f'File "{ROOT}' not in job.error.replace(f"{ROOT}/.venv", ""), "no traceback of ours"
    assert not (tmp_path / "run").exists()


def test_a_result_that_cannot_be_written(processes, runs):
    """Rank 0 fails when the others have done their work; they print nothing."""
    ended = processes.run(2, "evaluate", runs.whole(3, settings()), "--csv", "/dev/full")
    assert "--csv /dev/full: cannot be written" in ended.failed()


@pytest.mark.parametrize(
    ("ranks", "more", "expected"),
    [(2, [], "is in use already"), (3, ["train.bn_group=6", "--resume"], "train.bn_group: ")],
    ids=["directory in use", "groups that cannot be shared on resuming"],
)
def test_a_refused_run_stays_as_it_was(ranks, more, expected, runs, tmp_path):
    output = shutil.copytree(runs.whole(2, settings()), tmp_path / "run")

    def content() -> dict[str, str]:
        return {name: text for name, text in snapshot(tmp_path).items() if not more or "log.txt" not in name}

    before = content()
    assert expected in runs.start(ranks, output, *settings(), *more).failed()
    assert content() == before


def test_activation_checkpointing_changes_no_bit(runs, tmp_path):
    runs.train(2, tmp_path / "run", *settings(train__activation_checkpointing="true"))
    theirs = runs.whole(2, settings())
    assert rows(tmp_path / "run") == rows(theirs)
    assert fingerprint(tmp_path / "run") == fingerprint(theirs)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run) if row["kind"] == "step"]


def test_fine_tuning_on_two_ranks_is_that_on_one(runs, tmp_path):
    """From weights, with a part of the network frozen, and a learning rate for the last layer."""
    more = {
        "model.pretrained": runs.whole(2, settings()),
        "data.characters": "ABCD",
        "train.frozen_stages": 1,
    }
    more |= {"optimizer.head_lr": 0.1, "train.bn_group": 6, "train.epochs": 2, "run.log_interval": 1}
    overrides = [*settings(), *(f"{key}={value}" for key, value in more.items()), "optimizer.lr=0.01"]
    for number in (1, 2):
        runs.train(number, tmp_path / f"{number}", *overrides)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
def test_compiled(runs, tmp_path):
    """Equal to rounding, at a rate at which that does not grow; and with the same bits after a stop."""
    more = {"train__epochs": 1, "schedule__warmup_epochs": 0, "optimizer__lr": 0.001, "run__log_interval": 1}
    overrides = settings(train__compile="true", **more)
    output, stopped = tmp_path / "run", tmp_path / "stopped"
    stop = {"rank": 1, "signal": "SIGUSR1", "step": 4}
    for folder, words, watch in (
        (output, [], {}),
        (stopped, [], {"stop": stop}),
        (stopped, ["--resume"], {}),
    ):
        ended = runs.start(2, folder, *overrides, *words, watch=watch, seconds=500)
        assert set(ended.statuses) == {0}, ended
    expected = losses(runs.whole(2, settings(**more)))
    assert losses(output) == pytest.approx(expected, rel=1e-3)
    assert_same_run(stopped, output)


# ---------------------------------------------------------------------------- stopped and resumed


def assert_stopped(output: Path, name: str) -> dict[str, Any]:
    """Assert that a signal stopped the run early and saved it exactly once; return where it stands."""
    log = (output / "log.txt").read_text()
    assert log.count(f"stopped by {name} in epoch") == 1 and "finished:" not in log
    last = read(output)["progress"]
    assert last["global_step"] < 3 * STEPS or last["epoch"] <= 3
    previous = output / "checkpoints" / "previous.pt"
    if last["epoch"] == 1:
        assert not previous.exists()
    else:  # written at the end of the epoch before
        before = read(output, "previous.pt")["progress"]
        assert (before["epoch"], before["step"]) == (last["epoch"], 0)
    assert len(rows(output)) == last["rows"]
    return last


STOPS = ["torchrun", "SIGUSR1", "one rank", "one rank SIGUSR1", "everything"]
SETTINGS = [("fp32", "null", 2), ("bf16", "0.9", 1), ("fp32", "0.9", 1), ("bf16", "null", 2)]


@pytest.mark.parametrize(
    ("stop", "ranks", "setting", "again"),
    [
        ("torchrun", 2, ("fp32", "0.9", 1), False),
        ("SIGUSR1", 3, ("fp32", "0.9", 1), False),
        *(pytest.param(*case, True, marks=pytest.mark.slow) for case in product(STOPS, (2, 3), SETTINGS)),
    ],
    ids=str,
)
def test_stop_under_torchrun(stop, ranks, setting, again, runs, tmp_path):
    """Stopped from outside in mid-epoch, and resumed as if never stopped; `again`: by torchrun too."""
    output, overrides = tmp_path / "run", settings_of(*setting)
    options = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"] if stop == "SIGUSR1" else []
    number = signal.SIGUSR1 if "SIGUSR1" in stop else signal.SIGTERM
    with Torchrun(tmp_path, ranks, ROOT / "train.py", *command(output, *overrides), options=options) as job:
        pids = [job.pid(rank) for rank in range(ranks)]
        assert wait_for(lambda: row_count(output) >= 7), job.error
        if stop == "everything":
            for pid in marked(job.mark):
                os.kill(pid, number)
        else:
            os.kill(pids[-1] if "rank" in stop else job.process.pid, number)
        # After a signal of its own torchrun ends with 1, however its processes did.
        assert job.wait() == (0 if "rank" in stop else 1), job.error
        assert job.statuses() == [0] * ranks, job.error
        assert error_lines(job.error) == [] and "forcefully" not in job.error
    progress = assert_stopped(output, number.name)
    assert (progress["epoch"], progress["step"]) >= (2, 2)
    if again:
        with Torchrun(tmp_path, ranks, ROOT / "train.py", *command(output, *overrides, "--resume")) as job:
            assert job.wait() == 0 and job.statuses() == [0] * ranks, job.error
    else:
        runs.train(ranks, output, *overrides, "--resume")
    assert_same_run(output, runs.whole(ranks, overrides))


PLACES = {  # (what is counted, its number), or the validation and its batch; then the epoch and the steps
    "in mid-epoch": ({"step": STEPS + 4}, 2, range(4, 7)),
    "at the first step": ({"step": 1}, 1, range(1, 4)),
    "at the end of an epoch": ({"step": 2 * STEPS}, 2, [STEPS]),
    "in a validation": ((1, 3), 2, [STEPS]),
    "in the last validation": ((2, 2), 3, [STEPS]),
}


@pytest.mark.parametrize(
    ("place", "ranks", "name", "setting"),
    [
        ("in mid-epoch", 3, "SIGTERM", ("fp32", "null", 2)),
        ("at the end of an epoch", 2, "SIGUSR1", ("fp32", "null", 1)),
        ("in a validation", 2, "SIGHUP", ("fp32", "0.9", 1)),
        pytest.param("in the last validation", 3, "SIGINT", ("fp32", "0.9", 1), marks=pytest.mark.slow),
        *(
            pytest.param(place, ranks, "SIGTERM", setting, marks=pytest.mark.slow)
            for place, ranks, setting in product(
                PLACES, (2, 3, 4), product(("fp32", "bf16"), ("null", "0.9"), (1, 2))
            )
        ),
    ],
    ids=str,
)
def test_a_signal_to_one_rank_stops_all(place, ranks, name, setting, runs, tmp_path):
    """The last rank sends itself a signal; all stop at the same step, and resume as if never stopped."""
    output, overrides = tmp_path / "run", settings_of(*setting)
    where, epoch, steps = PLACES[place]
    if isinstance(where, tuple):  # count the last rank's batches of earlier validations that are not empty
        where = {"batch": where[0] * -(-len(range(ranks - 1, 101, ranks)) // 4) + where[1]}
    stop = {"rank": ranks - 1, "signal": name, **where}
    ended = runs.train(ranks, output, *overrides, watch={"stop": stop})
    assert f"stopped by {name} in epoch {epoch}" in ended.outputs[0] and not any(ended.outputs[1:])
    progress = assert_stopped(output, name)
    assert progress["epoch"] == epoch and progress["step"] in steps
    runs.train(ranks, output, *overrides, "--resume")
    assert_same_run(output, runs.whole(ranks, overrides))


def test_a_stop_of_ranks_with_loader_workers(processes, runs, images, tmp_path):
    """The whole group of processes gets SIGTERM, as from torchrun: ranks and workers; images are mixed."""
    output, overrides = tmp_path / "run", on_files(images)
    job = processes.start(2, "train", *command(output, *overrides))
    wait_for(lambda: row_count(output) >= 7)
    for pid in job.pids:
        os.killpg(pid, signal.SIGTERM)
    assert "stopped by SIGTERM" in job.wait().finished().outputs[0]
    last = read(output)["progress"]
    assert (2, 1) <= (last["epoch"], last["step"]) < (3, 5)
    runs.train(2, output, *overrides, "--resume", "data.workers=0")
    assert_same_run(output, runs.whole(2, overrides))


def test_a_resume_on_another_number_of_ranks(runs, tmp_path):
    """Started on three, continued on two, finished on one: the steps, their rates and their images stay."""
    overrides = settings(augment__mirror=0.5, augment__erasing=0.5, augment__mixup=0.2, augment__cutmix=1.0)

    def run(output: Path, part: str, ranks: int, *more: object, step: int | None = None) -> Ended:
        stop = step and {"rank": 0, "signal": "SIGTERM", "step": step}
        watch = {"images": str(tmp_path / f"{output.name} {part}"), "stop": stop}
        return runs.train(ranks, output, *overrides, *more, watch=watch)

    run(tmp_path / "alone", "", 1)
    output = tmp_path / "run"
    run(output, "1", 3, step=STEPS + 2)
    ended = run(output, "2", 2, "--resume", step=STEPS + 1)
    warning = "BatchNorm's statistics were over 8 images and are over 12 now; train.bn_group keeps them"
    assert ended.outputs[0].count(warning) == (output / "log.txt").read_text().count(warning) == 1
    assert "warning: processes was 3 and is 2" in ended.outputs[0]
    ended = run(output, "3", 1, "--resume")
    assert "BatchNorm's statistics were over 12 images and are over 24 now" in ended.outputs[0]
    parts = [seen_images(tmp_path / f"run {part}") for part in "123"]
    assert all(len(part) > 3 for part in parts)
    seen = [step for part in parts for step in part]
    assert [step["step"] for step in seen] == list(range(3 * STEPS))
    assert seen == seen_images(tmp_path / "alone ")
    assert Counter(len(step["images"]) for step in seen) == {24: 24, 18: 3}
    names = ("kind", "epoch", "step", "global_step", "lr", "images")
    ours, theirs = (
        [[row.get(name) for name in names] for row in rows(tmp_path / r)] for r in ("run", "alone")
    )
    assert ours == theirs


def test_the_warning_of_batchnorm():
    """It comes if and only if the statistics are over another number of images than before."""

    def warnings(ranks: int, before: str, **changes: object) -> list[str]:
        config = parse_config(f"train: {json.dumps({'batch_size': 24, **changes})}", "test")
        with as_rank(0, ranks):
            return batchnorm_change_warning(config, before)

    assert len(warnings(2, "3")) == len(warnings(1, "2")) == 1
    assert warnings(3, "3") == warnings(1, "1") == warnings(2, "unknown") == []
    assert warnings(2, "4", bn_group=6) == warnings(2, "4", sync_bn=True) == []
    assert "over 3 images and are over 6 now" in warnings(2, "4", accumulation_steps=2)[0]


@pytest.mark.slow
def test_a_resume_with_the_same_ghost_batches(runs, tmp_path):
    """Only rounding changes, and there is no warning."""
    overrides = settings(train__bn_group=6, run__log_interval=1, optimizer__lr=0.01)
    runs.train(1, tmp_path / "alone", *overrides)
    stop = {"rank": 1, "signal": "SIGTERM", "step": 4}
    runs.train(4, tmp_path / "run", *overrides, watch={"stop": stop})
    ended = runs.train(2, tmp_path / "run", *overrides, "--resume")
    assert "BatchNorm" not in ended.outputs[0]
    ours, theirs = losses(tmp_path / "run"), losses(tmp_path / "alone")
    assert ours[:STEPS] == pytest.approx(theirs[:STEPS], rel=1e-2)
