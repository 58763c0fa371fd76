"""Who sees whom, as data: the one place where attention masks are made.

A token has a block, the number of its position's block, and a copy: 0 in the clean text, n in noisy copy n of it.
Shapes: B texts, Q queries, K keys; the queries are the last of the keys unless `visible` says who sees whom.
"""

import torch
from torch import Tensor


def see(
    query_blocks: Tensor, key_blocks: Tensor, query_copies: Tensor | None = None, key_copies: Tensor | None = None
) -> Tensor:
    """Which key each query sees, [B or 1, Q, K] bool, from blocks and copies, all [B or 1, Q] or [B or 1, K].

    A token of the clean text sees its own block and those before it. One of a noisy copy sees the clean blocks
    *before* its own, and of its own block its own copy alone (BD3-LM, arXiv:2503.09573). Blocks of one token: the
    causal mask. A prefix that sees itself: its tokens share one block. One block for all: full attention.
    """
    query, key = query_blocks[:, :, None], key_blocks[:, None, :]
    if query_copies is None or key_copies is None:
        return key <= query
    query_copy, key_copy = query_copies[:, :, None], key_copies[:, None, :]
    return ((key < query) & (key_copy == 0)) | ((key == query) & (key_copy == query_copy))


def positions_of(padding: Tensor) -> Tensor:
    """Positions [B, K] of texts padded on the left, from what is not padding: 0 at the first token; -1 on padding."""
    return padding.long().cumsum(1) - 1


def block_causal(num_queries: int, num_keys: int, block_length: int, padding: Tensor | None, device) -> Tensor | None:
    """`see` in texts of which the queries are the last tokens, in blocks counted from each text's first token.

    None where every query sees every key that is not padding: without padding that is known without a look at data.
    """
    if padding is not None:
        blocks = positions_of(padding) // block_length
    elif (num_keys - num_queries) // block_length == (num_keys - 1) // block_length:
        return None
    else:
        blocks = torch.arange(num_keys, device=device)[None] // block_length
    return see(blocks[:, -num_queries:], blocks)


def attention_mask(
    padding: Tensor | None, visible: Tensor | None, implementation: str, dtype: torch.dtype
) -> Tensor | None:
    """The mask in the form that transformers' attention functions take; None where everybody sees everybody.

    None leaves the choice of the fastest kernel to them. Build it once per forward pass: a bool mask would become this
    one again in each layer.

    Args:
        padding: [B, K], True (or 1) for tokens and False for padding; None without padding.
        visible: [B or 1, Q, K] bool, who sees whom apart from padding; None where all queries see all keys.
        implementation: "sdpa" or "eager" (a mask [B or 1, 1, Q or 1, K] to be added to the scores), or flash attention
            (`padding` as it is).
        dtype: of the scores.

    Raises:
        ValueError: `visible` under flash attention, which knows padding only.
    """
    if visible is None and padding is None:
        return None
    if "flash" in implementation:
        if visible is not None:
            raise ValueError(
                f"attn_implementation={implementation!r} cannot show some queries more than others, as blocks need: "
                "choose 'sdpa' or 'eager'."
            )
        return padding
    tokens = None if padding is None else padding.bool()[:, None, :]
    if visible is None:
        mask = tokens[:, None] if tokens is not None else None
    else:
        mask = visible if tokens is None else visible & tokens
        # A pad may see no token at all. Nobody reads its output, but over no key it would not be a number.
        mask = (mask | ~mask.any(-1, keepdim=True))[:, None]
    assert mask is not None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def of_queries(mask: Tensor | None, queries: slice) -> Tensor | None:
    """The rows `queries` of a mask that `attention_mask` made."""
    return mask if mask is None or mask.dim() == 2 or mask.shape[2] == 1 else mask[:, :, queries]
