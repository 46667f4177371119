"""The reader of .t7 files: every kind of value, sharing, and files that are damaged or malicious."""

import base64
import contextlib
import math
import struct

import numpy as np
import pytest
import torch
from oracle import golden

from resnext.errors import InvalidFileError
from resnext.weights.t7 import Object, Table, parse_t7

VALUES = golden("t7_values.json")
FILES = {name: base64.b64decode(content) for name, content in VALUES["files"].items()}


class Comparison:
    """Compares a value with its description in meta.json, where ids stand for identities."""

    def __init__(self):
        self.known = {}

    def check(self, value, expected):
        kind = expected["t"]
        if kind == "ref":
            assert self.known[expected["id"]] is value
        elif kind in ("table", "object", "tensor"):
            assert self.known.setdefault(expected["id"], value) is value
        if kind == "nil":
            assert value is None
        elif kind == "boolean":
            assert value is expected["v"]
        elif kind == "number":
            assert type(value) is float and value == float(expected["v"])
        elif kind == "string":
            assert value.encode("utf-8", "surrogateescape").hex() == expected["hex"]
        elif kind == "table":
            self.check_items(value, expected["items"])
        elif kind == "object":
            assert isinstance(value, Object) and value.class_name == expected["class"]
            self.check_items(value.fields, expected["items"])
        elif kind == "storage":
            assert value.type() == expected["type"].replace("Storage", "Tensor")
            assert value.tolist() == expected["data"]
            self.check_memory(value, expected["storage_id"])
        elif kind == "tensor":
            self.check_tensor(value, expected)

    def check_items(self, table, items):
        assert isinstance(table, Table) and len(table) == len(items)
        for key, value in items:
            text_key = key["t"] == "string"
            name = bytes.fromhex(key["hex"]).decode("utf-8", "surrogateescape") if text_key else key["v"]
            assert name in table
            self.check(table.get(name), value)

    def check_tensor(self, value, expected):
        assert value.type() == expected["type"]
        if not expected["shape"]:
            assert value.numel() == 0
            return
        assert list(value.shape) == expected["shape"] and list(value.stride()) == expected["stride"]
        assert value.storage_offset() == expected["storage_offset_1based"] - 1
        assert value.untyped_storage().nbytes() == expected["storage_size"] * value.element_size()
        np.testing.assert_array_equal(value.double().numpy().ravel(), np.array(expected["data"], float))
        self.check_memory(value, expected["storage_id"])

    def check_memory(self, value, storage):
        address = value.untyped_storage().data_ptr()
        assert self.known.setdefault(f"storage {storage}", address) == address


@pytest.mark.parametrize("name", FILES)
def test_every_value_of_the_original(name):
    value = parse_t7(FILES[name])
    Comparison().check(value, VALUES["expected"][name.removesuffix(".t7").removesuffix("_ascii")])


# ---------------------------------------------------------------------------- files written here


def i(*numbers):
    return struct.pack(f"<{len(numbers)}i", *numbers)


def q(*numbers):
    return struct.pack(f"<{len(numbers)}q", *numbers)


def text(value):
    return i(len(value)) + value.encode()


def storage(index, kind, array):
    return i(4, index) + text("V 1") + text(f"torch.{kind}Storage") + q(array.size) + array.tobytes()


def tensor(index, kind, sizes, strides, offset, content):
    head = i(4, index) + text("V 1") + text(f"torch.{kind}Tensor") + i(len(sizes))
    return head + q(*sizes) + q(*strides) + q(offset) + content


ONES = storage(2, "Float", np.ones(6, np.float32))


def test_objects_without_a_version():
    content = i(4, 1) + text("nn.Linear") + i(3, 2, 1, 2) + text("bias") + i(5, 1)
    found = parse_t7(content)
    assert found.class_name == "nn.Linear" and found.fields.get("bias") is True


TYPES = {"Half": "e", "CudaHalf": "e", "Cuda": "f", "CudaDouble": "d", "CudaLong": "q"}


@pytest.mark.parametrize("kind", TYPES)
def test_names_of_the_gpu(kind):
    array = np.arange(6).astype(TYPES[kind])
    found = parse_t7(tensor(1, kind, [2, 3], [3, 1], 1, storage(2, kind, array)))
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]] and found.numpy().dtype == array.dtype


@pytest.mark.parametrize(("kind", "dtype"), [("Double", "d"), ("Float", "f"), ("Half", "e"), ("Long", "q")])
def test_numbers_of_text_files_are_exact(kind, dtype):
    """Infinities, NaN, the smallest and the largest of each type; Lua writes 17 digits."""
    limits = np.iinfo(dtype) if dtype == "q" else np.finfo(dtype)
    values = [
        limits.min,
        limits.max,
        *((-3, 7) if dtype == "q" else (0.1, -0.0, limits.tiny, np.inf, np.nan)),
    ]
    array = np.array(values, dtype)
    words = " ".join(str(value) if dtype == "q" else f"{value:.17g}" for value in array.tolist())
    name = f"torch.{kind}Storage"
    found = parse_t7(f"4\n1\n3\nV 1\n{len(name)}\n{name}\n{len(array)}\n{words}\n".encode())
    assert found.numpy().tobytes() == array.tobytes()


def test_boolean_and_number_are_two_keys():
    found = parse_t7(i(3, 1, 2, 1) + struct.pack("<d", 1) + i(0) + i(5, 1, 5, 0))
    assert found.get(1) is None and found.get(True) is False and 1 in found and len(found) == 2


def float_storage(count):
    return i(4, 2) + text("V 1") + text("torch.FloatStorage") + q(count)


BAD = {
    "empty": b"",
    "short": b"\x03\0",
    "no type": i(99),
    "a function": i(6, 1) + text("x"),
    "2^60 elements": tensor(1, "Float", [2**60], [1], 1, float_storage(2**60)),
    "a negative count": tensor(1, "Float", [2], [1], 1, float_storage(-1)),
    "2^60 elements of one": tensor(1, "Float", [2**31, 2**31], [0, 0], 1, ONES),
    "beyond its storage": tensor(1, "Float", [2, 3], [4, 1], 1, ONES),
    "an offset beyond": tensor(1, "Float", [2, 3], [3, 1], 2, ONES),
    "a negative stride": tensor(1, "Float", [2, 3], [-3, 1], 4, ONES),
    "a negative size": tensor(1, "Float", [-2, 3], [3, 1], 1, ONES),
    "sizes that overflow": tensor(1, "Float", [2**62, 4], [0, 0], 1, ONES),
    "too many dimensions": i(4, 1) + text("V 1") + text("torch.FloatTensor") + i(2**30),
    "another type's storage": tensor(1, "Double", [2], [1], 1, ONES),
    "itself for a storage": tensor(1, "Float", [1], [1], 1, i(4, 1)),
    "a tensor for a storage": tensor(1, "Float", [2], [1], 1, tensor(3, "Float", [2, 3], [3, 1], 1, ONES)),
    "a long string": i(2, 2**30) + b"x",
    "a negative string": i(2, -1),
    "a long table": i(3, 1, 2**31 - 1),
    "a key twice": i(3, 1, 2) + (i(2) + text("a") + i(0)) * 2,
    "a tensor for a key": i(3, 1, 1) + tensor(2, "Float", [], [], 1, i(0)) + i(0),
    "nil for a key": i(3, 1, 1, 0, 0),
    "not a number for a key": i(3, 1, 1, 1) + struct.pack("<d", math.nan) + i(0),
    "a class without fields": i(4, 1) + text("V 1") + text("nn.Linear") + i(0),
    "deep nesting": b"".join(i(3, number, 1, 5, 1) for number in range(1, 100_000)) + i(0),
}


BAD_TEXT = [
    b"4\n",
    b"1\nabc\n",
    b"2\n5\nab",
    b"3\n1\n99999999999999999999\n",
    b"9\n",
    b"1\n",
    b"3\n1\n1\n",
    b"x",
]
HALVES = b"4\n1\n3\nV 1\n17\ntorch.HalfStorage\n"
BAD_TEXT += [HALVES + b"2\n1\n", HALVES + b"1\n1 2\n", HALVES + b"1\nx\n", HALVES + b"-1\n1\n"]
BAD_TEXT += [HALVES.replace(b"Half", b"Long") + words for words in (b"1\n1.5\n", b"1\n9223372036854775808\n")]


@pytest.mark.parametrize("content", [*BAD.values(), *BAD_TEXT], ids=[*BAD, *map(repr, BAD_TEXT)])
def test_malicious_files_are_refused(content):
    with pytest.raises(InvalidFileError):
        parse_t7(content)


def test_a_loop_is_itself():
    found = parse_t7(i(3, 1, 1, 2) + text("self") + i(3, 1))
    assert found.get("self") is found


@pytest.mark.parametrize("name", ["nn_sequential_shared", "nn_sequential_shared_ascii", "tensor_transposed"])
def test_cut_and_changed_files_read_or_are_refused(name):
    content = FILES[f"{name}.t7"]
    generator = np.random.default_rng(0)
    for end in range(len(content) - 1):
        with pytest.raises(InvalidFileError):
            parse_t7(content[:end])
    for _ in range(2000):
        changed = bytearray(content)
        for place in generator.integers(0, len(content), generator.integers(1, 4)):
            changed[place] = generator.integers(256)
        with contextlib.suppress(InvalidFileError):
            parse_t7(bytes(changed))


def test_memory_of_a_wide_storage_is_bounded():
    found = parse_t7(tensor(1, "Float", [1000, 1000, 1000], [0, 0, 0], 1, ONES))
    assert found.untyped_storage().nbytes() == 24 and torch.equal(found[0, 0, :2], torch.ones(2))
