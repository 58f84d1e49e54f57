"""The pinned npm packages of the emoji data set, and their download."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.facts import Style
from ldm.support.files import temporary_folder, write_atomically


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package of the npm registry, pinned by version and by the SHA-256 of its tarball."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def file_name(self) -> str:
        """The tarball's name, as ``npm pack`` writes it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def _icons(name: str, version: str, licence: str, sha256: str) -> Package:
    return Package(name=f"@iconify-json/{name}", version=version, licence=licence, sha256=sha256)


# In the order in which a style's icons name things; see `ldm.data.names`.
ICONS: dict[Style, Package] = {
    "noto": _icons(
        "noto", "1.2.9", "Apache-2.0", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"
    ),
    "fluent": _icons(
        "fluent-emoji", "1.2.7", "MIT", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"
    ),
    "twemoji": _icons(
        "twemoji", "1.2.5", "CC-BY-4.0", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    "flat": _icons(
        "fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "noto-v1": _icons(
        "noto-v1", "1.2.5", "Apache-2.0", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
    ),
    "emojione": _icons(
        "emojione", "1.2.3", "CC-BY-4.0", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
    "fxemoji": _icons(
        "fxemoji", "1.2.2", "Apache-2.0", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"
    ),
}
LABEL_PACKAGE = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    licence="MIT",
)


def fetch(package: Package, cache: Path) -> Path:
    """Return the path of a package's tarball in `cache`, after fetching it with ``npm pack`` if it is absent.

    Raises:
        FileNotFoundError: If the tarball is absent and npm is not installed.
        RuntimeError: If ``npm pack`` fails.
        ValueError: If the tarball's SHA-256 is not the pinned one.
    """
    path = cache / package.file_name
    if not path.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError(
                f"npm is needed to fetch {package.name}@{package.version} (install Node.js), or put"
                f" {path.name!r} into {str(cache)!r}"
            )
        cache.mkdir(parents=True, exist_ok=True)
        with temporary_folder(cache) as folder:
            done = subprocess.run(
                [npm, "pack", "--silent", f"{package.name}@{package.version}"],
                cwd=folder,
                capture_output=True,
                encoding="utf-8",
                check=False,
            )
            if done.returncode:
                raise RuntimeError(
                    f"npm pack {package.name}@{package.version} failed:"
                    f" {done.stderr.strip() or done.stdout.strip()}"
                )
            write_atomically(path, (folder / package.file_name).read_bytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"{str(path)!r}: SHA-256 is {digest}, expected {package.sha256}; remove the file to fetch it"
            " again"
        )
    return path


def read_tarball_json(tarball: Path, member: str) -> Any:
    """Return the content of a JSON file in an npm tarball."""
    with tarfile.open(tarball) as archive:
        file = archive.extractfile(f"package/{member}")
        if file is None:
            raise ValueError(f"{str(tarball)!r}: expected a file {member!r} in it")
        return json.load(file)
