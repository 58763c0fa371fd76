"""A checkpoint of each family, in its published layout, goes through the recipes by `--model_name_or_path` alone."""

import csv
import json
import runpy
import sys
from pathlib import Path

import published
import pytest
import torch
from safetensors.torch import load_file

RECIPES = Path(__file__).parents[1] / "recipes"
# Tensors of an adapter: two for each adapted linear layer of a network of two layers.
ADAPTER_TENSORS = {"llada": 28, "dream": 28, "llada_moe": 16, "a2d-qwen2": 28, "a2d-qwen3": 28, "a2d-llama": 28}


@pytest.fixture
def run_recipe(monkeypatch):
    """A function (recipe, *arguments) that runs the recipe's file in this process."""

    def run(recipe: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [recipe, *map(str, arguments)])
        runpy.run_path(str(RECIPES / recipe), run_name="__main__")

    return run


def three_steps(checkpoint: Path, output: Path) -> tuple:
    """Groups of four on eight tokens; the reward is the share of distinct characters, so that groups differ."""
    settings = {"model_name_or_path": checkpoint, "output_dir": output, "max_steps": 3, "num_iterations": 3}
    settings |= {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8}
    settings |= {"block_length": 8, "diffusion_steps": 8, "num_eval_problems": 8, "num_train_problems": 64}
    settings |= {"reward_funcs": "test_recipes_families:variety", "reward_weights": 1.0, "evaluate_every": 0}
    settings |= {"dataset": "embedded", "instruction": "", "use_cpu": True, "gradient_checkpointing": False}
    settings |= {"use_peft": True, "lora_r": 16, "lora_alpha": 8, "epsilon": 0.2, "beta": 0.0, "logging_steps": 1}
    settings |= {"report_to": "none", "sample_every": 0, "learning_rate": 1e-2, "log_completions": False}
    return tuple(word for name, value in settings.items() for word in (f"--{name}", value))


def variety(prompts, completions, **columns) -> list[float]:
    return [len(set(completion[0]["content"])) / 50 for completion in completions]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTER_TENSORS)
def test_three_steps_of_every_family(run_recipe, tmp_path, kind):
    checkpoint = published.write_checkpoint(tmp_path / "checkpoint", kind)
    run_recipe("gsm8k.py", *three_steps(checkpoint, tmp_path / "run"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["steps"], summary["model"]) == (3, str(checkpoint))
    adapter = load_file(tmp_path / "run/adapter_model.safetensors")
    assert len(adapter) == ADAPTER_TENSORS[kind]
    # An adapter starts with B at zero: it has learned something in every layer.
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["reward"]]
    assert float(rows[0]["reward_std"]) > 0


@pytest.mark.slow
def test_fine_tuned_then_reinforced_then_merged(run_recipe, tmp_path):
    """SFT writes an adapter, reinforcement learning goes on with it, merging gives a folder in the base's layout."""
    checkpoint = published.write_checkpoint(tmp_path / "checkpoint", "dream")
    rows = [{"prompt": f"What is {n} + 1?", "completion": f"{n + 1}"} for n in range(32)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = {"model_name_or_path": checkpoint, "dataset": tmp_path / "rows.jsonl", "output_dir": tmp_path / "sft"}
    settings |= {"max_steps": 2, "completion_canvas": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    settings |= {"use_cpu": True, "lora_r": 16, "lora_alpha": 16, "report_to": "none"}
    run_recipe("sft.py", *(word for name, value in settings.items() for word in (f"--{name}", value)), "--use_peft")
    run_recipe("gsm8k.py", *three_steps(checkpoint, tmp_path / "rl"), "--adapter_name_or_path", tmp_path / "sft")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sft", "rl"))
    assert first.keys() == second.keys()
    moved = [not torch.equal(first[name], second[name]) for name in first]
    apart = torch.cat([(first[name] - second[name]).flatten() for name in first]).norm()
    assert all(moved)
    assert apart < torch.cat([tensor.flatten() for tensor in first.values()]).norm(), "it starts where SFT ended"
    run_recipe("merge.py", "--adapter", tmp_path / "rl", "--output_dir", tmp_path / "merged")
    weights = load_file(tmp_path / "merged/model-00001-of-00003.safetensors")
    base = load_file(checkpoint / "model-00001-of-00003.safetensors")
    assert weights.keys() == base.keys()
    assert any(not torch.equal(weights[name], base[name]) for name in base)
    assert (tmp_path / "merged/modeling_dream.py").read_text() == (checkpoint / "modeling_dream.py").read_text()
