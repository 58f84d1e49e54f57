"""Check the notebooks: they run from top to bottom in a clean folder, and their kept outputs are complete.

Those that train do so for a fiftieth of their minutes here; `python notebooks/run.py` executes them in full.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
import nbformat  # noqa: E402
from run import execute, notebooks  # noqa: E402

FOLDER = Path(__file__).parents[1] / "notebooks"

SHORT = {"LDM_NOTEBOOK_MINUTES": "0.02"}


def image_counts(notebook):
    """Return the number of images in the outputs of each cell."""
    return [
        sum(
            bool({"image/png", "image/jpeg"} & {*output.get("data", {})})
            for output in cell.get("outputs", [])
        )
        for cell in notebook.cells
    ]


def test_they_are_numbered():
    numbers = [int(path.name[:2]) for path in notebooks()]
    assert numbers == sorted(set(numbers)) and set(range(1, 11)) <= set(numbers)


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_in_a_clean_folder(path, tmp_path):
    made = execute(path, tmp_path, timeout=900, environment=SHORT)
    assert sum(image_counts(made)) > 0
    kept = nbformat.read(path, as_version=4)
    assert [cell.source for cell in made.cells] == [cell.source for cell in kept.cells]
    assert image_counts(made) == image_counts(kept), "run python notebooks/run.py to keep its outputs"


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_outputs_small_enough_to_be_read_in_a_browser(path):
    kept = nbformat.read(path, as_version=4)
    nbformat.validate(kept)
    assert path.stat().st_size <= 500_000
    cells = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(
        output.output_type == "error" or output.get("name") == "stderr"
        for cell in cells
        for output in cell.outputs
    )
    assert kept.cells[0].cell_type == "markdown" and "?" in kept.cells[0].source  # the question


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_a_notebook_imports_the_library_and_redefines_nothing_of_it(path):
    source = "\n".join(
        cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
    )
    assert "import ldm\n" in source and "class " not in source and "http" not in source
