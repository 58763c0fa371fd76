"""Sampling completions: the public entry to the reverse process."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dgrpo.sampling.compiled import CompiledNetwork
from dgrpo.sampling.config import SamplerConfig
from dgrpo.sampling.denoise import Denoiser, evaluating
from dgrpo.sampling.network import Network
from dgrpo.sampling.rollout import Rollout, align, check_prompts, completion_mask_of, replay


def end_token_ids(model: Any) -> Tensor:
    """Every token id that ends a completion; the first one also fills the canvas after the end."""
    ids = model.generation_config.eos_token_id
    ids = model.config.eos_token_id if ids is None else ids
    if ids is None:
        raise ValueError("model.config.eos_token_id is None: sampling needs a token that ends a completion.")
    return torch.tensor([ids] if isinstance(ids, int) else list(ids))


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
    on_step: Callable[[Denoiser], Any] = bool,
) -> Rollout:
    """Completions sampled by denoising (LLaDA, arXiv:2502.09992, algorithm 5), with the record of how.

    The noise of a row is a function of its key; the global random state is neither read nor changed.

    Args:
        model: A mask predictor of `dgrpo.models`.
        prompt_ids: Token ids [B, P], padded on the left.
        prompt_mask: [B, P], False on padding.
        config: Settings of the sampler.
        generator: What row keys are drawn from where none are given; needed where anything is random.
        row_keys: Noise keys [B] int64.
        fixed: Token ids [B, C] that are given in advance, -1 or [MASK] elsewhere; those after an end give way to EOS.
            Where the model attends block by block, a block sees nothing of what is given behind it.
        group: Numbers of the prompts [B]; by default rows with equal prompts share one.
        batch_size: Rows denoised at a time, sorted by prompt length; by default all.
        any_rank: Whether a flag is true on any process; give it where all processes must make equally many passes.
        on_step: What the denoising loop is handed to after each of its steps; `bool` does nothing.

    Returns:
        The completions and how they came about. Where the model attends in blocks of b tokens, these are counted from
        the text's first token: the last tokens of a prompt that is no multiple of b begin its canvas (`prompt_tail`),
        and its completion has so many tokens less.

    Raises:
        ValueError: What cannot be sampled, by name, value and remedy.
    """
    block_length = getattr(model, "block_length", None)
    config, width = config.of(block_length), config.max_completion_length
    num_rows, device = len(prompt_ids), prompt_ids.device
    for name, given in {"prompt_mask": prompt_mask, "fixed": fixed, "group": group}.items():
        if given is not None and given.device != device:
            raise ValueError(f"{name} is on {given.device}, prompt_ids on {device}: move one to the other.")
    prompt_mask = check_prompts(prompt_ids, prompt_mask)
    if num_rows == 0:
        raise ValueError("prompt_ids: there are no rows to sample.")
    if row_keys is None:
        if generator is None and (config.temperature > 0 or config.remasking == "random"):
            raise ValueError(
                f"temperature={config.temperature}, remasking={config.remasking!r}: pass a torch.Generator."
            )
        row_keys = torch.arange(num_rows)
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
    if group is None:
        group = prompt_ids.masked_fill(~prompt_mask, -1).unique(dim=0, return_inverse=True)[1]
    prompt_tail = group.new_zeros(num_rows)
    if block_length is not None:
        words = blank != model.config.mask_token_id
        prompt_ids, prompt_mask, blank, prompt_tail = align(
            prompt_ids, prompt_mask, blank, block_length, width, int(end_ids[0])
        )
        if (words & (torch.arange(width, device=device) >= width - prompt_tail[:, None])).any():
            raise ValueError(
                f"fixed: its last {int(prompt_tail.max())} columns do not fit on a canvas that begins with the last "
                f"tokens of a prompt; leave them free, or raise max_completion_length by {block_length}."
            )

    lengths = prompt_mask.sum(1)
    batch_size = min(batch_size or num_rows, num_rows)
    # Rows of similar length share a batch, so padding costs little; one batch keeps its order.
    order = lengths.argsort(stable=True) if batch_size < num_rows else torch.arange(num_rows, device=device)
    completion_ids, num_forwards = blank.clone(), 0
    events, values = [blank.new_empty(0, 4)], [torch.empty(0, 2, device=device)]
    with evaluating(model):
        for rows in order.split(batch_size):
            skip = prompt_ids.shape[1] - int(lengths[rows].max())
            canvas = torch.cat([prompt_ids[rows, skip:], blank[rows]], 1)
            network = (CompiledNetwork if config.compile_rollouts else Network)(model, config, canvas.shape[1] - width)
            part = Denoiser(
                network, config, canvas, prompt_mask[rows, skip:], row_keys[rows], end_ids, prompt_tail[rows], any_rank
            )
            part.run(on_step)
            completion_ids[rows] = part.canvas[:, part.prompt_width :]
            num_forwards += network.num_forwards
            for event, value in part.events:
                events.append(torch.cat([rows[event[:, :1]], event[:, 1:]], 1))
                values.append(value)
    given, num_steps = blank != model.config.mask_token_id, config.steps_per_block * config.num_blocks
    history, revealed_at, confidence, entropy = replay(torch.cat(events), torch.cat(values), given, num_steps)
    completion_mask = completion_mask_of(completion_ids, end_ids, prompt_tail)
    shown = completion_mask | (torch.arange(completion_ids.shape[1], device=device) < prompt_tail[:, None])
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=torch.where(shown, completion_ids, end_ids[0]),
        completion_mask=completion_mask,
        # Only the history keeps what was drawn after the end: no view may show it, or reveal where the end is.
        revealed_at=torch.where(shown, revealed_at, num_steps),
        confidence=confidence.where(shown, 0.0),
        entropy=entropy.where(shown, 0.0),
        group=group,
        num_forwards=num_forwards,
        num_steps=num_steps,
        history=history,
        prompt_tail=prompt_tail,
        block_length=block_length,
    )


def agreement(model: Any, prompt_ids: Tensor, prompt_mask: Tensor, config: SamplerConfig, **kwargs) -> float:
    """Share of completion tokens that the config's shortcuts leave as the exact sampler has them, at temperature 0.

    One token that differs early changes what follows: this tells the size of the approximation, not its harm.
    `kwargs` are those of `generate`.
    """
    first, second = (
        generate(model, prompt_ids, prompt_mask, replace(each, temperature=0.0), **kwargs)
        for each in (config, config.exact())
    )
    seen = first.completion_mask | second.completion_mask
    return ((first.completion_ids == second.completion_ids) & seen).sum().item() / seen.sum().item()
