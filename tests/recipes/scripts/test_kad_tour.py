"""The notebook runs from top to bottom, and prints what it shows where it is read without being run.

`PYTHONPATH=tests python tests/recipes/scripts/test_kad_tour.py recipes/kad_tour.ipynb` runs it and keeps what
it prints.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.version import Version
from run_command import SECONDS
from versions import PEFT

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
NOTEBOOK = RECIPES / "kad_tour.ipynb"
SKIPPED = "skip-execution"  # the tag by which nbclient knows a cell that it does not run


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def run(folder):
    """The notebook after a run in a folder that has the tiny pair, as the folder of the recipes has it."""
    (folder / "tiny_pair").symlink_to(RECIPES / "tiny_pair")
    notebook = read()
    client = NotebookClient(
        notebook, timeout=SECONDS, startup_timeout=SECONDS, resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def printed(cell):
    """What a cell printed. Errors and warnings, on standard error, are no part of it."""
    return "".join(output.text for output in cell.get("outputs", ()) if output.get("name") == "stdout")


@pytest.mark.slow
def test_the_notebook_prints_what_is_kept_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = run(tmp_path)
    assert [printed(cell) for cell in done.cells] == [printed(cell) for cell in read().cells]
    outputs = [output for cell in done.cells for output in cell.get("outputs", ())]
    complaints = [output.text for output in outputs if output.get("name") == "stderr"]
    known = ["TqdmWarning"]  # tqdm asks for the widgets of notebooks
    if Version("0.21") > PEFT:
        known.append("Unexpected keyword arguments ['kasa_config']")  # the adapter was saved by a later peft
    assert [text for text in complaints if not any(message in text for message in known)] == []
    (shown,) = done.cells[-1].outputs
    assert "<iframe" in shown["data"]["text/html"]
    assert "<html" in (tmp_path / "trace.html").read_text()
    installing = next(cell for cell in done.cells if "%pip" in cell.source)
    assert (installing.outputs, installing.execution_count) == ([], None)


def test_it_has_ten_cells_from_the_installation_to_the_trace_page():
    notebook = read()
    nbformat.validate(notebook)
    assert len(notebook.cells) == 10
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert codes[0].source.startswith("%pip install")
    assert [SKIPPED in cell.metadata.get("tags", ()) for cell in codes] == [True] + [False] * (len(codes) - 1)
    assert codes[-1].source.endswith("kad.trace")


def test_nothing_but_what_was_printed_is_kept():
    for cell in read().cells:
        outputs = cell.get("outputs", [])
        assert [output.name for output in outputs] == ["stdout"] * len(outputs)
        assert len(outputs) <= 1
        assert cell.get("execution_count") is None
    kept = [bool(printed(cell)) for cell in read().cells if cell.cell_type == "code"]
    assert kept == [False, *[True] * (len(kept) - 2), False]  # the installation and the trace page print nothing


def keep_what_is_printed():
    """Run the notebook, and keep what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        done = run(Path(folder))
    notebook = read()
    for cell, run_cell in zip(notebook.cells, done.cells, strict=True):
        if cell.cell_type == "code":
            text = printed(run_cell)
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    assert Path(sys.argv[1]).resolve() == NOTEBOOK, f"the notebook is {NOTEBOOK}, got {sys.argv[1]}"
    keep_what_is_printed()
