"""Atomic file writes."""

from __future__ import annotations

import pytest

from ldm.support.files import write_atomically


def test_files_are_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.bin"
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"two")
    assert path.read_bytes() == b"one" and [file.name for file in path.parent.iterdir()] == ["file.bin"]
