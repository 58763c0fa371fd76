"""A micro-batch as scoring sees it: what goes through the network, counted on the views of the recipe's estimator.

Shapes: B rows of a micro-batch, N views, P prompt tokens, C completion tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dgrpo.logprobs import CHUNK
from dgrpo.noise import stream
from dgrpo.sampling import Rollout
from dgrpo.trainers import DiffuGRPOConfig
from dgrpo.trainers.plugins import configured_estimator
from dgrpo.views import draw_views


class Pass(NamedTuple):
    """Tokens that go through the layers together."""

    rows: int
    tokens: int  # of each row
    asked: int  # the last of these, of which the last layer's answer is read
    keys: int  # stored and own, which each token sees
    recomputed: bool = False  # once more in the backward pass


@dataclass(frozen=True)
class Scoring:
    """A micro-batch: passes of the layers, scored positions of each call of the head, and canvases.

    Of a model that attends block by block: the clean prompts, the clean completions, and chunks of columns.
    """

    passes: list[Pass]
    positions: list[int]
    canvases: list[int]


def scoring_of(args: DiffuGRPOConfig, prompt_tokens: int, vocab_size: int, attends: int | None = None) -> Scoring:
    """Counted on a micro-batch of random full-length completions, whose views the recipe's own estimator draws.

    `attends`: the block length of a model that attends block by block.
    """
    rows, length = args.per_device_train_batch_size, args.max_completion_length
    generator = stream("plan")
    group = torch.arange(rows) // args.num_generations
    prompts = torch.randint(1, vocab_size, (rows, prompt_tokens), generator=generator)[group]
    sampler = args.sampler().of(attends)
    block_length = sampler.max_completion_length // sampler.num_blocks
    order = torch.rand(rows, sampler.num_blocks, block_length, generator=generator).argsort(2)
    each = max(1, block_length // sampler.steps_per_block)
    step = order // each + torch.arange(sampler.num_blocks)[:, None] * sampler.steps_per_block
    rollout = Rollout(
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
        completion_ids=torch.randint(1, vocab_size, (rows, length), generator=generator),
        completion_mask=torch.ones(rows, length, dtype=torch.bool),
        revealed_at=step.flatten(1),
        confidence=torch.rand(rows, length, generator=generator),
        entropy=torch.rand(rows, length, generator=generator),
        group=group,
        num_forwards=0,
        num_steps=sampler.steps_per_block * sampler.num_blocks,
        prompt_tail=torch.zeros(rows, dtype=torch.long),
        block_length=attends,
    )
    unit = group if args.whole_groups else torch.arange(rows)
    views = draw_views(configured_estimator(args), rollout, unit, ("plan",)).each(lambda value: value[:, 0])
    if attends is not None:
        return _by_blocks(views.weights != 0, args, prompt_tokens, attends)
    weights, canvases = views.weights, views.canvases(torch.cat([prompts, rollout.completion_ids], 1), 0)
    passes, positions = [], []
    for chunk in torch.arange(weights.shape[1]).split(args.views_per_pass or weights.shape[1]):
        scored = weights[:, chunk].flatten(0, 1) != 0
        part = canvases[:, chunk].flatten(0, 1)[scored.any(1)]
        distinct, number = part.unique(dim=0, return_inverse=True)
        row, column = scored[scored.any(1)].nonzero(as_tuple=True)
        passes.append(Pass(max(1, len(distinct)), prompt_tokens + length, length, prompt_tokens + length))
        positions.append(len((number[row] * length + column).unique()))
    recompute = len(passes) > 1
    return Scoring([one._replace(recomputed=recompute) for one in passes], positions, [one.rows for one in passes])


def _by_blocks(scored: Tensor, args: DiffuGRPOConfig, prompt_tokens: int, size: int) -> Scoring:
    """Of views that score [B, N, C] in blocks of `size` tokens, as models/blocks.py and logprobs.py arrange them."""
    rows, num_views, length = scored.shape
    views_per_pass = args.views_per_pass or num_views
    clean = prompt_tokens + length - size
    passes = [Pass(-(-rows // args.num_generations), prompt_tokens, prompt_tokens, prompt_tokens)]
    if length > size:
        passes.append(Pass(rows, length - size, length - size, clean))
    per_chunk = max(size, min(CHUNK, views_per_pass * length // num_views)) // size
    for index, blocks in enumerate(scored.unflatten(2, (-1, size)).any(3).split(per_chunk, 2)):
        tokens = size * max(1, int(blocks.flatten(1).sum(1).max()))
        # What is clean before the chunk's last block.
        stored = prompt_tokens + (index * per_chunk + blocks.shape[2] - 1) * size
        passes.append(Pass(rows, tokens, tokens, stored + tokens, num_views > views_per_pass))
    return Scoring(passes, [int(scored.sum())], [int(scored.any(2).sum())])
