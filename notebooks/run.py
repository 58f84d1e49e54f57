"""Execute the notebooks and keep their outputs in the files.

python notebooks/run.py        # all
python notebooks/run.py 01 07  # some
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from ldm.support.files import write_atomically

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
KERNEL = "ldm-notebooks"  # a kernel of this Python, whatever others are installed under the usual names


def notebooks() -> list[Path]:
    """Return the notebooks in order."""
    return sorted(FOLDER.glob("[0-9][0-9]-*.ipynb"))


def execute(
    path: Path, folder: Path, *, timeout: int = 600, environment: Mapping[str, str] | None = None
) -> Any:
    """Execute a notebook from top to bottom in a fresh kernel of this Python.

    Args:
        path: The notebook's file.
        folder: The kernel's working directory.
        timeout: Seconds that a cell may take. Default: 600.
        environment: Variables that the kernel has in addition to its parent's.

    Returns:
        The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raises an error.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as kernels:
        spec = Path(kernels) / "kernels" / KERNEL
        spec.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        own = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **(environment or {}),
        }
        (spec / "kernel.json").write_text(
            json.dumps({"argv": command, "display_name": KERNEL, "language": "python", "env": own}),
            encoding="utf-8",
        )
        before = os.environ.get("JUPYTER_PATH")
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [kernels, before]))
        try:
            place = {"metadata": {"path": str(folder)}}
            NotebookClient(
                notebook, timeout=timeout, kernel_name=KERNEL, resources=place, record_timing=False
            ).execute()
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def shrink(notebook: Any) -> None:
    """Compress the images in the outputs: plots as PNG with 256 colours, others as JPEG."""
    from PIL import Image, ImageChops, ImageStat

    for data in (output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" not in data:
            continue
        data.pop("image/jpeg", None)  # a PIL image represents itself as both
        image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])), formats=("PNG",)).convert("RGB")
        drawn = image.quantize(256, dither=Image.Dither.NONE)
        small = io.BytesIO()
        if max(ImageStat.Stat(ImageChops.difference(image, drawn.convert("RGB"))).rms) < 1.5:  # levels of 255
            drawn.save(small, "PNG", optimize=True)
            kind = "image/png"
        else:
            image.save(small, "JPEG", quality=85)
            kind = "image/jpeg"
        del data["image/png"]
        data[kind] = base64.b64encode(small.getvalue()).decode()


def main() -> None:
    """Execute the notebooks named and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="prefixes of names (default: all)")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds a cell may take")
    options = parser.parse_args()
    for path in notebooks():
        if options.names and not path.name.startswith(tuple(options.names)):
            continue
        start, computed = time.monotonic(), sum(os.times()[2:4])
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder), timeout=options.timeout)
        shrink(notebook)
        write_atomically(path, (nbformat.writes(notebook).rstrip("\n") + "\n").encode())
        spent = f"{time.monotonic() - start:.0f} s, processor {sum(os.times()[2:4]) - computed:.0f} s"
        print(f"{path.name}: {spent}, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
