"""Translate a command line of the Lua code (main.lua of ResNeXt and fb.resnet.torch) into a configuration.

    python scripts/lua_flags.py th main.lua -dataset cifar10 -depth 29 -baseWidth 64 -cardinality 16 > my.yaml
    python scripts/lua_flags.py -depth 50 -baseWidth 4 -cardinality 32 -data DIR --output my.yaml
    python scripts/lua_flags.py 'th main.lua -retrain model.t7 -data DIR -testOnly true -tenCrop true'

The result states what differs from the defaults of this program, including the defaults of the Lua code. It
starts with the commands that run it. Comments say where a flag has a different meaning here. --output never
overwrites a file.
"""

import argparse
import difflib
import math
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from resnext.config import KEYS, SECTIONS, STAGES, Value, stages_by_depth, to_text
from resnext.config.parser import check_limits, convert
from resnext.errors import UserError, command_parser, run_main
from resnext.files import write_file

RECOMPUTE = "train.activation_checkpointing"


@dataclass(frozen=True)
class Flag:
    """A flag of opts.lua: its type and default, the key that it becomes, and how to compute the key's value.

    The limits of the key apply to the flag, unless `at_least` is given.
    """

    kind: object
    default: Value = None
    key: str = ""
    value: Callable[[SimpleNamespace], Value] | None = None
    at_least: int | None = None


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
    "nEpochs": Flag(int, 0, "train.epochs", lambda o: o.nEpochs or o.usual_epochs, at_least=0),
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
    "shortcutType": Flag(Literal["A", "B", "C"], None, "model.shortcut",
                         lambda o: None if o.shortcutType == o.usual_shortcut else o.shortcutType),
    "retrain": Flag(str, key="model.pretrained", value=lambda o: None if o.resume else o.retrain),
    "optimState": Flag(str),
    "shareGradInput": Flag(bool, False, RECOMPUTE, lambda o: o.shareGradInput or o.optnet),
    "optnet": Flag(bool, False, RECOMPUTE, lambda o: o.shareGradInput or o.optnet),
    "resetClassifier": Flag(bool, False, "model.reset_classifier",
                            lambda o: o.resetClassifier and not o.resume),
    "nClasses": Flag(int, 0, "model.classes", lambda o: o.nClasses or None, at_least=0),
}
OWN_FLAGS = {"cardinality", "baseWidth", "bottleneckType"}  # that only ResNeXt's opts.lua has
PLAIN = "has no effect on a plain ResNet, as in the original"
RECOMPUTED = "saves memory by computing blocks twice: a third slower, same result; omit it if memory suffices"
# (flag, when its meaning differs, how); {flag} stands for a flag's value, {share} for the images per GPU.
NOTES: list[tuple[str, Callable[[SimpleNamespace], object], str]] = [
    ("cardinality", lambda o: o.plain and o.cardinality != 1, PLAIN),
    ("baseWidth", lambda o: o.plain and o.baseWidth != 64, PLAIN),
    ("bottleneckType", lambda o: o.bottleneckType == "resnext_B" and not o.plain,
     "C is the same function and much faster; resnext.convert_form converts weights"),
    ("shortcutType", lambda o: o.shortcutType == "A" and not o.basic,
     "pads new channels with zeros; the original's own A could not be run"),
    ("retrain", lambda o: o.retrain and o.resume, "not used: -resume overrides it, as in the original"),
    ("retrain", lambda o: o.retrain and not o.resume,
     "the original used the network in the file and ignored the other flags; here they must describe it"),
    ("nClasses", lambda o: o.nClasses,
     "must match the data; the original used it only with -resetClassifier"),
    ("dataset", lambda o: o.imagenet,
     "data.pipeline is fast, which resizes with antialiasing; torch7 equals the original's arithmetic, at a "
     "third of the speed. The last layer has one output per folder of train/, not always 1000"),
    ("nThreads", lambda o: o.imagenet,
     "DataLoader workers of each of {nGPU} training processes; they do not affect the images. The default is "
     "one per CPU core"),
    ("netType", lambda o: o.facebook and "netType" not in o.given,
     "fb.resnet.torch's networks and defaults, because no flag is one of ResNeXt's own (-baseWidth, "
     "-cardinality, -bottleneckType)"),
    ("netType", lambda o: not o.facebook and not o.given & {"netType", *OWN_FLAGS},
     "ResNeXt's network and defaults, because fb.resnet.torch has none of {depth} layers"),
    ("dataset", lambda o: not o.imagenet, "downloaded to --data if missing, not to -gen"),
    ("nThreads", lambda o: not o.imagenet and "nThreads" in o.given,
     "not used, because the dataset is held in memory"),
    ("nGPU", lambda o: o.batchSize % o.nGPU,
     "does not divide the batch of {batchSize}: the original's first GPUs got one more image. torchrun with "
     "{nGPU} processes does the same; for another number of processes, choose a train.batch_size and a "
     "train.bn_group that divides it"),
    ("nGPU", lambda o: o.batchSize % o.nGPU == 0,
     "the batch is the global one, as in the original; BatchNorm normalizes over {share} images, as on one "
     "GPU of the original, on any number of processes"),
    ("precision", lambda o: o.precision == "half",
     "not the same: the original kept weights and momentum in half precision; fp16 is autocast with loss "
     "scaling"),
    ("shareGradInput", lambda o: o.shareGradInput, RECOMPUTED),
    ("optnet", lambda o: o.optnet, RECOMPUTED),
    ("manualSeed", lambda o: "manualSeed" in o.given,
     "random numbers differ from Torch7's; 0 seeds the loaders too, unlike in the original"),
    ("backend", lambda o: "backend" in o.given, "has no counterpart; PyTorch chooses"),
    ("gen", lambda o: "gen" in o.given, "not needed; file lists are cached elsewhere"),
    ("resume", lambda o: o.resume,
     "continues from its latest.t7 and writes to --output; the Lua folder does not change"),
    ("optimState", lambda o: "optimState" in o.given and o.resume, "included in --resume"),
    ("epochNumber", lambda o: "epochNumber" in o.given and o.resume, "included in --resume"),
    ("tenCrop", lambda o: o.tenCrop, "validation uses one crop; the last command uses ten, after training"),
]
# fmt: on


def main() -> None:
    words, output = parse_arguments()
    options = read_flags(words)
    check_options(options)
    text = evaluation(options, words) if options.testOnly else training(options, words, output or "my.yaml")
    if output is None:
        print(text, end="")
        return
    if Path(output).exists():
        raise UserError(f"--output {output}: exists already; name another file")
    write_file("--output", output, text)
    print(f"wrote {output}; its first lines are the commands to run")


def parse_arguments() -> tuple[list[str], str | None]:
    """Return the words of the Lua command line after main.lua, and --output."""
    parser = command_parser(__doc__)
    parser.allow_abbrev, parser.usage = False, "%(prog)s [--output FILE] [th main.lua] -flag value ..."
    parser.add_argument("-help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--output", metavar="FILE", help="write to a new file; default: print")
    arguments, words = parser.parse_known_args()
    if len(words) == 1:
        try:
            words = shlex.split(words[0].replace("\\\n", " "))
        except ValueError as error:
            raise UserError(f"the command line: {error}; close its quotes") from None
    ends = [i for i, word in enumerate(words) if word.endswith("main.lua")]
    return words[ends[0] + 1 :] if ends else words, arguments.output


def read_flags(words: list[str]) -> SimpleNamespace:
    """Return the values of all flags, the names of those `given`, and what follows from them."""
    given: dict[str, Value] = {}
    rest = iter(words)
    for word in rest:
        name = word.removeprefix("-")
        if name == word or name not in FLAGS:
            raise UserError(f"{word[:60]!r}: not a flag of opts.lua; {flag_hint(word)}")
        if name in given:
            raise UserError(f"-{name}: given twice; keep one")
        text = next(rest, "-none")
        if re.match("-+[A-Za-z]", text):
            usage = f"-{name} {'true' if FLAGS[name].kind is bool else 'VALUE'}"
            raise UserError(f"-{name}: has no value; write {usage}, as for the Lua code")
        given[name] = read_value(name, text)
    o = SimpleNamespace(**{name: flag.default for name, flag in FLAGS.items()} | given, given=set(given))
    o.imagenet, o.share = o.dataset == "imagenet", o.batchSize // o.nGPU
    o.data = o.data or ("DIR" if o.imagenet else "datasets")  # the original kept CIFAR in -gen
    o.stem = "imagenet" if o.imagenet else "cifar"
    complete_network(o)
    return o


def complete_network(o: SimpleNamespace) -> None:
    """Add which of the two programs the flags are for, what its network is, and its defaults."""
    paths = o.given & OWN_FLAGS
    kinds = ("basic", "bottleneck") if o.imagenet else ("basic",)
    if "netType" not in o.given and not paths:
        fits = any(stages_by_depth(kind, o.depth, o.stem) for kind in kinds)
        o.netType = "resnet" if fits or not stages_by_depth("bottleneck", o.depth, o.stem) else "resnext"
    o.facebook = o.netType != "resnext" and not paths
    o.plain = o.facebook or o.bottleneckType == "resnet"
    o.basic = o.facebook and bool(stages_by_depth("basic", o.depth, o.stem))
    o.kinds = kinds if o.facebook else ("bottleneck",)
    o.usual_shortcut = "A" if o.facebook and not o.imagenet else "B"
    o.shortcutType = o.shortcutType or o.usual_shortcut
    o.usual_epochs = (90 if o.imagenet else 164) if o.facebook else 100 if o.imagenet else 300


def flag_hint(word: str) -> str:
    """Return what an unknown word of the command line was probably meant to be."""
    lower = {name.lower(): name for name in FLAGS}
    close = difflib.get_close_matches(word.lower().lstrip("-").partition("=")[0], lower, n=1)
    if close:
        return f"did you mean -{lower[close[0]]}?"
    if word.startswith("-"):
        return f"the flags are -{', -'.join(FLAGS)}"
    return "write -flag value pairs, as after th main.lua"


def read_value(name: str, text: str) -> Value:
    """Return a value as the type of its flag; raise UserError if it is outside the limits."""
    flag, where = FLAGS[name], f"-{name}:"
    if not text.isprintable():
        raise UserError(f"{where} its value has unprintable characters; give plain text")
    if flag.kind is str:
        return None if text in ("", "none") else text
    value = convert(flag.kind, yaml.ScalarNode("", text), where)
    if flag.at_least is not None:
        check_limits(value, {"at_least": flag.at_least}, where)
    elif flag.kind in (int, float):
        check_limits(value, KEYS[flag.key].metadata["limits"], where)
    return value


def check_options(o: SimpleNamespace) -> None:
    """Raise UserError for what the original refused, and for what has no counterpart here."""
    depths = [depth for kind in o.kinds for depth in STAGES[kind] if depth != 200 or o.netType == "preresnet"]
    depths = ", ".join(map(str, depths))
    if not o.imagenet:
        depths = "6n+2 (20, 32, 44, ...)" if o.facebook else "9n+2 (20, 29, 38, ...)"
    fits = any(stages_by_depth(kind, o.depth, o.stem) for kind in o.kinds)
    source = o.resume or o.retrain
    look = f", see python scripts/describe.py {shlex.quote(source)}" if source else ""
    apart = "network, optimizer, and epoch belong together; give -resume DIR, the folder with latest.t7"
    # fmt: off
    refused = [
        (o.shareGradInput and o.optnet,
         "-optnet: excludes -shareGradInput, as in the original; keep one of the two"),
        (o.resetClassifier and not o.nClasses,
         "-resetClassifier: needs -nClasses, as in the original; give the number of classes"),
        (o.precision == "double", "-precision double: not offered; omit it (fp32), or give -precision half"),
        (o.tenCrop and not o.imagenet, f"-tenCrop: not for the 32 pixels of {o.dataset}; omit it"),
        (o.testOnly and not source,
         "-testOnly: needs a network; name its file with -retrain, or its folder with -resume"),
    ]
    if not o.testOnly:
        refused += [
            (o.optimState and not o.resume, f"-optimState: {apart}"),
            (o.epochNumber > 1 and not o.resume, f"-epochNumber: {apart}"),
            (o.momentum == 0, "-momentum 0: Nesterov momentum must be above 0, as in the original; raise it"),
            (o.nGPU > o.batchSize,
             f"-nGPU {o.nGPU}: more GPUs than images (-batchSize {o.batchSize}); lower it"),
            ("depth" not in o.given and (source or not fits),
             f"-depth: missing, and the original's default is 34 layers; give {depths}{look}"),
            (o.depth == 200 and o.netType != "preresnet",
             "-depth 200: only preresnet.lua has 200 layers; give -netType preresnet"),
            (not fits, f"-depth {o.depth}: {o.netType} on {o.dataset} has {depths} layers; change it"),
        ]
    # fmt: on
    for applies, message in refused:
        if applies:
            raise UserError(message)


def translate(o: SimpleNamespace) -> dict[str, Value]:
    """Return section.key → value of all keys that differ from our defaults, in the order of the schema."""
    values = {
        "model.stem": "imagenet" if o.imagenet else "cifar",
        "model.preactivation": o.netType == "preresnet",
        "augment.padding": 0 if o.imagenet else 4,
        "schedule.name": "imagenet_step" if o.imagenet else "multistep" if o.facebook else "cifar_step",
    }
    if o.facebook and not o.imagenet:
        values["schedule.milestones"] = (80, 121)
    if o.plain and not o.basic and stages_by_depth("basic", o.depth, o.stem):  # 20 layers may be either
        values["model.block_type"] = "bottleneck"
    for name, flag in FLAGS.items():
        if flag.key:
            values[flag.key] = flag.value(o) if flag.value else getattr(o, name)
    return {name: values[name] for name, key in KEYS.items() if values.get(name, key.default) != key.default}


def training(options: SimpleNamespace, words: list[str], name: str) -> str:
    """Return the configuration: commands, then each note above the key of its flag, or else at the top."""
    values = translate(options)
    top: list[str] = []
    beside: dict[str, list[str]] = {key: [] for key in values}
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
    """Return the commands that train on one GPU and on as many as the original used, and test ten crops."""
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
    """Return only comments, because evaluate.py needs no configuration."""
    command = ["python", "evaluate.py", options.resume or options.retrain, "--data", options.data]
    command += ["--ten-crop"] * options.tenCrop + ["--precision", "fp16"] * (options.precision == "half")
    note = "-testOnly true: the file describes its network and preprocessing, so no configuration is needed; "
    note += "of the other flags, only -data, -tenCrop, and -precision matter"
    return "\n".join([*heading(words, [shlex.join(command)]), *comment(note), ""])


def heading(words: list[str], commands: list[str]) -> list[str]:
    """Return the commands, as in configs/, and then what was translated."""
    return [f"# {command}" for command in commands] + [f"# for: th main.lua {shlex.join(words)}", "#"]


def comment(note: str, indent: str = "") -> list[str]:
    """Return a note as lines of comment."""
    wrapper = textwrap.TextWrapper(110, f"{indent}# ", f"{indent}#   ", break_on_hyphens=False)
    wrapper.break_long_words = False
    return wrapper.wrap(note)


if __name__ == "__main__":
    run_main(main)
