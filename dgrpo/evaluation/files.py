"""What an evaluation leaves in files: answers as they are finished, and all of them in d1's JSON format."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from dgrpo.evaluation.answers import Answer
from dgrpo.evaluation.stored import END_OF_TEXT
from dgrpo.tasks import Task


class FinishedRows:
    """Answers of one evaluation, kept as they are finished: a line of JSON each, in one file for each process.

    The first line of a file holds the settings that the answers belong to. With `resume`, the answers found under the
    same settings are taken over; ValueError if they were found under others. Without it, they are removed.
    """

    def __init__(self, stem: str | Path, settings: dict[str, Any], state: PartialState, *, resume: bool = False):
        self.stem, self.settings = Path(stem), settings
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        # One process reads before any writes, so that all agree on what is left to do.
        found = [self._take_over(resume) if state.is_main_process else {}]
        self.answers: dict[int, Answer] = broadcast_object_list(found)[0]
        self._path = self._file(state.process_index)

    def _file(self, process_index: int) -> Path:
        return self.stem.with_name(f"{self.stem.name}_rows.{process_index}.jsonl")

    def _take_over(self, resume: bool) -> dict[int, Answer]:
        files = sorted(self.stem.parent.glob(f"{self.stem.name}_rows.*.jsonl"))
        answers: dict[int, Answer] = {}
        for file in files if resume else []:
            lines = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if _is_whole(line)]
            if lines and lines[0] != self.settings:
                other = sorted(key for key in self.settings if lines[0].get(key) != self.settings[key])
                raise ValueError(
                    f"resume: {file} holds answers of another evaluation, which differs in {', '.join(other)}. Choose "
                    "another output_dir, or evaluate anew without resume."
                )
            answers |= {line["row"]: Answer(**line) for line in lines[1:]}
        # In one file again, whatever number of processes comes next; without a last line that was cut off.
        unfinished = self._file(0).with_suffix(".part")
        unfinished.write_text(_lines([self.settings, *map(asdict, answers.values())]))
        unfinished.replace(self._file(0))
        for file in files:
            if file != self._file(0):
                file.unlink()
        return answers

    def add(self, answers: list[Answer]) -> None:
        """Writes some more answers."""
        head = [] if self._path.exists() else [self.settings]
        with open(self._path, "a") as file:
            file.write(_lines([*head, *map(asdict, answers)]))


def _lines(values: Sequence[dict]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def _is_whole(line: str) -> bool:
    """Whether a line was written to its end."""
    return line.endswith("}\n")


def fingerprint(model: str) -> str:
    """Which weights a folder holds, by their files' names, sizes and times; the name itself of a hub's model."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    stats = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    return digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def digest(value: Any) -> str:
    """A short name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def d1_items(
    task: Task, rows: Sequence[dict[str, Any]], answers: Sequence[Answer], end_of_text: str
) -> list[dict[str, Any]]:
    """The answers as items of d1's files. d1 keeps the token that ends a text, and its parser looks for it."""
    end = end_of_text if END_OF_TEXT.fullmatch(end_of_text) else ""
    return [
        task.to_stored(row) | {"generations": answer.text + (end if answer.ended else "")}
        for row, answer in zip(rows, answers, strict=True)
    ]


def write_generations(path: Path, items: Sequence[dict[str, Any]], seconds: float, settings: dict[str, Any]) -> None:
    """Write a file in d1's format, whole or not at all."""
    metrics = {"wall_time": seconds, "total_processed": len(items)}
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"generations": items, "metrics": metrics, **settings}, indent=1))
    unfinished.replace(path)
