"""LLaDA-MoE's network (arXiv:2509.24389) under the published parameter names.

LLaDA with norms on queries and keys, and in place of each feed-forward layer a softmax router over experts. Padding
is hidden from attention; routing looks at one token at a time and needs no mask.
"""

from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from dgrpo.models import layers
from dgrpo.models.experts import Expert, through_experts
from dgrpo.models.head import ScoringHead
from dgrpo.models.layers import Network, RMSNorm, Transformer, refuse_unpublished
from dgrpo.models.predictor import EVERYWHERE, MaskPredictor

# Keys of config.json that change the network, and the published values, which are those of the network here.
_PUBLISHED = {
    "attention_bias": False,
    "attention_dropout": 0,
    "clip_qkv": None,
    "hidden_act": "silu",
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": False,
    "partial_rotary_factor": 1,
    "rope_scaling": None,
    "routed_scaling_factor": 1,
    "router_num_group": None,
    "router_topk_group": None,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
}


# Not kept: transformers gives the first two another meaning, and TRL takes a model that has the third for one that
# returns a load-balancing loss.
NOT_KEPT = ("use_cache", "rope_scaling", "output_router_logits")


class LLaDAMoEConfig(PreTrainedConfig):
    """LLaDA-MoE's published configuration. Keys that this network does not read are kept.

    The published `model_type` is "llada", as the dense model's; under this one it is told apart from it.
    """

    model_type = "llada_moe"

    vocab_size: int = 157184
    hidden_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    expert_intermediate_size: int = 1024
    num_experts: int = 64
    num_experts_per_tok: int = 8
    max_position_embeddings: int = 8192
    rope_theta: float = 50000.0
    rms_norm_eps: float = 1e-5
    qk_layernorm: bool = True
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    mask_token_id: int | None = None
    eos_token_id: int = 156892
    pad_token_id: int = 156892
    auto_map: dict = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        published = _PUBLISHED | {"moe_layer_freq": [1] * self.num_hidden_layers}
        refuse_unpublished("LLaDA-MoE", self, kwargs, published)
        super().__post_init__(**{name: value for name, value in kwargs.items() if name not in NOT_KEPT})


class RoutedExperts(nn.Module):
    """Each token's sum over its `num_experts_per_tok` most probable experts, weighted by their probabilities.

    Probabilities are those of the softmax over all experts and are not renormalised over the chosen ones.
    """

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__()
        self.num_chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        sizes = (config.hidden_size, config.expert_intermediate_size)
        self.experts = nn.ModuleList(Expert(*sizes) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        probs = self.gate(tokens).softmax(-1, dtype=torch.float32)
        weights, chosen = probs.topk(self.num_chosen, dim=-1)
        return through_experts(self.experts, tokens, chosen, weights.to(x.dtype)).view_as(x)


class Attention(layers.Attention):
    """Attention with norms on each head's queries and keys."""

    def __init__(self, config: LLaDAMoEConfig, layer_idx: int):
        super().__init__(config, layer_idx, config.hidden_size // config.num_attention_heads)
        assert config.num_key_value_heads is not None
        width, key_size = config.hidden_size, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, key_size, bias=False)
        self.v_proj = nn.Linear(width, key_size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        normed = config.qk_layernorm
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None, rotation: Any, past: Any, queries: slice) -> Tensor:
        query, key, value = map(self.heads, (self.q_proj(x[:, queries]), self.k_proj(x), self.v_proj(x)))
        query, key = self.q_norm(query), self.k_norm(key)
        return self.o_proj(self.attend(query, key, value, mask, rotation, past, queries))


class LLaDAMoELayer(GradientCheckpointingLayer):
    """Attention, then a feed-forward layer: each behind a norm, its output added to what came in."""

    attention_name = "self_attn"  # in checkpoints

    def __init__(self, config: Any, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.add_module(self.attention_name, attention)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, mask: Tensor | None, rotation: Any, past_key_values: Any = None, queries: slice = EVERYWHERE
    ) -> Tensor:
        """The layer's output at columns `queries` of x [B, L, d]; all of x is attended to."""
        attention = getattr(self, self.attention_name)
        attended = attention(self.input_layernorm(x), mask, rotation, past_key_values, queries)
        x = x[:, queries] + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaDAMoEPreTrainedModel(Network):
    config_class = LLaDAMoEConfig
    _no_split_modules = ["LLaDAMoELayer"]


class LLaDAMoEModel(Transformer, LLaDAMoEPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: LLaDAMoEConfig):
        indices = range(config.num_hidden_layers)
        layers = (LLaDAMoELayer(config, Attention(config, index), RoutedExperts(config)) for index in indices)
        super().__init__(config, layers, config.hidden_size // config.num_attention_heads)


class LLaDAMoEModelLM(MaskPredictor, LLaDAMoEPreTrainedModel):
    """LLaDA-MoE with its head: a mask predictor without logit shift."""

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__(config)
        self.model = LLaDAMoEModel(config)
        self.lm_head = ScoringHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
