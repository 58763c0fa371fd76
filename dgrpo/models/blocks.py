"""Models that attend block by block: stored keys and values, and noisy copies scored against the clean past.

A block's tokens see each other and the blocks before it, never one behind it. So the keys and values of a finished
block do not change any more, and a noisy copy of a block needs those of the clean blocks before it, whatever the other
copies show. Shapes: U texts of L tokens, N noisy copies of their last C columns, b tokens a block, d width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dgrpo.models import attention

Layers = list[tuple[Tensor, Tensor]]


class BlockPast:
    """Keys and values of finished tokens, append only, with transformers' `update` call; without gradients.

    A pass sees what is stored and its own tokens. Its own are kept only when `commit` says so afterwards: without it
    the next pass writes over them.
    """

    def __init__(self, capacity: int):
        """Room for `capacity` tokens of each row, those of the last pass included."""
        self.capacity, self.length = capacity, 0
        # Rows that take part in the next passes, where not all do; these passes store nothing.
        self.rows: Tensor | None = None
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stored and own keys and values, [B, heads, length + L, head_dim], of a pass over L tokens."""
        if self.rows is not None:
            stored = (store[layer_idx][self.rows, :, : self.length] for store in (self.keys, self.values))
            before_keys, before_values = stored
            return torch.cat([before_keys, key], 2), torch.cat([before_values, value], 2)
        stop = self.length + key.shape[2]
        if stop > self.capacity:
            raise ValueError(f"capacity={self.capacity}: a pass ends at token {stop}.")
        for store, own in ((self.keys, key), (self.values, value)):
            if layer_idx not in store:
                store[layer_idx] = own.new_empty(*own.shape[:2], self.capacity, own.shape[3])
            store[layer_idx][:, :, self.length : stop] = own
        return self.keys[layer_idx][:, :, :stop], self.values[layer_idx][:, :, :stop]

    def commit(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` of the last pass."""
        self.length += num_tokens

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was: to serve all rollouts of a prompt, and to let finished rows go."""
        for store in (self.keys, self.values):
            for layer, stored in store.items():
                kept = stored.new_empty(len(rows), *stored.shape[1:])
                kept[:, :, : self.length] = stored[rows, :, : self.length]
                store[layer] = kept


class Clean:
    """Keys and values of clean tokens, read by later passes with their gradients.

    `before`: what the tokens of this pass read besides their own, one pair of [B, heads, length, head_dim] a layer.
    """

    def __init__(self, before: Layers | None = None):
        self.before = before
        self.length = before[0][0].shape[2] if before else 0
        self.own: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        # A layer that is checkpointed runs again in the backward pass: the first run's tensors carry the gradients.
        self.own.setdefault(layer_idx, (key, value))
        if self.before is None:
            return key, value
        before = self.before[layer_idx]
        return torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)

    def layers(self) -> Layers:
        """What this pass stored, behind what it read."""
        if self.before is None:
            return [self.own[index] for index in range(len(self.own))]
        return [
            (torch.cat([keys, self.own[index][0]], 2), torch.cat([values, self.own[index][1]], 2))
            for index, (keys, values) in enumerate(self.before)
        ]


def _clean_stream(model: Any, ids: Tensor, mask: Tensor | None, prompt_width: int) -> tuple[Layers, Tensor | None]:
    """Keys and values of clean texts [U, n], and their hidden states [U, n, d] where logits are shifted.

    The first `prompt_width` columns go through once for each distinct row of them: rollouts of a group share their
    prompt, and its blocks see nothing of the completion.
    """
    before: Layers | None = None
    hidden: list[Tensor] = []
    if prompt_width:
        prompt, prompt_mask = ids[:, :prompt_width], None if mask is None else mask[:, :prompt_width]
        key = prompt if prompt_mask is None else prompt.masked_fill(~prompt_mask, -1)
        found, copies = key.unique(dim=0, return_inverse=True)
        rows = torch.arange(len(ids), device=ids.device)
        first = rows.new_full((len(found),), len(ids)).scatter_reduce(0, copies, rows, "amin")
        past = Clean()
        states = model.hidden_states(prompt[first], None if prompt_mask is None else prompt_mask[first], None, past)
        before = [(keys[copies], values[copies]) for keys, values in past.layers()]
        hidden.append(states[copies])
    if ids.shape[1] > prompt_width:
        past = Clean(before)
        hidden.append(model.hidden_states(ids[:, prompt_width:], mask, None, past))
        before = past.layers()
    return before or [], torch.cat(hidden, 1) if model.logit_shift and hidden else None


def copies_hidden_states(model: Any, asked: Any) -> Tensor:
    """Hidden states [Q, d] that predict the tokens at `asked.positions` of noisy copies (see ScoringPass).

    The clean texts go through the network once, as one stream up to the block before the last that is asked for. Then
    all copies follow, `asked.chunk` columns at a time: a noisy block sees itself and the stored clean blocks before
    its own. Only blocks on which something is asked are computed. Equal to one packed row [clean | copies] under
    BD3-LM's mask (arXiv:2503.09573), of which it leaves out what nobody sees.

    Prompts and completions are whole blocks: L - C and C are multiples of b, padding comes first and in multiples of
    b. A shifted family (Fast-dLLM v2) reads a block's first token from the clean token before it.

    Raises:
        ValueError: columns that are no whole blocks.
    """
    copies, ids, size = asked.copies, asked.input_ids, model.block_length
    num_rows, num_copies, num_columns = copies.shape
    start = ids.shape[1] - num_columns
    if start % size or num_columns % size or asked.chunk < 1:
        raise ValueError(
            f"copies {list(copies.shape)} of texts of {ids.shape[1]} tokens, chunk={asked.chunk}: prompts and "
            f"completions must be whole blocks of block_length={size}, and a chunk at least one column."
        )
    mask = None if asked.attention_mask is None else asked.attention_mask.bool()
    # Up to the last block on which something is asked; one block at least, so that all ranks make as many passes.
    end = int((asked.positions % num_columns).max()) if len(asked.positions) else 0
    clean = slice(0, min(start + max(end // size, 1) * size, ids.shape[1] - size))
    layers, hidden = _clean_stream(model, ids[:, clean], None if mask is None else mask[:, clean], start)
    row, copy, column = torch.unravel_index(asked.positions, copies.shape)
    wanted = torch.zeros(copies.shape, dtype=torch.bool, device=ids.device)
    wanted.view(-1)[asked.positions] = True
    per_chunk = max(1, asked.chunk // size)
    parts, places = [], []
    for first in range(0, num_columns // size, per_chunk):
        part = slice(first * size, min((first + per_chunk) * size, num_columns))
        inside = ((column >= part.start) & (column < part.stop)).nonzero()[:, 0]
        targets = (row[inside], copy[inside], column[inside] - part.start)
        chunk = (model, layers, hidden, copies[:, :, part], wanted[:, :, part], mask, start + part.start, targets)
        recompute = asked.recompute and torch.is_grad_enabled()
        parts.append(checkpoint(_chunk, *chunk, use_reentrant=False) if recompute else _chunk(*chunk))
        places.append(inside)
    return torch.cat(parts)[torch.cat(places).argsort()]


def _chunk(
    model: Any,
    layers: Layers,
    clean_hidden: Tensor | None,
    copies: Tensor,
    wanted: Tensor,
    mask: Tensor | None,
    begin: int,
    targets: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Hidden states [q, d] for the targets (row, copy, column) of copies [U, N, c], which begin at column `begin`."""
    size, device = model.block_length, copies.device
    num_rows, num_copies, width = copies.shape
    num_blocks = width // size
    # Every (copy, block) on which something is asked is a stretch of its row's queries; rows with fewer are filled up.
    asked = wanted.unflatten(2, (num_blocks, size)).any(3).flatten(1)
    num_stretches = max(1, int(asked.sum(1).max()))
    stretch = (~asked).int().argsort(dim=1, stable=True)
    place = stretch.argsort(1)
    stretch = stretch[:, :num_stretches]
    tokens = copies.unflatten(2, (num_blocks, size)).flatten(1, 2)
    tokens = tokens.gather(1, stretch[..., None].expand(-1, -1, size)).flatten(1)
    block = stretch % num_blocks
    columns = (begin + block[..., None] * size + torch.arange(size, device=device)).flatten(1)
    stop = min(begin + (num_blocks - 1) * size, layers[0][0].shape[2] if layers else 0)
    past = Clean([(keys[:, :, :stop], values[:, :, :stop]) for keys, values in layers]) if stop else Clean()
    key_columns = torch.arange(stop, device=device)[None]
    own = torch.arange(1, num_stretches + 1, device=device).repeat_interleave(size)[None]
    visible = attention.see(
        columns // size,
        torch.cat([key_columns.expand(num_rows, -1), columns], 1) // size,
        own,
        torch.cat([torch.zeros_like(key_columns), own], 1),
    )
    positions, padding = columns, None
    if mask is not None:
        positions = attention.positions_of(mask).gather(1, columns)
        padding = torch.cat([mask[:, :stop], mask.new_ones(columns.shape)], 1)
    hidden = model.hidden_states(tokens, padding, positions, past, visible)
    row, copy, column = targets
    at = place[row, copy * num_blocks + column // size] * size + column % size - model.logit_shift
    if not model.logit_shift:
        return hidden[row, at]
    # What stands before a block's first token is clean.
    is_first = column % size == 0
    before = ((begin + column - 1) * is_first).clamp(min=0)
    assert clean_hidden is not None
    return torch.where(is_first[:, None], clean_hidden[row, before], hidden[row, at.clamp(min=0)])
