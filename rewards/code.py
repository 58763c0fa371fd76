"""Programs: the share of a row's tests that the program in the completion passes, run in `rewards.sandbox`.

The program is the last fenced block (```python ... ```) of the `<answer>` block, or of the whole text where there is
no answer block; without a fence, the answer block or the text itself. At most 50,000 characters.

`tests` is Python in one string, or a list of such strings, for a program that is importable as `solution` and whose
names are there without import:

- functions named `test_...`: each is a test;
- else every top-level `assert` is a test (MBPP), and other statements run in order;
- else the whole string is one test, provided that it calls something (HumanEval: `... check(candidate)`).

A row without tests gets None. A test passes when it ends without exception. The score is passed / all, in [0, 1];
tests that did not run, because the program failed or a limit of time or memory was reached (`LIMITS`), failed.
`pytest.raises` and `pytest.approx` are there; other third-party packages are not, for the program or for the tests.

**Nothing the program prints or does decides.** Tests and program run in two sandboxes, and only calls and plain values
pass between them (`rewards/_bridge.py`): there is no marker to print, no exit code to fake, no assertion, frame or
built-in function to change, and an object that claims to equal everything equals nothing. What remains are objects of
the program's own classes: whether two of them are equal is, as in any test, the class's word. The price: tests cannot
compare such objects with plain values, subclass the program's classes, or share files with the program.
"""

import ast
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rewards import sandbox
from rewards.text import Completion, answer_block, completion_text

HERE = Path(__file__).parent
LIMITS = sandbox.Limits()
MAX_PROGRAM_CHARS = 50_000
MAX_AT_ONCE = 32


def extract_program(text: str) -> str | None:
    """The program that a completion offers; None when there is none, or it is too long."""
    body = answer_block(text)
    lines = (text if body is None else body).split("\n")
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
    closed = len(fences) // 2 * 2
    if closed:
        lines = lines[fences[closed - 2] + 1 : fences[closed - 1]]
    program = "\n".join(lines)
    return program if program.strip() and len(program) <= MAX_PROGRAM_CHARS else None


def split_tests(tests: str | Sequence[str]) -> list[tuple[str, bool]]:
    """The tests as steps to execute in order, each with whether it counts as a test; empty when none counts."""
    steps: list[tuple[str, bool]] = []
    for part in [tests] if isinstance(tests, str) else tests:
        try:
            statements = ast.parse(part).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []
        functions = [node.name for node in statements if isinstance(node, ast.FunctionDef) and node.name[:4] == "test"]
        if functions:
            steps += [(part, False), *((f"{name}()", True) for name in functions)]
        elif any(isinstance(node, ast.Assert) for node in statements):
            steps += [(ast.unparse(node), isinstance(node, ast.Assert)) for node in statements]
        else:
            calls = any(isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) for node in statements)
            steps.append((part, calls))
    return steps if any(counts for _, counts in steps) else []


def names_used(steps: list[tuple[str, bool]]) -> list[str]:
    """The names that the tests read."""
    trees = [ast.parse(source) for source, _ in steps]
    return sorted({node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)})


def share_passed(program: str, steps: list[tuple[str, bool]], limits: sandbox.Limits) -> float:
    """The share of the counting steps that end without exception, with the program in a sandbox of its own."""
    bridge = (HERE / "_bridge.py").read_text()
    judge = bridge + (HERE / "_judge.py").read_text().replace("from _bridge import Peer\n", "")
    to_program, to_tests = os.pipe(), os.pipe()
    fds = {*to_program, *to_tests}
    try:
        with (
            sandbox.start(
                f"{bridge}\nserve({program!a}, {to_program[0]}, {to_tests[1]})\n",
                limits,
                pass_fds=(to_program[0], to_tests[1]),
            ),
            sandbox.start(
                f"{judge}\njudge({steps!a}, {names_used(steps)!a}, {to_tests[0]}, {to_program[1]})\n",
                limits,
                pass_fds=(to_tests[0], to_program[1]),
            ) as (process, results),
        ):
            # Each side must see the other one close its end, so this process keeps none open.
            while fds:
                os.close(fds.pop())
            sandbox.ends_within(process, limits.wall_seconds)
            results.seek(0)
            said = results.read()
            # Anything else is the complaint of a process that could not start.
            passed = said.count(b"1") if set(said) <= set(b"01") else 0
            return passed / sum(counts for _, counts in steps)
    finally:
        for fd in fds:
            os.close(fd)


def score(completion: Completion, tests: str | Sequence[str] | None) -> float | None:
    """The share of the tests that one completion's program passes; None without tests."""
    steps = split_tests(tests) if tests else []
    if not steps:
        return None
    program = extract_program(completion_text(completion))
    return 0.0 if program is None else share_passed(program, steps, LIMITS)


def tests_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], tests: Sequence[Any], **columns: Any
) -> list[float | None]:
    """The share of the row's tests that the completion's program passes, in [0, 1]; None for a row without tests.

    As many rows run at once as there are processors. RuntimeError where the machine cannot confine programs.
    """
    rows = list(zip(completions, tests, strict=True))
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MAX_AT_ONCE)) as pool:
        return list(pool.map(lambda row: score(*row), rows))
