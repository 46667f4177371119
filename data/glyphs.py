"""Glyphs: digits or letters that Pillow draws with random size, colors, rotation, clutter and noise.

The dataset needs no download: it is deterministic and rendered in memory in seconds. Character and
background have any two contrasting colors, so that no linear function of the pixels does well.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .in_memory import ArrayDataset, check_memory
from .rng import RngStream, random_uniform

DIGITS = "0123456789"
SIZES = {"train": 5000, "val": 1000}
STREAMS = {"train": RngStream.GLYPHS_TRAIN, "val": RngStream.GLYPHS_VAL}
CLUTTER_LINES = 3
NOISE = 24.0  # pixel values, half width of the uniform noise
DRAWS = 11 + 5 * CLUTTER_LINES


def render_glyphs(split: str, limit: int | None, size: int, characters: str = DIGITS) -> ArrayDataset:
    """Return the first `limit` (default: SIZES) images of a split, uint8 (N, size, size, 3).

    The classes are the characters, in turn.
    """
    classes = tuple(characters)
    count = limit or SIZES[split]
    check_memory(9 * count, size, "glyphs")  # noise is drawn in float64
    index = np.arange(count)
    labels = index % len(classes)
    numbers = random_uniform(0, 0, index, DRAWS, STREAMS[split])
    fonts = [ImageFont.load_default(size * scale / 100) for scale in range(75, 106, 5)]
    drawn = [_draw(classes[label], u, size, fonts) for label, u in zip(labels, numbers, strict=True)]
    images = np.stack(drawn)
    noise = random_uniform(1, 0, index, size * size * 3, STREAMS[split]).reshape(images.shape)
    images = images + (2 * noise - 1) * NOISE
    return ArrayDataset(images.clip(0, 255).round().astype(np.uint8), labels, classes)


def _draw(character: str, u: np.ndarray, size: int, fonts: list) -> np.ndarray:
    """Return one image, uint8 (size, size, 3), from the uniform numbers u, (DRAWS,)."""
    ground, ink = _contrasting_colors(u[:7])
    image = Image.new("RGB", (size, size), ground)
    drawing = ImageDraw.Draw(image)
    for line in u[11:].reshape(CLUTTER_LINES, 5):
        # Clutter is at most halfway between ground and ink: it disturbs but does not hide.
        color = tuple(int(g + (i - g) * line[4] * 0.5) for g, i in zip(ground, ink, strict=True))
        drawing.line([float(v * size) for v in line[:4]], fill=color)
    font = fonts[int(u[10] * len(fonts))]
    mask = Image.new("L", (size, size))
    center = (size / 2 + (u[7] - 0.5) * size * 0.2, size / 2 + (u[8] - 0.5) * size * 0.2)
    ImageDraw.Draw(mask).text(center, character, fill=255, font=font, anchor="mm")
    image.paste(ink, mask=mask.rotate((u[9] - 0.5) * 50, Image.Resampling.BICUBIC, center=center))
    return np.asarray(image)


def _contrasting_colors(u: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return ground and ink: random colors, one dark and one light, in random order."""
    dark = tuple(int(v * 120) for v in u[:3])
    light = tuple(int(135 + v * 120) for v in u[3:6])
    return (dark, light) if u[6] < 0.5 else (light, dark)
