"""Decoding: both decoders agree to the bit, on any format and part; damaged files raise UserError."""

import io
import tracemalloc
import warnings
import zlib
from unittest import mock

import numpy as np
import pytest
import simplejpeg
import torch
from commands import draw_folders
from images import detailed, encode, noise, orientation
from PIL import Image

import data.decode
from data.datasets import load_set
from data.decode import check_decoder, decode
from data.loaders import make_eval_loader, make_train_loader
from resnext.config import parse_config
from resnext.errors import UserError

DECODERS = ["simplejpeg", "pillow"]


def gray(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, axis=2)


def exact_cases() -> dict[str, tuple[bytes, np.ndarray]]:
    """Return encoded images of many modes and the RGB pixels that they contain."""
    rgb, single, rgba, la = noise(7, 5, 3), noise(7, 5), noise(7, 5, 4), noise(7, 5, 2)
    colors, indices = noise(4, 3), noise(7, 5) % 4
    palette = Image.fromarray(indices, "P")
    palette.putpalette(colors.tobytes())
    deep = np.array([[0, 128, 129, 257, 256 * 100], [1000, 30000, 40000, 65407, 65535]], np.uint16)
    scaled = gray(np.round(deep / 257).astype(np.uint8))
    invisible = rgba * np.array([1, 1, 1, 0], np.uint8)
    cases = [
        ("RGB", rgb, ("PNG", "BMP", "PPM"), {}, rgb),
        ("gray", single, ("PNG",), {}, gray(single)),
        ("black and white", single > 127, ("PNG",), {}, gray((single > 127) * np.uint8(255))),
        ("palette", palette, ("PNG", "GIF"), {}, colors[indices]),
        ("transparent palette", palette, ("PNG", "GIF"), {"transparency": 2}, colors[indices]),
        ("RGBA", rgba, ("PNG",), {}, rgba[..., :3]),
        ("invisible", invisible, ("PNG",), {}, np.asarray(Image.fromarray(invisible).convert("RGB"))),
        ("LA", Image.fromarray(la, "LA"), ("PNG",), {}, gray(la[..., 0])),
        ("RGB with a transparent color", rgb, ("PNG",), {"transparency": tuple(rgb[0, 0].tolist())}, rgb),
        ("16-bit", deep, ("PNG", "TIFF"), {}, scaled),
        ("32-bit container", deep.astype(np.int32), ("PPM",), {}, scaled),
    ]
    return {
        f"{name}, {kind}": (encode(image, kind, **options), expected)
        for name, image, kinds, options, expected in cases
        for kind in kinds
    }


EXACT = exact_cases()


@pytest.mark.parametrize("name", EXACT)
def test_pixels_are_exact(name):
    """Alpha is dropped, not blended; 16-bit gray is scaled by 1/257."""
    content, expected = EXACT[name]
    decoded = decode(content, "x")
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, expected)


def test_only_the_first_of_several_images_counts():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(content, "x")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind, words", [(np.int32, "32-bit"), (np.float32, "floating-point")])
@pytest.mark.parametrize("values", [[0, 255], [0, 1 << 20]])
def test_more_than_16_bits_are_refused(values, kind, words):
    """Whatever the values: black must not depend on the brightest pixel of each image."""
    with pytest.raises(UserError, match=rf"^deep\.tif: {words} pixels"):
        decode(encode(np.array([values], kind), "TIFF"), "deep.tif")


def test_cmyk():
    """Solid colors equal Pillow's own conversion."""
    colors = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0)}
    for ink, expected in colors.items():
        decoded = decode(encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100), "x")
        assert decoded.shape == (16, 16, 3) and np.abs(decoded.astype(int) - expected).max() <= 3


@pytest.mark.parametrize("value", range(1, 9))
def test_exif_rotation_is_ignored(value):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = (250, 10, 10)
    decoded = decode(encode(pixels, "JPEG", quality=95, exif=orientation(value)), "x")
    assert decoded.shape == (16, 32, 3)
    assert decoded[:, 4, 0].min() > 230 and decoded[:, 28, 0].max() < 20


def test_files_that_cannot_be_decoded():
    content = encode(noise(40, 40, 3), "JPEG")
    truncated = [content[:length] for length in range(0, len(content) - 20, 7)]
    for broken in (*truncated, b"\0", b"GIF89a", b"text\n" * 100, b"\x89PNG\r\n"):
        with pytest.raises(UserError, match=r"^a/b\.jpg: cannot be decoded .*; replace or remove"):
            decode(broken, "a/b.jpg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "PPM"])
def test_damaged_anywhere(kind):
    """The decoder returns an image or raises UserError, nothing else."""
    content = encode(noise(9, 9, 3), kind)
    draw = np.random.default_rng(3)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draw.integers(len(content))] = draw.integers(256)
        try:
            assert decode(bytes(damaged), "a.png").ndim == 3
        except UserError as error:
            assert "a.png" in str(error)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_limit_on_pixels(kind, decoder, monkeypatch):
    """An image at the limit is read, even above Pillow's own limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    content = encode(Image.new("RGB", (50, 40)), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(content, "x", decoder, max_pixels=2000).shape == (40, 50, 3)
    with pytest.raises(
        UserError, match=r"^big\.png: has 50x40 = 2,000 pixels.* 1,999.*raise data\.max_pixels"
    ):
        decode(content, "big.png", decoder, max_pixels=1999)


def segments(content: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Split a JPEG into (marker, segment)s up to its first scan, and the scan's data."""
    place, found = 2, []
    while not found or found[-1][0] != 0xDA:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        found.append((marker, content[place : place + 2 + length]))
        place += 2 + length
    return found, content[place:-2]


def separate_scans(image: Image.Image) -> bytes:
    """Build a baseline JPEG with one scan each for Y, Cb and Cr from three gray ones."""
    planes = [segments(encode(plane, "JPEG")) for plane in image.convert("YCbCr").split()]
    content = b"\xff\xd8"
    for marker, segment in planes[0][0][:-1]:
        if marker == 0xC0:
            components = b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
            segment = segment[:2] + b"\0\x11" + segment[4:9] + b"\3" + components
        content += segment
    for number, (_, scan) in enumerate(planes, 1):
        content += bytes([0xFF, 0xDA, 0, 8, 1, number, 0, 0, 63, 0]) + scan
    return content + b"\xff\xd9"


def ycck(image: Image.Image) -> bytes:
    """Encode a CMYK JPEG whose Adobe segment claims YCCK."""
    content = bytearray(encode(image.convert("CMYK"), "JPEG"))
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


def jpeg(**options):
    return lambda image: encode(image, "JPEG", **options)


def subsampled(name: str):
    return lambda image: simplejpeg.encode_jpeg(np.array(image), 80, "RGB", name)


JPEGS = {
    "4:4:4": jpeg(subsampling="4:4:4"),
    "4:2:2": jpeg(subsampling="4:2:2"),
    "4:2:0": jpeg(subsampling="4:2:0"),
    "4:4:0": subsampled("440"),
    "4:1:1": subsampled("411"),
    "gray": lambda image: encode(image.convert("L"), "JPEG"),
    "progressive": jpeg(progressive=True),
    "optimized": jpeg(optimize=True),
    "restarts": jpeg(restart_marker_blocks=3),
    "restarts by rows": jpeg(restart_marker_rows=1, subsampling="4:2:0"),
    "separate scans": separate_scans,
    "EXIF rotation": jpeg(exif=orientation(6)),
    "Adobe RGB": jpeg(keep_rgb=True),
    "CMYK": lambda image: encode(image.convert("CMYK"), "JPEG"),
    "YCCK": ycck,
}
OTHERS = {
    "PNG": encode,
    "palette": lambda image: encode(image.quantize(9)),
    "RGBA": lambda image: encode(Image.merge("RGBA", (*image.split(), image.convert("L")))),
    "LA": lambda image: encode(Image.merge("LA", [image.convert("L")] * 2)),
    "16-bit": lambda image: encode(np.asarray(image)[..., 0] * np.uint16(257)),
    "BMP": lambda image: encode(image, "BMP"),
    "PPM": lambda image: encode(image, "PPM"),
}


def encoded(kind: str, width: int, height: int) -> bytes:
    return (JPEGS | OTHERS)[kind](Image.fromarray(detailed(width, height)))


def random_boxes(width: int, height: int, count: int) -> list[tuple[int, int, int, int]]:
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
    """To the bit, for the whole image and for boxes; a box equals that part of the whole."""
    content = encoded(kind, *size)
    whole = decode(content, "x")
    assert whole.shape == (size[1], size[0], 3)
    if kind not in ("LA", "RGBA", "16-bit"):
        with Image.open(io.BytesIO(content)) as image:
            assert np.array_equal(whole, np.asarray(image.convert("RGB")))
    for decoder in DECODERS:
        assert np.array_equal(decode(content, "x", decoder), whole)
        for box in random_boxes(*size, 12):
            region = mock.Mock(return_value=box)
            part = decode(content, "x", decoder, region)
            assert part.dtype == np.uint8 and np.array_equal(part, cut(whole, box)), box
            region.assert_called_with(*size)


def test_simplejpeg_decodes_plain_jpegs(monkeypatch):
    """Pillow is not used, whether for the whole, a part near the top or a reduced image."""
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("Pillow was used"))
    for kind in ("4:4:4", "4:2:2", "4:2:0", "gray", "progressive", "restarts", "EXIF rotation"):
        content = encoded(kind, 64, 96)
        assert decode(content, "x", "simplejpeg").shape == (96, 64, 3)
        assert decode(content, "x", "simplejpeg", lambda *_: (3, 4, 20, 10)).shape == (10, 20, 3)
        assert decode(content, "x", "simplejpeg", size=16).shape == (24, 16, 3)


@pytest.mark.parametrize(
    ("kind", "width", "height"),
    [
        *((kind, 801, 603) for kind in ("4:2:0", "4:4:4", "gray", "progressive", "restarts", "CMYK", "PNG")),
        ("4:2:0", 640, 480),
        ("4:4:4", 509, 1003),
    ],
)
def test_reduced_parts(kind, width, height):
    """A reduced part keeps at least `size` pixels of the same place; both decoders agree."""
    small = Image.fromarray(detailed(width // 16, height // 16, seed=1))
    content = (JPEGS | OTHERS)[kind](small.resize((width, height), Image.Resampling.BICUBIC))
    whole = decode(content, "x")
    for number, box in enumerate(random_boxes(width, height, 12)):
        (_, _, w, h), size = box, (16, 33, 64, 100)[number % 4]
        part, other = (decode(content, "x", decoder, lambda *_, box=box: box, size) for decoder in DECODERS)
        assert np.array_equal(part, other)
        factor = max((f for f in (1, 2, 4, 8) if min(w, h) >= f * size), default=1)
        if kind == "PNG" or factor == 1:
            assert np.array_equal(part, cut(whole, box))
            continue
        assert min(part.shape[:2]) >= size
        assert abs(part.shape[0] * factor - h) <= factor and abs(part.shape[1] * factor - w) <= factor
        expected = Image.fromarray(cut(whole, box)).resize(part.shape[1::-1], Image.Resampling.BOX)
        assert np.abs(part - np.asarray(expected).astype(int)).mean() < 8


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_reduced_part_keeps_its_size_at_every_offset(decoder):
    content = encoded("4:4:4", 320, 304)
    for offset in range(17):
        part = decode(content, "x", decoder, lambda *_, o=offset: (o, o, 33 * 8, 33 * 8), 33)
        assert part.shape == (33, 33, 3)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", JPEGS)
def test_truncated_inside_or_below_the_part(kind, decoder):
    """The part is refused, or correct if the cut lies below it; it is never filled up with gray."""
    content = encoded(kind, 61, 97)
    whole = decode(content, "x")
    boxes = random_boxes(61, 97, 20)
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
def test_decoders_agree_on_damaged_files(kind):
    """With random bytes changed, both decoders refuse or return the same pixels; neither crashes."""
    content = encoded(kind, 61, 97)
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
def test_hostile_jpeg_size(decoder, region):
    """An image of 65500x65500 pixels would need 12 GB; it is refused before anything is allocated."""
    content = bytearray(encoded("4:2:0", 61, 97))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (65500).to_bytes(2, "big") * 2
    tracemalloc.start()
    with pytest.raises(UserError, match=r"^big\.jpg: has 65500x65500 = 4,290,250,000 pixels"):
        decode(bytes(content), "big.jpg", decoder, region)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_hostile_png_size():
    content = bytearray(encoded("PNG", 8, 8))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(UserError, match=r"^big\.png: has 60000x60000 = 3,600,000,000 pixels"):
        decode(bytes(content), "big.png")


def test_without_simplejpeg(monkeypatch, tmp_path):
    monkeypatch.setattr(data.decode, "simplejpeg", None)
    check_decoder("pillow")
    assert decode(encoded("4:2:0", 61, 97), "x", "pillow").shape == (97, 61, 3)
    root = draw_folders(tmp_path / "data", {"cat": 1, "dog": 1})
    keys = f"data: {{pipeline: fast, dir: {root}, workers: 0, decoder: "
    config, pillow = (parse_config(f"{keys}{decoder}}}", "text") for decoder in DECODERS)
    files, cpu = load_set(config.data, "train"), torch.device("cpu")
    assert make_train_loader(files, pillow, cpu).images == 2
    for make in (
        lambda: check_decoder("simplejpeg"),
        lambda: make_train_loader(files, config, cpu),
        lambda: make_eval_loader(files, config.data, 2, cpu),
    ):
        with pytest.raises(UserError, match=r"^data\.decoder: simplejpeg .*pip install simplejpeg"):
            make()
