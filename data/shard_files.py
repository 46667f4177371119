"""Which files are the tar shards of a dataset: those of a folder, or of a pattern; none may be missing."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from resnext.classes import abbreviate
from resnext.errors import UserError

from .image_folder import OTHER_NAMES, class_folders
from .imagenet_archives import TRAIN, VAL
from .walk import is_hidden, to_bytes

WORDS = {split: (split, *names) for split, names in OTHER_NAMES.items()}
CLEAR = ("train", "training", "val", "valid", "validation")  # they decide if test, dev, or eval is also there
EXAMPLE = "train-0000.tar and val-0000.tar, or train/0000.tar and val/0000.tar"


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern stands for: x{0000..1023}, x{a,b}, also one inside the other."""
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    parts, depth = [""], 1
    for letter in rest:
        depth += (letter == "{") - (letter == "}")
        if not depth:
            break
        if letter == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += letter
    ends = expand_braces(rest[len(",".join(parts)) + 1 :])
    span = re.fullmatch(r"([0-9]{1,7})\.\.([0-9]{1,7})", ",".join(parts))
    if span:
        parts = [f"{number:0{len(span[1])}}" for number in range(int(span[1]), int(span[2]) + 1)]
    if depth or len(parts) < 2:
        raise UserError(f"data.dir {pattern}: has braces without alternatives; write {{00..09}} or {{a,b}}")
    return [before + middle + last for part in parts for middle in expand_braces(part) for last in ends]


def split_files(root: str, suffix: str = ".tar", depth: int = 2) -> dict[str, list[Path]]:
    """Return the files of train and val in a folder, down to `depth` levels, or of a pattern, sorted by name.

    A word in its own name, or else in that of its folder, says which split a file belongs to: train, val, or
    what other people call these. Raise UserError if files of a pattern do not exist, or a split is ambiguous.
    """
    base = Path(os.path.abspath(Path(os.fsdecode(to_bytes(root))).expanduser()))
    if base.is_dir():
        patterns = ["*/" * level + f"*{suffix}" for level in range(depth)]
        found = [path for pattern in patterns for path in base.glob(pattern) if path.is_file()]
        files = sorted(path for path in found if not is_hidden(os.fsencode(path.name)))
    else:
        files = sorted(map(Path, expand_braces(str(base))))
        missing = [path for path in files if not path.is_file()]
        if missing:
            more = f" ({len(missing):,} of {len(files):,} files are missing)" if files[1:] else ""
            raise UserError(
                f"data.dir {root}: {missing[0]} does not exist{more}; name a local folder, or local files as "
                "in 'x-{train,val}-{000..099}.tar'"
            )
    words: dict[str, list[Path]] = {}
    for path in files:
        words.setdefault(_split_word(path, base), []).append(path)
    splits = {}
    for split, names in WORDS.items():
        used = [name for name in names if name in words]
        splits[split] = words[used[0]] if used else []
        alike = [(name, path) for name in used if name in CLEAR or name == used[0] for path in words[name]]
        forms = {(name, path.parent if base.is_dir() else None): path for name, path in alike}
        if len(forms) > 1:
            first, second, *_ = forms.values()
            raise UserError(
                f"data.dir {root}: has two sets of {split} files, with {first} and {second}; name the files "
                "of one set alike, or give the folder of one"
            )
    return splits


def _split_word(path: Path, base: Path) -> str:
    """Return the word that names the split of a file, or "". Raise UserError if it names both."""
    for name in (path.stem, path.parent.name * (path.parent != base)):
        words = [word for word in re.split("[^a-z]+", name.lower()) if word in sum(WORDS.values(), ())]
        words = [word for word in words if word in CLEAR] or words
        both = not any(set(words) <= set(names) for names in WORDS.values())
        if both and name == path.stem:
            raise UserError(f"{path}: names two splits, {words[0]} and {words[-1]}; rename it")
        if words and not both:
            return words[0]
    return ""


def unused_files(root: str) -> list[str]:
    """Return a warning if a folder has tar files that are compressed, or whose names have no split."""
    base = Path(os.path.abspath(Path(os.fsdecode(to_bytes(root))).expanduser()))
    tars = sorted(path for pattern in ("*.t*", "*/*.t*") for path in base.glob(pattern))
    names = [path.name for path in tars if path.suffix == ".tar" and not _split_word(path, base)]
    names += [path.name for path in tars if path.name.endswith((".tar.gz", ".tgz"))]
    found = f"warning: {base}: skipped tar files that are compressed or have no split in their name"
    return [f"{found}: {len(names):,} ({abbreviate(names)})"] if names else []


def check_numbers(files: Sequence[Path]) -> None:
    """Raise UserError if files of a split are missing by their numbers: x-00000-of-00003, or x-0000."""
    patterns = ("([0-9]{1,7})-of-([0-9]{1,7})", "(?<![0-9])([0-9]{1,7})()$")
    found = [re.search(patterns[0], path.stem) or re.search(patterns[1], path.stem) for path in files]
    numbers = {int(match[1]) for match in found if match}
    totals = {int(match[2]) for match in found if match and match[2]}
    first, last = (0, max(totals)) if totals else (min(numbers, default=0), max(numbers, default=0) + 1)
    missing = sorted(set(range(first, last)) - numbers)
    if missing and (totals or len(missing) <= len(numbers)):
        raise UserError(
            f"{files[0]}, …: number {missing[0]} is missing ({len(missing):,} of {last - first:,} files); "
            "get the missing files, or name the other shards in a pattern"
        )


def is_sharded(root: str) -> bool:
    """Return whether a folder has shards, and no class folders, or a name is a pattern of shards."""
    base = Path(os.fsdecode(to_bytes(root))).expanduser()
    if not base.is_dir():
        return "{" in root or root.endswith(".tar")
    val = base / "val"
    images = val.is_dir() and (class_folders(val) or not any(val.glob("*.tar")))
    return not images and any(split_files(root).values())


def find_shards(root: str, split: str) -> list[Path]:
    """Return the shards of a split. Raise UserError if there are none, or _info.json lists others too."""
    shards = split_files(root)[split]
    if not shards:
        compressed = [path for ending in (".tar.gz", ".tgz") for path in split_files(root, ending)[split]]
        remedy = f"decompress {compressed[0].name} (gunzip)" if compressed else f"name them {EXAMPLE}"
        folder = Path(root).expanduser() / split
        if folder.is_dir() and class_folders(folder):
            remedy = "for class folders, set data.dataset=folder"
        raise UserError(f"data.dir {root}: has no shards of {split}; {remedy}")
    if shards[0].name in (TRAIN, VAL):
        raise UserError(f"{shards[0]}: is ImageNet's archive; unpack it with scripts/prepare_imagenet.py")
    listed, file = set(listed_shards(shards)[0]), common_folder(shards) / "_info.json"
    if not Path(root).expanduser().is_dir():  # a pattern may name some of them
        return shards
    missing, strange = sorted(listed - set(shards)), sorted(set(shards) - listed) if listed else []
    if missing:
        raise UserError(
            f"{file}: lists {missing[0].name}, which does not exist (missing files: {len(missing):,}); add "
            "it, or name the files in a pattern"
        )
    if strange:
        raise UserError(f"{strange[0]}: is not listed in {file.name}; remove one of the two")
    check_numbers(shards)
    return shards


def common_folder(shards: Sequence[Path]) -> Path:
    """Return the folder of the files about all shards: theirs, or the one with train/ and val/."""
    folder = shards[0].parent
    return folder.parent if any(folder.name.lower() in names for names in WORDS.values()) else folder


def listed_shards(shards: Sequence[Path]) -> tuple[list[Path], object]:
    """Return the shards of the same split in _info.json, of timm or make_shards.py, and its image count."""
    try:
        splits = json.loads((common_folder(shards) / "_info.json").read_bytes())["splits"].values()
        lists = [
            ([common_folder(shards) / name for name in s["filenames"]], s.get("num_samples")) for s in splits
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return [], None
    return next((found for found in lists if shards[0] in found[0]), ([], None))
