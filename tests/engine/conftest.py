"""Runs on several ranks, made once for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from batches import draw_jpegs
from rank_runs import Runs
from torchrun import Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("processes")) as processes:
        yield processes


@pytest.fixture(scope="session")
def runs(processes, tmp_path_factory) -> Runs:
    return Runs(processes, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """101 images in each of train/ and val/."""
    return draw_jpegs(tmp_path_factory.mktemp("images"), {"ant": 40, "bee": 33, "cow": 28})
