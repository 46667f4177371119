"""Files that are cut off or changed at random: every reader must refuse them with one short message."""

import numpy as np
import pytest

from resnext import UserError


def check_damaged(read, path, content, start, end, cuts=12, changes=60):
    """Cut `content` in its head and in `cuts` other places; change it `changes` times within start...end."""
    generator = np.random.default_rng(0)
    for size in [*range(0, 400, 37), *generator.integers(400, len(content) - 1, cuts)]:
        path.write_bytes(content[:size])
        with pytest.raises(UserError):
            read(path)
    for _ in range(changes):
        changed = bytearray(content)
        for place in generator.integers(start, min(end, len(content)), 3):
            changed[place] = generator.integers(256)
        path.write_bytes(changed)
        try:
            read(path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
