"""Files of torch.save, zip archives and those of before torch 1.6, read without executing anything.

Numbers, texts, lists and dicts are read, tensors as Stored; whatever else a pickle names becomes an Inert,
a placeholder that does nothing, so that files with argparse's or a trainer's objects can be read too.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidFileError

MAX_PICKLE = 64 << 20  # bytes
MAX_OPERATIONS = 4_000_000  # of a pickle; each may make an object of a hundred bytes
KEYS = (str, int, float, bool, bytes, type(None))  # of a dict: to hash nested tuples may take for ever
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"

# What a pickle calls a type of numbers: a class of storages or, beside an untyped one, the dtype.
NUMBERS = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}


def view(storage: Tensor, offset: int, sizes: list[int], strides: list[int]) -> Tensor:
    """A tensor inside a 1-D storage; `offset` counts from 0. Raises Unreadable where it would leave it."""
    if len(sizes) != len(strides) or len(sizes) > 32:
        raise InvalidFileError(f"a tensor of {len(sizes)} dimensions")
    numbers = [offset, *sizes, *strides]
    if min(numbers) < 0 or max(numbers) >= 1 << 40 or math.prod(max(1, size) for size in sizes) >= 1 << 62:
        raise InvalidFileError(f"a tensor of impossible shape {sizes}")
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if math.prod(sizes) and last >= len(storage):
        raise InvalidFileError(f"a tensor of shape {sizes} does not fit into {len(storage)} elements")
    if not math.prod(sizes):
        return storage.new_empty(sizes)
    return storage.as_strided(sizes, strides, offset)


class TensorRef:
    """A tensor. Wrapped, because a pickle may call a torch.Tensor's own __setstate__."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __setstate__(self, state: Any) -> None:
        pass


class SafeDict(dict):
    """A dict whose keys are simple, and to which a pickle can do nothing else."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) not in KEYS:
            raise InvalidFileError("a dict has a key that is neither text nor number")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        pass


class Placeholder:
    """Stands in place of an object of a class that is not read; takes anything, does nothing."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Placeholder":
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **keywords: Any):
        pass

    def __call__(self, *arguments: Any, **keywords: Any) -> "Placeholder":
        return self

    def ignore(self, *arguments: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = ignore


def read_archive(path: Path) -> Any:
    """What torch.save wrote into a zip archive (see checkpoint.verify_archive). Raises Unreadable."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InvalidFileError("an archive without the one data.pkl of torch.save")
        root = roots[0]
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder").strip() != b"little":
            raise InvalidFileError("its numbers are big-endian")
        if f"{root}constants.pkl" in names:
            raise InvalidFileError("a TorchScript program; save its state_dict() with torch.save")

        def storage(key: str, kind: torch.dtype) -> Tensor:
            name = f"{root}data/{key}"
            if name not in names:
                raise InvalidFileError(f"the numbers of a tensor are missing ({name[:80]})")
            return _numbers(archive.read(name), kind)

        return _Unpickler(archive.read(f"{root}data.pkl"), storage).read()


def verify_pickle(content: bytes) -> None:
    """Raises Unreadable for a pickle that holds more than tensors and plain values, or takes for ever."""
    _Unpickler(content, lambda key, kind: torch.empty(0, dtype=kind), checked=False, strict=True).read()


def read_legacy(content: bytes) -> Any:
    """What torch.save wrote before version 1.6: pickles, then the storages. Raises Unreadable."""
    stream = io.BytesIO(content)
    kinds: dict[str, torch.dtype] = {}

    def remember(key: str, kind: torch.dtype) -> Tensor:
        kinds[key] = kind
        return torch.empty(0, dtype=kind)

    def read(storage: Callable = remember, checked: bool = True) -> Any:
        unpickler = _Unpickler(content[stream.tell() : stream.tell() + MAX_PICKLE], storage, checked)
        value = unpickler.read()
        stream.seek(unpickler.stream.tell(), io.SEEK_CUR)
        return value

    if read() != LEGACY_MAGIC or read() != 1001:
        raise InvalidFileError("not a file of torch.save")
    system = read()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InvalidFileError("its numbers are big-endian")
    start = stream.tell()
    read(checked=False)  # tells which storages there are, and where they begin
    storages: dict[str, Tensor] = {}
    for key in _keys(read()):
        head = stream.read(8)
        count = int.from_bytes(head, "little", signed=True)
        kind = kinds.get(key)
        if len(head) < 8 or kind is None or not 0 <= count <= len(content):
            raise InvalidFileError("cut off, or its tensors are damaged")
        storages[key] = _numbers(stream.read(count * kind.itemsize), kind)
        if len(storages[key]) != count:
            raise InvalidFileError("cut off within its tensors")
    return _Unpickler(content[start : start + MAX_PICKLE], lambda key, kind: storages[key].view(kind)).read()


def _keys(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(key, str) for key in value):
        raise InvalidFileError("its list of tensors is damaged")
    return value


def _numbers(content: bytes, kind: torch.dtype) -> Tensor:
    """1-D, of little-endian bytes."""
    if len(content) % kind.itemsize:
        raise InvalidFileError("the numbers of a tensor are cut off")
    if not content:
        return torch.empty(0, dtype=kind)
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(kind)


class _Operations(io.BytesIO):
    """Counts what is read."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        self.count += 1
        if self.count > MAX_OPERATIONS:
            raise InvalidFileError(f"its pickle has over {MAX_OPERATIONS:,} parts")
        return super().read(size)


class _Unpickler(pickle._Unpickler):
    """Knows tensors and dicts; `storage` gives the numbers of a key as a 1-D tensor.

    In Python, because the one in C makes room for whatever number of a memo a damaged file says.
    `strict` refuses where otherwise an Inert is made. Unless `checked`, tensors are None.
    """

    # Sets hash their elements, and a bytearray is made as large as its opcode says.
    dispatch = {  # noqa: RUF012
        code: function
        for code, function in pickle._Unpickler.dispatch.items()
        if bytes([code])
        not in (pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.FROZENSET, pickle.EXT1, pickle.EXT2, pickle.EXT4)
    }

    def __init__(
        self,
        content: bytes,
        storage: Callable[[str, torch.dtype], Tensor],
        checked: bool = True,
        strict: bool = False,
    ):
        self.stream = _Operations(content[:MAX_PICKLE])
        super().__init__(self.stream, encoding="latin1")
        self.storage, self.checked, self.strict = storage, checked, strict
        self.storages: dict[str, Tensor] = {}

    def read(self) -> Any:
        """The value; whatever a damaged pickle raises is Unreadable."""
        try:
            return self.load()
        except InvalidFileError:
            raise
        except Exception as error:
            raise InvalidFileError(f"its pickle is damaged ({type(error).__name__})") from None

    def load_empty_dictionary(self) -> None:
        self.append(SafeDict())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(SafeDict())
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][key] = value

    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dictionary
    dispatch[pickle.DICT[0]] = load_dict

    def find_class(self, module: str, name: str) -> Any:
        # New functions and classes each time: a hostile file may set attributes on what it gets.
        if module in ("torch", "torch.cuda", "torch.storage") and name in NUMBERS:
            return _Kind(NUMBERS[name])
        if (module, name) in (
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_tensor"),
        ):
            return lambda *arguments: self.tensor(*arguments[:4])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):  # of an untyped storage: float8
            return lambda *arguments: self.tensor(*arguments[:4], arguments[6])
        if (module, name) == ("collections", "OrderedDict"):
            return lambda *_: SafeDict()
        if self.strict:
            raise InvalidFileError(f"it holds more than tensors and plain values ({module} {name})")
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        return type("Placeholder", (Placeholder,), {"name": f"{module}.{name}"})

    def persistent_load(self, identity: Any) -> Any:
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # a class, beside its source
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise InvalidFileError("it names something outside of itself that is no storage")
        _, kind, key, _, count, *window = identity
        if not isinstance(kind, _Kind) or not isinstance(key, str):
            raise InvalidFileError("a tensor of unknown numbers")
        if key not in self.storages:
            self.storages[key] = self.storage(key, kind.dtype)
        storage = self.storages[key]
        if storage.dtype != kind.dtype:
            raise InvalidFileError("two types of numbers share a storage")
        if window and window[0] is not None and self.checked:  # (its key, first element, elements)
            _, offset, count = window[0]
            storage = view(storage, offset, [count], [1])
        return TensorRef(storage)

    def tensor(self, storage: Any, offset: Any, sizes: Any, strides: Any, kind: Any = None) -> Any:
        if not isinstance(storage, TensorRef) or storage.tensor.ndim != 1:
            raise InvalidFileError("a tensor without its numbers")
        if not self.checked:
            return None
        if not all(type(number) is int for number in (offset, *sizes, *strides)):
            raise InvalidFileError("a tensor whose shape is no numbers")
        numbers = storage.tensor if kind is None else storage.tensor.view(kind.dtype)
        return TensorRef(view(numbers, offset, list(sizes), list(strides)))


class _Kind:
    """A type of numbers, for persistent_load and tensor."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
