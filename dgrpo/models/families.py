"""What is special about each family of mask predictors, as data.

One row per `model_type` of a checkpoint's config.json. Everything else treats all families alike.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM

# LLaDA-8B-Instruct's template, for copies whose tokenizer files lack it.
_LLADA_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


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
    mask_token_id: int | None = None
    chat_template: str | None = None


FAMILIES: dict[str, Family] = {
    "llada": Family(
        name="LLaDA",
        config_class=LLaDAConfig,
        model_class=LLaDAModelLM,
        lora_targets=r".*blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)",
        end_tokens=("<|eot_id|>",),
        mask_token="<|mdm_mask|>",
        mask_token_id=126336,
        chat_template=_LLADA_TEMPLATE,
    ),
}
