"""Images for tests: random pixels, encoded bytes, EXIF orientation."""

import io

import numpy as np
from PIL import Image


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random uint8 pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def detailed(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return pixels (height, width, channels) with detail of several pixels' size, as in photographs."""
    small = noise(max(2, height // 6), max(2, width // 6), channels, seed=seed)
    layers = [Image.fromarray(small[..., c]).resize((width, height)) for c in range(channels)]
    return np.stack([np.asarray(layer) for layer in layers], axis=-1)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    """Return the bytes of an image file."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def orientation(value: int) -> Image.Exif:
    """Return EXIF data with an orientation, for `encode(…, exif=…)`."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif
