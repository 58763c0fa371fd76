"""Tasks: rows of every source's form, prompts, splits without overlap, and the grader that is also the reward."""

import json
import re
from itertools import islice, permutations
from pathlib import Path

import pytest
from datasets import load_dataset

from dgrpo.evaluation import stored
from dgrpo.tasks import EMBEDDED, TASKS, Task, countdown, gsm8k, load_rows, math500, programs, prompt_messages, sudoku
from dgrpo.tiny import sudoku as grids
from rewards.sudoku import is_solved

DATA = Path(__file__).parent / "data"
ROWS = [{"question": f"How much is {i}+1?", "answer": f"{i}+1={i + 1}\n#### {i + 1:,}"} for i in range(990, 1010)]

NINE = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
# Other solutions of 9x9, by renaming the digits.
NINES = [
    NINE.translate(str.maketrans("123456789", "".join(digits))) for digits in islice(permutations("123456789"), 99)
]


@pytest.fixture
def write(tmp_path):
    """A function (name, rows) -> the path of a .jsonl or .csv file with these rows."""

    def write_rows(name: str, rows: list[dict]) -> str:
        path = tmp_path / name
        if path.suffix == ".csv":
            lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        else:
            lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines))
        return str(path)

    return write_rows


@pytest.fixture
def rows_file(write) -> str:
    return write("rows.jsonl", ROWS)


def test_the_prompt_is_one_message_with_or_without_instruction():
    assert prompt_messages("Q?", "") == [{"role": "user", "content": "Q?"}]
    assert prompt_messages("Q?", "Do.") == [{"role": "user", "content": "Do.\n\nQ?"}]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("instruction", [None, "", "Do."])
def test_training_and_evaluation_put_the_question_in_the_same_words(name, instruction):
    task = TASKS[name]
    asked = task.instruction if instruction is None else instruction
    for rows in load_rows(task, "embedded", num_train=8, num_held_out=8, instruction=instruction):
        assert rows["prompt"] == [prompt_messages(question, asked) for question in rows["question"]]


@pytest.mark.parametrize("name", TASKS)
def test_every_instruction_asks_for_the_format_that_rewards_read(name):
    lines = TASKS[name].instruction.split("\n")
    assert [line for line in lines if line.startswith("<")] == ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]


def test_a_local_file_is_split_and_its_answers_read(rows_file):
    train, held_out = load_rows(gsm8k.TASK, rows_file)
    assert (len(train), len(held_out)) == (16, 4)
    assert sorted([*train["question"], *held_out["question"]]) == sorted(row["question"] for row in ROWS)
    for row in (*train, *held_out):
        first = int(row["question"].removeprefix("How much is ").partition("+")[0])
        assert row["answer"] == str(first + 1)
        assert row["prompt"][0]["content"].endswith(row["question"])


def test_how_a_file_is_divided_does_not_depend_on_how_many_problems_are_asked(write, rows_file):
    """Or a later evaluation would ask what was trained on."""
    train, held_out = load_rows(gsm8k.TASK, rows_file)
    for number in (1, 3):
        fewer_train, fewer = load_rows(gsm8k.TASK, rows_file, num_held_out=number)
        assert fewer_train["question"] == train["question"]
        assert fewer["question"] == held_out["question"][:number]
    backwards = load_rows(gsm8k.TASK, write("backwards.jsonl", ROWS[::-1]))[1]
    assert set(backwards["question"]) == set(held_out["question"])


def test_other_columns_of_a_file_reach_the_rewards_and_numbers_are_read(write):
    rows = [{"question": f"{i}?", "answer": i, "difficulty": i % 3, "prompt": "mine", "image": "x"} for i in range(10)]
    for task in (gsm8k.TASK, math500.TASK):
        train, held_out = load_rows(task, write("mine.jsonl", rows))
        for row in (*train, *held_out):
            assert set(row) == {"prompt", "question", "answer", "difficulty"}
            assert row["answer"] == row["question"][:-1]
            assert row["difficulty"] == int(row["answer"]) % 3


def test_held_out_rows_of_the_hub_beside_a_file_are_read_as_the_hub_s_own(rows_file, monkeypatch):
    asked = []

    def hub(name, config=None, **options):
        asked.append((name, config, options["split"]))
        if name == "openai/gsm8k":
            return [{"question": "One?", "answer": "#### 1"}]
        return [{"nums": list(range(i, i + 3 + i % 2)), "target": i} for i in range(6)]

    real = load_dataset
    monkeypatch.setattr(
        "dgrpo.tasks.sources.load_dataset", lambda name, *a, **o: (real if name == "json" else hub)(name, *a, **o)
    )
    held_out = load_rows(gsm8k.TASK, rows_file, "openai/gsm8k")[1]
    assert asked == [("openai/gsm8k", "main", "test")]
    assert held_out["question"] == ["One?"]
    held_out = load_rows(countdown.TASK, EMBEDDED, "Jiayi-Pan/Countdown-Tasks-3to4", num_train=4)[1]
    assert {len(numbers) for numbers in held_out["numbers"]} == {3}


def test_training_rows_that_occur_anywhere_in_the_evaluation_file_are_left_out(write, rows_file):
    others = write("others.jsonl", ROWS[5:])
    train, held_out = load_rows(gsm8k.TASK, rows_file, others, num_held_out=2)
    assert held_out["question"] == ["How much is 995+1?", "How much is 996+1?"]
    assert train["question"] == [row["question"] for row in ROWS[:5]]
    train, held_out = load_rows(gsm8k.TASK, rows_file, rows_file)
    assert (len(train), len(held_out)) == (0, 20)


@pytest.mark.parametrize("name", TASKS)
def test_the_embedded_rows_are_disjoint(name):
    task = TASKS[name]
    train, held_out = load_rows(task, "embedded", num_train=2048, num_held_out=512)
    assert (len(train), len(held_out)) == (2048, 512)
    assert not {task.split_key(row) for row in train} & {task.split_key(row) for row in held_out}


def answers(task, rows: list[dict]) -> list[tuple[str, str]]:
    """A right and a wrong completion for each of a task's rows."""

    def in_tags(answer: str) -> str:
        return f"<answer>\n{answer}\n</answer>"

    if task is sudoku.TASK:
        # A grid with two cells exchanged is no solution.
        return [
            (in_tags(r["Solution"]), in_tags(r["Solution"][1] + r["Solution"][0] + r["Solution"][2:])) for r in rows
        ]
    if task is countdown.TASK:
        return [(in_tags(row["expression"]), in_tags(row["expression"] + "+1")) for row in rows]
    if task is programs.TASK:
        return [(in_tags(f"```python\n{r['solution']}\n```"), in_tags(f"```\n{r['solution']}+1\n```")) for r in rows]
    if task is math500.TASK:
        golds = [task.to_row(row)["answer"] for row in rows]
        return [(in_tags(rf"\boxed{{{gold}}}"), in_tags(rf"\boxed{{{gold}1}}")) for gold in golds]
    return [(in_tags(task.to_row(row)["answer"]), in_tags(task.to_row(row)["answer"] + "1")) for row in rows]


@pytest.mark.parametrize("name", TASKS)
def test_the_gold_answers_of_the_embedded_rows_are_right_and_others_wrong(name):
    task = TASKS[name]
    rows = task.embedded("held_out", 6 if name == "programs" else 64, 0)
    converted = [task.to_row(row) for row in rows]
    columns = {column: [row[column] for row in converted] for column in converted[0]}
    for texts, grade in zip(zip(*answers(task, rows), strict=True), (1.0, 0.0), strict=True):
        if grade == 0.0 and name == "programs":
            # Added to a remainder, 1 leaves none of the tests right.
            texts = [text.replace("return ", "return 1 + ") for text in texts]
        assert task.grade(prompts=[], completions=texts, **columns) == [grade] * len(rows)


def test_wrong_input_is_told_by_name(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        load_rows(gsm8k.TASK, str(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match="sudoku has no dataset on the hub"):
        load_rows(sudoku.TASK)


@pytest.mark.parametrize(
    ("name", "row", "field"),
    [
        ("gsm8k", {"text": "1"}, "'question'"),
        ("math500", {"problem": "1"}, "'answer or solution'"),
        ("math500", {"answer": "1"}, "'problem or question'"),
        ("countdown", {"target": "1"}, "'nums or numbers or input'"),
        ("countdown", {"nums": [1, 2]}, "'target or output'"),
        ("sudoku", {"Puzzle": "0" * 16}, "'Solution or solution'"),
        ("sudoku", {"Solution": "0" * 16}, "'Puzzle or puzzle'"),
        ("programs", {"prompt": "1"}, "'tests or test or test_list'"),
        ("programs", {"tests": ["assert f(1)"]}, "'prompt or question'"),
        ("programs", {"prompt": "1", "entry_point": "f"}, "'test'"),
        ("programs", {"test_list": ["assert f(1)"]}, "'text or prompt'"),
        ("programs", {"test": "assert f(1)"}, "'question'"),
    ],
)
def test_a_missing_column_is_told_by_name(write, name, row, field):
    path = write("odd.jsonl", [row] * 9)
    with pytest.raises(
        ValueError, match=re.escape(f"a {name} row needs the field {field}; this one has {sorted(row)}")
    ):
        load_rows(TASKS[name], path)


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("math500", {"problem": "1", "solution": "It is 7."}, "no \\\\boxed"),
        ("countdown", {"nums": ["a", "b"], "target": 3}, "no Countdown problem"),
        ("countdown", {"input": "1,,2", "output": "3"}, "no Countdown problem"),
        ("sudoku", {"Puzzle": "0" * 15, "Solution": "1" * 16}, "is no Sudoku"),
        ("sudoku", {"Puzzle": "0" * 16, "Solution": "1" * 16}, "is no Sudoku"),
        # The digits of the puzzle are not those of the solution.
        ("sudoku", {"Puzzle": "2" + "0" * 15, "Solution": "1234341221434321"}, "is no Sudoku"),
    ],
)
def test_a_row_that_is_no_problem_is_refused(name, row, told):
    with pytest.raises(ValueError, match=told):
        TASKS[name].to_row(row)


def test_rows_of_the_hub_s_forms_are_read():
    assert math500.to_row({"problem": "P", "solution": r"As $\boxed{1}$, so $\boxed{\frac{1}{2}}$.", "level": 5}) == {
        "question": "P",
        "answer": r"\frac{1}{2}",
    }
    assert math500.to_row({"problem": "P", "solution": "S", "answer": "(3, 4)"})["answer"] == "(3, 4)"
    row = {"question": "Numbers: [44, 19, 35]\nTarget: 98", "numbers": [44, 19, 35], "target": 98}
    assert countdown.to_row({"nums": [44, 19, 35], "target": 98}) == row
    assert countdown.to_row({"input": "44,19,35", "output": "98"}) == row
    assert countdown.to_row({"numbers": "[44, 19, 35]", "target": "98"}) == row
    grid = "1234341221434321"
    assert sudoku.to_row({"Puzzle": "0" + grid[1:], "Solution": grid}) == sudoku.to_row(
        {"puzzle": "." + grid[1:], "solution": grid}
    )
    nine = sudoku.to_row({"Puzzle": "0" + NINE[1:80] + ".", "Solution": NINE})
    assert nine == {"question": f"0{NINE[1:80]}0", "puzzle": f"0{NINE[1:80]}0", "solution": NINE}
    assert sudoku.TASK.grade(prompts=[], completions=[f"<answer>{NINE}</answer>"], puzzle=[nine["puzzle"]]) == [1.0]


PROGRAM = "def add(a, b):\n    return a + b"
PROGRAM_ROWS = {
    "kodcode": (
        {
            "question": "Add two numbers.",
            "solution": PROGRAM,
            "test": "from solution import add\n\ndef test_small():\n    assert add(1, 2) == 3\n",
            "test_info": [{"function_declaration": "def add(a, b):", "function_name": "add"}],
        },
        "Add two numbers.\nDeclare it as `def add(a, b):`",
    ),
    "humaneval": (
        {
            "prompt": 'def add(a, b):\n    """The sum."""\n',
            "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n",
            "entry_point": "add",
        },
        'Complete the function:\n```python\ndef add(a, b):\n    """The sum."""\n```',
    ),
    "mbpp": (
        {
            "text": "Write a function to add.",
            "test_list": ["assert add(one, 2) == 3", "assert add(2, 2) == 4"],
            "test_setup_code": "one = 1",
        },
        "Write a function to add.\nIt must pass:\nassert add(one, 2) == 3\nassert add(2, 2) == 4",
    ),
    "mbpp sanitized": (
        {
            "prompt": "Write a function to add.",
            "test_list": ["assert add(1, math.floor(2.5)) == 3"],
            "test_imports": ["import math"],
        },
        "Write a function to add.\nIt must pass:\nassert add(1, math.floor(2.5)) == 3",
    ),
    "own": ({"prompt": "Add.", "tests": "assert add(1, 2) == 3"}, "Add."),
}


@pytest.mark.parametrize("source", PROGRAM_ROWS)
def test_programs_of_every_source_are_tested(source):
    row, question = PROGRAM_ROWS[source]
    converted = programs.to_row(row)
    assert converted["question"] == question
    texts = [f"<answer>\n```python\n{text}\n```\n</answer>" for text in (PROGRAM, PROGRAM.replace("+", "-"))]
    assert programs.TASK.grade(prompts=[], completions=texts, tests=[converted["tests"]] * 2) == [1.0, 0.0]


def test_tests_in_one_text_are_not_letters():
    text = "assert f(1) == 2\nassert f(2) == 3"
    for row in (
        {"text": "Add.", "test_list": text, "code": "def f(x): return x + 1"},
        {"prompt": "Add.", "tests": text},
    ):
        assert programs.to_row(row)["tests"] == [text]
    with pytest.raises(ValueError, match="test_list=5: write the tests as one Python text"):
        programs.to_row({"text": "Add.", "test_list": 5})


def test_no_sudoku_grid_of_a_file_is_on_both_sides(write):
    train_grids, held_out_grids = grids.grid_split()
    # The same grid in several puzzles, first and last in the file: its last rows would share grids with the others.
    puzzles = [
        {"Puzzle": "0" * blanks + grid[blanks:], "Solution": grid}
        for blanks in (1, 2)
        for grid in train_grids[:30] + held_out_grids[:10]
    ]
    train, held_out = load_rows(sudoku.TASK, write("grids.csv", puzzles), num_held_out=15)
    assert (set(train["solution"]), len(train)) == (set(train_grids[:30]), 60)
    assert (set(held_out["solution"]) <= set(held_out_grids), len(held_out)) == (True, 15)


def test_nine_by_nine_sudoku_is_split_by_solution_too(write):
    puzzles = [{"Puzzle": "0" * blanks + grid[blanks:], "Solution": grid} for blanks in (1, 2) for grid in NINES]
    assert all(is_solved(grid) for grid in NINES)
    train, held_out = load_rows(sudoku.TASK, write("nines.jsonl", puzzles))
    assert len(train) + len(held_out) == len(puzzles)
    assert len(train) > len(held_out) >= 4
    assert not set(train["solution"]) & set(held_out["solution"])


def test_no_countdown_problem_is_on_both_sides_in_any_order_of_its_numbers(write):
    problems = [{"nums": [i, i + 1, i + 2], "target": i} for i in range(20)]
    shuffled = [{"nums": [i + 2, i, i + 1], "target": i} for i in range(10, 20)]
    other_target = [{"nums": [i + 2, i, i + 1], "target": i + 1} for i in range(10, 12)]
    train, held_out = load_rows(countdown.TASK, write("c.jsonl", problems + shuffled + other_target))
    keys = [{countdown.TASK.split_key(row) for row in rows} for rows in (train, held_out)]
    assert not keys[0] & keys[1]
    assert (len(keys[0]), len(keys[1]), len(train) + len(held_out)) == (18, 4, 32)


def test_countdown_s_hub_rows_of_four_numbers_are_left_out_and_those_of_a_file_are_not(write, monkeypatch):
    rows = [{"nums": list(range(i, i + 3 + i % 2)), "target": i} for i in range(20)]
    train, _ = load_rows(countdown.TASK, write("c.jsonl", rows), num_held_out=2)
    assert {len(numbers) for numbers in train["numbers"]} == {3, 4}
    monkeypatch.setattr("dgrpo.tasks.sources.load_dataset", lambda *args, **options: rows)
    train, held_out = load_rows(countdown.TASK, num_held_out=2)
    assert (len(train), len(held_out)) == (8, 2)
    assert {len(numbers) for numbers in train["numbers"]} == {3}


def test_real_gsm8k_files_load():
    train, held_out = load_rows(
        gsm8k.TASK, str(DATA / "gsm8k/train.jsonl"), str(DATA / "gsm8k/test.jsonl"), num_train=100, num_held_out=50
    )
    assert (len(train), len(held_out)) == (100, 50)
    assert train[0]["answer"] == "72"


def test_d1_s_sudoku_file_is_read_and_split_by_solution():
    path = str(DATA / "d1/4x4_test_sudoku.csv")
    train, held_out = load_rows(sudoku.TASK, path)
    assert len(train) + len(held_out) == 500
    assert len({*train["solution"], *held_out["solution"]}) == 229
    assert not set(train["solution"]) & set(held_out["solution"])
    # Beside the whole test file only grids that it lacks are left to train on.
    train, held_out = load_rows(sudoku.TASK, "embedded", path, num_train=4096)
    assert len(held_out) == 500
    assert set(train["solution"]) == set(grids.grid_split()[0]) - set(held_out["solution"])
    golds = [f"<answer>{solution}</answer>" for solution in held_out["solution"]]
    assert sudoku.TASK.grade(prompts=[], completions=golds, puzzle=held_out["puzzle"]) == [1.0] * 500


def test_d1_s_countdown_file_is_read_and_shares_no_problem_with_training():
    path = str(DATA / "d1/countdown_cd3_test.jsonl")
    train, held_out = load_rows(countdown.TASK, path, num_held_out=56)
    keys = [{countdown.TASK.split_key(row) for row in rows} for rows in (train, held_out)]
    assert not keys[0] & keys[1]
    assert len(train) + len(held_out) == 256
    assert train[0]["numbers"] == [30, 100, 93]
    assert train[0]["target"] == 23
    assert train[0]["question"] == "Numbers: [30, 100, 93]\nTarget: 23"


def test_a_task_of_one_s_own_trains_without_a_generator_and_is_graded_when_stored(write):
    def right(prompts, completions, answer, **columns):
        return [float(gold in text) for gold, text in zip(answer, completions, strict=True)]

    task = Task(name="capitals", instruction="", to_row=lambda row: dict(row), grade=right)
    path = write("capitals.jsonl", [{"question": f"{i}?", "answer": f"town {i}."} for i in range(10)])
    train, held_out = load_rows(task, path)
    assert (len(train), len(held_out)) == (8, 2)
    for source in ({"dataset": "embedded"}, {"dataset": path, "eval_dataset": "embedded"}):
        with pytest.raises(ValueError, match="dataset='embedded': capitals generates no problems"):
            load_rows(task, **source)
    items = [task.to_stored(row) | {"generations": f"It is {row['answer']}"[i:]} for i, row in enumerate(train)]
    report = stored.grade(items, task)
    assert (report.task, report.n, report.correct) == ("capitals", 8, 7), "the last text has lost its first letter"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.JSONL", '{"question": "1?", "answer": "1"}\n{"question": "2?", "ans', "line 2 is no JSON object"),
        ("rows.jsonl", "", "at least one"),
        ("rows.json", "[1, 2]", "must be rows of named fields"),
        ("rows.json", '[{"question": "1?"', "the file cannot be read: Expecting"),
        ("rows.parquet", "PAR1 cut", "the file cannot be read"),
        ("rows.csv", "", "the file cannot be read"),
        ("rows.txt", "1", "no .txt files are read; .jsonl, .json"),
        (
            "rows.jsonl",
            '{"question": null, "answer": "1"}',
            r"row 1: .* needs the field 'question'; .* \(empty: \['question'\]\)",
        ),
        ("rows.jsonl", '{"question": "1?", "answer": "1"}\n{"question": "2?", "answer": null}', "row 2: .* 'answer'"),
        ("rows.jsonl", '{"question": 5, "answer": "1"}', "row 1: the field 'question' is 5; it must be a text"),
        ("rows.jsonl", '{"question": " ", "answer": "1"}', "row 1: the field 'question' is ' '"),
        ("rows.jsonl", '{"question": "1?", "answer": ["1"]}', r"row 1: the field 'answer' is \['1'\]"),
        ("rows.jsonl", '{"question": "1?", "answer": true}', "row 1: the field 'answer' is True"),
    ],
)
def test_damaged_files_and_rows_are_told_in_one_line(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=told) as raised:
        load_rows(gsm8k.TASK, str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_columns_of_several_kinds_and_of_taken_names(write):
    rows = [{"question": f"{i}?", "answer": i, "note": i if i % 2 else "text"} for i in range(10)]
    with pytest.raises(ValueError, match="the column 'note' holds values of several kinds"):
        load_rows(gsm8k.TASK, write("mixed.jsonl", rows))
    rows = [{"question": f"{i}?", "answer": i, "completions": "x", "prompts": "y", "level": 1} for i in range(10)]
    train, _ = load_rows(gsm8k.TASK, write("ROWS.JSONL", rows))
    assert set(train.column_names) == {"prompt", "question", "answer", "level"}


def test_a_list_of_answers_is_one_and_a_list_of_solutions_is_none():
    assert math500.to_row({"problem": "P", "answer": ["2", 5]})["answer"] == "2, 5"
    for row in (
        {"solution": [r"\boxed{1}"]},
        {"answer": {"a": 1}},
        {"answer": []},
        {"answer": [None]},
        {"answer": True},
    ):
        with pytest.raises(ValueError, match=f"the field '{next(iter(row))}' is"):
            math500.to_row({"problem": "P"} | row)
