"""Data sets: what is read is what is in the files, and what cannot be read is refused with its name."""

import hashlib
import http.server
import io
import os
import pickle
import shutil
import socket
import tarfile
import threading
import tracemalloc
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import simplejpeg
import torch
from commands import draw_folders, snapshot
from PIL import Image
from torchvision import datasets

import data.cifar
import data.decode
import data.image_folder
from data import glyphs, in_memory
from data.datasets import check_classes, load_set
from data.decode import decode
from data.image_folder import list_set, read_set, resize_and_center_crop
from data.in_memory import ArrayDataset, even_indices, subsample
from data.loaders import make_eval_loader, make_train_loader
from resnext.config import DataConfig, parse_config
from resnext.errors import UserError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def read(root: Path | str, split: str, size: int = 8, limit: int | None = None) -> ArrayDataset:
    """A split of class folders, in memory."""
    return read_set(list_set(str(root), split, limit), size)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ---------------------------------------------------------------------------- glyphs


@pytest.fixture(scope="module")
def small_glyphs() -> dict[str, ArrayDataset]:
    return {split: glyphs.render_glyphs(split, 600, 20) for split in ("train", "val")}


def test_glyphs_by_default():
    config = parse_config("data: {dataset: glyphs, train_images: 50}", "text").data
    assert config.image_size == 20
    assert len(load_set(config, "train")) == 50
    drawn = load_set(config, "val")
    assert drawn.images.shape == (1000, 20, 20, 3)
    assert (drawn.images.dtype, drawn.labels.dtype) == (np.uint8, np.int64)
    assert drawn.classes == tuple("0123456789")
    assert glyphs.SIZES == {"train": 5000, "val": 1000}
    digest = hashlib.sha256(drawn.labels.astype("<i8").tobytes()).hexdigest()
    assert digest == "abbc512c3acb0f8cbfb5028feee89e6acb003603ae14addba0cb44cb6273784f"


def test_glyphs_are_the_same_each_time(small_glyphs):
    for split, drawn in small_glyphs.items():
        again = glyphs.render_glyphs(split, 600, 20)
        assert np.array_equal(again.images, drawn.images)
        assert np.array_equal(again.labels, drawn.labels)
        assert again.fingerprint() == drawn.fingerprint()


def test_fewer_glyphs_are_the_first_ones(small_glyphs):
    for split, drawn in small_glyphs.items():
        assert np.array_equal(glyphs.render_glyphs(split, 70, 20).images, drawn.images[:70])


def test_glyphs_differ(small_glyphs):
    """No picture occurs twice, neither in a split nor in both."""
    pictures = np.concatenate([drawn.images for drawn in small_glyphs.values()]).reshape(1200, -1)
    assert len(np.unique(pictures, axis=0)) == 1200
    assert small_glyphs["train"].fingerprint() != small_glyphs["val"].fingerprint()
    for drawn in small_glyphs.values():
        assert np.array_equal(np.bincount(drawn.labels), [60] * 10)


@pytest.mark.parametrize("size", [8, 20, 33])
def test_glyphs_of_other_sizes(size):
    drawn = glyphs.render_glyphs("train", 20, size)
    assert drawn.images.shape == (20, size, size, 3)
    assert drawn.images.std(axis=(1, 2, 3)).min() > 10, "there is something to see"


def test_no_linear_model_does_well_on_glyphs():
    """Ridge regression on the pixels, the best of several penalties, stays above 50 % error."""
    train, val = glyphs.render_glyphs("train", 3000, 20), glyphs.render_glyphs("val", 500, 20)

    def features(drawn: ArrayDataset) -> np.ndarray:
        pixels = drawn.images.reshape(len(drawn), -1).astype(np.float64) / 128 - 1
        return np.hstack([pixels, np.ones((len(drawn), 1))])

    x, targets = features(train), np.eye(10)[train.labels]
    errors = []
    for penalty in (1e1, 1e2, 1e3, 1e4):
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ targets)
        errors.append(np.mean((features(val) @ weights).argmax(1) != val.labels))
    assert min(errors) > 0.5


# ---------------------------------------------------------------------------- decoding


def test_rgb():
    pixels = noise(7, 5, 3)
    for kind in ("PNG", "BMP", "PPM"):
        decoded = decode(encoded(Image.fromarray(pixels), kind), "x")
        assert (decoded.dtype, decoded.shape) == (np.uint8, (7, 5, 3))
        assert np.array_equal(decoded, pixels)


def test_gray():
    pixels = noise(7, 5)
    decoded = decode(encoded(Image.fromarray(pixels), "PNG"), "x")
    assert np.array_equal(decoded, np.stack([pixels] * 3, 2))
    jpeg = decode(encoded(Image.fromarray(pixels), "JPEG", quality=100), "x")
    assert jpeg.shape == (7, 5, 3)
    assert np.array_equal(jpeg[:, :, 0], jpeg[:, :, 2])


def test_black_and_white():
    pixels = noise(7, 5) > 127
    decoded = decode(encoded(Image.fromarray(pixels), "PNG"), "x")
    assert np.array_equal(decoded, np.stack([pixels * np.uint8(255)] * 3, 2))


@pytest.mark.parametrize("transparent", [None, 2], ids=["opaque", "transparent"])
def test_palette(transparent):
    colors, indices = noise(4, 3), noise(7, 5) % 4
    image = Image.fromarray(indices, "P")
    image.putpalette(colors.tobytes())
    options = {} if transparent is None else {"transparency": transparent}
    for kind in ("PNG", "GIF"):
        decoded = decode(encoded(image, kind, **options), "x")
        assert np.array_equal(decoded, colors[indices]), kind


def test_alpha_is_dropped_not_blended():
    pixels = noise(7, 5, 4)
    decoded = decode(encoded(Image.fromarray(pixels), "PNG"), "x")
    assert np.array_equal(decoded, pixels[:, :, :3])


def test_gray_with_alpha():
    pixels = noise(7, 5, 2)
    decoded = decode(encoded(Image.fromarray(pixels, "LA"), "PNG"), "x")
    assert np.array_equal(decoded, np.repeat(pixels[:, :, :1], 3, 2))


def test_rgb_with_a_transparent_colour():
    pixels = noise(7, 5, 3)
    content = encoded(Image.fromarray(pixels), "PNG", transparency=tuple(map(int, pixels[0, 0])))
    assert np.array_equal(decode(content, "x"), pixels)


def test_gray_of_16_bits():
    pixels = np.array([[0, 128, 129, 257, 256 * 100], [1000, 30000, 40000, 65407, 65535]], np.uint16)
    decoded = decode(encoded(Image.fromarray(pixels), "PNG"), "x")
    assert decoded.shape == (2, 5, 3)
    assert np.array_equal(decoded[:, :, 1], np.round(pixels / 257).astype(np.uint8))
    assert decoded.min() == 0
    assert decoded.max() == 255


@pytest.mark.parametrize("kind, words", [(np.int32, "32-bit"), (np.float32, "floating-point")])
@pytest.mark.parametrize("values", [[0, 255], [0, 1 << 20]])
def test_more_than_16_bits_are_refused(values, kind, words):
    """Whatever values they have: a set's black is not to depend on each picture's brightest pixel."""
    content = encoded(Image.fromarray(np.array([values], kind)), "TIFF")
    with pytest.raises(UserError) as refused:
        decode(content, "deep.tif")
    assert str(refused.value) == (
        f"deep.tif: {words} pixels, which have no scale of their own; convert it to 8-bit RGB"
    )


def test_cmyk():
    """Four solid colours, as Pillow's own conversion has them."""
    colors = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0)}
    for ink, expected in colors.items():
        image = Image.new("CMYK", (16, 16), ink)
        decoded = decode(encoded(image, "JPEG", quality=100), "x")
        assert decoded.shape == (16, 16, 3)
        assert np.abs(decoded.astype(int) - expected).max() <= 3


def test_format_is_found_by_content(tmp_path):
    root = draw_folders(tmp_path / "data", {"cat": 1, "dog": 1})
    pixels = noise(8, 8, 3, seed=5)
    (root / "train" / "cat" / "0.png").unlink()
    Image.fromarray(pixels).save(root / "train" / "cat" / "0.JPEG", "PNG")
    assert np.array_equal(read(root, "train").images[0], pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_ignored(orientation):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = (250, 10, 10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encoded(Image.fromarray(pixels), "JPEG", quality=95, exif=exif), "x")
    assert decoded.shape == (16, 32, 3)
    assert decoded[:, 4, 0].min() > 230
    assert decoded[:, 28, 0].max() < 20


def test_jpeg_is_decoded_at_full_size():
    image = Image.fromarray(noise(6, 8, 3)).resize((800, 600))
    content = encoded(image, "JPEG", quality=95)
    assert np.array_equal(decode(content, "x"), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_truncated_anywhere():
    content = encoded(Image.fromarray(noise(40, 40, 3)), "JPEG")
    for length in range(0, len(content) - 20, 7):
        with pytest.raises(UserError, match=r"a/b\.jpg: cannot be decoded .*; replace or remove"):
            decode(content[:length], "a/b.jpg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "PPM"])
def test_damaged_anywhere(kind):
    """A UserError or a picture; nothing else, whatever the decoder meets."""
    content = encoded(Image.fromarray(noise(9, 9, 3)), kind)
    draw = np.random.default_rng(3)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draw.integers(len(content))] = draw.integers(256)
        try:
            assert decode(bytes(damaged), "a.png").ndim == 3
        except UserError as error:
            assert "a.png" in str(error)


@pytest.mark.parametrize("content", [b"", b"\0", b"GIF89a", b"\xff\xd8\xff", b"text\n" * 100, b"\x89PNG\r\n"])
def test_no_picture(content):
    with pytest.raises(UserError, match=r"a\.png: cannot be decoded"):
        decode(content, "a.png")


@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_limit_on_pixels(kind, decoder):
    """An error that says the limit; at the limit the picture is read."""
    content = encoded(Image.new("RGB", (50, 40)), kind)
    assert decode(content, "x", decoder, max_pixels=2000).shape == (40, 50, 3)
    with pytest.raises(
        UserError, match=r"^big\.png: has 50x40 = 2,000 pixels, and the limit is 1,999; raise "
    ):
        decode(content, "big.png", decoder, max_pixels=1999)


def test_the_limit_can_be_raised_above_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encoded(Image.new("RGB", (50, 50)), "PNG"), "x").shape == (50, 50, 3)


# ---------------------------------------------------------------------------- both decoders, parts


def picture(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A picture with detail of several pixels' size, as photographs have."""
    small = noise(max(2, height // 6), max(2, width // 6), channels, seed=seed)
    layers = [Image.fromarray(small[..., c]).resize((width, height)) for c in range(channels)]
    return np.stack([np.asarray(layer) for layer in layers], axis=-1)


def segments(content: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The (marker, segment) of a JPEG up to its first scan, and the scan's data."""
    place, found = 2, []
    while not found or found[-1][0] != 0xDA:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        found.append((marker, content[place : place + 2 + length]))
        place += 2 + length
    return found, content[place:-2]


def separate_scans(image: Image.Image) -> bytes:
    """A baseline JPEG with a scan of its own for each of Y, Cb, Cr, put together from three gray ones."""
    planes = [segments(encoded(plane, "JPEG")) for plane in image.convert("YCbCr").split()]
    content = b"\xff\xd8"
    for marker, segment in planes[0][0][:-1]:
        if marker == 0xC0:
            components = b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
            segment = segment[:2] + b"\0\x11" + segment[4:9] + b"\3" + components
        content += segment
    for number, (_, scan) in enumerate(planes, 1):
        content += bytes([0xFF, 0xDA, 0, 8, 1, number, 0, 0, 63, 0]) + scan
    return content + b"\xff\xd9"


def as_ycck(image: Image.Image) -> bytes:
    """A CMYK JPEG whose Adobe segment says that it is YCCK."""
    content = bytearray(encoded(image, "JPEG"))
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


def rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif)


def jpeg(**options):
    return lambda image: encoded(image, "JPEG", **options)


def subsampled(name: str):
    return lambda image: simplejpeg.encode_jpeg(np.array(image), 80, "RGB", name)


JPEGS = {
    "4:4:4": jpeg(subsampling="4:4:4"),
    "4:2:2": jpeg(subsampling="4:2:2"),
    "4:2:0": jpeg(subsampling="4:2:0"),
    "4:4:0": subsampled("440"),
    "4:1:1": subsampled("411"),
    "gray": lambda image: encoded(image.convert("L"), "JPEG"),
    "progressive": jpeg(progressive=True),
    "optimised": jpeg(optimize=True),
    "restarts": jpeg(restart_marker_blocks=3),
    "restarts by rows": jpeg(restart_marker_rows=1, subsampling="4:2:0"),
    "separate scans": separate_scans,
    "EXIF rotation": rotated,
    "Adobe RGB": jpeg(keep_rgb=True),
    "CMYK": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "YCCK": lambda image: as_ycck(image.convert("CMYK")),
}
OTHERS = {
    "PNG": lambda image: encoded(image, "PNG"),
    "palette": lambda image: encoded(image.quantize(9), "PNG"),
    "RGBA": lambda image: encoded(Image.merge("RGBA", (*image.split(), image.convert("L"))), "PNG"),
    "LA": lambda image: encoded(Image.merge("LA", [image.convert("L")] * 2), "PNG"),
    "16-bit": lambda image: encoded(Image.fromarray(np.asarray(image)[..., 0] * np.uint16(257)), "PNG"),
    "BMP": lambda image: encoded(image, "BMP"),
    "PPM": lambda image: encoded(image, "PPM"),
}
DECODERS = ["simplejpeg", "pillow"]


def drawn_boxes(width: int, height: int, count: int) -> list[tuple[int, int, int, int]]:
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        left, top = int(draw.integers(width)), int(draw.integers(height))
        w, h = draw.integers(1, width - left + 1), draw.integers(1, height - top + 1)
        found.append((left, top, int(w), int(h)))
    return [*found, (0, 0, width, height), (width - 1, height - 1, 1, 1), (0, 0, 1, 1)]


def cut(pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    left, top, w, h = box
    return pixels[top : top + h, left : left + w]


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (17, 33), (16, 16), (97, 131)])
@pytest.mark.parametrize("kind", [*JPEGS, *OTHERS])
def test_decoders_agree_on_every_part(kind, size):
    """To the bit, whole or a box; a box is what the whole picture has there."""
    content = (JPEGS | OTHERS)[kind](Image.fromarray(picture(*size)))
    with Image.open(io.BytesIO(content)) as image:
        whole = np.asarray(image.convert("RGB"))
    if kind not in ("LA", "RGBA", "16-bit"):
        assert np.array_equal(decode(content, "x"), whole)
    whole = decode(content, "x")
    assert whole.shape == (size[1], size[0], 3)
    for decoder in DECODERS:
        assert np.array_equal(decode(content, "x", decoder), whole)
        for box in drawn_boxes(*size, 12):
            asked = mock.Mock(return_value=box)
            part = decode(content, "x", decoder, asked)
            assert part.dtype == np.uint8 and np.array_equal(part, cut(whole, box)), box
            asked.assert_called_with(*size)


def test_simplejpeg_reads_what_it_is_meant_for(monkeypatch):
    """Pillow is not asked, for a part near the top nor for a small one."""
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("Pillow was asked"))
    for kind in ("4:4:4", "4:2:2", "4:2:0", "gray", "progressive", "restarts", "EXIF rotation"):
        content = JPEGS[kind](Image.fromarray(picture(64, 96)))
        assert decode(content, "x", "simplejpeg").shape == (96, 64, 3)
        assert decode(content, "x", "simplejpeg", lambda *_: (3, 4, 20, 10)).shape == (10, 20, 3)
        assert decode(content, "x", "simplejpeg", size=16).shape == (24, 16, 3)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "gray", "progressive", "restarts", "CMYK", "PNG"])
@pytest.mark.parametrize("width, height", [(801, 603), (640, 480), (509, 1003)])
def test_reduced_parts(kind, width, height, decoder):
    """At least `size` pixels of the same place; both decoders reduce alike."""
    small = picture(width // 16, height // 16, seed=1)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    content = (JPEGS | OTHERS)[kind](image)
    whole = decode(content, "x")
    for number, (left, top, w, h) in enumerate(drawn_boxes(width, height, 12)):
        size = (16, 33, 64, 100)[number % 4]
        part = decode(content, "x", decoder, lambda *_, box=(left, top, w, h): box, size)
        assert np.array_equal(
            part, decode(content, "x", "pillow", lambda *_, box=(left, top, w, h): box, size)
        )
        factor = max((f for f in (1, 2, 4, 8) if min(w, h) >= f * size), default=1)
        if kind == "PNG" or factor == 1:
            assert np.array_equal(part, cut(whole, (left, top, w, h)))
            continue
        assert min(part.shape[:2]) >= size
        assert abs(part.shape[0] * factor - h) <= factor and abs(part.shape[1] * factor - w) <= factor
        expected = np.asarray(
            Image.fromarray(cut(whole, (left, top, w, h))).resize(part.shape[1::-1], Image.Resampling.BOX)
        ).astype(int)
        assert np.abs(part - expected).mean() < 8


def test_a_reduced_part_keeps_its_size_at_every_offset():
    """Rounding at both ends never takes a pixel off."""
    content = JPEGS["4:4:4"](Image.fromarray(picture(320, 304)))
    for decoder in DECODERS:
        for offset in range(17):
            part = decode(content, "x", decoder, lambda *_, o=offset: (o, o, 33 * 8, 33 * 8), 33)
            assert part.shape == (33, 33, 3)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", JPEGS)
def test_truncated_anywhere_inside_or_below_the_part(kind, decoder):
    """Refused by name, or right where the cut lies below the part; never filled up with gray."""
    content = JPEGS[kind](Image.fromarray(picture(61, 97)))
    whole = decode(content, "x")
    boxes = drawn_boxes(61, 97, 20)
    refused = 0
    for number, length in enumerate(range(2, len(content) - 2, max(1, len(content) // 60))):
        for box in (boxes[number % 20], (0, 0, 61, 8), (10, 80, 20, 17)):
            for tail in (b"", b"\xff", b"\0" * 40):
                try:
                    part = decode(content[:length] + tail, "a/b.jpg", decoder, lambda *_, box=box: box)
                except UserError as error:
                    refused += 1
                    assert str(error).startswith("a/b.jpg: cannot be decoded (")
                else:
                    assert np.array_equal(part, cut(whole, box)), (length, box)
    assert refused > 400


@pytest.mark.parametrize("kind", JPEGS)
def test_damage_is_seen_alike(kind):
    """Bytes changed at random: both decoders refuse, or show the same pixels, and neither crashes."""
    content = JPEGS[kind](Image.fromarray(picture(61, 97)))
    draw = np.random.default_rng(5)
    outcomes = set()
    for number in range(120):
        damaged = bytearray(content)
        for place in draw.integers(len(content) if number % 2 else 700, size=draw.integers(1, 4)):
            damaged[place] = draw.integers(256)
        share, results = draw.random(), []

        def region(w: int, h: int, share: float = share) -> tuple[int, int, int, int]:
            return w // 4, int(share * h), w - w // 4, h - int(share * h)

        for decoder in DECODERS:
            try:
                with warnings.catch_warnings():  # Pillow's, about EXIF
                    warnings.simplefilter("ignore")
                    results.append(decode(bytes(damaged), "a.jpg", decoder, region).tobytes())
            except UserError as error:
                assert "a.jpg" in str(error)
                results.append(None)
        assert results[0] == results[1]
        outcomes.add(results[0] is None)
    assert outcomes == {True, False}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("region", [None, lambda *_: (0, 0, 30, 30), lambda *_: (100, 60_000, 3000, 3000)])
def test_hostile_dimensions(decoder, region):
    """A header of 65500x65500 would take 12 GB; it is refused before anything is allocated."""
    content = bytearray(JPEGS["4:2:0"](Image.fromarray(picture(61, 97))))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (65500).to_bytes(2, "big") * 2
    tracemalloc.start()
    with pytest.raises(UserError, match=r"big\.jpg: has 65500x65500 = 4,290,250,000 pixels, and the limit"):
        decode(bytes(content), "big.jpg", decoder, region)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_hostile_png():
    content = bytearray(encoded(Image.fromarray(picture(8, 8)), "PNG"))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(UserError, match=r"big\.png: has 60000x60000 = 3,600,000,000 pixels, and the limit"):
        decode(bytes(content), "big.png")


def test_without_simplejpeg(monkeypatch, tmp_path):
    monkeypatch.setattr(data.decode, "simplejpeg", None)
    with pytest.raises(UserError, match=r"data\.decoder: simplejpeg .*pip install simplejpeg, or use pillow"):
        data.decode.check_decoder("simplejpeg")
    data.decode.check_decoder("pillow")
    content = JPEGS["4:2:0"](Image.fromarray(picture(61, 97)))
    assert decode(content, "x", "pillow").shape == (97, 61, 3)
    root = draw_folders(tmp_path / "data", {"cat": 1, "dog": 1})
    for decoder in DECODERS:
        config = parse_config(f"data: {{pipeline: fast, decoder: {decoder}, dir: {root}, workers: 0}}", "t")
        files = load_set(config.data, "train")
        if decoder == "pillow":
            assert make_train_loader(files, config, torch.device("cpu")).images == 2
            continue
        with pytest.raises(UserError, match=r"data\.decoder: simplejpeg is not installed"):
            make_train_loader(files, config, torch.device("cpu"))
        with pytest.raises(UserError, match=r"data\.decoder: simplejpeg is not installed"):
            make_eval_loader(files, config.data, 2, torch.device("cpu"))


# ---------------------------------------------------------------------------- class folders


def test_folders(tmp_path):
    root = draw_folders(tmp_path / "data", {"dog": 2, "cat": 3, "Zebra": 1})
    found = read(root, "train")
    assert found.classes == ("Zebra", "cat", "dog")
    assert found.labels.tolist() == [0, 1, 1, 1, 2, 2]
    assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int64)
    paths = ["Zebra/0", "cat/0", "cat/1", "cat/2", "dog/0", "dog/1"]
    for image, path in zip(found.images, paths, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(root / "train" / f"{path}.png")))
    other = read(root, "val")
    assert other.labels.tolist() == found.labels.tolist()
    assert other.fingerprint() != found.fingerprint()
    assert found.notes == other.notes == ()


def test_folder_through_the_configuration(tmp_path):
    root = draw_folders(tmp_path / "data", {"cat": 4, "dog": 4})
    config = DataConfig(dataset="folder", dir=str(root), image_size=8, train_images=2, val_images=4)
    assert load_set(config, "train").labels.tolist() == [0, 1]
    assert load_set(config, "val").labels.tolist() == [0, 0, 1, 1]


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    draw_folders(tmp_path / "data", {"cat": 1, "dog": 1})
    assert len(read("~/data", "train")) == 2


def test_extensions_nesting_and_other_files(tmp_path):
    root = draw_folders(tmp_path / "data", {"cat": 0, "dog": 1})
    cat = root / "train" / "cat"
    (cat / "b" / "deep").mkdir(parents=True)
    (cat / "a").mkdir()
    image = Image.fromarray(noise(8, 8, 3))
    for name in ("Z.JPG", "a/1.Jpeg", "b/deep/2.PNG", "b/1.bmp", "c.ppm", "dots.in.name.png", "ü ñ.png"):
        image.save(cat / name)
    for name in ("notes.txt", "png", ".DS_Store", "a/Thumbs.db", "b/x.png.part", "x.pngx"):
        (cat / name).write_text("no picture")
    (root / "train" / "list.txt").write_text("beside the class folders")
    (root / "val" / "cat" / "0.png").write_bytes((root / "val" / "dog" / "0.png").read_bytes())
    paths, labels, notes = data.image_folder.list_files(root / "train", ("cat", "dog"))
    below = [os.fsdecode(path) for path in paths]
    assert below == [
        "cat/Z.JPG",
        "cat/a/1.Jpeg",
        "cat/b/1.bmp",
        "cat/b/deep/2.PNG",
        "cat/c.ppm",
        "cat/dots.in.name.png",
        "cat/ü ñ.png",
        "dog/0.png",
    ]
    assert labels.tolist() == [0] * 7 + [1]
    assert notes == (
        f"warning: {root / 'train'}: left out are files of no known format: 3 (no ending 1, "
        ".pngx 1, .part 1), such as cat/png; convert them to JPEG or PNG",
    )
    assert len(read(root, "train")) == 8


def test_linked_class_folder(tmp_path):
    root = draw_folders(tmp_path / "data", {"cat": 2, "dog": 2})
    (root / "train" / "dog").rename(tmp_path / "elsewhere")
    (root / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    assert read(root, "train").labels.tolist() == [0, 0, 1, 1]


def test_name_that_is_not_utf8(tmp_path):
    root = draw_folders(tmp_path / "data", {"cat": 1, "dog": 1})
    name = os.fsdecode(os.fsencode(root / "train" / "cat") + b"/caf\xe9.png")
    Image.fromarray(noise(8, 8, 3)).save(io.BytesIO(), "PNG")
    Path(name).write_bytes(encoded(Image.fromarray(noise(8, 8, 3)), "PNG"))
    assert len(read(root, "train")) == 3


def test_order_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    root = draw_folders(tmp_path / "data", {"cat": 5, "dog": 5})
    before = read(root, "train")
    real = os.scandir

    class Backwards:
        """os.scandir, last entry first."""

        def __init__(self, path):
            self.entries = iter(sorted(real(path), key=lambda entry: entry.name, reverse=True))

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.entries)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert next(os.walk(root / "train"))[1] == ["dog", "cat"]
    after = read(root, "train")
    assert np.array_equal(before.images, after.images)
    assert before.classes == after.classes


@pytest.mark.parametrize(
    ("width", "height"), [(16, 16), (24, 16), (16, 25), (7, 5), (8, 100), (9, 8), (8, 8)]
)
def test_other_sizes_are_scaled_and_cropped_at_the_centre(width, height):
    image = Image.fromarray(noise(6, 6, 3)).resize((width, height), Image.Resampling.BICUBIC)
    scale = 8 / min(width, height)
    scaled = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - 8) // 2, (scaled.height - 8) // 2
    expected = np.asarray(scaled.crop((left, top, left + 8, top + 8))).astype(int)
    found = resize_and_center_crop(np.asarray(image), 8)
    assert found.shape == (8, 8, 3)
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_right_size_is_untouched():
    pixels = noise(8, 8, 3)
    assert np.array_equal(resize_and_center_crop(pixels, 8), pixels)


@pytest.mark.parametrize("shape", [(1, 60000), (60000, 1)])
def test_thin_picture_takes_no_large_memory(shape, monkeypatch):
    """Scaled as a whole, a line of 60,000 pixels would take 700 MB at 64 pixels across."""
    real = Image.Image.resize

    def resize(self, size, *arguments, **options):
        assert size[0] * size[1] <= 100 * 64 * 64, "scaled as a whole"
        return real(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    assert (
        resize_and_center_crop(np.full((*shape, 3), 77, np.uint8), 64).tolist()
        == np.full((64, 64, 3), 77).tolist()
    )


def test_pictures_larger_than_memory_are_refused(tmp_path, monkeypatch):
    root = draw_folders(tmp_path / "data", {"cat": 5, "dog": 5})
    monkeypatch.setattr(in_memory, "available_memory", lambda: 4096)
    assert len(read(root, "train")) == 10
    with pytest.raises(UserError, match=r"train: 10 pictures of 64x64 need .* lower data\.image_size"):
        read(root, "train", 64)
    assert len(read(root, "train", 20, 2)) == 2, "fewer of them fit"


# ---------------------------------------------------------------------------- parts of a set


@pytest.mark.parametrize("images", [1, 2, 7, 10, 1000, 50_000, 1_281_167])
@pytest.mark.parametrize("limit", [1, 2, 3, 10, 999, 50_000, None])
def test_even_indices(images, limit):
    found = even_indices(images, limit)
    assert found.dtype == np.int64
    assert len(found) == min(images, limit or images)
    assert found[0] == 0
    assert found[-1] < images
    steps = np.diff(found)
    if len(steps):
        assert steps.min() >= 1
        assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize("limit", [10, 11, 25, 99])
def test_part_of_a_sorted_set_keeps_every_class(limit):
    whole = ArrayDataset(noise(100, 2, 2, 3), np.repeat(np.arange(10), 10), tuple("0123456789"))
    part = subsample(whole, limit)
    counts = np.bincount(part.labels, minlength=10)
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1
    assert part.classes == whole.classes


def test_fingerprint_sees_every_change():
    whole = ArrayDataset(noise(10, 2, 2, 3), np.arange(10), tuple("0123456789"))
    images, labels = whole.images.copy(), whole.labels.copy()
    images[9, 1, 1, 2] ^= 1
    labels[3] = 4
    changed = [
        replace(whole, images=images),
        replace(whole, labels=labels),
        replace(whole, classes=tuple("012345678x")),
        subsample(whole, 9),
    ]
    assert len({whole.fingerprint(), *(one.fingerprint() for one in changed)}) == 5
    copy = ArrayDataset(np.asfortranarray(whole.images), whole.labels[::-1][::-1], whole.classes)
    assert copy.fingerprint() == whole.fingerprint()


def test_check_classes():
    whole = ArrayDataset(noise(2, 2, 2, 3), np.arange(2), ("a", "b"))
    assert check_classes(None, whole) == check_classes(2, whole) == 2
    with pytest.raises(UserError, match=r"model\.classes: 3, but the data has 2 classes"):
        check_classes(3, whole)


# ---------------------------------------------------------------------------- CIFAR


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path → bytes) on the loopback interface and remembers what was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path)
        # torchvision looks for redirections first, with a GET whose header says "Method: HEAD".
        method = self.headers.get("Method", self.command)
        self.server.asked.append(f"{method} {self.path}")
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if content and method == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def cifar_files(name: str) -> dict[str, bytes]:
    """The files of the official archive, by their names there, with 20 pictures each."""
    hundred = name == "cifar100"
    files = {}
    kinds = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for seed, kind in enumerate(kinds):
        labels = [(7 * seed + 3 * i) % (100 if hundred else 10) for i in range(20)]
        names = {"fine_labels": labels, "coarse_labels": [0] * 20} if hundred else {"labels": labels}
        files[kind] = pickle.dumps({"data": noise(20, 3072, seed=seed), **names}, protocol=2)
    if hundred:
        classes = {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": ["coarse"]}
        return files | {"meta": pickle.dumps(classes, protocol=2)}
    return files | {"batches.meta": pickle.dumps({"label_names": list("abcdefghij")}, protocol=2)}


def archive_of(folder: str, files: dict[str, bytes]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return whole.getvalue()


@dataclass(frozen=True)
class Cifar:
    """A small stand-in for an official data set, on a server of this machine."""

    name: str
    files: dict[str, bytes]
    archive: bytes
    address: str
    server: Server

    @property
    def reader(self):
        return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[self.name]

    def read(self, root: Path, split: str = "train", **changes) -> ArrayDataset:
        config = parse_config(f"data: {{dataset: {self.name}}}\nmodel: {{stem: cifar}}", "text").data
        return load_set(replace(config, dir=str(root), **changes), split)


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, server, monkeypatch) -> Cifar:
    name = request.param
    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    files = cifar_files(name)
    archive = archive_of(reader.base_folder, files)

    def hashed(entries: list) -> list:
        return [[name, hashlib.md5(files[name]).hexdigest()] for name, _ in entries]

    path = f"/{reader.filename}"
    server.files[path] = archive
    meta = reader.meta | {"md5": hashlib.md5(files[reader.meta["filename"]]).hexdigest()}
    monkeypatch.setattr(reader, "url", f"http://127.0.0.1:{server.server_port}{path}")
    monkeypatch.setattr(reader, "tgz_md5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(reader, "train_list", hashed(reader.train_list))
    monkeypatch.setattr(reader, "test_list", hashed(reader.test_list))
    monkeypatch.setattr(reader, "meta", meta)
    return Cifar(name, files, archive, path, server)


def test_cifar_is_downloaded_once(cifar, tmp_path):
    train = cifar.read(tmp_path / "new" / "datasets")
    asked = list(cifar.server.asked)
    assert asked.count(f"GET {cifar.address}") == 1
    before = snapshot(tmp_path)
    val = cifar.read(tmp_path / "new" / "datasets", "val")
    again = cifar.read(tmp_path / "new" / "datasets")
    assert cifar.server.asked == asked, "nothing is asked for again"
    assert snapshot(tmp_path) == before
    assert again.fingerprint() == train.fingerprint() != val.fingerprint()


def test_cifar_is_what_the_files_hold(cifar, tmp_path):
    ten = cifar.name == "cifar10"
    for split, size in (("train", 100 if ten else 20), ("val", 20)):
        read = cifar.read(tmp_path, split)
        lists = {"train": cifar.reader.train_list, "val": cifar.reader.test_list}[split]
        entries = [pickle.loads(cifar.files[name]) for name, _ in lists]
        planes = np.concatenate([entry["data"] for entry in entries]).reshape(-1, 3, 32, 32)
        assert read.images.shape == (size, 32, 32, 3)
        assert np.array_equal(read.images, planes.transpose(0, 2, 3, 1))
        labels = np.concatenate([entry["labels" if ten else "fine_labels"] for entry in entries])
        assert np.array_equal(read.labels, labels)
        assert (read.images.dtype, read.labels.dtype) == (np.uint8, np.int64)
        assert read.classes == (tuple("abcdefghij") if ten else tuple(f"fine{i}" for i in range(100)))


def test_part_of_cifar(cifar, tmp_path):
    whole, part = cifar.read(tmp_path), cifar.read(tmp_path, train_images=10)
    keep = np.arange(10) * len(whole) // 10
    assert np.array_equal(part.images, whole.images[keep])
    assert np.array_equal(part.labels, whole.labels[keep])
    assert len(cifar.read(tmp_path, "val", train_images=10, val_images=7)) == 7


def test_cifar_archive_with_another_hash_is_refused(cifar, tmp_path):
    cifar.server.files[cifar.address] = archive_of(cifar.reader.base_folder, {"evil": b"evil"})
    with pytest.raises(UserError, match="damaged") as caught:
        cifar.read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert cifar.reader.filename in str(caught.value)
    assert not (tmp_path / cifar.reader.base_folder).exists(), "nothing was unpacked"
    cifar.server.files[cifar.address] = cifar.archive
    assert len(cifar.read(tmp_path)) > 0, "the next attempt fetches it anew"


def test_cifar_download_cut_off(cifar, tmp_path):
    cifar.server.files[cifar.address] = cifar.archive[:1000]
    with pytest.raises(UserError, match="damaged"):
        cifar.read(tmp_path)
    cifar.server.files[cifar.address] = cifar.archive
    assert len(cifar.read(tmp_path)) > 0


def test_cifar_not_on_the_server(cifar, tmp_path):
    cifar.server.files.clear()
    with pytest.raises(UserError, match="404") as caught:
        cifar.read(tmp_path)
    assert f"put {cifar.reader.filename} into {tmp_path}" in str(caught.value)


def test_no_network(cifar, tmp_path, monkeypatch):
    """The message names the file and where to put it; once it is there, no network is needed."""
    monkeypatch.setattr(cifar.reader, "url", f"http://127.0.0.1:1/{cifar.reader.filename}")
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        cifar.read(tmp_path)
    assert f"get {cifar.reader.url}" in str(caught.value)
    assert f"put {cifar.reader.filename} into {tmp_path}" in str(caught.value)
    (tmp_path / cifar.reader.filename).write_bytes(cifar.archive)
    assert len(cifar.read(tmp_path)) > 0
    assert cifar.server.asked == []


def test_server_that_never_answers(cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(data.cifar, "TIMEOUT", 0.2, raising=False)
    caught = []

    def read():
        try:
            cifar.read(tmp_path)
        except UserError as error:
            caught.append(str(error))

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/{cifar.reader.filename}"
        monkeypatch.setattr(cifar.reader, "url", address)
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(10)
        assert caught, "waits for ever"
    assert f"put {cifar.reader.filename} into {tmp_path}" in caught[0]
    assert socket.getdefaulttimeout() is None, "the setting is for this download only"


def test_no_download_without_leave(cifar, tmp_path):
    with pytest.raises(UserError, match=r"is missing .* data\.download=true"):
        cifar.read(tmp_path / "new", download=False)
    assert not (tmp_path / "new").exists()
    assert cifar.server.asked == []
    cifar.read(tmp_path)
    assert len(cifar.read(tmp_path, download=False)) > 0


def test_read_only_copy_of_cifar(cifar, tmp_path, monkeypatch):
    cifar.read(tmp_path)
    asked, before = list(cifar.server.asked), snapshot(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(cifar.read(tmp_path)) > 0
    assert (cifar.server.asked, snapshot(tmp_path)) == (asked, before)
    (tmp_path / cifar.reader.base_folder / cifar.reader.train_list[0][0]).unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        cifar.read(tmp_path)
    assert cifar.server.asked == asked


@pytest.mark.parametrize("which", ["train", "test", "meta"])
def test_damaged_file_of_cifar(cifar, which, tmp_path):
    """Each file's hash is checked before it is unpickled; the archive beside it mends it."""
    cifar.read(tmp_path)
    lists = {"train": cifar.reader.train_list, "test": cifar.reader.test_list}
    name = cifar.reader.meta["filename"] if which == "meta" else lists[which][-1][0]
    path = tmp_path / cifar.reader.base_folder / name
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "pwned")))
    for split in ("train", "val"):
        with pytest.raises(UserError, match="missing or damaged"):
            cifar.read(tmp_path, split, download=False)
    asked = list(cifar.server.asked)
    if which == "meta":  # torchvision finds this only after the others; the message says to delete it
        shutil.rmtree(path.parent)
    assert len(cifar.read(tmp_path)) > 0
    assert path.read_bytes() == cifar.files[name]
    assert cifar.server.asked == asked
    assert not (tmp_path / "pwned").exists()


class Hostile:
    """Pickled, an order to make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_cifar_of_the_real_world():
    """The official addresses and hashes, as the authors' page gives them."""
    assert datasets.CIFAR10.tgz_md5 == "c58f30108f718f92721af3b95e74349a"
    assert datasets.CIFAR100.tgz_md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert datasets.CIFAR10.url.endswith("/cifar-10-python.tar.gz")
    assert datasets.CIFAR100.url.endswith("/cifar-100-python.tar.gz")
