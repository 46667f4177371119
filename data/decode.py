"""Bytes of an image file → uint8 RGB. One function, so that every path decodes alike.

Routes, by measurement (docs/results.md, `scripts/benchmark.py data`): simplejpeg, libjpeg-turbo's own
interface, is the fastest that installs everywhere; Pillow reads whatever is not a plain JPEG, and
whatever simplejpeg complains about, and has the last word on what is broken. Both give the same pixels.
Decoding stops below the part that is asked for, and large pictures are reduced by the decoder (scaled DCT).
"""

import io
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from resnext.config import DataConfig
from resnext.errors import UserError

try:
    import simplejpeg
except ImportError:  # Pillow alone is enough; see `check_decoder`
    simplejpeg = None

# Remarks on large pictures and damaged EXIF data; what cannot be decoded is an error all the same.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS = DataConfig.max_pixels  # twice Pillow's MAX_IMAGE_PIXELS: where it makes an error

Box = tuple[int, int, int, int]  # left, top, width, height
Region = Callable[[int, int], Box]


def check_decoder(decoder: str) -> None:
    """A UserError where the configured decoder is not installed."""
    if decoder == "simplejpeg" and simplejpeg is None:
        raise UserError("data.decoder: simplejpeg is not installed; pip install simplejpeg, or use pillow")


def decode(
    content: bytes,
    path: Path | str,
    decoder: str = "pillow",
    region: Region | None = None,
    size: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """uint8 (H, W, 3) RGB of an image file's bytes; `path` is for the error message.

    The format is found by content; of several pictures in a file the first is taken. Gray becomes three equal
    channels, a palette its colours, CMYK is converted, 16-bit gray is scaled by 1/257. As in the original,
    torchvision and timm, transparency is dropped, so that the colours below it show, and EXIF rotation is
    ignored. Raises UserError for what cannot be decoded, pixels without a scale of their own (floating point,
    32-bit integers), and pictures of more than `max_pixels`.

    `region` is asked for a box, given the picture's width and height, and only that is returned; of a
    JPEG reduced by 2, 4 or 8 while both sides keep `size` pixels.
    """
    if decoder == "simplejpeg":
        image = _simplejpeg(content, region, size, max_pixels)
        if image is not None:
            return image
    Image.MAX_IMAGE_PIXELS = None  # the limit here can be raised
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(
                    f"{path}: has {width}x{height} = {width * height:,} pixels, and the limit is "
                    f"{max_pixels:,}; raise data.max_pixels (of a script, --max-pixels), or replace the file"
                )
            left, top, w, h = region(width, height) if region else (0, 0, width, height)
            factor = _reduction(w, h, size)
            if factor > 1:
                image.draft(None, (width // factor, height // factor))  # JPEG alone knows it
            pixels = _rgb(image, path)
        return _cut(pixels, (left, top, w, h), width, height)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(
            f"{path}: cannot be decoded (no picture of a known format); replace or remove the file"
        ) from None
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(
            f"{path}: cannot be decoded ({str(error)[:100] or type(error).__name__}); "
            "replace or remove the file"
        ) from None


def _rgb(image: Image.Image, path: Path | str) -> np.ndarray:
    """uint8 (H, W, 3) of an opened image of any mode."""
    wide = image.mode == "I" and image.format not in ("PNG", "PPM")  # of these, 16 bits
    if image.mode == "F" or wide:
        what = "floating-point" if image.mode == "F" else "32-bit"
        raise UserError(f"{path}: {what} pixels, which have no scale of their own; convert it to 8-bit RGB")
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.uint32)
        gray = ((gray + 128) // 257).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA"):  # drop alpha without blending
        image = image.convert("RGBA")
        return np.ascontiguousarray(np.asarray(image)[:, :, :3])
    return np.array(image.convert("RGB"))


def _simplejpeg(
    content: bytes, region: Region | None, size: int | None, max_pixels: int
) -> np.ndarray | None:
    """The same of a plain JPEG file; None for others and where anything is wrong with it."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if colors not in ("YCbCr", "Gray") or width * height > max_pixels:
            return None
        left, top, w, h = region(width, height) if region else (0, 0, width, height)
        factor = _reduction(w, h, size)
        if factor > 1:
            minimum = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
            return _cut(simplejpeg.decode_jpeg(content, **minimum), (left, top, w, h), width, height)
        rows = top + h + 16 - (top + h) % 16  # whole blocks, and the next row for chroma's interpolation
        if rows < height:
            image = _upper_rows(content, rows, width)
            if image is not None:
                return image[top : top + h, left : left + w]
        return simplejpeg.decode_jpeg(content)[top : top + h, left : left + w]
    except ValueError:
        return None


def _reduction(width: int, height: int, size: int | None) -> int:
    """The largest of 8, 4, 2, 1 by which a box can be reduced and keep `size` pixels."""
    if size is None:
        return 1
    return next(factor for factor in (8, 4, 2, 1) if factor == 1 or min(width, height) >= factor * size)


def _cut(pixels: np.ndarray, box: Box, width: int, height: int) -> np.ndarray:
    """A box in coordinates of the width x height picture, of its (perhaps reduced) pixels."""
    left, top, w, h = box
    x, y = pixels.shape[1] / width, pixels.shape[0] / height
    first, last = int(top * y + 0.5), int((top + h) * y + 0.5)
    start, end = int(left * x + 0.5), int((left + w) * x + 0.5)
    return pixels[first : max(last, first + 1), start : max(end, start + 1)]


def _upper_rows(content: bytes, rows: int, width: int) -> np.ndarray | None:
    """The first rows of a baseline JPEG: its header is told that there are no more of them."""
    place = _frame_header(content)
    if place is None:
        return None
    shortened = bytearray(content)
    shortened[place + 5 : place + 7] = struct.pack(">H", rows)
    image = np.empty((rows, width, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(shortened, buffer=image)
    except ValueError as error:
        if not str(error).endswith("extraneous bytes before marker 0xd9"):  # the rest of the data: expected
            return None
    return image


def _frame_header(content: bytes) -> int | None:
    """Where the frame header of a baseline JPEG starts; None for progressive and other kinds."""
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        if content[place + 1] in (0xC0, 0xC1):
            return place
        place += 2 + struct.unpack_from(">H", content, place + 2)[0]
    return None
