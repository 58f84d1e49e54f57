"""Download weights from the Hugging Face hub into its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.support.home import library_home
from ldm.support.warn import warn_user
from ldm.weights.formats.diffusers_folder import is_folder, list_variants, read_folder
from ldm.weights.formats.safetensors import sha256 as digest

# Files of a folder in diffusers layout: configurations, tokenizers and the plain weights of each part, but
# not the single files that may be beside them.
CONFIGURATIONS, SAFETENSORS, PICKLES = (
    ["*.json", "*.txt"],
    ["*/*.safetensors", "diffusion_pytorch_model.safetensors"],
    ["*/*.bin"],
)
UNUSED = ["*.fp16.*", "*.non_ema.*", "safety_checker/*"]


class UnexpectedHash(UserWarning):
    """Warns that a downloaded file has another hash than third parties list."""


def local_path(name: str) -> Path | None:
    """Return the file or folder called ``name`` below LDM_HOME (default: ~/.cache/ldm), or None."""
    try:
        home = library_home()
    except FileNotFoundError:  # without a home folder
        return None
    places = [home / name, *(home / f"{name}.{ending}" for ending in ("safetensors", "ckpt"))]
    return next((place for place in places if place.exists()), None)


def download(
    name: str,
    repo: str,
    file: str | None,
    *,
    files: Sequence[str] = (),
    sha256: str | None = None,
    stated: bool = False,
    allowed: bool = True,
) -> Path:
    """Return a file or a folder from the hub's cache, downloaded if necessary.

    Args:
        name: Name of the model, for messages.
        repo: Repository, "owner/name".
        file: File in the repository; None for `files`, or else its folder in diffusers layout. Pickles are
            downloaded only if there are no safetensors.
        files: Files in the repository that are downloaded into one folder. Default: none.
        sha256: Expected SHA-256 of a newly downloaded file.
        stated: Whether the publisher states ``sha256``. If so, a file with another hash is removed and
            refused; otherwise there is a warning.
        allowed: Whether the hub may be asked. Default: True.

    Raises:
        FileNotFoundError: If the file is not in the cache and the hub cannot be reached, or may not be asked.
        ValueError: If the file has another hash than its publisher states.
    """
    try:
        return fetch_weights(repo, file, files, local=True)
    except OSError:
        pass  # not, or not completely, in the cache
    what = f"{repo}/{file}" if file else repo
    if not allowed:
        raise FileNotFoundError(
            f"the weights of {name!r} are not on this machine: allow the download of {what} from the hub"
            " (download=True, or --download), or pass the file or folder of the weights"
        )
    try:
        path = fetch_weights(repo, file, files, local=False)
    except OSError as error:
        raise FileNotFoundError(
            f"the weights of {name!r} are not on this machine, and {what} cannot be downloaded from the hub"
            f" ({type(error).__name__}); pass weights=FILE_OR_FOLDER, put them into LDM_HOME as"
            f" {name}.safetensors or a folder {name}, or connect to the network"
        ) from error
    if file is not None and sha256 is not None:
        check_hash(path, sha256, stated=stated)
    return path


def fetch_weights(repo: str, file: str | None, files: Sequence[str] = (), *, local: bool) -> Path:
    """Return a file, or a folder with all weights, through the hub's client.

    Args:
        repo: Repository, "owner/name".
        file: File in the repository; None for its folder.
        files: Files that the folder must have; none for those of the diffusers layout. Default: none.
        local: Whether only the cache is looked at.

    Raises:
        OSError: If there is none.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    if file is not None:
        return Path(hf_hub_download(repo, file, local_files_only=local))
    if files:
        path = Path(snapshot_download(repo, allow_patterns=[*files], local_files_only=local))
        if lacking := [name for name in files if not (path / name).is_file()]:
            raise FileNotFoundError(f"{str(path)!r} lacks {', '.join(lacking)}")
        return path
    path = Path()
    for weights in (SAFETENSORS, SAFETENSORS + PICKLES):
        patterns = CONFIGURATIONS + weights
        path = Path(
            snapshot_download(repo, allow_patterns=patterns, ignore_patterns=UNUSED, local_files_only=local)
        )
        if has_all_weights(path):
            return path
    raise FileNotFoundError(f"{str(path)!r} lacks weights of a part")


def has_all_weights(path: Path) -> bool:
    """Return whether a folder in diffusers layout holds the weights of all its parts."""
    if not is_folder(path):
        return bool(list_variants(path))
    try:
        read_folder(path)
    except OSError:
        return False
    return True


def check_hash(path: Path, expected: str, *, stated: bool) -> None:
    """Warn if a file has another SHA-256 than expected; refuse it, removed, if its publisher states that."""
    found = digest(path)
    if found == expected:
        return
    message = f"{str(path)!r} has the sha256 {found}, expected {expected}"
    if not stated:
        warn_user(f"{message} as third parties list it", UnexpectedHash)
        return
    for place in {path.resolve(), path}:
        place.unlink(missing_ok=True)
    raise ValueError(
        f"{message} as its publisher states it: the download is damaged or was changed, and has been removed"
    )
