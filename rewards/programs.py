"""Programs: the share of a row's tests that the program in the completion passes, run in `rewards.sandbox`.

The program is the last fenced block (```python ... ```) of the `<answer>` block, or of the whole text where there is
no answer block; without a fence, the answer block or the text itself. At most 50,000 characters.

`tests` is Python in one string, or a list of such strings, for a program that is importable as `solution` and whose
names are there without import:

- functions named `test_...`: each is a test, or each of its cases where `pytest.mark.parametrize` writes them out;
- else every top-level `assert` is a test (MBPP), and other statements run in order;
- else the whole string is one test, provided that it calls something (HumanEval: `... check(candidate)`).

A test passes when it ends without exception. The score is passed / all, in [0, 1]; tests that did not run, because the
program failed or a limit of time or memory was reached (`LIMITS`), failed.

Of third-party packages there is only this much of pytest, for the tests: `raises`, `approx`, `fail`, `param`,
`parametrize`, and marks without effect. Tests that nothing here could run do not count: with arguments that nobody
fills (fixtures, `tmp_path`, a patch), marked to be skipped or to fail, in a class, or importing what is missing; nor
do those of a text with an `autouse` fixture or `setup_function`. A row gets None where no test is left, or where its
tests' own set-up fails before it needs the program. The tests alone decide this, where there is no program
(`rewards/sandbox/steps.py`): none can turn its failure into None.

**Nothing the program prints or does decides.** Tests and program run in two sandboxes, and only calls and plain values
pass between them (`rewards/sandbox/bridge.py`): there is no marker to print, no exit code to fake, no assertion, frame
or built-in function to change, and an object that claims to equal everything equals nothing. What remains are objects
of the program's own classes: whether two of them are equal is, as in any test, the class's word. The price: tests
cannot compare such objects with plain values, subclass the program's classes, or share files with the program.

**A limit of ours is not charged to the model**, where the row carries a reference solution (column `solution`): if it
passes across the two sandboxes, so are completions judged; if it passes only with its tests in one confined process,
they are judged there (metric `programs/judged_together`), where a program can cheat as under plain pytest (by an
object that equals everything, or by changing what the tests call); if it passes in neither, the row is None.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewards import sandbox
from rewards.sandbox.steps import Step, names_used, split_tests
from rewards.text import Completion, answer_block, completion_text

# What the two sandboxes execute: the program's side, and the tests'.
BRIDGE = Path(sandbox.__file__).with_name("bridge.py").read_text()
JUDGE = BRIDGE + Path(sandbox.__file__).with_name("judge.py").read_text().replace(
    "from rewards.sandbox.bridge import Peer\n", ""
)
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


def runnable(tests: Sequence[str]) -> list[Step]:
    """The steps of a row's tests without those tests that cannot be run here; empty when no test is left.

    What does without the program is executed first, in a sandbox where there is none.
    """
    steps = split_tests(tests)
    if not any(step.alone for step in steps):
        return steps
    said = sandbox.run(f"{JUDGE}\nrehearse({[step.alone for step in steps]!a})\n", LIMITS).output
    # Only what was seen to fail is left out: a process that ran into a limit on a busy machine has said less.
    said = said.ljust(len(steps), "1") if set(said) <= set("01") else "1" * len(steps)
    left = [step for step, mark in zip(steps, said, strict=True) if mark == "1"]
    complete = sum(not step.counts for step in left) == sum(not step.counts for step in steps)
    return left if complete and any(step.counts for step in left) else []


def share_passed(program: str, steps: Sequence[Step], limits: sandbox.Limits) -> float:
    """The share of the counting steps that end without exception, with the program in a sandbox of its own."""
    sources = [(step.source, step.counts) for step in steps]
    to_program, to_tests = os.pipe(), os.pipe()
    fds = {*to_program, *to_tests}
    try:
        with (
            sandbox.start(
                f"{BRIDGE}\nserve({program!a}, {to_program[0]}, {to_tests[1]})\n",
                limits,
                pass_fds=(to_program[0], to_tests[1]),
            ),
            sandbox.start(
                f"{JUDGE}\njudge({sources!a}, *{names_used(tuple(steps))!a}, {to_tests[0]}, {to_program[1]})\n",
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
            return passed / sum(step.counts for step in steps)
    finally:
        for fd in fds:
            os.close(fd)


def share_passed_together(program: str, steps: Sequence[Step], limits: sandbox.Limits) -> float:
    """The same with program and tests in one sandbox, where a program can cheat as it can under plain pytest."""
    sources = [(step.source, step.counts) for step in steps]
    text = f"{JUDGE}\njudge_together({sources!a}, {names_used(tuple(steps))[0]!a}, {program!a})\n"
    said = sandbox.run(text, limits).output
    return said.count("1") / sum(step.counts for step in steps) if set(said) <= set("01") else 0.0


@lru_cache(2**16)
def way_of_judging(steps: tuple[Step, ...], reference: str | None) -> Callable[..., float] | None:
    """How a row is judged: in the first way in which its reference solution passes every test, or not at all.

    Without a reference nothing tells a limit of ours from a fault of the program; such rows are judged across.
    """
    if not steps or reference is None:
        return share_passed if steps else None
    ways = (share_passed, share_passed_together)
    return next((way for way in ways if way(reference, steps, LIMITS) == 1.0), None)


def score(completion: Completion, steps: Sequence[Step], way: Callable[..., float] | None) -> float | None:
    """The share of the tests that one completion's program passes; None where there are none to run."""
    if way is None:
        return None
    program = extract_program(completion_text(completion))
    return 0.0 if program is None else way(program, steps, LIMITS)


def tests_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    tests: Sequence[Any],
    solution: Sequence[Any] | None = None,  # noqa: PT028 - a reward, not a test
    **columns: Any,
) -> list[float | None]:
    """The share of the row's tests that the completion's program passes, in [0, 1]; None for a row without tests.

    Args:
        prompts: Not read.
        completions: Texts, or lists of messages.
        tests: For each completion the tests of its row, a text or a list of texts.
        solution: For each completion the reference solution of its row, or None. A row whose reference fails is None.
        columns: The other columns; `log_metric` is told the share of rows judged together with their tests.

    As many rows run at once as there are processors. RuntimeError where the machine cannot confine programs.
    """
    texts = [(row,) if isinstance(row, str) else tuple(row or ()) for row in tests]
    references = [row if isinstance(row, str) and row.strip() else None for row in solution or [None] * len(texts)]
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MAX_AT_ONCE)) as pool:
        distinct = list(dict.fromkeys(texts))
        steps = {text: tuple(found) for text, found in zip(distinct, pool.map(runnable, distinct), strict=True)}
        rows = [(steps[text], reference) for text, reference in zip(texts, references, strict=True)]
        kinds = list(dict.fromkeys(rows))
        ways = dict(zip(kinds, pool.map(lambda row: way_of_judging(*row), kinds), strict=True))
        if rows and (log_metric := columns.get("log_metric")) is not None:
            together = sum(ways[row] is share_passed_together for row in rows)
            log_metric("programs/judged_together", together / len(rows))
        jobs = list(zip(completions, rows, strict=True))
        return list(pool.map(lambda job: score(job[0], job[1][0], ways[job[1]]), jobs))
