"""LLaDA2.0's and 2.1's network (mini and flash; arXiv:2512.15745) under the published parameter names.

Attends block by block. Norms on queries and keys, rotary positions on the first half of each head, and after the first
layers a router over experts beside one shared expert: sigmoid scores with a bias that weighs in the choice alone.
"""

from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from dgrpo.models import layers
from dgrpo.models.experts import Expert, through_experts
from dgrpo.models.head import ScoringHead
from dgrpo.models.layers import Network, RMSNorm, Transformer, refuse_unpublished
from dgrpo.models.llada_moe import NOT_KEPT, LLaDAMoELayer
from dgrpo.models.predictor import MaskPredictor

# Keys of config.json that change the network, and the published values, which are those of the network here. The
# published files carry dropout rates; old and new log-probabilities are of one network, without dropout.
_PUBLISHED = {
    "hidden_act": "silu",
    "moe_router_enable_expert_bias": True,
    "norm_head": False,
    "norm_topk_prob": True,
    "rope_scaling": None,
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_sliding_window": False,
}


class LLaDA2MoeConfig(PreTrainedConfig):
    """LLaDA2's published configuration. Keys that this network does not read are kept."""

    model_type = "llada2_moe"
    attribute_map: ClassVar[dict[str, str]] = {"block_length": "block_size"}

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = None
    moe_intermediate_size: int = 512
    num_experts: int = 256
    num_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 2.5
    partial_rotary_factor: float = 0.5
    rope_theta: float = 600000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    block_size: int | None = 32
    mask_token_id: int | None = 156895
    eos_token_id: int = 156892
    pad_token_id: int = 156892
    auto_map: dict = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        refuse_unpublished("LLaDA2", self, kwargs, _PUBLISHED)
        super().__post_init__(**{name: value for name, value in kwargs.items() if name not in NOT_KEPT})


class Router(nn.Module):
    """Chooses each token's experts: those of the best groups with the largest score, each score a sigmoid plus a bias.

    The bias balanced the load in pretraining; it is a buffer, stays as it is and does not enter the weights.
    """

    expert_bias: Tensor

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and float32 weights of the experts chosen for tokens [n, d], both [n, k]."""
        config = self.config
        with torch.autocast(tokens.device.type, enabled=False):
            scores = F.linear(tokens.float(), self.weight.float()).sigmoid()
        choice = (scores + self.expert_bias.float()).unflatten(1, (config.n_group, -1))
        best = choice.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices
        admitted = torch.zeros_like(choice[..., 0], dtype=torch.bool).scatter_(1, best, True)
        choice = choice.masked_fill(~admitted[..., None], -torch.inf).flatten(1)
        chosen = choice.topk(config.num_experts_per_tok).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor


class RoutedExperts(nn.Module):
    """The sum of each token's chosen experts and of the shared one."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(config.num_experts))
        self.shared_experts = Expert(width, inner * config.num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        chosen, weights = self.gate(tokens)
        return through_experts(self.experts, tokens, chosen, weights.to(x.dtype)).view_as(x) + self.shared_experts(x)


class Attention(layers.Attention):
    """Attention with one projection for queries, keys and values, and norms on each head's queries and keys."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        assert config.head_dim is not None
        super().__init__(config, layer_idx, config.head_dim)
        self.sizes = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.sizes) * self.head_dim, bias=False)
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, rotation: Any, past: Any, queries: slice) -> Tensor:
        query, key, value = self.heads(self.query_key_value(x)).split(self.sizes, 1)
        query, key = self.query_layernorm(query[:, :, queries]), self.key_layernorm(key)
        return self.dense(self.attend(query, key, value, mask, rotation, past, queries))


class LLaDA2MoeLayer(LLaDAMoELayer):
    attention_name = "attention"
    # What a checkpointed layer stores twice, `Clean` keeps once.
    _can_checkpoint_with_cache = True


class LLaDA2MoePreTrainedModel(Network):
    config_class = LLaDA2MoeConfig
    _no_split_modules = ["LLaDA2MoeLayer"]
    _input_embed_layer = "word_embeddings"
    # Rounded, it would choose other experts.
    _keep_in_fp32_modules_strict = {"expert_bias"}
    _supports_flash_attn = False

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.expert_bias)


class LLaDA2MoeModel(Transformer, LLaDA2MoePreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: LLaDA2MoeConfig):
        def layer(index: int) -> LLaDA2MoeLayer:
            dense = index < config.first_k_dense_replace
            mlp = Expert(config.hidden_size, config.intermediate_size) if dense else RoutedExperts(config)
            return LLaDA2MoeLayer(config, Attention(config, index), mlp)

        assert config.head_dim is not None
        turned = int(config.head_dim * config.partial_rotary_factor)
        super().__init__(config, map(layer, range(config.num_hidden_layers)), turned)


class LLaDA2MoeModelLM(MaskPredictor, LLaDA2MoePreTrainedModel):
    """LLaDA2 with its head: a mask predictor without logit shift, block by block."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = ScoringHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
