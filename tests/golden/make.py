"""Create the files of this folder: a trimmed copy of the reference data of the original Lua code.

    python tests/golden/make.py FOLDER [OUTPUT]

FOLDER holds the complete reference data. What a formula gives (parameters, inputs, running statistics
before the first step, places of the samples) is checked and left out. Of the ImageNet network, running
statistics are kept as summaries. Of its transforms, the random draws are kept, and the results for images
that a formula draws (photographs are not copied). Of the .t7 files, the small ones and two networks are kept.
"""

import base64
import io
import json
import lzma
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "helpers"))

from oracle import h, sample_places  # noqa: E402

FULL = 1024  # gradients of at most this many elements are stored whole
SUMMARY = ("norm", "sum", "proj")
T7_MODELS = ("models/c11_B_2x8d/model.t7.xz", "models/c11_C_2x8d/model_cuda.t7.xz")
T7_MODELS += ("basic/res_c14_scA/model.t7.xz", "basic/pre_c20_cifar100_scB/model.t7.xz")
DRAWN = ("gradient_rgb.png", "small_rgba.png", "small_gray.png", "palette_png_named.JPEG")


def arrays(path):
    return np.load(io.BytesIO(lzma.open(path).read()))


def read_json(path):
    return json.loads(path.read_text())


def samples(values, prefix, sizes):
    """Return the stored samples of each tensor, without the unused places."""
    parts = []
    for row, size in enumerate(sizes):
        places = sample_places(size)
        index = values[f"{prefix}_idx"][row]
        assert np.array_equal(index[: len(places)], places) and (index[len(places) :] == -1).all()
        parts.append(values[f"{prefix}_val"][row, : len(places)])
    return parts


def batch_norm_parts(values, meta, name):
    return [values[name][n["offset"] : n["offset"] + n["numel"]] for n in meta["bn"]]


def check_running_statistics(values, meta):
    for name, scale, base, shift in (("bn_mean_before", 0.1, 0, 13), ("bn_var_before", 0.5, 1, 29)):
        for number, part in enumerate(batch_norm_parts(values, meta, name)):
            filled = base + scale * h(np.arange(part.size) + 977 * number + shift)
            assert np.array_equal(part, filled.astype(np.float32))


def network(folder):
    """Return (facts, arrays) of a network."""
    meta = read_json(folder / "meta.json")
    values = arrays(folder / "data.npz.xz")
    check_running_statistics(values, meta)
    sizes = [p["numel"] for p in meta["params"]]
    kept = {key: values[key] for key in ("logits_train", "logits_eval")}
    kept |= {f"grad_{key}": values[f"grad_{key}"] for key in SUMMARY}
    parts = samples(values, "grad", sizes)
    if "grad_small" in values:
        pairs = list(zip(parts, sizes, strict=True))
        sampled = [part for part, size in pairs if size <= FULL]
        whole = np.split(values["grad_small"], np.cumsum([size for size in sizes if size <= FULL])[:-1])
        assert all(np.array_equal(w[sample_places(w.size)], s) for w, s in zip(whole, sampled, strict=True))
        kept |= {key: values[key] for key in ("grad_small", "bn_mean_after", "bn_var_after")}
        parts = [part for part, size in pairs if size > FULL]
    else:
        parts = [p[::4] for p in parts]
        for key in ("bn_mean_after", "bn_var_after"):
            modules = batch_norm_parts(values, meta, key)
            kept[f"{key}_norm"] = np.array([np.linalg.norm(m) for m in modules])
            kept[f"{key}_proj"] = np.array([m @ h(np.arange(m.size)) for m in modules])
            kept[f"{key}_val"] = np.concatenate([m[:4] for m in modules])
    kept["grad_val"] = np.concatenate(parts)
    facts = {key: meta[key] for key in ("options", "input", "labels_1based", "loss_train", "n_classes")}
    if folder.parent.name == "basic":  # fb.resnet.torch, which has other options
        facts["options"] |= {"bottleneckType": "basic", "preactivation": "preresnet" in meta["source"]}
    return facts | {"parameter_shapes": [p["shape"] for p in meta["params"]]}, kept


def trajectory(folder):
    meta = read_json(folder / "meta.json")
    values = arrays(folder / "data.npz.xz")
    sizes = [p["numel"] for p in meta["params"]]
    kept = {key: values[key] for key in values.files if not key.startswith("final")}
    for group in ("final_params", "final_dfdx"):
        kept |= {f"{group}_{key}": values[f"{group}_{key}"] for key in SUMMARY}
        kept[f"{group}_val"] = np.concatenate(samples(values, group, sizes))
    keys = ("options", "batch_shape", "train_batches", "eval_batch", "epochs")
    return {key: meta[key] for key in keys}, kept


def cifar_transforms(folder):
    meta = read_json(folder / "meta.json")
    kept = {}
    for name in meta["cifar"]:
        values = arrays(folder / f"{name}.npz.xz")
        kept |= {f"{name}_{key}": values[key] for key in ("train", "val")}
    return meta["cifar"], kept


def imagenet_transforms(folder):
    """Return sizes and draws of the ImageNet transforms, and the results for images that a formula draws."""
    meta = read_json(folder / "meta.json")
    facts = {"scale_sizes": meta["scale_sizes"]}
    facts["train"] = [{**record, "stages": []} for record in meta["train"]]
    kept = {}
    groups = {"images": "raw", "scale256": "scale256", "scale": "scale", "val": "val"}
    for group, file in groups.items():
        values = arrays(folder / f"{file}.npz.xz")
        facts[group] = [record for record in meta[group] if record["file"] in DRAWN]
        kept |= {record["key"]: values[record["key"]] for record in facts[group]}
    values = arrays(folder / "train.npz.xz")
    sizes = {image["file"]: (image["width"], image["height"]) for image in meta["images"]}
    for record, original in zip(facts["train"], meta["train"], strict=True):
        record["width"], record["height"] = sizes[record["file"]]
        if record["file"] in DRAWN:
            record["stages"] = original["stages"]
            kept |= {stage["key"]: values[stage["key"]] for stage in original["stages"]}
    return facts, kept


def t7_values(folder):
    """Return the small .t7 files, in base64, and what they hold."""
    meta = read_json(folder / "meta.json")
    files = {name: base64.b64encode((folder / name).read_bytes()).decode() for name in meta["files"]}
    return {"files": files, "expected": meta["expected"]}


def main(source, output):
    def write_json(name, value):
        (output / name).write_text(json.dumps(value, separators=(",", ":")) + "\n")

    facts = {"models": {}}
    for folder in sorted(p.parent for p in source.glob("*/*/model.t7.xz")):
        facts["models"][folder.name], kept = network(folder)
        np.savez_compressed(output / f"{folder.name}.npz", **kept)
    facts["trajectory"], kept = trajectory(source / "trajectory")
    np.savez_compressed(output / "trajectory.npz", **kept)
    facts["cifar"], kept = cifar_transforms(source / "transforms")
    np.savez_compressed(output / "cifar_transforms.npz", **kept)
    imagenet, kept = imagenet_transforms(source / "transforms")
    np.savez_compressed(output / "imagenet_transforms.npz", **kept)
    write_json("imagenet_transforms.json", imagenet)
    write_json("oracle.json", facts)
    write_json("t7_values.json", t7_values(source / "t7_values"))
    for name in ("learning_rate.json", "compute_score.json"):
        write_json(name, read_json(source / name))
    for name in T7_MODELS:
        target = output / "-".join(name.split("/")[1:])
        target.write_bytes((source / name).read_bytes())


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else HERE)
