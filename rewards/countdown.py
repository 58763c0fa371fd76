"""Countdown: 1.0 when the answer is an expression of exactly the given numbers that equals the target.

Rules, after `rewards.text` has found the answer:

- It is an expression of non-negative integers, `+`, `-`, `*`, `/` and parentheses, at most 200 characters.
  `\\times`, `\\cdot`, `\\div`, `×`, `·`, `÷`, `−` and `\\frac{a}{b}` are read as such; Markdown and the delimiters of
  LaTeX around it are dropped. Nothing else is: no `=`, no decimals, no `**` or `//`, no sign in front of a number or
  a parenthesis, no power of ten, no juxtaposed factors, no text.
- The integers in it are the given numbers, each used exactly as often as it is given.
- Arithmetic is exact (`7 / 2` is seven halves); division by zero makes the answer wrong. Steps between may be negative
  or fractional; only the value at the end counts.

The text is parsed, never evaluated as code: only numbers and the four operations are walked.
"""

import ast
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rewards.text import Completion, completion_text, short_answer, unwrapped

# Far beyond what six numbers need, and below the nesting at which a parser runs out of stack.
MAX_EXPRESSION_CHARS = 200
EXPRESSION = re.compile(r"[0-9+\-*/() ]+")
SIGNS = {"\\times": " * ", "\\cdot": " * ", "\\div": " / ", "×": " * ", "·": " * ", "÷": " / ", "−": " - "}
FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
# Around a formula, and LaTeX's spaces; what is taken away leaves a space, so that no two numbers become one.
AROUND = re.compile(r"\$|\\[()\[\],;:! ]|\\(?:left|right)(?![A-Za-z])")


def evaluate(node: ast.expr) -> tuple[Fraction, list[int]]:
    """The exact value of a parsed expression and the integers in it; ValueError or ZeroDivisionError by the rules."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value), [node.value]
    if not isinstance(node, ast.BinOp):
        raise ValueError(f"{type(node).__name__} is not allowed in an expression")
    left, used_left = evaluate(node.left)
    right, used_right = evaluate(node.right)
    used = used_left + used_right
    if isinstance(node.op, ast.Add):
        return left + right, used
    if isinstance(node.op, ast.Sub):
        return left - right, used
    if isinstance(node.op, ast.Mult):
        return left * right, used
    if isinstance(node.op, ast.Div):
        return left / right, used
    raise ValueError(f"{type(node.op).__name__} is not allowed in an expression")


def expression_value(text: str | None) -> tuple[Fraction, list[int]] | None:
    """The exact value of an expression and the integers in it, sorted; None when it breaks the rules."""
    text = AROUND.sub(" ", unwrapped(text or ""))
    for sign, operator in SIGNS.items():
        text = text.replace(sign, operator)
    text = " ".join(FRACTION.sub(r"((\1)/(\2))", text).split())
    if len(text) > MAX_EXPRESSION_CHARS or not EXPRESSION.fullmatch(text):
        return None
    try:
        value, used = evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value, sorted(used)


def read_integers(numbers: object) -> list[int] | None:
    """The given numbers, sorted, from a list or from a string such as "30,100,93"; None when they are not integers."""
    parts = numbers.strip("[] ").split(",") if isinstance(numbers, str) else numbers
    try:
        fractions = [Fraction(part) for part in parts]  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        return None
    whole = sorted(fraction.numerator for fraction in fractions if fraction.denominator == 1)
    return whole if len(whole) == len(fractions) else None


def equation_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    numbers: Sequence[Any],
    target: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """1.0 where the expression uses exactly the numbers and equals the target, else 0.0; None without a problem."""
    scores: list[float | None] = []
    for completion, given, goal in zip(completions, numbers, target, strict=True):
        available, goals = read_integers(given), read_integers([goal])
        if not available or not goals:
            scores.append(None)
            continue
        found = expression_value(short_answer(completion_text(completion)))
        scores.append(float(found is not None and found == (Fraction(goals[0]), available)))
    return scores
