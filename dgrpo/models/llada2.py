"""LLaDA2.0's and 2.1's network (mini and flash; arXiv:2512.15745) under the published parameter names.

Attends block by block. Norms on queries and keys, rotary positions on the first half of each head, and after the first
layers a router over experts beside one shared expert: sigmoid scores with a bias that weighs in the choice alone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dgrpo.models.attention import of_queries
from dgrpo.models.experts import Expert, through_experts
from dgrpo.models.head import ScoringHead
from dgrpo.models.llada import RMSNorm, eager_attention, refuse_unpublished, rotary_table, rotate, through_layers
from dgrpo.models.predictor import EVERYWHERE, MaskPredictor

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
    attribute_map = {"block_length": "block_size"}

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        intermediate_size: int = 5120,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 4,
        head_dim: int | None = None,
        moe_intermediate_size: int = 512,
        num_experts: int = 256,
        num_shared_experts: int = 1,
        num_experts_per_tok: int = 8,
        n_group: int = 8,
        topk_group: int = 4,
        first_k_dense_replace: int = 1,
        routed_scaling_factor: float = 2.5,
        partial_rotary_factor: float = 0.5,
        rope_theta: float = 600000.0,
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        block_size: int | None = 32,
        mask_token_id: int | None = 156895,
        eos_token_id: int = 156892,
        pad_token_id: int = 156892,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.moe_intermediate_size = moe_intermediate_size
        self.num_experts = num_experts
        self.num_shared_experts = num_shared_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_group = n_group
        self.topk_group = topk_group
        self.first_k_dense_replace = first_k_dense_replace
        self.routed_scaling_factor = routed_scaling_factor
        self.partial_rotary_factor = partial_rotary_factor
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.auto_map = kwargs.pop("auto_map", {})
        refuse_unpublished("LLaDA2", kwargs | {"tie_word_embeddings": tie_word_embeddings}, _PUBLISHED)
        # Not kept: transformers gives the first two another meaning, and TRL takes a model that has the third for one
        # that returns a load-balancing loss.
        for name in ("use_cache", "rope_scaling", "output_router_logits"):
            kwargs.pop(name, None)
        kwargs |= {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id, "tie_word_embeddings": False}
        super().__init__(**kwargs)


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


class Attention(nn.Module):
    """Attention with one projection for queries, keys and values, and norms on each head's queries and keys."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        self.query_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, cos: Tensor, sin: Tensor, past_key_values, queries: slice
    ) -> Tensor:
        config = self.config
        heads = self.query_key_value(x).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        sizes = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        query, key, value = heads.split(sizes, 1)
        query, key = self.query_layernorm(query[:, :, queries]), self.key_layernorm(key)
        query, key = self._turn(query, cos[:, :, queries], sin[:, :, queries]), self._turn(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)
        mask = of_queries(attention_mask, queries)
        attended, _ = attend(self, query, key, value, mask, scaling=self.scaling, dropout=0.0)
        return self.dense(attended.flatten(2))

    @staticmethod
    def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = cos.shape[-1]
        return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], -1)


class LLaDA2MoeLayer(GradientCheckpointingLayer):
    # What a checkpointed layer stores twice, `Clean` keeps once.
    _can_checkpoint_with_cache = True

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__()
        self.attention = Attention(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = Expert(config.hidden_size, config.intermediate_size) if dense else RoutedExperts(config)
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
        attended = self.attention(self.input_layernorm(x), attention_mask, cos, sin, past_key_values, queries)
        x = x[:, queries] + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaDA2MoePreTrainedModel(PreTrainedModel):
    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDA2MoeLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # Rounded, it would choose other experts.
    _keep_in_fp32_modules_strict = {"expert_bias"}
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.expert_bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        self.word_embeddings = embedding

    def forward(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, past_key_values, columns: slice
    ) -> Tensor:
        """Hidden states [B, L, d] after the final norm, at `columns` of L: all that the last layer computes."""
        turned = int(self.config.head_dim * self.config.partial_rotary_factor)
        rotation = rotary_table(position_ids, turned, self.config.rope_theta)
        x = through_layers(self.layers, self.word_embeddings(input_ids), mask, rotation, past_key_values, columns)
        return self.norm(x)


class LLaDA2MoeModelLM(MaskPredictor, LLaDA2MoePreTrainedModel):
    """LLaDA2 with its head: a mask predictor without logit shift, block by block."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = ScoringHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def network(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, past_key_values, columns: slice
    ) -> Tensor:
        return self.model(input_ids, mask, position_ids, past_key_values, columns)
