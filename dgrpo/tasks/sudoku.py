"""Sudoku: rows of `Puzzle` and `Solution`, 16 digits (4x4) or 81 (9x9), row by row, 0 for an empty cell.

There are only 288 filled 4x4 grids: puzzles split at random share their solutions. So the split is by solution, and
once for all: 48 grids are held out in every file and for the generated puzzles, of 9x9 grids every tenth or so. d1's
test file (arXiv:2504.12216) holds 229 of the 288 grids; what trains beside it as `eval_dataset` has the other 59.
"""

import re
from typing import Any

from dgrpo.noise import fixed_order
from dgrpo.tasks.task import Task, answer_completion, field_of
from dgrpo.tiny import sudoku
from rewards.sudoku import cells_reward, is_solved, read_grid, read_puzzle, solved_reward
from rewards.text import short_answer

INSTRUCTION = """Solve the Sudoku. It is written row by row, 0 for an empty cell: 16 digits from 1 to 4 with boxes of \
2x2, or 81 digits from 1 to 9 with boxes of 3x3. Every row, column and box of the solution holds each digit once; the \
given digits stay. Write your working between <reasoning> and </reasoning>, then all digits of the solution, in the \
same order and without spaces, between <answer> and </answer>:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""


def to_row(row: dict[str, Any]) -> dict[str, Any]:
    """The puzzle, also as the question, and its solution."""
    puzzle, solution = field_of(row, "Puzzle", "puzzle"), field_of(row, "Solution", "solution")
    cells = read_puzzle(puzzle)
    grid = None if cells is None else read_grid(str(solution), cells)
    if cells is None or grid is None or not is_solved(grid):
        raise ValueError(
            f"dataset: Puzzle {puzzle!r} with Solution {solution!r} is no Sudoku; both must be strings of 16 or 81 "
            "digits (0 or . for an empty cell), the solution one that keeps the puzzle's digits."
        )
    return {"question": cells, "puzzle": cells, "solution": grid}


def is_held_out(row: dict[str, Any]) -> bool:
    """Whether the row's solution belongs to evaluation."""
    if len(row["solution"]) == 16:
        return row["solution"] in sudoku.grid_split()[1]
    return fixed_order(row["solution"])[0] < 26


def embedded(split: str, num_problems: int, seed: int) -> list[dict[str, Any]]:
    """Generated 4x4 puzzles with one solution each, 6 to 8 cells empty."""
    draw = sudoku.train_problems if split == "train" else sudoku.held_out_problems
    return draw(num_problems, seed)


def stored_puzzle(question: str) -> str:
    """The puzzle in a stored question: its first 16 characters, or those after "Sudoku puzzle: "."""
    if len(question) >= 16 and question[:16].isdigit():
        return question[:16]
    match = re.search(r"Sudoku puzzle: ([0-9.]{81}|[0-9]{16})", question)
    if match is None:
        raise ValueError(f"no Sudoku puzzle in the question {question!r}")
    return match.group(1)


def to_stored(row: dict[str, Any]) -> dict[str, Any]:
    """The puzzle in d1's words, and its solution."""
    return {"question": f"Solve the following Sudoku puzzle: {row['puzzle']}\n", "ground_truth": row["solution"]}


TASK = Task(
    name="sudoku",
    hub_name=None,
    hub_config=None,
    instruction=INSTRUCTION,
    to_row=to_row,
    grade=solved_reward,
    embedded=embedded,
    reference_completion=lambda row: answer_completion(row["solution"]),
    to_stored=to_stored,
    from_stored=lambda item: {"puzzle": stored_puzzle(item["question"]), "solution": item.get("ground_truth")},
    answer_of=lambda text: "".join((short_answer(text) or "").split()) or None,
    verifier=solved_reward,
    shares={"sudoku_cells": cells_reward},
    held_out_split=None,
    is_held_out=is_held_out,
    split_key=lambda row: row["solution"],
)
