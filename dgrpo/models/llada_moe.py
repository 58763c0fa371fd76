"""LLaDA-MoE's network (arXiv:2509.24389) under the published parameter names.

LLaDA with norms on queries and keys, and in place of each feed-forward layer a softmax router over experts. Padding
is hidden from attention; routing looks at one token at a time and needs no mask.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dgrpo.models.attention import of_queries
from dgrpo.models.experts import Expert, through_experts
from dgrpo.models.head import ScoringHead
from dgrpo.models.llada import RMSNorm, eager_attention, refuse_unpublished, rotary_table, rotate, through_layers
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


class LLaDAMoEConfig(PreTrainedConfig):
    """LLaDA-MoE's published configuration. Keys that this network does not read are kept.

    The published `model_type` is "llada", as the dense model's; under this one it is told apart from it.
    """

    model_type = "llada_moe"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        expert_intermediate_size: int = 1024,
        num_experts: int = 64,
        num_experts_per_tok: int = 8,
        max_position_embeddings: int = 8192,
        rope_theta: float = 50000.0,
        rms_norm_eps: float = 1e-5,
        qk_layernorm: bool = True,
        initializer_range: float = 0.02,
        hidden_act: str = "silu",
        tie_word_embeddings: bool = False,
        mask_token_id: int | None = None,
        eos_token_id: int = 156892,
        pad_token_id: int = 156892,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.expert_intermediate_size = expert_intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.qk_layernorm = qk_layernorm
        self.initializer_range = initializer_range
        self.hidden_act = hidden_act
        self.mask_token_id = mask_token_id
        self.auto_map = kwargs.pop("auto_map", {})
        asked = kwargs | {"hidden_act": hidden_act, "tie_word_embeddings": tie_word_embeddings}
        refuse_unpublished("LLaDA-MoE", asked, _PUBLISHED | {"moe_layer_freq": [1] * num_hidden_layers})
        # Not kept: transformers gives the first two another meaning, and TRL takes a model that has the third for one
        # that returns a load-balancing loss.
        for name in ("use_cache", "rope_scaling", "output_router_logits"):
            kwargs.pop(name, None)
        kwargs |= {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id, "tie_word_embeddings": False}
        super().__init__(**kwargs)


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


class Attention(nn.Module):
    """Bidirectional attention with norms on each head's queries and keys."""

    def __init__(self, config: LLaDAMoEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        key_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if config.qk_layernorm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, cos: Tensor, sin: Tensor, past_key_values, queries: slice
    ) -> Tensor:
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj(x[:, queries]), self.k_proj(x), self.v_proj(x))
        )
        if self.config.qk_layernorm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, cos[:, :, queries], sin[:, :, queries]), rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mask = of_queries(attention_mask, queries)
        attended, _ = attend(self, query, key, value, mask, scaling=self.scaling, dropout=0.0)
        return self.o_proj(attended.flatten(2))


class LLaDAMoELayer(GradientCheckpointingLayer):
    def __init__(self, config: LLaDAMoEConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = RoutedExperts(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

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
        attended = self.self_attn(self.input_layernorm(x), attention_mask, cos, sin, past_key_values, queries)
        x = x[:, queries] + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaDAMoEPreTrainedModel(PreTrainedModel):
    config_class = LLaDAMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDAMoELayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class LLaDAMoEModel(LLaDAMoEPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDAMoELayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, past_key_values, columns: slice
    ) -> Tensor:
        """Hidden states [B, L, d] after the final norm, at `columns` of L: all that the last layer computes."""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rotation = rotary_table(position_ids, head_dim, self.config.rope_theta)
        x = through_layers(self.layers, self.embed_tokens(input_ids), mask, rotation, past_key_values, columns)
        return self.norm(x)


class LLaDAMoEModelLM(MaskPredictor, LLaDAMoEPreTrainedModel):
    """LLaDA-MoE with its head: a mask predictor without logit shift."""

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__(config)
        self.model = LLaDAMoEModel(config)
        self.lm_head = ScoringHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def network(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, past_key_values, columns: slice
    ) -> Tensor:
        return self.model(input_ids, mask, position_ids, past_key_values, columns)
