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
import torch
from trainers import lora, place_in_group

from dgrpo.reliability.columns import check_columns
from dgrpo.reliability.rewards import guarded
from dgrpo.trainers.plugins import REWARD_GROUP, resolve_reward

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


LOSSES = '''
from dgrpo import estimators


def above_the_mean(batch, *, beta=0.0, power=1.0):
    """Likelihood of the rollouts better than their group's mean, and a pull to the reference (beta of the config)."""
    better = batch.advantages.clamp(min=0) ** power
    loss = -(better * batch.logps.sum(1) / batch.lengths).mean()
    pull = (batch.logps - batch.ref_logps).sum(1).square().mean()
    return loss + beta * pull, {"better": better.mean(), "pull": pull.detach()}


above_the_mean.old_policy = None


def two_draws(rollout, *, generator):
    return estimators.elbo(rollout, generator=generator, num_samples=2)


two_draws.draws = True
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
    (folder / "own_losses.py").write_text(LOSSES)
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
        ("own_rewards:no_such", "has no 'no_such'"),
        ("own_rewards:constant", "has no function 'constant'"),
        ("own_rewards:", "has no ''"),
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


def test_an_objective_of_ones_own_by_its_path_trains_with_its_settings(path, trainer):
    settings = {"objective": "own_losses:above_the_mean", "objective_kwargs": {"power": 2.0}, "beta": 0.01}
    run, scored = trainer(reward=place_in_group, lora=lora(), learning_rate=1e-2, **settings), []
    run._logps_of_draws = (lambda inner: lambda *given: scored.append(given[0]) or inner(*given))(run._logps_of_draws)
    start = [each.clone() for each in run.model.parameters()]
    run.train()
    assert len(scored) == 2, "the reference of each rollout; no old policy"
    rows = [row for row in run.state.log_history if "better" in row]
    # Rewards 0 to 3/4 in a group: above their mean are 1/8 and 3/8.
    assert rows[0]["better"] == pytest.approx((1 / 64 + 9 / 64) / 4)
    assert all(row["pull"] > 0 for row in rows)
    assert any(not torch.equal(old, new) for old, new in zip(start, run.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="above_the_mean has no pwer; its settings are power"):
        trainer(**settings | {"objective_kwargs": {"pwer": 2.0}})
    with pytest.raises(ValueError, match="beta is a setting beside objective_kwargs"):
        trainer(**settings | {"objective_kwargs": {"beta": 2.0}})
    with pytest.raises(ValueError, match="delta=2.0: objective='own_losses:above_the_mean' does not read it"):
        trainer(**settings | {"delta": 2.0})
    with pytest.raises(ValueError, match="kl='exact': objective='own_losses:above_the_mean' does not read it"):
        trainer(**settings | {"kl": "exact"})


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_estimator_of_ones_own_that_draws_is_refused_with_a_tokens_ratio_alone(path, config, level):
    own = {"estimator": "own_losses:two_draws"}
    config(objective="spg", **own)
    for estimator in (own, {"estimator": "elbo"}):
        if level == "token":
            with pytest.raises(ValueError, match="whose ratio makes sense per sequence only"):
                config(importance_sampling_level=level, **estimator)
        else:
            config(importance_sampling_level=level, **estimator)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        "objective: own_losses:above_the_mean\nbeta: 0.01\n",
        "objective: spg\nestimator: own_losses:two_draws\nbeta: 0.0\n",
    ],
    ids=["objective", "estimator"],
)
def test_a_preset_names_a_file_of_ones_own(installed, tmp_path, settings):
    (tmp_path / "mine.yaml").write_text(settings)
    command = [
        sys.executable, "-m", "dgrpo", "train", "gsm8k", "--preset", str(tmp_path / "mine.yaml"), "--max_steps", "2",
        "--per_device_train_batch_size", "16", "--num_eval_problems", "8", "--evaluate_every", "0",
        "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    python_path = f"{installed}{os.pathsep}{ROOT}"
    environment = os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        name = "better" if "above" in settings else "elbo"
        assert len([row for row in csv.DictReader(file) if row.get(name)]) == 2
