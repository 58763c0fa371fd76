"""Sudoku: clues are kept, cells are counted, and any valid grid solves."""

import csv
from pathlib import Path

import pytest

from rewards.sudoku import cells_reward, solved_reward

PUZZLES = Path(__file__).parent / "data/d1/4x4_test_sudoku.csv"
PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"
EMPTY = [i for i, clue in enumerate(PUZZLE) if clue == "0"]
# A well-known puzzle and its only solution.
PUZZLE_9 = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
SOLUTION_9 = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def scores(answer, puzzle=PUZZLE, solution=SOLUTION):
    text = [f"<reasoning>\nr\n</reasoning>\n<answer>\n{answer}\n</answer>"]
    return cells_reward([None], text, [puzzle], [solution])[0], solved_reward([None], text, [puzzle])[0]


def with_cell(grid, i, digit):
    return grid[:i] + digit + grid[i + 1 :]


ROWS = ["3142", "2431", "4213", "1324"]
MARKDOWN = [
    f"** {SOLUTION} **",
    "```\n" + "\n".join(ROWS) + "\n```",
    "\n".join(f"**{row}**" for row in ROWS),
    "\n".join("| " + " | ".join(row) + " |" for row in ROWS),
    str([list(map(int, row)) for row in ROWS]),
    "\n".join(f"{row[:2]}|{row[2:]}" for row in ROWS[:2]) + "\n--+--\n" + "42|13\n13|24",
    SOLUTION + "\u200b",
]


@pytest.mark.parametrize(
    "answer",
    [
        *MARKDOWN,
        SOLUTION,
        "3142\n2431\n4213\n1324",
        "3 1 4 2  2431 4213 1324",
        f"\\boxed{{{SOLUTION}}}",
        SOLUTION + " " * 600,
    ],
)
def test_the_solution(answer):
    assert scores(answer) == (1.0, 1.0)


def test_one_wrong_cell():
    wrong = with_cell(SOLUTION, EMPTY[0], "1")
    assert scores(wrong) == (pytest.approx(1 - 1 / len(EMPTY)), 0.0)


def test_a_changed_clue_scores_zero():
    changed = with_cell(SOLUTION, 0, "4")
    assert scores(changed) == (0.0, 0.0)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        PUZZLE,
        SOLUTION[:-1],
        SOLUTION + "1",
        SOLUTION + SOLUTION,
        SOLUTION.replace("1", "١"),
        SOLUTION.replace("1", "１"),
        SOLUTION.replace("1", "5"),
        "solution: " + SOLUTION,
        "\u202e" + SOLUTION[::-1],
        "1" * 100_000,
        SOLUTION_9,
    ],
)
def test_other_grids_score_zero(answer):
    assert scores(answer) == (0.0, 0.0)


def test_any_valid_grid_solves_a_puzzle_with_several_solutions():
    puzzle, one, other = "0" * 16, "1234341221434321", "4321214334121234"
    assert scores(one, puzzle, other) == (1.0, 1.0)
    broken = with_cell(one, 0, "2")
    assert scores(broken, puzzle, one) == (15 / 16, 0.0)


def test_nine_by_nine():
    assert scores(SOLUTION_9, PUZZLE_9, SOLUTION_9) == (1.0, 1.0)
    assert scores(SOLUTION_9, PUZZLE_9.replace("0", "."), SOLUTION_9) == (1.0, 1.0)
    wrong = with_cell(SOLUTION_9, PUZZLE_9.index("0"), "9")
    assert scores(wrong, PUZZLE_9, SOLUTION_9) == (pytest.approx(1 - 1 / PUZZLE_9.count("0")), 0.0)
    # Rows and columns alone do not make a grid: every box here holds each digit more than once.
    latin = "".join("123456789"[(row + column) % 9] for row in range(9) for column in range(9))
    assert scores(latin, "0" * 81, SOLUTION_9)[1] == 0.0


def test_no_puzzle_no_score():
    text = [f"<answer>{SOLUTION}</answer>"]
    for puzzle in (None, "", "12", "5" * 16, 3102):
        assert solved_reward([None], text, [puzzle]) == [None]
        assert cells_reward([None], text, [puzzle], [SOLUTION]) == [None]
    for solution in (None, "", SOLUTION_9):
        assert cells_reward([None], text, [PUZZLE], [solution]) == [None]


def test_all_solutions_of_d1():
    with PUZZLES.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 500
    puzzles, solutions = [row["Puzzle"] for row in rows], [row["Solution"] for row in rows]
    texts = [f"<answer>\n{solution}\n</answer>" for solution in solutions]
    assert cells_reward(rows, texts, puzzles, solutions) == [1.0] * 500
    assert solved_reward(rows, texts, puzzles) == [1.0] * 500
    echoes = [f"<answer>\n{puzzle}\n</answer>" for puzzle in puzzles]
    assert cells_reward(rows, echoes, puzzles, solutions) == [0.0] * 500
