"""Accuracy of a model on held-out problems, graded by the reward that it is trained with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from math import ceil
from time import perf_counter
from typing import Any, Literal, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from dgrpo.evaluation.interval import mean_interval, wilson_interval
from dgrpo.models.adapters import merged_adapters
from dgrpo.noise import row_keys
from dgrpo.sampling import Rollout, SamplerConfig, end_token_ids, generate
from rewards.format import format_reward


@dataclass(frozen=True)
class Answer:
    """What a model wrote on the row of this number, and its grade."""

    row: int
    text: str
    mark: float | None  # by the task's grader; 1 is right
    reasons: bool  # whether the text shows its reasoning in the asked format
    length: int  # tokens up to and including the end
    ended: bool  # False where the canvas was too short for an end
    seconds: float  # its share of the time that its batch took


class Answers(Protocol):
    """Where finished answers are kept, such as `dgrpo.evaluation.files.FinishedRows`."""

    answers: dict[int, Answer]

    def add(self, answers: list[Answer]) -> None: ...


@dataclass(frozen=True)
class Evaluation:
    """What a model wrote on n problems, and how much of it is right or, with `scores`, its mean grade."""

    completions: list[str]
    correct: list[bool]
    reasons: list[bool]  # whether the completion shows its reasoning in the asked format
    lengths: list[int]  # tokens up to and including the end
    seconds: float
    num_tokens: int
    coverage: dict[str, Any] | None = None  # what `dgrpo.evaluation.samples.coverage` found, where it was asked for
    scores: list[float] | None = None  # the grades, where their mean is the figure and not the share that is 1

    @classmethod
    def of(
        cls, answers: Sequence[Answer], num_processes: int = 1, measure: Literal["accuracy", "score"] = "accuracy"
    ) -> "Evaluation":
        """The answers as a whole; they took the mean of what each process spent on them. No grade counts as 0."""
        return cls(
            scores=[answer.mark or 0.0 for answer in answers] if measure == "score" else None,
            completions=[answer.text for answer in answers],
            correct=[answer.mark == 1.0 for answer in answers],
            reasons=[answer.reasons for answer in answers],
            lengths=[answer.length for answer in answers],
            seconds=sum(answer.seconds for answer in answers) / num_processes,
            num_tokens=sum(answer.length for answer in answers),
        )

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / self.n

    @property
    def measure(self) -> str:
        """What the figure is: "accuracy", or "score", the mean grade."""
        return "accuracy" if self.scores is None else "score"

    @property
    def figure(self) -> float:
        """The mean score where there are scores, else the accuracy."""
        return self.accuracy if self.scores is None else sum(self.scores) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the figure: Wilson's of an accuracy, `mean_interval` of a score."""
        return wilson_interval(self.accuracy, self.n) if self.scores is None else mean_interval(self.scores)

    @property
    def accuracy_where_it_reasons(self) -> float | None:
        """Accuracy on the problems where the completion shows its reasoning; None where none does."""
        graded = [right for right, reasons in zip(self.correct, self.reasons, strict=True) if reasons]
        return sum(graded) / len(graded) if graded else None

    @property
    def mean_length(self) -> float:
        """Mean effective length: tokens up to and including the end."""
        return sum(self.lengths) / self.n

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def flips(self, later: "Evaluation") -> dict[str, int]:
        """How many of the same problems went from wrong to right, and from right to wrong, in a later evaluation.

        With scores: on how many the score rose, and fell.
        """
        first, second = (each.correct if each.scores is None else each.scores for each in (self, later))
        pairs = list(zip(first, second, strict=True))
        return {"gained": sum(a < b for a, b in pairs), "lost": sum(a > b for a, b in pairs)}

    def summary(self) -> dict[str, Any]:
        return {
            self.measure: self.figure,
            "n": self.n,
            "interval": list(self.interval),
            "reasons": sum(self.reasons) / self.n,
            "accuracy_where_it_reasons": self.accuracy_where_it_reasons,
            "mean_length": self.mean_length,
            "tokens_per_second": self.tokens_per_second,
        } | ({} if self.coverage is None else {"coverage": self.coverage})


def processes(device: str | None = None) -> PartialState:
    """The processes that share an evaluation, each with its device: the machine's accelerator, or "cpu"."""
    # accelerate starts processes on a CPU but sees one alone in each unless it is told of the CPU here. One that is
    # done waits for the others, however long.
    cpu = device == "cpu" or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


def encode_prompts(
    tokenizer, prompts: Sequence, device: torch.device, template_settings: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, P] of prompts (messages or strings), padded on the left.

    `template_settings` go to the chat template, such as {"enable_thinking": False}.
    """
    if isinstance(prompts[0], str):
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    else:
        ids = [
            tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True, **template_settings or {}
            )["input_ids"]
            for prompt in prompts
        ]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(device)
    return batch["input_ids"], batch["attention_mask"].bool()


def answer_rows(
    model: Any,
    tokenizer,
    rows: Sequence[dict[str, Any]],
    grade: Callable[..., list[float | None]],
    config: SamplerConfig,
    *,
    batch_size: int = 128,
    seed: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    any_rank: Callable[[bool], bool] = bool,
    on_batch: Callable[[int], None] | None = None,
    finished: Answers | None = None,
    template_settings: dict[str, Any] | None = None,
) -> list[Answer]:
    """One graded completion for each row, in the rows' order.

    A row's noise is a function of (seed, its number), and rows share a batch with the same others whatever the number
    of processes, as long as each has a full batch to do. The processes take turns at the batches and all return the
    whole. What is in `finished` is not answered again, and what is answered is added to it. `on_batch` is told how
    many rows each turn of the processes finished.
    """
    answers = dict(finished.answers) if finished is not None else {}
    batch_size = min(batch_size, ceil(len(rows) / num_processes))
    batches = [range(first, min(first + batch_size, len(rows))) for first in range(0, len(rows), batch_size)]
    left = [batch for batch in batches if any(number not in answers for number in batch)]
    mine: list[Answer] = []
    for first in range(0, len(left), num_processes):
        turn = left[first : first + num_processes]
        started = perf_counter()
        # All processes make the same passes: one that has no batch any more repeats another's.
        numbers = turn[min(process_index, len(turn) - 1)]
        part = [rows[number] for number in numbers]
        prompt_ids, prompt_mask = encode_prompts(
            tokenizer,
            [row["prompt"] for row in part],
            model.get_input_embeddings().weight.device,
            template_settings,
        )
        keys = row_keys(torch.tensor(numbers), "evaluation", seed)
        rollout = generate(model, prompt_ids, prompt_mask, config, row_keys=keys, any_rank=any_rank)
        if process_index < len(turn):
            texts, ended = read_completions(rollout, tokenizer, end_token_ids(model))
            prompts = [row["prompt"] for row in part]
            plain = isinstance(prompts[0], str)
            completions = texts if plain else [[{"role": "assistant", "content": text}] for text in texts]
            columns = {name: [row[name] for row in part] for name in part[0] if name != "prompt"}
            kept = zip(rollout.completion_ids.cpu(), rollout.completion_mask.cpu(), strict=True)
            columns["completion_ids"] = [ids[inside].tolist() for ids, inside in kept]
            marks = grade(prompts=prompts, completions=completions, **columns)
            reasons = [mark == 1.0 for mark in format_reward(prompts=prompts, completions=completions)]
            lengths = rollout.completion_mask.sum(1).tolist()
            seconds = (perf_counter() - started) / len(part)
            new = [
                Answer(number, text, mark, shows, length, end, seconds)
                for number, text, mark, shows, length, end in zip(
                    numbers, texts, marks, reasons, lengths, ended, strict=True
                )
            ]
            mine += new
            if finished is not None:
                finished.add(new)
        if on_batch is not None:
            on_batch(sum(map(len, turn)))
    answers |= {answer.row: answer for answer in (gather_object(mine) if num_processes > 1 else mine)}
    return [answers[number] for number in range(len(rows))]


def read_completions(rollout: Rollout, tokenizer, end_ids: Tensor) -> tuple[list[str], list[bool]]:
    """The texts of a rollout without special tokens, and whether each came to its end on the canvas."""
    ids, mask = rollout.completion_ids.cpu(), rollout.completion_mask.cpu()
    texts = [tokenizer.decode(row[inside], skip_special_tokens=True) for row, inside in zip(ids, mask, strict=True)]
    return texts, (torch.isin(ids, end_ids) & mask).any(1).tolist()


def evaluate(
    model: Any,
    tokenizer,
    rows: Sequence[dict[str, Any]],
    grade: Callable[..., list[float | None]],
    config: SamplerConfig,
    *,
    num_processes: int = 1,
    measure: Literal["accuracy", "score"] = "accuracy",
    **settings: Any,
) -> Evaluation:
    """Accuracy and the rest of `answer_rows`, which takes the same arguments; right is a grade of exactly 1.

    With `measure` "score" the mean grade is the figure.
    """
    answers = answer_rows(model, tokenizer, rows, grade, config, num_processes=num_processes, **settings)
    return Evaluation.of(answers, num_processes, measure)


@contextmanager
def as_in_training(model: Any) -> Iterator[None]:
    """The arithmetic that a model was trained in.

    16-bit weights run under autocast, as a trainer has it: else adapters, which are float32, would multiply in
    float32, at up to half as much time again. To float32 weights the adapters are added: equal within rounding, and
    faster.
    """
    weight = model.get_input_embeddings().weight
    if weight.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(weight.device.type, dtype=weight.dtype):
            yield
    elif all(p.is_floating_point() for p in model.parameters()) and not _merged_already(model):
        with merged_adapters(model):
            yield
    else:
        yield


def _merged_already(model: Any) -> bool:
    return any(getattr(module, "merged", False) for module in model.modules())


def greedy(config: SamplerConfig) -> SamplerConfig:
    """The same sampler at temperature 0 and without approximations."""
    return replace(config.exact(), temperature=0.0)
