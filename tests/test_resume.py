"""Resuming: a run stopped at any checkpoint ends bit-equal to the one that was not."""

import inspect
import json
import random

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from stopping import StopAt
from test_block_sampling import sdar
from trainers import share_of_b, tiny_trainer
from transformers import Trainer, TrainerCallback, TrainerState
from trl import GRPOTrainer

from dgrpo.estimators import ESTIMATORS
from dgrpo.reliability.manifest import move_earlier_run_aside, resume_checkpoint, write_manifest
from dgrpo.run.callbacks import MetricsFile, ProgressLine

PROMPTS = ["a b", "c d e f", "g", "h i j", "k l m n o"]


@pytest.fixture
def build(tmp_path):
    """A function (folder, callbacks, **settings) -> trainer with mu = 4, accumulation 2, epochs of two rollouts."""

    def trainer(folder: str, callbacks=None, **settings):
        defaults = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_iterations": 4,
            "max_steps": 12,
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        rows = Dataset.from_dict({"prompt": PROMPTS})
        return tiny_trainer(
            tmp_path / folder, share_of_b_and_chance, dataset=rows, callbacks=callbacks, **(defaults | settings)
        )

    return trainer


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def logged(trainer) -> list[dict]:
    timings = ("time", "second", "runtime")
    rows = trainer.state.log_history
    return [{k: v for k, v in row.items() if not any(word in k for word in timings)} for row in rows][:-1]


def share_of_b_and_chance(prompts, completions, **columns) -> list[float]:
    """Draws from the three random states that a checkpoint holds."""
    chance = random.random() + np.random.rand() + torch.rand(()).item()
    return [value + chance * (index % 2) for index, value in enumerate(share_of_b(prompts, completions))]


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "logging_steps"), [(4, 1), (5, 5), (6, 5), (9, 5), (11, 1)])
def test_a_resumed_run_ends_bit_equal(build, tmp_path, stop, logging_steps):
    settings = {"logging_steps": logging_steps, "log_completions": True, "num_completions_to_print": 0}
    straight = build("straight", save_strategy="no", **settings)
    straight.train()
    build("cut", callbacks=[StopAt(stop)], save_steps=stop, **settings).train()
    resumed = build("cut", save_strategy="no", **settings)
    torch.rand(7), random.random(), np.random.rand()
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert torch.equal(weights(straight), weights(resumed))
    for old, new in zip(straight.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert logged(straight) == logged(resumed)
    assert resumed.logged_completions == straight.logged_completions
    for path in sorted((tmp_path / "straight/completions").iterdir()):
        assert pd.read_parquet(path).equals(pd.read_parquet(tmp_path / "cut/completions" / path.name))


class Scored(TrainerCallback):
    """The log-probabilities of every update, and what its batch has as the old ones (None: not needed)."""

    def __init__(self):
        self.pairs: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def watch(self, trainer) -> None:
        score = trainer._score

        def spy(model, batch, views, as_reference=None):
            found = score(model, batch, views, as_reference)
            if torch.is_grad_enabled():
                new = (views.weights * found.logps).sum(1).detach()
                self.pairs.append((new, batch.get("old_per_token_logps")))
            return found

        trainer._score = spy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        ("one_step", {}),
        ("one_step", {"prompt_mask_scope": "row"}),
        ("coupled", {}),
        ("elbo", {"estimator_kwargs": {"num_samples": 3}, "importance_sampling_level": "sequence"}),
        ("elbo", {"estimator_kwargs": {"complementary": True}, "objective": "espo"}),
        ("elbo", {"estimator_kwargs": {"num_samples": 3}, "objective": "bgpo"}),
        ("quadrature", {"importance_sampling_level": "sequence"}),
        ("trace", {}),
        ("trace", {"estimator_kwargs": {"top_k": 2}}),
        ("every_write", {"sampler_policy": "test_sampler_policy:shuffle"}),
        ("left_to_right", {"block_length": 1}),
        ("block_random", {"importance_sampling_level": "sequence"}),
        ("block_random", {"objective": "stable_drl"}),
    ],
)
def test_with_learning_rate_0_every_estimators_ratio_is_1_through_shuffle_accumulation_and_resume(
    build, tmp_path, estimator, settings
):
    settings = settings | {"estimator": estimator, "learning_rate": 0.0, "num_iterations": 3, "max_steps": 6}
    settings |= {"views_per_pass": 2}
    build("cut", callbacks=[StopAt(4)], save_steps=4, **settings).train()
    resumed = build("cut", save_strategy="no", **settings)
    scored = Scored()
    scored.watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-4"))
    assert len(scored.pairs) == 4, "two updates of two micro-batches are left, of the rollout that the first part drew"
    for new, old in scored.pairs:
        assert (new < 0).any()
        assert old is not None
        assert torch.equal(new, old)


@pytest.mark.slow
def test_with_learning_rate_0_a_block_model_s_ratio_is_1_after_resuming(build, tmp_path):
    """In the middle of a rollout, whose prompts give their last tokens to the canvas."""
    settings = {"estimator": "trace", "num_iterations": 3, "max_steps": 6, "views_per_pass": 2, "temperature": 1.0}
    settings |= {"block_length": None, "max_completion_length": 8, "diffusion_steps": 8}
    still = build("still", model=sdar(), callbacks=[StopAt(4)], save_steps=4, learning_rate=0.0, **settings)
    still.train()
    resumed = build("still", model=sdar(), save_strategy="no", learning_rate=0.0, **settings)
    scored = Scored()
    scored.watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "still/checkpoint-4"))
    assert len(scored.pairs) == 4
    for new, old in scored.pairs:
        assert (new < 0).any()
        assert torch.equal(new, old)


def test_no_estimator_is_left_out_above():
    marks = test_with_learning_rate_0_every_estimators_ratio_is_1_through_shuffle_accumulation_and_resume.pytestmark
    assert {case[0] for mark in marks if mark.args for case in mark.args[1]} == set(ESTIMATORS)


def test_a_run_that_was_stopped_after_its_last_update_makes_no_more(build, tmp_path):
    build("cut", save_steps=12).train()
    finished = build("cut", max_steps=12)
    finished.train(resume_from_checkpoint=resume_checkpoint(tmp_path / "cut"))
    assert finished.state.global_step == 12
    stored = load_file(tmp_path / "cut/checkpoint-12/model.safetensors")
    found = dict(finished.model.named_parameters())
    assert all(torch.equal(stored[name], found[name]) for name in stored)


def test_a_checkpoint_without_an_optimizer_is_refused(build, tmp_path):
    build("cut", callbacks=[StopAt(2)], save_only_model=True).train()
    with pytest.raises(ValueError, match="rollout_0.pt is missing; .* save_only_model=True"):
        build("cut").train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))


def test_rows_logged_after_the_checkpoint_are_not_repeated(tmp_path):
    """From the checkpoint's history, whatever stands in the file."""
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.path.write_text("step,loss\n1,0.5\n2,0.25\n3,9\n")
    history = [{"eval_accuracy": 0.1, "step": 0}, {"loss": 0.5, "step": 1}, {"loss": 0.25, "step": 2}]
    metrics.on_train_begin(None, TrainerState(global_step=2, log_history=history), None)
    metrics.on_log(None, TrainerState(global_step=3), None, logs={"loss": 0.125})
    metrics.flush()
    assert metrics.path.read_text().split() == ["step,eval_accuracy,loss", "0,0.1,", "1,,0.5", "2,,0.25", "3,,0.125"]


def test_the_parents_have_the_methods_that_checkpoints_and_guards_rest_on():
    expected = {
        "_get_output_dir": ["trial"],
        "_push_from_checkpoint": ["checkpoint_folder"],
        "_save_checkpoint": ["model", "trial"],
        "_load_optimizer_and_scheduler": ["checkpoint"],
        "_get_grad_norm": ["model", "grad_norm"],
        "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters)[1:] == parameters, name
    source = inspect.getsource(Trainer)
    for attribute in (
        "self._tr_loss = torch.tensor(0.0",
        "self._total_loss_scalar = 0.0",
        "self._globalstep_last_logged",
    ):
        assert attribute in source
    loop = inspect.getsource(Trainer._inner_training_loop)
    assert loop.index("self._prepare_for_training(") < loop.index("self._tr_loss =") < loop.index("on_train_begin(")
    epoch = inspect.getsource(Trainer._run_epoch)
    assert epoch.index("self._get_grad_norm(") < epoch.index("self.optimizer.step()")


def test_a_checkpoint_that_was_being_written_is_passed_over(build, tmp_path):
    build("cut", callbacks=[StopAt(3)]).train()
    assert resume_checkpoint(tmp_path / "cut").endswith("checkpoint-3")
    (tmp_path / "cut/checkpoint-3/trainer_state.json").unlink()
    assert resume_checkpoint(tmp_path / "cut").endswith("checkpoint-2")
    assert resume_checkpoint(tmp_path / "nowhere") is None


def test_another_number_of_processes_is_refused(build, tmp_path):
    build("cut", callbacks=[StopAt(2)]).train()
    path = tmp_path / "cut/checkpoint-2/settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_processes": 2}))
    write_manifest(path.parent)
    with pytest.raises(ValueError, match="checkpoint-2 is of another run: num_processes=1, begun with 2"):
        build("cut").train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))


def test_an_earlier_run_without_checkpoints_is_moved_aside(tmp_path):
    run = tmp_path / "run"
    assert move_earlier_run_aside(run) is None
    for number in (1, 2):
        run.mkdir()
        (run / "summary.json").write_text(str(number))
        assert move_earlier_run_aside(run) == tmp_path / f"run.{number}"
    assert [(tmp_path / f"run.{number}/summary.json").read_text() for number in (1, 2)] == ["1", "2"]
    assert not run.exists()
    run.mkdir()
    (run / "notes.txt").write_text("not a run")
    assert move_earlier_run_aside(run) is None


def test_a_line_of_progress_shows_the_mean_over_a_rollouts_updates():
    lines = []
    progress = ProgressLine(trainer=None)
    progress.write = lines.append
    state = TrainerState(max_steps=8)
    for step, clipped in enumerate([0.0, 0.04, 0.08, 0.0]):
        logs = {"clip_ratio/region_mean": clipped, "entropy": None} | ({"reward": 0.5} if step % 3 == 0 else {})
        progress.on_log(None, state, None, logs=logs)
    assert [line.split("clip ")[1] for line in lines] == ["0%", "4%"]
