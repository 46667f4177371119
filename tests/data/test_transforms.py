"""Geometry and resampling, compared stage by stage with the original Lua code, and with torchvision.

golden/ has the numbers of images that formulas draw; the complete reference data has those of photographs.
Differences are in the original's units: pixels in 0...1, or normalized.
"""

import io
import json
import lzma
import math

import numpy as np
import pytest
import torch
from oracle import SHARED, golden
from PIL import Image
from torchvision.transforms import v2

from data.augment import jitter, mirror, normalize
from data.decode import decode
from data.rng import RngStream, random_uniform
from data.torch7_resize import bicubic_matrix, torch7_resize
from data.transforms import (
    CROP_DRAWS,
    crop_places,
    eval_images,
    random_sized_box,
    resize,
    scaled_size,
    torch7_shorter_side,
    train_image,
)
from resnext.config import parse_config
from resnext.errors import UserError

UNIT = np.float32(1 / 255)  # the original's pixels are uint8 times this
MEAN, STD = (torch.tensor(values) for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
# Reached: 3.6e-7 after scaling, 4.8e-7 after colors, 1.9e-6 once divided by 0.22 (float32 has 1.2e-7).
SCALE_BOUND, COLOR_BOUND, NORMALIZED_BOUND = 1e-6, 1.5e-6, 4e-6
PIPELINES = pytest.mark.parametrize("pipeline", ["fast", "torch7"])


def data_config(pipeline="torch7", more=""):
    return parse_config(f"data: {{pipeline: {pipeline}, {more}}}", "test").data


TORCH7, FAST = data_config(), data_config("fast")


def encode(image, kind="PNG", **options):
    """The bytes of an image file."""
    content = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(content, kind, **options)
    return content.getvalue()


def draws(count, seed=1):
    return random_uniform(seed, 1, np.arange(count), CROP_DRAWS, RngStream.CROP)


# ---------------------------------------------------------------------------- the reference data


def planes(*values):
    return np.stack([np.asarray(v) % 256 for v in values], axis=-1).astype(np.uint8)


def drawn(name):
    """A reference image by its formula."""
    if name == "gradient_rgb.png":
        y, x = np.mgrid[:257, :301]
        checks = (x // 16 + y // 16) % 2
        return Image.fromarray(planes(x * 255 // 300, y * 255 // 256, x * y // 400 % 56 + 200 * checks))
    y, x = np.mgrid[:70, :90]
    if name == "small_rgba.png":
        return Image.fromarray(planes(7 * x, 11 * y, x * y, 255 - (x + y)))
    if name == "small_gray.png":
        return Image.fromarray(planes(x * x + 5 * y)[:, :, 0])
    y, x = np.mgrid[:50, :60]
    palette = Image.fromarray(planes((x // 6 + y // 5) % 16)[:, :, 0], "P")
    colors = 50 + 37 * np.arange(16)
    palette.putpalette(planes(colors, 2 * colors, 3 * colors).tobytes())
    return palette


class Reference:
    """Records of the original's transforms and, by key, their results."""

    def __init__(self, facts):
        self.facts = facts

    def file(self, name):
        return encode(drawn(name))

    def stored(self, key):
        return golden("imagenet_transforms.npz")[key]

    def pixels(self, name):
        """float32 (H, W, 3) in 0...255"""
        image = np.asarray(Image.open(io.BytesIO(self.file(name))).convert("RGBA"))
        return image[:, :, :3].astype(np.float32)


class Complete(Reference):
    """All of it, photographs included."""

    def __init__(self):
        super().__init__(json.loads((SHARED / "transforms" / "meta.json").read_text()))
        self.archives = {}

    def file(self, name):
        return (SHARED / "transforms" / "images" / name).read_bytes()

    def stored(self, key):
        group = key.split("|")[0]
        if group not in self.archives:
            content = (SHARED / "transforms" / f"{group}.npz.xz").read_bytes()
            self.archives[group] = np.load(io.BytesIO(lzma.decompress(content)))
        return self.archives[group][key]


GOLDEN = Reference(golden("imagenet_transforms.json"))
ABSENT = pytest.mark.skipif(not SHARED.is_dir(), reason="the complete reference data is not there")
COMPLETE = Complete() if SHARED.is_dir() else None
CMYK = "cmyk_small.jpg"


def records(group, wanted=lambda record: True):
    """Parameters (reference, record): golden's, and the photographs'."""
    mine = [r for r in GOLDEN.facts[group] if wanted(r)]
    found = [pytest.param(GOLDEN, r, id=f"golden {label(r)}") for r in mine]
    if COMPLETE is None:
        return [*found, pytest.param(None, None, marks=ABSENT, id="photographs")]
    photographs = [r for r in COMPLETE.facts[group] if r["file"].endswith((".JPEG", ".jpg")) and wanted(r)]
    return found + [pytest.param(COMPLETE, r, id=label(r)) for r in photographs]


def label(record):
    sizes = [f"{record[key]:g}" for key in ("arg_width", "arg_height", "seed") if key in record]
    return " ".join([record["file"].split(".")[0], *sizes])


def difference(ours, reference, record):
    """Largest difference of (H, W, 3) to a record: its samples, and means over the whole image."""
    ours = np.asarray(ours).transpose(2, 0, 1)
    assert list(ours.shape) == record["shape"]
    theirs = reference.stored(record["key"])
    samples = ours if record["full"] else ours[:, ::7, ::7]
    assert samples.shape == theirs.shape and samples.dtype == np.float32
    whole = ours.astype(np.float64)
    pixels = whole[0].size
    means = np.abs(whole.sum((1, 2)) - record["sum"]) / pixels
    magnitudes = np.abs(np.abs(whole).sum((1, 2)) - record["abs_sum"]) / pixels
    return max(np.abs(samples - theirs).max(), means.max(), magnitudes.max())


def normalized(crop):
    return normalize(torch.from_numpy(np.ascontiguousarray(crop))[None], MEAN, STD)[0].permute(1, 2, 0)


def test_the_drawn_images_are_the_originals():
    for record in GOLDEN.facts["images"]:
        assert difference(GOLDEN.pixels(record["file"]) * UNIT, GOLDEN, record) < 1e-7


@ABSENT
def test_the_drawn_files_are_the_originals():
    for record in GOLDEN.facts["images"]:
        name = record["file"]
        theirs, ours = Image.open(io.BytesIO(COMPLETE.file(name))), drawn(name)
        assert (ours.mode, ours.size) == (theirs.mode, theirs.size)
        assert np.array_equal(GOLDEN.pixels(name), COMPLETE.pixels(name))


# ---------------------------------------------------------------------------- scaling


@pytest.mark.parametrize("reference, record", records("scale"))
def test_scale(reference, record):
    """image.scale takes fractions, and truncates."""
    size = int(record["arg_width"]), int(record["arg_height"])
    scaled = torch7_resize(reference.pixels(record["file"]), *size)
    assert difference(scaled * UNIT, reference, record) < SCALE_BOUND


def test_sizes_of_scale():
    rows = GOLDEN.facts["scale_sizes"]
    assert len(rows) == 164
    for shorter, width, height, new_width, new_height in rows:
        assert scaled_size(width, height, shorter) == (new_width, new_height)


@pytest.mark.parametrize("reference, record", records("scale256", lambda r: r["file"] != CMYK))
def test_scale_of_the_shorter_side(reference, record):
    scaled = torch7_shorter_side(reference.pixels(record["file"]), 256)
    assert difference(scaled * UNIT, reference, record) < SCALE_BOUND


def test_the_right_shorter_side_is_left_alone():
    image = np.random.default_rng(0).random((40, 30, 3), np.float32)
    assert torch7_shorter_side(image, 30) is image
    assert torch7_shorter_side(image, 31).shape == (41, 31, 3)


@pytest.mark.parametrize("source, target", [(2, 5), (7, 3), (5, 5), (100, 31), (31, 100), (3, 1), (1, 4)])
def test_bicubic_weights(source, target):
    """Lines are reproduced, corners kept; the same size is the identity."""
    weights = bicubic_matrix(source, target)
    assert weights.shape == (target, source) and weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    if source > 1 and target > 1:
        line = weights @ np.arange(source, dtype=np.float32)
        np.testing.assert_allclose(line, np.linspace(0, source - 1, target), atol=2e-5)
    if source == target:
        np.testing.assert_allclose(weights, np.eye(source), atol=1e-6)


def test_scaling_is_not_clamped():
    """An edge overshoots, as in the original's float images."""
    image = np.zeros((8, 8, 3), np.float32)
    image[:, 4:] = 255
    scaled = torch7_resize(image, 32, 32)
    assert scaled.max() > 260 and scaled.min() < -5


# ---------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("reference, record", records("val", lambda r: r["file"] != CMYK))
def test_evaluation(reference, record):
    (crop,) = eval_images(reference.file(record["file"]), record["file"], TORCH7, ten=False)
    assert difference(normalized(crop), reference, record) < NORMALIZED_BOUND


@ABSENT
@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
def test_cmyk_differs_from_the_original(decoder):
    """It left out the black ink; here the four are converted properly."""
    record = next(r for r in COMPLETE.facts["val"] if r["file"] == CMYK)
    content = COMPLETE.file(CMYK)
    (crop,) = eval_images(content, CMYK, data_config(more=f"decoder: {decoder}"), ten=False)
    assert difference(normalized(crop), COMPLETE, record) > 0.5
    inks = np.asarray(Image.open(io.BytesIO(content)))
    raw = next(r for r in COMPLETE.facts["images"] if r["file"] == CMYK)
    without_black = 255 - inks[:, :, :3].astype(np.float32)
    assert difference(without_black * UNIT, COMPLETE, raw) < 1e-6, "what it took"
    expected = without_black * (255 - inks[:, :, 3:].astype(np.float32)) / 255
    assert np.abs(decode(content, CMYK, decoder) - expected).max() <= 1


@ABSENT
@pytest.mark.parametrize("number", range(10))
def test_ten_crops_in_order(number):
    record = COMPLETE.facts["tencrop"][0]
    crops = eval_images(COMPLETE.file(record["file"]), record["file"], TORCH7, ten=True)
    assert len(crops) == len(record["crops"]) == 10
    assert difference(normalized(crops[number]), COMPLETE, record["crops"][number]) < NORMALIZED_BOUND


def test_places_of_crops():
    """Margins that are odd round up: lua's math.ceil((w - size) / 2)."""
    for width, height, place in ((341, 256, (59, 16)), (256, 257, (16, 17)), (224, 224, (0, 0))):
        assert crop_places(width, height, 224, ten=False) == [(*place, False)]
    five = [(59, 16), (0, 0), (117, 0), (0, 32), (117, 32)]
    expected = [(*place, mirrored) for mirrored in (False, True) for place in five]
    assert crop_places(341, 256, 224, ten=True) == expected


@PIPELINES
def test_ten_crops_are_parts_of_one_image(pipeline):
    """The center and corners of the scaled image, and the same places of it mirrored."""
    content = encode(drawn("gradient_rgb.png").resize((330, 290)))
    ten = eval_images(content, "a", data_config(pipeline), ten=True)
    (center,) = eval_images(content, "a", data_config(pipeline), ten=False)
    assert np.array_equal(ten[0], center)
    assert all(crop.shape == (224, 224, 3) and crop.dtype == center.dtype for crop in ten)
    width, height = int(330 / 290 * 256), 256
    scaled = np.full((height, width, 3), np.nan, np.float32)
    for (x, y), crop in zip([(0, 0), (width - 224, 0), (0, 32), (width - 224, 32)], ten[1:5], strict=True):
        known = scaled[y : y + 224, x : x + 224]
        assert np.array_equal(known[~np.isnan(known)], crop[~np.isnan(known)]), "overlaps agree"
        known[:] = crop
    for crop, (x, y, flip) in zip(ten, crop_places(width, height, 224, ten=True), strict=True):
        assert np.array_equal(crop, (scaled[:, ::-1] if flip else scaled)[y : y + 224, x : x + 224])


@PIPELINES
def test_too_thin_to_be_scaled(pipeline):
    """60000x1 would become 15 million by 256 pixels."""
    with pytest.raises(UserError, match=r"a/thin\.png: 60000x1 pixels are too thin"):
        eval_images(encode(Image.new("RGB", (60000, 1))), "a/thin.png", data_config(pipeline), ten=False)


# ---------------------------------------------------------------------------- training


def to_uniforms(record):
    """CROP_DRAWS uniforms that give what the original drew, and its box (None: ten misses)."""
    draws = [(d["op"], d["args"], d["value"]) for d in record["draws"]]
    ours, box = np.full(CROP_DRAWS, 0.5), None
    attempts = next(i for i, (op, _, _) in enumerate(draws) if op in ("random", "randperm")) // 3
    for attempt in range(attempts):
        area, aspect, swap = (value for _, _, value in draws[3 * attempt : 3 * attempt + 3])
        ours[3 * attempt : 3 * attempt + 3] = (area - 0.08) / 0.92, (aspect - 3 / 4) / (7 / 12), swap
    if draws[3 * attempts][0] == "random":
        (_, (_, y_range), y), (_, (_, x_range), x) = draws[3 * attempts : 3 * attempts + 2]
        ours[-2:] = (y + 0.5) / (y_range + 1), (x + 0.5) / (x_range + 1)
        box = (x, y, record["width"] - x_range, record["height"] - y_range)
    return ours, box


def to_colors(record):
    """A row of sample_color_params with what the original drew, and whether it mirrored.

    It drew an operation's alpha when that operation's turn came.
    """
    draws = record["draws"]
    start = next(i for i, d in enumerate(draws) if d["op"] == "randperm")
    order = np.array(draws[start]["value"]) - 1
    alphas = np.empty(3)
    alphas[order] = [1 + d["value"] for d in draws[start + 1 : start + 4]]
    row = np.concatenate([order, alphas, draws[start + 4]["value"]])
    return torch.from_numpy(row)[None], draws[start + 5]["value"] < 0.5


@pytest.mark.parametrize("record", GOLDEN.facts["train"], ids=label)
def test_box_of_the_original_draws(record):
    draws, box = to_uniforms(record)
    assert random_sized_box(record["width"], record["height"], draws, 0.08) == box
    assert (box is None) == bool(record.get("fallback"))


TRAIN = records("train", lambda r: r["stages"])


@pytest.mark.parametrize("reference, record", TRAIN)
def test_training_stage_by_stage(reference, record):
    """Random sized crop, colors, lighting, normalization, and mirror, each with the draws of the original."""
    stages = {stage["stage"]: stage for stage in record["stages"]}
    if "width" not in record:
        sizes = {r["file"]: (r["width"], r["height"]) for r in reference.facts["images"]}
        record = {**record, **dict(zip(("width", "height"), sizes[record["file"]], strict=True))}
    draws, _ = to_uniforms(record)
    crop = train_image(reference.file(record["file"]), record["file"], draws, TORCH7, 0.08)
    assert difference(crop * UNIT, reference, stages["random_sized_crop"]) < SCALE_BOUND
    colors, mirrored = to_colors(record)
    unlit = colors.clone()
    unlit[:, 6:] = 0
    nothing, white = torch.zeros(3), torch.full((3,), 255.0)
    batch = torch.from_numpy(np.ascontiguousarray(crop))[None]
    for name, row, mean, std, bound in (
        ("color_jitter", unlit, nothing, white, COLOR_BOUND),
        ("lighting", colors, nothing, white, COLOR_BOUND),
        ("color_normalize", colors, MEAN, STD, NORMALIZED_BOUND),
    ):
        ours = jitter(batch, row, mean, std)[0].permute(1, 2, 0)
        assert difference(ours, reference, stages[name]) < bound, name
    mirror(batch, torch.tensor([0] if mirrored else [], dtype=torch.int64))
    ours = jitter(batch, colors, MEAN, STD)[0].permute(1, 2, 0)
    assert difference(ours, reference, stages["horizontal_flip"]) < NORMALIZED_BOUND


# ---------------------------------------------------------------------------- boxes


def boxes(width, height, rows):
    return [random_sized_box(width, height, row, 0.08) for row in rows]


@pytest.mark.parametrize(
    "width, height", [(500, 375), (375, 500), (64, 64), (1000, 40), (1, 1), (1, 1000), (1000, 1), (2, 3)]
)
def test_boxes_lie_inside(width, height):
    for left, top, w, h in filter(None, boxes(width, height, draws(500))):
        assert left >= 0 and top >= 0 and w >= 1 and h >= 1
        assert left + w <= width and top + h <= height
        assert all(type(value) is int for value in (left, top, w, h))


def test_boxes_have_the_area_and_shape_asked_for():
    left, top, w, h = np.array([box for box in boxes(1000, 1000, draws(2000)) if box]).T
    areas, shapes = w * h / 1e6, w / h
    assert 0.08 - 0.001 < areas.min() < 0.09 and 0.95 < areas.max() <= 1
    assert 0.75 - 0.005 < shapes.min() < 0.76 and 1.32 < shapes.max() < 4 / 3 + 0.005
    assert 0.45 < np.mean(shapes > 1) < 0.55
    for offset, room in ((left, 1000 - w), (top, 1000 - h)):
        share = (offset + 0.5) / (room + 1)
        assert abs(share.mean() - 0.5) < 5 * (1 / 12 / len(share)) ** 0.5
        assert share.min() < 0.02 and share.max() > 0.98


def test_area_is_uniform():
    """If every box fits, the area is as it was drawn: Kolmogorov's distance at 1 in 10,000."""
    rows = draws(4000)
    first = [w * h / 1e6 for _, _, w, h in boxes(1000, 1000, rows[rows[:, 0] < 0.6])]
    share = np.sort((np.array(first) - 0.08) / (0.92 * 0.6))
    steps = np.arange(1, len(share) + 1) / len(share)
    assert np.abs(share - steps).max() < 2.23 / len(share) ** 0.5


def test_half_of_the_boxes_are_swapped():
    """The aspect is uniform in 3/4...4/3, so its mean is above 1; exchanged sides make it fair."""
    rows = draws(2000, seed=2)
    rows[:, 1] = 1.0 - 1e-9
    shapes = np.array([w / h for _, _, w, h in boxes(999, 999, rows[rows[:, 0] < 0.6])])
    assert set(np.round(shapes > 1).astype(int)) == {0, 1}
    assert abs(np.mean(shapes > 1) - 0.5) < 5 * 0.5 / len(shapes) ** 0.5


def test_ten_misses():
    row = np.zeros(CROP_DRAWS)
    row[0:30:3], row[1:30:3] = 0.99, 0.5
    assert random_sized_box(1000, 100, row, 0.08) is None
    row[27] = 0.0  # the tenth attempt fits
    assert random_sized_box(1000, 200, row, 0.08) is not None


@PIPELINES
@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (3, 2)])
def test_tiny_images(pipeline, size):
    assert set(boxes(1, 1, draws(50))) == {(0, 0, 1, 1)}
    assert all(box[2] == 1 for box in boxes(1, 1000, draws(300)) if box)
    content = encode(Image.new("RGB", size, (10, 20, 30)))
    for seed in range(4):
        crop = train_image(content, "a", draws(1, seed)[0], data_config(pipeline, "image_size: 16"), 0.08)
        assert crop.shape == (16, 16, 3)
        np.testing.assert_allclose(crop, np.broadcast_to([10, 20, 30], (16, 16, 3)), atol=1e-4)


# ---------------------------------------------------------------------------- fast


def noise(height, width):
    """An image with detail of all sizes."""
    generator = np.random.default_rng(0)
    image = np.zeros((height, width, 3))
    for size in (4, 16, 64, 256):
        small = generator.integers(0, 256, (size, size, 3), np.uint8)
        image += np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return (image / 4).astype(np.uint8)


def torchvision_resize(image, size, interpolation="bicubic"):
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    mode = v2.InterpolationMode(interpolation)
    return v2.functional.resize(pixels, size, interpolation=mode, antialias=True).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("width, height", [(64, 64), (300, 200), (31, 97), (150, 200), (1, 1)])
def test_fast_resize_is_torchvisions(interpolation, width, height):
    image = noise(150, 200)
    ours = resize(image, width, height, interpolation)
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, torchvision_resize(image, [height, width], interpolation))
    part = image[10:110, 20:120]
    whole = resize(part.copy(), width, height, interpolation)
    assert np.array_equal(resize(part, width, height, interpolation), whole), "a view is as good as a copy"


@pytest.mark.parametrize("width, height", [(400, 300), (300, 400), (256, 256), (512, 1024), (256, 320)])
def test_fast_evaluation_is_torchvisions(width, height):
    """Resize(256), CenterCrop(224), which rounds odd margins in another way."""
    image = noise(height, width)
    (ours,) = eval_images(encode(image), "a", FAST, ten=False)
    scaled = torchvision_resize(image, [256])
    top, left = (math.ceil((side - 224) / 2) for side in scaled.shape[:2])
    assert np.array_equal(ours, scaled[top : top + 224, left : left + 224])
    if not any((side - 224) % 2 for side in scaled.shape[:2]):
        theirs = v2.functional.center_crop(torch.from_numpy(scaled).permute(2, 0, 1), [224])
        assert np.array_equal(ours, theirs.permute(1, 2, 0).numpy())


def both_pipelines(content):
    return (eval_images(content, "a", c, ten=False)[0].astype(np.float32) for c in (FAST, TORCH7))


def test_fast_and_torch7_differ_only_by_the_filter():
    """Enlarged, they agree but for the mapping of corners; reduced, antialiasing shows."""
    fast, torch7 = both_pipelines(encode(noise(600, 800)))
    assert 1 < np.abs(fast - torch7).mean() < 4
    assert abs(fast.mean() - torch7.mean()) < 0.2


@ABSENT
def test_fast_and_torch7_on_photographs():
    differences = []
    for record in COMPLETE.facts["val"]:
        if record["file"].endswith(".JPEG") and record["file"].startswith("n0"):
            fast, torch7 = both_pipelines(COMPLETE.file(record["file"]))
            differences.append(np.abs(fast - torch7).mean())
    assert len(differences) == 6
    assert min(differences) > 0.3 and max(differences) < 3, "levels of 255; 2.8 if enlarged twice"


@PIPELINES
def test_training_crop_shows_its_box(pipeline):
    """An image whose colors are its coordinates shows which part was cut out, and how it was scaled."""
    width, height = 640, 480
    y, x = np.mgrid[:height, :width]
    content = encode(planes(x * 255 / width, y * 255 / height, 0 * x))
    for row in draws(20, seed=3):
        left, top, w, h = random_sized_box(width, height, row, 0.08)
        crop = train_image(content, "a", row, data_config(pipeline), 0.08).astype(float)
        corners = crop[[0, 0, -1, -1], [0, -1, 0, -1], :2]
        expected = [(a * 255 / width, b * 255 / height) for b in (top, top + h) for a in (left, left + w)]
        assert np.abs(corners - expected).max() < 4


def test_training_of_fast_reads_reduced_jpegs():
    """A crop of a JPEG that its decoder reduced stays within a few levels of one decoded at full size."""
    content = encode(noise(1200, 1600), "JPEG", quality=95)
    decoded = np.asarray(Image.open(io.BytesIO(content)))
    for row in draws(10, seed=4):
        left, top, w, h = random_sized_box(1600, 1200, row, 0.08)
        crop = train_image(content, "a", row, data_config("fast", "image_size: 64"), 0.08)
        whole = resize(decoded[top : top + h, left : left + w], 64, 64, "bicubic")
        assert np.abs(crop.astype(int) - whole).mean() < 5
