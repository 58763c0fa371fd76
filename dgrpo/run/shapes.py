"""Networks without weights: shapes that are known by name, and the FLOPs of a forward and a backward pass."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from dgrpo.models.bidirectional import BidirectionalReading
from dgrpo.models.families import FAMILIES
from dgrpo.models.llada2 import Router
from dgrpo.models.loading import family_of, load_config
from dgrpo.run.steps import CHECKPOINTS
from dgrpo.tasks import EMBEDDED_MODELS

# Checkpoints whose shape is known by name: pattern, family, and what their config.json says beyond the defaults.
_QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
SHAPES: list[tuple[str, str, dict[str, Any]]] = [
    (r"LLaDA-MoE-7B", "llada_moe", {}),
    (r"LLaDA2.*mini", "llada2_moe", {}),
    (r"LLaDA-(8B|1\.5)", "llada", {"mlp_hidden_size": 12288}),
    (
        r"(Dream|DiffuCoder).*7B",
        "Dream",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
    (
        r"SDAR-8B",
        "sdar",
        _QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    ),
    (
        r"SDAR-4B",
        "sdar",
        _QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    ),
    (
        r"SDAR-1\.7B",
        "sdar",
        _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    ),
]


def model_configuration(name: str) -> tuple[Any, Any]:
    """(family, configuration) of a folder with a config.json, or of a known name; ValueError for another."""
    if name in EMBEDDED_MODELS:
        name = str(CHECKPOINTS / f"gsm8k{EMBEDDED_MODELS[name]}")
    if Path(name).is_dir():
        return family_of(name), load_config(name)
    for pattern, key, changes in SHAPES:
        if re.search(pattern, name):
            return FAMILIES[key], FAMILIES[key].config_class(**changes)
    raise ValueError(
        f"model_name_or_path={name!r}: no folder, and not among the shapes that are known by name "
        f"({', '.join(pattern for pattern, *_ in SHAPES)}). Give a folder with the checkpoint's config.json."
    )


def on_meta(config: Any, family: Any, dtype: torch.dtype, lora: LoraConfig | None, checkpointing: bool) -> nn.Module:
    """The network as it is trained, without weights."""
    before = torch.get_default_dtype()
    with torch.device("meta"):
        torch.set_default_dtype(dtype)
        try:
            model = family.model_class(config)
        finally:
            torch.set_default_dtype(before)
        if lora is not None:
            try:
                model = get_peft_model(model, lora)
            except NoMatchingPeftModuleError as error:
                raise ValueError(f"lora_target_modules={lora.target_modules}: the model has none of them.") from error
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


@dataclass(frozen=True)
class Network:
    """FLOPs of a model: a multiplication and an addition are two."""

    model: Any

    @property
    def config(self) -> Any:
        return self.model.config

    def layers(self) -> nn.ModuleList:
        number = self.config.num_hidden_layers
        return next(m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == number)

    def head(self) -> int:
        """For one position."""
        return 2 * self.config.hidden_size * self.model.get_output_embeddings().weight.shape[0]

    def forward(self, rows: int, tokens: int, asked: int, keys: int | None = None) -> tuple[int, int, int]:
        """Of frozen products, of trained ones and of attention: rows of so many tokens, the last `asked` of interest.

        `keys`: the tokens that each of them sees, by default as many.
        """
        config, *before, last = self.config, *self.layers()
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        whole = any(isinstance(module, BidirectionalReading) for module in self.model.modules())
        products = {False: 0, True: 0}
        for layer in (*before, last):
            for name, module in layer.named_modules():
                if not isinstance(module, nn.Linear | Router):
                    continue
                outputs, inputs = module.weight.shape
                shared = layer is not last or whole or re.search(r"(k|v)_proj|query_key_value", name)
                share = 1.0
                if re.search(r"\bexperts\.\d", name):
                    share = config.num_experts_per_tok / config.num_experts
                count = 2 * rows * (tokens if shared else asked) * inputs * outputs * share
                products[module.weight.requires_grad] += int(count)
        queries = len(before) * tokens + (tokens if whole else asked)
        return products[False], products[True], 4 * rows * queries * (keys or tokens) * width

    def update(self, rows: int, tokens: int, asked: int, recomputed: int, keys: int | None = None) -> int:
        """A forward and a backward pass, with `recomputed` more forward passes."""
        frozen, trained, attention = self.forward(rows, tokens, asked, keys)
        return int(frozen * (2 + recomputed) + trained * (3 + recomputed) + attention * (3.5 + recomputed))
