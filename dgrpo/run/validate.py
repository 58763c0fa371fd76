"""Gold must score 1 on the user's own rows: each row's reference goes through the rewards before training."""

import asyncio
import inspect
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers.utils import logging
from trl.trainer.utils import get_callable_name

from dgrpo.reliability.columns import required_columns
from dgrpo.tasks import Task
from rewards.text import short_answer

logger = logging.get_logger(__name__)

CHUNK = 64
# Programs are slow to judge: what is not reached in this time is kept unchecked, and counted.
MAX_SECONDS = 300.0


@dataclass(frozen=True)
class Validation:
    """What became of the rows whose references were put through the rewards."""

    num_rows: int
    num_passed: int
    num_without_reference: int
    num_unchecked: int
    """Rows that were not reached in time."""
    left_out: list[dict[str, Any]]
    """A record of each row whose reference fails: its number, its fields, the completion, the scores, the reason."""

    @property
    def kept(self) -> list[int]:
        """The indices of all other rows."""
        failed = {record["row"] - 1 for record in self.left_out}
        return [index for index in range(self.num_rows) if index not in failed]

    def __str__(self) -> str:
        others = {"without a reference": self.num_without_reference, "not reached in time": self.num_unchecked}
        told = "".join(f", {number} {what}" for what, number in others.items() if number)
        return f"{self.num_rows} rows: {self.num_passed} references pass, {len(self.left_out)} fail{told}"


def validate(
    rows: Dataset | Sequence[dict[str, Any]],
    rewards: Sequence[Callable],
    task: Task,
    *,
    file: str | Path | None = None,
    max_seconds: float = MAX_SECONDS,
) -> Validation:
    """Puts each row's reference, as a completion, through the rewards that judge by a column of the row.

    A reference passes where each of these rewards gives it 1 (or, where a reward gives 1 to none, its highest score):
    the whole completion, its answer block alone, or the answer without tags, as a reward may pay for one form
    only. Rewards that ask for no column (length, format) judge no reference and are not asked.

    Args:
        rows: rows as `load_rows` gives them.
        rewards: reward functions in TRL's convention, also asynchronous ones.
        task: says by `reference_completion` what completion a row's reference amounts to.
        file: where the rows that fail are written, a JSON object on each line; only if there are any.
        max_seconds: rows that are not reached in this time count as unchecked.

    Raises:
        ValueError: no row's reference passes.
    """
    judging = [reward for reward in rewards if required_columns(reward)]
    # One by one: a data file may hold large columns.
    golds = [task.reference_completion(row) for row in rows]
    with_gold = [index for index, gold in enumerate(golds) if gold is not None and judging]
    scores: dict[int, list[float | str | None]] = {}
    deadline = time.monotonic() + max_seconds
    for start in range(0, len(with_gold), CHUNK):
        if time.monotonic() > deadline:
            break
        chunk = with_gold[start : start + CHUNK]
        found = [_best_scores(reward, [rows[i] for i in chunk], [golds[i] or "" for i in chunk]) for reward in judging]
        scores |= {index: list(each) for index, each in zip(chunk, zip(*found, strict=True), strict=True)}
    full = [min(1.0, max((_number(each[k]) for each in scores.values()), default=1.0)) for k in range(len(judging))]
    left_out = []
    for index, each in scores.items():
        wrong = {
            get_callable_name(reward): score
            for reward, score, least in zip(judging, each, full, strict=True)
            if _number(score) < least or _number(score) <= 0
        }
        if wrong:
            reason = "; ".join(f"{name} gives its reference {score}" for name, score in wrong.items())
            left_out.append({"row": index + 1, "reason": reason, "completion": golds[index]} | dict(rows[index]))
    passed, unchecked = len(scores) - len(left_out), len(with_gold) - len(scores)
    result = Validation(len(golds), passed, len(golds) - len(with_gold), unchecked, left_out)
    if left_out and file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("".join(json.dumps(record, default=str) + "\n" for record in left_out))
    if left_out and len(left_out) == len(golds):
        raise ValueError(
            f"reward_funcs: no row's reference scores 1; row {left_out[0]['row']}: {left_out[0]['reason']:.500}. Mend "
            "the rows or the reward, or leave references unchecked with validate=False (--validate false)."
        )
    return result


def validated(
    rows: Dataset, rewards: Sequence[Callable], task: Task, file: str | Path, max_seconds: float = MAX_SECONDS
) -> Dataset:
    """The rows without those whose reference fails, the same on every process; says how many they are."""
    found: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            found = [validate(rows, rewards, task, file=file, max_seconds=max_seconds)]
        except ValueError as error:
            found = [error]
    # One process checks: what is reached in time may differ, and all must train on the same rows.
    [result] = broadcast_object_list(found)
    if isinstance(result, ValueError):
        raise result
    if result.left_out:
        logger.warning(f"validate: {result}; those that fail are skipped and listed in {file}.")
    elif result.num_unchecked:
        logger.warning(f"validate: {result}; what was not reached is kept.")
    return rows.select(result.kept) if result.left_out else rows


def _number(score: float | str | None) -> float:
    return score if isinstance(score, (int, float)) and score == score else 0.0


def _best_scores(reward: Callable, rows: list[dict[str, Any]], golds: list[str]) -> list[float | str | None]:
    """A reward's scores of some references; of those below 1, of the answer alone where that is more."""
    scores = _scores(reward, rows, golds)
    # The answer block alone, and what stands in it.
    for alone in (lambda gold: gold.rpartition("</reasoning>")[2].lstrip(), lambda gold: short_answer(gold) or ""):
        again = [index for index, score in enumerate(scores) if _number(score) < 1]
        if again:
            other = _scores(reward, [rows[index] for index in again], [alone(golds[index]) for index in again])
            for index, score in zip(again, other, strict=True):
                scores[index] = score if _number(score) > _number(scores[index]) else scores[index]
    return scores


def _scores(reward: Callable, rows: list[dict[str, Any]], golds: Sequence[str]) -> list[float | str | None]:
    """A reward's scores of some references; of a row at which it raises, the error."""
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    prompts = [row.get("prompt") for row in rows]
    plain = bool(prompts) and isinstance(prompts[0], str)
    completions = [gold if plain else [{"role": "assistant", "content": gold}] for gold in golds]
    try:
        values = call_reward(reward, prompts, completions, columns)
        if len(values) != len(rows):
            raise ValueError(f"{len(values)} values for {len(rows)} completions")
        return list(values)
    except Exception as error:  # noqa: BLE001 - the user's code
        if len(rows) == 1:
            return [f"{type(error).__name__}: {error}"]
        return [_scores(reward, [row], [gold])[0] for row, gold in zip(rows, golds, strict=True)]


def call_reward(reward: Callable, prompts: list, completions: list, columns: dict[str, list]) -> list:
    """What a reward, perhaps an asynchronous one, returns when it gets what it takes of what TRL passes."""
    # What TRL passes as well.
    given = {"completion_ids": [[] for _ in prompts]} | columns
    given |= {"trainer_state": None, "log_extra": lambda *_: None, "log_metric": lambda *_: None}  # type: ignore[dict-item]
    parameters = inspect.signature(reward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = given if takes_all else {name: value for name, value in given.items() if name in parameters}
    values = reward(prompts=prompts, completions=completions, **taken)
    if inspect.iscoroutine(values):
        # In a thread of its own: a notebook has a loop running already.
        with ThreadPoolExecutor(1) as pool:
            values = pool.submit(asyncio.run, values).result()
    return values
