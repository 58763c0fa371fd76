"""Sampling completions: the public entry to the reverse process."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dgrpo.sampling.config import SamplerConfig
from dgrpo.sampling.denoise import Denoiser, evaluating
from dgrpo.sampling.rollout import Rollout, check_prompts, ended


def end_token_ids(model: Any) -> Tensor:
    """Every token id that ends a completion; the first one also fills the canvas after the end."""
    ids = model.generation_config.eos_token_id
    ids = model.config.eos_token_id if ids is None else ids
    if ids is None:
        raise ValueError("model.config.eos_token_id is None: sampling needs a token that ends a completion.")
    return torch.tensor([ids] if isinstance(ids, int) else list(ids))


def _same_prompt_groups(prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
    return prompt_ids.masked_fill(~prompt_mask, -1).unique(dim=0, return_inverse=True)[1]


def generate(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: SamplerConfig,
    *,
    generator: torch.Generator | None = None,
    row_keys: Tensor | None = None,
    fixed: Tensor | None = None,
    group: Tensor | None = None,
    batch_size: int | None = None,
    any_rank: Callable[[bool], bool] = bool,
) -> Rollout:
    """Completions sampled by denoising (LLaDA, arXiv:2502.09992, algorithm 5), with the trace of how.

    prompt_ids, prompt_mask [B, P], padded on the left. The noise of a row is a function of its key: `row_keys` [B]
    int64 if given, else drawn from `generator`; the global random state is neither read nor changed. `fixed` [B, C]
    holds token ids that are given in advance and -1 or [MASK] elsewhere; those after an end give way to EOS. `group`
    [B] numbers the prompts (default: rows with equal prompts share a number). `batch_size` rows are denoised at a
    time, sorted by prompt length. `any_rank` tells whether a flag is true on any process; pass it where all processes
    must make the same number of passes.
    """
    prompt_mask = check_prompts(prompt_ids, prompt_mask)
    if len(prompt_ids) == 0:
        raise ValueError("prompt_ids: there are no rows to sample.")
    num_rows, device = len(prompt_ids), prompt_ids.device
    if row_keys is None:
        if generator is None and (config.temperature > 0 or config.remasking == "random"):
            raise ValueError(
                f"temperature={config.temperature}, remasking={config.remasking!r}: pass a torch.Generator."
            )
        row_keys = torch.zeros(num_rows, dtype=torch.long)
        if generator is not None:
            row_keys = torch.randint(2**62, (num_rows,), generator=generator, device=generator.device)
    row_keys = row_keys.to(device)
    blank = torch.full((num_rows, config.max_completion_length), model.config.mask_token_id, device=device)
    if fixed is not None:
        if fixed.shape != blank.shape:
            raise ValueError(f"fixed {list(fixed.shape)} must be [B, C] = {list(blank.shape)}, -1 where free.")
        strange = fixed[(fixed < -1) | (fixed >= model.config.vocab_size)].tolist()
        if strange:
            raise ValueError(
                f"fixed: {strange[0]} is not of the {model.config.vocab_size} words; give their ids, -1 where free."
            )
        blank = torch.where(fixed >= 0, fixed, blank)
    end_ids = end_token_ids(model).to(device)

    lengths = prompt_mask.sum(1)
    batch_size = min(batch_size or num_rows, num_rows)
    # Rows of similar length share a batch, so padding costs little; one batch keeps its order.
    order = lengths.argsort(stable=True) if batch_size < num_rows else torch.arange(num_rows, device=device)
    parts = []
    with evaluating(model):
        for rows in order.split(batch_size):
            skip = prompt_ids.shape[1] - int(lengths[rows].max())
            canvas = torch.cat([prompt_ids[rows, skip:], blank[rows]], 1)
            part = Denoiser(model, config, canvas, prompt_mask[rows, skip:], row_keys[rows], end_ids, any_rank)
            part.run()
            parts.append(part)
    back = order.argsort()
    completion_ids, revealed_at, confidence, entropy = (
        torch.cat(tensors)[back]
        for tensors in zip(
            *((p.canvas[:, p.prompt_width :], p.revealed_at, p.confidence, p.entropy) for p in parts), strict=True
        )
    )
    completion_mask = ended(completion_ids, end_ids)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=torch.where(completion_mask, completion_ids, end_ids[0]),
        completion_mask=completion_mask,
        # What was drawn after the end is not kept: no state of the trace may show it, or tell where the end is.
        revealed_at=torch.where(completion_mask, revealed_at, parts[0].num_steps),
        confidence=confidence.where(completion_mask, 0.0),
        entropy=entropy.where(completion_mask, 0.0),
        group=_same_prompt_groups(prompt_ids, prompt_mask) if group is None else group,
        num_forwards=sum(part.num_forwards for part in parts),
        num_steps=parts[0].num_steps,
    )


def agreement(model: Any, prompt_ids: Tensor, prompt_mask: Tensor, config: SamplerConfig, **how) -> float:
    """Share of completion tokens that the config's shortcuts leave as the exact sampler has them, at temperature 0.

    `how`: the keywords of `generate`. One token that differs early changes what follows: this tells the size of the
    approximation, not its harm.
    """
    first, second = (
        generate(model, prompt_ids, prompt_mask, replace(each, temperature=0.0), **how)
        for each in (config, config.exact())
    )
    seen = first.completion_mask | second.completion_mask
    return ((first.completion_ids == second.completion_ids) & seen).sum().item() / seen.sum().item()
