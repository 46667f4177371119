"""YAML read strictly: nodes with their lines, scalars as the declared type, never by guessing.

PyYAML's own conversion takes `1e-4` for a text, `no` for false, `0x10`, `1_000` and `12:30` for
numbers, and lets the last of two equal keys win. Here nothing is constructed: the text of each
scalar is converted to the type that its key declares, or refused with its line.
"""

import difflib
import math
import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from .errors import UserError

PLAIN_TAGS = {"str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value"}


def compose(text: str, source: str) -> yaml.Node | None:
    """Parse YAML into nodes, which still know their text and line; nothing is constructed."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_tags(node, source, set())
        return node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "unreadable characters"
        raise UserError(f"{source}{line}: not valid YAML: {what}") from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply; sections hold plain keys") from None


def _check_tags(node: yaml.Node | None, source: str, seen: set[int]) -> None:
    """Refuse explicit tags such as !!python/object anywhere; plain YAML needs none."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    name = node.tag.removeprefix("tag:yaml.org,2002:")
    if name not in PLAIN_TAGS:
        line = node.start_mark.line + 1
        raise UserError(f"{source}, line {line}: remove the tag {name[:60]!r}; values are plain text")
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in child if isinstance(child, tuple) else (child,):
            _check_tags(part, source, seen)


def unique_keys(node: yaml.MappingNode, source: str, prefix: str) -> Iterator[tuple[str, yaml.Node, str]]:
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        where = f"{source}, line {line}"
        key = key_node.value
        if not isinstance(key, str):
            raise UserError(f"{where}: a key must be a plain word, not {describe(key_node)}")
        if key in lines:
            raise UserError(f"{where}: duplicate key {prefix}{key} (first on line {lines[key]}); keep one")
        lines[key] = line
        yield key, value, where


def convert(kind: Any, node: yaml.Node, where: str) -> Any:
    """The value of a node as the declared type (of `X | None` as X), or a UserError that says what is expected."""
    options = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        kind = options[0]
        options = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise UserError(f"{where} must be a list such as [1, 2, 3], not {describe(node)}")
        return tuple(convert(options[0], item, where) for item in node.value)
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{where} must be {_expected(kind)}, not {describe(node)}")
    text = node.value
    if kind is str:
        if is_null(node):
            raise UserError(f"{where} must be {_expected(kind)}, not empty")
        return text
    if get_origin(kind) is Literal:
        if text not in options:
            close = difflib.get_close_matches(text.lower(), options, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"{where} must be {_expected(kind)}, not {text!r}{hint}")
        return text
    pattern = {
        bool: r"true|false",
        int: r"[+-]?(0|[1-9][0-9]*)",
        float: r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?",
    }[kind]
    if node.style is not None or not re.fullmatch(pattern, text) or len(text) > 40:
        quoted = " in quotes" if node.style is not None else ""
        raise UserError(f"{where} must be {_expected(kind)}, not {text[:40]!r}{quoted}")
    if kind is float and not math.isfinite(float(text)):
        raise UserError(f"{where} must be a finite number, not {text!r}")
    return text == "true" if kind is bool else kind(text)


def check_limits(value: Any, limits: dict[str, float], where: str) -> None:
    checks = {
        "at_least": ("at least", lambda v, limit: v >= limit),
        "at_most": ("at most", lambda v, limit: v <= limit),
        "above": ("above", lambda v, limit: v > limit),
        "below": ("below", lambda v, limit: v < limit),
    }
    for name, limit in limits.items():
        words, holds = checks[name]
        if value is not None and not holds(value, limit):
            raise UserError(f"{where} must be {words} {limit}, not {value}")


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    return {
        bool: "true or false",
        int: "an integer in plain digits",
        float: "a number such as 0.1 or 1e-4",
        str: "a text",
    }[kind]


def is_null(node: yaml.Node) -> bool:
    return (
        isinstance(node, yaml.ScalarNode)
        and node.style is None
        and node.value in ("", "~", "null", "Null", "NULL")
    )


def describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "an empty list" if not node.value else "a list"
    return "nothing (null)" if is_null(node) else repr(node.value[:40])
