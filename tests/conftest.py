"""Fixtures that many tests share: a clean environment, and runs that are trained once."""

import os
import shutil
from pathlib import Path

import pytest
from commands import call, draw_folders, tiny

import train

# The networks are tiny: on busy CPU cores, synchronizing threads would take a hundred times longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Cache file lists in a temporary folder, not in the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch):
    """Hide the variables of a launcher or proxy from the tests."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """Return a run directory of two epochs on glyphs; do not change it (see `run_copy`)."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").touch()
    result = call(train.main, "--config", folder / "tiny.yaml", "--output", folder / "run", *tiny())
    assert result.status == 0, result.error
    return folder / "run"


@pytest.fixture
def run_copy(finished_run, tmp_path) -> Path:
    """Return a copy of `finished_run` that the test may change."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture(scope="session")
def folder_run(tmp_path_factory) -> Path:
    """Return a run directory trained on the class folders cat and dog in ../pictures/."""
    folder = tmp_path_factory.mktemp("folder")
    draw_folders(folder / "pictures", {"cat": 3, "dog": 3})
    (folder / "tiny.yaml").touch()
    settings = tiny(data__dataset="folder", data__dir=str(folder / "pictures"), train__epochs="1")
    result = call(train.main, "--config", folder / "tiny.yaml", "--output", folder / "run", *settings)
    assert result.status == 0, result.error
    return folder / "run"
