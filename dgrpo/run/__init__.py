"""What every recipe shares, from its settings to its results."""

from dgrpo.run.settings import RecipeConfig, parse_recipe
from dgrpo.run.steps import CHECKPOINTS, build, main, prepare_model, run_task, train

__all__ = ["CHECKPOINTS", "RecipeConfig", "build", "main", "parse_recipe", "prepare_model", "run_task", "train"]
