"""Weights from the Hugging Face hub, into its own cache; asked only when nothing local was given or found."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from ldm.weights.io import sha256 as digest

# what a folder of diffusers needs here: configurations, tokenizers, safetensors and, where there are none, pickles (read by our own reader)
PATTERNS = ["*.json", "*.txt", "*.safetensors", "*.bin", "*.model"]


class UnexpectedHash(UserWarning):
    """A downloaded file is not the one that third parties describe."""


def local_path(name: str) -> Path | None:
    """Where a model's weights lie below LDM_HOME (default ~/.cache/ldm): a folder or file by its name; None if there are none."""
    home = Path(os.environ.get("LDM_HOME") or Path.home() / ".cache" / "ldm")
    places = [home / name, *(home / f"{name}.{ending}" for ending in ("safetensors", "ckpt"))]
    return next((place for place in places if place.exists()), None)


def download(name: str, repo: str, file: str | None, *, sha256: str | None = None, stated: bool = False) -> Path:
    """A repository's file, or (None) its folder, from the hub's cache or from the hub.

    A file that was just downloaded is compared with ``sha256``: where its publisher ``stated`` that, another is removed and refused with
    ValueError; else there is a warning. FileNotFoundError, saying what to do, if the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    def fetch(local: bool) -> Path:
        if file is not None:
            return Path(hf_hub_download(repo, file, local_files_only=local))
        return Path(snapshot_download(repo, allow_patterns=PATTERNS, local_files_only=local))

    try:
        return fetch(True)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError):
        pass  # not in the cache
    try:
        path = fetch(False)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        what = f"{repo}/{file}" if file else repo
        raise FileNotFoundError(
            f"the weights of {name!r} are not on this machine, and {what} cannot be had from the hub ({type(error).__name__}); "
            f"pass weights=FILE_OR_FOLDER, put them into LDM_HOME as {name}.safetensors or a folder {name}, or go online"
        ) from error
    if file is not None and sha256 is not None:
        _check(path, sha256, stated)
    return path


def _check(path: Path, expected: str, stated: bool) -> None:
    found = digest(path)
    if found == expected:
        return
    message = f"{str(path)!r} has the sha256 {found}, expected {expected}"
    if not stated:
        warnings.warn(f"{message} as third parties list it", UnexpectedHash, stacklevel=4)
        return
    for place in {path.resolve(), path}:
        place.unlink(missing_ok=True)
    raise ValueError(f"{message} as its publisher states it: the download is damaged or was changed, and was removed")
