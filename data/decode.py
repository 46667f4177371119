"""Bytes of an image file to uint8 RGB: one function, so that every path decodes alike.

simplejpeg, libjpeg-turbo's own interface, is the fastest decoder that installs everywhere (measured by
`scripts/benchmark.py data`, docs/results.md). Pillow reads whatever is not a plain JPEG and whatever
simplejpeg rejects, and decides what is broken. Both give the same pixels. The decoder itself reduces
large images (scaled DCT).
"""

import io
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

# Ignore Pillow's warnings of large images and damaged EXIF data: what cannot be decoded is an error.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS = DataConfig.max_pixels  # twice Pillow's MAX_IMAGE_PIXELS, the size it refuses

Box = tuple[int, int, int, int]  # left, top, width, height
Region = Callable[[int, int], Box]


def check_decoder(decoder: str) -> None:
    """Raise UserError if the configured decoder is not installed."""
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
    """Return uint8 (H, W, 3) RGB of an image file's bytes; `path` is for error messages.

    The format is recognized by content; of several frames, the first is read. Gray becomes three equal
    channels, a palette its colors, CMYK is converted, and 16-bit gray is scaled by 1/257. As in the original,
    torchvision, and timm, transparency is dropped, so that the colors underneath show, and EXIF rotation is
    ignored.

    `region(width, height)` returns a box, and only its pixels are returned. The image is reduced by 2, 4, or
    8 if it is a JPEG and both sides of the box keep `size` pixels.

    Raise UserError if the file cannot be decoded, if its pixels have no scale of their own (floating point,
    32-bit integers), or if it has more than `max_pixels`.
    """
    if decoder == "simplejpeg":
        pixels = _simplejpeg(content, region, size, max_pixels)
        if pixels is not None:
            return pixels
    Image.MAX_IMAGE_PIXELS = None  # max_pixels replaces it
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(
                    f"{path}: has {width}x{height} = {width * height:,} pixels, and the limit is "
                    f"{max_pixels:,}; raise data.max_pixels (of a script, --max-pixels), or replace the file"
                )
            box = region(width, height) if region else (0, 0, width, height)
            factor = _reduction(box, size)
            if factor > 1:
                image.draft(None, (width // factor, height // factor))  # no effect on formats other than JPEG
            return _cut(_rgb(image, path), box, width, height)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(
            f"{path}: cannot be decoded (unknown image format); replace or remove the file"
        ) from None
    except Exception as error:  # Pillow's decoders raise many classes on damaged files
        reason = str(error)[:100] or type(error).__name__
        raise UserError(f"{path}: cannot be decoded ({reason}); replace or remove the file") from None


def _simplejpeg(
    content: bytes, region: Region | None, size: int | None, max_pixels: int
) -> np.ndarray | None:
    """Return what `decode` does if the file is a plain, undamaged JPEG, else None."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if colors not in ("YCbCr", "Gray") or width * height > max_pixels:
            return None
        box = region(width, height) if region else (0, 0, width, height)
        factor = _reduction(box, size)
        pixels = simplejpeg.decode_jpeg(
            content, min_height=-(-height // factor), min_width=-(-width // factor)
        )
    except ValueError:
        return None
    return _cut(pixels, box, width, height)


def _rgb(image: Image.Image, path: Path | str) -> np.ndarray:
    """Return uint8 (H, W, 3) of an opened image of any mode."""
    wide = image.mode == "I" and image.format not in ("PNG", "PPM")  # these two have 16 bits
    if image.mode == "F" or wide:
        what = "floating-point" if image.mode == "F" else "32-bit"
        raise UserError(f"{path}: {what} pixels, which have no defined range; convert the image to 8-bit RGB")
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


def _reduction(box: Box, size: int | None) -> int:
    """Return the largest of 8, 4, 2, and 1 by which a box can be reduced and keep `size` pixels."""
    _, _, width, height = box
    return next((f for f in (8, 4, 2) if size is not None and min(width, height) >= f * size), 1)


def _cut(pixels: np.ndarray, box: Box, width: int, height: int) -> np.ndarray:
    """Return the box, in coordinates of the width x height image, of its perhaps reduced pixels."""
    left, top, w, h = box
    x, y = pixels.shape[1] / width, pixels.shape[0] / height
    first, last = int(top * y + 0.5), int((top + h) * y + 0.5)
    start, end = int(left * x + 0.5), int((left + w) * x + 0.5)
    return pixels[first : max(last, first + 1), start : max(end, start + 1)]
