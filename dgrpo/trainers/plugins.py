"""Functions that a setting names: estimators, objectives and rewards, the user's own among them."""

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points

from torch import Tensor

from dgrpo.estimators import ESTIMATORS
from dgrpo.objectives import OBJECTIVES, ObjectiveInputs
from dgrpo.views import MaskedViews

REWARD_GROUP = "dgrpo.rewards"


def load_function(setting: str, name: str) -> Callable:
    """The function behind `package.module:function`; ValueError names the setting where there is none."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{setting}: cannot import {module_name!r} of {name!r}: {error}.") from error
    if not callable(function := getattr(module, attribute, None)):
        raise ValueError(f"{setting}: module {module_name!r} has no function {attribute!r}.")
    return function


def resolve_reward(name: str) -> Callable:
    """The reward `package.module:function`, or the one that an installed package offers under `dgrpo.rewards`."""
    if ":" in name:
        return load_function("reward_funcs", name)
    offered = {point.name: point for point in entry_points(group=REWARD_GROUP)}
    if name not in offered:
        raise ValueError(
            f"reward_funcs: {name!r} is no 'package.module:function' and not installed ({', '.join(sorted(offered))})."
        )
    return offered[name].load()


def resolve_estimator(name: str) -> Callable:
    """The estimator of this name, or `package.module:function`."""
    if ":" in name:
        return load_function("estimator", name)
    if name not in ESTIMATORS:
        raise ValueError(f"estimator={name!r}: choose {', '.join(ESTIMATORS)} or package.module:function.")
    return ESTIMATORS[name]


def configured_objective(args) -> Callable[[ObjectiveInputs], tuple[Tensor, dict[str, Tensor]]]:
    """The objective with its settings; those that it shares with TRL (epsilon, beta) are TRL's fields."""
    objective = OBJECTIVES[args.objective]
    shared = {name: getattr(args, name) for name in ("epsilon", "epsilon_high", "beta")}
    return partial(objective, **_accepted(objective, shared) | (args.objective_kwargs or {}))


def configured_estimator(args) -> Callable[..., MaskedViews]:
    """The estimator with its settings; those that it shares with the config are the config's fields."""
    estimator = resolve_estimator(args.estimator)
    shared = {name: getattr(args, name) for name in ("p_mask_prompt", "prompt_mask_scope", "block_length")}
    return partial(estimator, **_accepted(estimator, shared) | (args.estimator_kwargs or {}))


def check_settings(args) -> None:
    """ValueError where estimator_kwargs or objective_kwargs name what the function does not take."""
    functions = {"estimator_kwargs": resolve_estimator(args.estimator)}
    if args.objective is not None:
        functions["objective_kwargs"] = OBJECTIVES[args.objective]
    elif args.objective_kwargs:
        raise ValueError(f"objective_kwargs={args.objective_kwargs!r} without an objective; set objective.")
    for name, function in functions.items():
        parameters = inspect.signature(function).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "generator"]
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not takes_all and (unknown := sorted(set(getattr(args, name) or {}) - set(known))):
            raise ValueError(
                f"{name}={getattr(args, name)!r}: {function.__name__} has no {', '.join(unknown)}; its settings are "
                f"{', '.join(known) or 'none'}."
            )


def _accepted(function: Callable, settings: dict) -> dict:
    """Those of `settings` that are parameters of the function."""
    return {name: value for name, value in settings.items() if name in inspect.signature(function).parameters}
