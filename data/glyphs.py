"""Glyphs: digits or letters drawn by Pillow with random size, colours, rotation, clutter and noise.

A set that needs no download: deterministic, made in memory in seconds. Character and
ground take any two contrasting colours, so that no linear function of the pixels does well.
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
    """The first `limit` (default 5,000 and 1,000) pictures of a split, uint8 (N, size, size, 3).

    The classes are the characters, which take turns.
    """
    classes = tuple(characters)
    count = limit or SIZES[split]
    check_memory(9 * count, size, "glyphs")  # noise is drawn in float64
    index = np.arange(count)
    labels = index % len(classes)
    numbers = random_uniform(0, 0, index, DRAWS, STREAMS[split])
    fonts = [ImageFont.load_default(size * scale / 100) for scale in range(75, 106, 5)]
    images = np.stack(
        [_draw(classes[label], u, size, fonts) for label, u in zip(labels, numbers, strict=True)]
    )
    noise = random_uniform(1, 0, index, size * size * 3, STREAMS[split]).reshape(images.shape)
    images = images + (2 * noise - 1) * NOISE
    return ArrayDataset(images.clip(0, 255).round().astype(np.uint8), labels, classes)


def _draw(character: str, u: np.ndarray, size: int, fonts: list) -> np.ndarray:
    """One picture, uint8 (size, size, 3), from the uniform numbers u, (DRAWS,)."""
    ground, ink = _contrasting_colors(u[:7])
    picture = Image.new("RGB", (size, size), ground)
    drawing = ImageDraw.Draw(picture)
    for line in u[11:].reshape(CLUTTER_LINES, 5):
        # Clutter is half-way between ground and ink, so that it disturbs but does not hide.
        color = tuple(int(g + (i - g) * line[4] * 0.5) for g, i in zip(ground, ink, strict=True))
        drawing.line([float(v * size) for v in line[:4]], fill=color)
    font = fonts[int(u[10] * len(fonts))]
    mask = Image.new("L", (size, size))
    centre = (size / 2 + (u[7] - 0.5) * size * 0.2, size / 2 + (u[8] - 0.5) * size * 0.2)
    ImageDraw.Draw(mask).text(centre, character, fill=255, font=font, anchor="mm")
    mask = mask.rotate((u[9] - 0.5) * 50, Image.Resampling.BICUBIC, center=centre)
    picture.paste(ink, mask=mask)
    return np.asarray(picture)


def _contrasting_colors(u: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ground and ink: random colours, one dark and one light, either way round."""
    dark = tuple(int(v * 120) for v in u[:3])
    light = tuple(int(135 + v * 120) for v in u[3:6])
    return (dark, light) if u[6] < 0.5 else (light, dark)
