"""Fast-dLLM v2 (arXiv:2509.26328): Qwen2's network, block by block, with shifted logits, under the published names.

A token is predicted one position before its own; a block's first token where the clean token before the block stands.
"""

from dataclasses import field
from typing import ClassVar

from transformers import Qwen2Config, Qwen2ForCausalLM

from dgrpo.models.bidirectional import BidirectionalReading


class FastDLLMQwenConfig(Qwen2Config):
    """Fast-dLLM v2's published configuration. Keys that this network does not read are kept."""

    model_type = "Fast_dLLM_Qwen"
    attribute_map: ClassVar[dict[str, str]] = {"block_length": "bd_size"}
    is_causal: ClassVar[bool] = False
    logit_shift: ClassVar[int] = 1

    bd_size: int | None = 32
    mask_token_id: int | None = 151665
    auto_map: dict = field(default_factory=dict)


class Fast_dLLM_QwenForCausalLM(BidirectionalReading, Qwen2ForCausalLM):  # noqa: N801  # as in `architectures`
    """Fast-dLLM v2 with its head, named as in the published `architectures`."""

    config_class = FastDLLMQwenConfig
