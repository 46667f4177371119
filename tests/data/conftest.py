"""Folders of JPEGs, drawn once."""

import shutil
from pathlib import Path

import pytest
from batches import draw_jpegs, end_workers


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory) -> Path:
    """Class folders that no test changes."""
    return draw_jpegs(tmp_path_factory.mktemp("jpegs"))


@pytest.fixture
def root(shared_root, tmp_path) -> Path:
    """A copy of `shared_root` that a test may change."""
    return shutil.copytree(shared_root, tmp_path / "data")


@pytest.fixture(autouse=True)
def workers_end_with_the_test():
    yield
    end_workers()
