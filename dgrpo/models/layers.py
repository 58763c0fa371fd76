"""What the networks written here share: norm, rotary positions, attention, the way through the layers.

Shapes: B texts, L tokens, d width; `queries` and `columns` are slices of L.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dgrpo.models.attention import of_queries


def refuse_unpublished(family: str, config: PreTrainedConfig, more: dict, published: dict) -> None:
    """ValueError where keys of a configuration, or those it does not read, ask for another network than published.

    None asks for nothing.
    """
    keys = more | vars(config)
    if wrong := [name for name, value in published.items() if keys.get(name) not in (None, value)]:
        raise ValueError(
            f"{family} checkpoint with {', '.join(f'{name}={keys[name]!r}' for name in wrong)}: only the published "
            f"network, with {', '.join(f'{name}={published[name]!r}' for name in wrong)}, is implemented."
        )


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, cast back before the weight is applied (the published order)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = nn.functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return normed.to(x.dtype) * self.weight


class Network(PreTrainedModel):
    """What transformers asks of a network; each family adds its own configuration and the name of its layers."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


def rotary_table(position_ids: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Factors of `rotate`, [1 or B, 1, L, size] float32: cosines, and sines with their first half negated."""
    exponents = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32) / size
    angles = position_ids.float()[:, None, :, None] * (1 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [B, heads, L, head_dim], its first `size` dimensions turned by its position's angles, in float32."""
    size = cos.shape[-1]
    wide = x[..., :size].float()
    turned = (wide * cos + wide.roll(size // 2, -1) * sin).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat([turned, x[..., size:]], -1)


def eager_attention(
    module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scaling + mask) v written out; [B, L, heads, head_dim] and the attention weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (nn.functional.dropout(weights, dropout, module.training) @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """Keys, values and the attention itself, in the words in which transformers asks an attention module.

    A family adds its projections and calls `attend`.
    """

    is_causal = False

    def __init__(self, config: Any, layer_idx: int, head_dim: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = head_dim**-0.5

    def heads(self, projected: Tensor) -> Tensor:
        """[B, L, heads * head_dim] as [B, heads, L, head_dim]."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rotation: Any, past: Any, queries: slice
    ) -> Tensor:
        """[B, q, heads * head_dim] of queries at the columns `queries`, on all keys and on what `past` has stored."""
        cos, sin = rotation
        query, key = rotate(query, cos[:, :, queries], sin[:, :, queries]), rotate(key, cos, sin)
        if past is not None:
            key, value = past.update(key, value, self.layer_idx)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        attended, _ = function(self, query, key, value, of_queries(mask, queries), scaling=self.scaling, dropout=0.0)
        return attended.flatten(2)


def through_layers(
    layers: nn.ModuleList, x: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor], past: Any, columns: slice
) -> Tensor:
    """x [B, L, d] through all layers; the last one computes the columns `columns` alone."""
    *before, last = layers
    for layer in before:
        x = layer(x, mask, rotation, past_key_values=past)
    if mask is not None and mask.dim() == 2:
        # Flash attention with padding takes queries and keys of one length only.
        return last(x, mask, rotation, past_key_values=past)[:, columns]
    return last(x, mask, rotation, past_key_values=past, queries=columns)


class Transformer(Network):
    """Embedding, layers and final norm, under the names of transformers' networks."""

    def __init__(self, config: Any, layers: Iterable[nn.Module], rotary_size: int):
        super().__init__(config)
        self.rotary_size = rotary_size
        self.add_module(self._input_embed_layer, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, past_key_values: Any, columns: slice
    ) -> Tensor:
        """Hidden states [B, n, d] after the final norm, at `columns` of L: all that the last layer computes."""
        rotation = rotary_table(position_ids, self.rotary_size, self.config.rope_theta)
        x = self.get_input_embeddings()(input_ids)
        return self.norm(through_layers(self.layers, x, mask, rotation, past_key_values, columns))
