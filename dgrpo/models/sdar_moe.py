"""SDAR-30B-A3B (arXiv:2510.06303): Qwen3-MoE's arithmetic, block by block, under the published names.

transformers stacks the experts of its Qwen3-MoE; here each keeps its own three matrices, as they are stored.
"""

from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dgrpo.models import layers
from dgrpo.models.experts import Expert, through_experts
from dgrpo.models.head import ScoringHead
from dgrpo.models.layers import Network, RMSNorm, Transformer, refuse_unpublished
from dgrpo.models.llada_moe import NOT_KEPT, LLaDAMoELayer
from dgrpo.models.predictor import MaskPredictor

# Keys of config.json that change the network, and the published values, which are those of the network here.
_PUBLISHED = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "mlp_only_layers": [],
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}


class SDARMoeConfig(PreTrainedConfig):
    """SDAR-MoE's published configuration. Keys that this network does not read are kept."""

    model_type = "sdar_moe"
    attribute_map: ClassVar[dict[str, str]] = {"block_length": "block_size"}

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 48
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int = 128
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = True
    rope_theta: float = 1000000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    block_size: int | None = 4
    mask_token_id: int | None = 151669
    eos_token_id: int = 151645
    pad_token_id: int = 151643
    auto_map: dict = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        refuse_unpublished("SDAR-MoE", self, kwargs, _PUBLISHED)
        super().__post_init__(**{name: value for name, value in kwargs.items() if name not in NOT_KEPT})


class RoutedExperts(nn.Module):
    """Each token's sum over its most probable experts; with `norm_topk_prob` probabilities that sum to 1."""

    def __init__(self, config: SDARMoeConfig):
        super().__init__()
        self.num_chosen, self.normed = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        sizes = (config.hidden_size, config.moe_intermediate_size)
        self.experts = nn.ModuleList(Expert(*sizes) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.gate(tokens).softmax(-1, dtype=torch.float32).topk(self.num_chosen, dim=-1)
        if self.normed:
            weights = weights / weights.sum(-1, keepdim=True)
        return through_experts(self.experts, tokens, chosen, weights.to(x.dtype)).view_as(x)


class Attention(layers.Attention):
    """Attention with norms on each head's queries and keys."""

    def __init__(self, config: SDARMoeConfig, layer_idx: int):
        super().__init__(config, layer_idx, config.head_dim)
        width = config.hidden_size
        query_size, key_size = (
            heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(width, query_size, bias=False)
        self.k_proj = nn.Linear(width, key_size, bias=False)
        self.v_proj = nn.Linear(width, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None, rotation: Any, past: Any, queries: slice) -> Tensor:
        query, key, value = map(self.heads, (self.q_proj(x[:, queries]), self.k_proj(x), self.v_proj(x)))
        return self.o_proj(self.attend(self.q_norm(query), self.k_norm(key), value, mask, rotation, past, queries))


class SDARMoeLayer(LLaDAMoELayer):
    # What a checkpointed layer stores twice, `Clean` keeps once.
    _can_checkpoint_with_cache = True


class SDARMoePreTrainedModel(Network):
    config_class = SDARMoeConfig
    _no_split_modules = ["SDARMoeLayer"]
    _supports_flash_attn = False


class SDARMoeModel(Transformer, SDARMoePreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: SDARMoeConfig):
        indices = range(config.num_hidden_layers)
        layers = (SDARMoeLayer(config, Attention(config, index), RoutedExperts(config)) for index in indices)
        super().__init__(config, layers, config.head_dim)


class SDARMoeForCausalLM(MaskPredictor, SDARMoePreTrainedModel):
    """SDAR-MoE with its head, named as in the published `architectures`."""

    def __init__(self, config: SDARMoeConfig):
        super().__init__(config)
        self.model = SDARMoeModel(config)
        self.lm_head = ScoringHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
