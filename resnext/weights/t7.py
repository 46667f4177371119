"""Torch7's .t7 files, binary and ASCII, as plain values; nothing in them is executed.

    nil, boolean, number, string   None, bool, float, str (bytes that are not UTF-8 as surrogates)
    table                          Table; Lua's lists have the keys 1, 2, ...
    tensor, storage                torch.Tensor; tensors that shared a storage share memory
    any other object               Object, its class name and its table of fields

What the same index refers to is the same Python object, loops included. A file's tensors take no more
memory than itself, a file of nothing but tables some twenty times as much: counts are compared with the
bytes that are left, tensors stay views inside their storages, nesting is limited, functions are refused.
"""

import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidFileError
from ..safe_pickle import view

MAX_DEPTH = 200  # of objects inside objects; networks have about 40

NIL, NUMBER, STRING, TABLE, TORCH, BOOLEAN, FUNCTIONS = 0, 1, 2, 3, 4, 5, (6, 7, 8)

ELEMENTS = {
    "Byte": np.uint8,
    "Char": np.int8,
    "Short": np.int16,
    "Int": np.int32,
    "Long": np.int64,
    "Half": np.float16,
    "Float": np.float32,
    "Double": np.float64,
}


class Table:
    """A Lua table. Unlike a dict's, its keys 1 and true are two; it is equal only to itself."""

    def __init__(self) -> None:
        self._values: dict[tuple[bool, Any], Any] = {}

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Any) -> bool:
        return (isinstance(key, bool), key) in self._values

    def __setitem__(self, key: Any, value: Any) -> None:
        self._values[isinstance(key, bool), key] = value

    def get(self, key: Any, default: Any = None) -> Any:
        return self._values.get((isinstance(key, bool), key), default)

    def items(self) -> list[tuple[Any, Any]]:
        return [(key, value) for (_, key), value in self._values.items()]


@dataclass(eq=False)
class Object:
    """An object that is neither tensor nor storage, such as an nn module."""

    class_name: str
    fields: Table | None = None


def parse_t7(content: bytes) -> Any:
    """The value in a .t7 file's bytes; the format is found by content. Raises Unreadable."""
    reader = _Reader(_Binary(content) if is_binary(content) else _Ascii(content))
    return reader.value(0)


def is_t7(content: bytes) -> bool:
    """Whether a file begins as a .t7 file does."""
    return is_binary(content) or (content[:1].isdigit() and content[1:2] in (b"\n", b"\r"))


def is_binary(content: bytes) -> bool:
    """Whether it begins with one of the types as an int32."""
    return len(content) >= 4 and struct.unpack_from("<i", content)[0] <= 8 and content[1:4] == b"\0\0\0"


class _Items:
    """Bytes, taken one after another."""

    def __init__(self, content: bytes):
        self.content, self.place = content, 0

    def left(self) -> int:
        return len(self.content) - self.place

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.left():
            raise InvalidFileError(f"{count} bytes are announced where {self.left()} are left")
        self.place += count
        return self.content[self.place - count : self.place]


class _Binary(_Items):
    """Items of a little-endian binary file."""

    def integer(self) -> int:
        return struct.unpack("<i", self.take(4))[0]

    def longs(self, count: int) -> list[int]:
        return list(struct.unpack(f"<{count}q", self.take(8 * count)))

    def number(self) -> float:
        return struct.unpack("<d", self.take(8))[0]

    def elements(self, kind: type, count: int) -> np.ndarray:
        return np.frombuffer(self.take(count * np.dtype(kind).itemsize), kind).copy()


class _Ascii(_Items):
    """The same of a text file: numbers as words, strings and bytes as they are, each item a line."""

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

    def integer(self) -> int:
        return self.longs(1)[0]

    def longs(self, count: int) -> list[int]:
        words = self.line().split() if count else []
        try:
            numbers = [int(word) for word in words]
        except ValueError:
            raise InvalidFileError(f"{words[0][:20]!r} stands where a whole number should") from None
        if len(numbers) != count or any(abs(number) >= 1 << 63 for number in numbers):
            raise InvalidFileError(f"{len(numbers)} numbers stand where {count} should")
        return numbers

    def number(self) -> float:
        word = self.line()
        try:
            return float(word)
        except ValueError:
            raise InvalidFileError(f"{word[:20]!r} stands where a number should") from None

    def elements(self, kind: type, count: int) -> np.ndarray:
        if np.dtype(kind).itemsize == 1:
            return np.frombuffer(self.take(count), kind).copy()
        if count > self.left():
            raise InvalidFileError(f"{count} elements are announced where {self.left()} bytes are left")
        wide = np.int64 if np.issubdtype(kind, np.integer) else np.float64
        text = self.line() if count else b""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", DeprecationWarning)  # words that are no numbers
                numbers = np.fromstring(text, wide, sep=" ") if count else np.empty(0, wide)
        except (ValueError, DeprecationWarning):
            raise InvalidFileError("the elements of a storage are no numbers") from None
        if len(numbers) != count:
            raise InvalidFileError(f"a storage of {count} elements has {len(numbers)}")
        return numbers.astype(kind)


class _Reader:
    """Values out of the items of either kind of file."""

    def __init__(self, items: _Binary | _Ascii):
        self.items = items
        self.known: dict[int, Any] = {}  # what an index refers to

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise InvalidFileError(f"objects are nested more than {MAX_DEPTH} deep")
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
            raise InvalidFileError("it holds a Lua function, which is not read")
        if kind not in (TABLE, TORCH):
            raise InvalidFileError(f"{kind} is no type of a value")
        index = self.items.integer()
        if index not in self.known:
            self.known[index] = None  # until it is whole, for what cannot hold itself
            self.known[index] = self.table(index, depth) if kind == TABLE else self.object(index, depth)
        return self.known[index]

    def string(self) -> str:
        return self.items.take(self.items.integer()).decode("utf-8", "surrogateescape")

    def table(self, index: int, depth: int) -> Table:
        table = self.known[index] = Table()
        for _ in range(self.items.integer()):  # each takes bytes, so that the file's end is an end
            key = self.value(depth + 1)
            if isinstance(key, Tensor) or key in table or key != key:
                raise InvalidFileError("a table has a key twice, or one that cannot be a key")
            table[key] = self.value(depth + 1)
        return table

    def object(self, index: int, depth: int) -> Any:
        name = self.string()
        if name.startswith("V ") and name[2:].isdigit():  # files older than versions have no such line
            name = self.string()
        element = _element_type(name)
        if name.endswith("Storage") and element:
            return self.storage(element)
        if name.endswith("Tensor") and element:
            return self.tensor(element, depth)
        found = self.known[index] = Object(name)
        found.fields = self.value(depth + 1)
        if not isinstance(found.fields, Table):
            raise InvalidFileError(f"an object of class {name[:60]!r} is no table of fields")
        return found

    def storage(self, kind: type) -> Tensor:
        (count,) = self.items.longs(1)
        if count < 0:
            raise InvalidFileError(f"a storage of {count} elements")
        return torch.from_numpy(self.items.elements(kind, count))

    def tensor(self, kind: type, depth: int) -> Tensor:
        dimensions = self.items.integer()
        if not 0 <= dimensions <= 32:
            raise InvalidFileError(f"a tensor of {dimensions} dimensions")
        sizes, strides = self.items.longs(dimensions), self.items.longs(dimensions)
        (offset,) = self.items.longs(1)
        storage = self.value(depth + 1)
        empty = torch.from_numpy(np.empty(0, kind))
        if storage is None:
            storage = empty
        if not isinstance(storage, Tensor) or storage.dtype != empty.dtype or storage.ndim != 1:
            raise InvalidFileError("a tensor has something else in place of its storage")
        return view(storage, max(offset, 1) - 1, sizes, strides) if dimensions else empty


def _element_type(name: str) -> type | None:
    """Of torch.FloatTensor, torch.CudaTensor, torch.CudaLongStorage and the like; None for other classes."""
    prefix, _, kind = name.partition(".")
    kind = kind.removesuffix("Tensor").removesuffix("Storage")
    if prefix != "torch":
        return None
    return ELEMENTS.get(kind.removeprefix("Cuda") or "Float")
