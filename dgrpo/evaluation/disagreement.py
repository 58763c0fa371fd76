"""Where the protocols `strict` and `d1` differ on stored texts, by class: why, how many, and a real example.

A text is in a class by what `strict` made of it where `d1` gives more, and by what d1's parser made of it where
`strict` gives more. The first class that fits is the one; together they are all texts that differ.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgrpo.evaluation.d1 import Item
from dgrpo.evaluation.stored import END_OF_TEXT, generation_sets, grade, infer_task, read_generations
from dgrpo.tasks.sudoku import stored_puzzle
from rewards.text import MAX_ANSWER_CHARS, TAGS, answer_block, boxed_contents


@dataclass(frozen=True)
class Case:
    """One text that the protocols grade differently."""

    task: str
    question: str
    gold: Any
    text: str  # up to its end
    strict: Item
    d1: Item

    @property
    def points(self) -> float:
        """What d1 gives more than `strict`, as a share of the text's points."""
        return share(self.d1) - share(self.strict)

    @property
    def block(self) -> str | None:
        return answer_block(self.text)

    @property
    def num_tags(self) -> tuple[int, int]:
        return self.text.count(TAGS[2]), self.text.count(TAGS[3])


def share(item: Item) -> float:
    """The share of its points that a text got; 0 where it does not count."""
    return item.right / item.possible if item.possible else 0.0


def _cells(case: Case) -> str:
    return "".join((case.strict.answer or "").split()) if isinstance(case.strict.answer, str) else ""


def _keeps_clues(case: Case) -> bool:
    puzzle = stored_puzzle(case.question).replace(".", "0")
    return all(clue in ("0", cell) for clue, cell in zip(puzzle, _cells(case), strict=True))


Rule = tuple[str, Callable[[Case], bool]]

# What `strict` found no answer in, whatever the task.
NO_ANSWER: list[Rule] = [
    ("neither <answer> nor </answer>: a box in the running text", lambda case: case.num_tags == (0, 0)),
    ("<answer> without </answer>", lambda case: case.num_tags == (1, 0)),
    ("</answer> without <answer>", lambda case: case.num_tags[0] == 0),
    ("tags repeated or out of order", lambda case: case.block is None),
    (f"an answer of more than {MAX_ANSWER_CHARS} characters", lambda case: len(case.block or "") > MAX_ANSWER_CHARS),
    ("a box left open in the answer", lambda case: boxed_contents(case.block or "") is None),
    ("several boxes that differ", lambda case: len(set(boxed_contents(case.block or "") or [])) > 1),
    ("an empty box", lambda case: case.strict.answer is None),
]
# What `strict` grades wrong, and d1 does not.
D1_ALONE: dict[str, list[Rule]] = {
    "countdown": [("an equation, `= number` at its end", lambda case: "=" in str(case.strict.answer))],
    "sudoku": [
        ("too few cells: d1 fills up", lambda case: len(_cells(case)) < 16),
        ("too many cells: d1 cuts off", lambda case: len(_cells(case)) > 16),
        ("cells left open, or other characters than 1 to 4", lambda case: not set(_cells(case)) <= set("1234")),
        ("a clue changed: d1 does not look at clues", lambda case: not _keeps_clues(case)),
        ("clues kept, not solved: d1 pays by the cell", lambda case: True),
    ],
}
# What `strict` grades right, and d1 does not.
STRICT_ALONE: dict[str, list[Rule]] = {
    "gsm8k": [("a thousands separator, at which d1's number ends", lambda case: "," in str(case.strict.answer))],
    "math500": [
        ("no box: d1 compares the whole text", lambda case: "\\boxed" not in case.text),
        ("equal in value, spelled differently", lambda case: True),
    ],
    "countdown": [("no box: d1 reads the whole text", lambda case: "\\boxed" not in case.text)],
}
OTHER: Rule = ("other", lambda case: True)


def reason(case: Case) -> str:
    """The class of a text that the protocols grade differently."""
    if case.d1.possible == 0:
        return "no empty cell: d1 leaves it out"
    if case.points < 0:
        rules = STRICT_ALONE.get(case.task, [])
    elif case.strict.answer is None:
        rules = NO_ANSWER
    else:
        rules = D1_ALONE.get(case.task, [])
    return next(name for name, fits in [*rules, OTHER] if fits(case))


def differing(items: Sequence[dict[str, Any]], task: str) -> list[Case]:
    """The stored texts of one task that get another grade by one protocol than by the other."""
    cases = [
        Case(task, item["question"], item["ground_truth"], END_OF_TEXT.split(item["generations"], 1)[0], strict, d1)
        for item, strict, d1 in zip(items, grade(items, task).items, grade(items, task, "d1").items, strict=True)
    ]
    return [case for case in cases if case.points or bool(case.strict.possible) != bool(case.d1.possible)]


def disagreements(paths: Iterable[str | Path]) -> dict[str, dict[tuple[str, str], list[Case]]]:
    """For each set of files, its classes as (which protocol gives more, reason), the largest first."""
    found: dict[str, dict[tuple[str, str], list[Case]]] = {}
    for name, files in generation_sets(paths).items():
        classes: dict[tuple[str, str], list[Case]] = {}
        items = [item for file in files for item in read_generations(file)]
        for case in differing(items, infer_task(files[0])):
            gives_more = "d1" if case.points > 0 else "strict" if case.points < 0 else "neither"
            classes.setdefault((gives_more, reason(case)), []).append(case)
        found[name] = dict(sorted(classes.items(), key=lambda entry: -len(entry[1])))
    return found


def disagreement_lines(found: dict[str, dict[tuple[str, str], list[Case]]], num_tail: int = 90) -> list[str]:
    """The classes as text: how many texts, what d1 gives more in all, and the end of the shortest text."""
    lines = []
    for name, classes in found.items():
        lines.append(f"{name}: {sum(map(len, classes.values()))} texts differ")
        for (gives_more, why), cases in classes.items():
            example = min(cases, key=lambda case: len(case.text))
            points = sum(case.points for case in cases)
            lines.append(f"  {len(cases):>4}  {gives_more} gives more ({points:+.2f} texts): {why}")
            lines.append(f"        ... {example.text[-num_tail:]!r}")
            strict, d1 = _short(example.strict.answer), _short(example.d1.answer)
            lines.append(f"        reference {example.gold!r}; strict reads {strict}, d1 reads {d1}")
    return lines


def _short(answer: object, limit: int = 60) -> str:
    text = repr(answer)
    return text if len(text) <= limit else f"{text[:limit]}..."
