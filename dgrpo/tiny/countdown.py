"""Countdown with three small numbers: reach the target by +, - and *, each number used exactly once.

The split into training and held-out is by (sorted numbers, target): no order of the numbers moves a problem across it.
"""

import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations_with_replacement, permutations, product
from operator import add, mul, sub
from typing import Any, NamedTuple

from dgrpo.noise import fixed_order
from dgrpo.tiny.problems import Messages, sft_example, user_message

NUMBERS = range(1, 21)
RESULTS = range(1, 100)
HELD_OUT_SHARE = 0.1
OPERATIONS = {"+": add, "-": sub, "*": mul}


class Problem(NamedTuple):
    """Three numbers in ascending order and the target."""

    numbers: tuple[int, int, int]
    target: int


class Solution(NamedTuple):
    """The gold answer, `(8-5)*4`, and its steps, `8-5=3;3*4=12`."""

    expression: str
    reasoning: str


def _solutions(numbers: tuple[int, int, int]) -> Iterator[tuple[int, Solution]]:
    """Every target in range, with a way to reach it through a middle value in range.

    The forms (x . y) . z and z - x * y are enough: with three numbers, +, - and * reach nothing else.
    """
    for (x, y, z), sign, next_sign in product(permutations(numbers), OPERATIONS, OPERATIONS):
        middle = OPERATIONS[sign](x, y)
        if middle not in RESULTS:
            continue
        target = OPERATIONS[next_sign](middle, z)
        if target in RESULTS:
            inner = f"({x}{sign}{y})" if next_sign == "*" and sign != "*" else f"{x}{sign}{y}"
            yield target, Solution(f"{inner}{next_sign}{z}", f"{x}{sign}{y}={middle};{middle}{next_sign}{z}={target}")
        if sign == "*" and next_sign == "-" and z - middle in RESULTS:
            yield z - middle, Solution(f"{z}-{x}*{y}", f"{x}*{y}={middle};{z}-{middle}={z - middle}")


def _plainness(solution: Solution) -> tuple[int, int, str]:
    return solution.expression.count("*"), len(solution.expression), solution.expression


@cache
def gold_solutions() -> dict[Problem, Solution]:
    """The whole space: every solvable problem with its plainest solution: sums before products, then the shorter."""
    gold: dict[Problem, Solution] = {}
    for numbers in combinations_with_replacement(NUMBERS, 3):
        for target, solution in _solutions(numbers):
            problem = Problem(numbers, target)
            gold[problem] = min(gold.get(problem, solution), solution, key=_plainness)
    return gold


@cache
def problem_split() -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems: together the whole space."""
    problems = sorted(gold_solutions(), key=lambda problem: fixed_order(f"{problem.numbers} {problem.target}"))
    num_held_out = round(HELD_OUT_SHARE * len(problems))
    return problems[num_held_out:], problems[:num_held_out]


def _row(rng: random.Random, problem: Problem) -> dict[str, Any]:
    expression, reasoning = gold_solutions()[problem]
    return {
        "numbers": rng.sample(problem.numbers, 3),
        "target": problem.target,
        "expression": expression,
        "reasoning": reasoning,
    }


def question(row: dict[str, Any]) -> str:
    """The problem in words, as d1's evaluation files store it: `Numbers: [8, 4, 5]`, newline, `Target: 12`."""
    return f"Numbers: {row['numbers']}\nTarget: {row['target']}"


def train_problems(num_problems: int, seed: int) -> list[dict[str, Any]]:
    """Training problems with replacement: `numbers` in any order, `target`, a gold `expression`, its `reasoning`."""
    rng = random.Random(f"train {seed}")
    train, _ = problem_split()
    return [_row(rng, rng.choice(train)) for _ in range(num_problems)]


def held_out_problems(num_problems: int, seed: int) -> list[dict[str, Any]]:
    """Held-out problems, no two with the same numbers and target."""
    rng = random.Random(f"held out {seed}")
    _, held_out = problem_split()
    if num_problems > len(held_out):
        raise ValueError(
            f"num_problems is {num_problems}, but only {len(held_out)} held-out problems exist: ask for fewer"
        )
    return [_row(rng, problem) for problem in rng.sample(held_out, num_problems)]


def sft_examples(
    num_examples: int,
    seed: int,
    *,
    reasoning_share: float = 1.0,
    prompt_builder: Callable[[str], Messages] = user_message,
) -> list[dict[str, Messages]]:
    """Supervised rows on training problems: the gold expression, in a share of them after its worked steps."""
    rng = random.Random(f"sft {seed}")
    train, _ = problem_split()
    examples = []
    for _ in range(num_examples):
        row = _row(rng, rng.choice(train))
        reasoning = row["reasoning"] if rng.random() < reasoning_share else None
        examples.append(sft_example(prompt_builder(question(row)), row["expression"], reasoning))
    return examples
