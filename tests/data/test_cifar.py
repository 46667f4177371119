"""CIFAR: downloaded once, checked by hash, read as torchvision reads it; from a server on this machine."""

import hashlib
import http.server
import io
import os
import pickle
import shutil
import socket
import tarfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from commands import snapshot
from images import noise
from torchvision import datasets

import data.cifar
from data.datasets import load_set
from data.in_memory import ArrayDataset
from resnext.config import parse_config
from resnext.errors import UserError

READERS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


class Server(http.server.ThreadingHTTPServer):
    """Serves one archive at `path` and records the requests."""

    path, content = "", b""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        found = self.path == self.server.path
        # torchvision looks for redirections first, with a GET whose header says "Method: HEAD".
        method = self.headers.get("Method", self.command)
        self.server.requests.append(f"{method} {self.path}")
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(self.server.content) if found else 0))
        self.end_headers()
        if found and method == "GET":
            self.wfile.write(self.server.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def cifar_files(name: str) -> dict[str, bytes]:
    """Return the files of the official archive by name, with 20 images each."""
    hundred = name == "cifar100"
    kinds = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    contents = {}
    for seed, kind in enumerate(kinds):
        labels = [(7 * seed + 3 * i) % (100 if hundred else 10) for i in range(20)]
        keys = {"fine_labels": labels, "coarse_labels": [0] * 20} if hundred else {"labels": labels}
        contents[kind] = {"data": noise(20, 3072, seed=seed), **keys}
    if hundred:
        fine = [f"fine{i}" for i in range(100)]
        contents["meta"] = {"fine_label_names": fine, "coarse_label_names": ["coarse"]}
    else:
        contents["batches.meta"] = {"label_names": list("abcdefghij")}
    return {kind: pickle.dumps(content, protocol=2) for kind, content in contents.items()}


def archive_of(folder: str, files: dict[str, bytes]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return whole.getvalue()


@dataclass(frozen=True)
class Cifar:
    """A small stand-in for an official dataset."""

    name: str
    files: dict[str, bytes]
    archive: bytes
    server: Server

    @property
    def reader(self):
        return READERS[self.name]

    def read(self, root: Path, split: str = "train", **changes) -> ArrayDataset:
        config = parse_config(f"data: {{dataset: {self.name}}}\nmodel: {{stem: cifar}}", "text").data
        return load_set(replace(config, dir=str(root), **changes), split)

    def refuse(self, root: Path, match: str, split: str = "train", **changes) -> str:
        with pytest.raises(UserError, match=match) as caught:
            self.read(root, split, **changes)
        return str(caught.value)


@pytest.fixture(params=READERS)
def cifar(request, server, monkeypatch) -> Cifar:
    reader, files = READERS[request.param], cifar_files(request.param)
    archive = archive_of(reader.base_folder, files)

    def hashed(entries: list) -> list:
        return [[name, hashlib.md5(files[name]).hexdigest()] for name, _ in entries]

    server.path, server.content = f"/{reader.filename}", archive
    meta = reader.meta | {"md5": hashlib.md5(files[reader.meta["filename"]]).hexdigest()}
    monkeypatch.setattr(reader, "url", f"http://127.0.0.1:{server.server_port}{server.path}")
    monkeypatch.setattr(reader, "tgz_md5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(reader, "train_list", hashed(reader.train_list))
    monkeypatch.setattr(reader, "test_list", hashed(reader.test_list))
    monkeypatch.setattr(reader, "meta", meta)
    return Cifar(request.param, files, archive, server)


def test_downloaded_once(cifar, tmp_path):
    folder = tmp_path / "new" / "datasets"
    train = cifar.read(folder)
    requests, before = list(cifar.server.requests), snapshot(tmp_path)
    assert requests.count(f"GET {cifar.server.path}") == 1
    assert cifar.read(folder).fingerprint() == train.fingerprint() != cifar.read(folder, "val").fingerprint()
    assert (cifar.server.requests, snapshot(tmp_path)) == (requests, before)


def test_content(cifar, tmp_path):
    """Images and labels are those of the files; limits select evenly spaced images."""
    ten = cifar.name == "cifar10"
    for split, size in (("train", 100 if ten else 20), ("val", 20)):
        read = cifar.read(tmp_path, split)
        lists = {"train": cifar.reader.train_list, "val": cifar.reader.test_list}[split]
        entries = [pickle.loads(cifar.files[name]) for name, _ in lists]
        planes = np.concatenate([entry["data"] for entry in entries]).reshape(-1, 3, 32, 32)
        assert read.images.shape == (size, 32, 32, 3)
        assert np.array_equal(read.images, planes.transpose(0, 2, 3, 1))
        labels = np.concatenate([entry["labels" if ten else "fine_labels"] for entry in entries])
        assert np.array_equal(read.labels, labels)
        assert (read.images.dtype, read.labels.dtype) == (np.uint8, np.int64)
        assert read.classes == (tuple("abcdefghij") if ten else tuple(f"fine{i}" for i in range(100)))
        part = cifar.read(tmp_path, split, train_images=10, val_images=10)
        keep = np.arange(10) * size // 10
        assert np.array_equal(part.images, read.images[keep]) and np.array_equal(part.labels, labels[keep])


@pytest.mark.parametrize("how", ["other", "cut off"])
def test_archive_with_another_hash_is_refused(cifar, tmp_path, how):
    evil = archive_of(cifar.reader.base_folder, {"evil": b"evil"})
    cifar.server.content = evil if how == "other" else cifar.archive[:1000]
    text = cifar.refuse(tmp_path, "damaged")
    assert str(tmp_path) in text and cifar.reader.filename in text
    assert not (tmp_path / cifar.reader.base_folder).exists(), "nothing was unpacked"
    cifar.server.content = cifar.archive
    assert len(cifar.read(tmp_path)) > 0, "the next attempt downloads it again"


@pytest.mark.parametrize("how", ["missing", "no network", "silent"])
def test_download_fails(cifar, tmp_path, monkeypatch, how):
    """The message says what to put where; once the archive is there, no network is needed."""
    monkeypatch.setattr(data.cifar, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = {"missing": cifar.server.server_port, "no network": 1, "silent": silent.getsockname()[1]}[how]
        monkeypatch.setattr(cifar.reader, "url", f"http://127.0.0.1:{port}{cifar.server.path}")
        cifar.server.path = "/other"
        end = threading.Timer(10, silent.close)  # without a timeout, the download would wait forever
        end.start()
        text = cifar.refuse(tmp_path, {"missing": "404", "no network": "refused", "silent": "timed out"}[how])
        end.cancel()
    assert f"get {cifar.reader.url}, put {cifar.reader.filename} into {tmp_path}" in text
    assert socket.getdefaulttimeout() is None, "the timeout is for this download only"
    requests = list(cifar.server.requests)
    (tmp_path / cifar.reader.filename).write_bytes(cifar.archive)
    assert len(cifar.read(tmp_path)) > 0 and cifar.server.requests == requests


def test_no_download_without_permission(cifar, tmp_path):
    cifar.refuse(tmp_path / "new", r"is missing .* data\.download=true", download=False)
    assert not (tmp_path / "new").exists() and cifar.server.requests == []
    cifar.read(tmp_path)
    assert len(cifar.read(tmp_path, download=False)) > 0


def test_read_only_copy(cifar, tmp_path, monkeypatch):
    cifar.read(tmp_path)
    requests, before = list(cifar.server.requests), snapshot(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(cifar.read(tmp_path)) > 0 and snapshot(tmp_path) == before
    (tmp_path / cifar.reader.base_folder / cifar.reader.train_list[0][0]).unlink()
    cifar.refuse(tmp_path, "missing or damaged")
    assert cifar.server.requests == requests


class Hostile:
    """Creates a folder if it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("which", ["train", "test", "meta"])
def test_damaged_file(cifar, which, tmp_path):
    """The hash of each file is checked before unpickling; the archive beside it restores the file."""
    cifar.read(tmp_path)
    lists = {"train": cifar.reader.train_list, "test": cifar.reader.test_list}
    name = cifar.reader.meta["filename"] if which == "meta" else lists[which][-1][0]
    path = tmp_path / cifar.reader.base_folder / name
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "pwned")))
    for split in ("train", "val"):
        cifar.refuse(tmp_path, "missing or damaged", split, download=False)
    requests = list(cifar.server.requests)
    if which == "meta":  # torchvision checks this one after the others only; the message says to delete it
        shutil.rmtree(path.parent)
    assert len(cifar.read(tmp_path)) > 0
    assert path.read_bytes() == cifar.files[name] and cifar.server.requests == requests
    assert not (tmp_path / "pwned").exists()


def test_official_addresses_and_hashes():
    """As the authors' page gives them."""
    assert datasets.CIFAR10.tgz_md5 == "c58f30108f718f92721af3b95e74349a"
    assert datasets.CIFAR100.tgz_md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert datasets.CIFAR10.url.endswith("/cifar-10-python.tar.gz")
    assert datasets.CIFAR100.url.endswith("/cifar-100-python.tar.gz")
