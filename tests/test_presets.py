"""Every method's preset trains an embedded model under its own YAML; those of block models the block model."""

import math
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig

from dgrpo import DiffuGRPOConfig
from dgrpo.run import RecipeConfig, build, parse_recipe
from dgrpo.tasks import gsm8k

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "gsm8k.py"
PRESETS = sorted((ROOT / "recipes" / "presets").glob("*.yaml"))
BLOCK_PRESETS = ("tracerl_block", "ebpo", "dipo")
RECIPES = [path for path in (ROOT / "recipes").glob("*.yaml") if path.stem not in ("sft", "vrpo")]
# What the canvas of 16 tokens asks of presets written for longer ones.
FITTED = {
    "spg": ["--block_length", "4"],
    "bgpo": ["--estimator_kwargs", '{"num_samples": 4}'],
}


def test_the_methods_of_the_field_have_a_preset():
    names = {path.stem for path in PRESETS}
    assert names >= {"diffu_grpo", "coupled_grpo", "espo", "gdpo", "spg", "wd1", "tracerl", "justgrpo", "bgpo"}
    assert names >= set(BLOCK_PRESETS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_preset_lies_over_every_recipe(recipe, tmp_path):
    device = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    for preset in PRESETS:
        argv = ["--config", str(recipe), "--preset", str(preset), *device]
        args = parse_recipe(str(RECIPE), RecipeConfig, DiffuGRPOConfig, ModelConfig, argv=argv)[1]
        method = yaml.safe_load(preset.read_text())
        assert (args.estimator, args.objective) == (method["estimator"], method["objective"])
        if preset.stem == "justgrpo":
            assert args.diffusion_steps == args.max_completion_length


def every_other(completions, **_) -> list[float]:
    """Spread in each group, whatever was sampled."""
    return [float(number % 2) for number in range(len(completions))]


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_trains_five_steps(preset, tmp_path):
    argv = ["--preset", str(preset), "--max_steps", "5", "--output_dir", str(tmp_path), "--report_to", "none"]
    if preset.stem in BLOCK_PRESETS:
        argv += ["--config", str(ROOT / "recipes" / "gsm8k_block.yaml")]
    argv += ["--num_train_problems", "64", "--num_eval_problems", "8"]
    argv += ["--reward_funcs", "test_presets:every_other", "--reward_weights", "1"]
    argv += ["--per_device_train_batch_size", "16", "--log_completions", "false", *FITTED.get(preset.stem, [])]
    recipe, args, model_config = parse_recipe(
        str(RECIPE), RecipeConfig, DiffuGRPOConfig, ModelConfig, argv=[*argv, "--disable_tqdm", "true"]
    )
    trainer, _ = build(gsm8k.TASK, recipe, args, model_config)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    assert len(losses) == 5
    assert all(math.isfinite(loss) for loss in losses)
    changed = [not before[name].equal(p) for name, p in trainer.model.named_parameters() if name in before]
    assert all(changed), "every trained tensor has moved"
