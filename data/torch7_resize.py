"""The bicubic resampling of Torch7's image.scale: no antialiasing, float32, not clamped (docs/torch7.md)."""

import numpy as np
import torch


def torch7_resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return image.scale(…, 'bicubic') of float32 (H, W, 3): rows first, then columns."""
    rows, columns = bicubic_matrix(image.shape[0], height), bicubic_matrix(image.shape[1], width)
    # torch's product, because NumPy's starts a thread per CPU core in every worker.
    pixels = torch.from_numpy(image).permute(1, 0, 2)
    narrow = torch.from_numpy(columns) @ pixels.reshape(len(pixels), -1)  # (width, H * 3)
    narrow = narrow.reshape(width, -1, 3).permute(1, 0, 2)
    resized = torch.from_numpy(rows) @ narrow.reshape(len(narrow), -1)  # (height, width * 3)
    return resized.reshape(height, width, 3).numpy()


def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """Return float32 (target, source): the weights of the source samples for each target sample.

    The kernel is Catmull-Rom (a = -0.5), and corners are aligned. Beyond a border, the line through the last
    two samples continues.
    """
    weights = np.zeros((target, source), np.float32)
    if source == 1:
        weights[:] = 1
        return weights
    step = np.float32(source - 1) / np.float32(max(target - 1, 1))
    position = np.arange(target, dtype=np.float32) * step
    position[-1] = source - 1  # exactly
    left = np.minimum(position.astype(np.int64), source - 2)
    x = (position - left).astype(np.float64)
    taps = (
        x * (-0.5 + x * (1 - 0.5 * x)),
        1 + x * x * (-2.5 + 1.5 * x),
        x * (0.5 + x * (2 - 1.5 * x)),
        x * x * (-0.5 + 0.5 * x),
    )
    row = np.arange(target)
    for offset, tap in zip((-1, 0, 1, 2), taps, strict=True):
        at = left + offset
        inside = (at >= 0) & (at < source)
        weights[row[inside], at[inside]] += tap[inside]
        for beyond, border, inner in ((at < 0, 0, 1), (at >= source, source - 1, source - 2)):
            weights[beyond, border] += 2 * tap[beyond]
            weights[beyond, inner] -= tap[beyond]
    return weights
