"""Every method's preset trains the embedded default under its own YAML."""

import math
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig

from dgrpo import DiffuGRPOConfig, DiffuGRPOTrainer
from dgrpo.run.steps import RecipeConfig, parse_recipe, prepare_model, rewards_of
from dgrpo.tasks import gsm8k, load_rows

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "gsm8k.py"
PRESETS = sorted((ROOT / "recipes" / "presets").glob("*.yaml"))
RECIPES = [path for path in (ROOT / "recipes").glob("*.yaml") if path.stem not in ("sft", "vrpo")]
# What the canvas of 16 tokens asks of presets written for longer ones.
FITTED = {
    "spg": ["--block_length", "4"],
    "bgpo": ["--estimator_kwargs", '{"num_samples": 4}'],
}


def test_the_methods_of_the_field_have_a_preset():
    names = {path.stem for path in PRESETS}
    assert names >= {"diffu_grpo", "coupled_grpo", "espo", "gdpo", "spg", "wd1", "tracerl", "justgrpo", "bgpo"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_preset_lies_over_every_recipe(recipe, tmp_path):
    device = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    for preset in PRESETS:
        argv = ["--config", str(recipe), "--preset", str(preset), *device]
        args = parse_recipe(str(RECIPE), RecipeConfig, DiffuGRPOConfig, ModelConfig, argv=argv)[1]
        assert args.estimator == yaml.safe_load(preset.read_text())["estimator"]
        if preset.stem == "justgrpo":
            assert args.diffusion_steps == args.max_completion_length


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_trains_five_steps(preset, tmp_path):
    argv = ["--preset", str(preset), "--max_steps", "5", "--output_dir", str(tmp_path), "--report_to", "none"]
    argv += ["--per_device_train_batch_size", "16", "--log_completions", "false", *FITTED.get(preset.stem, [])]
    recipe, args, model_config = parse_recipe(
        str(RECIPE), RecipeConfig, DiffuGRPOConfig, ModelConfig, argv=[*argv, "--disable_tqdm", "true"]
    )
    train_rows, _ = load_rows(gsm8k.TASK, recipe.dataset, num_train=64, num_held_out=8, instruction="")
    model, tokenizer, peft_config = prepare_model(gsm8k.TASK, recipe, args, model_config)
    trainer = DiffuGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=args,
        peft_config=peft_config,
        train_dataset=train_rows,
        reward_funcs=rewards_of(recipe),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    assert len(losses) == 5
    assert all(math.isfinite(loss) for loss in losses)
    changed = [not before[name].equal(p) for name, p in trainer.model.named_parameters() if name in before]
    assert all(changed), "every adapter weight has moved"
