"""Translate a command line of the Lua code (main.lua of ResNeXt and fb.resnet.torch) into a configuration.

    python scripts/lua_flags.py th main.lua -dataset cifar10 -depth 29 -baseWidth 64 -cardinality 16 > my.yaml
    python scripts/lua_flags.py -depth 50 -baseWidth 4 -cardinality 32 -data DIR --output my.yaml
    python scripts/lua_flags.py 'th main.lua -retrain model.t7 -data DIR -testOnly true -tenCrop true'

Writes what differs from the defaults of this program, defaults of the Lua code included, headed by the
commands that run it. Where a flag means something else here, a comment says so. --output never overwrites.
"""

import difflib
import math
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from resnext.config import SECTIONS, STAGES_BY_DEPTH, to_text
from resnext.errors import UserError, command_parser, run_command
from resnext.strict_yaml import check_limits, convert


@dataclass(frozen=True)
class Flag:
    """A flag of opts.lua: type, default there, the key it becomes (whose limits hold) or limit of its own."""

    kind: Any
    default: Any = None
    key: str = ""
    at_least: int | None = None


FLAGS = {
    "data": Flag(str),
    "dataset": Flag(Literal["imagenet", "cifar10", "cifar100"], "imagenet", "data.dataset"),
    "manualSeed": Flag(int, 0, "run.seed"),
    "nGPU": Flag(int, 1, "train.bn_group"),
    "backend": Flag(Literal["cudnn", "cunn"], "cudnn"),
    "cudnn": Flag(Literal["fastest", "default", "deterministic"], "fastest", "run.deterministic"),
    "gen": Flag(str),
    "precision": Flag(Literal["single", "double", "half"], "single", "train.precision"),
    "nThreads": Flag(int, 2, "data.workers"),
    "nEpochs": Flag(int, 0, "train.epochs", at_least=0),
    "epochNumber": Flag(int, 1, at_least=1),
    "batchSize": Flag(int, 32, "train.batch_size"),
    "testOnly": Flag(bool, False),
    "tenCrop": Flag(bool, False),
    "save": Flag(str),
    "resume": Flag(str),
    "LR": Flag(float, 0.1, "optimizer.lr"),
    "momentum": Flag(float, 0.9, "optimizer.momentum"),
    "weightDecay": Flag(float, 1e-4, "optimizer.weight_decay"),
    "netType": Flag(Literal["resnext", "resnet", "preresnet"], "resnext", "model.architecture"),
    "bottleneckType": Flag(Literal["resnet", "resnext_B", "resnext_C"], "resnext_C", "model.block"),
    "depth": Flag(int, 34, "model.depth"),
    "baseWidth": Flag(int, 64, "model.base_width"),
    "cardinality": Flag(int, 1, "model.cardinality"),
    "shortcutType": Flag(Literal["A", "B", "C"], "B", "model.shortcut"),
    "retrain": Flag(str, key="model.pretrained"),
    "optimState": Flag(str),
    "shareGradInput": Flag(bool, False, "train.activation_checkpointing"),
    "optnet": Flag(bool, False, "train.activation_checkpointing"),
    "resetClassifier": Flag(bool, False, "model.reset_classifier"),
    "nClasses": Flag(int, 0, "model.classes", at_least=0),
}
DEFAULTS = {f"{section}.{f.name}": f.default for section, make in SECTIONS.items() for f in fields(make)}


def main() -> None:
    words, output = parse_arguments(sys.argv[1:])
    given = read_flags(words)
    options = SimpleNamespace(**{name: given.get(name, flag.default) for name, flag in FLAGS.items()})
    check_options(options, given)
    name = output or "my.yaml"
    text = evaluation(options, words) if options.testOnly else training(options, given, words, name)
    if output is None:
        print(text, end="")
    else:
        write_new(Path(output), text)
        print(f"wrote {output}; its first lines are the commands")


def parse_arguments(arguments: list[str]) -> tuple[list[str], str | None]:
    """(words of the Lua command line, --output); argparse would take -depth for -d."""
    parser = command_parser(__doc__)
    parser.add_argument("flags", nargs="+", metavar="-flag value", help="as they stood behind th main.lua")
    parser.add_argument("--output", metavar="FILE", help="write there; default: print")
    words = [part for word in arguments for part in split_output(word)]
    own = ["--help"] if {"-h", "-help", "--help"} & set(words) else []
    if "--output" in words:
        place = words.index("--output")
        own += words[place : place + 2]
        del words[place : place + 2]
    parsed = parser.parse_args([*own, "--", *words])
    words = parsed.flags
    if len(words) == 1:
        try:
            words = shlex.split(words[0].replace("\\\n", " "))
        except ValueError as error:
            raise UserError(f"the command line: {error}; close its quotes") from None
    ends = [i for i, word in enumerate(words) if word.endswith("main.lua")]
    return words[ends[0] + 1 :] if ends else words, parsed.output


def split_output(word: str) -> list[str]:
    """--output=FILE as two words."""
    return word.split("=", 1) if word.startswith("--output=") else [word]


def read_flags(words: list[str]) -> dict[str, Any]:
    """The values that were given, by flag."""
    given: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        name = word.removeprefix("-")
        if not word.startswith("-") or name not in FLAGS:
            raise UserError(unknown(word))
        if name in given:
            raise UserError(f"{word}: given twice; keep one")
        text = next(rest, None)
        if text is None or (text.startswith("-") and text[1:] in FLAGS):
            example = "true" if FLAGS[name].kind is bool else "VALUE"
            raise UserError(f"{word}: has no value behind it; write {word} {example}, as in the Lua code")
        given[name] = read_value(name, text)
    return given


def unknown(word: str) -> str:
    """What is wrong with a word that is no flag, and what was probably meant."""
    name = word.lstrip("-").partition("=")[0]
    lower = {flag.lower(): flag for flag in FLAGS}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    hint = f"did you mean -{lower[close[0]]}?" if close else "they are " + ", ".join(f"-{f}" for f in FLAGS)
    if not word.startswith("-") and not close:
        hint = "write -flag value pairs, as behind th main.lua"
    return f"{word[:60]!r}: not a flag of opts.lua; {hint}"


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


def check_options(options: SimpleNamespace, given: dict[str, Any]) -> None:
    """Refuse what the original refused, and what has no counterpart here."""
    if options.shareGradInput and options.optnet:
        raise UserError("-optnet: excludes -shareGradInput, as in the original; keep one of the two")
    if options.resetClassifier and not options.nClasses:
        raise UserError("-resetClassifier: needs -nClasses, as in the original; give the number of classes")
    if options.precision == "double":
        raise UserError("-precision double: not offered; leave it out (fp32), or give -precision half")
    if options.tenCrop and options.dataset != "imagenet":
        raise UserError(f"-tenCrop: has no meaning for the 32 pixels of {options.dataset}; leave it out")
    if options.testOnly:
        if not (options.resume or options.retrain):
            raise UserError("-testOnly: of which network? Name its file with -retrain, or -resume DIR")
        return
    if not options.resume:
        for name, meant in (("optimState", options.optimState), ("epochNumber", options.epochNumber > 1)):
            if meant:
                raise UserError(
                    f"-{name}: here network, optimiser and epoch go on together; give -resume DIR, the "
                    "folder with latest.t7"
                )
    if options.momentum == 0:
        raise UserError("-momentum 0: Nesterov's momentum needs more, as in the original; raise it")
    if options.nGPU > options.batchSize:
        raise UserError(f"-nGPU {options.nGPU}: more GPUs than images (-batchSize {options.batchSize})")
    check_depth(options, given)


def check_depth(options: SimpleNamespace, given: dict[str, Any]) -> None:
    """The original's default, 34, is one of basic blocks, and there are only bottlenecks here."""
    imagenet = options.dataset == "imagenet"
    valid = "50, 101 or 152" if imagenet else "9n+2, such as 29"
    if "depth" not in given:
        source = options.resume or options.retrain
        look = f", see python scripts/describe.py {shlex.quote(source)}" if source else ""
        raise UserError(
            "-depth: is missing, and the original's default of 34 layers is for basic blocks; give "
            f"{valid}{look}"
        )
    if not imagenet and plain_resnet(options, given) and options.bottleneckType != "resnet":
        raise UserError(
            f"-netType {options.netType}: fb.resnet.torch's networks for CIFAR have other blocks and widths, "
            "which are not offered; give -netType resnext -bottleneckType resnet"
        )
    if options.depth not in STAGES_BY_DEPTH if imagenet else options.depth < 11 or (options.depth - 2) % 9:
        raise UserError(f"-depth {options.depth}: bottlenecks on {options.dataset} need {valid} layers")


def plain_resnet(options: SimpleNamespace, given: dict[str, Any]) -> bool:
    """Whether the network is a ResNet: -bottleneckType resnet, or the files resnet.lua, preresnet.lua."""
    paths = {"cardinality", "baseWidth", "bottleneckType"} & given.keys()
    return options.bottleneckType == "resnet" or (options.netType != "resnext" and not paths)


# ---------------------------------------------------------------------------- translating


def translate(options: SimpleNamespace, given: dict[str, Any]) -> dict[str, Any]:
    """section.key → value of all that the flags say, where it is not our default."""
    cifar, plain = options.dataset != "imagenet", plain_resnet(options, given)
    values = {
        "model.stem": "cifar" if cifar else "imagenet",
        "model.architecture": "resnet" if plain else "resnext",
        "model.depth": options.depth,
        "model.cardinality": None if plain else options.cardinality,
        "model.base_width": None if plain else options.baseWidth,
        "model.block": "B" if options.bottleneckType == "resnext_B" and not plain else "C",
        "model.shortcut": options.shortcutType,
        "model.preactivation": options.netType == "preresnet",
        "model.classes": options.nClasses or None,
        "model.pretrained": None if options.resume else options.retrain,
        "model.reset_classifier": options.resetClassifier and not options.resume,
        "data.dataset": options.dataset if cifar else "folder",
        "data.workers": None if cifar else math.ceil(options.nThreads / options.nGPU),
        "augment.padding": 4 if cifar else 0,
        "train.epochs": options.nEpochs or (300 if cifar else 100),
        "train.batch_size": options.batchSize,
        "train.bn_group": None if options.batchSize % options.nGPU else options.batchSize // options.nGPU,
        "train.precision": "fp16" if options.precision == "half" else "fp32",
        "train.activation_checkpointing": options.shareGradInput or options.optnet,
        "optimizer.lr": options.LR,
        "optimizer.momentum": options.momentum,
        "optimizer.weight_decay": options.weightDecay,
        "schedule.name": "cifar_step" if cifar else "imagenet_step",
        "run.seed": options.manualSeed,
        "run.deterministic": options.cudnn == "deterministic",
    }
    return {key: value for key, value in values.items() if value != DEFAULTS.get(key)}


def notes_on_network(options: SimpleNamespace, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(flag, how its meaning differs): network and weights."""
    plain = plain_resnet(options, given)
    for name in ("cardinality", "baseWidth"):
        if plain and name in given and given[name] != FLAGS[name].default:
            yield name, "without meaning for a plain ResNet, there and here"
    if options.bottleneckType == "resnext_B" and not plain:
        yield (
            "bottleneckType",
            "C is the same function and much faster; resnext.model.convert_form takes weights over",
        )
    if options.shortcutType == "A":
        yield "shortcutType", "zeros for the channels that are new; the original's own A could not be run"
    if options.retrain and options.resume:
        yield "retrain", "not used, as -resume comes first, there and here"
    elif options.retrain:
        yield (
            "retrain",
            "the original took the network from the file, whatever the other flags said; here they must "
            "describe the network in the file",
        )
    if options.nClasses:
        yield "nClasses", "must be what the data has; the original read it with -resetClassifier only"


def notes_on_training(options: SimpleNamespace, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(flag, how its meaning differs): data and optimisation."""
    gpus, batch = options.nGPU, options.batchSize
    if options.dataset == "imagenet":
        yield (
            "dataset",
            "data.pipeline is fast, which resizes with antialiasing; torch7 is the original's arithmetic, "
            "equal to its output, at a third of the speed. The last layer has one output for each folder of "
            "train/, not always 1000",
        )
        yield (
            "nThreads",
            f"loader processes, for each of {gpus} training processes; they change no pixel, and without the "
            "key there is one a core",
        )
        if options.netType != "resnext" and not options.nEpochs:
            yield "nEpochs", "100, as in ResNeXt's code; fb.resnet.torch's default was 90"
    else:
        yield "dataset", "downloaded into --data where it is missing, not into -gen"
        if "nThreads" in given:
            yield "nThreads", "the set is held in memory, there are no loaders"
    if batch % gpus:
        yield (
            "nGPU",
            f"does not divide the batch of {batch}: the original's first GPUs got an image more. torchrun "
            f"with {gpus} processes does the same; for another number choose a train.batch_size and a "
            "train.bn_group that divides it",
        )
    else:
        yield (
            "nGPU",
            f"the batch is the global one, there and here; BatchNorm works over {batch // gpus} images, as "
            "on one GPU of the original, on however many processes this runs",
        )
    if options.precision == "half":
        yield (
            "precision",
            "not the same: the original kept weights and momentum in half precision, this is autocast with "
            "loss scaling",
        )
    for name in ("shareGradInput", "optnet"):
        if getattr(options, name):
            yield (
                name,
                "saves memory by computing blocks twice, a third more time for the same result; better left "
                "out where memory suffices",
            )


def notes_on_program(options: SimpleNamespace, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(flag, how its meaning differs): what is not learnt."""
    if "manualSeed" in given:
        unseeded = "" if options.manualSeed else "; the original's loaders were not seeded with 0, ours are"
        yield "manualSeed", f"other random numbers than Torch7's{unseeded}"
    if "backend" in given:
        yield "backend", "without a counterpart, PyTorch chooses"
    if "gen" in given:
        yield "gen", "not needed; lists of files are cached elsewhere"
    if options.resume:
        yield "resume", "goes on from its latest.t7, and writes to --output: the Lua folder stays as it is"
    for name in ("optimState", "epochNumber"):
        if name in given and options.resume:
            yield name, "comes with --resume"
    if options.tenCrop:
        yield "tenCrop", "validation takes one crop; the last command takes ten, afterwards"


# ---------------------------------------------------------------------------- writing


def training(options: SimpleNamespace, given: dict[str, Any], words: list[str], name: str) -> str:
    """The configuration: commands, then each note at the key that its flag became, or on top without one."""
    values = translate(options, given)
    top, beside = [], {key: [] for key in values}
    for notes in (notes_on_network, notes_on_training, notes_on_program):
        for flag, note in notes(options, given):
            said = f"-{flag} {to_text(getattr(options, flag))}" + ("" if flag in given else " (default)")
            beside.get(FLAGS[flag].key, top).append(f"{said}: {note}")
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
    stem = Path(name).stem
    words = ["train.py", "--config", name, "--data", data_folder(options)]
    output = options.save
    if options.resume:
        same = output is None or Path(output).absolute() == Path(options.resume).absolute()
        output = f"runs/{stem}" if same else output
        words += ["--resume", options.resume]
    words += ["--output", output] if output else []
    commands = [["python", *words]]
    if options.nGPU > 1:
        commands.append(["torchrun", f"--nproc-per-node={options.nGPU}", *words])
    if options.tenCrop:
        commands.append(["python", "evaluate.py", output or f"runs/{stem}", "--ten-crop"])
    return list(map(shlex.join, commands))


def evaluation(options: SimpleNamespace, words: list[str]) -> str:
    """Comments alone: evaluate.py needs no configuration."""
    command = ["python", "evaluate.py", options.resume or options.retrain, "--data", data_folder(options)]
    command += ["--ten-crop"] if options.tenCrop else []
    command += ["--precision", "fp16"] if options.precision == "half" else []
    note = (
        "-testOnly true: the file tells network and preprocessing, no configuration is needed; of the other "
        "flags only -data, -tenCrop and -precision matter"
    )
    return "\n".join([*heading(words, [shlex.join(command)]), *comment(note), ""])


def data_folder(options: SimpleNamespace) -> str:
    """--data: the original kept CIFAR in -gen, and had no default for ImageNet."""
    return options.data or ("DIR" if options.dataset == "imagenet" else "datasets")


def heading(words: list[str], commands: list[str]) -> list[str]:
    """The commands first, as in configs/, then what was translated."""
    return [f"# {command}" for command in commands] + [f"# for: th main.lua {shlex.join(words)}", "#"]


def comment(note: str, indent: str = "") -> list[str]:
    """A note as lines of comment."""
    lead = f"{indent}# "
    return textwrap.wrap(
        note,
        110,
        initial_indent=lead,
        subsequent_indent=f"{lead}  ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet, whole or not at all."""
    try:
        file = open(path, "x", encoding="utf-8")  # noqa: SIM115
    except FileExistsError:
        raise UserError(f"--output {path}: exists already; name another file") from None
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror}); name another file") from None
    try:
        with file:
            file.write(text)
    except OSError as error:
        path.unlink()
        raise UserError(f"--output {path}: cannot be written ({error.strerror}); name another file") from None


if __name__ == "__main__":
    run_command(main)
