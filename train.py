"""Train a ResNeXt.

    python train.py --config demo.yaml                              a minute-long trial, no download
    python train.py --config cifar10_resnext29_8x64d.yaml --data datasets
    python train.py --config NAME.yaml train.epochs=30 optimizer.lr=0.05    change single keys
    python train.py --config NAME.yaml --print-config               every key, explained
    python train.py --resume runs/NAME                              go on where a run stopped
    python train.py --config NAME.yaml --resume                     go on, or start (for requeued jobs)
    python train.py --config NAME.yaml --check                      try data, disk, memory and speed first
    torchrun --nproc-per-node=8 train.py --config NAME.yaml         the same run on 8 GPUs
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        train.py --config NAME.yaml --resume                        on each of 2 machines

A run goes to runs/<config name> (--output DIR): config.yaml, metrics.jsonl, log.txt, tensorboard/ and
checkpoints/ (last.pt, best.pt). SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP save and stop, exit status 0.
Wrong input ends with one message and exit status 2.
"""

import argparse
import contextlib
import os
import re
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -P
from data.walk import to_text
from resnext.config import Config, Data, find_config, network_name, parse_config, read_config, to_yaml
from resnext.errors import UserError, command_parser, launched_as, run_command


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--config", metavar="NAME|FILE", help="a file, or the name of one in configs/")
    add("--data", metavar="DIR", help="where the data is (data.dir)")
    add("--output", metavar="DIR", help="run directory; default: runs/<config name>")
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR|FILE",
        help="go on from a run directory or checkpoint; alone: from --output, or start there",
    )
    add("--check", action="store_true", help="try all that a training needs, without one")
    add("--print-config", action="store_true", help="print the resolved configuration")
    add("overrides", nargs="*", metavar="section.key=value", help="change single keys")
    words = sys.argv[1:]
    for i, word in enumerate(words[:-1]):
        if word == "--resume" and re.match(r"[A-Za-z]+\.\w+=", words[i + 1]):  # --resume train.epochs=9
            words[i] = "--resume="
    return parser.parse_intermixed_args(words)


def main() -> int | None:
    arguments = parse_arguments()
    config = configuration(arguments)
    if arguments.print_config:
        if launched_as("RANK") == 0:
            print(to_yaml(config), end="")
        return None
    if arguments.config is None and not arguments.resume:
        raise UserError("--config is missing: name a file of configs/, for example --config demo.yaml")
    output, source = output_folder(arguments), None
    if not arguments.check and launched_as("RANK") == 0:  # ahead of torch, which takes seconds
        source = resume_source(arguments, output)
    from resnext.distributed import from_first, process_group

    with process_group(config.run.timeout):
        if arguments.check:
            return check(config, output, arguments)
        run(config, output, from_first(lambda: source), arguments.resume is not None)
    return None


def configuration(arguments: argparse.Namespace) -> Config:
    """The configuration of --config, or of what --resume names, with the overrides."""
    if arguments.config is not None:
        config = read_config(find_config(arguments.config), arguments.overrides)
    elif arguments.resume and is_lua_run(Path(arguments.resume)):
        raise UserError(
            f"--config is missing: the Lua run {arguments.resume} does not say its options; "
            "scripts/lua_flags.py makes a configuration of its command line"
        )
    elif arguments.resume and Path(arguments.resume).is_dir():
        path = Path(arguments.resume) / "config.yaml"
        if not path.is_file():
            raise UserError(f"--resume {arguments.resume}: not a run directory (no config.yaml); give one")
        config = read_config(path, arguments.overrides)
    elif arguments.resume:
        from resnext.checkpoint import find_checkpoint, read_checkpoint

        path = find_checkpoint(Path(arguments.resume), "last.pt")
        config = parse_config(read_checkpoint(path)["config"], str(path), arguments.overrides)
    else:
        config = read_config(None, arguments.overrides)
    return absolute_paths(config, arguments.data)


def absolute_paths(config: Config, data: str | None) -> Config:
    """The configuration with --data, and with paths that hold in every working directory."""
    folder, pretrained = config.data.dir, config.model.pretrained
    if data is not None:
        folder = to_text(os.fsencode(data))
    if pretrained is not None and not pretrained.startswith("torchvision:"):
        pretrained = os.path.abspath(os.path.expanduser(pretrained))
    return replace(
        config,
        data=replace(config.data, dir=folder and os.path.abspath(os.path.expanduser(folder))),
        model=replace(config.model, pretrained=pretrained),
    )


def output_folder(arguments: argparse.Namespace) -> Path:
    """Where the run goes."""
    if arguments.output:
        return Path(arguments.output)
    if arguments.resume:
        path = Path(arguments.resume)
        if path.is_dir() and not is_lua_run(path):
            return path
        if path.name == "last.pt" and path.parent.name == "checkpoints":
            return path.parent.parent
        if arguments.config is None:
            raise UserError(f"--resume {path}: say with --output DIR where the run from there shall go")
    path = Path(arguments.config)
    return Path("runs") / (path.resolve().parent.name if path.stem == "config" else path.stem)


def resume_source(arguments: argparse.Namespace, output: Path) -> Path | None:
    """The checkpoint to start from, or None; refuses to touch a directory that is in use or not writable."""
    last = output / "checkpoints" / "last.pt"
    try:
        used = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be read ({error.strerror})") from None
    source = None
    if arguments.resume:
        path = Path(arguments.resume)
        if not path.exists():
            raise UserError(f"--resume {path}: no such run directory or checkpoint; check the path")
        source = latest(path) if path.is_dir() else path
        if source and source.suffix == ".t7" and source.name != "latest.t7":
            raise UserError(
                f"--resume {path}: a single Lua file; give its folder, which has latest.t7, or start from it "
                "with model.pretrained"
            )
        if source is None and not is_run(path):
            raise UserError(f"--resume {path}: not a run directory; give one that train.py wrote")
    elif arguments.resume is not None:
        source = latest(output)
    # A used directory is only ever continued, from its own latest checkpoint.
    own = source is None or source.resolve() == last.resolve()
    continued = arguments.resume is not None and is_run(output) and own
    if used and not continued:
        raise UserError(
            f"--output {output}: is in use already; continue that run with --resume, or choose another "
            "directory with --output"
        )
    check_writable(output)
    return source


def latest(folder: Path) -> Path | None:
    """last.pt of a run directory (perhaps only its predecessor is left), None where nothing was saved."""
    if is_lua_run(folder):
        return folder / "latest.t7"
    saved = folder / "checkpoints" / "last.pt"
    if saved.exists() or saved.with_name("previous.pt").exists():
        return saved
    others = sorted(saved.parent.glob("[!.]*.pt"))  # a hidden one is half of what a killed run wrote
    if others:
        another = shlex.quote(str(others[0]))
        raise UserError(f"{saved}: is gone; go on from another with --resume {another} --output DIR")
    return None


def is_lua_run(folder: Path) -> bool:
    """Whether it is a directory of the Lua code's checkpoints."""
    return (folder / "latest.t7").is_file()


def is_run(folder: Path) -> bool:
    """Whether train.py wrote a folder, even if it was killed ahead of writing config.yaml."""
    first = {"log.txt", "metrics.jsonl", "tensorboard"}
    if not (folder / "log.txt").is_file():
        return False
    return (folder / "config.yaml").is_file() or {path.name for path in folder.iterdir()} <= first


def check_writable(output: Path) -> None:
    """A UserError now rather than after loading the data where the run directory cannot be made."""
    existing = existing_part(output)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"--output {output}: cannot be made below {existing}; choose another directory with --output DIR"
        )


def existing_part(output: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(folder for folder in (output, *output.absolute().parents) if folder.exists())


def run(config: Config, output: Path, source: Path | None, resumed: bool) -> None:
    """Load the data, prepare or restore the state, train; in each of the processes."""
    from resnext.device import choose_device, set_numerics, step_explained
    from resnext.distributed import rank
    from resnext.reporting import Reporter, Silence, environment
    from resnext.stop_signal import StopRequest
    from resnext.trainer import read_through, save, summary, train

    device = choose_device(config.run.device)
    config, start, warnings = read_start(config, source, device)
    set_numerics(config.train.precision, config.run.deterministic)
    train_set, val_set, fingerprint = load_sets(config, start)
    warnings += [*train_set.notes, *val_set.notes]
    versions = environment(device) | {"data": fingerprint}
    with step_explained(config, device):
        training, changes = make_training(
            config, train_set.classes, len(train_set), device, versions, source, start
        )
    del start  # as large as the training
    warnings += changes
    progress = training.progress
    branched = source is not None and source.resolve().parent != (output / "checkpoints").resolve()
    if branched:  # another run: its rows and its best checkpoint start here
        progress.rows, progress.best = 0, None
    with StopRequest() as stop:
        reporter = Silence()
        if rank() == 0:
            output.mkdir(parents=True, exist_ok=True)
            reporter = Reporter(output, progress.rows, progress.global_step, config.run.tensorboard)
        try:
            if rank() == 0:
                write_config(config, versions, output)
            reporter.say("\n".join(f"{name}: {value}" for name, value in versions.items()), console=False)
            for line in warnings:
                reporter.say(line)
            training_batches, val_batches = make_batches(config, train_set, val_set, device, reporter.warn)
            with step_explained(config, device):
                reporter.say(introduction(training, len(train_set), len(val_set), output, source, resumed))
                if branched:
                    save(training, output, reporter)
                if config.data.pipeline != "memory" and not progress.global_step:
                    read_through(val_batches, reporter, stop.requested)
                train(training, training_batches, val_batches, output, reporter, stop.requested)
            reporter.say(summary(training, output, stop.signal))
        except (UserError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                reporter.say(f"error: {error}", console=False)
            raise
        except OSError as error:
            raise UserError(
                f"{error.filename or output}: {error.strerror}; what was saved is whole: mend this, then go "
                "on with --resume"
            ) from error
        finally:
            reporter.close()


def read_start(config: Config, source: Path | None, device: Any) -> tuple[Config, Any, list[str]]:
    """(configuration, what a training starts from, lines for the log).

    The configuration's precision is no longer `auto`: a run goes on with the one that it had. A training
    starts from a checkpoint's content, a LuaState, (network, Info) of pretrained weights, or None.
    """
    from resnext.checkpoint import check_resume, read_latest
    from resnext.device import choose_precision, slow_precision
    from resnext.distributed import first_on_machine, from_first
    from resnext.state import check_network

    start, before, warnings = None, None, []
    if source is None:
        if config.model.pretrained:
            from resnext.weights import load_weights

            with first_on_machine():  # which downloads what is missing
                start = load_weights(config.model.pretrained)
    elif source.suffix == ".t7":
        from resnext.weights import load_lua_run

        start = from_first(lambda: load_lua_run(source.parent))
    else:
        start, warnings = from_first(lambda: (read_latest(source, warnings.append), warnings))
        before = parse_config(start["config"], str(source))
    precision = config.train.precision
    if precision == "auto" and before:
        precision = before.train.precision
    precision = choose_precision(precision, device)
    config = replace(config, train=replace(config.train, precision=precision))
    warnings += slow_precision(precision, device, "train.precision=")
    if before:
        warnings += check_resume(before, config, start["progress"]["step"])
        check_network(config, start, source)
    return config, start, warnings


def make_training(
    config: Config,
    classes: tuple[str, ...],
    images: int | None,
    device: Any,
    versions: dict[str, str],
    source: Path | None,
    start: Any,
) -> tuple[Any, list[str]]:
    """(the state of the training at its start, lines for the log).

    `classes` and `images` are those of the training set, images None where it is unknown; `start` is from
    read_start.
    """
    from resnext.state import prepare, restore

    training = prepare(config, classes, device, versions)
    if start is None:
        return training, []
    if isinstance(start, tuple):
        from resnext.warm_start import start_from

        return training, start_from(training, *start)
    if not isinstance(start, dict):
        from resnext.warm_start import continue_lua

        warnings = continue_lua(training, start)
    else:
        restore(training, start, source)
        warnings = [
            f"warning: {name} was {old} and is {versions.get(name)}; the bits may differ from here on"
            for name, old in start["versions"].items()
            if name != "started" and old != versions.get(name)
        ]
        warnings += other_statistics(config, start["versions"].get("processes", "1"))
        if images:
            before = parse_config(start["config"], str(source))
            warnings += rate_jump(before, config, training.progress, images)
    done = training.progress.epoch - 1
    if done > config.train.epochs:
        raise UserError(f"train.epochs: {config.train.epochs}, but {done} are done already; raise it")
    return training, warnings


def make_batches(config: Config, train_set: Any, val_set: Any, device: Any, warn: Any) -> tuple[Any, Any]:
    """(training batches, validation batches) of this process."""
    from data.loader import eval_batches, train_batches
    from resnext.batch_plan import share_positions
    from resnext.distributed import rank, world_size

    train = config.train
    return (
        train_batches(train_set, config, device, warn, partial(share_positions, train=train)),
        eval_batches(val_set, config.data, train.eval_batch_size, device, rank=rank(), ranks=world_size()),
    )


def load_sets(config: Config, start: Any) -> tuple[Any, Any, str]:
    """(training set, validation set, fingerprint of both), the same in all processes, as is an error.

    A run that goes on, from the `start` of read_start, keeps the order of its classes.
    """
    from data.sets import check_classes, load_set, training_classes
    from resnext.distributed import first_on_machine, gather

    before = start["classes"] if isinstance(start, dict) else None
    data = config.data
    if start is not None and not isinstance(start, dict | tuple) and data.class_order is None:  # a LuaState
        data = replace(data, class_order="string")
    with first_on_machine():  # which downloads what is missing
        classes = training_classes(data, before)
        train_set = load_set(data, "train", classes)
        check_classes(config.model.classes, train_set)
        val_set = load_set(data, "val", classes)
    fingerprint = f"{train_set.fingerprint()} {val_set.fingerprint()}"
    for number, other in enumerate(gather(fingerprint)):
        if other != fingerprint:
            raise UserError(
                f"data.dir: process {number} has other files in {config.data.dir} than this one; give all "
                "machines the same data"
            )
    return train_set, val_set, fingerprint


def rate_jump(before: Config, config: Config, progress: Any, images: int) -> list[str]:
    """From where to where the learning rate jumps, if another schedule or length makes it do so."""
    from resnext.schedule import learning_rate

    def rate(config: Config, ahead: int) -> float:
        steps = -(-images // config.train.batch_size)
        step = (progress.epoch - 1) * steps + progress.step + ahead
        position = (step // steps + 1, step % steps, steps)
        return learning_rate(config.schedule, config.optimizer.lr, config.train.epochs, *position)

    last, next_ = rate(before, -1), rate(config, 0)
    if progress.epoch > config.train.epochs or not progress.global_step or next_ == rate(before, 0):
        return []
    return [f"the learning rate jumps from {last:.3g}, of the last step, to {next_:.3g}"]


def other_statistics(config: Config, before: str) -> list[str]:
    """What another number of processes does to BatchNorm."""
    from resnext.distributed import world_size

    train, now = config.train, world_size()
    if before == str(now) or train.bn_group is not None or train.sync_bn or not before.isdigit():
        return []
    part = train.batch_size // train.accumulation_steps
    return [
        f"warning: BatchNorm's statistics were over {part // int(before)} images and are over {part // now} "
        "now; train.bn_group keeps them the same on any number of processes"
    ]


def write_config(config: Config, versions: dict[str, str], output: Path) -> None:
    """config.yaml: the resolved configuration, headed by what else it takes to repeat the run."""
    header = "".join(f"# {name}: {value}\n" for name, value in versions.items())
    temporary = output / ".config.yaml"
    temporary.write_text(f"{header}\n{to_yaml(config)}", encoding="utf-8")
    os.replace(temporary, output / "config.yaml")


def check(config: Config, output: Path, arguments: argparse.Namespace) -> int:
    """Try all that a training needs, and begin none; returns the exit status (see resnext/preflight.py)."""
    from resnext import preflight
    from resnext.device import choose_device, choose_precision, set_numerics, step_explained
    from resnext.distributed import from_first
    from resnext.reporting import environment

    device = choose_device(config.run.device)
    report = preflight.Report()

    def beginning() -> tuple[Path | None, Config, Any, list[str]]:
        source = from_first(lambda: resume_source(arguments, output))
        return source, *read_start(config, source, device)

    found = report.attempt(beginning)
    source, config, start, notes = found or (None, config, None, [])
    precision = choose_precision(config.train.precision, device)
    config = replace(config, train=replace(config.train, precision=precision))
    set_numerics(precision, config.run.deterministic)
    sets = report.attempt(
        lambda: preflight.load_present(report, config, lambda config: load_sets(config, start))
    )
    data = preflight.check_data(report, config, sets, make_batches, device)
    classes = sets[0].classes if sets else preflight.likely_classes(config, start)
    if found:
        report.add(preflight.output_finding(output, source))
    place = existing_part(output)
    report.attempt(
        lambda: report.add(from_first(lambda: preflight.space(config, len(classes), output, place)))
    )
    report.add(preflight.shared_memory_finding(config, data))
    versions = environment(device) | {"data": sets[2] if sets else "unknown"}

    def made() -> tuple[Any, list[str]]:
        with step_explained(config, device, preflight.error_of_one()):
            return make_training(config, classes, data.images, device, versions, source, start)

    training, changes = report.attempt(made) or (None, [])
    preflight.report_notes(report, notes + changes)
    preflight.check_training(report, config, training, data, device)
    return report.finish(preflight.start_command(sys.argv[1:]))


def introduction(
    training, train_images: int, val_images: int, output: Path, source: Path | None, resumed: bool
) -> str:
    """What is about to run, in a few lines."""
    from resnext.model import complexity

    config, progress = training.config, training.progress
    train = config.train
    parameters, macs = complexity(training.model, config.data.image_size)
    lines = [
        f"{network_name(config.model)}: {parameters:,} parameters, "
        f"{macs / 1e6:,.0f} M multiply-adds per image",
        f"{config.data.dataset}: {train_images:,} training and {val_images:,} validation images, "
        f"{len(training.classes)} classes, {config.data.image_size} pixels{view(config.data)}",
        f"global batch {train.batch_size}{processes(training)}, lr {config.optimizer.lr}, "
        f"{train.epochs} epochs, {train.precision} on {training.versions['device']}",
        f"run directory: {output}; top-1 and top-5 below are errors in percent",
    ]
    if source:
        lines.append(f"continuing from {source}: epoch {progress.epoch}, {progress.step} steps done")
    elif resumed:
        lines.append("nothing was saved in the run directory yet: starting from the beginning")
    return "\n".join(lines)


def processes(training: Any) -> str:
    """How many share a batch, for the introduction; nothing for one."""
    number = training.versions["processes"]
    return "" if number == "1" else f" of {number} processes"


def view(data: Data) -> str:
    """How files become pictures, for the introduction; nothing for a set in memory."""
    if data.pipeline == "memory":
        return ""
    size = f" ({data.train_size} in training)" if data.train_size != data.image_size else ""
    return f"{size} from {data.resize}, {data.pipeline}, {data.decoder}"


if __name__ == "__main__":
    run_command(main)
