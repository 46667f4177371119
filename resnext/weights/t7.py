"""Read Torch7's .t7 files, binary and ASCII, as plain values; nothing in them is executed.

    nil, boolean, number, string   None, bool, float, str (bytes that are not UTF-8 as surrogates)
    table                          Table; Lua's lists have the keys 1, 2, ...
    tensor, storage                torch.Tensor; tensors that shared a storage share memory
    any other object               Object: its class name and its table of fields

What the same index refers to is the same Python object, loops included. The tensors of a binary file need
no more memory than the file; a file with nothing but tables needs about twenty times its size. Counts are
checked against the bytes left, tensors stay views inside their storages, nesting is limited, and functions
are refused.
"""

import re
import struct
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidFileError
from ..safe_pickle import view

MAX_DEPTH = 200  # of objects inside objects; networks have about 40

NIL, NUMBER, STRING, TABLE, TORCH, BOOLEAN, FUNCTIONS = 0, 1, 2, 3, 4, 5, (6, 7, 8)

ELEMENTS: dict[str, type[np.generic]] = {
    "Byte": np.uint8,
    "Char": np.int8,
    "Short": np.int16,
    "Int": np.int32,
    "Long": np.int64,
    "Half": np.float16,
    "Float": np.float32,
    "Double": np.float64,
}

Value: TypeAlias = "bool | float | str | Tensor | Table | Object | None"
Key: TypeAlias = "bool | float | str | Table | Object"


class Table:
    """A Lua table. Unlike in a dict, its keys 1 and true differ; a table equals only itself."""

    def __init__(self) -> None:
        self._values: dict[tuple[bool, Key], Value] = {}

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Key) -> bool:
        return (isinstance(key, bool), key) in self._values

    def __setitem__(self, key: Key, value: Value) -> None:
        self._values[isinstance(key, bool), key] = value

    def get(self, key: Key) -> Value:
        return self._values.get((isinstance(key, bool), key))

    def items(self) -> list[tuple[Key, Value]]:
        return [(key, value) for (_, key), value in self._values.items()]


@dataclass(eq=False)
class Object:
    """An object that is neither tensor nor storage, such as an nn module."""

    class_name: str
    fields: Table = field(default_factory=Table)


def parse_t7(content: bytes) -> Value:
    """Return the value in a .t7 file's bytes, binary or ASCII. Raise InvalidFileError if it is damaged."""
    reader = _Reader(_Binary(content) if is_binary(content) else _Ascii(content))
    return reader.value(0)


def is_t7(content: bytes) -> bool:
    """Return whether a file begins as a .t7 file does."""
    return is_binary(content) or (content[:1].isdigit() and content[1:2] in (b"\n", b"\r"))


def is_binary(content: bytes) -> bool:
    """Return whether a file begins with the type of a value as an int32."""
    return len(content) >= 4 and struct.unpack_from("<i", content)[0] <= 8 and content[1:4] == b"\0\0\0"


class _Items:
    """Bytes, read one item after another."""

    def __init__(self, content: bytes):
        self.content, self.place = content, 0

    def take(self, count: int) -> bytes:
        left = len(self.content) - self.place
        if not 0 <= count <= left:
            raise InvalidFileError(f"cut off or damaged (got {left} bytes, expected {count})")
        self.place += count
        return self.content[self.place - count : self.place]


class _Binary(_Items):
    """The items of a little-endian binary file."""

    def integer(self) -> int:
        return struct.unpack("<i", self.take(4))[0]

    def longs(self, count: int) -> list[int]:
        return list(struct.unpack(f"<{count}q", self.take(8 * count)))

    def number(self) -> float:
        return struct.unpack("<d", self.take(8))[0]

    def elements(self, kind: type[np.generic], count: int) -> np.ndarray:
        return np.frombuffer(self.take(count * np.dtype(kind).itemsize), kind).copy()


class _Ascii(_Items):
    """The items of a text file: numbers as words, strings and bytes as they are, each item on a line."""

    def take(self, count: int) -> bytes:
        found = super().take(count)
        if count and self.content[self.place : self.place + 1] == b"\n":
            self.place += 1
        return found

    def line(self) -> bytes:
        end = self.content.find(b"\n", self.place)
        end = len(self.content) if end < 0 else end
        found = self.content[self.place : end]
        self.place = end + 1
        return found

    def numbers(self, convert: type[int] | type[float], count: int) -> np.ndarray:
        """Return the `count` numbers of the next line, as int64 or float64."""
        words = re.finditer(rb"\S+", self.line() if count else b"")  # a list would need much more memory
        try:
            numbers = np.fromiter((convert(word[0]) for word in words), convert)
        except (ValueError, OverflowError):
            raise InvalidFileError("damaged (something else stands in place of a number)") from None
        if len(numbers) != count:
            raise InvalidFileError(f"damaged (got {len(numbers)} numbers, expected {count})")
        return numbers

    def integer(self) -> int:
        return self.longs(1)[0]

    def longs(self, count: int) -> list[int]:
        return self.numbers(int, count).tolist()

    def number(self) -> float:
        return float(self.numbers(float, 1)[0])

    def elements(self, kind: type[np.generic], count: int) -> np.ndarray:
        if np.dtype(kind).itemsize == 1:
            return np.frombuffer(self.take(count), kind).copy()
        return self.numbers(int if np.issubdtype(kind, np.integer) else float, count).astype(kind)


class _Reader:
    """Values made of the items of either kind of file."""

    def __init__(self, items: _Binary | _Ascii):
        self.items = items
        self.known: dict[int, Value] = {}  # what an index refers to

    def value(self, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise InvalidFileError(f"its objects are nested more than {MAX_DEPTH} deep")
        kind = self.items.integer()
        if kind == NIL:
            return None
        if kind == NUMBER:
            return self.items.number()
        if kind == STRING:
            return self.string()
        if kind == BOOLEAN:
            return self.items.integer() != 0
        if kind in FUNCTIONS:
            raise InvalidFileError("holds a Lua function, which is not read")
        if kind not in (TABLE, TORCH):
            raise InvalidFileError(f"damaged (a value has the unknown type {kind})")
        index = self.items.integer()
        if index not in self.known:
            self.known[index] = None  # while a tensor, which cannot hold itself, is being read
            self.known[index] = self.table(index, depth) if kind == TABLE else self.object(index, depth)
        return self.known[index]

    def string(self) -> str:
        return self.items.take(self.items.integer()).decode("utf-8", "surrogateescape")

    def table(self, index: int, depth: int) -> Table:
        table = self.known[index] = Table()
        for _ in range(self.items.integer()):  # each consumes bytes, so a false count is noticed
            key = self.value(depth + 1)
            if key is None or isinstance(key, Tensor) or key in table or key != key:
                raise InvalidFileError("damaged (a table has a key twice or an impossible key)")
            table[key] = self.value(depth + 1)
        return table

    def object(self, index: int, depth: int) -> Tensor | Object:
        name = self.string()
        if name.startswith("V ") and name[2:].isdigit():  # files older than versions have no such line
            name = self.string()
        element = _element_type(name)
        if name.endswith("Storage") and element:
            return self.storage(element)
        if name.endswith("Tensor") and element:
            return self.tensor(element, depth)
        found = self.known[index] = Object(name)
        fields = self.value(depth + 1)
        if not isinstance(fields, Table):
            raise InvalidFileError(f"an object of class {name[:60]!r} has no table of fields")
        found.fields = fields
        return found

    def storage(self, kind: type[np.generic]) -> Tensor:
        (count,) = self.items.longs(1)
        return torch.from_numpy(self.items.elements(kind, count))

    def tensor(self, kind: type[np.generic], depth: int) -> Tensor:
        dimensions = self.items.integer()
        if not 0 <= dimensions <= 32:
            raise InvalidFileError(f"damaged (a tensor has {dimensions} dimensions)")
        sizes, strides = self.items.longs(dimensions), self.items.longs(dimensions)
        (offset,) = self.items.longs(1)
        storage = self.value(depth + 1)
        empty = torch.from_numpy(np.empty(0, kind))
        if storage is None:
            storage = empty
        if not isinstance(storage, Tensor) or storage.dtype != empty.dtype or storage.ndim != 1:
            raise InvalidFileError("damaged (a tensor refers to something that is not its storage)")
        return view(storage, max(offset, 1) - 1, sizes, strides) if dimensions else empty


def _element_type(name: str) -> type[np.generic] | None:
    """Return the type of elements of torch.FloatTensor, torch.CudaLongStorage, …; None for other classes."""
    prefix, _, kind = name.partition(".")
    kind = kind.removesuffix("Tensor").removesuffix("Storage")
    if prefix != "torch":
        return None
    return ELEMENTS.get(kind.removeprefix("Cuda") or "Float")
