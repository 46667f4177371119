"""Weights by name from the Hugging Face hub: timm:NAME.TAG and hf:OWNER/REPO, with an optional @REVISION.

huggingface_hub downloads them and keeps its cache: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, and HF_ENDPOINT work as
everywhere. Only files with known names are fetched, and only up to a size.
"""

import contextlib
import re
import sys
from pathlib import Path

from ..errors import InvalidFileError, UserError
from .model_folder import CONFIG, MAX_CONFIG, PREFERRED, PREPROCESSOR, TIMM_TAGS, read_facts

MAX_WEIGHTS = 4 << 30  # bytes; the largest that was published, ResNeXt-101 32x48d, has 3.1 GiB
COMMIT = re.compile("[0-9a-f]{40}")
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
        import huggingface_hub.errors  # noqa: F401
    except ImportError:
        raise UserError(f"{source}: needs the package huggingface_hub; pip install huggingface_hub") from None
    try:
        folder = _fetch(repo, revision or "main", [CONFIG]).parent
        commit, facts = folder.name, read_facts(folder)
        if facts.origin == "transformers":
            _fetch(repo, commit, [PREPROCESSOR])
        _fetch(repo, commit, list(PREFERRED[:2]), facts.license)
    except Exception as error:
        raise UserError(f"{name}: {_explain(repo, error)}") from None
    return name, folder


def _fetch(repo: str, revision: str, names: list[str], license: object = None) -> Path:
    """Return the path in the cache of the first of these files that the repository has."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    problem: Exception = InvalidFileError(f"{repo} has no {' or '.join(names)}")
    for name in names:
        weights = not name.endswith(".json")
        cached = try_to_load_from_cache(repo, name, revision=revision)
        if not (isinstance(cached, str) and COMMIT.fullmatch(revision)):  # a branch may have moved
            try:
                facts = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
                limit = MAX_WEIGHTS if weights else MAX_CONFIG
                _check(name, limit, facts.size, facts.commit_hash, facts.etag)
                current = try_to_load_from_cache(repo, name, revision=facts.commit_hash)
                if weights and not isinstance(current, str):
                    _announce(repo, revision, name, facts.size or 0, license)
                cached = hf_hub_download(repo, name, revision=revision)
            except LocalEntryNotFoundError as error:  # a subclass: the connection broke
                problem = error
            except EntryNotFoundError:
                continue
            except InvalidFileError:
                raise
            except Exception as error:  # offline, or not permitted: what is in the cache will do
                problem = error
        if isinstance(cached, str):
            return Path(cached)
    raise problem


def _check(name: str, limit: int, size: int | None, *parts: str | None) -> None:
    """Raise InvalidFileError for a file that is too large, or whose place in the cache would be outside."""
    if not size or size > limit:
        raise InvalidFileError(f"{name} has {size} bytes (expected 1 to {limit})")
    if not all(part and re.fullmatch(r"[\w-]{1,128}", part, re.ASCII) for part in parts):
        raise InvalidFileError(f"{name}: the hub sent a name for the cache that is not safe")


def _announce(repo: str, commit: str, name: str, size: int, license: object) -> None:
    """Print the license, of the model card if there is one, and the size."""
    from huggingface_hub import model_info

    with contextlib.suppress(Exception):  # nothing depends on it
        card = model_info(repo, revision=commit).card_data
        license = card.license if card and card.license else license
    text = "".join(filter(str.isprintable, str(license or "unknown, see its model card")))[:80]
    text += " (non-commercial)" if "-nc" in text.lower() else ""
    print(f"{repo}: license {text}; downloading {name}, {size / 2**20:.1f} MiB", file=sys.stderr, flush=True)


def _explain(repo: str, error: Exception) -> str:
    """Return what went wrong, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo} asks you to accept its terms; do so on its page, and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no {repo}, or it is private; check the name, or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision; check the part after @"
    reason = (str(error).splitlines() or [""])[0][:160]
    if isinstance(error, InvalidFileError):
        return f"{reason}; use other weights"
    return f"is not in the cache, and cannot be downloaded ({reason}); connect, or pass a downloaded folder"
