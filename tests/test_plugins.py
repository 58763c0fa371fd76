"""Rewards of the user's own: by module and function, or by the name that an installed package gives; sync or async."""

import asyncio
import csv
import functools
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dgrpo.trainers.plugins import REWARD_GROUP, resolve_reward
from dgrpo.trainers.rewards import check_columns, guarded

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/reward_package"

OWN = '''
import asyncio

constant = 1.0


async def patient_reward(prompts, completions, question, **columns):
    """1.0 for all, after a rest."""
    await asyncio.sleep(0.01)
    return [1.0 for _ in completions]


def broken_reward(prompts, completions, **columns):
    raise RuntimeError("a bad day")


class Threshold:
    def __call__(self, prompts, completions, level, **columns):
        return [float(len(completion) > level[0]) for completion in completions]


threshold = Threshold()
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the example package installed, and a module beside it."""
    folder = tmp_path_factory.mktemp("site")
    # Built from a copy: a build leaves files behind.
    source = tmp_path_factory.mktemp("source")
    for file in EXAMPLE.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder), str(source)], check=True, timeout=300)
    (folder / "own_rewards.py").write_text(OWN)
    return folder


@pytest.fixture
def path(installed, monkeypatch):
    monkeypatch.syspath_prepend(str(installed))
    return installed


def answers(*texts):
    return [[{"role": "assistant", "content": f"<answer>{text}</answer>"}] for text in texts]


def test_a_package_offers_its_reward_by_name(path):
    reward = resolve_reward("brevity")
    assert reward.__module__ == "brevity_reward"
    long = f"{'so ' * 200}<answer>7</answer>"
    completions = [*answers("7", "8", "7"), [{"role": "assistant", "content": long}]]
    assert reward(prompts=[""] * 4, completions=completions, answer=["7", "7", None, "7"]) == [1.0, 0.0, None, 0.5]
    with pytest.raises(ValueError, match=r"brevity_reward asks for the columns \['answer'\]"):
        check_columns([reward], ["question", "prompt"])
    check_columns([reward], ["question", "prompt", "answer"])


def test_without_the_package_the_error_names_what_there_is(path, monkeypatch):
    with pytest.raises(ValueError, match=r"'brief' is no 'package.module:function' and not installed \(.*brevity"):
        resolve_reward("brief")
    monkeypatch.undo()
    assert "brevity" not in {point.name for point in importlib.metadata.entry_points(group=REWARD_GROUP)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:reward", "cannot import 'no_such_module'"),
        ("own_rewards:no_such", "has no function 'no_such'"),
        ("own_rewards:constant", "has no function 'constant'"),
        ("own_rewards:", "has no function ''"),
    ],
)
def test_a_name_without_a_function_is_refused(path, name, message):
    with pytest.raises(ValueError, match=f"reward_funcs: .*{message}"):
        resolve_reward(name)


def test_rewards_by_module_and_function(path):
    assert resolve_reward("own_rewards:broken_reward").__name__ == "broken_reward"
    from rewards.gsm8k import correctness_reward

    assert resolve_reward("rewards.gsm8k:correctness_reward") is correctness_reward


def test_a_missing_column_is_told_whatever_kind_of_callable_asks_for_it(path):
    threshold = resolve_reward("own_rewards:threshold")
    for reward in (threshold, resolve_reward("own_rewards:patient_reward")):
        with pytest.raises(ValueError, match="asks for the columns"):
            check_columns([reward], ["answer"])
    check_columns([functools.partial(threshold, level=[3])], ["answer"])


def test_an_async_reward_stays_async_and_keeps_its_columns(path):
    reward = guarded(resolve_reward("own_rewards:patient_reward"))
    assert asyncio.iscoroutinefunction(reward)
    assert asyncio.run(reward(prompts=["", ""], completions=["", ""], question=["", ""])) == [1.0, 1.0]


@pytest.mark.slow
def test_a_run_takes_rewards_of_every_kind_with_their_weights(installed, tmp_path):
    names = ["brevity", "own_rewards:patient_reward", "own_rewards:broken_reward"]
    command = [
        sys.executable, str(ROOT / "recipes/gsm8k.py"), "--max_steps", "2", "--num_iterations", "1",
        "--per_device_train_batch_size", "16", "--num_eval_problems", "8", "--evaluate_every", "0",
        "--output_dir", str(tmp_path), "--reward_funcs", *names, "--reward_weights", "0.5", "0.25", "1",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "a bad day" in done.stderr
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("reward")]
    assert len(rows) == 2
    for row in rows:
        brevity = float(row["rewards/brevity_reward/mean"])
        assert float(row["rewards/patient_reward/mean"]) == 1.0
        assert float(row["rewards/broken_reward/errors"]) == 1.0
        assert float(row["reward"]) == pytest.approx(0.5 * brevity + 0.25, abs=1e-5)
