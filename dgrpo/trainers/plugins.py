"""Functions that a setting names: rewards and estimators of the user's own."""

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points

from dgrpo.estimators import ESTIMATORS

REWARD_GROUP = "dgrpo.rewards"


def load_function(setting: str, name: str) -> Callable:
    """The function behind `package.module:function`; ValueError names the setting where there is none."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{setting}: cannot import {module_name!r} of {name!r}: {error}.") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{setting}: module {module_name!r} has no function {attribute!r}.")
    return getattr(module, attribute)


def resolve_reward(name: str) -> Callable:
    """The reward `package.module:function`, or the one that an installed package offers under `dgrpo.rewards`."""
    if ":" in name:
        return load_function("reward_funcs", name)
    offered = {point.name: point for point in entry_points(group=REWARD_GROUP)}
    if name not in offered:
        raise ValueError(
            f"reward_funcs: {name!r} is neither 'package.module:function' nor installed ({', '.join(sorted(offered))})."
        )
    return offered[name].load()


def resolve_estimator(name: str) -> Callable:
    """The estimator of this name, or `package.module:function`."""
    if ":" in name:
        return load_function("estimator", name)
    if name not in ESTIMATORS:
        raise ValueError(f"estimator={name!r}: choose {', '.join(ESTIMATORS)} or package.module:function.")
    return ESTIMATORS[name]
