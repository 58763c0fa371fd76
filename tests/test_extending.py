"""The files of docs/extending.md, run as a user runs them: a file in the folder where one stands, and a command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text()
FILES = {name: code for code, name in re.findall(r"```\w+\n(# (\w+\.\w+)\n.*?)```", PAGE, re.DOTALL)}
TRAIN = ["-m", "dgrpo", "train", "gsm8k"]
SMALL = ["--max_steps", "2", "--num_iterations", "2", "--num_eval_problems", "8", "--report_to", "none"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["capitals.py"],
        ["my_engine.py", "--config", str(RECIPES / "gsm8k.yaml"), *SMALL],
        [*TRAIN, *SMALL, "--estimator", "my_estimators:two_halves", "--p_mask_prompt", "0"],
        [*TRAIN, *SMALL, "--objective", "my_losses:reinforce", "--objective_kwargs", '{"scale": 2.0}'],
        [*TRAIN, *SMALL, "--sampler_policy", "my_policy:second_thoughts"],
        [*TRAIN, *SMALL, "--sampler_policy", "my_policy:edit"],
    ],
    ids=lambda command: next(part for part in [*command[2:], command[0]] if "my_" in part or "capitals" in part),
)
def test_an_example_of_the_page_trains(tmp_path, command):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, *command, "--output_dir", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPES.parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] > 0
    assert ("log_likelihood" in (tmp_path / "run/metrics.csv").read_text()) == ("my_losses:reinforce" in command)


def test_examples_are_short():
    examples = {"capitals", "my_engine", "my_estimators", "my_losses", "my_policy"}
    assert examples == {Path(name).stem for name in FILES}
    assert all(len(code.splitlines()) <= 25 for name, code in FILES.items())
