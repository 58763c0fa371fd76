"""Finds the tests in a row's texts, and executes them against a program in another process, or beside it in one.

Whether a test can be run here must not depend on the program, which could otherwise turn its own failure into "not
applicable". So the tests are rehearsed where there is no program (`rehearse`): each name that they do not bind stands
for the program's. What fails before such a name was looked up is no program's fault and does not count; what uses one
is up to the program.
"""

import ast
import builtins
import decimal
import dis
import fractions
import importlib
import inspect
import json
import math
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from rewards.sandbox.bridge import BINARY, CONVERSIONS, UNARY, Peer

# Marks and names that only pytest itself could serve.
MARKS_NOT_HERE = {"skip", "skipif", "xfail", "usefixtures"}
SETUP_NOT_HERE = ("setup_module", "setup_function")

Step = tuple[str, bool]  # a piece of the tests, to execute after those before it, and whether it counts as a test


class Raises:
    """`pytest.raises` as tests use it: `with pytest.raises(ValueError, match="...") as info`."""

    def __init__(self, expected: Any, pattern: str | None = None) -> None:
        self.expected, self.pattern = expected, pattern
        self.type: type[BaseException] | None = None
        self.value: BaseException | None = None

    def __enter__(self) -> "Raises":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> bool:
        if kind is None:
            raise AssertionError(f"did not raise {self.expected}")
        self.type, self.value = kind, error
        return issubclass(kind, self.expected) and (self.pattern is None or self.match(self.pattern))

    def match(self, pattern: str) -> bool:
        return bool(re.search(pattern, str(self.value)))


class Approx:
    """`pytest.approx` for numbers, and for lists, tuples and dicts of numbers."""

    def __init__(self, expected: Any, rel: Any = None, abs: Any = None, nan_ok: bool = False) -> None:
        # As in pytest, an absolute tolerance alone turns the relative one off.
        self.expected, self.nan_ok = expected, nan_ok
        self.rel = (1e-6 if abs is None else 0.0) if rel is None else rel
        self.abs = 1e-12 if abs is None else abs

    def __eq__(self, other: object) -> bool:
        expected = self.expected
        if isinstance(expected, dict) and type(expected) is type(other):
            return expected.keys() == other.keys() and all(self.near(expected[key], other[key]) for key in expected)
        if isinstance(expected, (list, tuple)) and type(expected) is type(other):
            return len(expected) == len(other) and all(map(self.near, expected, other))
        return self.near(expected, other)

    def near(self, expected: Any, other: Any) -> bool:
        if type(other) not in (int, float, bool, complex, fractions.Fraction, decimal.Decimal):
            return type(other) in (str, type(None)) and bool(expected == other)
        if isinstance(expected, complex) or isinstance(other, complex):
            return bool(abs(expected - other) <= max(self.rel * abs(expected), self.abs))
        both_nan = self.nan_ok and math.isnan(expected) and math.isnan(other)
        return both_nan or math.isclose(expected, other, rel_tol=0.0, abs_tol=max(self.rel * abs(expected), self.abs))


def raises(expected: Any, function: Any = None, *args: Any, match: str | None = None, **kwargs: Any) -> Raises:
    """`pytest.raises`, around a block or with the call that is to raise."""
    info = Raises(expected, match)
    if function is not None:
        with info:
            function(*args, **kwargs)
    return info


class Failed(BaseException):
    """Not an Exception, as in pytest, so that a test's own `except Exception` does not swallow it."""


def fail(reason: str = "", pytrace: bool = True) -> NoReturn:
    """`pytest.fail`."""
    raise Failed(reason)


class Param(tuple[Any, ...]):
    """`pytest.param`: the values of one case."""

    marks: Any = ()


def param(*values: Any, id: Any = None, marks: Any = ()) -> Param:
    case = Param(values)
    case.marks = marks if isinstance(marks, (list, tuple)) else [marks]
    return case


def parametrize(argnames: Any, argvalues: Any, indirect: Any = False, ids: Any = None, scope: Any = None) -> Any:
    """`pytest.mark.parametrize`: the function keeps its cases, and the steps of the tests call it with each."""
    names = argnames.replace(",", " ").split() if isinstance(argnames, str) else list(argnames)
    single = isinstance(argnames, str) and len(names) == 1
    rows = [(values,) if single and type(values) is not Param else values for values in argvalues]
    given = [dict(zip(names, values, strict=True)) for values in rows]
    marks = [getattr(mark, "name", None) for values in rows for mark in getattr(values, "marks", ())]

    def decorate(function: Any) -> Any:
        function.cases = [{**case, **more} for more in given for case in getattr(function, "cases", [{}])]
        function.filled = {*getattr(function, "filled", ()), *names}
        if indirect or MARKS_NOT_HERE.intersection(marks):
            function.not_here = True
        return function

    return decorate


class Mark:
    """A mark without effect, but that tests with some of them are for pytest itself; bare or called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        marked: Any = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(marked, (types.FunctionType, type)):
            return self
        if self.name in MARKS_NOT_HERE:
            setattr(marked, "not_here", True)  # noqa: B010 - mypy knows no such attribute
        return marked


def fixture(*args: Any, autouse: bool = False, **kwargs: Any) -> Any:
    """`@pytest.fixture`, bare or called: the function, which nobody will call."""
    if args and callable(args[0]):
        return args[0]

    def decorate(function: Any) -> Any:
        if autouse:
            function.autouse = True
        return function

    return decorate


PYTEST_HAS: dict[str, Any] = {
    "approx": Approx,
    "fail": fail,
    "fixture": fixture,
    "main": lambda *args, **kwargs: None,
    "mark": types.ModuleType("mark"),
    "param": param,
    "raises": raises,
}
PYTEST_HAS["mark"].__dict__.update(parametrize=parametrize, __getattr__=Mark)


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code and all that is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


def global_names(code: types.CodeType, operation: str) -> set[str]:
    """The global names on which a code does an operation ("LOAD" or "STORE"), in what is defined in it too."""
    found = [(each, instruction) for each in codes_in(code) for instruction in dis.get_instructions(each)]
    return {str(i.argval) for each, i in found if i.opname in (f"{operation}_NAME", f"{operation}_GLOBAL")}


def compiled(node: ast.stmt) -> types.CodeType:
    return compile(ast.Module([node], []), "tests.py", "exec")


class Namespace(dict[str, Any]):
    """The global names of the tests; one that they do not bind is asked for with `other`, which may raise KeyError."""

    def __init__(self, other: Callable[[str], Any]) -> None:
        super().__init__(__name__="tests", __file__="tests.py", __builtins__=builtins)
        self.other = other
        self.lost: set[str] = set()

    def __missing__(self, name: str) -> Any:
        # Where the tests' own set-up failed, the program's `expected` must not stand in for theirs.
        if name in self.lost:
            raise KeyError(name)
        return self.other(name)

    def execute(self, code: types.CodeType) -> bool:
        """Execute a piece of the tests; whether it ended without exception."""
        try:
            exec(code, self)
        except BaseException:  # noqa: BLE001 - a program's SystemExit is a failed test
            self.lost |= global_names(code, "STORE") - set(self)
            return False
        return True


class Touched(BaseException):
    """The tests would now use something of the program's."""


class Unknown:
    """Stands for something of the program's in a rehearsal, which ends where it is used."""

    def __getattr__(self, name: str) -> Any:
        raise Touched


def touch(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise Touched


for _name in [*CONVERSIONS, *UNARY, *BINARY, *(f"r{name}" for name in BINARY)]:
    setattr(Unknown, f"__{_name.rstrip('_')}__", touch)
for _name in ("call", "eq", "ne", "enter", "exit", "contains", "await", "aiter", "mro_entries", "instancecheck"):
    setattr(Unknown, f"__{_name}__", touch)
setattr(Unknown, "__subclasscheck__", touch)  # noqa: B010


class Rehearsal(Namespace):
    """Names of tests without a program, which notes when one is looked up that would be the program's."""

    def __init__(self, known: set[str]) -> None:
        super().__init__(self.of_program)
        self.known = known
        self.touched = False
        self.cut = False
        """Whether a piece was not executed to its end, so that what comes after it may depend on the program."""
        program = types.ModuleType("solution")
        program.__dict__.update(__getattr__=self.of_program, __all__=[])
        self.program = sys.modules["solution"] = program

    def of_program(self, name: str) -> Any:
        if name in self.known or name[:2] == "__":
            raise AttributeError(name) if name[:2] == "__" else KeyError(name)
        self.touched = True
        return Unknown()

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        self.touched |= type(value) is Unknown or value is self.program
        return value

    def may_run(self, code: types.CodeType, is_import: bool = False) -> bool:
        """Execute a piece of the tests; False where it fails and no program could be to blame."""
        self.touched = False
        if self.execute(code):
            return True
        # What it would have bound depends on the program.
        self.update(dict.fromkeys(self.lost, Unknown()))
        self.lost.clear()
        may_run = self.touched or self.cut and not is_import
        self.cut |= self.touched
        return may_run


def rehearse(texts: list[str]) -> NoReturn:
    """Write the steps of a row's tests to the output, as JSON; an empty list where no test is left, or can be run."""
    results = silenced()
    try:
        steps = find_steps(texts)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        steps = []
    os.write(results, json.dumps(steps).encode())
    os._exit(0)


def find_steps(texts: Sequence[str]) -> list[Step]:
    """The steps of the tests; none where none counts, or what they need before them fails without the program."""
    parts = [(text, ast.parse(text).body, compile(text, "tests.py", "exec")) for text in texts]
    foreign = {name for *_, code in parts for name in global_names(code, "LOAD")}
    bound = {name for *_, code in parts for name in global_names(code, "STORE")}
    known = {*dir(builtins), "__file__"}
    if not foreign - known - bound and not any(re.search(r"\bsolution\b", text) for text in texts):
        known = set()  # what they test is named like something of Python's (`def sum(a, b)`)
    names = Rehearsal(known)
    sys.modules["pytest"] = pytest_stand_in()
    steps: list[Step] = []
    for text, statements, _ in parts:
        functions = [node for node in statements if isinstance(node, ast.FunctionDef) and node.name[:4] == "test"]
        asserts = [node for node in statements if isinstance(node, ast.Assert)]
        uses = False
        for node in statements:
            may_run = names.may_run(compiled(node), isinstance(node, (ast.Import, ast.ImportFrom)))
            uses |= names.touched and isinstance(node, (ast.Expr, ast.For, ast.While, ast.With, ast.Try, ast.If))
            counts = node in asserts and not functions
            if not may_run and not counts:
                return []
            if asserts and not functions and may_run:
                steps.append((ast.unparse(node), counts))
        if functions:
            steps.append((text, False))
            # Otherwise pytest would call functions of its own accord before these tests.
            own = {name: each for name, each in names.items() if isinstance(each, types.FunctionType)}
            if not any(name in SETUP_NOT_HERE or hasattr(each, "autouse") for name, each in own.items()):
                steps += [(call, True) for node in functions for call in calls(node, names)]
        elif not asserts:
            classes = [each for each in names.values() if type(each) is type]
            steps.append((text, uses and not any(name[:4] == "test" for each in classes for name in vars(each))))
    return steps if any(counts for _, counts in steps) else []


def calls(node: ast.FunctionDef, names: Rehearsal) -> list[str]:
    """The calls for which a test function stands, one for each case; none that only pytest itself could make."""
    tried = {child for top in ast.walk(node) if isinstance(top, ast.Try) for child in ast.walk(top)}
    imports = [each for each in ast.walk(node) if isinstance(each, (ast.Import, ast.ImportFrom)) and each not in tried]
    if set(re.findall(r"\bpytest\.(\w+)", ast.unparse(node))) - set(PYTEST_HAS):
        return []
    if not all(Rehearsal(names.known).execute(compiled(each)) for each in imports):
        return []
    function: Any = dict.get(names, node.name)
    if isinstance(function, Unknown):  # by a decorator, or with cases, of the program's
        return [f"assert [{node.name}(**case) for case in getattr({node.name}, 'cases', [{{}}])]"]
    cases, filled = (getattr(function, name, None) for name in ("cases", "filled"))
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    needed = {each.name for each in parameters if each.default is each.empty and each.kind not in (2, 4)}
    if getattr(function, "not_here", False) or inspect.iscoroutinefunction(function) or needed - (filled or set()):
        return []
    found = [f"{node.name}()"]
    if cases is not None:
        found = [f"{node.name}(**{node.name}.cases[{i}])" for i in range(len(cases))]
    cut = names.cut
    left = []
    for call in found:
        if names.may_run(compile(call, "tests.py", "exec")):
            left.append(call)
        names.cut = cut  # each test depends on the set-up before all of them, not on the others
    return left


def pytest_stand_in() -> types.ModuleType:
    """The module that tests import as `pytest`."""
    pytest = types.ModuleType("pytest")
    pytest.__dict__.update(PYTEST_HAS)
    return pytest


def of_remote(error: BaseException, name: str) -> Any:
    """An attribute that an exception has in the program's process."""
    if name.startswith("_") or "_remote" not in vars(error):
        raise AttributeError(name)
    return getattr(vars(error)["_remote"], name)


def text_of(error: BaseException) -> str:
    return str(vars(error).get("_text", BaseException.__str__(error)))


def names_of_program(peer: Peer, hello: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The program's names as this process sees them, and those among them that belong to Python."""
    bound: dict[str, Any] = {}
    reserved = set()
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


def judge(steps: list[Step], read_fd: int, write_fd: int) -> NoReturn:
    """Execute the steps of the tests, and write "1" or "0" to the output for each that counts.

    The names that the program binds are there without import, where the tests bind none of that name.
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
    codes = [compile(source, "tests.py", "exec") for source, _ in steps]
    mentioned = {name for code in codes for each in codes_in(code) for name in (*each.co_names, *each.co_varnames)}
    hidden = reserved if any(callable(bound.get(name)) for name in mentioned - reserved) else set()
    solution = types.ModuleType("solution")
    solution.__dict__.update(bound)
    solution.__dict__["__all__"] = [name for name in bound if name not in hidden]
    sys.modules["solution"] = solution
    execute(steps, {name: bound[name] for name in solution.__all__}, results)


def judge_together(steps: list[Step], program: str) -> NoReturn:
    """Execute the program and then the steps in this one process."""
    results = silenced()
    solution = types.ModuleType("solution")
    sys.modules["solution"] = solution
    exec(compile(program, "solution.py", "exec"), solution.__dict__)
    execute(steps, {name: value for name, value in vars(solution).items() if name[:2] != "__"}, results)


def silenced() -> int:
    """The output of this process, which nothing else shall write to."""
    results = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    return results


def execute(steps: list[Step], of_program: dict[str, Any], results: int) -> NoReturn:
    """Execute the steps in order, tell the result of those that count, and end the process."""
    sys.modules["pytest"] = pytest_stand_in()
    names = Namespace(of_program.__getitem__)
    for source, counts in steps:
        passed = names.execute(compile(source, "tests.py", "exec"))
        if counts:
            os.write(results, b"1" if passed else b"0")
    os._exit(0)
