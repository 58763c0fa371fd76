"""Code in README, CONTRIBUTING and docs runs as it stands, and the commands name files that exist."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_readme_code_samples_and_scores(capsys):
    exec(blocks("README.md")[1], {})
    text, score = capsys.readouterr().out.rsplit(maxsplit=1)
    assert "<answer>" in text
    assert float(score) < 0


def test_contributing_estimator_is_an_estimator(rollout):
    from dgrpo.views import draw_views

    namespace: dict = {}
    exec(blocks("CONTRIBUTING.md")[0], namespace)
    hidden, weights = draw_views(namespace["half_hidden"], rollout, rollout.group, ("key", 0), 2)
    assert hidden.shape == (6, 2, 1, 11)
    assert (hidden[..., -5:].sum(-1) == 2).all()
    assert torch.equal(weights != 0, hidden[..., -5:] & rollout.completion_mask[:, None, None])


def test_commands_name_files_that_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    for path in set(re.findall(r"\b(?:recipes|dgrpo|docs|benchmarks|tests)/[\w/.]+\.(?:py|yaml|md)", text)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_the_code_of_a_page_runs(page):
    namespace: dict = {}
    for block in blocks(f"docs/{page}"):
        exec(block, namespace)


def test_the_table_of_rewards_is_whole_and_names_their_columns():
    from dgrpo.trainers.rewards import required_columns

    written = re.findall(
        r"^\| `(rewards\.\w+:\w+)` \| [^|]+ \| ([^|]*)\|", (ROOT / "docs/rewards.md").read_text(), re.M
    )
    found = {}
    for path in (ROOT / "rewards").glob("[!_]*.py"):
        module = importlib.import_module(f"rewards.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.endswith("_reward") and function.__module__ == module.__name__:
                found[f"rewards.{path.stem}:{name}"] = required_columns(function)
    assert {name: re.findall(r"`(\w+)`", columns) for name, columns in written} == found


@pytest.mark.slow
def test_readme_reward_trains_and_an_exception_in_it_does_not_end_the_run(tmp_path):
    code = blocks("README.md")[0]
    (tmp_path / "my_rewards.py").write_text(
        code + "\n\ncalls = []\n\ndef moody(prompts, completions, **columns):\n    calls.append(1)\n"
        "    if len(calls) == 1:\n        raise RuntimeError('a bad day')\n    return [0.0] * len(prompts)\n"
    )
    command = [
        sys.executable, str(ROOT / "recipes/gsm8k.py"), "--max_steps", "3", "--num_iterations", "1",
        "--per_device_train_batch_size", "16", "--num_eval_problems", "16", "--evaluate_every", "0",
        "--output_dir", str(tmp_path / "run"),
        "--reward_funcs", "my_rewards:short_reasoning", "my_rewards:moody", "--reward_weights", "1", "1",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "a bad day" in done.stderr + done.stdout
    assert (tmp_path / "run/summary.json").exists()
