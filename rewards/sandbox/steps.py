"""The steps of a row's tests, from their text alone: what to execute, what counts, what does without the program.

Whether a test can be run here must not depend on the program, which could otherwise turn its own failure into "not
applicable". So it is read off the text, and found by executing each `Step.alone` where there is no program.
"""

import ast
import builtins
import copy
import math
import re
import symtable
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

# What the stand-in for pytest has (`judge.py`), and what only pytest itself would do, by the names that ask for it.
PYTEST_HAS = {"approx", "fail", "fixture", "main", "mark", "param", "raises"}
MARKS_NOT_HERE = {"skip", "skipif", "xfail", "usefixtures"}
SETUP_NOT_HERE = {"setup_module", "setup_function"}


class Step(NamedTuple):
    """A piece of the tests, to execute after those before it."""

    source: str
    counts: bool
    """Whether it is a test, passed when it ends without exception."""
    alone: str = ""
    """What of it does without the program: where that fails, no program is to blame."""


def split_tests(tests: Sequence[str]) -> list[Step]:
    """The tests as steps; empty when none counts, or a text is not Python."""
    steps: list[Step] = []
    try:
        parts = [(part, ast.parse(part).body) for part in tests]
        alone = without_program([node for _, statements in parts for node in statements])
        for part, statements in parts:
            functions = {
                node.name: node for node in statements if isinstance(node, ast.FunctionDef) and node.name[:4] == "test"
            }
            whole = "\n".join(alone[node] for node in statements)
            if functions:
                steps.append(Step(part, False, whole))
                if not is_set_up_by_pytest(statements):
                    steps += [step for function in functions.values() for step in cases(function)]
            elif any(isinstance(node, ast.Assert) for node in statements):
                steps += [Step(ast.unparse(node), isinstance(node, ast.Assert), alone[node]) for node in statements]
            else:
                # A call that does without the program tests nothing.
                calls = any(
                    isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not alone[node]
                    for node in statements
                )
                steps.append(Step(part, calls and not has_test_class(statements), whole))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return steps if any(step.counts for step in steps) else []


@lru_cache(64)  # a group of completions has the same tests
def names_used(steps: tuple[Step, ...]) -> tuple[list[str], list[str]]:
    """The names that the tests read and do not bind themselves, and all names in their text.

    Where the program makes the tests' set-up fail, its own `test_sum` or `expected` must not stand in for theirs.
    """
    statements = [node for step in steps for node in ast.parse(step.source).body]
    nodes = [node for top in statements for node in ast.walk(top)]
    names = {getattr(node, field, None) for node in nodes for field in ("id", "attr", "name")}
    reads: set[str] = set()
    own: set[str] = set()
    for top in statements:
        read, bound = names_of(top)
        reads |= read
        own |= set() if isinstance(top, (ast.Import, ast.ImportFrom)) else bound - read
    return sorted(reads - own), sorted(name for name in names if isinstance(name, str))


def cases(function: ast.FunctionDef) -> list[Step]:
    """The tests that a test function stands for; none where it needs what only pytest itself could give.

    Where the values of `parametrize` are written out, each case is a test; else all of them together are one.
    """
    attributes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    of_pytest = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "pytest"}
    decorators = [node for top in function.decorator_list for node in ast.walk(top)]
    marks = {node.attr for node in decorators if isinstance(node, ast.Attribute)}
    filled: set[str] = set()
    numbers: list[int | None] = []
    for call in function.decorator_list:
        if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] == "parametrize":
            given = dict(zip(("argnames", "argvalues", "indirect"), call.args, strict=False))
            given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
            if "indirect" not in given and "argnames" in given:
                filled.update(re.findall(r"\w+", ast.unparse(given["argnames"])))
            numbers.append(num_written(given.get("argvalues")))
    if of_pytest - PYTEST_HAS or marks & MARKS_NOT_HERE or not arguments_needed(function.args) <= filled:
        return []
    name = function.name
    if None in numbers:
        calls = [f"assert [{name}(**case) for case in {name}.cases]"]
    elif numbers:
        calls = [f"{name}(**{name}.cases[{i}])" for i in range(math.prod(number or 0 for number in numbers))]
    else:
        calls = [f"{name}()"]
    return [Step(call, True, imports(function)) for call in calls]


def num_written(values: ast.expr | None) -> int | None:
    """The number of values that a list or tuple is written with; None where the text does not tell."""
    if not isinstance(values, (ast.List, ast.Tuple)) or any(isinstance(each, ast.Starred) for each in values.elts):
        return None
    return len(values.elts)


def arguments_needed(arguments: ast.arguments) -> set[str]:
    """The arguments without a default."""
    positional = [*arguments.posonlyargs, *arguments.args]
    needed = positional[: len(positional) - len(arguments.defaults)]
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return {each.arg for each in [*needed, *(each for each, default in keywords if default is None)]}


def is_set_up_by_pytest(statements: Sequence[ast.stmt]) -> bool:
    """Whether pytest would run functions of its own accord before the tests of this text."""
    functions = [node for node in statements if isinstance(node, ast.FunctionDef)]
    decorators = [node for function in functions for top in function.decorator_list for node in ast.walk(top)]
    return any(function.name in SETUP_NOT_HERE for function in functions) or any(
        isinstance(node, ast.keyword) and node.arg == "autouse" for node in decorators
    )


def has_test_class(statements: Sequence[ast.stmt]) -> bool:
    """Whether there are test methods, which pytest or unittest would run."""
    methods = [node for top in statements if isinstance(top, ast.ClassDef) for node in top.body]
    return any(isinstance(node, ast.FunctionDef) and node.name[:4] == "test" for node in methods)


def imports(function: ast.FunctionDef) -> str:
    """The imports in a function that are not the program's, nor tried only."""
    tried = {node for top in ast.walk(function) if isinstance(top, ast.Try) for node in ast.walk(top)}
    found = [node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(ast.unparse(node) for node in found if node not in tried and not mentions_program(node))


def mentions_program(node: ast.AST) -> bool:
    """Whether `solution` is imported in a statement, or could be, as its name stands there as text."""
    names: list[object] = []
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            names += [alias.name for alias in each.names]
        elif isinstance(each, ast.ImportFrom) and not each.level:
            names.append(each.module)
        elif isinstance(each, ast.Constant):
            names.append(each.value)
    return any(isinstance(name, str) and name.partition(".")[0] == "solution" for name in names)


def names_of(node: ast.stmt) -> tuple[set[str], set[str]]:
    """The global names that a statement reads, in the functions within it too, and those that it binds."""
    top = symtable.symtable(ast.unparse(node), "tests.py", "exec")
    tables = [top]
    for table in tables:
        tables += table.get_children()
    symbols = [(table, symbol) for table in tables for symbol in table.get_symbols()]
    reads = {
        symbol.get_name()
        for table, symbol in symbols
        if symbol.is_referenced() and (table is top or symbol.is_global())
    }
    binds = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    # `x = x + 1` needs an x; a loop, a `with` and a recursive function have bound the name before they read it.
    return (reads if isinstance(node, (ast.Assign, ast.AnnAssign)) else reads - binds), binds


def without_program(statements: Sequence[ast.stmt]) -> dict[ast.stmt, str]:
    """What of each statement can be executed where there is no program; "" for all from the first that needs it.

    A name that is neither Python's nor bound by the tests is taken for the program's; where there is no such name,
    what they test is named like something of Python's (`def sum(a, b)`).
    """
    names = {node: names_of(node) for node in statements}
    alone = dict.fromkeys(statements, "")
    known = {*dir(builtins), "__file__"}
    own = {name for _, binds in names.values() for name in binds}
    if not any(mentions_program(node) or reads - own - known for node, (reads, _) in names.items()):
        known = set()
    for node, (reads, binds) in names.items():
        executed = node
        needs = mentions_program(node) or not reads <= known
        if needs and isinstance(node, ast.FunctionDef):
            # The program is needed where it is called; its definition executes decorators and defaults.
            executed = copy.copy(node)
            executed.body = [ast.Pass()]
        if not mentions_program(executed) and names_of(executed)[0] <= known:
            alone[node] = ast.unparse(executed)
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            break
        known = known - binds if needs else known | binds
    return alone
