"""From a checkpoint's name or folder to a mask predictor and its tokenizer."""

import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from dgrpo.models.converted import add_mask_token
from dgrpo.models.families import FAMILIES, REFUSED, Family
from dgrpo.models.files import reading

_log = logging.getLogger(__name__)


def read_config(name_or_path: str, revision: str | None = None) -> dict:
    """The checkpoint's config.json as a dictionary, from a local folder or the hub.

    Of a hub model, names of remote code say which repository they belong to, so that a saved copy still finds it.
    """
    if Path(name_or_path, "adapter_config.json").is_file() and not Path(name_or_path, "config.json").is_file():
        raise ValueError(
            f"model_name_or_path={name_or_path!r} is an adapter without its base model: pass the base model's "
            "name, and this folder as `adapter`."
        )
    with reading("model_name_or_path", name_or_path, "configuration"):
        raw, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
        if not isinstance(raw, dict) or not raw:
            raise TypeError("no JSON object of settings")
    if not Path(name_or_path).is_dir() and raw.get("auto_map"):
        raw["auto_map"] = {
            key: code if "--" in code else f"{name_or_path}--{code}" for key, code in raw["auto_map"].items()
        }
    return raw


def family_of(name_or_path: str | Path, revision: str | None = None, *, convert: str | None = None) -> Family:
    """The family of a checkpoint, or ValueError that says what to do with another kind.

    With `convert`: the family that a causal checkpoint is converted into.
    """
    return _family_of(read_config(str(name_or_path), revision), str(name_or_path), convert)


def _family_of(raw: dict, name_or_path: str, convert: str | None) -> Family:
    model_type = raw.get("model_type")
    known = f"model_name_or_path={name_or_path!r} has model_type {model_type!r}"
    for pattern, reason in REFUSED.items():
        if re.search(pattern, str(model_type)) or re.search(pattern, Path(name_or_path).name):
            raise ValueError(f"{known}: {reason}")
    causal = {family.converts: family for family in FAMILIES.values() if family.converts}
    kinds = f"causal checkpoints of {', '.join(causal)}"
    if convert is not None:
        if convert not in ("bidirectional", "block"):
            raise ValueError(f"convert={convert!r}: choose 'bidirectional' or 'block' (with a block_length).")
        if model_type not in causal:
            raise ValueError(f"{known}: convert={convert!r} takes {kinds}.")
        return causal[model_type]
    for family in FAMILIES.values():
        if model_type in family.model_types and (family.marked_by is None or family.marked_by in raw):
            return family
    remedy = f"Supported: {', '.join(family.name for family in FAMILIES.values())}; with convert, {kinds}."
    if model_type in causal:
        remedy = (
            "This causal language model predicts the next token and cannot be denoised as it is; "
            "convert='bidirectional' reads it in both directions with a mask token added, convert='block' with a "
            "block_length block by block; to be trained first."
        )
    raise ValueError(f"{known}, which is no masked diffusion model that dgrpo knows. {remedy}")


class PublishedConfig(PreTrainedConfig):
    """What transformers' AutoConfig finds under a `model_type` that is not one family's alone: the right family's."""

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        family = _family_of(config_dict, config_dict.get("_name_or_path", ""), None)
        return family.config_class.from_dict(
            {key: value for key, value in config_dict.items() if key != "model_type"}, **kwargs
        )


def _register() -> None:
    """Let transformers' auto classes load every family: TRL takes them for its reference model."""
    published = [model_type for family in FAMILIES.values() for model_type in family.published_as]
    for model_type, family in FAMILIES.items():
        for auto in (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel):
            auto.register(family.config_class, family.model_class, exist_ok=True)
        if model_type not in published:
            AutoConfig.register(model_type, family.config_class, exist_ok=True)
    for model_type in published:
        config_class = type("PublishedConfig", (PublishedConfig,), {"model_type": model_type})
        AutoConfig.register(model_type, config_class, exist_ok=True)


_register()


def _block_length(raw: dict, name_or_path: str, family: Family, stated: int | None, convert: str | None) -> int | None:
    """Tokens in a block: as stated, by config.json, by the checkpoint's name (SDAR's `-b16`), or the family's own."""
    if convert == "block" and stated is None:
        raise ValueError("convert='block' needs a block_length: 1 is the causal model itself, 4 to 32 are common.")
    if family.block_length is None and convert != "block" and raw.get("block_length") is None:
        if stated is not None:
            raise ValueError(
                f"block_length={stated}: in {family.name} every token sees every other one; leave it out. Blocks of "
                "the sampler are set in its configuration."
            )
        return None
    if convert == "bidirectional":
        return None
    named = re.search(r"-b(\d+)(?:$|[-/])", name_or_path)
    told = [stated, *(raw.get(key) for key in ("block_length", "block_size", "bd_size")), named and int(named[1])]
    length = next((each for each in [*told, family.block_length] if each is not None), None)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"block_length={length!r}: must be a whole number of at least 1.")
    return length


def load_config(
    name_or_path: str, revision: str | None = None, *, convert: str | None = None, block_length: int | None = None
) -> PreTrainedConfig:
    """The checkpoint's configuration as its family's own class."""
    raw = read_config(name_or_path, revision)
    family = _family_of(raw, name_or_path, convert)
    raw.pop("model_type")
    length = _block_length(raw, name_or_path, family, block_length, convert)
    if length is not None:
        raw[family.config_class.attribute_map.get("block_length", "block_length")] = length
    if convert is not None:
        # A causal checkpoint's position i predicts token i + 1, and keeps doing so.
        raw["logit_shift"] = 1
    return family.config_class.from_dict(raw)


def load_tokenizer(
    name_or_path: str, family: Family, config: PreTrainedConfig, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer with padding on the left, and pad token and chat template in place."""
    # Tokenizers that are remote code are read by the class of the library that they were copied from.
    with reading("model_name_or_path", name_or_path, "tokenizer"):
        remote = "AutoTokenizer" in (get_tokenizer_config(name_or_path, revision=revision).get("auto_map") or {})
        reader: Any = AutoTokenizer
        settings = {"config": config, "trust_remote_code": False}
        if remote and family.tokenizer_class is not None:
            reader, settings = family.tokenizer_class, {}
        tokenizer = reader.from_pretrained(name_or_path, revision=revision, **settings)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = family.chat_template
    tokenizer.padding_side = "left"
    return tokenizer


def set_mask_token(
    tokenizer: PreTrainedTokenizerBase, family: Family, config: PreTrainedConfig, stated: int | None
) -> None:
    """Give the tokenizer the mask token that the checkpoint was trained with: its own, config.json's or the family's.

    `stated` is what config.json itself says. ValueError where the tokenizer says another, and where the vocabulary
    has no mask token.
    """
    if stated is not None and tokenizer.mask_token_id not in (None, stated):
        raise ValueError(
            f"model_name_or_path={tokenizer.name_or_path!r}: mask_token_id={stated} in config.json, where the "
            f"tokenizer's mask token {tokenizer.mask_token!r} is {tokenizer.mask_token_id}. Correct config.json, or "
            "`mask_token` in tokenizer_config.json: one of them is not what the checkpoint was trained with."
        )
    if tokenizer.mask_token_id is None:
        mask_id = family.mask_token_id if config.mask_token_id is None else config.mask_token_id
        token = None if mask_id is None else tokenizer.convert_ids_to_tokens(mask_id)
        if token is None and family.mask_token in tokenizer.get_vocab():
            token = family.mask_token
        if token is None:
            raise ValueError(
                f"model_name_or_path={tokenizer.name_or_path!r}: the tokenizer has no mask token, and its vocabulary "
                f"has nothing at mask_token_id={mask_id} and no {family.mask_token!r}. Set `mask_token` in its "
                "tokenizer_config.json."
            )
        tokenizer.mask_token = token
    config.mask_token_id = tokenizer.mask_token_id


def quantization(load_in_4bit: bool, load_in_8bit: bool, quantization_config, dtype):
    """The settings under which weights are stored in 4 (QLoRA's NF4, twice quantized) or 8 bits; None for neither."""
    if load_in_4bit + load_in_8bit + (quantization_config is not None) > 1:
        raise ValueError("load_in_4bit, load_in_8bit, quantization_config: set only one of them.")
    if not (load_in_4bit or load_in_8bit or isinstance(quantization_config, BitsAndBytesConfig)):
        return quantization_config
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("4-bit and 8-bit weights need bitsandbytes: pip install 'dgrpo[quantization]'.")
    if quantization_config is not None:
        return quantization_config
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    half = {"float16": torch.float16}.get(str(dtype).removeprefix("torch."), torch.bfloat16)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half,
    )


def adapter_settings(adapter: str | Path) -> PeftConfig:
    """The adapter's own configuration, which names its base model; ValueError where there is no adapter."""
    try:
        if not Path(adapter).is_dir() and "/" not in str(adapter):
            raise ValueError("no name of the hub's either")
        return PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # whatever PEFT makes of a file that is none
        raise ValueError(
            f"adapter={str(adapter)!r}: no adapter_config.json that can be read, neither in a folder of this name nor "
            "on the hub. Give the folder of a trained adapter."
        ) from error


def adapter_file(adapter: str) -> str:
    """The file with the adapter's weights; ValueError where there is none."""
    with reading("adapter", adapter, "adapter"):
        # Without it PEFT would look for one on the hub, or read a pickle.
        return cached_file(adapter, "adapter_model.safetensors")  # type: ignore[return-value]  # it raises


def put_adapter(model: PreTrainedModel, adapter: str, *, is_trainable: bool = True) -> PeftModel:
    """The model with a saved PEFT adapter on top; ValueError where their names do not match one to one."""
    with reading("adapter", adapter, "adapter"):
        with safe_open(adapter_file(adapter), "pt") as stored:
            given = set(stored.keys())
        wrapped = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)
    expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if given != expected:
        raise ValueError(
            f"adapter={str(adapter)!r} does not fit {type(model).__name__}: "
            f"missing {sorted(expected - given)}, unexpected {sorted(given - expected)}."
        )
    return wrapped


def load_model(
    name_or_path: str | Path,
    dtype: torch.dtype | str = torch.float32,
    *,
    attn_implementation: str = "sdpa",
    device_map: str | dict | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    quantization_config=None,
    adapter: str | None = None,
    revision: str | None = None,
    convert: str | None = None,
    block_length: int | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The pretrained mask predictor and its tokenizer; `tokenizer.mask_token_id` is always set. No remote code runs.

    Args:
        name_or_path: a hub name or a folder in the family's published layout.
        dtype: of the weights; "auto" keeps what config.json says.
        attn_implementation: "sdpa", "eager" or "flash_attention_2" (not with blocks).
        load_in_4bit: by bitsandbytes, as QLoRA does; the head stays as it is.
        load_in_8bit: the same with 8 bits.
        quantization_config: any other one of transformers.
        adapter: a trained PEFT adapter to put on top, still trainable.
        revision: of a hub model.
        convert: "bidirectional" takes a causal Qwen2, Qwen3 or Llama checkpoint, reads it in both directions and adds
            a mask token; "block" does so block by block. Saved with its tokenizer, it loads again without this.
        block_length: tokens in a block of a model that attends block by block (SDAR, ...). Weights of all block
            lengths have equal shapes, so a wrong one runs and writes nonsense: it is printed, and saved with the
            model. By default what config.json or the name says, or the family's own.

    Raises:
        ValueError: lists every missing and unexpected weight; or says what to do with another kind of checkpoint.
    """
    name_or_path = str(name_or_path)
    if adapter is not None:
        adapter_settings(adapter)  # before the time that loading a model takes
        adapter_file(adapter)
    quantization_config = quantization(load_in_4bit, load_in_8bit, quantization_config, dtype)
    family = family_of(name_or_path, revision, convert=convert)
    config = load_config(name_or_path, revision, convert=convert, block_length=block_length)
    tokenizer = load_tokenizer(name_or_path, family, config, revision)
    if convert is None:
        set_mask_token(tokenizer, family, config, read_config(name_or_path, revision).get("mask_token_id"))
    network: Any = family.model_class
    with reading("model_name_or_path", name_or_path, "weights"):
        model, report = network.from_pretrained(
            name_or_path,
            config=config,
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
    if model.block_length is not None:
        # Not a matter of course: another block length would load as well.
        _log.warning("%s attends in blocks of block_length=%d tokens", name_or_path, model.block_length)
    if convert is not None:
        add_mask_token(model, tokenizer, family.mask_token)
    vocabulary = tokenizer.get_vocab()
    end_ids = [tokenizer.eos_token_id, *(vocabulary[token] for token in family.end_tokens if token in vocabulary)]
    model.generation_config = GenerationConfig(
        eos_token_id=list(dict.fromkeys(end_ids)), pad_token_id=tokenizer.pad_token_id
    )
    if adapter is not None:
        model = put_adapter(model, adapter)
    return model, tokenizer
