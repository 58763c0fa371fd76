"""Each row's own reference must score 1 before anything is trained on it."""

import json

import pytest

from dgrpo.__main__ import main
from dgrpo.run.validate import validate
from dgrpo.tasks import TASKS, Task, load_rows
from rewards import gsm8k
from rewards.format import format_reward

ROWS = [{"question": f"{i}?", "answer": gold} for i, gold in enumerate(["1", "2 or 3", "1,234", "none"])]


def double(prompts, completions, answer, **columns):
    """A reward on a scale of its own."""
    return [2.0 * (gold in completion[0]["content"]) for gold, completion in zip(answer, completions, strict=True)]


def half(prompts, completions, answer):
    return [0.5] * len(answer)


def raises_at_words(prompts, completions, answer, **columns):
    return [float(gold) > 0 for gold in answer]


def at_once(prompts, completions, answer, **columns):
    """Pays nothing for reasoning."""
    return [float("<reasoning>" not in completion[0]["content"]) for completion in completions]


async def patient(prompts, completions, answer, **columns):
    return [1.0] * len(answer)


@pytest.mark.parametrize("name", ["gsm8k", "math500", "countdown", "sudoku"])
def test_generated_rows_pass(name):
    train, _ = load_rows(TASKS[name], "embedded", num_train=32, num_held_out=1)
    result = validate(train, [TASKS[name].grade, format_reward], TASKS[name])
    assert (result.num_passed, result.left_out, result.kept) == (32, [], list(range(32)))


def test_rows_whose_reference_fails_are_listed(tmp_path):
    result = validate(ROWS, [gsm8k.correctness_reward], TASKS["gsm8k"], file=tmp_path / "new" / "left_out.jsonl")
    assert result.kept == [0, 2]
    assert str(result) == "4 rows: 2 references pass, 2 fail"
    records = [json.loads(line) for line in (tmp_path / "new" / "left_out.jsonl").read_text().splitlines()]
    assert [record["row"] for record in records] == [2, 4]
    assert records[0]["answer"] == "2 or 3"
    assert records[0]["reason"] == "correctness_reward gives its reference None"


def test_rewards_of_one_s_own():
    task = TASKS["gsm8k"]
    assert validate(ROWS, [double, half, at_once, patient], task).left_out == []
    [lost, also] = validate(ROWS, [raises_at_words], task).left_out[-2:]
    assert "ValueError: could not convert" in also["reason"]
    assert lost["row"] < also["row"] == 4
    assert validate(ROWS, [format_reward], task).num_without_reference == 4, "it judges no reference"


def test_none_left_is_refused_and_what_has_no_reference_is_kept():
    with pytest.raises(ValueError, match=r"no row's reference scores 1; row 1: correctness_reward .*--validate false"):
        validate(ROWS[1:2], [gsm8k.correctness_reward], TASKS["gsm8k"])
    mine = Task(name="mine", instruction="", to_row=dict, grade=half)
    assert validate(ROWS, [half], mine).num_without_reference == 4


def test_rows_not_reached_in_time_are_kept_and_counted():
    result = validate(ROWS, [gsm8k.correctness_reward], TASKS["gsm8k"], max_seconds=-1)
    assert (result.num_unchecked, result.kept) == (4, [0, 1, 2, 3])


def test_command_line(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    lines = [{"question": f"{i}?", "answer": "none" if i % 5 == 0 else f"#### {i}"} for i in range(40)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    left_out = tmp_path / "left_out.jsonl"
    main(["validate", "--task", "gsm8k", "--dataset", str(rows), "--left_out", str(left_out)])
    failed = len(left_out.read_text().splitlines())
    assert f"references pass, {failed} fail; see {left_out}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="task='tea': choose gsm8k"):
        main(["validate", "--task", "tea"])
