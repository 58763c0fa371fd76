"""Executes tests against a program in another sandbox; runs after the text of `_bridge.py`, in the tests' process."""

import builtins
import decimal
import fractions
import importlib
import math
import os
import re
import sys
import types

from _bridge import Peer


class Raises:
    """`pytest.raises` as tests use it: `with pytest.raises(ValueError, match="...") as info`."""

    def __init__(self, expected, match=None):
        self.expected, self.match, self.value = expected, match, None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            raise AssertionError(f"did not raise {self.expected}")
        self.value = error
        return issubclass(kind, self.expected) and (self.match is None or bool(re.search(self.match, str(error))))


class Approx:
    """`pytest.approx` for numbers, and for lists, tuples and dicts of numbers."""

    def __init__(self, expected, rel=1e-6, abs=1e-12):
        self.expected, self.rel, self.abs = expected, rel, abs

    def __eq__(self, other):
        expected = self.expected
        if type(expected) in (list, tuple, dict):
            if type(other) is not type(expected) or len(other) != len(expected):
                return False
            keys = expected if type(expected) is dict else range(len(expected))
            return all(key in other for key in expected if type(expected) is dict) and all(
                Approx(expected[key], self.rel, self.abs) == other[key] for key in keys
            )
        number = type(other) in (int, float, bool, fractions.Fraction, decimal.Decimal)
        return number and math.isclose(expected, other, rel_tol=self.rel, abs_tol=self.abs)


def names_of_program(peer, hello):
    """The program's names as this process sees them, and those among them that belong to Python."""
    bound, reserved = {}, set()
    for name, value in hello["names"].items():
        if name.startswith("__"):
            continue
        if isinstance(value, dict) and "module" in value:
            if value["module"].partition(".")[0] in sys.stdlib_module_names:
                bound[name] = importlib.import_module(value["module"])
            continue
        bound[name] = peer.decode(value)
        if hasattr(builtins, name) or name in sys.stdlib_module_names:
            reserved.add(name)
    for name, kinds in hello["errors"].items():
        bound[name] = peer.exceptions[name] = type(name, (type(peer.exception(kinds, "")),), {})
        if hasattr(builtins, name):
            reserved.add(name)
    return bound, reserved


def judge(steps, used, read_fd, write_fd):
    """Execute the steps of the tests, and write "1" or "0" to the output for each that counts.

    `used` are the names that the tests read; those of the program that are among them are there without import.
    """
    results = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    peer = Peer(read_fd, write_fd, judges=True)
    hello = peer.receive()
    try:
        bound, reserved = names_of_program(peer, hello)
    except Exception:  # noqa: BLE001 - the other process did not send what `serve` sends
        peer.gone()
    # The tests' `all` and `math` must not become the program's, which would decide about itself; unless what they test
    # has such a name (`def sum(a, b)`) and no other.
    hidden = reserved if any(callable(bound.get(name)) for name in set(used) - reserved) else set()
    solution, pytest = types.ModuleType("solution"), types.ModuleType("pytest")
    solution.__dict__.update(bound)
    solution.__all__ = [name for name in bound if name not in hidden]
    pytest.raises, pytest.approx = Raises, Approx
    sys.modules.update(solution=solution, pytest=pytest)
    namespace = {"__name__": "tests"} | {name: bound[name] for name in solution.__all__ if name in used}
    for source, counts in steps:
        try:
            exec(compile(source, "tests.py", "exec"), namespace)
            passed = b"1"
        except BaseException:  # noqa: BLE001 - a program's SystemExit is a failed test
            passed = b"0"
        if counts:
            os.write(results, passed)
    os._exit(0)
