"""4x4 Sudoku: puzzles with one solution, split by solution so that no held-out grid is seen in training.

A grid is a string of 16 digits, row by row; 0 is an empty cell, as in d1's CSV files.
"""

import random
from collections.abc import Callable
from functools import cache

from dgrpo.noise import fixed_order
from dgrpo.tiny.problems import Messages, sft_example, user_message

NUM_HELD_OUT_GRIDS = 48
NUM_BLANKS = range(6, 9)
# Supervised puzzles have up to two empty cells more.
NUM_BLANKS_SFT = range(6, 11)


def _share_a_unit(cell: int, other: int) -> bool:
    (row, column), (other_row, other_column) = divmod(cell, 4), divmod(other, 4)
    return row == other_row or column == other_column or (row // 2, column // 2) == (other_row // 2, other_column // 2)


@cache
def grid_split() -> tuple[list[str], list[str]]:
    """The 240 training and the 48 held-out solutions: together all 288 grids."""
    grids = [""]
    for cell in range(16):
        earlier = [other for other in range(cell) if _share_a_unit(cell, other)]
        grids = [grid + digit for grid in grids for digit in "1234" if all(grid[other] != digit for other in earlier)]
    grids.sort(key=fixed_order)
    return grids[NUM_HELD_OUT_GRIDS:], grids[:NUM_HELD_OUT_GRIDS]


@cache
def _grids_with() -> dict[tuple[int, str], int]:
    """For each cell and digit, the grids that have it there, as the bits of one integer."""
    train, held_out = grid_split()
    bits: dict[tuple[int, str], int] = {}
    for number, grid in enumerate(train + held_out):
        for given in enumerate(grid):
            bits[given] = bits.get(given, 0) | 1 << number
    return bits


def num_solutions(puzzle: str) -> int:
    """How many of the 288 grids agree with the given cells."""
    grids_with, agreeing = _grids_with(), (1 << 288) - 1
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            agreeing &= grids_with.get((cell, digit), 0)
    return agreeing.bit_count()


def _draw(rng: random.Random, grids: list[str], num_blanks: range = NUM_BLANKS) -> dict[str, str]:
    solution = rng.choice(grids)
    num_empty = rng.choice(num_blanks)
    while True:
        blanks = set(rng.sample(range(16), num_empty))
        puzzle = "".join("0" if cell in blanks else digit for cell, digit in enumerate(solution))
        if num_solutions(puzzle) == 1:
            return {"Puzzle": puzzle, "Solution": solution}


def train_problems(num_problems: int, seed: int) -> list[dict[str, str]]:
    """Puzzles on the training grids, with replacement: 6 to 8 blanks, equally likely; rows `Puzzle`, `Solution`."""
    rng = random.Random(f"train {seed}")
    grids, _ = grid_split()
    return [_draw(rng, grids) for _ in range(num_problems)]


def held_out_problems(num_problems: int, seed: int) -> list[dict[str, str]]:
    """Puzzles on the held-out grids, no two alike. They share 48 solutions: fewer independent cases than rows."""
    rng = random.Random(f"held out {seed}")
    _, grids = grid_split()
    distinct: dict[str, dict[str, str]] = {}
    for _ in range(100 * num_problems):
        problem = _draw(rng, grids)
        distinct[problem["Puzzle"]] = problem
        if len(distinct) == num_problems:
            return list(distinct.values())
    raise ValueError(
        f"num_problems is {num_problems}, but {len(distinct)} different puzzles were found: ask for fewer"
    )


def sft_examples(
    num_examples: int, seed: int, *, prompt_builder: Callable[[str], Messages] = user_message
) -> list[dict[str, Messages]]:
    """Supervised rows on training grids: the puzzle's 16 digits as the question, the solution as the answer."""
    rng = random.Random(f"sft {seed}")
    grids, _ = grid_split()
    problems = [_draw(rng, grids, NUM_BLANKS_SFT) for _ in range(num_examples)]
    return [sft_example(prompt_builder(problem["Puzzle"]), problem["Solution"]) for problem in problems]
