"""Faults injected into a run: rewards, numbers, disk. What happens, and that nothing is lost."""

import asyncio
import errno
import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trainers import place_in_group, tiny_trainer
from transformers import TrainerState

from dgrpo.reliability import guards, manifest, rewards
from dgrpo.reliability.guards import CollapseGuard, cliffs
from dgrpo.reliability.manifest import refuse_to_mix_runs, resume_checkpoint, whole_checkpoints
from dgrpo.reliability.rewards import guarded

PROMPTS = ["a b", "c d e f", "g", "h i j", "k l m n o"]
ROWS = {"prompts": ["a", "b"], "completions": ["c", "d"]}


@pytest.fixture
def build(tmp_path):
    """A function (reward, **settings) -> trainer: two updates on each rollout, of two micro-batches."""

    def trainer(reward=place_in_group, **settings):
        defaults = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
        rows = Dataset.from_dict({"prompt": PROMPTS})
        folder = settings.pop("output_dir", tmp_path / "run")
        return tiny_trainer(folder, reward, dataset=rows, **(defaults | settings))

    return trainer


@pytest.fixture
def warnings_of(monkeypatch):
    """A function (module) -> the list that its warnings go to."""

    def listen(module) -> list[str]:
        told: list[str] = []
        monkeypatch.setattr(module.logger, "warning", told.append)
        return told

    return listen


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def metrics_of(call, **kwargs) -> tuple[list, dict]:
    found: dict[str, float] = {}
    return call(**ROWS, log_metric=found.__setitem__, **kwargs), {k.split("/")[-1]: v for k, v in found.items()}


# Rewards


def raises(prompts, completions, **columns):
    raise RuntimeError("a bad day")


def exits(prompts, completions, **columns):
    raise SystemExit(3)


def sleeps(prompts, completions, **columns):
    time.sleep(600)


def loops(prompts, completions, **columns):
    while True:
        with suppress(Exception):
            sum(range(1000))


def waits_for_a_lock(prompts, completions, **columns):
    threading.Event().wait()


def backtracks(prompts, completions, **columns):
    import re

    re.match(r"(a+)+$", "a" * 60 + "b")


def _dies():
    os.kill(os.getpid(), signal.SIGKILL)


def kills_its_worker(prompts, completions, **columns):
    with ProcessPoolExecutor(1) as pool:
        return pool.submit(_dies).result()


async def raises_async(prompts, completions, **columns):
    raise RuntimeError("a bad day")


async def sleeps_async(prompts, completions, **columns):
    await asyncio.sleep(600)


@pytest.mark.parametrize("reward", [raises, exits, kills_its_worker])
def test_a_reward_that_fails_counts_as_not_applicable(reward, warnings_of):
    told = warnings_of(rewards)
    call = guarded(reward, timeout=300)
    assert metrics_of(call) == ([None, None], {"errors": 1.0, "timeouts": 0.0, "non_finite": 0.0})
    metrics_of(call)
    assert len(told) == 1, "the first traceback is shown, the others are counted"
    assert "Traceback" in told[0]
    assert reward.__name__ in told[0]
    if reward is kills_its_worker:
        assert BrokenProcessPool.__name__ in told[0]


@pytest.mark.parametrize("reward", [sleeps, loops, waits_for_a_lock, backtracks])
def test_a_reward_that_hangs_is_interrupted(reward):
    before = signal.getsignal(signal.SIGVTALRM), signal.getsignal(signal.SIGALRM), threading.active_count()
    values, counts = metrics_of(guarded(reward, timeout=0.2))
    assert (values, counts["timeouts"], counts["errors"]) == ([None, None], 1.0, 0.0)
    assert (signal.getsignal(signal.SIGVTALRM), signal.getsignal(signal.SIGALRM), threading.active_count()) == before


def test_a_reward_within_its_time_keeps_its_values_and_its_own_alarms():
    def uses_an_alarm(prompts, completions, **columns):
        def ring(number, frame):
            raise TimeoutError("its own")

        previous = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(5)
        except TimeoutError:
            return [0.25, 0.5]
        finally:
            signal.signal(signal.SIGALRM, previous)

    assert metrics_of(guarded(uses_an_alarm, timeout=300.0)) == (
        [0.25, 0.5],
        {"errors": 0.0, "timeouts": 0.0, "non_finite": 0.0},
    )


@pytest.mark.parametrize(("reward", "kind"), [(raises_async, "errors"), (sleeps_async, "timeouts")])
def test_async_rewards_are_guarded_alike(reward, kind):
    found: dict[str, float] = {}
    call = guarded(reward, timeout=0.2 if kind == "timeouts" else 300)
    assert asyncio.run(call(**ROWS, log_metric=found.__setitem__)) == [None, None]
    assert found[f"rewards/{reward.__name__}/{kind}"] == 1.0
    assert sum(found.values()) == 1.0


def test_values_that_are_no_numbers():
    values, counts = metrics_of(guarded(lambda **columns: [float("nan"), None]))
    assert (values, counts["non_finite"]) == ([None, None], 1.0)
    assert metrics_of(guarded(lambda **columns: torch.tensor([1.0, float("inf")])))[0] == [1.0, None]
    for wrong in (None, 1.0, ["good", "bad"]):
        with pytest.raises(ValueError, match="return a list with a number, or None"):
            guarded(lambda wrong=wrong, **columns: wrong)(**ROWS)


def test_rewards_that_all_fail_leave_the_weights_as_they_are_and_the_run_alive(build):
    class Moody:
        calls = 0

        def __call__(self, prompts, completions, **columns):
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("a bad day")
            return place_in_group(prompts, completions)

    run = build(reward=Moody())
    start = weights(run)
    moved = []
    step = run.training_step
    run.training_step = lambda *args: (moved.append(not torch.equal(weights(run), start)), step(*args))[1]
    run.train()
    assert moved == [False] * 4 + [False, False, True, True], "nothing is learned from the rollout without rewards"
    first = next(row for row in run.state.log_history if "reward" in row)
    assert first["rewards/Moody/errors"] == 1.0
    assert first["reward"] is None
    assert weights(run).isfinite().all()


# Numbers


def spoil(trainer, calls: set[int], how) -> None:
    """Puts `how` on the loss of these micro-batches."""
    count, inner = [0], trainer._compute_loss

    def spoiled(model, inputs):
        count[0] += 1
        loss = inner(model, inputs)
        return how(loss) if count[0] in calls else loss

    trainer._compute_loss = spoiled


class NanGradient(torch.autograd.Function):
    """The loss is finite, its gradient is not."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


FAULTS = [lambda loss: loss * torch.nan, lambda loss: loss + torch.inf, NanGradient.apply]


@pytest.mark.parametrize("how", FAULTS, ids=["nan loss", "infinite loss", "nan gradient"])
@pytest.mark.parametrize("clipped", [1.0, 0.0], ids=["clipped", "not clipped"])
def test_an_update_with_bad_numbers_is_skipped_and_kept(build, tmp_path, warnings_of, how, clipped):
    told = warnings_of(guards)
    run = build(max_grad_norm=clipped)
    at_update = []
    inner = run._get_grad_norm
    run._get_grad_norm = lambda *args, **kwargs: (at_update.append(weights(run)), inner(*args, **kwargs))[1]
    spoil(run, {4}, how)
    run.train()
    at_update.append(weights(run))
    moved = [not torch.equal(old, new) for old, new in zip(at_update, at_update[1:], strict=False)]
    assert moved == [True, False, True, True], "the second of four updates is skipped"
    assert weights(run).isfinite().all()
    assert [row["skipped_updates"] for row in run.state.log_history if "skipped_updates" in row] == [0, 1, 0, 0]
    batch = json.loads((tmp_path / "run/bad_batches/update_2_process_0.json").read_text())
    tensors = torch.load(tmp_path / "run/bad_batches/update_2_process_0.pt", weights_only=True)
    assert len(batch) == len(tensors) == 2, "both micro-batches of the update"
    assert batch[0]["rows"][0]["prompt"] in PROMPTS
    assert tensors[1]["completion_ids"].shape == (4, 6)
    assert len(told) == 1
    assert "Update 2 is skipped" in told[0]
    named = 1 if how in FAULTS[:2] else 0
    assert batch[named]["rows"][0]["prompt"] in told[0]


def test_the_optimizers_memory_is_that_of_a_run_without_the_bad_update(build):
    run = build(max_steps=3)
    spoil(run, {3}, FAULTS[0])
    run.train()
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {2}


def test_bad_updates_in_a_row_end_the_run_with_a_remedy(build, tmp_path):
    run = build(max_skipped_updates=2, max_steps=8)
    spoil(run, {1, 3, 5, 7, 8, 9}, FAULTS[0])
    start = weights(run)
    with pytest.raises(FloatingPointError, match=r"max_skipped_updates=2: .* the last one update 2\..*learning_rate"):
        run.train()
    assert torch.equal(weights(run), start)
    run = build(max_skipped_updates=2, output_dir=str(tmp_path / "other"))
    spoil(run, {1, 5}, FAULTS[0])
    run.train()
    assert run.state.global_step == 4, "two that are not in a row do not"


def test_the_check_changes_nothing_and_can_be_switched_off(build):
    finals = []
    for limit in (None, 3):
        run = build(max_skipped_updates=limit)
        run.train()
        finals.append(weights(run))
    assert torch.equal(*finals)
    run = build(max_skipped_updates=None, max_steps=2)
    spoil(run, {1}, FAULTS[0])
    run.train()
    assert weights(run).isnan().any()


# Collapse


@pytest.mark.parametrize(
    ("reward", "entropy", "length", "found"),
    [
        ([0.2, 0.5, 0.8, 0.9] * 1 + [0.9] * 6 + [0.1] * 4, [1.0] * 14, [9.0] * 14, {"reward"}),
        ([0.5] * 14, [1.0] * 7 + [0.01] * 7, [9.0] * 14, {"entropy"}),
        ([0.5] * 14, [1.0] * 14, [9.0] * 7 + [60.0] * 7, {"length"}),
        # It learns, and reasons at greater length: the main job.
        ([0.2] * 4 + [0.9] * 10, [1.0] * 14, [5.0] * 4 + [16.0] * 10, set()),
        # Noise of one standard deviation around a mean.
        ([0.5, 0.7, 0.3, 0.6, 0.4, 0.7, 0.5] * 2, [1.0, 0.9] * 7, [9.0, 11.0] * 7, set()),
        ([0.5] * 3, [1.0] * 3, [9.0] * 3, set()),
    ],
)
def test_cliffs(reward, entropy, length, found):
    history = {"reward": reward, "entropy": entropy, "completions/mean_length": length}
    assert cliffs(history, window=4).keys() == found


@pytest.mark.parametrize("stops", [False, True])
def test_a_collapse_warns_once_and_can_stop_the_run(build, warnings_of, stops):
    told = warnings_of(guards)
    falls = iter([1.0] * 6 + [0.0] * 20)
    run = build(
        reward=lambda prompts, completions, **columns: [next_reward] * len(prompts),
        num_iterations=1,
        max_steps=12,
        collapse_window=3,
        stop_on_collapse=stops,
    )
    inner = run._calculate_rewards

    def calculate(*args):
        nonlocal next_reward
        next_reward = next(falls)
        return inner(*args)

    next_reward, run._calculate_rewards = 1.0, calculate
    run.train()
    assert len(told) == 1
    assert "the reward fell from 1 to" in told[0]
    assert run.state.global_step == (9 if stops else 12)


def test_the_guard_against_collapse_remembers_what_came_before_a_resume():
    rows = [{"reward": 1.0, "entropy": 1.0, "completions/mean_length": 5.0, "step": step} for step in range(9)]
    guard = CollapseGuard(window=3, stops=False)
    guard.on_train_begin(None, TrainerState(log_history=[*rows, {"eval_accuracy": 0.5, "step": 9}]), None)
    assert {name: len(values) for name, values in guard.history.items()} == dict.fromkeys(guards.WATCHED, 9)


# Disk


def full_disk(folder: Path, after: int):
    """torch.save that finds the disk full at its `after`-th call in the folder."""
    save, calls = torch.save, [0]

    def limited(value, path, *args, **kwargs):
        calls[0] += str(path).startswith(str(folder))
        save(value, path, *args, **kwargs)
        if calls[0] >= after:
            os.truncate(path, 10)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return limited


def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(build, tmp_path, monkeypatch):
    run = build(save_strategy="steps", save_steps=1, save_total_limit=1)
    # Five files of torch's each: optimizer, schedule, random states, arguments, rollout.
    monkeypatch.setattr(torch, "save", full_disk(tmp_path / "run/unfinished", after=8))
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written: .*No space left") as error:
        run.train()
    assert str(tmp_path / "run/checkpoint-1") in str(error.value)
    assert resume_checkpoint(tmp_path / "run").endswith("checkpoint-1")
    assert not (tmp_path / "run/unfinished").exists(), "what takes up room and is of no use"
    monkeypatch.undo()
    build(save_strategy="steps", save_steps=1, save_total_limit=1).train(resume_checkpoint(tmp_path / "run"))
    straight = build(output_dir=str(tmp_path / "straight"), save_strategy="steps", save_steps=1)
    straight.train()
    files = [folder / "checkpoint-4/model.safetensors" for folder in (tmp_path / "run", tmp_path / "straight")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_number_of_checkpoints_is_kept(build, tmp_path):
    build(save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert [path.name for path in whole_checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-4"]


def test_an_old_checkpoint_goes_only_when_the_new_one_is_whole(build, tmp_path, monkeypatch):
    seen = []
    save = torch.save

    def watching(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        seen.append([path.name for path in whole_checkpoints(tmp_path / "run")])

    run = build(save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=3)
    monkeypatch.setattr(torch, "save", watching)
    run.train()
    assert [] in seen
    first = seen.index(["checkpoint-1"])
    assert all(len(names) == 1 for names in seen[first:]), "from the first on there always is a whole one"


def test_a_checkpoint_takes_the_place_of_one_of_its_name(build, tmp_path):
    run = build(save_strategy="steps", save_steps=2)
    run.train()
    (tmp_path / "run/checkpoint-4/left_over").touch()
    build(save_strategy="steps", save_steps=2).train(str(tmp_path / "run/checkpoint-2"))
    assert not (tmp_path / "run/checkpoint-4/left_over").exists()
    assert (tmp_path / "run/checkpoint-4/trainer_state.json").exists()
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-4"]


def test_the_best_weights_are_kept_beside_the_last(build, tmp_path):
    run = build(max_steps=2)
    run.train()
    run.checkpoints.save_best({"step": 2, "eval_accuracy": 0.5})
    best = load_file(tmp_path / "run/best/model.safetensors")
    run.model.get_input_embeddings().weight.data += 1
    run.checkpoints.save_best({"step": 3, "eval_accuracy": 0.75})
    assert json.loads((tmp_path / "run/best/best.json").read_text())["step"] == 3
    name = next(name for name in best if "wte" in name)
    assert torch.allclose(load_file(tmp_path / "run/best/model.safetensors")[name], best[name] + 1)
    assert not (tmp_path / "run/unfinished").exists()


def test_a_new_run_does_not_write_among_the_checkpoints_of_another(build, tmp_path):
    refuse_to_mix_runs(tmp_path / "run")
    build(save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match=r"holds checkpoint-4 of an earlier run: --resume true"):
        refuse_to_mix_runs(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    with pytest.raises(ValueError, match="holds checkpoint-2"):
        refuse_to_mix_runs(tmp_path / "run")


def test_a_power_cut_finds_the_files_written(tmp_path, monkeypatch):
    """Everything in the folder is synchronised before it is renamed."""
    order = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: (order.append(os.readlink(f"/proc/self/fd/{file}")), sync(file)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (order.append("rename"), rename(path, to))[1])
    written = tmp_path / "unfinished/checkpoint-1"
    (written / "inner").mkdir(parents=True)
    (written / "inner/file").write_text("x")
    manifest.put_in_place(written, tmp_path / "checkpoint-1")
    assert set(order[: order.index("rename")]) == {str(written), str(written / "inner"), str(written / "inner/file")}
    assert order[-1] == str(tmp_path)
