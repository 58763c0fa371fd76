"""CPU time in units of this machine, so that one bound holds on slow and on fast ones."""

import functools
import time
from collections.abc import Callable


def cpu_seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


@functools.cache
def unit() -> float:
    """CPU seconds that adding up a million integers takes here, the slowest of three: some hundredths."""
    return max(cpu_seconds(lambda: sum(range(1_000_000))) for _ in range(3))


def effort(call: Callable[[], object]) -> float:
    """CPU time of a call, in units."""
    return cpu_seconds(call) / unit()
