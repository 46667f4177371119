"""The run directory: its configuration, where it is, and the checkpoint to start from; without torch."""

import os
import shlex
from dataclasses import replace
from pathlib import Path

from ..config import Config, find_config, parse_config, read_config, to_yaml
from ..errors import UserError
from ..files import atomic_write, is_published


def configuration(config: str | None, resume: str | None, data: str | None, overrides: list[str]) -> Config:
    """Return the configuration that --config or --resume names, with the overrides and --data."""
    path = Path(resume) if resume else None
    if config is not None:
        found = read_config(find_config(config), overrides)
    elif path is None:
        found = read_config(None, overrides)
    elif is_lua_checkpoint_dir(path):
        raise UserError(
            f"--config is missing: the Lua run {resume} does not record its options; "
            "convert its command line with scripts/lua_flags.py"
        )
    elif path.is_dir():
        if not (path / "config.yaml").is_file():
            raise UserError(f"--resume {resume}: not a run directory (no config.yaml); check the path")
        found = read_config(path / "config.yaml", overrides)
    else:
        from .checkpoint import find_checkpoint, read_latest

        path = find_checkpoint(path, "last.pt")
        found = parse_config(read_latest(path, lambda _: None)["config"], str(path), overrides)
    return absolute_paths(found, data)


def absolute_paths(config: Config, data: str | None) -> Config:
    """Return the configuration with --data, and with paths that hold in every working directory."""

    def absolute(path: str | None) -> str | None:
        return path and os.path.abspath(os.path.expanduser(path))

    folder, pretrained = config.data.dir, config.model.pretrained
    if data is not None and config.data.dataset == "glyphs":
        raise UserError(f"--data {data}: glyphs are drawn, not read; set data.dataset=folder, or omit --data")
    if data is not None:
        folder = os.fsencode(data).decode("utf-8", "surrogateescape")  # in every locale
    if pretrained is not None and not is_published(pretrained):
        pretrained = absolute(pretrained)
    return replace(
        config,
        data=replace(
            config.data,
            dir=absolute(folder),
            train_list=absolute(config.data.train_list),
            val_list=absolute(config.data.val_list),
        ),
        model=replace(config.model, pretrained=pretrained),
    )


def output_folder(config: str | None, output: str | None, resume: str | None) -> Path:
    """Return the run directory: --output, or else that of --resume, or else runs/<config name>."""
    if output:
        return Path(output)
    if resume:
        path = Path(resume)
        if path.is_dir() and not is_lua_checkpoint_dir(path):
            return path
        if path.name == "last.pt" and path.parent.name == "checkpoints":
            return path.parent.parent
    if config is None:
        raise UserError(f"--resume {resume}: starts a new run from a checkpoint; name it with --output DIR")
    path = Path(config)
    return Path("runs") / (path.resolve().parent.name if path.stem == "config" else path.stem)


def resume_source(resume: str | None, output: Path) -> Path | None:
    """Return the checkpoint to start from, if any; raise UserError if `output` is in use or not writable.

    `resume` is --resume: None without the option, empty if the option has no value.
    """
    try:
        used = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be read ({error.strerror}); check its permissions"
        ) from None
    source = None
    if resume:
        source = _named_source(Path(resume))
    elif resume is not None:
        source = find_latest(output)
    # A used directory is only ever continued, and only from its own latest checkpoint.
    own = source is None or source.resolve() == (output / "checkpoints" / "last.pt").resolve()
    if used and not (resume is not None and is_run(output) and own):
        raise UserError(
            f"--output {output}: is in use already; continue that run with --resume, or choose another "
            "directory with --output"
        )
    check_writable(output)
    return source


def _named_source(path: Path) -> Path | None:
    """Return the checkpoint that --resume names, None if it names a run that has saved nothing yet."""
    if not path.exists():
        raise UserError(f"--resume {path}: no such run directory or checkpoint; check the path")
    source = find_latest(path) if path.is_dir() else path
    if source and source.suffix == ".t7" and source.name != "latest.t7":
        raise UserError(
            f"--resume {path}: a single Lua file; give its folder, which has latest.t7, or start from it "
            "with model.pretrained"
        )
    if source is None and not is_run(path):
        raise UserError(f"--resume {path}: not a run directory; give one that train.py wrote")
    return source


def find_latest(folder: Path) -> Path | None:
    """Return last.pt of a run directory (only previous.pt may exist), None if nothing was saved."""
    if is_lua_checkpoint_dir(folder):
        return folder / "latest.t7"
    saved = folder / "checkpoints" / "last.pt"
    if saved.exists() or saved.with_name("previous.pt").exists():
        return saved
    others = sorted(saved.parent.glob("[!.]*.pt"))  # a killed run may leave half a file, which is hidden
    if others:
        another = shlex.quote(str(others[0]))
        raise UserError(f"{saved}: is missing; resume from another with --resume {another} --output DIR")
    return None


def is_lua_checkpoint_dir(folder: Path) -> bool:
    """Return whether a directory holds checkpoints of the Lua code."""
    return (folder / "latest.t7").is_file()


def is_run(folder: Path) -> bool:
    """Return whether train.py wrote a folder, even if it was killed before it wrote config.yaml."""
    first = {"log.txt", "metrics.jsonl", "tensorboard"}
    if not (folder / "log.txt").is_file():
        return False
    return (folder / "config.yaml").is_file() or {path.name for path in folder.iterdir()} <= first


def check_writable(output: Path) -> None:
    """Raise UserError, before the data is loaded, if the run directory cannot be created."""
    existing = existing_part(output)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"--output {output}: cannot be created below {existing}; choose another with --output DIR"
        )


def existing_part(output: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(folder for folder in (output, *output.absolute().parents) if folder.exists())


def write_config(config: Config, versions: dict[str, str], output: Path) -> None:
    """Write config.yaml: the resolved configuration, and in its header the versions that repeat the run."""
    header = "".join(f"# {name}: {value}\n" for name, value in versions.items())
    atomic_write(output / "config.yaml", f"{header}\n{to_yaml(config)}".encode())
