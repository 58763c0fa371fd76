"""Programs: a function to write and tests that it must pass, from rows of several datasets.

- KodCode: `question`, `test` (functions `test_...`) and `test_info` with the declarations to keep.
- HumanEval: `prompt` (the head of the function), `test` and `entry_point`.
- MBPP: `text` or `prompt`, `test_list`, and what the tests need: `test_setup_code` or `test_imports`.
- Your own: `prompt` and `tests`, as `rewards.programs` reads them.

The reference (KodCode, your own: `solution`; HumanEval: `canonical_solution`; MBPP: `code`) is kept as `solution`: it
tells how the row can be judged.
"""

import random
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

from dgrpo.noise import fixed_order
from dgrpo.tasks.task import Task, answer_completion, field_of
from rewards.programs import tests_reward

INSTRUCTION = """Write the Python function that is asked for. Write your working between <reasoning> and \
</reasoning>, then the program, complete with its imports, between <answer> and </answer>:
<reasoning>
...
</reasoning>
<answer>
```python
...
```
</answer>"""


def texts_of(row: dict[str, Any], name: str) -> list[str]:
    """A field of one Python text or of a list of them, as a list; empty where the row does not have it."""
    value = row.get(name)
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else value
    if texts is None:
        return []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}={value!r:.80}: write the tests as one Python text, or as a list of such texts.")
    return texts


def to_row(row: dict[str, Any]) -> dict[str, Any]:
    """The task in words, the tests as a list of Python texts, and the reference solution or None."""
    solution = row.get("solution")
    if "entry_point" in row:
        head, tests = field_of(row, "prompt"), [f"{field_of(row, 'test')}\ncheck({row['entry_point']})"]
        question = f"Complete the function:\n```python\n{head.rstrip()}\n```"
        if isinstance(row.get("canonical_solution"), str):
            solution = head + row["canonical_solution"]
    elif "test_list" in row:
        setup = row.get("test_setup_code") or "\n".join(texts_of(row, "test_imports"))
        asserts = texts_of(row, "test_list")
        tests = [setup] * bool(setup) + asserts
        # The tests alone tell what the function is called.
        question = f"{field_of(row, 'text', 'prompt')}\nIt must pass:\n" + "\n".join(asserts)
        solution = row.get("code", solution)
    elif "test" in row:
        tests = texts_of(row, "test")
        declared = [each["function_declaration"] for each in row.get("test_info") or []]
        question = "\n".join([field_of(row, "question"), *(f"Declare it as `{line}`" for line in declared)])
    else:
        field_of(row, "tests", "test", "test_list")
        tests = texts_of(row, "tests")
        question = field_of(row, "prompt", "question")
    return {"question": question, "tests": tests, "solution": solution if isinstance(solution, str) else None}


def reference_completion(row: dict[str, Any]) -> str | None:
    """The completion that a row's reference solution amounts to; None where it carries none."""
    return answer_completion(f"```python\n{row['solution']}\n```") if row.get("solution") else None


# Functions of one line: what is asked, the expression that does it, and its value.
TEMPLATES: list[tuple[str, str, Callable[[int, int, int], int]]] = [
    ("the sum of x and {a}, times {b}", "(x + {a}) * {b}", lambda x, a, b: (x + a) * b),
    ("x times {a}, plus {b}", "x * {a} + {b}", lambda x, a, b: x * a + b),
    ("{a} minus x, times {b}", "({a} - x) * {b}", lambda x, a, b: (a - x) * b),
    ("the remainder of x plus {a} divided by {b}", "(x + {a}) % {b}", lambda x, a, b: (x + a) % b),
]
CONSTANTS = range(2, 60)


@cache
def function_split() -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Training and held-out functions, as (template, a, b): together all of them."""
    functions = sorted(product(range(len(TEMPLATES)), CONSTANTS, CONSTANTS), key=lambda key: fixed_order(str(key)))
    num_held_out = len(functions) // 10
    return functions[num_held_out:], functions[:num_held_out]


def embedded(split: str, num_problems: int, seed: int) -> list[dict[str, Any]]:
    """Generated functions of one line with three tests each; rows of `prompt`, `tests` and a right `solution`."""
    rng = random.Random(f"{split} {seed}")
    train, held_out = function_split()
    drawn = rng.choices(train, k=num_problems) if split == "train" else rng.sample(held_out, num_problems)
    rows = []
    for template, a, b in drawn:
        words, expression, value = TEMPLATES[template]
        tests = [f"assert f({x}) == {value(x, a, b)}" for x in rng.sample(range(-20, 130), 3)]
        rows.append(
            {
                "prompt": f"Write a function f(x) that returns {words.format(a=a, b=b)}.",
                "tests": tests,
                "solution": f"def f(x):\n    return {expression.format(a=a, b=b)}",
            }
        )
    return rows


TASK = Task(
    name="programs",
    hub_name="KodCode/KodCode-Light-RL-10K",
    hub_config=None,
    instruction=INSTRUCTION,
    to_row=to_row,
    grade=tests_reward,
    embedded=embedded,
    reference_completion=reference_completion,
    to_stored=lambda row: {"question": row["question"], "ground_truth": row["tests"]},
    from_stored=lambda item: {"tests": item.get("ground_truth")},
    file_marks=("humaneval", "mbpp", "kodcode", "programs", "code"),
    held_out_split=None,
)
