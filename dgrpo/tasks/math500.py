r"""MATH: competition problems, rows of `problem` and `answer`, or a `solution` that ends in `\boxed{...}`.

The hub's dataset holds the 500 problems of MATH500 as its test split and 12,000 others to train on.
"""

from typing import Any

from dgrpo.tasks.task import Task, answer_completion, text_of
from dgrpo.tiny import problems
from rewards.math500 import correctness_reward
from rewards.text import boxed_contents

INSTRUCTION = r"""Solve the problem step by step. Write your working between <reasoning> and </reasoning>, then only
the final result, in \boxed{}, between <answer> and </answer>:
<reasoning>
...
</reasoning>
<answer>
\boxed{...}
</answer>"""


def to_row(row: dict[str, Any]) -> dict[str, Any]:
    """The problem and its result in LaTeX: the `answer`, or what the last box of the `solution` holds."""
    answer = row.get("answer")
    if answer is None:
        boxes = boxed_contents(text_of(row, "answer", "solution"))
        if not boxes:
            raise ValueError(rf"dataset: the solution {row['solution']!r} has no \boxed{{...}} with the result.")
        answer = boxes[-1]
    if isinstance(answer, list) and answer and all(isinstance(part, (str, int, float)) for part in answer):
        answer = ", ".join(str(part) for part in answer)
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(f"dataset: the field 'answer' is {answer!r}; it must be a text, a number or a list of them.")
    return {"question": text_of(row, "problem", "question"), "answer": str(answer)}


def embedded(split: str, num_problems: int, seed: int) -> list[dict[str, Any]]:
    """The generated word problems of GSM8K's task, in the form of MATH's rows."""
    draw = problems.train_problems if split == "train" else problems.held_out_problems
    rows = []
    for row in draw(num_problems, seed):
        working, _, result = row["answer"].rpartition("\n#### ")
        rows.append({"problem": row["question"], "solution": f"{working}\nThe answer is $\\boxed{{{result}}}$."})
    return rows


TASK = Task(
    name="math500",
    hub_name="ankner/math-500",
    hub_config=None,
    instruction=INSTRUCTION,
    to_row=to_row,
    grade=correctness_reward,
    embedded=embedded,
    reference_completion=lambda row: answer_completion(rf"\boxed{{{row['answer']}}}"),
    file_marks=("math",),
)
