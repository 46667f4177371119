"""Translate a command line of the Lua code (main.lua of ResNeXt and fb.resnet.torch) into a configuration.

    python scripts/lua_flags.py th main.lua -dataset cifar10 -depth 29 -baseWidth 64 -cardinality 16 > my.yaml
    python scripts/lua_flags.py -depth 50 -baseWidth 4 -cardinality 32 -data DIR --output my.yaml
    python scripts/lua_flags.py 'th main.lua -retrain model.t7 -data DIR -testOnly true -tenCrop true'

Writes what differs from the defaults of this program, defaults of the Lua code included, headed by the
commands that run it. Where a flag means something else here, a comment says so. --output never overwrites.
"""

import argparse
import contextlib
import difflib
import math
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from resnext.config import SECTIONS, STAGES_BY_DEPTH, to_text
from resnext.errors import UserError, command_parser, run_main
from resnext.strict_yaml import check_limits, convert

RECOMPUTE = "train.activation_checkpointing"


@dataclass(frozen=True)
class Flag:
    """A flag of opts.lua: type, default there, the key it becomes (whose limits hold), that key's value."""

    kind: Any
    default: Any = None
    key: str = ""
    value: Callable[[SimpleNamespace], Any] | None = None
    at_least: int | None = None  # where the key's limit does not hold


# fmt: off
FLAGS = {
    "data": Flag(str),
    "dataset": Flag(Literal["imagenet", "cifar10", "cifar100"], "imagenet", "data.dataset",
                    lambda o: "folder" if o.imagenet else o.dataset),
    "manualSeed": Flag(int, 0, "run.seed"),
    "nGPU": Flag(int, 1, "train.bn_group", lambda o: None if o.batchSize % o.nGPU else o.share),
    "backend": Flag(Literal["cudnn", "cunn"], "cudnn"),
    "cudnn": Flag(Literal["fastest", "default", "deterministic"], "fastest", "run.deterministic",
                  lambda o: o.cudnn == "deterministic"),
    "gen": Flag(str),
    "precision": Flag(Literal["single", "double", "half"], "single", "train.precision",
                      lambda o: "fp16" if o.precision == "half" else "fp32"),
    "nThreads": Flag(int, 2, "data.workers",
                     lambda o: math.ceil(o.nThreads / o.nGPU) if o.imagenet else None),
    "nEpochs": Flag(int, 0, "train.epochs", lambda o: o.nEpochs or (100 if o.imagenet else 300), at_least=0),
    "epochNumber": Flag(int, 1, at_least=1),
    "batchSize": Flag(int, 32, "train.batch_size"),
    "testOnly": Flag(bool, False),
    "tenCrop": Flag(bool, False),
    "save": Flag(str),
    "resume": Flag(str),
    "LR": Flag(float, 0.1, "optimizer.lr"),
    "momentum": Flag(float, 0.9, "optimizer.momentum"),
    "weightDecay": Flag(float, 1e-4, "optimizer.weight_decay"),
    "netType": Flag(Literal["resnext", "resnet", "preresnet"], "resnext", "model.architecture",
                    lambda o: "resnet" if o.plain else "resnext"),
    "bottleneckType": Flag(Literal["resnet", "resnext_B", "resnext_C"], "resnext_C", "model.block",
                           lambda o: "B" if o.bottleneckType == "resnext_B" and not o.plain else "C"),
    "depth": Flag(int, 34, "model.depth"),
    "baseWidth": Flag(int, 64, "model.base_width", lambda o: None if o.plain else o.baseWidth),
    "cardinality": Flag(int, 1, "model.cardinality", lambda o: None if o.plain else o.cardinality),
    "shortcutType": Flag(Literal["A", "B", "C"], "B", "model.shortcut"),
    "retrain": Flag(str, key="model.pretrained", value=lambda o: None if o.resume else o.retrain),
    "optimState": Flag(str),
    "shareGradInput": Flag(bool, False, RECOMPUTE, lambda o: o.shareGradInput or o.optnet),
    "optnet": Flag(bool, False, RECOMPUTE, lambda o: o.shareGradInput or o.optnet),
    "resetClassifier": Flag(bool, False, "model.reset_classifier",
                            lambda o: o.resetClassifier and not o.resume),
    "nClasses": Flag(int, 0, "model.classes", lambda o: o.nClasses or None, at_least=0),
}
PLAIN = "without meaning for a plain ResNet, there and here"
RECOMPUTED = ("saves memory by computing blocks twice, a third more time for the same result; better left "
              "out where memory suffices")
# (flag, when its meaning differs, how); {flag} stands for a flag's value, {share} for the images of a GPU.
NOTES: list[tuple[str, Callable[[SimpleNamespace], Any], str]] = [
    ("cardinality", lambda o: o.plain and o.cardinality != 1, PLAIN),
    ("baseWidth", lambda o: o.plain and o.baseWidth != 64, PLAIN),
    ("bottleneckType", lambda o: o.bottleneckType == "resnext_B" and not o.plain,
     "C is the same function and much faster; resnext.convert_form converts the weights"),
    ("shortcutType", lambda o: o.shortcutType == "A",
     "zeros for the channels that are new; the original's own A could not be run"),
    ("retrain", lambda o: o.retrain and o.resume, "not used, as -resume comes first, there and here"),
    ("retrain", lambda o: o.retrain and not o.resume,
     "the original took the network from the file, whatever the other flags said; here they must describe "
     "the network in the file"),
    ("nClasses", lambda o: o.nClasses,
     "must be what the data has; the original read it with -resetClassifier only"),
    ("dataset", lambda o: o.imagenet,
     "data.pipeline is fast, which resizes with antialiasing; torch7 is the original's arithmetic, equal to "
     "its output, at a third of the speed. The last layer has one output for each folder of train/, not "
     "always 1000"),
    ("nThreads", lambda o: o.imagenet,
     "loader processes, for each of {nGPU} training processes; they change no pixel, and without the key "
     "there is one a core"),
    ("nEpochs", lambda o: o.imagenet and o.netType != "resnext" and not o.nEpochs,
     "100, as in ResNeXt's code; fb.resnet.torch's default was 90"),
    ("dataset", lambda o: not o.imagenet, "downloaded into --data where it is missing, not into -gen"),
    ("nThreads", lambda o: not o.imagenet and "nThreads" in o.given,
     "the set is held in memory, there are no loaders"),
    ("nGPU", lambda o: o.batchSize % o.nGPU,
     "does not divide the batch of {batchSize}: the original's first GPUs got an image more. torchrun with "
     "{nGPU} processes does the same; for another number choose a train.batch_size and a train.bn_group that "
     "divides it"),
    ("nGPU", lambda o: o.batchSize % o.nGPU == 0,
     "the batch is the global one, there and here; BatchNorm works over {share} images, as on one GPU of the "
     "original, on however many processes this runs"),
    ("precision", lambda o: o.precision == "half",
     "not the same: the original kept weights and momentum in half precision, this is autocast with loss "
     "scaling"),
    ("shareGradInput", lambda o: o.shareGradInput, RECOMPUTED),
    ("optnet", lambda o: o.optnet, RECOMPUTED),
    ("manualSeed", lambda o: o.manualSeed, "other random numbers than Torch7's"),
    ("manualSeed", lambda o: "manualSeed" in o.given and not o.manualSeed,
     "other random numbers than Torch7's; the original's loaders were not seeded with 0, ours are"),
    ("backend", lambda o: "backend" in o.given, "without a counterpart, PyTorch chooses"),
    ("gen", lambda o: "gen" in o.given, "not needed; lists of files are cached elsewhere"),
    ("resume", lambda o: o.resume,
     "goes on from its latest.t7, and writes to --output: the Lua folder stays as it is"),
    ("optimState", lambda o: "optimState" in o.given and o.resume, "comes with --resume"),
    ("epochNumber", lambda o: "epochNumber" in o.given and o.resume, "comes with --resume"),
    ("tenCrop", lambda o: o.tenCrop, "validation takes one crop; the last command takes ten, afterwards"),
]
# fmt: on
DEFAULTS = {f"{section}.{f.name}": f.default for section, make in SECTIONS.items() for f in fields(make)}


def main() -> None:
    words, output = parse_arguments()
    options = read_flags(words)
    check_options(options)
    text = evaluation(options, words) if options.testOnly else training(options, words, output or "my.yaml")
    if output is None:
        print(text, end="")
    else:
        write_new(Path(output), text)
        print(f"wrote {output}; its first lines are the commands")


def parse_arguments() -> tuple[list[str], str | None]:
    """(words of the Lua command line, --output)."""
    parser = command_parser(__doc__)
    parser.allow_abbrev, parser.usage = False, "%(prog)s [--output FILE] [th main.lua] -flag value ..."
    parser.add_argument("-help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--output", metavar="FILE", help="write there; default: print")
    arguments, words = parser.parse_known_args()
    if len(words) == 1:
        try:
            words = shlex.split(words[0].replace("\\\n", " "))
        except ValueError as error:
            raise UserError(f"the command line: {error}; close its quotes") from None
    ends = [i for i, word in enumerate(words) if word.endswith("main.lua")]
    return words[ends[0] + 1 :] if ends else words, arguments.output


def read_flags(words: list[str]) -> SimpleNamespace:
    """The values of all flags, names of those `given`, and what follows from several of them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in FLAGS:
        parser.add_argument(f"-{name}", nargs="?", action="append")
    # argparse takes -LR=1 too, and beginnings of single-dash options, whatever allow_abbrev is.
    unknown = [word for word in words if re.match("-+[A-Za-z]", word) and word[1:] not in FLAGS]
    given, rest = parser.parse_known_args([] if unknown else words)
    for word in [*unknown, *rest]:
        lower = {name.lower(): f"did you mean -{name}?" for name in FLAGS}
        close = difflib.get_close_matches(word.lower().lstrip("-").partition("=")[0], lower, n=1)
        listed, pairs = f"they are -{', -'.join(FLAGS)}", "write -flag value pairs, as behind th main.lua"
        hint = lower[close[0]] if close else listed if word.startswith("-") else pairs
        raise UserError(f"{word[:60]!r}: not a flag of opts.lua; {hint}")
    values = {name: flag.default for name, flag in FLAGS.items()}
    for name, (text, *more) in vars(given).items():
        if more:
            raise UserError(f"-{name}: given twice; keep one")
        if text is None:
            usage = f"-{name} {'true' if FLAGS[name].kind is bool else 'VALUE'}"
            raise UserError(f"-{name}: has no value behind it; write {usage}, as in the Lua code")
        values[name] = read_value(name, text)
    o = SimpleNamespace(**values, given=set(vars(given)))
    o.imagenet, o.share = o.dataset == "imagenet", o.batchSize // o.nGPU
    o.data = o.data or ("DIR" if o.imagenet else "datasets")  # the original kept CIFAR in -gen
    paths = {"cardinality", "baseWidth", "bottleneckType"} & o.given  # without: resnet.lua, preresnet.lua
    o.plain = o.bottleneckType == "resnet" or (o.netType != "resnext" and not paths)
    return o


def read_value(name: str, text: str) -> Any:
    """A value as the flag's type, inside the limits of the key that it becomes."""
    flag, where = FLAGS[name], f"-{name}:"
    if not text.isprintable():
        raise UserError(f"{where} its value has characters that cannot be printed; give plain text")
    if flag.kind is str:
        return None if text in ("", "none") else text
    value = convert(flag.kind, yaml.ScalarNode("", text), where)
    limits = {} if flag.at_least is None else {"at_least": flag.at_least}
    if flag.kind in (int, float) and not limits:
        section, key = flag.key.split(".")
        limits = next(f for f in fields(SECTIONS[section]) if f.name == key).metadata["limits"]
    check_limits(value, limits, where)
    return value


def check_options(o: SimpleNamespace) -> None:
    """Refuse what the original refused, and what has no counterpart here."""
    depths = "50, 101 or 152" if o.imagenet else "9n+2, such as 29"
    fits = o.depth in STAGES_BY_DEPTH if o.imagenet else o.depth >= 11 and o.depth % 9 == 2
    source = o.resume or o.retrain
    look = f", see python scripts/describe.py {shlex.quote(source)}" if source else ""
    apart = "here network, optimiser and epoch go on together; give -resume DIR, the folder with latest.t7"
    # fmt: off
    refused = [
        (o.shareGradInput and o.optnet,
         "-optnet: excludes -shareGradInput, as in the original; keep one of the two"),
        (o.resetClassifier and not o.nClasses,
         "-resetClassifier: needs -nClasses, as in the original; give the number of classes"),
        (o.precision == "double",
         "-precision double: not offered; leave it out (fp32), or give -precision half"),
        (o.tenCrop and not o.imagenet,
         f"-tenCrop: has no meaning for the 32 pixels of {o.dataset}; leave it out"),
        (o.testOnly and not source,
         "-testOnly: of which network? Name its file with -retrain, or -resume DIR"),
    ]
    if not o.testOnly:
        refused += [
            (o.optimState and not o.resume, f"-optimState: {apart}"),
            (o.epochNumber > 1 and not o.resume, f"-epochNumber: {apart}"),
            (o.momentum == 0, "-momentum 0: Nesterov's momentum needs more, as in the original; raise it"),
            (o.nGPU > o.batchSize, f"-nGPU {o.nGPU}: more GPUs than images (-batchSize {o.batchSize})"),
            ("depth" not in o.given,
             "-depth: is missing, and the original's default of 34 layers is for basic blocks; give "
             f"{depths}{look}"),
            (not o.imagenet and o.plain and o.bottleneckType != "resnet",
             f"-netType {o.netType}: fb.resnet.torch's networks for CIFAR have other blocks and widths, "
             "which are not offered; give -netType resnext -bottleneckType resnet"),
            (not fits, f"-depth {o.depth}: bottlenecks on {o.dataset} need {depths} layers"),
        ]
    # fmt: on
    for applies, message in refused:
        if applies:
            raise UserError(message)


def translate(o: SimpleNamespace) -> dict[str, Any]:
    """section.key → value of all that the flags say, where it is not our default, in our order."""
    values = {
        "model.stem": "imagenet" if o.imagenet else "cifar",
        "model.preactivation": o.netType == "preresnet",
        "augment.padding": 0 if o.imagenet else 4,
        "schedule.name": "imagenet_step" if o.imagenet else "cifar_step",
    }
    for name, flag in FLAGS.items():
        if flag.key:
            values[flag.key] = flag.value(o) if flag.value else getattr(o, name)
    return {key: values[key] for key, default in DEFAULTS.items() if values.get(key, default) != default}


def training(options: SimpleNamespace, words: list[str], name: str) -> str:
    """The configuration: commands, then each note at the key that its flag became, or on top without one."""
    values = translate(options)
    top, beside = [], {key: [] for key in values}
    for flag, differs, note in NOTES:
        if differs(options):
            said = f"-{flag} {to_text(getattr(options, flag))}" + " (default)" * (flag not in options.given)
            beside.get(FLAGS[flag].key, top).append(f"{said}: {note.format(**vars(options))}")
    lines = heading(words, training_commands(options, name))
    lines += [line for note in top for line in comment(note)]
    for section in SECTIONS:
        inside = [key for key in values if key.startswith(f"{section}.")]
        lines += [f"{section}:"] if inside else []
        for key in inside:
            lines += [line for note in beside[key] for line in comment(note, "  ")]
            lines.append(f"  {key.removeprefix(f'{section}.')}: {to_text(values[key])}")
    return "\n".join([*lines, ""])


def training_commands(options: SimpleNamespace, name: str) -> list[str]:
    """What starts the training, on one GPU and on as many as the original had, and evaluates ten crops."""
    output, usual = options.save, f"runs/{Path(name).stem}"
    words = ["train.py", "--config", name, "--data", options.data]
    if options.resume:
        same = output is None or Path(output).absolute() == Path(options.resume).absolute()
        output = usual if same else output
        words += ["--resume", options.resume]
    words += ["--output", output] if output else []
    commands = [["python", *words]]
    if options.nGPU > 1:
        commands.append(["torchrun", f"--nproc-per-node={options.nGPU}", *words])
    if options.tenCrop:
        commands.append(["python", "evaluate.py", output or usual, "--ten-crop"])
    return list(map(shlex.join, commands))


def evaluation(options: SimpleNamespace, words: list[str]) -> str:
    """Comments alone: evaluate.py needs no configuration."""
    command = ["python", "evaluate.py", options.resume or options.retrain, "--data", options.data]
    command += ["--ten-crop"] * options.tenCrop + ["--precision", "fp16"] * (options.precision == "half")
    note = "-testOnly true: the file tells network and preprocessing, no configuration is needed; of the "
    note += "other flags only -data, -tenCrop and -precision matter"
    return "\n".join([*heading(words, [shlex.join(command)]), *comment(note), ""])


def heading(words: list[str], commands: list[str]) -> list[str]:
    """The commands first, as in configs/, then what was translated."""
    return [f"# {command}" for command in commands] + [f"# for: th main.lua {shlex.join(words)}", "#"]


def comment(note: str, indent: str = "") -> list[str]:
    """A note as lines of comment."""
    wrapper = textwrap.TextWrapper(110, f"{indent}# ", f"{indent}#   ", break_on_hyphens=False)
    wrapper.break_long_words = False
    return wrapper.wrap(note)


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet, whole or not at all."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"--output {path}: exists already; name another file") from None
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise UserError(f"--output {path}: cannot be written ({error.strerror}); name another file") from None


if __name__ == "__main__":
    run_main(main)
