"""LLaDA's network (arXiv:2502.09992) under the published parameter names.

A bidirectional transformer: RMSNorm, rotary positions, SwiGLU, no bias. It reads the published `config.json` and
safetensors as they are; padding is hidden from attention, which the circulating remote code does not do.
"""

from dataclasses import field
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from dgrpo.models.head import ScoringHead
from dgrpo.models.layers import Attention, Network, RMSNorm, refuse_unpublished, rotary_table, through_layers
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


class LLaDAConfig(PreTrainedConfig):
    """LLaDA's published configuration (OLMo-style names). Keys that this network does not read are kept."""

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
        "initializer_range": "init_std",
    }

    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = None
    n_layers: int = 32
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    vocab_size: int = 126464
    # Embeddings may be stored with more rows than the tokenizer has words.
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    block_type: str = "llama"
    activation_type: str = "silu"
    include_bias: bool = False
    init_std: float = 0.02
    mask_token_id: int = 126336
    eos_token_id: int = 126081
    pad_token_id: int = 126081
    auto_map: dict = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        self.embedding_size = self.vocab_size if self.embedding_size is None else self.embedding_size
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        self.mlp_hidden_size = self.mlp_hidden_size or self.mlp_ratio * self.d_model
        refuse_unpublished("LLaDA", self, kwargs, _PUBLISHED)
        for name in ("tie_word_embeddings", "use_cache", "rope_scaling"):
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)


class LLaDABlock(GradientCheckpointingLayer, Attention):
    """One transformer layer; also the attention module that transformers' attention interface asks about."""

    def __init__(self, config: LLaDAConfig, layer_idx: int):
        super().__init__(config, layer_idx, config.d_model // config.n_heads)
        assert config.n_kv_heads is not None
        assert config.mlp_hidden_size is not None
        width, inner, key_size = config.d_model, config.mlp_hidden_size, config.n_kv_heads * self.head_dim
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, key_size, bias=False)
        self.v_proj = nn.Linear(width, key_size, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.ff_out = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor | None, rotation: Any, past_key_values: Any = None, queries: slice = EVERYWHERE
    ) -> Tensor:
        """The layer's output at columns `queries` of x [B, L, d]; all of x is attended to."""
        h = self.attn_norm(x)
        query, key, value = map(self.heads, (self.q_proj(h[:, queries]), self.k_proj(h), self.v_proj(h)))
        attended = self.attend(query, key, value, mask, rotation, past_key_values, queries)
        x = x[:, queries] + self.attn_out(attended)
        h = self.ff_norm(x)
        return x + self.ff_out(nn.functional.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAPreTrainedModel(Network):
    config_class = LLaDAConfig
    _no_split_modules = ["LLaDABlock"]


class LLaDAModel(LLaDAPreTrainedModel):
    """Embedding, layers and final norm. `transformer` holds the published names; the head lives there as well."""

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        assert config.embedding_size is not None
        modules: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config, index) for index in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            modules["ff_out"] = ScoringHead(config.d_model, config.embedding_size, bias=False)
        self.transformer: Any = nn.ModuleDict(modules)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer["wte"]

    def set_input_embeddings(self, embedding: Any) -> None:
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
            assert config.embedding_size is not None
            # A head module of its own keeps the one place where scoring happens; it shares wte's weight and is not
            # stored (published tied checkpoints hold `wte` alone).
            self.tied_head = ScoringHead(config.d_model, config.embedding_size, bias=False)
            self._tied_weights_keys = {"tied_head.weight": "model.transformer.wte.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, embedding: nn.Module) -> None:
        self.model.set_input_embeddings(embedding)

    def get_output_embeddings(self) -> ScoringHead:
        return self.tied_head if self.config.weight_tying else self.model.transformer["ff_out"]
