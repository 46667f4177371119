"""Runs that many tests start from, made once."""

import os
import shutil
from pathlib import Path

import pytest
from commands import call, draw_folders, tiny

import train

# The networks are tiny: on busy cores, threads that wait for each other take a hundred times longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Lists of files are kept here, and not in the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch):
    """What a launcher or a proxy has left in the environment does not reach the tests."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A run directory of two epochs on glyphs; look, don't touch (see `run_copy`)."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").touch()
    result = call(train.main, "--config", folder / "tiny.yaml", "--output", folder / "run", *tiny())
    assert result.status == 0, result.error
    return folder / "run"


@pytest.fixture
def run_copy(finished_run, tmp_path) -> Path:
    """A copy of `finished_run` of one's own."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture(scope="session")
def folder_run(tmp_path_factory) -> Path:
    """A run on class folders, cat and dog, which lie next to it in pictures/."""
    folder = tmp_path_factory.mktemp("folder")
    draw_folders(folder / "pictures", {"cat": 3, "dog": 3})
    (folder / "tiny.yaml").touch()
    settings = tiny(data__dataset="folder", data__dir=str(folder / "pictures"), train__epochs="1")
    result = call(train.main, "--config", folder / "tiny.yaml", "--output", folder / "run", *settings)
    assert result.status == 0, result.error
    return folder / "run"
