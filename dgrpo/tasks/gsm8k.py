"""GSM8K: grade-school word problems (arXiv:2110.14168), rows of `question` and `answer` ending in `#### N`."""

from typing import Any

from dgrpo.tasks.task import Task, answer_completion, field_of, text_of
from dgrpo.tiny import problems
from rewards.gsm8k import correctness_reward, to_decimal
from rewards.text import short_answer

INSTRUCTION = """Solve the problem step by step. Write your working between <reasoning> and </reasoning>, then only \
the final number between <answer> and </answer>:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""


def to_row(row: dict[str, Any]) -> dict[str, Any]:
    """The question, and the number after `####` without thousands separators."""
    question, answer = text_of(row, "question"), field_of(row, "answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(f"dataset: the field 'answer' is {answer!r}; it must be a number or end in one.")
    return {"question": question, "answer": str(answer).rpartition("####")[2].strip().replace(",", "")}


def embedded(split: str, num_problems: int, seed: int) -> list[dict[str, Any]]:
    """Generated two-step problems; held-out ones share no (template, operands) with the others."""
    draw = problems.train_problems if split == "train" else problems.held_out_problems
    return draw(num_problems, seed)


def to_stored(row: dict[str, Any]) -> dict[str, Any]:
    """The question, and the reference as the number that the reward reads, so that a stored text keeps its grade."""
    number = to_decimal(row.get("answer"))
    return {"question": row["question"], "ground_truth": None if number is None else float(number)}


TASK = Task(
    name="gsm8k",
    hub_name="openai/gsm8k",
    hub_config="main",
    instruction=INSTRUCTION,
    to_row=to_row,
    grade=correctness_reward,
    embedded=embedded,
    reference_completion=lambda row: answer_completion(row["answer"]),
    to_stored=to_stored,
    answer_of=lambda text: to_decimal(short_answer(text)),
    file_marks=("gsm",),
)
