"""Accuracy of a model on held-out problems, graded by the reward that it is trained with."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from dgrpo.grading import wilson_interval
from dgrpo.sampling import SamplerConfig, generate
from dgrpo.sampling.draw import row_keys
from rewards.format import format_reward


@dataclass(frozen=True)
class Evaluation:
    """What a model wrote on n problems and how much of it is right."""

    completions: list[str]
    correct: list[bool]
    reasons: list[bool]  # whether the completion shows its reasoning in the asked format
    lengths: list[int]  # tokens up to and including the end
    seconds: float
    num_tokens: int

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson_interval(self.accuracy, self.n)

    @property
    def accuracy_where_it_reasons(self) -> float | None:
        """Accuracy on the problems where the completion shows its reasoning; None where none does."""
        graded = [right for right, reasons in zip(self.correct, self.reasons, strict=True) if reasons]
        return sum(graded) / len(graded) if graded else None

    def summary(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "n": self.n,
            "interval": list(self.interval),
            "reasons": sum(self.reasons) / self.n,
            "accuracy_where_it_reasons": self.accuracy_where_it_reasons,
            "mean_length": sum(self.lengths) / self.n,
            "tokens_per_second": self.num_tokens / self.seconds,
        }


def encode_prompts(tokenizer, prompts: Sequence, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, P] of prompts (messages or strings), padded on the left."""
    if isinstance(prompts[0], str):
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    else:
        ids = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
            for prompt in prompts
        ]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(device)
    return batch["input_ids"], batch["attention_mask"].bool()


def evaluate(
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
) -> Evaluation:
    """Samples one completion for each row and grades it; right is a grade of exactly 1.

    A row's noise is a function of (seed, its number). The processes share the rows and all return the whole.
    `on_batch` is told how many rows each batch finished.
    """
    started = time.perf_counter()
    device = model.get_input_embeddings().weight.device
    share = math.ceil(len(rows) / num_processes)
    # The last process may have fewer rows than the others: it repeats some, since all make the same passes.
    mine = [rows[i % len(rows)] for i in range(process_index * share, (process_index + 1) * share)]
    found: list[tuple[str, bool, bool, int]] = []
    for first in range(0, share, batch_size):
        part = mine[first : first + batch_size]
        prompt_ids, prompt_mask = encode_prompts(tokenizer, [row["prompt"] for row in part], device)
        numbers = torch.arange(first, first + len(part)) + process_index * share
        keys = row_keys(numbers, "evaluation", seed)
        rollout = generate(model, prompt_ids, prompt_mask, config, row_keys=keys, any_rank=any_rank)
        texts = [
            tokenizer.decode(ids[mask], skip_special_tokens=True)
            for ids, mask in zip(rollout.completion_ids.cpu(), rollout.completion_mask.cpu(), strict=True)
        ]
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        prompts = [row["prompt"] for row in part]
        columns = {name: [row[name] for row in part] for name in part[0] if name != "prompt"}
        grades = grade(prompts=prompts, completions=completions, **columns)
        shows = format_reward(prompts=prompts, completions=completions)
        lengths = rollout.completion_mask.sum(1).tolist()
        found += [
            (text, mark == 1.0, reason == 1.0, length)
            for text, mark, reason, length in zip(texts, grades, shows, lengths, strict=True)
        ]
        if on_batch is not None:
            on_batch(len(part))
    if num_processes > 1:
        found = gather_object(found)
    found = found[: len(rows)]
    texts, correct, reasons, lengths = (list(column) for column in zip(*found, strict=True))
    return Evaluation(texts, correct, reasons, lengths, time.perf_counter() - started, sum(lengths))


def greedy(config: SamplerConfig) -> SamplerConfig:
    """The same sampler at temperature 0 and without approximations."""
    return replace(
        config, temperature=0.0, cache=None, cache_refresh=None, threshold=None, factor=None, entropy_bound=None
    )
