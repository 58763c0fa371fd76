"""Killing: a run that is killed again and again, wherever it happens to be, ends as the one that was not."""

import csv
import json
import random
from pathlib import Path

import pandas as pd
import pytest
import torch
from warm import Warm

STEPS = 12
SETTINGS = {
    "max_steps": STEPS,
    "num_iterations": 4,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    # Two rollouts an epoch, so that epochs end within the run.
    "num_train_problems": 8,
    "num_eval_problems": 8,
    "evaluate_every": 5,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "resume": "true",
}

# Where a run is killed. Calls are counted from each start, so that every machine kills at the same moments; the seeded
# numbers make them moments of no special kind. A run makes about 2,700,000 calls of Python functions.
PLACES = {
    "in a rollout": {"call": "dgrpo.models.llada:LLaDAModelLM.forward", "when": "before", "nth": (60, 90)},
    "in an inner update": {"call": "accelerate:Accelerator.backward", "when": "after", "nth": (2, 5)},
    "in a reward": {"call": "rewards.gsm8k:correctness_reward", "when": "before", "nth": (1, 1)},
    "in an optimizer's step": {"call": "torch.optim:AdamW.step", "when": "after", "nth": (2, 4)},
    "writing the adapter": {"call": "peft.peft_model:safe_save_file", "when": "half", "nth": (2, 3)},
    "writing the optimizer or the rollout": {"call": "torch:save", "when": "half", "nth": (8, 15)},
    "writing the trainer's state": {
        "call": "transformers:TrainerState.save_to_json",
        "when": "half",
        "nth": (2, 3),
    },
    "before a checkpoint has its name": {"call": "pathlib:Path.rename", "when": "before", "nth": (1, 3)},
    "after a checkpoint has its name": {"call": "pathlib:Path.rename", "when": "after", "nth": (1, 3)},
    "deleting an old checkpoint": {"call": "shutil:rmtree", "when": "before", "nth": (6, 12)},
    "writing metrics.csv": {"call": "pathlib:Path.replace", "when": "before", "nth": (1, 3)},
    "writing completions": {"call": "pandas:DataFrame.to_parquet", "when": "half", "nth": (1, 2)},
}
ANYWHERE = {"call": "*", "nth": (100_000, 2_000_000)}


def arguments(folder: Path, **settings) -> list[str]:
    return [word for name, value in (SETTINGS | settings).items() for word in (f"--{name}", str(value))] + [
        "--output_dir",
        str(folder),
    ]


@pytest.fixture(scope="module")
def warm():
    process = Warm()
    yield process
    process.close()


def without_timings(row: dict) -> dict:
    return {k: v for k, v in row.items() if not any(word in k for word in ("time", "second"))}


def same(left, right) -> bool:
    """Equality to the bit of nested lists, mappings, tensors and numbers; NaN equals itself."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return repr(left) == repr(right)


def differences(one: Path, other: Path, last: int) -> list[str]:
    """What a run left behind that is not equal to the bit in another folder."""
    found = []
    checkpoint = f"checkpoint-{last}"
    files = {path.relative_to(one / checkpoint) for path in (one / checkpoint).rglob("*") if path.is_file()}
    compared = 0
    for name in sorted(files):
        left, right = one / checkpoint / name, other / checkpoint / name
        if not right.exists():
            found.append(f"{name} is missing")
        elif name.suffix == ".safetensors":
            found += [] if left.read_bytes() == right.read_bytes() else [str(name)]
            compared += 1
        elif name.suffix in (".pt", ".pth"):
            states = [torch.load(path, weights_only=False, map_location="cpu") for path in (left, right)]
            for state in states:
                if "metrics" in state:
                    state["metrics"] = without_timings(state["metrics"])
            found += [] if same(*states) else [str(name)]
            compared += 1
    assert compared >= 4, "adapter, optimizer, random states, rollout"
    histories = [json.loads((path / checkpoint / "trainer_state.json").read_text()) for path in (one, other)]
    rows = [[without_timings(row) for row in state["log_history"]] for state in histories]
    found += [] if same(*rows) else ["log_history"]
    tables = []
    for path in (one, other):
        with open(path / "metrics.csv", newline="") as file:
            tables.append([without_timings(row) for row in csv.DictReader(file)])
    found += [] if same(*tables) else ["metrics.csv"]
    for path in sorted((one / "completions").glob("*.parquet")):
        if not pd.read_parquet(path).equals(pd.read_parquet(other / "completions" / path.name)):
            found.append(path.name)
    for path in ("adapter_model.safetensors", "best/adapter_model.safetensors", "best/best.json"):
        found += [] if (one / path).read_bytes() == (other / path).read_bytes() else [path]
    return found


def test_the_comparison_sees_a_difference(tmp_path):
    assert same({"a": [torch.ones(2), float("nan")]}, {"a": [torch.ones(2), float("nan")]})
    assert not same([torch.ones(2)], [torch.ones(2) + 1e-7])
    assert not same({"a": 1.0}, {"a": 1.0 + 1e-15})
    assert without_timings({"step": 1, "time/rollout": 2, "tokens_per_second": 3, "step_time": 4}) == {"step": 1}


@pytest.mark.slow
def test_runs_killed_at_twenty_moments_end_bit_equal(warm, tmp_path):
    rng = random.Random(0)
    straight = warm.run(tmp_path / "straight.log", arguments(tmp_path / "straight"))
    assert straight.codes == [0], straight.output[-3000:]
    moments = [place | {"nth": rng.randint(*place["nth"])} for place in [*PLACES.values(), *[ANYWHERE] * 8]]
    rng.shuffle(moments)
    # One run is killed and resumed until it comes to its end, then the next one.
    started, runs = 0, [tmp_path / "cut_0"]
    while moments or not (runs[-1] / "summary.json").exists():
        started += 1
        done = warm.run(tmp_path / f"{started}.log", arguments(runs[-1]), faults=moments[-1:])
        assert done.codes in ([-9], [0]), done.output[-3000:]
        if done.codes == [-9]:
            moments.pop()
        elif moments:
            # What was left of this run did not reach the moment: a whole one does.
            runs.append(tmp_path / f"cut_{len(runs)}")
    assert started == 20 + len(runs)
    for run in runs:
        assert differences(tmp_path / "straight", run, STEPS) == []
        assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-11", "checkpoint-12"]
        assert not (run / "unfinished").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("config", "kind"), [("ddp", "MULTI_CPU"), ("zero2", "DEEPSPEED")])
def test_two_processes_killed_end_bit_equal(warm, tmp_path, config, kind):
    fewer = {"max_steps": 6, "num_iterations": 2, "evaluate_every": 3}
    straight = warm.run(tmp_path / "straight.log", arguments(tmp_path / "straight", **fewer), config=config)
    assert straight.codes == [0, 0], straight.output[-3000:]
    summary = json.loads((tmp_path / "straight/summary.json").read_text())
    assert (summary["num_processes"], summary["distributed_type"]) == (2, kind)
    moments = [
        PLACES["in a rollout"] | {"nth": 20},
        PLACES["writing the optimizer or the rollout"] | {"nth": 9, "rank": 1},
        PLACES["after a checkpoint has its name"] | {"nth": 2},
        PLACES["in an inner update"] | {"nth": 1, "rank": 1},
    ]
    for number, moment in enumerate(moments):
        done = warm.run(
            tmp_path / f"{number}.log", arguments(tmp_path / "cut", **fewer), config=config, faults=[moment]
        )
        # The other process may see the connection break before it is killed as well.
        assert -9 in done.codes, done.output[-3000:]
        assert 0 not in done.codes, done.output[-3000:]
    last = warm.run(tmp_path / "last.log", arguments(tmp_path / "cut", **fewer), config=config)
    assert last.codes == [0, 0], last.output[-3000:]
    assert differences(tmp_path / "straight", tmp_path / "cut", 6) == []
