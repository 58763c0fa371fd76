"""Resuming: a run stopped at any checkpoint ends bit-equal to the one that was not."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from dgrpo import DiffuGRPOConfig, DiffuGRPOTrainer
from dgrpo.trainers.checkpoints import last_complete_checkpoint

PROMPTS = ["a b", "c d e f", "g", "h i j", "k l m n o"]


def share_of_b(prompts, completions, **columns) -> list[float]:
    return [completion.split().count("b") / 6 for completion in completions]


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.fixture
def build(tiny_llada, tokenizer, tmp_path):
    """A function (folder, callbacks, **settings) -> trainer with mu = 4, accumulation 2, epochs of two rollouts."""

    def trainer(folder: str, callbacks=None, **settings) -> DiffuGRPOTrainer:
        defaults = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "num_iterations": 4,
            "max_completion_length": 6,
            "block_length": 3,
            "diffusion_steps": 6,
            "max_steps": 12,
            "learning_rate": 1e-2,
            "beta": 0.0,
            "save_steps": 1,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return DiffuGRPOTrainer(
            model=tiny_llada(),
            processing_class=tokenizer,
            args=DiffuGRPOConfig(output_dir=str(tmp_path / folder), **(defaults | settings)),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            reward_funcs=share_of_b,
            callbacks=callbacks,
        )

    return trainer


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def logged(trainer) -> list[dict]:
    timings = ("time", "second", "runtime", "flos")
    rows = trainer.state.log_history
    return [{k: v for k, v in row.items() if not any(word in k for word in timings)} for row in rows][:-1]


@pytest.mark.parametrize("stop", [4, 5, 6, 9, 11], ids=lambda step: f"stopped at {step}")
def test_a_resumed_run_ends_bit_equal(build, tmp_path, stop):
    straight = build("straight", save_strategy="no")
    straight.train()
    build("cut", callbacks=[StopAt(stop)]).train()
    resumed = build("cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert torch.equal(weights(straight), weights(resumed))
    assert logged(straight) == logged(resumed)
    # Where the last rollout came before the stop, the resumed run has made none of its own.
    assert resumed.logged_completions in ([], straight.logged_completions)


def test_a_checkpoint_that_was_being_written_is_passed_over(build, tmp_path):
    build("cut", callbacks=[StopAt(3)]).train()
    assert last_complete_checkpoint(tmp_path / "cut").endswith("checkpoint-3")
    (tmp_path / "cut/checkpoint-3/trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path / "cut").endswith("checkpoint-2")
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_another_number_of_processes_is_refused(build, tmp_path):
    build("cut", callbacks=[StopAt(2)]).train()
    path = tmp_path / "cut/checkpoint-2/rollout_0.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"num_processes": 2}, path)
    with pytest.raises(ValueError, match="comes from 2 processes, this run has 1"):
        build("cut").train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))
