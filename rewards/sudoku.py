"""Sudoku, 4x4 and 9x9: the share of empty cells filled correctly, and whether the whole grid is solved.

A puzzle is 16 or 81 characters, row by row, `0` or `.` for an empty cell. Rules, after `rewards.text` has found the
answer:

- White space, Markdown, `|`, `,`, brackets and lines of `-` and `+` between cells are dropped; what remains must be
  exactly one digit from 1 to 4 (or 9) for each cell. A grid that is too short or too long is not padded or cut: it
  scores 0.
- The clues must stand where the puzzle has them: a changed clue scores 0, in both rewards.
- Solved means that every row, column and box holds each digit once. Where a puzzle has several solutions, any of them
  is right, whatever the reference says.
- A cell is right when it agrees with the reference solution, or when the whole grid is solved.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from rewards.text import Completion, completion_text, short_answer, unwrapped

DIGITS = "123456789"
SEPARATORS = re.compile(r"[\s|,\[\]$*+-]")
SIZES = {16: 4, 81: 9}


def read_puzzle(puzzle: object) -> str | None:
    """The puzzle with `0` for its empty cells; None when it is not 16 or 81 cells of allowed characters."""
    cells = "".join(str(puzzle).split()).replace(".", "0")
    size = SIZES.get(len(cells))
    return cells if size and set(cells) <= set("0" + DIGITS[:size]) else None


def read_grid(answer: str | None, puzzle: str) -> str | None:
    """The filled grid that the answer states, with the puzzle's clues kept; None when it is not one."""
    grid = SEPARATORS.sub("", unwrapped(answer or ""))
    allowed = set(DIGITS[: SIZES[len(puzzle)]])
    if len(grid) != len(puzzle) or not set(grid) <= allowed:
        return None
    return grid if all(clue in ("0", cell) for clue, cell in zip(puzzle, grid, strict=True)) else None


def is_solved(grid: str) -> bool:
    """Whether every row, column and box of a filled grid holds each digit once."""
    size = SIZES[len(grid)]
    box = math.isqrt(size)
    rows = [grid[i * size : (i + 1) * size] for i in range(size)]
    columns = ["".join(column) for column in zip(*rows, strict=True)]
    boxes = [
        "".join(row[left : left + box] for row in rows[top : top + box])
        for top in range(0, size, box)
        for left in range(0, size, box)
    ]
    return all(len(set(group)) == size for group in rows + columns + boxes)


def cells_share(grid: str | None, puzzle: str, solution: str) -> float:
    """The share of the puzzle's empty cells that agree with the solution, in [0, 1]; 0 without a grid."""
    if grid is None:
        return 0.0
    empty = [i for i, clue in enumerate(puzzle) if clue == "0"]
    if is_solved(grid) or not empty:
        return float(is_solved(grid))
    return sum(grid[i] == solution[i] for i in empty) / len(empty)


def cells_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    puzzle: Sequence[Any],
    solution: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """The share of empty cells filled correctly, 0.0 where a clue is changed, None without puzzle or solution."""
    scores: list[float | None] = []
    for completion, given, reference in zip(completions, puzzle, solution, strict=True):
        cells, solved = read_puzzle(given), read_puzzle(reference)
        if cells is None or solved is None or len(cells) != len(solved):
            scores.append(None)
            continue
        scores.append(cells_share(read_grid(short_answer(completion_text(completion)), cells), cells, solved))
    return scores


def solved_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], puzzle: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1.0 where the whole grid is solved and keeps the clues, 0.0 where not, None without a puzzle."""
    scores: list[float | None] = []
    for completion, given in zip(completions, puzzle, strict=True):
        cells = read_puzzle(given)
        if cells is None:
            scores.append(None)
            continue
        grid = read_grid(short_answer(completion_text(completion)), cells)
        scores.append(float(grid is not None and is_solved(grid)))
    return scores
