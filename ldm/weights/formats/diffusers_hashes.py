"""The SHA-256 of the files of a diffusers folder, which model_index.json states if this library wrote it.

Other programs ignore the entry, as its name begins with an underscore, and leave it out when they write the
folder again. The folder of another program has none, and nothing is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ldm.support.config import build
from ldm.support.files import file_exists
from ldm.support.strict_json import read_json
from ldm.support.text import shown
from ldm.weights.hashing import FileHashes, check_hashes

HASHES_KEY = "_ldm_sha256"  # name of the entry: a mapping of paths relative to the folder
PIPELINE_INDEX = "model_index.json"
_WEIGHTS = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class _Stated:
    files: Mapping[str, str]


def stated_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the files of a pipeline's folder that its index states; empty if it has none.

    Raises:
        ValueError: If the index is damaged.
    """
    index = folder / PIPELINE_INDEX
    if not index.is_file():
        return {}
    where = f"{shown(str(index))}: {HASHES_KEY}"
    stated = build(_Stated, {"files": read_json(index).get(HASHES_KEY, {})}, where).files
    for name in stated:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name or "\0" in name:
            raise ValueError(f"{where}: expected the paths of files in the folder, got {shown(name)}")
    return dict(stated)


def folder_hashes(folder: Path, files: Iterable[Path]) -> FileHashes:
    """Return the hashes of files in a folder by their paths relative to it."""
    return FileHashes({path.relative_to(folder).as_posix(): path for path in files})


class FolderCheck:
    """A comparison of the files of a pipeline's folder with its index, made while the folder is read.

    Args:
        folder: The folder.
        read: The files that are read.
        parts: Names of the components that are read; None for all. The other files of these components are
            compared too.

    Raises:
        ValueError: If the index is damaged.
        FileNotFoundError: If a file that is read is absent.
    """

    def __init__(self, folder: Path, read: Iterable[Path], parts: Iterable[str] | None = None) -> None:
        self.folder, self.names = folder, [path.relative_to(folder).as_posix() for path in read]
        wanted = None if parts is None else set(parts)
        stated = stated_hashes(folder)
        self.stated = {
            name: value for name, value in stated.items() if wanted is None or name.split("/")[0] in wanted
        }
        others = (folder / name for name in self.stated if not name.endswith(_WEIGHTS))
        paths = [*(folder / name for name in self.names), *(path for path in others if file_exists(path))]
        self.hashes = folder_hashes(folder, dict.fromkeys(paths))

    def finish(self) -> FileHashes:
        """Compare, and return the hashes of the files that are read.

        Weights may have another name than the index states, such as that of a variant, in the same folder.

        Raises:
            ValueError: If a file is another one than the index states, or is not stated.
            FileNotFoundError: If a file that the index states is absent.
        """
        if self.stated:
            stated = {name: each for name, each in self.stated.items() if not name.endswith(_WEIGHTS)}
            known = {(PurePosixPath(name).parent, each): name for name, each in self.stated.items()}
            for name in self.names:
                same = known.get((PurePosixPath(name).parent, self.hashes[name]))
                if name in self.stated or same is not None:
                    stated[name] = self.stated[same or name]
            check_hashes(stated, self.hashes, self.folder / PIPELINE_INDEX)
        return self.hashes.renamed({name: name for name in self.names})
