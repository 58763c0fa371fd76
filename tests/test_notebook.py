"""The notebook: its code runs from the first cell to the last, and the policy is better at the end."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "first_run.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cells(replaced: dict[str, str]) -> dict:
    namespace: dict = {}
    for cell in code_cells():
        for old, new in replaced.items():
            cell = cell.replace(old, new)
        exec(compile(cell, NOTEBOOK.name, "exec"), namespace)
    return namespace


def test_the_notebook_is_stored_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], len({cell["id"] for cell in notebook["cells"]})) == (4, len(notebook["cells"]))
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """With one update in place of sixteen, and few problems."""
    monkeypatch.chdir(tmp_path)
    few = {"max_steps=16": "max_steps=1", "per_device_train_batch_size=128": "per_device_train_batch_size=16"}
    assert all(any(old in cell for cell in code_cells()) for old in few)
    namespace = run_cells(few | {"num_held_out=128": "num_held_out=24", "num_train=512": "num_train=32"})
    shown = capsys.readouterr().out
    assert namespace["trainer"].state.global_step == 1
    assert namespace["rollout"].num_steps == 8
    assert [line.split(":")[0].strip() for line in shown.splitlines() if " right (" in line] == ["before", "after"]
    assert shown.count("·") > 16 * 3, "the views show what is hidden"


@pytest.mark.slow
def test_the_notebook_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run_cells({})
    before, after = namespace["before"], namespace["after"]
    assert after.accuracy - before.accuracy > 0.1
    assert sum(after.reasons) > sum(before.reasons)
