"""From a checkpoint's name or folder to a mask predictor and its tokenizer."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from dgrpo.models.families import FAMILIES, Family

for _model_type, _family in FAMILIES.items():
    if _family.config_class.model_type == _model_type:
        AutoConfig.register(_model_type, _family.config_class, exist_ok=True)
        AutoModelForCausalLM.register(_family.config_class, _family.model_class, exist_ok=True)


def read_config(name_or_path: str, revision: str | None = None) -> dict:
    """The checkpoint's config.json, from a local folder or the hub's cache."""
    path = cached_file(name_or_path, "config.json", revision=revision)
    return json.loads(Path(path).read_text())


def family_of(name_or_path: str, revision: str | None = None) -> Family:
    """The family of a checkpoint, or ValueError that says what to do with another kind."""
    model_type = read_config(name_or_path, revision).get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_name_or_path={name_or_path!r}: model_type {model_type!r} is no masked diffusion model that dgrpo "
            f"knows ({', '.join(FAMILIES)}). A causal language model predicts the next token and cannot be denoised."
        )
    return FAMILIES[model_type]


def load_tokenizer(name_or_path: str, family: Family, mask_token_id: int | None, revision: str | None = None):
    """The checkpoint's tokenizer with mask token, pad token and chat template in place."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    if tokenizer.mask_token_id is None:
        token = None if mask_token_id is None else tokenizer.convert_ids_to_tokens(mask_token_id)
        if token is None:
            raise ValueError(
                f"model_name_or_path={name_or_path!r}: the tokenizer has no mask token and the vocabulary has nothing "
                f"at mask_token_id={mask_token_id}. Set `mask_token` in its tokenizer_config.json."
            )
        tokenizer.mask_token = token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = family.chat_template
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(
    name_or_path: str,
    dtype: torch.dtype | str = torch.float32,
    *,
    attn_implementation: str = "sdpa",
    device_map: str | dict | None = None,
    quantization_config=None,
    adapter: str | None = None,
    revision: str | None = None,
):
    """The pretrained mask predictor and its tokenizer; `tokenizer.mask_token_id` is always set.

    name_or_path: a hub name or a folder in the family's published layout. Every weight must be accounted for:
    ValueError lists missing and unexpected ones. `adapter` puts a trained PEFT adapter on top. No remote code runs.
    """
    family = family_of(name_or_path, revision)
    model, report = family.model_class.from_pretrained(
        name_or_path,
        dtype=dtype,
        attn_implementation=attn_implementation,
        device_map=device_map,
        quantization_config=quantization_config,
        revision=revision,
        use_safetensors=True,
        output_loading_info=True,
    )
    if problems := {kind: sorted(keys) for kind in ("missing_keys", "unexpected_keys") if (keys := report[kind])}:
        raise ValueError(
            f"model_name_or_path={name_or_path!r}: weights do not match the {family.name} network: {problems}."
        )
    tokenizer = load_tokenizer(name_or_path, family, model.config.mask_token_id, revision)
    model.config.mask_token_id = tokenizer.mask_token_id
    vocabulary = tokenizer.get_vocab()
    end_ids = [tokenizer.eos_token_id, *(vocabulary[token] for token in family.end_tokens if token in vocabulary)]
    model.generation_config = GenerationConfig(
        eos_token_id=list(dict.fromkeys(end_ids)), pad_token_id=tokenizer.pad_token_id
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return model, tokenizer
