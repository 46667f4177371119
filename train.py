"""Train a ResNeXt.

    python train.py --config demo.yaml                              a one-minute trial, no download
    python train.py --config cifar10_resnext29_8x64d.yaml --data datasets
    python train.py --config NAME.yaml train.epochs=30 optimizer.lr=0.05    change single keys
    python train.py --config NAME.yaml --print-config               print every key with its help text
    python train.py --resume runs/NAME                              continue where a run stopped
    python train.py --config NAME.yaml --resume                     continue, or start (for requeued jobs)
    python train.py --config NAME.yaml --check                      test data, disk, memory, and speed first
    torchrun --nproc-per-node=8 train.py --config NAME.yaml         the same run on 8 GPUs
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        train.py --config NAME.yaml --resume                        on each of 2 machines

A run writes config.yaml, metrics.jsonl, log.txt, tensorboard/, and checkpoints/ (last.pt, best.pt) to
runs/<config name> or --output DIR. SIGTERM, SIGINT (Ctrl-C), SIGUSR1, and SIGHUP save and stop, with exit
status 0. Invalid input ends with one message and exit status 2.
"""

import argparse
import contextlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -P
from resnext.config import Config, to_yaml
from resnext.engine.run_directory import configuration, output_folder, resume_source, write_config
from resnext.errors import UserError, command_parser, env_rank, run_main


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--config", metavar="NAME|FILE", help="a file, or the name of one in configs/")
    add("--data", metavar="DIR", help="dataset folder (data.dir)")
    add("--output", metavar="DIR", help="run directory; default: runs/<config name>")
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR|FILE",
        help="continue from a run directory or checkpoint; without a value: continue --output, or start it",
    )
    add("--check", action="store_true", help="test everything that a training run needs, without training")
    add("--print-config", action="store_true", help="print the resolved configuration")
    add("overrides", nargs="*", metavar="section.key=value", help="change single keys")
    words = sys.argv[1:]
    for i, word in enumerate(words[:-1]):
        if word == "--resume" and re.match(r"[A-Za-z]+\.\w+=", words[i + 1]):  # --resume train.epochs=9
            words[i] = "--resume="
    return parser.parse_intermixed_args(words)


def main() -> int | None:
    arguments = parse_arguments()
    config = configuration(arguments.config, arguments.resume, arguments.data, arguments.overrides)
    if arguments.print_config:
        if env_rank("RANK") == 0:
            print(to_yaml(config), end="")
        return None
    if arguments.config is None and not arguments.resume:
        raise UserError("--config is missing; name a file of configs/, for example --config demo.yaml")
    output, source = output_folder(arguments.config, arguments.output, arguments.resume), None
    if not arguments.check and env_rank("RANK") == 0:  # before importing torch, which takes seconds
        source = resume_source(arguments.resume, output)
    from resnext.distributed import broadcast_from_rank0, process_group

    with process_group(config.run.timeout):
        if arguments.check:
            from data.training import load_sets, make_batches
            from resnext.preflight import check

            return check(config, output, arguments.resume, load_sets, make_batches)
        run(config, output, broadcast_from_rank0(lambda: source), arguments.resume is not None)
    return None


def run(config: Config, output: Path, source: Path | None, resumed: bool) -> None:
    """Load the data, build or restore the training state, and train; every rank calls this."""
    from data.training import load_sets, make_batches
    from resnext.device import configure_backends, explain_step_errors, select_device
    from resnext.distributed import rank
    from resnext.engine import logger, progress, resume, trainer
    from resnext.stop_signal import StopSignal

    device = select_device(config.run.device)
    config, start, warnings = resume.read_start(config, source, device)
    configure_backends(config.train.precision, config.run.deterministic)
    train_set, val_set, fingerprint = load_sets(config, start)
    warnings += [*train_set.notes, *val_set.notes]
    versions = logger.environment(device) | {"data": fingerprint}
    with explain_step_errors(config, device):
        training, changes = resume.make_training(
            config, train_set.classes, len(train_set), device, versions, source, start
        )
    del start  # may hold as much memory as the training state
    warnings += changes
    branched = source is not None and source.resolve().parent != (output / "checkpoints").resolve()
    if branched:  # a new run, with its own metrics rows and best checkpoint
        training.progress.rows, training.progress.best = 0, None
    with StopSignal() as stop:
        log: logger.Logger = logger.NullLogger()
        if rank() == 0:
            output.mkdir(parents=True, exist_ok=True)
            rows, step = training.progress.rows, training.progress.global_step
            log = logger.RunLogger(output, rows, step, config.run.tensorboard)
        try:
            if rank() == 0:
                write_config(config, versions, output)
            log.say("\n".join(f"{name}: {value}" for name, value in versions.items()), console=False)
            for line in warnings:
                log.say(line)
            training_batches, val_batches = make_batches(config, train_set, val_set, device, log.warn)
            with explain_step_errors(config, device):
                log.say(
                    progress.introduction(training, len(train_set), len(val_set), output, source, resumed)
                )
                if branched:
                    trainer.save(training, output, log)
                if config.data.pipeline != "memory" and not training.progress.global_step:
                    trainer.read_through(val_batches, log, stop.requested)
                trainer.train(training, training_batches, val_batches, output, log, stop.requested)
            log.say(progress.summary(training, output, stop.signal))
        except (UserError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                log.say(f"error: {error}", console=False)
            raise
        except OSError as error:
            raise UserError(
                f"{error.filename or output}: {error.strerror}; saved checkpoints are intact; fix this and "
                "resume with --resume"
            ) from error
        finally:
            log.close()


if __name__ == "__main__":
    run_main(main)
