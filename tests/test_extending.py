"""The files of docs/extending.md, run as a user runs them: a file in the folder where one stands, and a command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text()
FILES = {name: code for code, name in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", PAGE, re.DOTALL)}
SMALL = ["--max_steps", "2", "--num_iterations", "2", "--num_eval_problems", "8", "--report_to", "none"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("my_losses.py", ["--objective", "my_losses:reinforce", "--objective_kwargs", '{"scale": 2.0}']),
        ("my_policy.py", ["--sampler_policy", "my_policy:second_thoughts"]),
        ("my_policy.py", ["--sampler_policy", "my_policy:edit"]),
    ],
)
def test_a_file_of_the_page_trains(tmp_path, file, settings):
    (tmp_path / file).write_text(FILES[file])
    command = [sys.executable, "-m", "dgrpo", "train", "gsm8k", *SMALL, *settings, "--output_dir", "run"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/summary.json").exists()
    if file == "my_losses.py":
        assert "log_likelihood" in (tmp_path / "run/metrics.csv").read_text()


def test_examples_are_short():
    assert {"capitals.py", "my_losses.py", "my_policy.py"} <= set(FILES)
    assert all(len(code.splitlines()) <= 25 for name, code in FILES.items())
