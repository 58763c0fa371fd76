"""Dream (arXiv:2508.15487), Dream-Coder and DiffuCoder: Qwen2's network read in both directions.

Logits are shifted by one: position i predicts token i + 1, as in the causal checkpoint that they were trained from.
"""

from dataclasses import field
from typing import Any, ClassVar

from transformers import Qwen2Config, Qwen2ForCausalLM

from dgrpo.models.bidirectional import BidirectionalReading


class DreamConfig(Qwen2Config):
    """Dream's published configuration. Keys that this network does not read are kept."""

    model_type = "Dream"
    is_causal: ClassVar[bool] = False
    logit_shift: ClassVar[int] = 1

    mask_token_id: int | None = 151666
    pad_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    auto_map: dict = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        if kwargs.get("block_size"):
            raise ValueError(
                f"block_size={kwargs['block_size']}: Dream checkpoints that attend block by block are not supported; "
                "only the published bidirectional ones (Dream-7B, Dream-Coder, DiffuCoder) are."
            )
        super().__post_init__(**kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        # The published code reads these two keys and would fall back to another rotary base without them.
        written = super().to_diff_dict()
        rope = dict(self.rope_parameters or {})
        written["rope_theta"] = rope.pop("rope_theta")
        written["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
        return written


class DreamModel(BidirectionalReading, Qwen2ForCausalLM):
    """Dream with its head, named as in the published `architectures`."""

    config_class = DreamConfig
