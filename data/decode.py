"""Bytes of an image file → uint8 RGB. One function, so that every path decodes alike."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from resnext.errors import UserError


def decode(content: bytes, path: Path | str) -> np.ndarray:
    """uint8 (H, W, 3) RGB of an image file's bytes; `path` is for the error message.

    The format is found by content. Gray becomes three equal channels, a palette its colours,
    CMYK is converted, alpha dropped, EXIF rotation ignored (as the original does). 16-bit gray
    is scaled by 1/257.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith("I;16") or image.mode == "I":
                gray = np.asarray(image).astype(np.uint32)
                if gray.max(initial=0) > 0xFFFF:
                    raise UserError(f"{path}: more than 16 bits a pixel; convert it to 8-bit RGB")
                gray = ((gray + 128) // 257).astype(np.uint8)
                return np.repeat(gray[:, :, None], 3, axis=2)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode in ("RGBA", "LA"):  # drop alpha without blending
                image = image.convert("RGBA")
                return np.ascontiguousarray(np.asarray(image)[:, :, :3])
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(
            f"{path}: cannot be decoded ({str(error)[:100] or type(error).__name__}); "
            "replace or remove the file"
        ) from None
