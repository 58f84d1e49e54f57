"""Downloads from the hub with a stubbed client: cache, hashes, and advice if it cannot be reached."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from ldm.weights.formats.hub import UnexpectedHash, download, local_path

huggingface_hub = pytest.importorskip("huggingface_hub")
CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stub a hub with one file, which its client caches at the first download."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    state: dict[str, Any] = {"online": True, "asked": [], "path": tmp_path / "cache" / "model.safetensors"}

    def get(repo: str, file: str | None = None, *, local_files_only: bool = False, **_: Any) -> str:
        state["asked"].append((repo, file, local_files_only))
        if not state["path"].exists():
            if local_files_only or not state["online"]:
                raise LocalEntryNotFoundError("not there")
            state["path"].parent.mkdir(exist_ok=True)
            state["path"].write_bytes(CONTENT)
        return str(state["path"] if file else state["path"].parent)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", get)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", get)
    return state


def test_the_cache_is_looked_at_first(hub: dict[str, Any]) -> None:
    assert download("m", "a/b", "model.safetensors", sha256=DIGEST, stated=True).read_bytes() == CONTENT
    assert [local for _, _, local in hub["asked"]] == [True, False]
    hub["online"] = False
    assert download("m", "a/b", "model.safetensors").exists()
    assert download("m", "a/b", None).is_dir()


def test_another_file_than_its_publisher_states_is_refused_and_removed(hub: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="as its publisher states it"):
        download("m", "a/b", "model.safetensors", sha256="0" * 64, stated=True)
    assert not hub["path"].exists()
    with pytest.raises(
        ValueError, match="as its publisher states it"
    ):  # the removed file is not in the cache
        download("m", "a/b", "model.safetensors", sha256="0" * 64, stated=True)


def test_hashes_that_third_parties_list_are_only_warned_of(hub: dict[str, Any]) -> None:
    with pytest.warns(UnexpectedHash, match=f"{DIGEST}, expected 000"):
        assert download("m", "a/b", "model.safetensors", sha256="0" * 64).exists()


def test_offline_says_what_to_do(hub: dict[str, Any]) -> None:
    hub["online"] = False
    message = (
        r"'m' are not on this machine, and a/b/model\.safetensors .*pass weights=FILE_OR_FOLDER.*LDM_HOME as"
        r" m\.safetensors"
    )
    with pytest.raises(FileNotFoundError, match=message):
        download("m", "a/b", "model.safetensors")


def test_the_librarys_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_HOME", str(tmp_path))
    assert local_path("m") is None
    (tmp_path / "m.ckpt").touch()
    assert local_path("m") == tmp_path / "m.ckpt"
    (tmp_path / "m").mkdir()
    assert local_path("m") == tmp_path / "m"


def test_without_a_home_folder_there_are_no_local_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LDM_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert local_path("m") is None


def test_files_of_a_model_in_another_layout_are_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client returns a folder of its cache whether it is complete or not."""
    asked: list[tuple[list[str], bool]] = []

    def snapshot(repo: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((allow_patterns, local_files_only))
        for name in allow_patterns[: 1 if local_files_only else None]:
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    files = ["encoder_mini.pt", "decoder_mini.pt"]
    assert download("m", "a/b", None, files=files) == tmp_path
    assert asked == [(files, True), (files, False)]
    (tmp_path / "decoder_mini.pt").unlink()
    with pytest.raises(FileNotFoundError, match="allow the download of a/b"):
        download("m", "a/b", None, files=files, allowed=False)
