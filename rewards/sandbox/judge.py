"""Executes tests against a program in another sandbox; runs after the text of `bridge.py`, in the tests' process."""

import builtins
import decimal
import fractions
import importlib
import math
import os
import re
import sys
import types

from rewards.sandbox.bridge import Peer


class Raises:
    """`pytest.raises` as tests use it: `with pytest.raises(ValueError, match="...") as info`."""

    def __init__(self, expected, match=None):
        self.expected, self.match, self.type, self.value = expected, match, None, None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            raise AssertionError(f"did not raise {self.expected}")
        self.type, self.value = kind, error
        return issubclass(kind, self.expected) and (self.match is None or bool(re.search(self.match, str(error))))


class Approx:
    """`pytest.approx` for numbers, and for lists, tuples and dicts of numbers."""

    def __init__(self, expected, rel=1e-6, abs=1e-12, nan_ok=False):
        self.expected, self.rel, self.abs, self.nan_ok = expected, rel, abs, nan_ok

    def __eq__(self, other):
        expected = self.expected
        if type(expected) in (list, tuple, dict):
            if type(other) is not type(expected) or len(other) != len(expected):
                return False
            keys = expected if type(expected) is dict else range(len(expected))
            return all(key in other for key in expected if type(expected) is dict) and all(
                Approx(expected[key], self.rel, self.abs, self.nan_ok) == other[key] for key in keys
            )
        if type(other) not in (int, float, bool, fractions.Fraction, decimal.Decimal):
            return False
        both_nan = self.nan_ok and math.isnan(expected) and math.isnan(other)
        return both_nan or math.isclose(expected, other, rel_tol=self.rel, abs_tol=self.abs)


def raises(expected, function=None, *args, match=None, **kwargs):
    """`pytest.raises`, around a block or with the call that is to raise."""
    info = Raises(expected, match)
    if function is not None:
        with info:
            function(*args, **kwargs)
    return info


class Failed(BaseException):
    """Not an Exception, as in pytest, so that a test's own `except Exception` does not swallow it."""


def fail(reason="", pytrace=True):
    """`pytest.fail`."""
    raise Failed(reason)


class Param(tuple):
    """`pytest.param`: the values of one case."""


def parametrize(argnames, argvalues, indirect=False, ids=None, scope=None):
    """`pytest.mark.parametrize`: the function keeps its cases, and the steps of the tests call it with each."""
    names = argnames.replace(",", " ").split() if isinstance(argnames, str) else argnames
    single = isinstance(argnames, str) and len(names) == 1
    rows = [(values,) if single and type(values) is not Param else values for values in argvalues]
    given = [dict(zip(names, values, strict=True)) for values in rows]

    def decorate(function):
        function.cases = [{**case, **more} for more in given for case in getattr(function, "cases", [{}])]
        return function

    return decorate


def no_effect(*args, **kwargs):
    """`@pytest.fixture` and other marks, bare or called: the function as it is."""
    return args[0] if args and callable(args[0]) else lambda function: function


def pytest_stand_in():
    """The module that tests import as `pytest`; its names are `PYTEST_HAS` in `steps.py`."""
    pytest = types.ModuleType("pytest")
    pytest.raises, pytest.approx, pytest.fail, pytest.fixture = raises, Approx, fail, no_effect
    pytest.param, pytest.main = lambda *values, id=None, marks=(): Param(values), no_effect
    pytest.mark = types.ModuleType("mark")
    pytest.mark.parametrize, pytest.mark.__getattr__ = parametrize, lambda name: no_effect
    return pytest


def of_remote(error, name):
    """An attribute that an exception has in the program's process."""
    if name.startswith("_") or "_remote" not in vars(error):
        raise AttributeError(name)
    return getattr(vars(error)["_remote"], name)


def text_of(error):
    return vars(error).get("_text", BaseException.__str__(error))


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
        base = type(peer.exception(kinds, "", [""]))
        bound[name] = peer.exceptions[name] = type(name, (base,), {"__getattr__": of_remote, "__str__": text_of})
        if hasattr(builtins, name):
            reserved.add(name)
    return bound, reserved


def judge(steps, used, mentioned, read_fd, write_fd):
    """Execute the steps of the tests, and write "1" or "0" to the output for each that counts.

    `used` are the names that the tests read and do not bind, `mentioned` all names in their text. Those of the program
    that are used are there without import.
    """
    results = silenced()
    peer = Peer(read_fd, write_fd, judges=True)
    hello = peer.receive()
    try:
        bound, reserved = names_of_program(peer, hello)
    except Exception:  # noqa: BLE001 - the other process did not send what `serve` sends
        peer.gone()
    # The tests' `all` and `math` must not become the program's, which would decide about itself; unless what they test
    # has such a name (`def sum(a, b)`) and no other.
    hidden = reserved if any(callable(bound.get(name)) for name in set(mentioned) - reserved) else set()
    solution = types.ModuleType("solution")
    solution.__dict__.update(bound)
    solution.__all__ = [name for name in bound if name not in hidden]
    sys.modules["solution"] = solution
    execute(steps, {name: bound[name] for name in solution.__all__ if name in used}, results)


def judge_together(steps, used, program):
    """Execute the program and then the steps in this one process."""
    results = silenced()
    solution = types.ModuleType("solution")
    sys.modules["solution"] = solution
    exec(compile(program, "solution.py", "exec"), solution.__dict__)
    execute(steps, {name: solution.__dict__[name] for name in used if name in solution.__dict__}, results)


def rehearse(texts):
    """Execute what of the tests does without the program, and write "1" or "0" to the output for each text."""
    execute([(text, True) for text in texts], {}, silenced())


def silenced():
    """The output of this process, which nothing else shall write to."""
    results = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    return results


def execute(steps, namespace, results):
    """Execute the steps in order, tell the result of those that count, and end the process."""
    sys.modules["pytest"] = pytest_stand_in()
    namespace |= {"__name__": "tests", "__file__": "tests.py"}
    for source, counts in steps:
        try:
            exec(compile(source, "tests.py", "exec"), namespace)
            passed = b"1"
        except BaseException:  # noqa: BLE001 - a program's SystemExit is a failed test
            passed = b"0"
        if counts:
            os.write(results, passed)
    os._exit(0)
