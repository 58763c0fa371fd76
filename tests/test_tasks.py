"""Tasks: rows, prompts, splits, and the grader that is also the reward."""

import json
from pathlib import Path

import pytest

from dgrpo.tasks import TASKS, gsm8k, load_rows, prompt_messages

DATA = Path(__file__).parents[2] / "shared" / "data"
ROWS = [{"question": f"How much is {i}+1?", "answer": f"{i}+1={i + 1}\n#### {i + 1:,}"} for i in range(990, 1010)]


@pytest.fixture
def rows_file(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return str(path)


def test_the_prompt_is_one_message_with_or_without_instruction():
    assert prompt_messages("Q?", "") == [{"role": "user", "content": "Q?"}]
    assert prompt_messages("Q?", "Do.") == [{"role": "user", "content": "Do.\n\nQ?"}]


def test_a_local_file_is_split_and_its_answers_read(rows_file):
    train, held_out = load_rows(gsm8k.TASK, rows_file, num_held_out=5)
    assert (len(train), len(held_out)) == (15, 5)
    assert held_out["answer"] == ["1006", "1007", "1008", "1009", "1010"]
    assert train[0]["prompt"][0]["content"].endswith("How much is 990+1?")
    assert not set(train["question"]) & set(held_out["question"])


def test_training_rows_that_occur_in_the_evaluation_file_are_left_out(rows_file):
    train, held_out = load_rows(gsm8k.TASK, rows_file, rows_file, num_held_out=8)
    assert len(held_out) == 8
    assert not set(train["question"]) & set(held_out["question"])


@pytest.mark.parametrize("name", TASKS)
def test_the_embedded_rows_are_disjoint_and_their_gold_answer_is_right(name):
    task = TASKS[name]
    train, held_out = load_rows(task, "embedded", num_train=64, num_held_out=64)
    assert not set(train["question"]) & set(held_out["question"])
    assert len(held_out) == 64


def test_gold_answers_of_the_embedded_problems_are_graded_right():
    _, held_out = load_rows(gsm8k.TASK, "embedded", num_train=8, num_held_out=64)
    right = [f"<answer>\n{answer}\n</answer>" for answer in held_out["answer"]]
    wrong = [f"<answer>\n{int(answer) + 1}\n</answer>" for answer in held_out["answer"]]
    assert gsm8k.TASK.grade(prompts=[], completions=right, answer=held_out["answer"]) == [1.0] * 64
    assert gsm8k.TASK.grade(prompts=[], completions=wrong, answer=held_out["answer"]) == [0.0] * 64


def test_wrong_input_is_told_by_name(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        load_rows(gsm8k.TASK, str(tmp_path / "missing.jsonl"))
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(json.dumps({"text": str(i)}) for i in range(9)))
    with pytest.raises(ValueError, match=r"a gsm8k row needs the field 'question'.*\['text'\]"):
        load_rows(gsm8k.TASK, str(path))


@pytest.mark.skipif(not DATA.exists(), reason="GSM8K's files are not beside this checkout")
def test_real_gsm8k_files_load():
    train, held_out = load_rows(
        gsm8k.TASK, str(DATA / "gsm8k/train.jsonl"), str(DATA / "gsm8k/test.jsonl"), num_train=100, num_held_out=50
    )
    assert (len(train), len(held_out)) == (100, 50)
    assert train[0]["answer"] == "72"
