"""What every recipe shares, from its settings to its results."""

from dgrpo.run.steps import CHECKPOINTS, RecipeConfig, main, parse_recipe, prepare_model, train

__all__ = ["CHECKPOINTS", "RecipeConfig", "main", "parse_recipe", "prepare_model", "train"]
