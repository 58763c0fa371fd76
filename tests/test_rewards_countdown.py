"""Countdown's rules, one row for each decision, and every problem of d1's test set solved."""

import json
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest

from rewards.countdown import equation_reward

PROBLEMS = Path(__file__).parent / "data/d1/countdown_cd3_test.jsonl"


def score(expression, numbers, target):
    return equation_reward([None], [f"<answer>\n{expression}\n</answer>"], [numbers], [target])[0]


RIGHT = [
    # expression, numbers, target, why
    ("5 - 1 - 2", [1, 5, 2], 2, "plain"),
    ("5-1-2", "1,5,2", "2", "the problem as strings"),
    ("\\boxed{(5 - 1) / 2}", [1, 5, 2], 2, "boxed"),
    ("(5 \\times 2) \\cdot 1", [1, 5, 2], 10, "LaTeX's multiplication"),
    ("(5 + 1) \\div 2", [1, 5, 2], 3, "LaTeX's division"),
    ("5 − 2", [5, 2], 3, "Unicode minus"),
    ("5 × 2", [5, 2], 10, "Unicode multiplication sign"),
    ("** 5 * 2 **", [5, 2], 10, "Markdown around products"),
    ("```\n5-2\n```", [5, 2], 3, "a block of code"),
    ("$5 - 2$", [5, 2], 3, "delimiters of LaTeX"),
    ("\\[\\left(5 - 2\\right) \\; \\cdot 1\\]", [5, 2, 1], 3, "LaTeX's parentheses and spaces"),
    ("\\dfrac{6}{3}", [6, 3], 2, "a fraction in LaTeX"),
    ("2 *3* 4", [2, 3, 4], 24, "operators that look like emphasis"),
    ("\\boxed{\\boxed{5-2}}", [5, 2], 3, "boxed twice"),
    ("5\u200b-2\u00a0", [5, 2], 3, "signs that are not seen"),
    ("7 / 2 * 4", [7, 2, 4], 14, "a fraction on the way"),
    ("1 / 3 * 3", [1, 3, 3], 1, "exactly, not in floating point"),
    ("1 - 5 + 7", [1, 5, 7], 3, "negative on the way"),
    ("(((5)))-2", [5, 2], 3, "redundant parentheses"),
    ("5\n- 2", [5, 2], 3, "a line break"),
    ("0 + 5", [0, 5], 5, "zero is a number like others"),
    ("3 - 5", [3, 5], -2, "a negative target"),
    ("(" * 90 + "5-2" + ")" * 90, [5, 2], 3, "nested as deeply as the length allows"),
]
WRONG = [
    ("1.5*2", [1, 5, 2], 3, "decimals: the point would use 1 and 5 as digits"),
    ("2**3+1", [1, 2, 3], 9, "power"),
    ("7//2*1", [7, 2, 1], 3, "floor division"),
    ("9**9**9", [9, 9, 9], 1, "a tower of powers"),
    ("2^3+1", [1, 2, 3], 9, "caret"),
    ("(" * 150 + "5-2" + ")" * 40, [5, 2], 3, "parentheses left open"),
    ("(" * 50_000, [5, 2], 3, "deep nesting"),
    ("1/0", [1, 0], 0, "division by zero"),
    ("5/(2-2)", [5, 2, 2], 5, "division by zero, hidden"),
    ("--1", [1], 1, "double sign"),
    ("-1+5", [1, 5], 4, "sign in front of a number"),
    ("5-(-2)", [5, 2], 7, "sign in front of a number"),
    ("+5-2", [5, 2], 3, "plus sign in front of a number"),
    ("-(2-5)", [5, 2], 3, "sign in front of a parenthesis"),
    ("1e3", [1, 3], 1000, "power of ten"),
    ("0x10", [0, 10], 16, "hexadecimal"),
    ("1_0+5", [10, 5], 15, "underscore in a number"),
    ("05+2", [5, 2], 7, "leading zero"),
    ("1\\left2+5", [12, 5], 17, "no way to join two numbers through LaTeX"),
    ("5*\\left*2", [5, 2], 25, "no way to a power by leaving out a command"),
    ("2\\frac{6}{3}", [2, 6, 3], 4, "juxtaposed factors in LaTeX"),
    ("**5** - **2** = 3", [5, 2], 3, "emphasis within an equation"),
    ("٥-2", [5, 2], 3, "digits of other scripts"),
    ("12+5", [1, 2, 5], 17, "two numbers joined into one"),
    ("1 2+5", [12, 5], 17, "one number split into two"),
    ("5-2+7-7", [5, 2], 3, "extra numbers"),
    ("5-2-0", [5, 2], 3, "an extra zero"),
    ("5+5-2", [5, 2], 8, "a number used twice"),
    ("5", [5, 2], 5, "a number not used"),
    ("5-2=3", [5, 2], 3, "equation instead of expression"),
    ("3=5-2", [5, 2], 3, "equation instead of expression"),
    ("5-2 == 3", [5, 2], 3, "comparison"),
    ("5-2, 5-2", [5, 2], 3, "two expressions"),
    ("5-2 or 5", [5, 2], 3, "words"),
    ("5-2 is the answer", [5, 2], 3, "words"),
    ("5(2)", [5, 2], 10, "juxtaposed factors"),
    ("(5)(2)", [5, 2], 10, "juxtaposed factors"),
    ("5%2", [5, 2], 1, "remainder"),
    ("5&2", [5, 2], 0, "bit operation"),
    ("~5", [5], -6, "bit operation"),
    ("[5-2][0]", [5, 2, 0], 3, "list"),
    ("int('3')", [5, 2], 3, "call"),
    ("__import__('os').abort()", [5, 2], 3, "call"),
    ("True+2", [1, 2], 3, "names"),
    ("5-2 # 3", [5, 2], 3, "comment"),
    ("5 \\times* 2", [5, 2], 25, "no way to a power through LaTeX"),
    ("6 \\div/ 4", [6, 4], 1, "no way to floor division through LaTeX"),
    ("5 - 2 \\boxed{}", [5, 2], 3, "empty box"),
    ("()", [5, 2], 3, "nothing"),
    ("9" * 190 + "*" + "9", [5, 2], 3, "huge numbers"),
    ("2", [5, 2], 2, "the target alone"),
    ("+".join(["1"] * 101), [1] * 101, 101, "too long"),
]


@pytest.mark.parametrize(("expression", "numbers", "target", "why"), RIGHT)
def test_right_expressions(expression, numbers, target, why):
    assert score(expression, numbers, target) == 1.0, why


@pytest.mark.parametrize(("expression", "numbers", "target", "why"), WRONG)
def test_wrong_expressions(expression, numbers, target, why):
    assert score(expression, numbers, target) == 0.0, why


def test_no_problem_no_score():
    completions = ["<answer>5-2</answer>"] * 5
    numbers, targets = [None, [], [5, 2], "5;2", [5.5, 2]], [3, 3, None, 3, 3]
    assert equation_reward([None] * 5, completions, numbers, targets) == [None] * 5


def solve(numbers, target):
    """Some expression of the numbers that equals the target, by combining two of them at a time."""
    if len(numbers) == 1:
        return numbers[0][1] if numbers[0][0] == target else None
    for i, j in combinations(range(len(numbers)), 2):
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for (a, text_a), (b, text_b) in ((numbers[i], numbers[j]), (numbers[j], numbers[i])):
            options = [(a + b, "+"), (a - b, "-"), (a * b, "*")] + ([(a / b, "/")] if b else [])
            for value, operator in options:
                found = solve([*rest, (value, f"({text_a} {operator} {text_b})")], target)
                if found:
                    return found
    return None


def test_a_solution_of_every_problem_of_d1():
    rows = [json.loads(line) for line in PROBLEMS.read_text().splitlines()]
    assert len(rows) == 256
    solutions = [solve([(Fraction(n), n) for n in row["input"].split(",")], Fraction(row["output"])) for row in rows]
    texts = [f"<reasoning>\nr\n</reasoning>\n<answer>\n{solution}\n</answer>" for solution in solutions]
    numbers, targets = [row["input"] for row in rows], [row["output"] for row in rows]
    assert equation_reward(rows, texts, numbers, targets) == [1.0] * 256
    assert equation_reward(rows, texts, numbers, [str(int(target) + 1) for target in targets]) == [0.0] * 256
