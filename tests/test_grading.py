"""Stored generations: d1's rules reproduce what d1's parser says, and the strict protocol is the rewards' own."""

import json
import math
from pathlib import Path

import pytest
from effort import effort

from dgrpo.evaluation.answers import Answer, Evaluation
from dgrpo.evaluation.d1 import D1, d1_countdown, d1_gsm8k, d1_math500, d1_sudoku, last_box, normal_form
from dgrpo.evaluation.disagreement import differing, disagreements, reason
from dgrpo.evaluation.files import d1_items, write_generations
from dgrpo.evaluation.interval import wilson_interval
from dgrpo.evaluation.stored import generation_sets, grade, grade_files, grade_setups, infer_task, setup_name
from dgrpo.tasks import TASKS

DATA = Path(__file__).parent / "data/d1"


def shards(task):
    return sorted(DATA.glob(f"{task}_*_generations.json"))


def item(text, gold, question="Numbers: [1, 5, 2]\nTarget: 3"):
    return {"question": question, "generations": text, "ground_truth": gold}


@pytest.mark.parametrize(
    ("task", "n", "right", "possible"),
    [("gsm8k", 114, 81, 114), ("math500", 114, 25, 114), ("countdown", 72, 16, 72), ("sudoku", 65, 59, 520)],
)
def test_d1_accuracy_of_llada_8b_instruct(task, n, right, possible):
    report = grade_files(shards(task), protocol="d1")
    assert (report.task, report.n, report.skipped) == (task, n, 0)
    assert (report.correct, report.accuracy) == (right, right / possible)
    low, high = report.interval
    assert low < report.accuracy < high
    assert len(report.items) == n


def test_item_for_item_as_d1s_parser():
    for name, expected in json.loads((DATA / "graded_by_d1_at_128.json").read_text()).items():
        items = grade_files([DATA / name], protocol="d1").items
        if name.startswith("sudoku"):
            assert [[graded.right, graded.possible] for graded in items] == expected
        else:
            assert [graded.right for graded in items] == expected


@pytest.mark.parametrize(
    ("task", "n", "correct"),
    [
        ("gsm8k", 114, 58),
        pytest.param("math500", 114, 35, marks=pytest.mark.slow),
        ("countdown", 72, 10),
        ("sudoku", 65, 1),
    ],
)
def test_strict_accuracy_of_llada_8b_instruct(task, n, correct):
    report = grade_files(shards(task), protocol="strict")
    assert (report.n, report.skipped, report.correct) == (n, 0, correct)


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("\\boxed{18}", 18.0, 1),
        ("\\boxed{...} \\boxed{18}", 18.0, 1),
        ("\\boxed{none} \\boxed{18} \\boxed{19}", 18.0, 1),
        ("\\boxed{$18.00}", 18.0, 1),
        ("\\boxed{18 or 19}", 18.0, 1),  # the first number of a box
        ("\\boxed{1,080}", 1080.0, 0),  # a thousands separator ends the number
        ("\\boxed{1,080}", 1.0, 1),
        ("\\boxed{\\frac{18}{2}}", 18.0, 1),  # up to the first closing brace
        ("\\boxed{\n18}", 18.0, 0),  # a box is on one line
        ("\\boxed{\n18}<answer>18</answer>", 18.0, 1),
        ("<answer>17 + 1 = 18</answer>", 18.0, 1),  # the last number of an answer
        ("<answer>18</answer><answer>19</answer>", 18.0, 1),
        ("<answer>18", 18.0, 0),
        ("\\boxed{17}<answer>18</answer>", 18.0, 0),
        ("18", 18.0, 0),
        ("\\boxed{18}", None, 0),
        ("\\boxed{1_8}", 18.0, 1),  # Python's own float
        ("\\boxed{١٨}", 18.0, 1),
        ("", 18.0, 0),
    ],
)
def test_d1_gsm8k(text, gold, right):
    assert d1_gsm8k(item(text, gold)).right == right


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{1} \\boxed{\\frac{1}{2}} end", "\\frac{1}{2}"),
        ("no box", "no box"),
        ("\\boxed 5$ and </answer>", "5"),
        ("\\boxed{3} \\boxed 5", "5"),
        ("\\fbox{3}", "\\fbox{3}"),
        ("\\boxed{3", None),
        ("\\boxed5{3}", "\\boxed5{3}"),
        ("", ""),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("\\dfrac12", "\\frac{1}{2}"),
        ("\\frac1{2}", "\\frac{1}{2}"),
        ("0.5", "\\frac{1}{2}"),
        (".5", "\\frac{1}{2}"),
        ("3/4", "\\frac{3}{4}"),
        ("x = 5", "5"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("5\\text{ cm}", "5"),
        ("50\\%", "50"),
        ("\\$5", "5"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
        ("90^\\circ", "90"),
        ("11,\\! 111", "11,111"),
        ("abc = 5", "abc=5"),
        ("\\frac1", "\\frac1"),
    ],
)
def test_normal_form(answer, same):
    assert normal_form(answer) == same


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("\\boxed{0.5}", "\\frac12", 1),
        ("\\boxed{5} <answer>6</answer>", "5", 1),
        ("<answer>5</answer>", "5", 0),  # without a box the whole text is the answer
        ("5", "5", 1),
        ("\\boxed{5 <answer>5</answer>", "5", 1),  # an open box: now the answer block
        ("\\boxed{} <answer>5</answer>", "5", 1),
        ("\\boxed{a/b}", "a/b", 1),  # outside the normal form: compared as it is
        ("\\boxed{ a/b}", "a/b", 0),
        ("\\boxed{5}", 5.0, 1),
        ("\\boxed{five}", 5.0, 0),
        ("\\boxed{5}", None, 0),
        ("\\boxed{1.50}", "1.5", 0),
    ],
)
def test_d1_math500(text, gold, right):
    assert d1_math500(item(text, gold)).right == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("\\boxed{5 - 2 * 1}", 1),
        ("\\boxed{5 - 2 \\times 1}", 1),
        ("\\boxed{5 - 2 * 1 = 3}", 1),
        ("\\boxed{5 - 2 * 1 = 99}", 1),  # the number behind = is not looked at
        ("\\boxed{1.5*2}", 1),  # digits, not numbers
        ("\\boxed{5//2+1}", 1),
        ("\\boxed{-2 + 5*1}", 1),
        ("\\boxed{5 - 2}", 0),
        ("\\boxed{5 - 2 = 3}", 0),
        ("\\boxed{9**9**9}", 0),
        ("\\boxed{5(2)1}", 0),
        ("\\boxed{5/(2-2)*1}", 0),
        ("<answer>5-2*1</answer>", 0),  # without a box the whole text is the equation
        ("5-2*1", 1),
        ("so 5-2*1=3", 1),
        ("\\boxed{ <answer>5-2*1</answer>", 1),  # an open box: now the answer block
        ("", 0),
    ],
)
def test_d1_countdown(text, right):
    assert d1_countdown(item(text, [[1, 5, 2], 3])).right == right
    assert d1_countdown(item(text, None)).right == right  # read off the question


def test_d1_countdown_bounds_powers():
    assert d1_countdown(item("\\boxed{9**9**9}", [[9, 9, 9], 1])).right == 0
    assert d1_countdown(item("\\boxed{2**9**1}", [[2, 9, 1], 512])).right == 1
    assert d1_countdown(item("\\boxed{" + "(" * 90_000 + "}", [[], 1])).right == 0


SUDOKU = "Solve the following Sudoku puzzle: 1204341201430301\n"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<answer>1234341221434321</answer>", 4),
        ("<answer>\n1234\n3412\n2143\n4321\n</answer>", 4),
        ("<answer>12343412214343219999</answer>", 4),  # cut
        ("<answer>1234</answer>", 1),  # padded
        ("<answer>9939999929999999</answer>", 2),  # clues are not looked at, cells are
        ("<answer>x1234341221434321</answer>", 1),  # shifted: one cell by chance
        ("<answer>see ```1234341221434321``` </answer>", 4),
        ("<answer>``` ``` 1234</answer>", 0),
        ("<answer>1234341221434321<|eot_id|>", 4),  # cut off, but ended
        ("<answer>1234341221434321", 4),  # by the first 16 digits
        ("<answer></answer> 1234341221434321", 4),
        ("1234341221434321 </answer>", 4),
        ("so 1234341221434321 it is", 4),
        ("123434122143432", 0),
        ("", 0),
    ],
)
def test_d1_sudoku(text, right):
    graded = d1_sudoku(item(text, "1234341221434321", SUDOKU))
    assert (graded.right, graded.possible) == (right, 4)


def test_d1_sudoku_needs_a_puzzle():
    with pytest.raises(ValueError, match="no Sudoku puzzle"):
        d1_sudoku(item("", "1" * 16, "nothing here"))


def test_strict_drops_what_follows_the_end_of_text():
    texts = ["<answer>72</answer><|eot_id|><answer>73</answer>", "<answer>73</answer><|endoftext|>", "<|im_end|>"]
    report = grade([item(text, 72.0) for text in texts], "gsm8k")
    assert [graded.right for graded in report.items] == [1, 0, 0]
    assert [graded.answer for graded in report.items] == ["72", "73", None]


def test_strict_tasks():
    grid = "1234341221434321"
    assert grade([item("<answer>5-2*1</answer>", [[1, 5, 2], 3])], "countdown").correct == 1
    assert grade([item(f"<answer>{grid}</answer>", grid, SUDOKU)], "sudoku").correct == 1
    wrong = item("<answer>1224341221434321</answer>", grid, SUDOKU)
    assert grade([wrong], "sudoku").accuracy == 0
    assert grade([wrong], "sudoku_cells").accuracy == pytest.approx(3 / 4)


# The text of an answer that is right and of one that is nearly so, and columns that leave a row without reference.
STORED_TEXTS = {
    "gsm8k": ("<answer>{answer}</answer>", "<answer>{answer}", {"answer": "none"}),
    "math500": ("<answer>{answer}</answer>", "\\boxed{{{answer}}}", {"answer": ""}),
    "countdown": ("<answer>{expression}</answer>", "<answer>{expression} = {target}</answer>", {"numbers": []}),
    "sudoku": ("<answer>{solution}</answer>", "<answer>{solution}0</answer>", {"puzzle": "9" * 16}),
    "programs": ("```\n{solution}\n```", "```\ndef f(x): return {first}\n```", {"tests": []}),
}


@pytest.mark.parametrize("name", TASKS)
def test_stored_texts_of_every_task_are_graded_as_they_were(name, tmp_path):
    task, [source] = TASKS[name], TASKS[name].embedded("held_out", 1, 0)
    row = task.to_row(source)
    known = source | row | {"first": row.get("tests", [""])[0].rpartition("== ")[2]}
    right, nearly, without = STORED_TEXTS[name]
    texts = [right.format(**known), nearly.format(**known), "", right.format(**known)]
    rows = [row, row, row, row | without]
    columns = {column: [each[column] for each in rows] for column in row}
    marks = task.grade(prompts=[None] * 4, completions=texts, **columns)
    assert (marks[0], marks[2], marks[3]) == (1.0, 0.0, None)
    assert marks[1] == (pytest.approx(1 / 3) if name == "programs" else 0.0), "one of three tests passes"
    answers = [Answer(i, texts[i], marks[i], True, 9, True, 0.1) for i in range(4)]
    found = Evaluation.of(answers)
    path = tmp_path / f"{name}_9_9_0_generations.json"
    write_generations(path, d1_items(task, rows, answers, "<|endoftext|>"), 0.4, {})
    report = grade_setups([path])[f"{name}_9_9"]
    assert [graded.right for graded in report.items] == found.correct == [True, False, False, False]
    assert (report.n, report.accuracy, report.interval) == (found.n, found.accuracy, found.interval)
    assert (report.n, report.accuracy) == (4, 0.25), "a row without reference counts, and counts as wrong"


def test_a_reference_is_stored_as_the_reward_reads_it():
    assert TASKS["gsm8k"].to_stored({"question": "q", "answer": "$1,080"})["ground_truth"] == 1080.0


@pytest.mark.parametrize("task", ["gsm8k", "math500", "countdown", "programs"])
def test_a_text_on_a_row_without_reference_is_wrong(task):
    report = grade([item("<answer>72</answer>", None)], task)
    assert (report.n, report.skipped, report.accuracy) == (1, 0, 0.0)


def test_what_has_nothing_to_get_does_not_count():
    solved = item("<answer>1234341221434321</answer>", "1234341221434321", "1234341221434321")
    report = grade([solved], "sudoku", "d1")
    assert (report.n, report.skipped, report.interval) == (0, 1, (0.0, 1.0))
    assert math.isnan(report.accuracy)
    [case] = differing([solved], "sudoku")
    assert reason(case) == "no empty cell: d1 leaves it out"
    assert math.isnan(grade([], "countdown").accuracy)


def test_files_shards_and_runs(tmp_path):
    for name, texts in {
        "gsm8k_model_128_64_0": ["<answer>72</answer>"],
        "gsm8k_model_128_64_1": ["<answer>73</answer>", "<answer>72</answer>"],
        "gsm8k_model_256_128_0": ["<answer>72</answer>"],
    }.items():
        data = {"generations": [item(text, 72.0) for text in texts], "gen_length": 128}
        (tmp_path / f"{name}_generations.json").write_text(json.dumps(data))
    paths = sorted(tmp_path.iterdir())
    reports = grade_setups(paths)
    assert {setup: (report.n, report.correct) for setup, report in reports.items()} == {
        "gsm8k_model_128_64": (3, 2),
        "gsm8k_model_256_128": (1, 1),
    }
    assert grade_files(paths).n == 4
    assert [graded.answer for graded in grade_files(paths[:2]).items] == ["72", "73", "72"]


def test_sets_of_one_name_in_several_folders_are_several_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "one/base/gsm8k_256_128_0": 1,
        "one/base/gsm8k_256_128_1": 2,
        "one/tuned/gsm8k_256_128_0": 3,
        "two/tuned/gsm8k_512_256_0": 4,
        "one/tuned/gsm8k_512_256_0": 5,
        "one/tuned/gsm8k_128_64_0": 6,
    }
    for name, n in files.items():
        path = tmp_path / f"{name}_generations.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"generations": [item("\\boxed{72}", 72.0)] * n}))
    paths = [Path(f"{name}_generations.json") for name in files]
    # One folder, however it is spelled.
    paths[1] = tmp_path / "one/tuned/../base" / paths[1].name
    expected = {
        "base/gsm8k_256_128": 3,
        "tuned/gsm8k_256_128": 3,
        "two/tuned/gsm8k_512_256": 4,
        "one/tuned/gsm8k_512_256": 5,
        "gsm8k_128_64": 6,
    }
    assert {name: report.n for name, report in grade_setups(paths).items()} == expected
    found = disagreements(paths)
    assert {name: sum(map(len, classes.values())) for name, classes in found.items()} == expected


def test_folders_of_unequal_depth_are_told_apart():
    names = [f"{folder}/gsm8k_0_generations.json" for folder in ("/a", "/y/b/a", "/z/b/a", "/")]
    assert list(generation_sets(names)) == ["/a/gsm8k", "y/b/a/gsm8k", "z/b/a/gsm8k", "/gsm8k"]
    assert generation_sets([]) == {}


def test_names_of_files():
    assert setup_name("runs/gsm8k_instruct_128_64_0_generations.json") == "gsm8k_instruct_128_64"
    assert setup_name("mine.json") == "mine"
    assert infer_task("x/math500_instruct_128_64_0_generations.json") == "math500"
    assert infer_task("humaneval_0_generations.json") == "programs"
    with pytest.raises(ValueError, match="tells no task"):
        infer_task("generations.json")


def test_what_cannot_be_graded_is_refused(tmp_path):
    empty = tmp_path / "gsm8k_0_generations.json"
    empty.write_text("[]")
    with pytest.raises(ValueError, match="not a file of generations"):
        grade_files([empty])
    with pytest.raises(ValueError, match="no files"):
        grade_files([])
    with pytest.raises(ValueError, match="several tasks"):
        grade_files(["gsm8k.json", "sudoku.json"])
    with pytest.raises(ValueError, match="protocol 'lenient'"):
        grade([], "gsm8k", "lenient")
    with pytest.raises(ValueError, match="'programs' has no protocol 'd1'"):
        grade([], "programs", "d1")


def test_wilson_interval():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1.0, 20)[1] == 1.0


def test_no_text_makes_d1s_rules_raise_or_stall():
    golds = {"gsm8k": 72.0, "math500": "72", "countdown": [[7, 2], 9], "sudoku": "1234341221434321"}
    texts = [
        "7" * 50_000,
        " " * 50_000,
        "<answer>" * 6_000,
        "\\boxed{" * 7_000,
        "\\boxed " * 7_000,
        "{" * 50_000,
        "1/" * 20_000,
    ]
    texts += ["\\frac" * 9_000, "\\sqrt" * 9_000, "(" * 50_000, "\ud800\x00", "```" * 16_000, "1=" * 25_000]
    for task, rule in D1.items():
        for text in texts:
            answers = [text, f"\\boxed{{{text}}}", f"<answer>{text}</answer>"]
            grades = []
            spent = effort(lambda: grades.extend(rule(item(each, golds[task], SUDOKU)) for each in answers))  # noqa: B023
            assert spent < 100, (task, text[:20])
            assert [grade.right for grade in grades] == [0, 0, 0]
