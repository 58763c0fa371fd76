"""Every task's recipe: its settings, and three updates on its embedded default."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from dgrpo.reliability.columns import check_columns
from dgrpo.run.settings import parse_recipe
from dgrpo.run.steps import rewards_of
from dgrpo.tasks import TASKS, load_rows

ROOT = Path(__file__).parents[1]
RECIPES = ("gsm8k", "math500", "countdown", "sudoku", "programs")


def parsed(name: str, config: str):
    recipe = ROOT / "recipes" / f"{name}.py"
    more = ["--config", str(recipe.with_name(f"{recipe.stem}{config}.yaml")), "--use_cpu", "--bf16", "false"]
    return parse_recipe(str(recipe), argv=more)


def test_every_task_has_a_recipe():
    assert set(TASKS) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("config", ["", "_llada_8b"])
def test_the_rewards_of_a_recipe_find_their_columns_and_one_of_them_is_the_grader(name, config):
    recipe, args, _ = parsed(name, config)
    train, _ = load_rows(TASKS[name], "embedded", num_train=8, num_held_out=8)
    rewards = rewards_of(recipe)
    check_columns(rewards, train.column_names)
    assert len(args.reward_weights or rewards) == len(rewards)
    # d1 pays Sudoku by the cell; a grid whose cells are all right is a solved one.
    assert rewards[0].__name__ in (TASKS[name].grade.__name__, "cells_reward")
    assert args.generation_batch_size // args.num_generations >= 1
    # Checkpoints fall between rollouts.
    assert args.save_strategy == "no" or args.save_steps % args.num_iterations == 0


@pytest.mark.parametrize(
    ("name", "updates", "inner", "temperature"),
    [("math500", 6600, 12, 0.9), ("countdown", 5000, 8, 0.9), ("sudoku", 3800, 8, 0.3)],
)
def test_the_settings_for_llada_8b_are_d1_s(name, updates, inner, temperature):
    _, args, model_config = parsed(name, "_llada_8b")
    assert (args.max_steps, args.num_iterations, args.temperature) == (updates, inner, temperature)
    assert (args.max_completion_length, args.diffusion_steps, args.block_length) == (256, 128, 32)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_generations) == (6, 2, 6)
    assert (args.learning_rate, args.epsilon, args.beta, args.p_mask_prompt) == (3e-6, 0.5, 0.04, 0.15)
    assert (model_config.lora_r, model_config.lora_alpha) == (128, 64)


def run(monkeypatch, name: str, *more: str) -> None:
    """The recipe as a script, in this process, from the project's root."""
    script = str(ROOT / "recipes" / f"{name}.py")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *more])
    runpy.run_path(script, run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_three_updates_on_its_embedded_default(monkeypatch, tmp_path, name):
    short = ["--max_steps", "3", "--num_eval_problems", "8", "--evaluate_every", "0", "--report_to", "none"]
    batch = ["--per_device_train_batch_size", "16", "--num_train_problems", "64", "--warmup_steps", "0"]
    run(monkeypatch, name, "--output_dir", str(tmp_path), *short, *batch)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["task"], summary["steps"], summary["before"]["n"], summary["after"]["n"]) == (name, 3, 8, 8)
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 5


def test_the_8b_sudoku_recipe_asks_for_a_file_before_it_loads_a_model(monkeypatch, tmp_path):
    config = str(ROOT / "recipes/sudoku_llada_8b.yaml")
    with pytest.raises(SystemExit, match="sudoku has no dataset on the hub"):
        run(monkeypatch, "sudoku", "--config", config, "--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path))
