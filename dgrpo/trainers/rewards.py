"""Reward functions as the trainer runs them: checked at start, and unable to end a run by raising."""

import functools
import inspect
import math
import traceback
from collections.abc import Callable

from transformers.utils import logging

logger = logging.get_logger(__name__)


def required_columns(reward: Callable) -> list[str]:
    """Dataset columns that a reward asks for by name and has no default for."""
    given = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "self"}
    parameters = inspect.signature(reward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in named and p.default is p.empty and p.name not in given]


def check_columns(rewards: list, columns: list[str]) -> None:
    """ValueError where a reward asks for a column that the dataset does not have."""
    for reward in rewards:
        if inspect.isroutine(reward) and (missing := [c for c in required_columns(reward) if c not in columns]):
            raise ValueError(
                f"reward_funcs: {reward.__name__} asks for the columns {missing}, which the dataset lacks; it has "
                f"{sorted(columns)}."
            )


def _finite(values: list) -> list[float | None]:
    return [None if value is None or not math.isfinite(value) else float(value) for value in values]


def guarded(reward: Callable) -> Callable:
    """The reward, but rows of a call that raises count as not applicable (None); the first traceback is kept.

    Errors and non-finite values are counted in the metrics `rewards/<name>/errors` and `.../non_finite`. A wrong
    number of values is not caught: that is a bug to be told at the first call.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    seen = False

    def failed(prompts: list) -> list[None]:
        nonlocal seen
        if not seen:
            logger.warning(f"Reward {name} raised; its rows count as not applicable.\n{traceback.format_exc()}")
        seen = True
        return [None] * len(prompts)

    def report(kwargs: dict, errors: int, values: list) -> list[float | None]:
        clean = _finite(values)
        if "log_metric" in kwargs:
            kwargs["log_metric"](f"rewards/{name}/errors", float(errors))
            lost = sum(new is None and old is not None for new, old in zip(clean, values, strict=True))
            kwargs["log_metric"](f"rewards/{name}/non_finite", float(lost))
        return clean

    # A reward is the user's code and any exception of it costs its rows alone, hence the blind excepts.
    if inspect.iscoroutinefunction(reward):

        @functools.wraps(reward)
        async def call_async(prompts, completions, **kwargs):
            try:
                values, errors = await reward(prompts=prompts, completions=completions, **kwargs), 0
            except Exception:  # noqa: BLE001
                values, errors = failed(prompts), 1
            return report(kwargs, errors, values)

        return call_async

    @functools.wraps(reward)
    def call(prompts, completions, **kwargs):
        try:
            values, errors = reward(prompts=prompts, completions=completions, **kwargs), 0
        except Exception:  # noqa: BLE001
            values, errors = failed(prompts), 1
        return report(kwargs, errors, values)

    return call
