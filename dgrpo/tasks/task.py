"""A task: where its rows come from, how the question is put, and what counts as right."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow
from datasets import Dataset
from transformers.utils import logging

from dgrpo.noise import fixed_order
from dgrpo.tasks.sources import Rows, has_splits, read_rows, sources_of
from dgrpo.tiny.problems import Messages
from rewards.text import short_answer

logger = logging.get_logger(__name__)

# What --dataset says for the generated problems that the embedded default trains on.
EMBEDDED = "embedded"
# What --model_name_or_path says for the tiny models that come with the package, a LLaDA and a block model. Folders of
# their checkpoints, and files of their recipes, are called by the task and these endings.
EMBEDDED_MODELS = {EMBEDDED: "", "embedded-block": "_block"}

# Columns of a file that the prompt takes the place of, or that TRL would read as images.
_NOT_FOR_REWARDS = ("prompt", "completion", "image", "images")
# Arguments that the trainer itself passes to every reward.
_TAKEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What training and evaluation need to know about a task; all that is peculiar to it stands here.

    `to_row` turns a row of the source into {"question", <columns that the rewards read>}; the prompt is the question
    below the instruction, unless the row brings its own as "prompt". `grade` is a reward whose 1.0 means right, so
    that training reward and accuracy cannot drift apart. A task of your own needs no more than these two, `name` and
    `instruction`.
    """

    name: str
    instruction: str
    to_row: Callable[[dict[str, Any]], dict[str, Any]]
    grade: Callable[..., list[float | None]]
    # None: nothing on the hub; a local file must be named.
    hub_name: str | None = None
    hub_config: str | None = None
    # Draws rows of the source's own form, from (split, num_problems, seed); None: there is no embedded default.
    embedded: Callable[[str, int, int], list[dict[str, Any]]] | None = None
    # The split of the hub's dataset that is kept for evaluation; None: it has none and is divided.
    held_out_split: str | None = "test"
    # What of a row (as `to_row` gives it) must never be both in training and held out.
    split_key: Callable[[dict[str, Any]], Hashable] = lambda row: row["question"]
    # Which rows of an undivided source are held out; None: this share of the keys.
    is_held_out: Callable[[dict[str, Any]], bool] | None = None
    held_out_share: float = 0.2
    # The held-out figure: the share of completions whose grade is 1, or the mean grade.
    measure: Literal["accuracy", "score"] = "accuracy"
    # How the rows of (source, split, configuration) are read.
    read: Callable[[str, str, str | None], Rows] = read_rows
    # Which rows of the hub's dataset are used; None: all. Local files are taken as they are.
    keep: Callable[[dict[str, Any]], bool] | None = None
    # The completion that a row's reference amounts to, for `dgrpo.run.validate`; None: the row carries none.
    reference_completion: Callable[[dict[str, Any]], str | None] = lambda row: None
    # A row as an item of d1's files ({"question", "ground_truth"}), and the columns that `grade` reads of an item.
    to_stored: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {
        "question": row["question"],
        "ground_truth": row.get("answer"),
    }
    from_stored: Callable[[dict[str, Any]], dict[str, Any]] = lambda item: {"answer": item.get("ground_truth")}
    # The answer that a completion's text gives, as `grade` reads it; equal answers are one vote of a majority.
    answer_of: Callable[[str], Hashable | None] = short_answer
    # A reward that could be had without the reference, to choose among samples by; None: there is none.
    verifier: Callable[..., list[float | None]] | None = None
    # Words by which the name of a file of generations tells that it is of this task; None: the task's name.
    file_marks: tuple[str, ...] | None = None
    # Rewards that pay a share of a text, by the name under which stored texts are graded so.
    shares: dict[str, Callable[..., list[float | None]]] = field(default_factory=dict)


def field_of(row: dict[str, Any], *names: str) -> Any:
    """The first of these fields that a row has; KeyError names them all."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise KeyError(" or ".join(names))


def text_of(row: dict[str, Any], *names: str) -> str:
    """The first of these fields that a row has, which must be a text that is not blank."""
    value = field_of(row, *names)
    if not isinstance(value, str) or not value.strip():
        name = next(name for name in names if row.get(name) is not None)
        raise ValueError(f"dataset: the field {name!r} is {value!r}; it must be a text that is not blank.")
    return value


def answer_completion(answer: str) -> str:
    """A completion with this answer, in the format that every reward reads."""
    return f"<reasoning>\nThe reference.\n</reasoning>\n<answer>\n{answer}\n</answer>"


def prompt_messages(question: str, instruction: str) -> Messages:
    """The prompt of a question, the same in training and in evaluation: one user message."""
    return [{"role": "user", "content": f"{instruction}\n\n{question}" if instruction else question}]


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
    """Training and held-out rows {"prompt", "question", columns...} of a task; no `split_key` stands in both.

    Held-out rows come from `eval_dataset` if given, else from the hub's held-out split, else the source is divided: by
    the task's own rule, or a share is held out, which rows depending on nothing but the source. Training rows whose
    key occurs in any held-out row are skipped and counted; where `eval_dataset` is `dataset`, none may be left.

    Args:
        task: Where rows come from and how they become prompts.
        dataset: A hub name (default: the task's own), a local .jsonl, .json, .csv or .parquet file of the same rows, a
            part of one or several (`dgrpo.tasks.sources`), or "embedded". Other columns are kept for rewards.
        eval_dataset: Held-out rows, named likewise.
        num_train: Only so many training rows.
        num_held_out: Only the first so many held-out rows.
        instruction: Text before each question, instead of the task's.
        seed: Of embedded problems.

    Raises:
        ValueError: A file that is missing, or rows without the expected fields.
    """
    source = dataset or task.hub_name
    if source is None:
        raise ValueError(
            f"dataset=None: {task.name} has no dataset on the hub. Name a local .csv, .jsonl, .json or .parquet file, "
            f"or {EMBEDDED!r}."
        )
    if EMBEDDED in (source, eval_dataset) and task.embedded is None:
        raise ValueError(
            f"dataset={EMBEDDED!r}: {task.name} generates no problems; name a local file or a hub dataset."
        )
    if source == EMBEDDED and task.embedded is not None:
        train = _converted(task, task.embedded("train", num_train or 4096, seed))
    else:
        train = _rows_of(task, source, "train")
    if task.embedded is not None and (eval_dataset or source) == EMBEDDED:
        held_out = _converted(task, task.embedded("held_out", num_held_out, 0))
    elif eval_dataset is not None:
        held_out = _rows_of(task, eval_dataset, task.held_out_split or "train")
    elif task.held_out_split is None or not has_splits(source):
        train, held_out = _divided(task, train)
    else:
        held_out = _rows_of(task, source, task.held_out_split)
    # All held-out keys, not those of the first `num_held_out` alone: a later evaluation may use more rows.
    held_out_keys = {task.split_key(row) for row in held_out}
    disjoint = [row for row in train if task.split_key(row) not in held_out_keys]
    if left_out := len(train) - len(disjoint):
        logger.warning(f"dataset={source!r}: {left_out} training rows occur in the held-out rows and are skipped.")
    if not held_out or not (disjoint or source == eval_dataset):
        raise ValueError(
            f"dataset={source!r}: no rows are left for {'training' if held_out else 'evaluation'} "
            f"({len(disjoint)} to train on, {len(held_out)} held out, equal prompts on one side). Give more rows, or "
            "others to evaluate on as eval_dataset."
        )
    instruction = task.instruction if instruction is None else instruction
    train_rows, held_out_rows = (
        _dataset([{"prompt": prompt_messages(row["question"], instruction), **row} for row in rows])
        for rows in (disjoint[:num_train], held_out[:num_held_out])
    )
    return train_rows, held_out_rows


def _rows_of(task: Task, source: str, split: str) -> list[dict[str, Any]]:
    """The task's rows of a source, with the other columns of what is not the task's own."""
    own = all(each.name == task.hub_name for each in sources_of(source))
    rows = _converted(task, task.read(source, split, task.hub_config if own else None), others=not own)
    return list(filter(task.keep, rows)) if own else rows


def _converted(task: Task, rows: list[dict[str, Any]], others: bool = False) -> list[dict[str, Any]]:
    """The rows as the task reads them; ValueError tells which row is none, and why."""
    if others and (taken := sorted(set(rows[0]) & set(_TAKEN))):
        logger.warning(f"dataset: the columns {taken} do not reach the rewards: trainers pass something of that name.")
    converted = []
    for number, row in enumerate(rows, 1):
        kept = {name: value for name, value in row.items() if others and name not in (*_NOT_FOR_REWARDS, *_TAKEN)}
        try:
            converted.append(kept | task.to_row(row))
        except KeyError as error:
            empty = sorted(name for name, value in row.items() if value is None)
            told = f" (empty: {empty})" if empty else ""
            raise ValueError(
                f"dataset, row {number}: a {task.name} row needs the field {error}; this one has {sorted(row)}{told}."
            ) from error
        except ValueError as error:
            raise ValueError(str(error).replace("dataset:", f"dataset, row {number}:", 1)) from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"dataset, row {number}: {row!r:.200} is no {task.name} row: {error}.") from error
    return converted


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    """The rows as a dataset; ValueError names a column whose values are of several kinds."""
    try:
        return Dataset.from_list(rows)
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        for name in rows[0]:
            first: dict[str, int] = {}
            for number, row in enumerate(rows, 1):
                if row.get(name) is not None:
                    first.setdefault(type(row[name]).__name__, number)
            if len(first) > 1:
                told = ", ".join(f"{kind} in row {number}" for kind, number in first.items())
                raise ValueError(
                    f"dataset: the column {name!r} holds values of several kinds ({told}); make them one kind."
                ) from error
        raise ValueError(f"dataset: the rows cannot be stored: {error}") from error


def _divided(task: Task, rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Training and held-out part of one source, the same whoever asks: the trainer, or a later evaluation."""
    if task.is_held_out is None:
        keys = sorted({task.split_key(row) for row in rows}, key=lambda key: fixed_order(repr(key)))
        held_out = set(keys[: max(1, int(len(keys) * task.held_out_share))])
        is_held_out = [task.split_key(row) in held_out for row in rows]
    else:
        is_held_out = [task.is_held_out(row) for row in rows]
    train = [row for row, out in zip(rows, is_held_out, strict=True) if not out]
    return train, [row for row, out in zip(rows, is_held_out, strict=True) if out]
