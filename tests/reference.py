"""What the fast code must equal: the same quantities written down plainly, one row, one token at a time.

Nothing here imports dgrpo. Shapes: L tokens, V vocabulary, d width, h heads.
"""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotary(x: Tensor, theta: float) -> Tensor:
    """x [h, L, size]: entries i and i + size/2 are one complex number, turned by position * theta^(-2i/size)."""
    length, size = x.shape[1:]
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    turned = torch.complex(x[..., : size // 2].double(), x[..., size // 2 :].double()) * torch.polar(angle**0, angle)
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def llada_logits(state: dict[str, Tensor], config, ids: Tensor) -> Tensor:
    """Logits [L, V] of one text without padding, from LLaDA's published state dict."""
    heads, size, eps = config.n_heads, config.d_model // config.n_heads, config.rms_norm_eps
    wte = state["model.transformer.wte.weight"]
    x = wte[ids]
    for index in range(config.n_layers):
        block = {
            name.removeprefix(f"model.transformer.blocks.{index}.").removesuffix(".weight"): weight
            for name, weight in state.items()
            if name.startswith(f"model.transformer.blocks.{index}.")
        }
        h = rms_norm(x, block["attn_norm"], eps)
        query, key, value = (
            (h @ block[name].T).view(len(ids), -1, size).transpose(0, 1) for name in ("q_proj", "k_proj", "v_proj")
        )
        # Query heads that follow each other share one head of keys and values.
        shared = torch.arange(heads) * config.n_kv_heads // heads
        scores = rotary(query, config.rope_theta) @ rotary(key, config.rope_theta)[shared].mT / math.sqrt(size)
        attended = scores.softmax(-1) @ value[shared]
        x = x + attended.transpose(0, 1).flatten(1) @ block["attn_out"].T
        h = rms_norm(x, block["ff_norm"], eps)
        gate = h @ block["ff_proj"].T
        x = x + (gate * gate.sigmoid() * (h @ block["up_proj"].T)) @ block["ff_out"].T
    x = rms_norm(x, state["model.transformer.ln_f.weight"], eps)
    return x @ state.get("model.transformer.ff_out.weight", wte).T


def shares(count: int, steps: int) -> list[int]:
    """`count` tokens over `steps` steps: as equal as possible, the larger shares first."""
    return [count // steps + (step < count % steps) for step in range(steps)]


def denoise_greedily(
    logits_of, prompt: Tensor, canvas: Tensor, mask_id: int, *, block_length: int, steps: int, cfg_scale: float = 0.0
) -> tuple[Tensor, Tensor]:
    """LLaDA's published low-confidence sampling of one row at temperature 0: completion [C] and its steps [C].

    https://github.com/ML-GSAI/LLaDA/blob/main/generate.py. logits_of maps [L] ids to [L, V] logits. `canvas` [C]
    is all [MASK], or holds tokens given in advance (step -1). [MASK] itself is never drawn, which the published code
    leaves to the model.
    """
    num_prompt, num_completion = len(prompt), len(canvas)
    ids, revealed_at = torch.cat([prompt, canvas]), torch.full((num_completion,), -1)
    steps_per_block = steps // (num_completion // block_length)
    for block, begin in enumerate(range(num_prompt, num_prompt + num_completion, block_length)):
        is_open = [place for place in range(begin, begin + block_length) if ids[place] == mask_id]
        for step, count in enumerate(shares(len(is_open), steps_per_block)):
            logits = logits_of(ids)
            if cfg_scale:
                blind = ids.clone()
                blind[:num_prompt] = mask_id
                unconditional = logits_of(blind)
                logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
            probs = logits.double().softmax(-1)
            drawable = probs.clone()
            drawable[:, mask_id] = -1
            best, token = drawable.max(-1)
            is_open.sort(key=lambda place: -best[place].item())
            for place in is_open[:count]:
                ids[place] = token[place]
                revealed_at[place - num_prompt] = block * steps_per_block + step
            del is_open[:count]
    return ids[num_prompt:], revealed_at


def until_eos(tokens: list[int], end_ids: set[int]) -> list[int]:
    """Up to and including the first end token."""
    for index, token in enumerate(tokens):
        if token in end_ids:
            return tokens[: index + 1]
    return tokens


def naive_scores(
    logits_of,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    hidden: Tensor,
    weights: Tensor,
    mask_id: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """log p and entropy [B, N, C] of every token with a weight, each picture in a pass of its own, without padding.

    hidden [B, N, L] and weights [B, N, C] are those of the masked views.
    """
    (num_rows, num_views, num_completion), width = weights.shape, prompt_ids.shape[1]
    logps, entropies = (torch.zeros(weights.shape, dtype=torch.float64) for _ in range(2))
    for row in range(num_rows):
        is_token = torch.cat([prompt_mask[row].bool(), torch.ones(num_completion, dtype=torch.bool)])
        text = torch.cat([prompt_ids[row], completion_ids[row]])
        for view in range(num_views):
            picture = text.clone()
            picture[hidden[row, view]] = mask_id
            logits = logits_of(picture[is_token])
            for k in range(num_completion):
                if weights[row, view, k] == 0:
                    continue
                place = int(is_token[: width + k].sum())
                log_probs = (logits[place] / temperature).log_softmax(-1)
                logps[row, view, k] = log_probs[completion_ids[row, k]]
                entropies[row, view, k] = -(log_probs.exp() * log_probs).sum()
    return logps, entropies
