"""Training on any dataset: what `recipes/grpo.py` reads beside the trainer's settings, and the task made of it."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from trl import ModelConfig

from dgrpo.reliability.rewards import guarded
from dgrpo.run.settings import RecipeConfig, parse_recipe
from dgrpo.run.steps import rewards_of
from dgrpo.run.validate import call_reward
from dgrpo.tasks import EMBEDDED, Task
from dgrpo.tasks.columns import OwnData, own_data_task
from dgrpo.tasks.sources import sources_of
from dgrpo.trainers import DiffuGRPOConfig
from dgrpo.trainers.plugins import load_function


@dataclass
class OwnDataRecipeConfig(OwnData, RecipeConfig):
    """The settings of `recipes/grpo.py` beside the trainer's and the model's."""

    grade: str | None = field(
        default=None,
        metadata={"help": "Function whose mean is the held-out score; default: the rewards' weighted sum."},
    )  # fmt: skip
    validate: bool = field(
        default=False,
        metadata={
            "help": "Before training, leave out rows whose own answer the rewards do not pay as much as others."
        },
    )

    def __post_init__(self):
        OwnData.__post_init__(self)
        RecipeConfig.__post_init__(self)
        if self.dataset in (None, EMBEDDED):
            raise ValueError(
                f"dataset={self.dataset!r}: name the rows to train on: a .csv, .jsonl, .json or .parquet file, or a "
                "dataset of the hub (NAME:CONFIG@SPLIT). The embedded problems are those of `dgrpo train gsm8k`."
            )
        if self.dataset_weights is not None and len(sources_of(self.dataset)) < 2:
            raise ValueError(
                f"dataset_weights={self.dataset_weights}: dataset={self.dataset!r} is no mixture ('a.csv + b.csv'); "
                "remove the weights."
            )


def weighted_rewards(rewards: Sequence[Callable], weights: Sequence[float] | None, timeout: float | None) -> Callable:
    """A reward that is the weighted sum of others, as the trainer sums them; None where none of them applies."""
    calls = [guarded(reward, timeout) for reward in rewards]

    def held_out_score(prompts: list, completions: list, **columns: list) -> list[float | None]:
        totals: list[float | None] = [None] * len(prompts)
        for call, weight in zip(calls, weights or [1.0] * len(calls), strict=True):
            for index, value in enumerate(call_reward(call, prompts, completions, columns)):
                if value is not None and math.isfinite(value):
                    totals[index] = (totals[index] or 0.0) + weight * value
        return totals

    return held_out_score


def task_of(
    recipe: OwnDataRecipeConfig, reward_weights: Sequence[float] | None, timeout: float | None, seed: int
) -> Task:
    """The task that these settings describe."""
    if recipe.grade is None:
        rewards = rewards_of(recipe)
        if reward_weights is not None and len(reward_weights) != len(rewards):
            raise ValueError(f"reward_weights={reward_weights}: give one for each of the {len(rewards)} rewards.")
        grade = weighted_rewards(rewards, reward_weights, timeout)
    else:
        function = load_function("grade", recipe.grade)
        grade = functools.wraps(function)(weighted_rewards([function], None, timeout))
    return own_data_task(recipe, grade, recipe.instruction or "", seed)


def recipe_task(recipe: OwnDataRecipeConfig, args: DiffuGRPOConfig) -> Task:
    """The task of a run, from its settings."""
    return task_of(recipe, args.reward_weights, args.reward_timeout, args.seed)


def task_of_run(settings: dict[str, Any]) -> Task:
    """The task of an earlier run, from the settings in its config.yaml."""
    if not settings.get("dataset"):
        raise ValueError(
            "task='grpo': which columns ask and answer is read from a run's config.yaml; name the run's folder as "
            "adapter or model."
        )
    names = {each.name for each in fields(OwnDataRecipeConfig)}
    recipe = OwnDataRecipeConfig(**{name: value for name, value in settings.items() if name in names})
    return task_of(
        recipe, settings.get("reward_weights"), settings.get("reward_timeout", 600.0), settings.get("seed", 42)
    )


def parse_own_data(recipe_file: str, argv: list[str]) -> tuple[OwnDataRecipeConfig, Task]:
    """The settings of `recipes/grpo.py` on a command line, and their task."""
    recipe, args, _ = parse_recipe(recipe_file, OwnDataRecipeConfig, DiffuGRPOConfig, ModelConfig, argv=argv)
    return recipe, recipe_task(recipe, args)
