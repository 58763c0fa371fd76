"""The rules by which d1's published parser grades a text, one function per task: `d1_gsm8k(item) -> Item`.

Source: arXiv:2504.12216; eval/parse_and_get_acc.py and eval/parser_helper.py of github.com/dllm-reasoning/d1 at
837888f. The rules are written here in other words, with their oddities, since d1's published numbers contain them;
they are no example to follow (`rewards` has ours). An item is one row of a file of generations: `question`,
`generations` (the text, after a prompt that ends in `<reasoning>`) and `ground_truth`.
"""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dgrpo.tasks.sudoku import stored_puzzle


@dataclass(frozen=True)
class Item:
    """One graded text: what was read as its answer, and how many of how many points it got."""

    question: str
    answer: str | float | None
    right: float
    possible: float
    """0: there is nothing to get, as in a Sudoku without empty cells, and the text does not count."""


NUMBER = re.compile(r"-?\d+\.?\d*")


def after_tag(text: str, tag: str) -> str | None:
    """What follows the first such tag; None when there is none."""
    _, found, rest = text.partition(tag)
    return rest if found else None


def first_answer(text: str) -> str | None:
    """What stands between the first `<answer>` and the next `</answer>`, stripped."""
    answer, closed, _ = (after_tag(text, "<answer>") or "").partition("</answer>")
    return answer.strip() if closed else None


def boxes_within_lines(text: str) -> list[str]:
    r"""What follows each `\boxed{` up to the first closing brace on the same line."""
    boxes = []
    for line in text.split("\n"):
        while "\\boxed{" in line:
            box, closed, line = line.partition("\\boxed{")[2].partition("}")
            if closed:
                boxes.append(box.strip())
    return boxes


def to_float(text: str, which: int) -> float | None:
    """The text as a Python float; failing that, its first (0) or last (-1) number; failing that, None."""
    try:
        return float(text)
    except ValueError:
        numbers = NUMBER.findall(text)
        return float(numbers[which]) if numbers else None


def d1_gsm8k(item: dict[str, Any]) -> Item:
    r"""The first `\boxed{...}` with a number in it, up to the first brace, on one line, counts; else `<answer>`.

    Of several numbers in a box the first counts, in an answer block the last. A thousands separator ends a number.
    """
    text, gold = item.get("generations", ""), item.get("ground_truth")
    numbers = [to_float(box, 0) for box in boxes_within_lines(text) if box.strip(".")]
    value = next((number for number in numbers if number is not None), None)
    if value is None:
        answer = first_answer(text)
        value = to_float(answer, -1) if answer else None
    return Item(item.get("question", ""), value, float(value is not None and value == gold), 1.0)


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, braces matched; the whole text when there is no box at all.

    "\boxed " (with a blank) anywhere: what follows the last one, up to a dollar sign, even past the end of the answer.
    `\fbox{...}` stands in for a missing `\boxed`, and is kept with its name. None when braces stay open.
    """
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    start = text.rfind("\\boxed") if "\\boxed" in text else text.rfind("\\fbox")
    if start < 0:
        return text
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if text[end] == "}" and depth == 0:
            box = text[start : end + 1]
            return box[len("\\boxed{") : -1] if box.startswith("\\boxed{") else box
    return None


LATEX_SPELLINGS = [
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
]  # fmt: skip


class UnusualLatexError(ValueError):
    """LaTeX that d1's normal form is not defined for; the texts are then compared as they are."""


def brace_arguments(text: str) -> str:
    r"""`\sqrt3` as `\sqrt{3}`, blanks dropped, then `\frac12` as `\frac{1}{2}` and `\frac1{2}` as `\frac{1}{2}`."""
    head, *roots = text.split("\\sqrt")
    fractions = "".join(
        [head, *(f"\\sqrt{root}" if root[:1] == "{" else f"\\sqrt{{{root[:1]}}}{root[1:]}" for root in roots)]
    )
    if "" in roots:
        raise UnusualLatexError(text)
    text = fractions.replace(" ", "")
    head, *pieces = text.split("\\frac")
    braced = head
    for piece in pieces:
        if not piece:
            raise UnusualLatexError(text)
        if piece[0] != "{" and len(piece) < 2:
            return text
        if piece[0] == "{":
            braced += f"\\frac{piece}"
        elif piece[1] == "{":
            braced += f"\\frac{{{piece[0]}}}{piece[1:]}"
        else:
            braced += f"\\frac{{{piece[0]}}}{{{piece[1]}}}{piece[2:]}"
    return braced


def normal_form(text: str) -> str:
    """An answer in LaTeX in the spelling that d1 compares (that of the MATH data set's own grader)."""
    for spelling, replacement in LATEX_SPELLINGS:
        text = text.replace(spelling, replacement)
    value, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise UnusualLatexError(text)
    text = value.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = f"0{text}" if text[0] == "." else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = brace_arguments(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    parts = text.split("/")
    if len(parts) == 2:
        try:
            above, below = (int(part) for part in parts)
        except ValueError as error:
            raise UnusualLatexError(text) from error
        if text == f"{above}/{below}":
            return f"\\frac{{{above}}}{{{below}}}"
    return text


def same_latex(answer: str, gold: object) -> bool:
    """Whether d1 takes two answers for the same."""
    if isinstance(gold, float):
        try:
            return abs(float(answer) - gold) < 1e-6
        except ValueError:
            return False
    if not isinstance(gold, str):
        return False
    try:
        return normal_form(answer) == normal_form(gold)
    except UnusualLatexError:
        return answer == gold


def d1_math500(item: dict[str, Any]) -> Item:
    """The last box (`last_box`: it may be the whole text) counts; `<answer>` where braces stay open or it is empty."""
    text = item.get("generations", "")
    answer = last_box(text)
    if not answer and (block := first_answer(text)) is not None:
        answer = block
    right = answer is not None and same_latex(answer, item.get("ground_truth", ""))
    return Item(item.get("question", ""), answer, float(right), 1.0)


MAX_POWER_BITS = 10**6  # d1 evaluates any power, and hangs on large ones; here they are wrong


def python_value(node: ast.expr) -> Any:
    """What Python makes of a parsed expression of numbers, `+ - * / // **` and signs; ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = python_value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ValueError(type(node).__name__)
    left, right = python_value(node.left), python_value(node.right)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.FloorDiv():
            return left // right
        case ast.Pow():
            if type(left) is int and type(right) is int and left.bit_length() * right > MAX_POWER_BITS:
                raise ValueError("too large a power")
            return left**right
    raise ValueError(type(node.op).__name__)


def equals_target(equation: str, numbers: Sequence[int], target: float) -> bool:
    """Whether the runs of digits in an equation are the numbers, and Python evaluates it to the target within 1e-5.

    d1's test of characters lets through decimals, powers and floor division: `1.5*2` uses 1, 5 and 2 and is 3.
    """
    try:
        if sorted(int(run) for run in re.findall(r"\d+", equation)) != sorted(numbers):
            return False
        if not re.match(r"^[\d+\-*/().\s]+$", equation):
            return False
        return bool(abs(python_value(ast.parse(equation.strip(), mode="eval").body) - target) < 1e-5)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return False


def d1_countdown(item: dict[str, Any]) -> Item:
    r"""The last box (`last_box`) counts; where braces stay open, `<answer>`, or else the whole text.

    `\div`, `\times` and `\cdot` are operators. Where some `expression = number` stands in it, the first one's
    expression counts, whatever the number. Numbers and target come from the reference, or else from the question.
    """
    text, gold, question = item.get("generations", ""), item.get("ground_truth", []), item.get("question", "")
    numbers, target = [], None
    if isinstance(gold, list) and len(gold) == 2:
        numbers, target = gold
    else:
        if match := re.search(r"Numbers: \[([\d, ]+)\]", question, re.IGNORECASE):
            numbers = [int(number) for number in match.group(1).split(",")]
        if match := re.search(r"Target: (\d+)", question, re.IGNORECASE):
            target = int(match.group(1))
    equation = last_box(text)
    if equation is None:
        answer = first_answer(text)
        equation = text if answer is None else answer
    for command, operator in {"\\div": "/", "\\times": "*", "\\cdot": "*"}.items():
        equation = equation.replace(command, operator)
    # Only where a run of these characters begins can the leftmost match begin: this keeps the search linear.
    if match := re.search(r"(?<![0-9+\-*/() ])([0-9+\-*/() ]+)=[0-9. ]", equation):
        equation = match.group(1).strip()
    right = target is not None and equals_target(equation, numbers, target)
    return Item(question, equation, float(right), 1.0)


# Where d1 looks for a grid, in this order: the tag after the first of which, and the pattern; "" is the whole text.
GRIDS = [
    ("<answer>", re.compile(r"```([\d\s]+)```")),
    ("<answer>", re.compile(r"^(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|</answer>)", re.DOTALL)),
    ("</answer>", re.compile(r"^(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|$)", re.DOTALL)),
    ("", re.compile(r"(\d{16})\s*</answer>")),
    ("", re.compile(r"\b(\d{16})\b")),
]


def d1_sudoku(item: dict[str, Any]) -> Item:
    """The share of empty cells that agree with the reference, in the first place of `GRIDS` that is not blank.

    White space is dropped; the rest, digits or not, is padded or cut to 16 characters. Clues are not looked at.
    """
    question, text, gold = item.get("question", ""), item.get("generations", ""), item.get("ground_truth", "")
    empty = [i for i, clue in enumerate(stored_puzzle(question)) if clue == "0"]
    cells = ""
    for tag, pattern in GRIDS:
        place = after_tag(text, tag) if tag else text
        match = pattern.search(place) if place is not None else None
        cells = "".join(match.group(1).split()) if match else ""
        if cells:
            break
    # Padding is a wrong cell, since no solution holds a 0; so what is too short need not be padded here.
    right = sum(cells[i : i + 1] == gold[i] for i in empty)
    return Item(question, cells, float(right), float(len(empty)))


D1: dict[str, Callable[[dict[str, Any]], Item]] = {
    "gsm8k": d1_gsm8k,
    "math500": d1_math500,
    "countdown": d1_countdown,
    "sudoku": d1_sudoku,
}
