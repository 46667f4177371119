"""Where a run goes, what it goes on from, and its config.yaml; needs no torch."""

import os
import shlex
from dataclasses import replace
from pathlib import Path

from ..config import Config, find_config, parse_config, read_config, to_yaml
from ..errors import UserError


def configuration(config: str | None, resume: str | None, data: str | None, overrides: list[str]) -> Config:
    """The configuration of --config, or of what --resume names, with the overrides."""
    if config is not None:
        found = read_config(find_config(config), overrides)
    elif resume and is_lua_checkpoint_dir(Path(resume)):
        raise UserError(
            f"--config is missing: the Lua run {resume} does not say its options; "
            "scripts/lua_flags.py makes a configuration of its command line"
        )
    elif resume and Path(resume).is_dir():
        path = Path(resume) / "config.yaml"
        if not path.is_file():
            raise UserError(f"--resume {resume}: not a run directory (no config.yaml); give one")
        found = read_config(path, overrides)
    elif resume:
        from .checkpoint import find_checkpoint, read_checkpoint

        path = find_checkpoint(Path(resume), "last.pt")
        found = parse_config(read_checkpoint(path)["config"], str(path), overrides)
    else:
        found = read_config(None, overrides)
    return absolute_paths(found, data)


def absolute_paths(config: Config, data: str | None) -> Config:
    """The configuration with --data, and with paths that hold in every working directory."""
    folder, pretrained = config.data.dir, config.model.pretrained
    if data is not None:
        folder = os.fsencode(data).decode("utf-8", "surrogateescape")  # in every locale
    if pretrained is not None and not pretrained.startswith("torchvision:"):
        pretrained = os.path.abspath(os.path.expanduser(pretrained))
    return replace(
        config,
        data=replace(config.data, dir=folder and os.path.abspath(os.path.expanduser(folder))),
        model=replace(config.model, pretrained=pretrained),
    )


def output_folder(config: str | None, output: str | None, resume: str | None) -> Path:
    """Where the run goes."""
    if output:
        return Path(output)
    if resume:
        path = Path(resume)
        if path.is_dir() and not is_lua_checkpoint_dir(path):
            return path
        if path.name == "last.pt" and path.parent.name == "checkpoints":
            return path.parent.parent
        if config is None:
            raise UserError(f"--resume {path}: say with --output DIR where the run from there shall go")
    path = Path(config)
    return Path("runs") / (path.resolve().parent.name if path.stem == "config" else path.stem)


def resume_source(resume: str | None, output: Path) -> Path | None:
    """The checkpoint to start from, or None; refuses to touch a directory that is in use or not writable.

    `resume` is --resume: None without the option, empty where it names nothing.
    """
    last = output / "checkpoints" / "last.pt"
    try:
        used = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be read ({error.strerror})") from None
    source = None
    if resume:
        path = Path(resume)
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
    elif resume is not None:
        source = find_latest(output)
    # A used directory is only ever continued, from its own latest checkpoint.
    own = source is None or source.resolve() == last.resolve()
    continued = resume is not None and is_run(output) and own
    if used and not continued:
        raise UserError(
            f"--output {output}: is in use already; continue that run with --resume, or choose another "
            "directory with --output"
        )
    check_writable(output)
    return source


def find_latest(folder: Path) -> Path | None:
    """last.pt of a run directory (perhaps only its predecessor is left), None where nothing was saved."""
    if is_lua_checkpoint_dir(folder):
        return folder / "latest.t7"
    saved = folder / "checkpoints" / "last.pt"
    if saved.exists() or saved.with_name("previous.pt").exists():
        return saved
    others = sorted(saved.parent.glob("[!.]*.pt"))  # a hidden one is half of what a killed run wrote
    if others:
        another = shlex.quote(str(others[0]))
        raise UserError(f"{saved}: is gone; go on from another with --resume {another} --output DIR")
    return None


def is_lua_checkpoint_dir(folder: Path) -> bool:
    """Whether it is a directory of the Lua code's checkpoints."""
    return (folder / "latest.t7").is_file()


def is_run(folder: Path) -> bool:
    """Whether train.py wrote a folder, even if it was killed ahead of writing config.yaml."""
    first = {"log.txt", "metrics.jsonl", "tensorboard"}
    if not (folder / "log.txt").is_file():
        return False
    return (folder / "config.yaml").is_file() or {path.name for path in folder.iterdir()} <= first


def check_writable(output: Path) -> None:
    """A UserError now rather than after loading the data where the run directory cannot be made."""
    existing = existing_part(output)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"--output {output}: cannot be made below {existing}; choose another directory with --output DIR"
        )


def existing_part(output: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(folder for folder in (output, *output.absolute().parents) if folder.exists())


def write_config(config: Config, versions: dict[str, str], output: Path) -> None:
    """config.yaml: the resolved configuration, headed by what else it takes to repeat the run."""
    header = "".join(f"# {name}: {value}\n" for name, value in versions.items())
    temporary = output / ".config.yaml"
    temporary.write_text(f"{header}\n{to_yaml(config)}", encoding="utf-8")
    os.replace(temporary, output / "config.yaml")
