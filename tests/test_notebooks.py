"""The notebooks of the documentation: they run, and the outputs that they store are current."""

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 300_000


def outputs(notebook: Any) -> list[tuple[str, set[str]]]:
    """Return the first line of each code cell with the kinds of its outputs, without warnings."""
    return [
        (
            cell.source.partition("\n")[0],
            {
                kind
                for output in cell.outputs
                for kind in output.get("data", [output.get("name", output.output_type)])
            }
            - {"stderr"},
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_the_notebooks_are_small_and_have_their_outputs() -> None:
    """Both notebooks are stored with outputs, as the site shows them; together under 300 kB."""
    assert [path.name for path in NOTEBOOKS] == ["own_loop.ipynb", "tutorial.ipynb"]
    assert sum(path.stat().st_size for path in NOTEBOOKS) < MAX_BYTES
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert any("image/png" in kinds for _, kinds in outputs(notebook))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells run without an error, and their outputs are of the stored kinds."""
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    scripts = os.path.dirname(sys.executable)
    monkeypatch.setenv("PATH", os.pathsep.join([scripts, os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    stored = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    assert outputs(notebook) == outputs(stored)
