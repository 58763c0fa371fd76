"""Several completions of each problem: pass@k by its unbiased formula, and choosing one of them."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from dgrpo.evaluation.answers import answer_rows
from dgrpo.evaluation.interval import bootstrap_interval, wilson_interval
from dgrpo.sampling import SamplerConfig
from dgrpo.tasks import Task


@dataclass(frozen=True)
class Score:
    """A share of the problems, with its 95 % interval."""

    name: str
    value: float
    interval: tuple[float, float]


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The probability that of k samples drawn without replacement at least one is right (arXiv:2107.03374).

    Averaged over the draw of the samples it is 1 - (1 - p)^k; putting the share right for p is biased.
    """
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def pass_scores(right: Sequence[Sequence[bool]], ks: Sequence[int]) -> list[Score]:
    """pass@k of n samples of each problem. Wilson's interval where n = k = 1, else a bootstrap over problems."""
    scores = []
    for k in ks:
        values = [pass_at_k(len(row), sum(row), k) for row in right]
        mean = sum(values) / len(values)
        single = k == 1 and all(len(row) == 1 for row in right)
        interval = wilson_interval(mean, len(values)) if single else bootstrap_interval(values)
        scores.append(Score(f"pass@{k}", mean, interval))
    return scores


def majority(answers: Sequence[Hashable | None]) -> int:
    """The number of the first sample with the most frequent answer, of equals the earliest; 0 where none answers."""
    counts = Counter(answer for answer in answers if answer is not None)
    # A Counter keeps the order of first occurrence, and max takes the first of equals.
    return answers.index(max(counts, key=lambda answer: counts[answer])) if counts else 0


def best(rewards: Sequence[float | None]) -> int:
    """The number of the first sample with the highest reward; None counts as the lowest."""
    values = [float("-inf") if reward is None else reward for reward in rewards]
    return values.index(max(values))


def check_selection(task: Task, select: Sequence[str]) -> None:
    """ValueError for `best` where the task has no reward that could be had without the reference."""
    if "best" in select and task.verifier is None:
        raise ValueError(
            f"select=best: the rewards of {task.name} read the reference, and choosing by it is pass@k under another "
            "name. Take majority, or read pass@k."
        )


def selection_scores(
    task: Task,
    rows: Sequence[dict[str, Any]],
    texts: Sequence[Sequence[str]],
    right: Sequence[Sequence[bool]],
    select: Sequence[str],
) -> list[Score]:
    """Accuracy of one chosen sample for each problem, `majority` of the graded answers or `best` by a verifier."""
    check_selection(task, select)
    choose: dict[str, Callable[[int], int]] = {
        "majority": lambda i: majority([task.answer_of(text) for text in texts[i]]),
        "best": lambda i: best(_verified(task, rows[i], texts[i])),
    }
    scores = []
    for name in select:
        chosen = [right[i][choose[name](i)] for i in range(len(rows))]
        value = sum(chosen) / len(chosen)
        scores.append(Score(f"{name} of {len(right[0])}", value, wilson_interval(value, len(chosen))))
    return scores


def _verified(task: Task, row: Mapping[str, Any], texts: Sequence[str]) -> list[float | None]:
    assert task.verifier is not None
    columns = {name: [value] * len(texts) for name, value in row.items() if name != "prompt"}
    return task.verifier(prompts=[row["prompt"]] * len(texts), completions=list(texts), **columns)


def by_problem(values: Sequence[Any], num_problems: int) -> list[list[Any]]:
    """The values of each problem, of samples that were drawn one round after the other."""
    return [list(values[i::num_problems]) for i in range(num_problems)]


def powers_up_to(num_samples: int) -> list[int]:
    """1, 2, 4 ... and the number of samples itself."""
    return sorted({2**i for i in range(num_samples.bit_length())} | {num_samples})


def coverage(
    model: Any,
    tokenizer,
    rows: Sequence[dict[str, Any]],
    grade: Callable[..., list[float | None]],
    samplers: Mapping[str, SamplerConfig],
    *,
    num_samples: int = 8,
    ks: Sequence[int] = (1, 8),
    **settings: Any,
) -> dict[str, Any]:
    """pass@k under each of some samplers, ready for JSON.

    Args:
        samplers: configurations by name, with a temperature above 0.
        settings: what `answer_rows` takes besides.
    """
    found: dict[str, Any] = {"n": len(rows), "samples": num_samples}
    for name, config in samplers.items():
        answers = answer_rows(model, tokenizer, list(rows) * num_samples, grade, config, **settings)
        right = by_problem([answer.mark == 1.0 for answer in answers], len(rows))
        found[name] = {score.name: [score.value, *score.interval] for score in pass_scores(right, ks)}
    return found
