"""Every notebook runs from top to bottom in a fresh kernel."""

import os
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
OPTIMISED = {"04_features_and_advice", "05_knowledge"}
"""These compute more than they compile, and are compiled as users have them, not as conftest.py asks for. They take
minutes, and run with the long cases."""
PATHS = sorted(FOLDER.glob("*.ipynb"))


# The kernel's own messaging library warns about its transport; that is not about the notebook.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path.stem in OPTIMISED else [], id=path.stem) for path in PATHS],
)
def test_notebook_runs(path, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, **({"XLA_FLAGS": ""} if path.stem in OPTIMISED else {})}
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute(env=environment)
    failed = [o for cell in notebook.cells for o in cell.get("outputs", []) if o["output_type"] == "error"]
    assert not failed and any(cell.get("outputs") for cell in notebook.cells)
