"""Weights from the Hugging Face hub, into its own cache; asked only when nothing local was given or found."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from ldm.weights.formats.diffusers_folder import is_folder, list_variants, read_folder
from ldm.weights.formats.safetensors import sha256 as digest

# of a folder of diffusers: configurations, tokenizers and each part's plain weights, but not the single files
# that may lie beside them
CONFIGURATIONS, SAFETENSORS, PICKLES = (
    ["*.json", "*.txt"],
    ["*/*.safetensors", "diffusion_pytorch_model.safetensors"],
    ["*/*.bin"],
)
UNUSED = ["*.fp16.*", "*.non_ema.*", "safety_checker/*"]


class UnexpectedHash(UserWarning):
    """A downloaded file is not the one that third parties describe."""


def local_path(name: str) -> Path | None:
    """Where a model's weights lie below LDM_HOME (default ~/.cache/ldm): a folder or file by its name; None
    if there are none."""
    home = Path(os.environ.get("LDM_HOME") or Path.home() / ".cache" / "ldm")
    places = [home / name, *(home / f"{name}.{ending}" for ending in ("safetensors", "ckpt"))]
    return next((place for place in places if place.exists()), None)


def download(
    name: str, repo: str, file: str | None, *, sha256: str | None = None, stated: bool = False
) -> Path:
    """A repository's file, or (None) its folder, from the hub's cache or from the hub.

    A file that was just downloaded is compared with ``sha256``: where its publisher ``stated`` that, another
    is removed and refused with ValueError; else there is a warning. FileNotFoundError, saying what to do, if
    the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    def fetch(local: bool) -> Path:
        if file is not None:
            return Path(hf_hub_download(repo, file, local_files_only=local))
        path = Path()
        for weights in (
            SAFETENSORS,
            SAFETENSORS + PICKLES,
        ):  # pickles, read by our own reader, only where there is nothing else
            options = {
                "allow_patterns": CONFIGURATIONS + weights,
                "ignore_patterns": UNUSED,
                "local_files_only": local,
            }
            path = Path(snapshot_download(repo, **options))
            if _whole(path):
                return path
        raise FileNotFoundError(f"{str(path)!r} lacks weights of a part")

    try:
        return fetch(True)
    except OSError:
        pass  # not in the cache, or not all of it
    try:
        path = fetch(False)
    except OSError as error:
        what = f"{repo}/{file}" if file else repo
        raise FileNotFoundError(
            f"the weights of {name!r} are not on this machine, and {what} cannot be had from the hub"
            f" ({type(error).__name__}); pass weights=FILE_OR_FOLDER, put them into LDM_HOME as"
            f" {name}.safetensors or a folder {name}, or go online"
        ) from error
    if file is not None and sha256 is not None:
        _check(path, sha256, stated)
    return path


def _whole(path: Path) -> bool:
    """Whether a folder from the hub has the weights of all its parts."""
    if not is_folder(path):
        return bool(list_variants(path))
    try:
        read_folder(path)
    except OSError:
        return False
    return True


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
    raise ValueError(
        f"{message} as its publisher states it: the download is damaged or was changed, and was removed"
    )
