"""Read a configuration from YAML and from section.key=value overrides.

Every scalar is read as the type that its key declares. PyYAML alone would guess: `1e-4` is text, `no` is
false, `0x10`, `1_000` and `12:30` are numbers, and the last of two equal keys wins.
"""

import difflib
import math
import operator
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Union, get_args, get_origin

import yaml

from ..errors import UserError
from .schema import CONFIG_FOLDER, KEYS, SECTIONS, Config, Scalar, Value
from .validate import complete

MAX_CONFIG_BYTES = 1 << 20
RENAMED = {"train.weights": "model.pretrained"}  # keys of files that earlier versions wrote
PLAIN_TAGS = {"str", "int", "float", "bool", "null", "map", "seq"}
LIMITS = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}
SCALARS: dict[object, tuple[str, str]] = {  # type: (what is expected, how it is written)
    bool: ("true or false", r"true|false"),
    int: ("an integer in plain digits", r"[+-]?(0|[1-9][0-9]*)"),
    float: ("a number such as 0.1 or 1e-4", r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"),
    str: ("a string", ""),
}


def find_config(name: str, option: str = "--config") -> Path:
    """Return the file that `option` names: a path, or a name looked up in configs/."""
    path = Path(name)
    if path.parent == Path() and not path.is_file():
        path = CONFIG_FOLDER / path
        if not path.suffix:
            path = path.with_suffix(".yaml")
    if not path.is_file():
        known = sorted(p.stem for p in CONFIG_FOLDER.glob("*.yaml"))
        close = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}.yaml?" if close else f"choose one of the files in {CONFIG_FOLDER}"
        raise UserError(f"{option} {name}: no such file; {hint}")
    return path


def read_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the defaults, changed by the file and then by the overrides, validated and completed."""
    if path is None:
        return parse_config("", "defaults", overrides)
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1).decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a YAML text file; give a configuration") from None
    return parse_config(text, str(path), overrides)


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration in YAML text, like read_config; `source` names the text in errors."""
    if len(text) > MAX_CONFIG_BYTES:
        raise UserError(f"{source}: over 1 MB, not a configuration; give a YAML file")
    given = dict(_read_sections(_compose(text, source), source))
    given |= map(_read_override, overrides)
    sections: dict[str, dict[str, Value]] = {section: {} for section in SECTIONS}
    for name, value in given.items():
        section, key = name.split(".")
        sections[section][key] = value
    return complete(Config(**{section: SECTIONS[section](**keys) for section, keys in sections.items()}))


def _read_sections(root: yaml.Node, source: str) -> Iterator[tuple[str, Value]]:
    """Yield section.key and value of everything in a YAML document."""
    if _is_null(root):
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{source}: must hold sections such as 'model:', not {_describe(root)}")
    for section, node, where in _unique_keys(root, source, ""):
        if section not in SECTIONS:
            raise UserError(f"{where}: unknown section {section!r}; {_hint(section, None)}")
        if _is_null(node):
            continue
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{where}: {section} is a section and must hold keys, not {_describe(node)}")
        for key, value, value_where in _unique_keys(node, source, f"{section}."):
            name = RENAMED.get(f"{section}.{key}", f"{section}.{key}")
            yield name, _read_value(name, value, value_where)


def _unique_keys(node: yaml.MappingNode, source: str, prefix: str) -> Iterator[tuple[str, yaml.Node, str]]:
    """Yield key, value, and "source, line N" of a mapping without duplicate keys."""
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        where = f"{source}, line {line}"
        key = key_node.value
        if not isinstance(key, str):
            raise UserError(f"{where}: a key must be a plain word, not {_describe(key_node)}")
        if key in lines:
            raise UserError(f"{where}: duplicate key {prefix}{key} (first on line {lines[key]}); keep one")
        lines[key] = line
        yield key, value, where


def _read_override(text: str) -> tuple[str, Value]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        hint = f"; did you mean --config {text}?" if text.endswith((".yaml", ".yml")) else ""
        raise UserError(
            f"{text!r}: not an override such as train.epochs=30{hint or '; write section.key=value'}"
        )
    section, dot, key = name.partition(".")
    if not dot or section not in SECTIONS:
        raise UserError(f"{text!r}: no such key; {_hint(key or section, None)}")
    return name, _read_value(name, _compose(value, repr(text)), repr(text))


def _read_value(name: str, node: yaml.Node, where: str) -> Value:
    if name not in KEYS:
        section, _, key = name.partition(".")
        raise UserError(f"{where}: unknown key {name}; {_hint(key, section)}")
    field, where = KEYS[name], f"{where}: {name}"
    if field.default is None and _is_null(node):
        return None
    value = convert(field.type, node, where)
    check_limits(value, field.metadata["limits"], where)
    return value


def _hint(word: str, section: str | None) -> str:
    """Return what an unknown key of a section, or an unknown section, was probably meant to be."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    targets = {plain(alias): name for name, key in KEYS.items() for alias in key.metadata["aliases"]}
    targets |= {plain(name.split(".")[1]): name for name in KEYS}
    if section is None:
        targets |= {plain(name): f"section {name}" for name in SECTIONS}
    if plain(word) in targets:
        return f"use {targets[plain(word)]}"
    own = {plain(key): name for key, name in targets.items() if name.startswith(f"{section}.")}
    for pool in (own, targets):
        close = difflib.get_close_matches(plain(word), pool, n=1, cutoff=0.6)
        if close:
            return f"did you mean {pool[close[0]]}?"
    if section is None:
        return "sections are " + ", ".join(SECTIONS)
    return f"keys of {section}: " + ", ".join(field.name for field in fields(SECTIONS[section]))


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's loader, which refuses tags such as !!python/object; plain YAML needs none."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        tag = (getattr(event, "tag", None) or "!").removeprefix("tag:yaml.org,2002:")
        if tag != "!" and tag not in PLAIN_TAGS:
            problem = f"tag {tag[:60]!r} is not allowed; remove it"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def _compose(text: str, source: str) -> yaml.Node:
    """Parse YAML into nodes, which keep their text and their line."""
    try:
        node = yaml.compose(text, Loader=_PlainLoader)
        return node or yaml.ScalarNode("tag:yaml.org,2002:null", "")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "unreadable characters"
        raise UserError(f"{source}{line}: not valid YAML: {what}") from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply; sections hold plain keys") from None


def convert(kind: object, node: yaml.Node, where: str) -> Value:
    """Return a node's value as the declared type (of `X | None` as X), or raise UserError."""
    options = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return convert(options[0], node, where)
    if get_origin(kind) is not tuple:
        return _convert_scalar(kind, node, where)
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise UserError(f"{where} must be a list such as [1, 2, 3], not {_describe(node)}")
    return tuple(_convert_scalar(options[0], item, where) for item in node.value)


def _convert_scalar(kind: object, node: yaml.Node, where: str) -> Scalar:
    choices = get_args(kind)
    expected, pattern = SCALARS.get(kind, ("one of " + ", ".join(choices), "|".join(choices)))
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{where} must be {expected}, not {_describe(node)}")
    text, quoted = node.value, node.style is not None and kind in (bool, int, float)
    if kind is not str and (quoted or len(text) > 40 or not re.fullmatch(pattern, text)):
        close = difflib.get_close_matches(text[:40].lower(), choices, n=1)
        hint = " in quotes" if quoted else f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"{where} must be {expected}, not {text[:40]!r}{hint}")
    if kind is float and not math.isfinite(float(text)):
        raise UserError(f"{where} must be a finite number, not {text!r}")
    if kind is bool:
        return text == "true"
    return int(text) if kind is int else float(text) if kind is float else text


def check_limits(value: Value, limits: dict[str, float], where: str) -> None:
    """Raise UserError if a number, or one of a tuple, is outside a key's limits."""
    for number in value if isinstance(value, tuple) else (value,):
        for name, limit in limits.items():
            if isinstance(number, int | float) and not LIMITS[name](number, limit):
                raise UserError(f"{where} must be {name.replace('_', ' ')} {limit}, not {number}")


def _is_null(node: yaml.Node) -> bool:
    """Return whether a node is empty or null."""
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return plain and node.value in ("", "~", "null", "Null", "NULL")


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list" if node.value else "an empty list"
    return "nothing (null)" if _is_null(node) else repr(node.value[:40])
