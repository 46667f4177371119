"""Image folders: which files are images, in which order, and how they are read into memory."""

import os
from pathlib import Path

import numpy as np
import pytest
from commands import draw_folders
from images import encode, noise
from PIL import Image

from data import in_memory
from data.datasets import load_set
from data.image_folder import list_files, list_set, read_set, resize_and_center_crop
from data.in_memory import ArrayDataset
from resnext.config import DataConfig
from resnext.errors import UserError


def read(root: Path | str, split: str, size: int = 8, limit: int | None = None) -> ArrayDataset:
    """Read a split into memory."""
    return read_set(list_set(str(root), split, limit), size)


@pytest.fixture
def root(tmp_path) -> Path:
    return draw_folders(tmp_path / "data", {"dog": 2, "cat": 3, "Zebra": 1})


def test_images_and_labels(root):
    found, other = read(root, "train"), read(root, "val")
    assert found.classes == ("Zebra", "cat", "dog")
    assert found.labels.tolist() == other.labels.tolist() == [0, 1, 1, 1, 2, 2]
    assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int64)
    paths = ["Zebra/0", "cat/0", "cat/1", "cat/2", "dog/0", "dog/1"]
    for image, path in zip(found.images, paths, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(root / "train" / f"{path}.png")))
    assert other.fingerprint() != found.fingerprint()
    assert found.notes == other.notes == ()


def test_through_the_configuration(root):
    config = DataConfig(dataset="folder", dir=str(root), image_size=8, train_images=2, val_images=3)
    assert load_set(config, "train").labels.tolist() == [0, 1]
    assert load_set(config, "val").labels.tolist() == [0, 1, 2]


def test_home_folder_links_and_names_that_are_not_utf8(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    (root / "train" / "dog").rename(root.parent / "elsewhere")
    (root / "train" / "dog").symlink_to(root.parent / "elsewhere")
    Path(os.fsdecode(os.fsencode(root / "train" / "cat") + b"/caf\xe9.png")).write_bytes(
        encode(noise(8, 8, 3))
    )
    assert read("~/data", "train").labels.tolist() == [0, 1, 1, 1, 1, 2, 2]


def test_extensions_nesting_and_other_files(tmp_path):
    root = draw_folders(tmp_path / "data", {"cat": 0, "dog": 1})
    cat = root / "train" / "cat"
    (cat / "b" / "deep").mkdir(parents=True)
    (cat / "a").mkdir()
    names = ["Z.JPG", "a/1.Jpeg", "b/1.bmp", "b/deep/2.PNG", "c.ppm", "dots.in.name.png", "ü ñ.png"]
    for name in reversed(names):
        Image.fromarray(noise(8, 8, 3)).save(cat / name)
    pixels = noise(8, 8, 3, seed=5)
    (cat / "Z.JPG").write_bytes(encode(pixels, "PNG"))  # the content decides, not the name
    for name in ("notes.txt", "png", ".DS_Store", "a/Thumbs.db", "b/x.png.part", "x.pngx"):
        (cat / name).write_text("not an image")
    (root / "train" / "list.txt").write_text("beside the class folders")
    paths, labels, notes = list_files(root / "train", ("cat", "dog"))
    assert list(map(os.fsdecode, paths)) == [*(f"cat/{name}" for name in names), "dog/0.png"]
    assert labels.tolist() == [0] * 7 + [1]
    assert notes == (
        f"warning: {root / 'train'}: skipped files of unsupported formats: 3 (no extension 1, .pngx 1, "
        ".part 1), such as cat/png; convert them to JPEG or PNG",
    )
    images = read(root, "train").images
    assert len(images) == 8 and np.array_equal(images[0], pixels)


def test_order_does_not_depend_on_the_disk(root, monkeypatch):
    before = read(root, "train")
    scandir = os.scandir

    class Backwards(list):
        """os.scandir, last entry first."""

        def __init__(self, path):
            super().__init__(sorted(scandir(path), key=lambda entry: entry.name, reverse=True))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    after = read(root, "train")
    assert np.array_equal(before.images, after.images) and before.classes == after.classes


@pytest.mark.parametrize(
    ("width", "height"), [(16, 16), (24, 16), (16, 25), (7, 5), (8, 100), (9, 8), (8, 8)]
)
def test_other_sizes_are_scaled_and_center_cropped(width, height):
    image = Image.fromarray(noise(6, 6, 3)).resize((width, height), Image.Resampling.BICUBIC)
    scale = 8 / min(width, height)
    scaled = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - 8) // 2, (scaled.height - 8) // 2
    expected = np.asarray(scaled.crop((left, top, left + 8, top + 8))).astype(int)
    found = resize_and_center_crop(np.asarray(image), 8)
    assert found.shape == (8, 8, 3)
    assert np.abs(found.astype(int) - expected).max() <= (0 if width == height == 8 else 2)


@pytest.mark.parametrize("shape", [(1, 60000), (60000, 1)])
def test_thin_images_need_little_memory(shape, monkeypatch):
    """Scaling a line of 60,000 pixels as a whole would need 700 MB at 64 pixels across."""
    resize = Image.Image.resize

    def checked(self, size, *arguments, **options):
        assert size[0] * size[1] <= 100 * 64 * 64, "scaled as a whole"
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", checked)
    assert (resize_and_center_crop(np.full((*shape, 3), 77, np.uint8), 64) == np.full((64, 64, 3), 77)).all()


def test_datasets_larger_than_memory_are_refused(tmp_path, monkeypatch):
    root = draw_folders(tmp_path / "data", {"cat": 5, "dog": 5})
    monkeypatch.setattr(in_memory, "available_memory", lambda: 4096)
    assert len(read(root, "train")) == 10
    with pytest.raises(UserError, match=r"train: 10 images of 64x64 need .* lower data\.image_size"):
        read(root, "train", 64)
    assert len(read(root, "train", 20, 2)) == 2, "two of them fit"
