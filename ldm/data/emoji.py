"""The builder of the emoji data set: ``python -m ldm.data.emoji [--out data/emoji] [--size 128]``.

Pinned npm packages provide the images of seven sets as SVG, and labels and tags. Files written:

- ``pictures.npy``: uint8 (N, size, size, 4), RGBA with straight (not premultiplied) alpha;
- ``index.json``: one row for each image, in the same order;
- ``manifest.json``: packages, renderer, counts and hashes.
"""

from __future__ import annotations

import argparse
import io
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.held_out import held_out_image
from ldm.data.index import IMAGES_FILE, INDEX_FILE, MANIFEST_FILE, ImageRecord
from ldm.data.names import MISNAMED, IconSet, LabelTable, unify_names
from ldm.data.packages import ICONS, LABEL_PACKAGE, fetch, read_tarball_json
from ldm.data.recolouring import takes_colour
from ldm.support.arrays import write_array
from ldm.support.files import temporary_folder, write_atomically
from ldm.support.progress import progress_bar
from ldm.weights.formats.safetensors import sha256

LEAST_CONTRAST = 12  # of an image on white, RMS of 255 levels


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


def build_emoji(
    out: str | Path = "data/emoji", size: int = 128, *, workers: int | None = None, progress: bool = False
) -> dict[str, Any]:
    """Fetch, render and write the data set.

    Icons that cannot be seen on white are left out. Files are written under a temporary name and renamed,
    the manifest last: a folder with a manifest is complete.

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
    codes = {style: read_tarball_json(path, "chars.json") for style, path in tarballs.items()}
    labels = LabelTable(read_tarball_json(fetch(LABEL_PACKAGE, cache), "en/data.json"), codes.values())
    sets = {
        style: IconSet.read(
            read_tarball_json(path, "icons.json"), codes[style], MISNAMED.get(style, frozenset())
        )
        for style, path in tarballs.items()
    }
    rows, documents = [], []
    for style, icons in unify_names(sets).items():
        for name, icon in icons.items():
            label, tags = labels.find(name)
            held_out = held_out_image(name, style)
            rows.append(ImageRecord(name=name, style=style, label=label, tags=tags, held_out=held_out))
            documents.append(sets[style].documents[icon])
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    with temporary_folder(out) as folder:
        images = _render_all(documents, size, folder / IMAGES_FILE, workers, progress)
        seen = [i for i, image in enumerate(images) if is_visible(image)]
        shape = (len(seen), size, size, 4)
        write_array(out / IMAGES_FILE, shape, np.uint8, (images[i : i + 1] for i in seen))
        rows = [replace(rows[i], tints=takes_colour(images[i])) for i in seen]
        del images  # the file is removed
    _write_json(out / INDEX_FILE, [asdict(row) for row in rows])
    manifest = _manifest(rows, shape, out)
    _write_json(out / MANIFEST_FILE, manifest)
    return manifest


def _render_all(
    documents: list[str], size: int, path: Path, workers: int | None, progress: bool
) -> np.ndarray:
    """Render SVG documents into a file; return it memory-mapped, (N, size, size, 4) uint8."""
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(_render_job, ((svg, size) for svg in documents), chunksize=32)
        bar = progress_bar(len(documents), progress, iterable=results, desc="rendering")
        shape = (len(documents), size, size, 4)
        write_array(path, shape, np.uint8, (image[None] for image in bar))
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def is_visible(image: np.ndarray) -> bool:
    """Return whether an image (H, W, 4) uint8 RGBA can be seen on white.

    The contrast of a pixel is the largest difference of a channel from white, 0 to 255; its RMS over the
    image must be at least 12.
    """
    contrast = (255.0 - image[..., :3].min(axis=-1)) * (image[..., 3] / 255)
    return bool(np.sqrt(np.square(contrast).mean()) >= LEAST_CONTRAST)


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
