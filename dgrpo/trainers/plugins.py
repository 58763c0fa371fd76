"""Functions that a setting names: estimators, objectives and rewards, the user's own among them."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import entry_points

import torch
from torch import Tensor

from dgrpo.estimators import ESTIMATORS
from dgrpo.objectives import OBJECTIVES, SHARED, Metrics, check_combination, facts_of, name_of
from dgrpo.reliability.dotted import imported
from dgrpo.reliability.ranges import check_range
from dgrpo.sampling import Rollout
from dgrpo.views import MaskedViews

REWARD_GROUP = "dgrpo.rewards"


def load_function(setting: str, name: str) -> Callable:
    """The function behind `package.module:function`; ValueError names the setting where there is none."""
    if not callable(function := imported(setting, name)):
        module_name, _, attribute = name.partition(":")
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
    return load_function("reward_funcs", offered[name].value)


def resolve_estimator(name: str) -> Callable[..., MaskedViews]:
    """The estimator of this name, or `package.module:function`."""
    return _resolve("estimator", name, ESTIMATORS)


def resolve_objective(name: str) -> Callable[..., tuple[Tensor, Metrics]]:
    """The objective of this name, or `package.module:function`."""
    return _resolve("objective", name, OBJECTIVES)


def _resolve(setting: str, name: str, own: dict[str, Callable]) -> Callable:
    if isinstance(name, str) and ":" in name:
        return load_function(setting, name)
    if name not in own:
        raise ValueError(f"{setting}={name!r}: choose {', '.join(own)} or package.module:function.")
    return own[name]


def configured_objective(args) -> Callable[..., tuple[Tensor, Metrics]]:
    """The objective with its settings: those it shares with the config, where they are set, and objective_kwargs."""
    return _configured(resolve_objective(args.objective), args, SHARED, args.objective_kwargs)


def configured_estimator(args) -> Callable[..., MaskedViews]:
    """The estimator with its settings; those that it shares with the config are the config's fields."""
    shared = ("p_mask_prompt", "prompt_mask_scope", "block_length")
    return _configured(resolve_estimator(args.estimator), args, shared, args.estimator_kwargs)


def _configured(function: Callable, args, shared: tuple[str, ...], own: dict | None) -> Callable:
    """The function with those of the config's `shared` settings that it takes and that are not None, and `own`."""
    taken = [name for name in shared if name in inspect.signature(function).parameters]
    return partial(
        function, **{name: value for name in taken if (value := getattr(args, name)) is not None} | (own or {})
    )


def _check_kwargs(name: str, function: Callable, parameters: Mapping[str, inspect.Parameter], given: dict) -> None:
    """ValueError where settings of an estimator or objective are none of its own, of a wrong type or out of range."""
    if shared := sorted(set(given) & set(SHARED)):
        raise ValueError(f"{name}={given!r}: {', '.join(shared)} is a setting beside {name}; set it there.")
    known = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in ("generator", *SHARED)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_all and (unknown := sorted(set(given) - set(known))):
        raise ValueError(
            f"{name}={given!r}: {name_of(function)} has no {', '.join(unknown)}; its settings are "
            f"{', '.join(known) or 'none'}."
        )
    for key in set(given) & set(parameters):
        hint = parameters[key].annotation
        allowed = (float, int) if hint is float else hint
        if hint in (bool, int, float, str, int | None) and (
            not isinstance(given[key], allowed) or (hint is not bool and isinstance(given[key], bool))
        ):
            raise ValueError(f"{name}={given!r}: {key} is of the type {getattr(hint, '__name__', hint)}.")


def check_plugins(args) -> None:
    """ValueError where estimator or objective cannot be called as they will be, or do not go together."""
    objective = resolve_objective(args.objective)
    named: list[tuple[str, Callable, Callable, dict]] = [("objective", objective, configured_objective, {})]
    if args.estimator is not None:
        estimator = resolve_estimator(args.estimator)
        check_combination(estimator, objective, {name: getattr(args, name) for name in SHARED})
        named.append(("estimator", estimator, configured_estimator, {"generator": None}))
    for setting, function, configured, words in named:
        given = getattr(args, f"{setting}_kwargs") or {}
        try:
            parameters = inspect.signature(function).parameters
            _check_kwargs(f"{setting}_kwargs", function, parameters, given)
            inspect.signature(configured(args)).bind(None, **words)
        except TypeError as error:
            first = "(rollout, *, generator, settings)" if words else "(batch, *, settings)"
            raise ValueError(
                f"{setting}={getattr(args, setting)!r}: it cannot be called as {first}, {error}."
            ) from error
        if function in OBJECTIVES.values():
            for name, value in given.items():
                check_range(name, value)
        # Whether the blocks of one that draws over several of them fit is known with the model.
        if function in ESTIMATORS.values() and given and not facts_of(function).whole_canvas:
            # Ranges that depend on each other and on the canvas: what it refuses, it refuses here.
            length = args.max_completion_length
            ids, mask = torch.zeros(2, length, dtype=torch.long), torch.ones(2, length, dtype=torch.bool)
            values, order = torch.zeros(2, length), torch.arange(length).expand(2, -1)
            rollout = Rollout(ids[:, :1], mask[:, :1], ids, mask, order, values, values, ids[:, 0], length, length)
            try:
                configured(args)(rollout, generator=torch.Generator())
            except ValueError as error:
                raise ValueError(f"estimator_kwargs={given!r}: {error}") from error
