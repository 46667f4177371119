"""Read files of torch.save, zip archives and those of before torch 1.6, without executing anything.

Numbers, texts, lists, tuples, dicts and tensors are read. Whatever else a pickle names is refused (`strict`)
or becomes a Placeholder, so that files with argparse's or a trainer's objects can be read too.
"""

import contextlib
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidFileError

MAX_OPERATIONS = 4_000_000  # of a pickle; each may create an object of a hundred bytes
PLAIN = (
    str,
    int,
    float,
    bool,
    bytes,
    type(None),
)  # and keys of a dict: hashing nested tuples may take forever
# Sets hash their elements, a bytearray is made as large as its opcode says, extensions are foreign classes.
REFUSED_OPCODES = pickle.EMPTY_SET + pickle.FROZENSET + pickle.ADDITEMS + pickle.BYTEARRAY8
REFUSED_OPCODES += pickle.EXT1 + pickle.EXT2 + pickle.EXT4
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"

# What a pickle calls a dtype: a class of storages or, beside an untyped one, the dtype itself.
DTYPES = {
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

# Reads the elements of a storage, 1-D, given its key, dtype and number of elements.
StorageReader = Callable[[str, torch.dtype, int], Tensor]


# ---------------------------------------------------------------------------- files


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an uncompressed zip archive; whatever zipfile raises meanwhile becomes an InvalidFileError.

    An entry that is read from it has the right checksum.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [entry.file_size for entry in archive.infolist()]
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InvalidFileError(
                    "a compressed archive, which torch.save never writes; of a TorchScript program, save "
                    "the state_dict"
                )
            if sum(sizes) > path.stat().st_size:
                raise InvalidFileError("damaged (its entries overlap)")
            yield archive
    except (InvalidFileError, OSError):
        raise
    except Exception as error:  # zipfile raises many kinds on damaged archives
        raise InvalidFileError(f"damaged or cut off ({error or type(error).__name__})") from None


def read_archive(path: Path, strict: bool = False) -> Any:
    """Return what torch.save wrote into a zip archive, every checksum verified.

    `strict`: raise InvalidFileError for more than plain values and CPU tensors, or more than the file holds.
    """
    with open_archive(path) as archive:
        unread = set(archive.namelist())
        roots = [name.removesuffix("data.pkl") for name in unread if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InvalidFileError("a zip archive that torch.save did not write")
        root = roots[0]
        if f"{root}byteorder" in unread and archive.read(f"{root}byteorder").strip() != b"little":
            raise InvalidFileError("its numbers are big-endian")
        if f"{root}constants.pkl" in unread:
            raise InvalidFileError("a TorchScript program; save its state_dict() with torch.save")

        def read_storage(key: str, dtype: torch.dtype, _: int) -> Tensor:
            name = f"{root}data/{key}"
            if name not in unread:
                raise InvalidFileError(f"the numbers of a tensor are missing ({name[:80]})")
            unread.remove(name)
            return _elements(archive.read(name), dtype)

        stream = _Stream(archive.read(f"{root}data.pkl"))
        value = _Unpickler(stream, read_storage, strict).read()
        for name in unread:
            archive.read(name)
    if strict:
        _check_plain(value, stream.count, path.stat().st_size)
    return value


def _check_plain(content: Any, operations: int, size: int) -> None:
    """Raise InvalidFileError unless nested values are plain, few, and their tensors at most `size` bytes.

    An honest pickle has an operation for each value. In another, [x, x] of [x, x] of ... has no end.
    """
    values, todo, tensor_bytes = 0, [content], 0
    while todo:
        value = todo.pop()
        values += 1
        if values > operations:
            raise InvalidFileError("its pickle repeats its parts")
        if isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, list | tuple):
            todo.extend(value)
        elif isinstance(value, Tensor):
            tensor_bytes += value.nbytes
        elif type(value) not in PLAIN or (isinstance(value, int) and value.bit_length() > 64):
            raise InvalidFileError("it holds more than tensors and plain values")
    if tensor_bytes > size:  # a few numbers expanded to any shape
        raise InvalidFileError("its tensors are larger than the file")


def read_legacy(content: bytes) -> Any:
    """Return what torch.save wrote before version 1.6 (pickles, then the storages), as read_archive does."""
    stream = _Stream(content)
    dtypes: dict[str, torch.dtype] = {}

    def outline(key: str, dtype: torch.dtype, count: int) -> Tensor:
        dtypes[key] = dtype
        return torch.empty(count, dtype=dtype, device="meta")  # takes no memory, whatever the file says

    if _Unpickler(stream, outline).read() != LEGACY_MAGIC or _Unpickler(stream, outline).read() != 1001:
        raise InvalidFileError("not a file of torch.save")
    system = _Unpickler(stream, outline).read()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InvalidFileError("its numbers are big-endian")
    start = stream.tell()
    _Unpickler(stream, outline).read()  # says which storages there are, and where they begin
    keys = _Unpickler(stream, outline).read()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InvalidFileError("its list of tensors is damaged")
    storages = {key: _legacy_storage(stream, dtypes.get(key)) for key in keys}
    stream.seek(start)
    return _Unpickler(stream, lambda key, *_: storages[key]).read()


def _legacy_storage(stream: io.BytesIO, dtype: torch.dtype | None) -> Tensor:
    head = stream.read(8)
    count = int.from_bytes(head, "little", signed=True)
    if len(head) < 8 or dtype is None or not 0 <= count <= len(stream.getbuffer()):
        raise InvalidFileError("cut off, or its tensors are damaged")
    elements = _elements(stream.read(count * dtype.itemsize), dtype)
    if len(elements) != count:
        raise InvalidFileError("cut off within its tensors")
    return elements


def _elements(content: bytes, dtype: torch.dtype) -> Tensor:
    """Return little-endian bytes as a 1-D tensor."""
    if len(content) % dtype.itemsize:
        raise InvalidFileError("the numbers of a tensor are cut off")
    if not content:
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(dtype)


def view(storage: Tensor, offset: int, sizes: list[int], strides: list[int]) -> Tensor:
    """Return a tensor inside a 1-D storage; from element `offset`."""
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
    return storage.as_strided(sizes, strides, storage.storage_offset() + offset)


# ---------------------------------------------------------------------------- the unpickler


def _rebuild_tensor(
    storage: Tensor, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> Tensor:
    if not isinstance(storage, Tensor) or storage.ndim != 1:
        raise InvalidFileError("a tensor without storage")
    if not all(type(number) is int for number in (offset, *sizes, *strides)):
        raise InvalidFileError("a tensor whose shape is not integers")
    return view(storage, offset, list(sizes), list(strides))


def _rebuild_untyped(storage: Tensor, *arguments: Any) -> Tensor:
    return _rebuild_tensor(storage.view(arguments[5]), *arguments)  # the dtype comes last: float8


CALLABLES: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): lambda *_: {},
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
}


class Placeholder:
    """Stands for an object of a class that is not read; accepts anything, does nothing."""

    name: str

    def __new__(cls, *_: object, **__: object) -> "Placeholder":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object):
        pass

    def __call__(self, *_: object, **__: object) -> "Placeholder":
        return self

    append = extend = __init__


class _Stream(io.BytesIO):
    """Counts what a pickle reads."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        self.count += 1
        if self.count > MAX_OPERATIONS:
            raise InvalidFileError(f"its pickle has over {MAX_OPERATIONS:,} parts")
        return super().read(size)


class _Unpickler(pickle._Unpickler):
    """Reads one pickle of a stream: plain values, tensors, and, unless `strict`, Placeholders.

    In Python, because the one in C allocates as many entries of a memo as a damaged file says.
    """

    stack: list[Any]  # this and the next two are the base class's, and not in its stubs
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in REFUSED_OPCODES
    }

    def __init__(self, stream: _Stream, read_storage: StorageReader, strict: bool = False):
        super().__init__(stream, encoding="latin1")
        self.stream, self.read_storage, self.strict = stream, read_storage, strict
        self.storages: dict[str, Tensor] = {}

    def read(self) -> Any:
        """Return the value; whatever a damaged pickle raises is an InvalidFileError."""
        try:
            return self.load()
        except (InvalidFileError, OSError, zipfile.BadZipFile):
            raise
        except Exception as error:
            raise InvalidFileError(f"its pickle is damaged ({type(error).__name__})") from None

    def load_frame(self) -> None:
        self.stream.read(8)  # its size: a frame is a buffer, and what is read from it would not be counted

    def load_build(self) -> None:
        self.stack.pop()  # attributes: of an OrderedDict, of objects that are not read, of a hostile file

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.put(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put([key, value])

    def load_setitems(self) -> None:
        self.put(self.pop_mark())

    def put(self, items: list[Any]) -> None:
        """Put keys and values, in turn, into the dict on top of the stack; other objects stay as they are."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in PLAIN:
                raise InvalidFileError("a dict has a key that is neither text nor number")
            if type(self.stack[-1]) is dict:
                self.stack[-1][key] = value

    dispatch |= {
        pickle.FRAME[0]: load_frame,
        pickle.BUILD[0]: load_build,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        if (module, name) in CALLABLES:
            return CALLABLES[module, name]
        if self.strict:
            raise InvalidFileError(f"it holds more than tensors and plain values ({module} {name})")
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        return type("Placeholder", (Placeholder,), {"name": f"{module}.{name}"})

    def persistent_load(self, identity: Any) -> Any:
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # a class, beside its source
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise InvalidFileError("it references an external object other than a storage")
        _, dtype, key, _, count, *window = identity
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise InvalidFileError("a tensor of unknown numbers")
        if key not in self.storages:
            self.storages[key] = self.read_storage(key, dtype, count)
        storage = self.storages[key]
        if storage.dtype != dtype:
            raise InvalidFileError("one storage is used with two dtypes")
        if window and window[0] is not None:  # (its key, first element, elements)
            _, offset, count = window[0]
            storage = view(storage, offset, [count], [1])
        return storage
