"""Weights by name from the Hugging Face hub: timm:NAME.TAG and hf:OWNER/REPO, with an optional @REVISION.

huggingface_hub downloads them and keeps its cache: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, and HF_ENDPOINT work as
everywhere. Only files with known names are fetched, and only up to a size.
"""

import contextlib
import os
import re
import sys
from pathlib import Path

from ..errors import InvalidFileError, UserError
from .model_folder import CONFIG, MAX_CONFIG, PREFERRED, PREPROCESSOR, TIMM_TAGS, read_facts

MAX_WEIGHTS = 4 << 30  # bytes; the largest that was published, ResNeXt-101 32x48d, has 3.1 GiB
NAME = re.compile(r"(?P<repo>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>\w[\w.-]*))?", re.ASCII)


def parse_name(source: str) -> tuple[str, str, str | None]:
    """Return (full name, repository, revision) for timm:NAME[.TAG][@REVISION] or hf:OWNER/REPO[@REVISION]."""
    kind, _, name = source.partition(":")
    match = NAME.fullmatch(name)
    if not match or ".." in name:
        raise UserError(
            f"{source}: not a name; give timm:resnext50_32x4d.a1_in1k, hf:OWNER/REPO, or the like"
        )
    repo, revision = match["repo"], match["revision"]
    if kind == "timm":
        architecture, _, tag = repo.partition(".")
        tag = tag or TIMM_TAGS.get(architecture) or ""
        if architecture not in TIMM_TAGS or not tag:
            known = ", ".join(key for key, tag in TIMM_TAGS.items() if tag)
            raise UserError(f"{source}: timm has no such weights for this program; give one of {known}")
        repo = f"{architecture}.{tag}"
    full = f"{kind}:{repo}" + (f"@{revision}" if revision else "")
    return full, f"timm/{repo}" if kind == "timm" else repo, revision


def download(source: str) -> tuple[str, Path]:
    """Return (the source's full name, the folder in the cache with its config.json and weights).

    What is missing in the cache is downloaded, after its license was printed. Raise UserError if that fails.
    """
    name, repo, revision = parse_name(source)
    try:
        from huggingface_hub import DryRunFileInfo  # noqa: F401 (since 1.0, as is the check of sizes)
    except ImportError:
        raise UserError(f"{source}: needs huggingface_hub; pip install 'huggingface_hub>=1'") from None
    try:
        folder = _fetch(repo, revision, [CONFIG], MAX_CONFIG).parent
        commit, config = folder.name, read_facts(folder)
        if config.origin == "transformers":
            _fetch(repo, commit, [PREPROCESSOR], MAX_CONFIG)
        _fetch(repo, commit, list(PREFERRED[:2]), MAX_WEIGHTS, config.license)
    except Exception as error:
        raise UserError(f"{name}: {_explain(repo, error)}") from None
    return name, folder


def _fetch(repo: str, revision: str | None, names: list[str], limit: int, license: object = None) -> Path:
    """Return the path in the cache of the first of these files that the repository has."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        try:
            facts = hf_hub_download(repo, name, revision=revision, dry_run=True)
            if not facts.file_size or facts.file_size > limit:
                raise InvalidFileError(f"{name} has {facts.file_size} bytes, expected 1 to {limit}")
            if facts.will_download and limit == MAX_WEIGHTS and os.environ.get("LOCAL_RANK", "0") == "0":
                license = _license(repo, facts.commit_hash) or license or "unknown (read its model card)"
                text = "".join(filter(str.isprintable, str(license)))[:80]
                text += " (non-commercial)" if "-nc" in text.lower() else ""
                print(f"{repo}: license {text}", file=sys.stderr)
                print(f"downloading {name}, {facts.file_size / 2**20:.1f} MiB", file=sys.stderr, flush=True)
            return Path(hf_hub_download(repo, name, revision=revision))
        except EntryNotFoundError:  # without network, also if it is not in the cache
            if name == names[-1]:
                raise
    raise AssertionError


def _license(repo: str, commit: str) -> str | None:
    """Return the license on the model card, None if there is none."""
    from huggingface_hub import model_info

    with contextlib.suppress(Exception):  # nothing depends on it
        card = model_info(repo, revision=commit).card_data
        return str(card.license) if card and card.license else None
    return None


def _explain(repo: str, error: Exception) -> str:
    """Return what went wrong, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo} asks you to accept its terms; do so on its page, and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no {repo}, or it is private; check the name, or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision; check the part after @"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "is not in the cache, and the hub cannot be reached; connect, or pass a downloaded folder"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo} lacks {CONFIG}, {PREPROCESSOR} (of transformers), or weights; use another"
    reason = (str(error).splitlines() or [""])[0][:200]
    if isinstance(error, InvalidFileError):
        return f"{reason}; use other weights"
    return f"could not be downloaded ({reason}); download it and pass the folder"
