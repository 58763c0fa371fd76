"""Causal networks of transformers, read in both directions or block by block: Dream, SDAR, converted checkpoints.

Weights and their names stay those of the causal network. Only who sees whom (see models/attention.py) and the head (a
ScoringHead) differ.
"""

from typing import Any

from torch import Tensor

from dgrpo.models.predictor import MaskPredictor


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

    lm_head: Any

    def __init__(self, config):
        refuse_sliding_windows(config)
        super().__init__(config)
        self.logit_shift = config.logit_shift
        for layer in self.model.layers:
            layer.self_attn.is_causal = False
            # What a checkpointed layer stores twice, `Clean` keeps once.
            layer._can_checkpoint_with_cache = True
        self.set_output_embeddings(self.lm_head)

    @classmethod
    def can_generate(cls) -> bool:
        return False

    def network(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, past_key_values: Any, columns: slice
    ) -> Tensor:
        x = self.model.embed_tokens(input_ids)
        rotation = self.model.rotary_emb(x, position_ids)
        for layer in self.model.layers:
            x = layer(
                x,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=rotation,
            )
        return self.model.norm(x[:, columns])
