"""SDAR (arXiv:2510.06303), TraDo and DiRL: Qwen3's network, block by block, under the published names.

Weights of all block lengths have equal shapes, and the published config.json does not name the block length: the
repository's name does (4, or `-b8` to `-b64`).
"""

from dataclasses import field
from typing import ClassVar

from transformers import Qwen3Config, Qwen3ForCausalLM

from dgrpo.models.bidirectional import BidirectionalReading


class SDARConfig(Qwen3Config):
    """SDAR's published configuration. Keys that this network does not read are kept."""

    model_type = "sdar"
    attribute_map: ClassVar[dict[str, str]] = {"block_length": "block_size"}
    is_causal: ClassVar[bool] = False
    logit_shift: ClassVar[int] = 0

    block_size: int | None = 4
    mask_token_id: int | None = 151669
    auto_map: dict = field(default_factory=dict)


class SDARForCausalLM(BidirectionalReading, Qwen3ForCausalLM):
    """SDAR with its head, named as in the published `architectures`."""

    config_class = SDARConfig
