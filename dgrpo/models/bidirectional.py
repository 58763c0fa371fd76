"""Causal networks of transformers, read in both directions: what Dream and converted checkpoints have in common.

Weights and their names stay those of the causal network. Only attention (every token sees every token that is not
padding) and the head (a ScoringHead) differ.
"""

from typing import Any

import torch
from torch import Tensor

from dgrpo.models.predictor import EVERYWHERE, MaskPredictor


def visible_keys(attention_mask: Tensor | None, num_queries: int, attention: str, dtype: torch.dtype) -> Tensor | None:
    """`attention_mask` [B, K], True where a key may be seen by every query, as transformers' attention functions
    want it: as it is for flash attention, [B, 1, L, K] bool for sdpa, the same with -max for hidden keys for eager.
    """
    if attention_mask is None or "flash" in attention:
        return attention_mask
    visible = attention_mask.bool()[:, None, None, :].expand(-1, 1, num_queries, -1)
    if attention != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def refuse_sliding_windows(config) -> None:
    """ValueError where a layer sees a window only: a masked token's neighbours would then depend on its place."""
    if sliding := [kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"]:
        raise ValueError(
            f"config.layer_types has {len(sliding)} layers with {sliding[0]!r}: only full attention can be read in "
            "both directions. Set use_sliding_window to false in the checkpoint's config.json."
        )


class BidirectionalReading(MaskPredictor):
    """Put in front of a transformers class such as Qwen2ForCausalLM: its weights, seen from both sides.

    The configuration says how far logits are shifted (`logit_shift`: 1 when position i predicts token i + 1).
    """

    config: Any
    model: Any

    def __init__(self, config):
        refuse_sliding_windows(config)
        super().__init__(config)
        self.logit_shift = config.logit_shift
        for layer in self.model.layers:
            layer.self_attn.is_causal = False
        self.set_output_embeddings(self.lm_head)

    @classmethod
    def can_generate(cls) -> bool:
        return False

    def hidden_states(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, columns=EVERYWHERE
    ) -> Tensor:
        network = self.model
        x = network.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        rotation = network.rotary_emb(x, position_ids)
        visible = visible_keys(attention_mask, x.shape[1], self.config._attn_implementation, x.dtype)
        for layer in network.layers:
            x = layer(
                x,
                attention_mask=visible,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=rotation,
            )
        return network.norm(x[:, columns])
