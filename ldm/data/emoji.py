"""The builder of the emoji data set: ``python -m ldm.data.emoji [--out data/emoji] [--size 128]``.

Three pinned npm packages provide the images as SVG, a fourth provides labels and tags. Files written:

- ``pictures.npy``: uint8 (N, size, size, 4), RGBA with straight (not premultiplied) alpha;
- ``index.json``: one row for each image, in the same order;
- ``manifest.json``: packages, renderer, counts and hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.index import IMAGES_FILE, INDEX_FILE, MANIFEST_FILE, ImageRecord, Style, held_out_image
from ldm.support.arrays import write_array
from ldm.support.files import temporary_folder, write_atomically
from ldm.support.progress import progress_bar
from ldm.weights.formats.safetensors import sha256


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


ICONS: dict[Style, Package] = {
    "noto": Package(
        name="@iconify-json/noto",
        version="1.2.9",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        licence="Apache-2.0",
    ),
    "fluent": Package(
        name="@iconify-json/fluent-emoji",
        version="1.2.7",
        sha256="8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        licence="MIT",
    ),
    "twemoji": Package(
        name="@iconify-json/twemoji",
        version="1.2.5",
        sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        licence="CC-BY-4.0",
    ),
}
LABEL_PACKAGE = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    licence="MIT",
)
# skin tones, flags, keys, clocks, letters, families: hundreds of near-copies, or images of text
LEFT_OUT = re.compile(
    r"skin-tone|flag|-button|o-clock|oclock|clock-face|keycap|thirty|^[0-9a-z*#]$|letter|squared|ideograph|symbol|regional|tag-|tone-?\d"
    r"|-(light|medium|dark)|family-|couple|kiss-|copyright|registered|trade-mark"
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
                text=True,
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


def kept_icons(icons: dict[str, Any]) -> dict[str, str]:
    """Return SVG documents by name for the square icons of an Iconify set, except those in `LEFT_OUT`.

    Aliases are ignored: they repeat an icon under another name.
    """
    documents = {}
    for name, icon in icons["icons"].items():
        width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
        if width == height and not LEFT_OUT.search(name):
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
            body = icon["body"]
            space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            documents[name] = f'<svg {space} viewBox="{box}" width="{width}" height="{height}">{body}</svg>'
    return documents


def render_svg(svg: str, size: int) -> np.ndarray:
    """Render an SVG document to (size, size, 4) uint8 RGBA with straight alpha."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png)), formats=("PNG",)).convert("RGBA"))
    if pixels.shape != (size, size, 4):
        raise ValueError(f"rendered to {pixels.shape}, expected {(size, size, 4)}")
    return pixels


def _render_job(job: tuple[str, int]) -> np.ndarray:
    return render_svg(*job)


def plain_label(text: str) -> str:
    """Return a label or tag as captions write it: lower case, ASCII, no colons, quotation marks or commas."""
    text = unicodedata.normalize("NFKD", text.lower().replace("’", "'")).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^a-z0-9'&+.\-]+", " ", text).split())


class LabelTable:
    """Emojibase's labels and tags, looked up by an icon's name.

    A name is resolved to code points by the icon sets' own tables; failing that, by the label's spelling.
    """

    def __init__(self, entries: Iterable[dict[str, Any]], names_by_code: Iterable[dict[str, str]]) -> None:
        entries = list(entries)
        self._by_code = {_code(entry["hexcode"]): entry for entry in entries}
        self._by_slug = {_slug(entry["label"]): entry for entry in entries}
        self._code_of: dict[str, str] = {}
        for table in names_by_code:  # the first set that has a name decides
            for code, name in table.items():
                if _code(code) in self._by_code:
                    self._code_of.setdefault(name, _code(code))

    def find(self, name: str) -> tuple[str | None, tuple[str, ...]]:
        """Return (label, tags) of an icon's name, or (None, ()) if it is unknown."""
        entry = self._by_code.get(self._code_of.get(name, "")) or self._by_slug.get(_slug(name))
        if entry is None:
            return None, ()
        tags = dict.fromkeys(plain_label(tag) for tag in entry.get("tags", ()))
        return plain_label(entry["label"]), tuple(tag for tag in tags if len(tag) > 1)


def _code(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", plain_label(label).replace("'", "")).strip("-")


def build_emoji(
    out: str | Path = "data/emoji", size: int = 128, *, workers: int | None = None, progress: bool = False
) -> dict[str, Any]:
    """Fetch, render and write the data set.

    Files are written under a temporary name and renamed, the manifest last: a folder with a manifest is
    complete.

    Args:
        out: The folder to write; tarballs are kept in ``<out>-packages``. Default: "data/emoji".
        size: Side of the images in pixels, even and at least 8. Default: 128.
        workers: Number of processes; None for one per core. Default: None.
        progress: Whether to show a progress bar. Default: False.

    Returns:
        The manifest.

    Raises:
        ValueError: For an impossible size, or a tarball that is not the pinned one.
    """
    if size < 8 or size % 2:
        raise ValueError(f"size {size}: expected an even number of pixels, at least 8")
    out = Path(out)
    cache = out.with_name(out.name + "-packages")
    tarballs = {style: fetch(package, cache) for style, package in ICONS.items()}
    labels = LabelTable(
        read_tarball_json(fetch(LABEL_PACKAGE, cache), "en/data.json"),
        (read_tarball_json(path, "chars.json") for path in tarballs.values()),
    )
    rows, documents = [], []
    for style, tarball in tarballs.items():
        for name, svg in kept_icons(read_tarball_json(tarball, "icons.json")).items():
            label, tags = labels.find(name)
            rows.append(
                ImageRecord(
                    name=name, style=style, label=label, tags=tags, held_out=held_out_image(name, style)
                )
            )
            documents.append(svg)
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    shape = (len(rows), size, size, 4)
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(_render_job, ((svg, size) for svg in documents), chunksize=32)
        bar = progress_bar(len(documents), progress, iterable=results, desc="rendering")
        write_array(out / IMAGES_FILE, shape, np.uint8, (image[None] for image in bar))
    _write_json(out / INDEX_FILE, [asdict(row) for row in rows])
    manifest = _manifest(rows, shape, out)
    _write_json(out / MANIFEST_FILE, manifest)
    return manifest


def _manifest(rows: list[ImageRecord], shape: tuple[int, ...], out: Path) -> dict[str, Any]:
    import resvg_py

    return {
        "packages": {
            key: {
                "name": package.name,
                "version": package.version,
                "sha256": package.sha256,
                "licence": package.licence,
            }
            for key, package in (*ICONS.items(), ("labels", LABEL_PACKAGE))
        },
        "renderer": f"resvg {resvg_py.__resvg_version__}",
        "shape": list(shape),
        "alpha": "straight",
        "counts": {style: sum(row.style == style for row in rows) for style in ICONS},
        "held_out": sum(row.held_out for row in rows),
        "labelled": sum(row.label is not None for row in rows),
        "sha256": {name: sha256(out / name) for name in (IMAGES_FILE, INDEX_FILE)},
    }


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def build_command(arguments: list[str] | None = None) -> None:
    """Run the builder's command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ldm.data.emoji", description="Fetch, render and index the emoji data set."
    )
    parser.add_argument("--out", default="data/emoji", help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=128, help="side of the images in pixels (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    manifest = build_emoji(options.out, options.size, workers=options.workers, progress=True)
    counts = ", ".join(f"{count} {style}" for style, count in manifest["counts"].items())
    print(
        f"{options.out}: {manifest['shape'][0]} images ({counts}), {manifest['held_out']} held out,"
        f" {manifest['labelled']} with a label"
    )


if __name__ == "__main__":
    build_command()
