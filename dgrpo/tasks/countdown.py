"""Countdown: reach a target with some numbers, each used exactly once, by + - * /.

Rows of `nums` and `target` (the hub's), `input` and `output` (d1's test file, arXiv:2504.12216), or `numbers` and
`target` (ours). No problem, numbers in whatever order, is both in training and held out.
"""

from typing import Any

from dgrpo.tasks.task import Task, answer_completion, field_of
from dgrpo.tiny import countdown
from rewards.countdown import equation_reward

INSTRUCTION = """Find an expression that equals the target. It must use every one of the numbers exactly once, and \
nothing but +, -, *, / and parentheses. Write your working between <reasoning> and </reasoning>, then only the \
expression, without the target or an equals sign, between <answer> and </answer>:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""


def to_row(row: dict[str, Any]) -> dict[str, Any]:
    """The question in words, the numbers and the target as integers, and an `expression` that reaches it if given."""
    given, goal = field_of(row, "nums", "numbers", "input"), field_of(row, "target", "output")
    parts = given.strip("[] ").split(",") if isinstance(given, str) else given
    try:
        numbers, target = [int(part) for part in parts], int(goal)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"dataset: numbers {given!r} with target {goal!r} are no Countdown problem; give integers."
        ) from error
    problem = {"question": countdown.question({"numbers": numbers, "target": target})}
    reference = {"expression": row["expression"]} if row.get("expression") else {}
    return {**problem, "numbers": numbers, "target": target, **reference}


def embedded(split: str, num_problems: int, seed: int) -> list[dict[str, Any]]:
    """Generated problems of three numbers up to 20."""
    draw = countdown.train_problems if split == "train" else countdown.held_out_problems
    return draw(num_problems, seed)


def from_stored(item: dict[str, Any]) -> dict[str, Any]:
    """The numbers and the target of a stored item; None for both where it has no reference."""
    numbers, target = item.get("ground_truth") or (None, None)
    return {"numbers": numbers, "target": target}


TASK = Task(
    name="countdown",
    hub_name="Jiayi-Pan/Countdown-Tasks-3to4",
    hub_config=None,
    instruction=INSTRUCTION,
    to_row=to_row,
    grade=equation_reward,
    embedded=embedded,
    reference_completion=lambda row: answer_completion(row["expression"]) if row.get("expression") else None,
    to_stored=lambda row: {"question": row["question"], "ground_truth": [row["numbers"], row["target"]]},
    from_stored=from_stored,
    verifier=equation_reward,
    held_out_split=None,
    # d1 trains and tests on three numbers; the hub's dataset has problems of four as well.
    keep=lambda row: len(row["numbers"]) == 3,
    split_key=lambda row: (tuple(sorted(row["numbers"])), row["target"]),
)
