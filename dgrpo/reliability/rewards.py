"""Reward functions as a run calls them: unable to end it by raising or hanging."""

import asyncio
import contextlib
import functools
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from transformers.utils import logging
from trl.trainer.utils import get_callable_name, is_async_callable

logger = logging.get_logger(__name__)

# A signal that no reward is known to use for itself, as math-verify uses SIGALRM and Slurm SIGUSR1.
_SIGNAL = signal.SIGVTALRM


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
            signal.pthread_kill(threading.main_thread().ident, _SIGNAL)  # type: ignore[arg-type]  # it has started
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
