"""Rewards and datasets are checked together at start: what a reward asks for must be there."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.utils import logging
from trl.trainer.utils import get_callable_name

from dgrpo.reliability.rewards import guarded

logger = logging.get_logger(__name__)


def required_columns(reward: Callable) -> list[str]:
    """Dataset columns that a reward asks for by name and has no default for."""
    given = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "self"}
    parameters = inspect.signature(reward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in named and p.default is p.empty and p.name not in given]


# What TRL passes beside the dataset's columns, of which none may have such a name.
_PASSED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


def check_columns(rewards: list, columns: list[str]) -> None:
    """ValueError where a reward cannot be called with the dataset's columns and what TRL passes beside them."""
    if taken := sorted(set(_PASSED) & set(columns)):
        raise ValueError(f"dataset: the columns {taken} have names that rewards get as arguments; rename them.")
    for reward in rewards:
        if isinstance(reward, str) or hasattr(reward, "config"):
            continue
        if isinstance(reward, nn.Module) or not callable(reward):
            raise ValueError(
                f"reward_funcs: {type(reward).__name__} is neither a function nor a model of transformers; wrap it in "
                "a function (prompts, completions, **columns) -> list of numbers."
            )
        name = get_callable_name(reward)
        if missing := [c for c in required_columns(reward) if c not in columns]:
            raise ValueError(
                f"reward_funcs: {name} asks for the columns {missing}, which the dataset lacks; it has "
                f"{sorted(columns)}{' after remove_unused_columns' if columns == ['prompt'] else ''}."
            )
        passed = {*_PASSED, "completion_ids", *columns} - {"prompt", "completion"}
        try:
            inspect.signature(reward).bind(**dict.fromkeys(passed))
        except TypeError as error:
            raise ValueError(
                f"reward_funcs: {name} cannot be called by keyword with {', '.join(sorted(passed))}: {error}. Give it "
                "the arguments (prompts, completions, **columns)."
            ) from error


def check_dataset(name: str, dataset: Any, args: Any) -> list[str]:
    """The columns that rewards get of the dataset; ValueError where it is no dataset of prompts."""
    if (columns := getattr(dataset, "column_names", None)) is None:
        raise ValueError(
            f"{name}={type(dataset).__name__}: give a datasets.Dataset with a column 'prompt'; Dataset.from_list "
            "makes one of a list of rows, or of a stream that does not know its columns."
        )
    if "prompt" not in columns:
        raise ValueError(f"{name}: there is no column 'prompt' among {sorted(columns)}; rename the one that asks.")
    return ["prompt"] if args.remove_unused_columns else columns


def checked_rewards(rewards: Any, dataset: Any, args: Any) -> list:
    """The rewards as a list, unable to end the run by raising or hanging, once they and the dataset fit together.

    Raises:
        ValueError: there is no reward, or one that cannot be called with the dataset's columns; the dataset has no
            prompts, fewer than a rollout takes, or no row with what the rewards ask for.
    """
    rewards = list(rewards) if isinstance(rewards, list | tuple) else [] if rewards is None else [rewards]
    if not rewards:
        raise ValueError("reward_funcs: there is none; give a function (prompts, completions, **columns), or several.")
    check_columns(rewards, check_dataset("train_dataset", dataset, args))
    if args.reward_weights is not None and len(args.reward_weights) != len(rewards):
        raise ValueError(f"reward_weights={args.reward_weights}: give one for each of the {len(rewards)} rewards.")
    if hasattr(dataset, "__len__"):
        args.check_num_prompts(len(dataset))
        check_references(rewards, args.reward_weights, dataset)
    is_model = [isinstance(reward, nn.Module | str) for reward in rewards]
    return [
        each if model else guarded(each, args.reward_timeout) for each, model in zip(rewards, is_model, strict=True)
    ]


def check_references(rewards: list, weights: list[float] | None, dataset: Any) -> None:
    """ValueError where no row has a value in the columns that a reward asks for; says where only some have.

    Rewards of weight 0 do not count.
    """
    asked = {}
    for reward, weight in zip(rewards, weights or [1.0] * len(rewards), strict=True):
        needed = [] if isinstance(reward, nn.Module | str) else required_columns(reward)
        if weight != 0:
            asked[get_callable_name(reward) if needed else ""] = needed
    usable = {}
    for name, needed in asked.items():
        columns = zip(*(dataset[column] for column in needed), strict=True) if needed else []
        usable[name] = sum(None not in row for row in columns) if needed else len(dataset)
        if usable[name] < len(dataset):
            logger.warning(
                f"{len(dataset) - usable[name]} of {len(dataset)} rows lack {needed}, which {name} asks for."
            )
    if not any(usable.values()):
        raise ValueError(
            f"dataset: no row has a value in what the rewards ask for ({asked}), so nothing can be learned."
        )
