"""Causal checkpoints turned into mask predictors: Qwen2, Qwen3 and Llama read in both directions, or block by block.

As in DiffuLLaMA (arXiv:2410.17891) and Tiny-A2D, whose published `model_type`s ("a2d-qwen3", ...) are used, so that
such checkpoints load here. A conversion predicts little until it is trained as a mask predictor (`recipes/sft.py`).
"""

from dataclasses import field
from typing import Any, ClassVar

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dgrpo.models.bidirectional import BidirectionalReading


class ConvertedQwen2Config(Qwen2Config):
    model_type = "a2d-qwen2"
    is_causal: ClassVar[bool] = False

    mask_token_id: int | None = None
    # None: every token sees every other one.
    block_length: int | None = None
    # Tiny-A2D's checkpoints, which do not say, predict token i at position i.
    logit_shift: int = 0
    auto_map: dict = field(default_factory=dict)


class ConvertedQwen3Config(Qwen3Config):
    model_type = "a2d-qwen3"
    is_causal: ClassVar[bool] = False

    mask_token_id: int | None = None
    block_length: int | None = None
    logit_shift: int = 0
    auto_map: dict = field(default_factory=dict)


class ConvertedLlamaConfig(LlamaConfig):
    model_type = "a2d-llama"
    is_causal: ClassVar[bool] = False

    mask_token_id: int | None = None
    block_length: int | None = None
    logit_shift: int = 0
    auto_map: dict = field(default_factory=dict)


class A2DQwen2LMHeadModel(BidirectionalReading, Qwen2ForCausalLM):
    config_class = ConvertedQwen2Config


class A2DQwen3LMHeadModel(BidirectionalReading, Qwen3ForCausalLM):
    config_class = ConvertedQwen3Config


class A2DLlamaLMHeadModel(BidirectionalReading, LlamaForCausalLM):
    config_class = ConvertedLlamaConfig


def add_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_token: str) -> None:
    """Give a causal checkpoint a mask token: in its tokenizer, its configuration and, where rows run out, its weights.

    The mask starts as the mean word, in the embedding and in the head. Rows beyond the tokenizer's words (checkpoints
    are padded with them) are used before the embedding grows.
    """
    tokenizer.add_special_tokens({"mask_token": mask_token})
    mask_id = tokenizer.mask_token_id
    if mask_id >= model.get_input_embeddings().num_embeddings:
        # The mask's row, the last, is filled below.
        model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    model.config.mask_token_id = mask_id
    layers: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(len(layer.weight) <= mask_id for layer in layers):
        raise ValueError("convert needs whole weights, not ZeRO-3's parts: convert and save in one process.")
    with torch.no_grad():
        for layer in layers:
            layer.weight[mask_id] = layer.weight[:mask_id].float().mean(0).to(layer.weight.dtype)
