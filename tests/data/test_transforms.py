"""Geometry and resampling, stage by stage against numbers of the original Lua code, and torchvision.

The reference pictures that a formula draws are tested from golden/; the photographs where the complete
reference data is. Differences are in the original's units: pixels in 0...1, or normalised.
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

from data.augment import jitter, mirror, normalize, sample_color_params
from data.decode import decode
from data.rng import RngStream, random_uniform
from data.transforms import (
    CROP_DRAWS,
    bicubic_matrix,
    crop_places,
    eval_images,
    random_sized_box,
    resize,
    scaled_size,
    torch7_resize,
    torch7_shorter_side,
    train_image,
)
from resnext.config import AugmentConfig, parse_config
from resnext.errors import UserError

UNIT = np.float32(1 / 255)  # the original's pixels are uint8 times this
MEAN, STD = (torch.tensor(values) for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
# Reached: 3.6e-7 after scaling, 4.8e-7 after colours, 1.9e-6 once divided by 0.22 (float32 has 1.2e-7).
SCALE_BOUND, COLOUR_BOUND, NORMALISED_BOUND = 1e-6, 1.5e-6, 4e-6


def data_config(pipeline="torch7", more=""):
    return parse_config(f"data: {{pipeline: {pipeline}, {more}}}", "test").data


TORCH7 = data_config()
FAST = data_config("fast")


# ---------------------------------------------------------------------------- the reference data


def drawn(name):
    """A reference picture by its formula."""
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


def planes(*values):
    return np.stack([np.asarray(v) % 256 for v in values], axis=-1).astype(np.uint8)


class Reference:
    """Records of the original's transforms and, by key, what came out."""

    def __init__(self, facts):
        self.facts = facts

    def file(self, name):
        """The bytes of a picture file."""
        content = io.BytesIO()
        drawn(name).save(content, "PNG")
        return content.getvalue()

    def stored(self, key):
        return golden("imagenet_transforms.npz")[key]

    def picture(self, name):
        """float32 (H, W, 3) in 0...255"""
        pixels = np.asarray(Image.open(io.BytesIO(self.file(name))).convert("RGBA"))
        return pixels[:, :, :3].astype(np.float32)

    def __repr__(self):
        return "golden"


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

    def __repr__(self):
        return "complete"


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
    """Largest difference of (H, W, 3) to a record: its samples, and means over the whole picture."""
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


def test_the_drawn_pictures_are_the_originals():
    for record in GOLDEN.facts["images"]:
        assert difference(GOLDEN.picture(record["file"]) * UNIT, GOLDEN, record) < 1e-7


@ABSENT
def test_the_drawn_files_are_the_originals():
    for record in GOLDEN.facts["images"]:
        theirs = Image.open(io.BytesIO(COMPLETE.file(record["file"])))
        ours = drawn(record["file"])
        assert (ours.mode, ours.size) == (theirs.mode, theirs.size)
        assert np.array_equal(GOLDEN.picture(record["file"]), COMPLETE.picture(record["file"]))


# ---------------------------------------------------------------------------- scaling


@pytest.mark.parametrize("reference, record", records("scale"))
def test_scale(reference, record):
    """image.scale takes fractions, and truncates."""
    size = int(record["arg_width"]), int(record["arg_height"])
    scaled = torch7_resize(reference.picture(record["file"]), *size)
    assert difference(scaled * UNIT, reference, record) < SCALE_BOUND


def test_sizes_of_scale():
    rows = GOLDEN.facts["scale_sizes"]
    assert len(rows) == 164
    for shorter, width, height, new_width, new_height in rows:
        assert scaled_size(width, height, shorter) == (new_width, new_height)


@pytest.mark.parametrize("reference, record", records("scale256", lambda r: r["file"] != CMYK))
def test_scale_of_the_shorter_side(reference, record):
    scaled = torch7_shorter_side(reference.picture(record["file"]), 256)
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
    """An edge overshoots, as in the original's float pictures."""
    image = np.zeros((8, 8, 3), np.float32)
    image[:, 4:] = 255
    scaled = torch7_resize(image, 32, 32)
    assert scaled.max() > 260 and scaled.min() < -5


# ---------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("reference, record", records("val", lambda r: r["file"] != CMYK))
def test_evaluation(reference, record):
    (crop,) = eval_images(reference.file(record["file"]), record["file"], TORCH7, ten=False)
    assert difference(normalized(crop), reference, record) < NORMALISED_BOUND


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
    assert difference(normalized(crops[number]), COMPLETE, record["crops"][number]) < NORMALISED_BOUND


def test_places_of_crops():
    """Rounded up where they do not fit evenly: lua's math.ceil((w - size) / 2)."""
    assert crop_places(341, 256, 224, ten=False) == [(59, 16, False)]
    assert crop_places(256, 257, 224, ten=False) == [(16, 17, False)]
    assert crop_places(224, 224, 224, ten=False) == [(0, 0, False)]
    five = [(59, 16), (0, 0), (117, 0), (0, 32), (117, 32)]
    expected = [(*place, False) for place in five] + [(*place, True) for place in five]
    assert crop_places(341, 256, 224, ten=True) == expected


@pytest.mark.parametrize("pipeline", ["fast", "torch7"])
def test_ten_crops_are_parts_of_one_picture(pipeline):
    """Centre and corners of the scaled picture, and the same places of it mirrored."""
    content = io.BytesIO()
    drawn("gradient_rgb.png").resize((330, 290)).save(content, "PNG")
    config = data_config(pipeline)
    ten = eval_images(content.getvalue(), "a", config, ten=True)
    (centre,) = eval_images(content.getvalue(), "a", config, ten=False)
    assert np.array_equal(ten[0], centre)
    assert all(crop.shape == (224, 224, 3) and crop.dtype == centre.dtype for crop in ten)
    width, height = int(330 / 290 * 256), 256
    scaled = np.full((height, width, 3), np.nan, np.float32)
    for (x, y), crop in zip([(0, 0), (width - 224, 0), (0, 32), (width - 224, 32)], ten[1:5], strict=True):
        known = scaled[y : y + 224, x : x + 224]
        assert np.array_equal(known[~np.isnan(known)], crop[~np.isnan(known)]), "overlaps agree"
        known[:] = crop
    mirrored = scaled[:, ::-1]
    for crop, (x, y, flip) in zip(ten, crop_places(width, height, 224, ten=True), strict=True):
        assert np.array_equal(crop, (mirrored if flip else scaled)[y : y + 224, x : x + 224])


@pytest.mark.parametrize("pipeline", ["fast", "torch7"])
def test_too_thin_to_be_scaled(pipeline):
    """60000x1 would become 15 million by 256 pixels."""
    content = io.BytesIO()
    Image.new("RGB", (60000, 1)).save(content, "PNG")
    with pytest.raises(UserError, match=r"a/thin\.png: 60000x1 pixels are too thin .*; replace or remove"):
        eval_images(content.getvalue(), "a/thin.png", data_config(pipeline), ten=False)


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


def to_colours(record):
    """A row of colour_draws with what the original drew, and whether it mirrored.

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
    """Random sized crop, colours, lighting, normalisation, mirror, each with the draws of the original."""
    stages = {stage["stage"]: stage for stage in record["stages"]}
    if "width" not in record:
        sizes = {r["file"]: (r["width"], r["height"]) for r in reference.facts["images"]}
        record = {**record, **dict(zip(("width", "height"), sizes[record["file"]], strict=True))}
    draws, _ = to_uniforms(record)
    crop = train_image(reference.file(record["file"]), record["file"], draws, TORCH7, 0.08)
    assert difference(crop * UNIT, reference, stages["random_sized_crop"]) < SCALE_BOUND
    colors, mirrored = to_colours(record)
    unlit = colors.clone()
    unlit[:, 6:] = 0
    nothing, white = torch.zeros(3), torch.full((3,), 255.0)
    batch = torch.from_numpy(np.ascontiguousarray(crop))[None]
    for name, row, mean, std, bound in (
        ("color_jitter", unlit, nothing, white, COLOUR_BOUND),
        ("lighting", colors, nothing, white, COLOUR_BOUND),
        ("color_normalize", colors, MEAN, STD, NORMALISED_BOUND),
    ):
        ours = jitter(batch, row, mean, std)[0].permute(1, 2, 0)
        assert difference(ours, reference, stages[name]) < bound, name
    mirror(batch, torch.tensor([0] if mirrored else [], dtype=torch.int64))
    ours = jitter(batch, colors, MEAN, STD)[0].permute(1, 2, 0)
    assert difference(ours, reference, stages["horizontal_flip"]) < NORMALISED_BOUND


# ---------------------------------------------------------------------------- boxes

SIZES = [(500, 375), (375, 500), (64, 64), (1000, 40), (1, 1), (1, 1000), (1000, 1), (2, 3)]


def boxes(width, height, count=2000, min_area=0.08):
    draws = random_uniform(1, 1, np.arange(count), CROP_DRAWS, RngStream.CROP)
    return [random_sized_box(width, height, row, min_area) for row in draws]


@pytest.mark.parametrize("width, height", SIZES)
def test_boxes_lie_inside(width, height):
    for box in boxes(width, height, 500):
        if box is not None:
            left, top, w, h = box
            assert left >= 0 and top >= 0 and w >= 1 and h >= 1
            assert left + w <= width and top + h <= height
            assert all(type(value) is int for value in box)


def test_boxes_have_the_area_and_shape_asked_for():
    found = [box for box in boxes(1000, 1000) if box is not None]
    areas = np.array([w * h for _, _, w, h in found]) / 1e6
    shapes = np.array([w / h for _, _, w, h in found])
    assert 0.08 - 0.001 < areas.min() < 0.09 and 0.95 < areas.max() <= 1
    assert 0.75 - 0.005 < shapes.min() < 0.76 and 1.32 < shapes.max() < 4 / 3 + 0.005
    assert 0.45 < np.mean(shapes > 1) < 0.55
    left, top, w, h = np.array(found).T
    for offset, room in ((left, 1000 - w), (top, 1000 - h)):
        share = (offset + 0.5) / (room + 1)
        assert abs(share.mean() - 0.5) < 5 * (1 / 12 / len(share)) ** 0.5
        assert share.min() < 0.02 and share.max() > 0.98


def test_area_is_uniform():
    """Where every box fits, the area is as it was drawn: Kolmogorov's distance at 1 in 10,000."""
    found = boxes(1000, 1000, 4000, 0.08)
    draws = random_uniform(1, 1, np.arange(4000), CROP_DRAWS, RngStream.CROP)
    first = [w * h / 1e6 for (_, _, w, h), row in zip(found, draws, strict=True) if row[0] < 0.6]
    share = np.sort((np.array(first) - 0.08) / (0.92 * 0.6))
    steps = np.arange(1, len(share) + 1) / len(share)
    assert np.abs(share - steps).max() < 2.23 / len(share) ** 0.5


def test_half_of_the_boxes_are_swapped():
    """The aspect is uniform in 3/4...4/3, so its mean is above 1; exchanged sides make it fair."""
    draws = random_uniform(2, 1, np.arange(2000), CROP_DRAWS, RngStream.CROP)
    draws[:, 1] = 1.0 - 1e-9
    shapes = np.array(
        [w / h for _, _, w, h in (random_sized_box(999, 999, d, 0.08) for d in draws if d[0] < 0.6)]
    )
    assert set(np.round(shapes > 1).astype(int)) == {0, 1}
    assert abs(np.mean(shapes > 1) - 0.5) < 5 * 0.5 / len(shapes) ** 0.5


def test_ten_misses():
    draws = np.zeros(CROP_DRAWS)
    draws[0:30:3] = 0.99
    draws[1:30:3] = 0.5
    assert random_sized_box(1000, 100, draws, 0.08) is None
    draws[27] = 0.0  # the tenth attempt fits
    assert random_sized_box(1000, 200, draws, 0.08) is not None


def test_tiny_pictures():
    assert set(boxes(1, 1, 50)) == {(0, 0, 1, 1)}
    thin = [box for box in boxes(1, 1000, 300) if box is not None]
    assert all(w == 1 for _, _, w, _ in thin)
    for pipeline in ("fast", "torch7"):
        for size in ((1, 1), (1, 1000), (1000, 1), (3, 2)):
            content = io.BytesIO()
            Image.new("RGB", size, (10, 20, 30)).save(content, "PNG")
            for seed in range(4):
                draws = random_uniform(seed, 1, np.arange(1), CROP_DRAWS, RngStream.CROP)[0]
                config = data_config(pipeline, "image_size: 16")
                crop = train_image(content.getvalue(), "a", draws, config, 0.08)
                assert crop.shape == (16, 16, 3)
                np.testing.assert_allclose(crop, np.broadcast_to([10, 20, 30], (16, 16, 3)), atol=1e-4)


# ---------------------------------------------------------------------------- fast


def noise(height, width, seed=0):
    """A picture with detail of all sizes."""
    generator = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for size in (4, 16, 64, 256):
        small = generator.integers(0, 256, (size, size, 3), np.uint8)
        picture += np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return (picture / 4).astype(np.uint8)


def to_planes(image):
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 64), (300, 200), (31, 97), (150, 200), (1, 1)])
def test_fast_resize_is_torchvisions(interpolation, size):
    width, height = size
    image = noise(150, 200)
    ours = resize(image, width, height, interpolation)
    mode = v2.InterpolationMode(interpolation)
    theirs = v2.functional.resize(to_planes(image), [height, width], interpolation=mode, antialias=True)
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, theirs.permute(1, 2, 0).numpy())
    part = resize(image[10:110, 20:120], width, height, interpolation)
    whole = resize(image[10:110, 20:120].copy(), width, height, interpolation)
    assert np.array_equal(part, whole), "a part of a picture is as good as a copy of it"


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (256, 256), (512, 1024), (256, 320)])
def test_fast_evaluation_is_torchvisions(size):
    """Resize(256), CenterCrop(224), where the rounding of odd margins does not part them."""
    image = noise(size[1], size[0])
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    (ours,) = eval_images(content.getvalue(), "a", FAST, ten=False)
    bicubic = v2.InterpolationMode.BICUBIC
    scaled = v2.functional.resize(to_planes(image), [256], interpolation=bicubic, antialias=True)
    if any((side - 224) % 2 for side in scaled.shape[1:]):
        top, left = (math.ceil((side - 224) / 2) for side in scaled.shape[1:])
        theirs = scaled[:, top : top + 224, left : left + 224]
    else:
        theirs = v2.functional.center_crop(scaled, [224])
    assert np.array_equal(ours, theirs.permute(1, 2, 0).numpy())


def test_fast_and_torch7_are_apart_by_the_filter_alone():
    """Enlarged they are the same but for the mapping of corners; reduced, antialiasing shows."""
    content = io.BytesIO()
    Image.fromarray(noise(600, 800)).save(content, "PNG")
    fast, torch7 = (
        eval_images(content.getvalue(), "a", config, ten=False)[0].astype(np.float32)
        for config in (FAST, TORCH7)
    )
    apart = np.abs(fast - torch7)
    assert 1 < apart.mean() < 4
    assert abs(fast.mean() - torch7.mean()) < 0.2


@ABSENT
def test_fast_and_torch7_on_photographs():
    apart = {}
    for record in COMPLETE.facts["val"]:
        name = record["file"]
        if name.endswith(".JPEG") and name.startswith("n0"):
            crops = [eval_images(COMPLETE.file(name), name, c, ten=False)[0] for c in (FAST, TORCH7)]
            apart[name] = np.abs(crops[0].astype(np.float32) - crops[1]).mean()
    assert len(apart) == 6
    assert min(apart.values()) > 0.3 and max(apart.values()) < 3, "levels of 255; 2.8 where enlarged twice"


@pytest.mark.parametrize("pipeline", ["fast", "torch7"])
def test_training_crop_shows_its_box(pipeline):
    """A picture whose colours are its coordinates says which part was cut out, and how it was scaled."""
    width, height = 640, 480
    y, x = np.mgrid[:height, :width]
    image = planes(x * 255 / width, y * 255 / height, 0 * x)
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    draws = random_uniform(3, 1, np.arange(20), CROP_DRAWS, RngStream.CROP)
    for row in draws:
        left, top, w, h = random_sized_box(width, height, row, 0.08)
        crop = train_image(content.getvalue(), "a", row, data_config(pipeline), 0.08).astype(float)
        corners = crop[[0, 0, -1, -1], [0, -1, 0, -1], :2]
        expected = [(a * 255 / width, b * 255 / height) for b in (top, top + h) for a in (left, left + w)]
        assert np.abs(corners - expected).max() < 4


def test_training_of_fast_reads_reduced_jpegs():
    """Reduced by the decoder before it is resized, a crop stays within a few levels of the whole way."""
    image = noise(1200, 1600)
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", quality=95)
    config = data_config("fast", "image_size: 64")
    for row in random_uniform(4, 1, np.arange(10), CROP_DRAWS, RngStream.CROP):
        left, top, w, h = random_sized_box(1600, 1200, row, 0.08)
        crop = train_image(content.getvalue(), "a", row, config, 0.08)
        decoded = np.asarray(Image.open(io.BytesIO(content.getvalue())))[top : top + h, left : left + w]
        whole = resize(decoded, 64, 64, "bicubic")
        assert np.abs(crop.astype(int) - whole).mean() < 5


def test_colour_draws_fill_the_rows_that_the_original_is_compared_with():
    rows = sample_color_params(0, 1, np.arange(100), AugmentConfig(jitter=0.4, lighting=0.1))
    assert rows.shape == (100, 9)
    assert np.array_equal(np.sort(rows[:, :3], axis=1), np.tile(np.arange(3.0), (100, 1)))
    assert rows[:, 3:6].min() >= 0.6 and rows[:, 3:6].max() <= 1.4
