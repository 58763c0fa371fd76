"""Reward functions as the trainer runs them: checked at start, and unable to end a run by raising or hanging."""

import asyncio
import contextlib
import functools
import inspect
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers.utils import logging
from trl.trainer.utils import get_callable_name, is_async_callable

logger = logging.get_logger(__name__)

# A signal that no reward is known to use for itself, as math-verify uses SIGALRM and Slurm SIGUSR1.
_SIGNAL = signal.SIGVTALRM


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


class _TookTooLong(BaseException):
    """Not an Exception, so that a reward's own `except Exception` around one row does not swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises _TookTooLong in the block after `seconds`, and each second from then on until the block is left.

    It interrupts Python code, regular expressions and whatever waits in the kernel (sleeping, reading, waiting for a
    lock or a process), not one long call into other C code. Without effect outside the main thread, where Python
    allows no signal handler.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        logger.warning_once("reward_timeout has no effect: training does not run in the main thread.")
        yield
        return
    over, deadline = threading.Event(), time.monotonic() + seconds

    def interrupt(number, frame):
        if not over.is_set() and time.monotonic() >= deadline:
            raise _TookTooLong

    def watch() -> None:
        wait: float = seconds
        while not over.wait(wait):
            signal.pthread_kill(threading.main_thread().ident, _SIGNAL)
            wait = 1.0

    previous = signal.signal(_SIGNAL, interrupt)
    # The thread cannot run while a regular expression holds the interpreter, the clock of CPU seconds not while the
    # reward waits: each covers for the other.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            over.set()
    finally:
        # Again, for the signal that came in the instant between the block and the line above.
        over.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        watcher.join()
        signal.signal(_SIGNAL, previous)


def guarded(reward: Callable, timeout: float | None = None) -> Callable:
    """The reward, but rows of a call that raises or takes over `timeout` seconds count as not applicable (None).

    Such calls and non-finite values are counted in the metrics `rewards/<name>/errors`, `.../timeouts` and
    `.../non_finite`; the first traceback is shown. A wrong number of values is not caught: that is a bug to be told at
    the first call.
    """
    name = get_callable_name(reward)
    shown: set[str] = set()

    def failed(prompts: list, kind: str, what: str) -> tuple[list[None], str]:
        if kind not in shown:
            logger.warning(f"Reward {name} {what}; its rows count as not applicable.\n{traceback.format_exc()}")
        shown.add(kind)
        return [None] * len(prompts), kind

    def report(log_metric: Callable | None, values, failure: str | None) -> list[float | None]:
        try:
            clean = [None if value is None or not math.isfinite(value) else float(value) for value in values]
        except TypeError as error:
            raise ValueError(
                f"reward_funcs: {name} returned {values!r:.200}; return a list with a number, or None where it does "
                "not apply, for each completion."
            ) from error
        if log_metric is not None:
            for kind in ("errors", "timeouts"):
                log_metric(f"rewards/{name}/{kind}", float(failure == kind))
            lost = sum(new is None and old is not None for new, old in zip(clean, values, strict=True))
            log_metric(f"rewards/{name}/non_finite", float(lost))
        return clean

    too_long = f"took longer than reward_timeout={timeout} s"
    # A reward is the user's code and any exception of it, an exit included, costs its rows alone.
    if is_async_callable(reward):

        @functools.wraps(reward)
        async def call_async(prompts, completions, **kwargs):
            failure = None
            try:
                async with asyncio.timeout(timeout) as limit:
                    values = await reward(prompts=prompts, completions=completions, **kwargs)
            except (Exception, SystemExit):  # noqa: BLE001
                late = limit.expired()
                values, failure = failed(prompts, *(("timeouts", too_long) if late else ("errors", "raised")))
            return report(kwargs.get("log_metric"), values, failure)

        call_async.__name__ = name
        return call_async

    @functools.wraps(reward)
    def call(prompts, completions, **kwargs):
        failure = None
        try:
            with time_limit(timeout):
                values = reward(prompts=prompts, completions=completions, **kwargs)
        except _TookTooLong:
            values, failure = failed(prompts, "timeouts", too_long)
        except (Exception, SystemExit):  # noqa: BLE001
            values, failure = failed(prompts, "errors", "raised")
        return report(kwargs.get("log_metric"), values, failure)

    call.__name__ = name
    return call
