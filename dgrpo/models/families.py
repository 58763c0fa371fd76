"""What is special about each family of mask predictors, as data.

One row per family, by the `model_type` of its configuration here. Everything else treats all families alike; how far
a family's logits are shifted is said by its network's `logit_shift` and read in `MaskPredictor` alone.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Tokenizer

from dgrpo.models import converted
from dgrpo.models.dream import DreamConfig, DreamModel
from dgrpo.models.fast_dllm import Fast_dLLM_QwenForCausalLM, FastDLLMQwenConfig
from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM
from dgrpo.models.llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from dgrpo.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from dgrpo.models.sdar import SDARConfig, SDARForCausalLM
from dgrpo.models.sdar_moe import SDARMoeConfig, SDARMoeForCausalLM

# Templates for copies whose tokenizer files lack one: that of LLaDA-8B-Instruct and Llama 3, Qwen's, LLaDA-MoE's.
_HEADER_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ROLE_TEMPLATE = (
    "{% for message in messages %}<role>{{ 'HUMAN' if message['role'] == 'user' else message['role'] | upper }}</role>"
    "{{ message['content'] }}<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
_LLADA2_TEMPLATE = (
    "<role>SYSTEM</role>{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n{% endif %}"
    "detailed thinking off<|role_end|>{% for message in messages %}{% if message['role'] != 'system' %}"
    "<role>{{ 'HUMAN' if message['role'] == 'user' else message['role'] | upper }}</role>{{ message['content'] }}"
    "<|role_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
# The seven linear layers of each block that is named as in transformers' own networks.
_SEVEN_LINEARS = r".*layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"


@dataclass(frozen=True)
class Family:
    """How one family's checkpoints are read."""

    name: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    # Linear layers that LoRA adapts: a regular expression over module names; it must not reach the output head.
    lora_targets: str
    # Tokens that end a completion besides the tokenizer's EOS, where the vocabulary has them.
    end_tokens: tuple[str, ...] = ()
    mask_token: str = "<|mask|>"
    # For checkpoints whose config.json does not tell. The block length: None for full attention.
    mask_token_id: int | None = None
    block_length: int | None = None
    chat_template: str | None = None
    # `model_type`s of published config.json files besides the configuration's own, and a key that such a file must
    # have where families share a `model_type`.
    published_as: tuple[str, ...] = ()
    marked_by: str | None = None
    # Reads the tokenizer files of checkpoints whose own tokenizer is remote code.
    tokenizer_class: type[PreTrainedTokenizerBase] | None = None
    # `model_type` of the causal checkpoints that can be converted into this family.
    converts: str | None = None

    @property
    def model_types(self) -> tuple[str, ...]:
        return (self.config_class.model_type, *self.published_as)


# Diffusion models that are refused, with the reason: a pattern of the checkpoint's name or its `model_type`.
REFUSED = {
    r"(?i)llada-?2\.2": (
        "LLaDA2.2 admits experts for a whole block, so a token's experts depend on its neighbours, and edits with "
        "words for deletion and insertion. Use LLaDA2.0 or 2.1."
    ),
    r"(?i)stable-?diffcoder": (
        "Stable-DiffCoder's config.json names no mask token, and with a wrong one it writes nonsense. Use SDAR, "
        "LLaDA2 or Fast-dLLM v2."
    ),
    r"diffusion_gemma": (
        "DiffusionGemma has no mask token: its noise replaces words by random ones, which masked views cannot say."
    ),
}

FAMILIES: dict[str, Family] = {
    "llada_moe": Family(
        name="LLaDA-MoE",
        config_class=LLaDAMoEConfig,
        model_class=LLaDAMoEModelLM,
        # Attention only: 64 experts a layer would be 3072 adapters, most of them rarely trained.
        lora_targets=r".*layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        end_tokens=("<|role_end|>",),
        mask_token_id=156895,
        chat_template=_ROLE_TEMPLATE,
        published_as=("llada", "lladamoe"),
        marked_by="num_experts",
    ),
    "llada": Family(
        name="LLaDA",
        config_class=LLaDAConfig,
        model_class=LLaDAModelLM,
        lora_targets=r".*blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)",
        end_tokens=("<|eot_id|>",),
        mask_token="<|mdm_mask|>",
        mask_token_id=126336,
        chat_template=_HEADER_TEMPLATE,
    ),
    "Dream": Family(
        name="Dream",
        config_class=DreamConfig,
        model_class=DreamModel,
        lora_targets=_SEVEN_LINEARS,
        end_tokens=("<|im_end|>",),
        mask_token_id=151666,
        chat_template=_CHATML_TEMPLATE,
        published_as=("dream",),
        tokenizer_class=Qwen2Tokenizer,
    ),
    "llada2_moe": Family(
        name="LLaDA2",
        config_class=LLaDA2MoeConfig,
        model_class=LLaDA2MoeModelLM,
        # Neither the router nor the routed experts.
        lora_targets=r".*layers\.\d+\.(attention\.(query_key_value|dense)|mlp\.(shared_experts\.)?(gate|up|down)_proj)",
        end_tokens=("<|role_end|>",),
        mask_token_id=156895,
        block_length=32,
        chat_template=_LLADA2_TEMPLATE,
    ),
    "sdar": Family(
        name="SDAR",
        config_class=SDARConfig,
        model_class=SDARForCausalLM,
        lora_targets=_SEVEN_LINEARS,
        end_tokens=("<|im_end|>", "<|endoftext|>"),
        mask_token="<|MASK|>",
        mask_token_id=151669,
        block_length=4,
        chat_template=_CHATML_TEMPLATE,
    ),
    "sdar_moe": Family(
        name="SDAR-MoE",
        config_class=SDARMoeConfig,
        model_class=SDARMoeForCausalLM,
        # Neither the router nor the experts.
        lora_targets=r".*layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        end_tokens=("<|im_end|>", "<|endoftext|>"),
        mask_token="<|MASK|>",
        mask_token_id=151669,
        block_length=4,
        chat_template=_CHATML_TEMPLATE,
    ),
    "Fast_dLLM_Qwen": Family(
        name="Fast-dLLM v2",
        config_class=FastDLLMQwenConfig,
        model_class=Fast_dLLM_QwenForCausalLM,
        lora_targets=_SEVEN_LINEARS,
        end_tokens=("<|im_end|>",),
        mask_token_id=151665,
        block_length=32,
        chat_template=_CHATML_TEMPLATE,
    ),
    "a2d-qwen2": Family(
        name="converted Qwen2",
        config_class=converted.ConvertedQwen2Config,
        model_class=converted.A2DQwen2LMHeadModel,
        lora_targets=_SEVEN_LINEARS,
        end_tokens=("<|im_end|>", "<|endoftext|>"),
        chat_template=_CHATML_TEMPLATE,
        converts="qwen2",
    ),
    "a2d-qwen3": Family(
        name="converted Qwen3",
        config_class=converted.ConvertedQwen3Config,
        model_class=converted.A2DQwen3LMHeadModel,
        lora_targets=_SEVEN_LINEARS,
        end_tokens=("<|im_end|>", "<|endoftext|>"),
        chat_template=_CHATML_TEMPLATE,
        converts="qwen3",
    ),
    "a2d-llama": Family(
        name="converted Llama",
        config_class=converted.ConvertedLlamaConfig,
        model_class=converted.A2DLlamaLMHeadModel,
        lora_targets=_SEVEN_LINEARS,
        end_tokens=("<|eot_id|>", "<|end_of_text|>"),
        chat_template=_HEADER_TEMPLATE,
        converts="llama",
    ),
}
