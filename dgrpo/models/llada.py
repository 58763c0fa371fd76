"""LLaDA's network (arXiv:2502.09992) under the published parameter names.

A bidirectional transformer: RMSNorm, rotary positions, SwiGLU, no bias. It reads the published `config.json` and
safetensors as they are; padding is hidden from attention, which the circulating remote code does not do.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dgrpo.models.attention import of_queries
from dgrpo.models.head import ScoringHead
from dgrpo.models.predictor import EVERYWHERE, MaskPredictor

# Keys of config.json that change the network, and the values of LLaDA-8B, which are those of the network here.
_PUBLISHED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "clip_qkv": None,
    "embedding_dropout": 0,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "residual_dropout": 0,
    "rope": True,
    "rope_full_precision": True,
    "rope_scaling": None,
    "scale_logits": False,
}


def refuse_unpublished(family: str, keys: dict, published: dict) -> None:
    """ValueError that names the keys which ask for another network than the published one; None asks for nothing."""
    wrong = [name for name, value in published.items() if keys.get(name) not in (None, value)]
    if wrong:
        raise ValueError(
            f"{family} checkpoint with {', '.join(f'{name}={keys[name]!r}' for name in wrong)}: only the published "
            f"network, with {', '.join(f'{name}={published[name]!r}' for name in wrong)}, is implemented."
        )


class LLaDAConfig(PreTrainedConfig):
    """LLaDA's published configuration (OLMo-style names). Keys that this network does not read are kept."""

    model_type = "llada"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
        "initializer_range": "init_std",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        n_layers: int = 32,
        mlp_hidden_size: int | None = None,
        mlp_ratio: int = 4,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-5,
        weight_tying: bool = False,
        block_type: str = "llama",
        activation_type: str = "silu",
        include_bias: bool = False,
        init_std: float = 0.02,
        mask_token_id: int = 126336,
        eos_token_id: int = 126081,
        pad_token_id: int = 126081,
        **kwargs,
    ):
        # Embeddings may be stored with more rows than the tokenizer has words.
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.n_layers = n_layers
        self.mlp_ratio = mlp_ratio
        self.mlp_hidden_size = mlp_ratio * d_model if mlp_hidden_size is None else mlp_hidden_size
        self.max_sequence_length = max_sequence_length
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.weight_tying = weight_tying
        self.block_type = block_type
        self.activation_type = activation_type
        self.include_bias = include_bias
        self.init_std = init_std
        self.mask_token_id = mask_token_id
        self.auto_map = kwargs.pop("auto_map", {})
        asked = kwargs | {"block_type": block_type, "activation_type": activation_type, "include_bias": include_bias}
        refuse_unpublished("LLaDA", asked, _PUBLISHED)
        for name in ("tie_word_embeddings", "use_cache", "rope_scaling"):
            kwargs.pop(name, None)
        super().__init__(
            eos_token_id=eos_token_id, pad_token_id=pad_token_id, tie_word_embeddings=weight_tying, **kwargs
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


def rotary_table(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Factors of `rotate`, [1 or B, 1, L, head_dim] float32: cosines, and sines with their first half negated."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids.float()[:, None, :, None] * (1 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [B, heads, L, head_dim] turned by its position's angles, computed in float32."""
    wide = x.float()
    return (wide * cos + wide.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


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


def through_layers(
    layers: nn.ModuleList,
    x: Tensor,
    mask: Tensor | None,
    rotation: tuple[Tensor, Tensor],
    past_key_values,
    columns: slice,
) -> Tensor:
    """x [B, L, d] through all layers; the last one computes the columns `columns` alone."""
    *before, last = layers
    for layer in before:
        x = layer(x, mask, *rotation, past_key_values=past_key_values)
    if mask is not None and mask.dim() == 2:
        # Flash attention with padding takes queries and keys of one length only.
        return last(x, mask, *rotation, past_key_values=past_key_values)[:, columns]
    return last(x, mask, *rotation, past_key_values=past_key_values, queries=columns)


class LLaDABlock(GradientCheckpointingLayer):
    """One transformer layer; also the attention module that transformers' attention interface asks about."""

    def __init__(self, config: LLaDAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.d_model // config.n_heads
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        key_size = config.n_kv_heads * self.head_dim
        self.attn_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, key_size, bias=False)
        self.v_proj = nn.Linear(config.d_model, key_size, bias=False)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        past_key_values=None,
        queries: slice = EVERYWHERE,
    ) -> Tensor:
        """The layer's output at columns `queries` of x [B, L, d]; all of x is attended to."""
        h = self.attn_norm(x)
        asked = h[:, queries]
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj(asked), self.k_proj(h), self.v_proj(h))
        )
        query, key = rotate(query, cos[:, :, queries], sin[:, :, queries]), rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mask = of_queries(attention_mask, queries)
        attended, _ = attend(self, query, key, value, mask, scaling=self.scaling, dropout=0.0)
        x = x[:, queries] + self.attn_out(attended.flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(nn.functional.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAPreTrainedModel(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class LLaDAModel(LLaDAPreTrainedModel):
    """Embedding, layers and final norm. `transformer` holds the published names; the head lives there as well."""

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        modules = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config, index) for index in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            modules["ff_out"] = ScoringHead(config.d_model, config.embedding_size, bias=False)
        self.transformer = nn.ModuleDict(modules)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer["wte"]

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        self.transformer["wte"] = embedding
        # transformers notes a new number of rows in vocab_size alone.
        self.config.embedding_size = embedding.num_embeddings

    def forward(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, past_key_values, columns: slice
    ) -> Tensor:
        """Hidden states [B, L, d] after the final norm, at `columns` of L: all that the last layer computes."""
        x = self.transformer["wte"](input_ids)
        rotation = rotary_table(position_ids, self.config.d_model // self.config.n_heads, self.config.rope_theta)
        x = through_layers(self.transformer["blocks"], x, mask, rotation, past_key_values, columns)
        return self.transformer["ln_f"](x)


class LLaDAModelLM(MaskPredictor, LLaDAPreTrainedModel):
    """LLaDA with its head: a mask predictor without logit shift."""

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        if config.weight_tying:
            # A head module of its own keeps the one place where scoring happens; it shares wte's weight and is not
            # stored (published tied checkpoints hold `wte` alone).
            self.tied_head = ScoringHead(config.d_model, config.embedding_size, bias=False)
            self._tied_weights_keys = {"tied_head.weight": "model.transformer.wte.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        self.model.set_input_embeddings(embedding)

    def get_output_embeddings(self) -> ScoringHead:
        return self.tied_head if self.config.weight_tying else self.model.transformer["ff_out"]

    def network(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, past_key_values, columns: slice
    ) -> Tensor:
        return self.model(input_ids, mask, position_ids, past_key_values, columns)
