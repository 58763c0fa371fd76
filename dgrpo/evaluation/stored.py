"""Grades stored generations, in d1's JSON format, without a model: `grade_files(paths, protocol="d1")`.

A file holds `{"generations": [{"question", "generations", "ground_truth"}, ...]}`; the files of one test set lie in
one folder and are its shards. Two protocols:

- `strict`: the rewards' own graders, so that training reward and accuracy agree. Right is a reward of exactly 1, as in
  `dgrpo.evaluation.answers`; all else is wrong, also a text on a row without a usable reference (None): every text
  counts. Text from the first end-of-text marker on is dropped, as a sampler drops it.
- `d1`: what the parser published with d1 accepts (`dgrpo.evaluation.d1`), so that results compare with the literature.

An interval is Wilson's, at 95 %, over the number of texts. d1's Sudoku accuracy counts empty cells; cells of one
puzzle are not independent, so there too the number of puzzles is what counts.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from dgrpo.evaluation.d1 import D1, Item
from dgrpo.evaluation.interval import wilson_interval
from dgrpo.tasks import TASKS, Task
from rewards.text import short_answer

END_OF_TEXT = re.compile(r"<\|(?:eot_id|endoftext|im_end)\|>")


@dataclass(frozen=True)
class Report:
    """The accuracy over a set of texts; `n` of them count, `skipped` do not."""

    task: str
    protocol: str
    n: int
    skipped: int
    correct: float
    accuracy: float
    """Points got / points possible, in [0, 1]; not a number when no text counts."""
    interval: tuple[float, float]
    """95 % interval of `accuracy` (Wilson), in [0, 1]."""
    items: list[Item]


def grade_strictly(task: Task, items: list[dict[str, Any]], share: Callable | None = None) -> list[Item]:
    """Stored texts graded by the task's reward: right at exactly 1; or by one of its rewards that pay a share."""
    texts = [END_OF_TEXT.split(item["generations"], maxsplit=1)[0] for item in items]
    rows = [task.from_stored(item) for item in items]
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}
    scores = (share or task.grade)(prompts=items, completions=texts, **columns) if rows else []
    points = [float(score == 1.0) if share is None else score or 0.0 for score in scores]
    return [
        Item(item.get("question", ""), short_answer(text), right, 1.0)
        for item, text, right in zip(items, texts, points, strict=True)
    ]


def strict_grades(tasks: Iterable[Task]) -> dict[str, tuple[Task, Callable | None]]:
    """By name, how stored texts can be graded strictly: by each task, and by each of its shares."""
    whole: dict[str, tuple[Task, Callable | None]] = {task.name: (task, None) for task in tasks}
    return whole | {name: (task, share) for task, _ in whole.values() for name, share in task.shares.items()}


def infer_task(path: str | Path) -> str:
    """The task that a file of generations belongs to, by its name."""
    name = Path(path).name.lower()
    marks = {mark: task.name for task in TASKS.values() for mark in task.file_marks or (task.name,)}
    for mark, task_name in marks.items():
        if mark in name:
            return task_name
    raise ValueError(f"{name}: the name of the file tells no task ({', '.join(marks)}); say which task it is")


def setup_name(path: str | Path) -> str:
    """What the names of one set's shards share: `gsm8k_128_64` of `gsm8k_128_64_0_generations.json`."""
    return re.sub(r"(?:_\d+)?_generations$", "", Path(path).stem)


def generation_sets(paths: Iterable[str | Path]) -> dict[str, list[str | Path]]:
    """The files of each set: those of one folder whose names differ only in the shard's number.

    Sets of one name are told apart by as many last parts of their folders as that takes: `base/gsm8k_128_64`.
    """
    files: dict[tuple[str, Path], list[str | Path]] = {}
    for path in paths:
        files.setdefault((setup_name(path), Path(path).parent.resolve()), []).append(path)
    folders: dict[str, list[Path]] = {}
    for name, folder in files:
        folders.setdefault(name, []).append(folder)
    return {
        Path(*_last_parts(folder, _parts_that_differ(folders[name])), name).as_posix(): shards
        for (name, folder), shards in files.items()
    }


def _last_parts(folder: Path, num_parts: int) -> tuple[str, ...]:
    return folder.parts[max(len(folder.parts) - num_parts, 0) :]


def _parts_that_differ(folders: list[Path]) -> int:
    """How many last parts tell different folders apart; 0 for a single one."""
    return next(size for size in count() if len({_last_parts(folder, size) for folder in folders}) == len(folders))


def read_generations(path: str | Path) -> list[dict[str, Any]]:
    """The texts of one file."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not isinstance(data.get("generations"), list):
        raise ValueError(f'{path}: not a file of generations, which is {{"generations": [...]}}')
    items: list[dict[str, Any]] = data["generations"]
    return items


def grade(items: Iterable[dict[str, Any]], task: str | Task, protocol: str = "strict") -> Report:
    """Grade texts of one task, named or a `Task` of your own, by a protocol, `strict` or `d1` (see the module)."""
    if protocol not in ("strict", "d1"):
        raise ValueError(f"protocol {protocol!r} is neither 'strict' nor 'd1'")
    known = strict_grades([*TASKS.values(), *([] if isinstance(task, str) else [task])])
    name = task if isinstance(task, str) else task.name
    tasks = tuple(known) if protocol == "strict" else tuple(D1)
    if name not in tasks:
        raise ValueError(f"task {name!r} has no protocol {protocol!r}, which grades {', '.join(tasks)}")
    rows = list(items)
    if protocol == "strict":
        graded = grade_strictly(known[name][0], rows, known[name][1])
    else:
        graded = [D1[name](row) for row in rows]
    n = sum(item.possible > 0 for item in graded)
    right, possible = sum(item.right for item in graded), sum(item.possible for item in graded)
    accuracy = right / possible if possible else math.nan
    return Report(name, protocol, n, len(graded) - n, right, accuracy, wilson_interval(accuracy, n), graded)


def grade_files(paths: Iterable[str | Path], task: str | None = None, protocol: str = "strict") -> Report:
    """Grade all texts of some files, in the order given, as one set; the task is read off the names unless given."""
    paths = list(paths)
    if not paths:
        raise ValueError("no files to grade")
    tasks = {task or infer_task(path) for path in paths}
    if len(tasks) > 1:
        raise ValueError(f"files of several tasks cannot be one set: {', '.join(sorted(tasks))}")
    return grade((item for path in paths for item in read_generations(path)), tasks.pop(), protocol)


def grade_setups(paths: Iterable[str | Path], protocol: str = "strict") -> dict[str, Report]:
    """Grade files set by set, as `generation_sets` finds them."""
    return {name: grade_files(files, protocol=protocol) for name, files in generation_sets(paths).items()}
