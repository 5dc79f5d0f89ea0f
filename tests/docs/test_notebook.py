"""docs/quickstart.ipynb runs, and says what its committed outputs say.

python -m tests.docs.test_notebook    # runs it and writes the outputs
"""

import os
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from tests.docs.blocks import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def executed(path: Path) -> Any:
    """The notebook with new outputs, run in docs/ by a kernel of this interpreter."""
    notebook = nbformat.read(path, as_version=4)
    # A process of its own: it takes the checkout from here, and compiles as a user's would.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore:IProgress"}  # tqdm misses ipywidgets
    environment.pop("XLA_FLAGS", None)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran
    return notebook


def outputs(notebook: Any) -> list[str]:
    """What each code cell printed; "image" for a picture."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert all(output.get("name", "stdout") == "stdout" for output in cell.outputs), cell.outputs
            found.append("".join(output.get("text", "image") for output in cell.outputs))
    return found


@pytest.mark.proof
def test_the_notebook_runs_to_its_committed_outputs():
    assert outputs(executed(NOTEBOOK)) == outputs(nbformat.read(NOTEBOOK, as_version=4))


def test_every_cell_of_the_committed_notebook_was_run_in_order():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(cell.outputs for cell in cells)
    assert NOTEBOOK.stat().st_size < 200_000


if __name__ == "__main__":
    nbformat.write(executed(NOTEBOOK), NOTEBOOK)
