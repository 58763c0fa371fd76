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
tests' own set-up fails before it needs the program. The tests alone decide this, in a rehearsal without a program
(`rewards/sandbox/judge.py`): none can turn its failure into None.

**Nothing the program prints or does decides.** Tests and program run in two sandboxes, and only calls and plain values
pass between them (`rewards/sandbox/bridge.py`): there is no marker to print, no exit code to fake, no assertion, frame
or built-in function to change, and an object that claims to equal everything equals nothing. What remains are objects
of the program's own classes: whether two of them are equal is, as in any test, the class's word. The price: tests
cannot compare such objects with plain values, subclass the program's classes, or share files with the program. Tests
that patch, capture output, await, inspect or open files (`NEEDS_ONE_PROCESS`) run beside the program instead.

**A limit of ours is not charged to the model**, where the row carries a reference solution (column `solution`): if it
passes across the two sandboxes, so are completions judged; if it passes only with its tests in one confined process,
they are judged there (metric `programs/judged_together`), where a program can cheat as under plain pytest (by an
object that equals everything, or by changing what the tests call); if it passes in neither, the row is None.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from rewards import sandbox
from rewards.text import Completion, answer_block, completion_text

LIMITS = sandbox.Limits()
# For rows whose reference needs more than `LIMITS`: one of MBPP's takes some six seconds.
SLOW_LIMITS = sandbox.Limits(cpu_seconds=15)
MAX_PROGRAM_CHARS = 50_000
# Programs at once, where there are fewer processors too: those that sleep take up a place, but no processor.
MIN_AT_ONCE, MAX_AT_ONCE = 16, 32

# Coroutines, patches, captured output, files and reflection do not cross between two processes.
NEEDS_ONE_PROCESS = re.compile(
    r"\b(asyncio|await|patch|Mock|redirect_std\w+|sys\.std\w+|open\(|inspect\.|warnings\.|asdict|dataclasses\.|__cause__)"
)

Way = tuple[Callable[..., float], sandbox.Limits]
Steps = tuple[tuple[str, bool], ...]  # the source of each, and whether it counts (`sandbox/judge.py`)


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


@lru_cache(2**16)
def runnable(tests: tuple[str, ...]) -> Steps:
    """The steps of a row's tests, without those tests that cannot be run here; empty when no test is left."""
    outcome = sandbox.call(("rehearse", [tests]), limits=LIMITS)
    try:
        return tuple((source, counts) for source, counts in json.loads(outcome.output))
    except ValueError:  # it ran into a limit without a program
        return ()


def share(outcome: sandbox.Outcome, steps: Steps) -> float:
    """The share of the counting steps that are reported as passed."""
    results, num_tests = outcome.output, sum(counts for _, counts in steps)
    # Anything else is the complaint of a process that could not start, or was not written by the tests.
    is_told = set(results) <= set("01") and len(results) <= num_tests
    return results.count("1") / num_tests if is_told else 0.0


def share_passed(program: str, steps: Steps, limits: sandbox.Limits) -> float:
    """The share of the counting steps that end without exception, with the program in a process of its own."""
    return share(sandbox.call(("serve", [program]), ("judge", [steps]), limits=limits), steps)


def share_passed_together(program: str, steps: Steps, limits: sandbox.Limits) -> float:
    """The same with program and tests in one process, where a program can cheat as it can under plain pytest."""
    return share(sandbox.call(("judge_together", [steps, program]), limits=limits), steps)


@lru_cache(2**16)
def way_of_judging(steps: Steps, reference: str | None) -> Way | None:
    """How a row is judged: in the first way in which its reference solution passes every test, or not at all.

    Without a reference nothing tells a limit of ours from a fault of the program; such rows are judged across, but for
    those whose tests do what only one process allows.
    """
    if not steps or reference is None:
        together = any(NEEDS_ONE_PROCESS.search(source) for source, _ in steps)
        return (share_passed_together if together else share_passed, LIMITS) if steps else None
    ways = [(judge, limits) for limits in (LIMITS, SLOW_LIMITS) for judge in (share_passed, share_passed_together)]
    return next((way for way in ways if way[0](reference, steps, way[1]) == 1.0), None)


def score(completion: Completion, steps: Steps, way: Way | None) -> float | None:
    """The share of the tests that one completion's program passes; None where there are none to run."""
    if way is None:
        return None
    program = extract_program(completion_text(completion))
    return 0.0 if program is None else way[0](program, steps, way[1])


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
        columns: The other columns; `log_metric` receives the share of rows judged together with their tests.

    Up to `MAX_AT_ONCE` rows run at once. RuntimeError where the machine cannot confine programs.
    """
    texts = [(row,) if isinstance(row, str) else tuple(row or ()) for row in tests]
    references = [row if isinstance(row, str) and row.strip() else None for row in solution or [None] * len(texts)]
    with ThreadPoolExecutor(min(max(len(os.sched_getaffinity(0)), MIN_AT_ONCE), MAX_AT_ONCE)) as pool:
        distinct = list(dict.fromkeys(texts))
        steps = dict(zip(distinct, pool.map(runnable, distinct), strict=True))
        rows = [(steps[text], reference) for text, reference in zip(texts, references, strict=True)]
        kinds = list(dict.fromkeys(rows))
        ways = dict(zip(kinds, pool.map(lambda row: way_of_judging(*row), kinds), strict=True))
        if rows and (log_metric := columns.get("log_metric")) is not None:
            together = sum((ways[row] or [None])[0] is share_passed_together for row in rows)
            log_metric("programs/judged_together", together / len(rows))
        jobs = list(zip(completions, rows, strict=True))
        return list(pool.map(lambda job: score(job[0], job[1][0], ways[job[1]]), jobs))
