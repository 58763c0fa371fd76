"""A task: where its rows come from, how the question is put, and what counts as right."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from dgrpo.tiny.problems import Messages

# What --dataset says for the generated problems that the embedded default trains on.
EMBEDDED = "embedded"

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Task:
    """What a recipe needs to know about its task.

    `to_row` turns a row of the source into {"question", <columns that the rewards read>}; `grade` is a reward whose
    1.0 means right, so training reward and accuracy cannot drift apart; `embedded(split, num_problems, seed)` draws
    rows of the source's own form.
    """

    name: str
    hub_name: str
    hub_config: str | None
    instruction: str
    to_row: Callable[[dict[str, Any]], dict[str, Any]]
    grade: Callable[..., list[float | None]]
    embedded: Callable[[str, int, int], list[dict[str, Any]]]
    # The split of the hub's dataset that is kept for evaluation; None: the end of its training split.
    held_out_split: str | None = "test"


def prompt_messages(question: str, instruction: str) -> Messages:
    """The prompt of a question, the same in training and in evaluation: one user message."""
    return [{"role": "user", "content": f"{instruction}\n\n{question}" if instruction else question}]


def read_rows(source: str, split: str, config: str | None = None) -> list[dict[str, Any]]:
    """Rows of a local .jsonl, .json, .csv or .parquet file, or of a split of a dataset on the hub."""
    path = Path(source)
    if path.suffix in _READERS:
        if not path.is_file():
            raise ValueError(f"dataset={source!r}: there is no such file.")
        # Digits such as "0102" are text: nothing may be read as a number on the way.
        options = {"dtype": str} if path.suffix == ".csv" else {}
        return list(load_dataset(_READERS[path.suffix], data_files=str(path), split="train", **options))
    return list(load_dataset(source, config, split=split))


def load_rows(
    task: Task,
    dataset: str | None = None,
    eval_dataset: str | None = None,
    *,
    num_train: int | None = None,
    num_held_out: int = 512,
    instruction: str | None = None,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Training and held-out rows {"prompt", "question", columns...} of a task; no question stands in both.

    dataset: a hub name (default: the task's own), a local .jsonl, .json, .csv or .parquet file of the same rows, or
    "embedded". Held-out rows come from `eval_dataset` if given, else from the hub's held-out split, else they are the
    last `num_held_out` of a file. Raises ValueError for a file that is missing or rows without the expected fields.
    """
    source = dataset or task.hub_name
    if source == EMBEDDED:
        train = task.embedded("train", num_train or 4096, seed)
        held_out = task.embedded("held_out", num_held_out, 0)
    else:
        config = task.hub_config if source == task.hub_name else None
        train = read_rows(source, "train", config)
        if eval_dataset is not None:
            held_out = read_rows(eval_dataset, task.held_out_split or "train")
        elif Path(source).suffix in _READERS or task.held_out_split is None:
            size = min(num_held_out, len(train) // 2)
            train, held_out = train[: len(train) - size], train[len(train) - size :]
        else:
            held_out = read_rows(source, task.held_out_split, config)
        train, held_out = train[:num_train], held_out[:num_held_out]
    instruction = task.instruction if instruction is None else instruction
    rows = [[_with_prompt(row, task, instruction) for row in part] for part in (train, held_out)]
    held_out_questions = {row["question"] for row in rows[1]}
    rows[0] = [row for row in rows[0] if row["question"] not in held_out_questions]
    if not rows[0] or not rows[1]:
        raise ValueError(f"dataset={source!r}: no rows are left for {'training' if not rows[0] else 'evaluation'}.")
    return Dataset.from_list(rows[0]), Dataset.from_list(rows[1])


def _with_prompt(row: dict[str, Any], task: Task, instruction: str) -> dict[str, Any]:
    try:
        columns = task.to_row(row)
    except KeyError as error:
        raise ValueError(f"dataset: a {task.name} row needs the field {error}; this one has {sorted(row)}.") from error
    return {"prompt": prompt_messages(columns["question"], instruction), **columns}
