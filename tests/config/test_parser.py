"""Bad configurations and overrides: one message with the file or key and the fix, and nothing is written."""

import pytest
from commands import expect, refused, tiny_yaml

import train
from resnext.config import SECTIONS

# fmt: off
BAD_YAML = [  # content, fragments of the message
    # unknown, misspelled, and misplaced keys
    ("model: {depht: 29}", "unknown key model.depht", "did you mean model.depth?"),
    ("run: {epoch: 3}", "run.epoch", "did you mean train.epochs?"),
    ("augment: {zebra: 1}", "unknown key augment.zebra", "keys of augment: mirror, padding"),
    ("train: {lr: 0.1}", "unknown key train.lr", "use optimizer.lr"),
    ("zebra: {a: 1}", "unknown section 'zebra'", "sections are model, data, augment, train"),
    ("modle: {depth: 50}", "unknown section 'modle'", "did you mean section model?"),
    ("epochs: 3", "unknown section 'epochs'", "use train.epochs"),
    ("train:\n  epochs: 3\n  epoch: 3", "line 3", "did you mean train.epochs?"),
    ("train: {[1, 2]: 3}", "line 1", "a key must be a plain word, not a list"),
    ("? {a: b}\n: 3", "line 1", "a key must be a plain word, not a mapping"),
    # duplicate keys
    ("train:\n  epochs: 3\n  epochs: 4", "line 3", "duplicate key train.epochs (first on line 2)"),
    ("train: {epochs: 3, epochs: 3}", "duplicate key train.epochs"),
    ("train: {}\nmodel: {}\ntrain: {}", "line 3", "duplicate key train (first on line 1)"),
    ('train: {epochs: 3, "epochs": 4}', "duplicate key train.epochs"),
    # sections
    ("model: 3", "model is a section", "not '3'"),
    ("model: [1, 2]", "model is a section", "not a list"),
    ("- model\n- data", "must hold sections such as 'model:'", "not a list"),
    ("resnext50", "must hold sections such as 'model:'", "not 'resnext50'"),
    # types
    ("train: {epochs: many}", "train.epochs must be an integer", "not 'many'"),
    ("train: {epochs: 010}", "train.epochs must be an integer", "not '010'"),
    ("train: {epochs: 1.5}", "train.epochs must be an integer", "not '1.5'"),
    ("train: {epochs: 1e3}", "train.epochs must be an integer", "not '1e3'"),
    ("train: {epochs: [1]}", "train.epochs must be an integer", "not a list"),
    ("train: {epochs: {a: 1}}", "train.epochs must be an integer", "not a mapping"),
    ("train: {epochs: true}", "train.epochs must be an integer", "not 'true'"),
    ("train: {epochs: '3'}", "train.epochs must be an integer", "in quotes"),
    ("train: {epochs: }", "train.epochs must be an integer"),
    ("train: {epochs: null}", "train.epochs must be an integer"),
    ("train: {epochs: 1" + "0" * 5000 + "}", "train.epochs must be an integer"),
    ("train: {epochs: ٣}", "train.epochs must be an integer"),
    ("model: {stages: 3}", "model.stages must be a list such as [1, 2, 3]", "not '3'"),
    ("model: {stages: []}", "model.stages must be a list", "not an empty list"),
    ("data: {mean: [1, [2], 3]}", "data.mean must be a number", "not a list"),
    ("model: {stages: [1, x, 1]}", "model.stages must be an integer", "not 'x'"),
    ("train: {compile: 1}", "train.compile must be true or false", "not '1'"),
    ("optimizer: {lr: high}", "optimizer.lr must be a number such as 0.1", "not 'high'"),
    ("optimizer: {lr: '0.1'}", "optimizer.lr must be a number", "in quotes"),
    ("optimizer: {lr: 1/10}", "optimizer.lr must be a number", "not '1/10'"),
    ("data: {download: 'true'}", "data.download must be true or false", "in quotes"),
    ("data: {dir: [a]}", "data.dir must be a string", "not a list"),
    ("train: {precision: fp8}", "train.precision must be one of auto, fp32, tf32, bf16, fp16", "not 'fp8'"),
    ("train: {precision: BF16}", "train.precision", "did you mean bf16?"),
    ("augment: {policy: randaug}", "augment.policy", "did you mean randaugment?"),
    ("data: {pipeline: slow}", "data.pipeline must be one of memory, fast, torch7", "not 'slow'"),
    ("data: {decoder: turbojpeg}", "data.decoder must be one of simplejpeg, pillow"),
    ("data: {interpolation: nearest}", "data.interpolation must be one of bilinear, bicubic"),
    # words and numbers that YAML would interpret
    ("run: {deterministic: no}", "run.deterministic must be true or false", "not 'no'"),
    ("train: {compile: yes}", "train.compile must be true or false", "not 'yes'"),
    ("train: {epochs: 0x10}", "train.epochs must be an integer in plain digits", "not '0x10'"),
    ("train: {epochs: 1_000}", "train.epochs must be an integer in plain digits", "not '1_000'"),
    ("train: {epochs: 12:30}", "train.epochs must be an integer in plain digits", "not '12:30'"),
    ("optimizer: {lr: nan}", "optimizer.lr must be a number", "not 'nan'"),
    ("optimizer: {lr: .nan}", "optimizer.lr must be a number", "not '.nan'"),
    ("optimizer: {lr: .inf}", "optimizer.lr must be a number", "not '.inf'"),
    ("optimizer: {lr: 1e999}", "optimizer.lr must be a finite number"),
    ("data: {mean: [1, 1e999, 1]}", "data.mean must be a finite number"),
    ("data: {std: [1, nan, 1]}", "data.std must be a number", "not 'nan'"),
    # other features of YAML
    ("train:\n\tepochs: 3", "line 2: not valid YAML", r"'\t'"),
    ("train: {epochs: 3", "line 1: not valid YAML"),
    ("train: epochs: 3", "line 1: not valid YAML"),
    ("train: *nowhere", "line 1: not valid YAML", "undefined alias 'nowhere'"),
    ("train: &t {epochs: 3}\nrun: {<<: *t}", "line 2", "unknown key run.<<"),
    ("model: &m {stages: *m}", "model.stages must be a list", "not a mapping"),
    ("model: {stages: &s [1, *s]}", "model.stages must be an integer", "not a list"),
    ("data: {mean: [&a [1, 1], &b [*a, *a], &c [*b, *b], [*c, *c]]}", "data.mean", "not a list"),
    ("train: !!python/object/apply:os.mkdir [pwned]", "line 1", "python/object"),
    ("train: !!python/object:os.x {epochs: 3}", "line 1", "python/object"),
    ("train: {epochs: !!python/object/apply:os.abort 3}", "line 1", "python/object"),
    ("train: {!!python/name:os.abort epochs: 3}", "line 1", "python/name"),
    ("!!python/object:os.x {}", "line 1", "python/object"),
    ("model: {stages: !!python/tuple [3, 4, 6, 3]}", "line 1", "python/tuple"),
    ("train: {epochs: !mine 3}", "line 1", "!mine"),
    ("train: {epochs: 3}\n---\nmodel: {}\n", "line 2: not valid YAML", "document"),
    ("%YAML 3.0\n---\ntrain: {}", "line 1: not valid YAML"),
    ("[" * 100_000, "nested too deeply"),
    ("model: " + "{a: " * 100_000, "nested too deeply"),
    # files that are not configurations
    (b"\x00\x01\x02", "not valid YAML"),
    (bytes(range(256)), "not a YAML text file"),
    ("# café\n".encode("latin-1"), "not a YAML text file"),
    ("train: {epochs: 3}".encode("utf-16"), "not a YAML text file"),
    (b"#" * (1 << 20) + b"\n", "over 1 MB"),
    # limits
    ("train: {epochs: 0}", "train.epochs must be at least 1, not 0"),
    ("train: {epochs: -1}", "train.epochs must be at least 1, not -1"),
    ("train: {batch_size: 0}", "train.batch_size must be at least 1"),
    ("train: {label_smoothing: 1}", "train.label_smoothing must be below 1"),
    ("train: {ema_decay: 1}", "train.ema_decay must be below 1"),
    ("optimizer: {lr: 0}", "optimizer.lr must be above 0"),
    ("optimizer: {lr: -0.1}", "optimizer.lr must be above 0, not -0.1"),
    ("optimizer: {momentum: 1}", "optimizer.momentum must be below 1"),
    ("optimizer: {weight_decay: -1e-4}", "optimizer.weight_decay must be at least 0"),
    ("optimizer: {norm_weight_decay: -1}", "optimizer.norm_weight_decay must be at least 0"),
    ("schedule: {gamma: 1}", "schedule.gamma must be below 1"),
    ("run: {seed: 9223372036854775808}", "run.seed must be at most"),
    ("run: {seed: -1}", "run.seed must be at least 0"),
    ("model: {stages: [3, 0, 6, 3]}", "model.stages must be at least 1, not 0"),
    ("data: {std: [1, 0, 1]}", "data.std must be above 0"),
    ("data: {image_size: 1}", "data.image_size must be at least 8"),
    ("data: {workers: -1}", "data.workers must be at least 0, not -1"),
    ("data: {workers: 1000}", "data.workers must be at most 256"),
    ("augment: {mirror: 50}", "augment.mirror must be at most 1"),
    ("augment: {min_area: 0}", "augment.min_area must be above 0"),
    ("augment: {min_area: 8}", "augment.min_area must be at most 1"),
    ("augment: {jitter: 2}", "augment.jitter must be at most 1"),
    ("augment: {lighting: -0.1}", "augment.lighting must be at least 0"),
    ("augment: {erasing: 25}", "augment.erasing must be at most 1"),
    ("augment: {mixup: -0.2}", "augment.mixup must be at least 0"),
    ("augment: {cutmix: -1}", "augment.cutmix must be at least 0"),
    ("augment: {repeats: 0}", "augment.repeats must be at least 1"),
]

BAD_OVERRIDES = [  # override, fragments of the message
    ("train.epochs", "'train.epochs'", "write section.key=value"),
    ("demo", "'demo'", "section.key=value"),
    ("epochs=3", "'epochs=3'", "use train.epochs"),
    ("train.=3", "train.", "keys of train: epochs"),
    ("=3", "'=3'", "sections are model"),
    ("zebra.x=3", "'zebra.x=3'", "sections are model"),
    ("train.zebra=3", "unknown key train.zebra", "keys of train: epochs"),
    ("train.epoch=3", "unknown key train.epoch", "did you mean train.epochs?"),
    ("train.batchSize=3", "unknown key train.batchSize", "use train.batch_size"),
    ("data.num_workers=8", "data.num_workers", "use data.workers"),
    ("data.train_crop_size=176", "data.train_crop_size", "use data.train_size"),
    ("augment.auto_augment=ra", "augment.auto_augment", "use augment.policy"),
    ("train.mixup_alpha=0.2", "train.mixup_alpha", "use augment.mixup"),
    ("train.smoothing=0.1", "train.smoothing", "use train.label_smoothing"),
    ("augment.jitter=0.4", "augment.jitter", "data.pipeline=fast"),
    ("train.epochs=", "train.epochs must be an integer"),
    ("schedule.name=", "schedule.name must be one of imagenet_step"),
    ("optimizer.lr=fast", "optimizer.lr must be a number", "not 'fast'"),
    ("train.epochs=3=4", "train.epochs must be an integer", "not '3=4'"),
    ("model.stages=[1,2", "'model.stages=[1,2'", "not valid YAML"),
    ("model.stages=1,1,1", "model.stages must be a list"),
    ("augment.mirror=2", "augment.mirror must be at most 1"),
    ("train.bn_group=7", "train.bn_group: 7 does not divide the 16 images"),
    ("train.epochs=!!python/name:os.abort 3", "train.epochs=", "python/name"),
    ("data.dir=\udce9", "data.dir", "not valid YAML"),
]
# fmt: on

# The options of the original (opts.lua), which users may put into any section or none.
ORIGINAL_OPTIONS = """
dataset=data.dataset manualSeed=run.seed precision=train.precision nEpochs=train.epochs
batchSize=train.batch_size LR=optimizer.lr momentum=optimizer.momentum weightDecay=optimizer.weight_decay
netType=model.architecture bottleneckType=model.block depth=model.depth baseWidth=model.base_width
cardinality=model.cardinality shortcutType=model.shortcut nClasses=model.classes nThreads=data.workers
shareGradInput=train.activation_checkpointing optnet=train.activation_checkpointing
"""


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", BAD_YAML, ids=lambda case: ascii(case[0][:40]))
def test_bad_yaml(case, tmp_path):
    content, *fragments = case
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "bad.yaml").write_bytes(content)
    expect(refused(tmp_path, train.main, "--config", "bad.yaml"), ["bad.yaml", *fragments])


@pytest.mark.parametrize("case", BAD_OVERRIDES, ids=lambda case: ascii(case[0]))
def test_bad_override(case, tmp_path):
    override, *fragments = case
    (tmp_path / "tiny.yaml").write_text(tiny_yaml())
    expect(refused(tmp_path, train.main, "--config", "tiny.yaml", override), fragments)


@pytest.mark.parametrize("name", ORIGINAL_OPTIONS.split())
def test_option_of_the_original(name, tmp_path):
    option, key = name.split("=")
    for section in (None, *SECTIONS):
        if key != f"{section}.{option}":
            text = f"{section}: {{{option}: 1}}" if section else f"{option}: 1"
            (tmp_path / "bad.yaml").write_text(text)
            text = refused(tmp_path, train.main, "--config", "bad.yaml")
            expect(text, ("bad.yaml, line 1", option, f"use {key}"))
