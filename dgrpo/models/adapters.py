"""Trainable weights: what is wrong with a model as a policy; adapters merged into their base weights for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def check_policy(model: nn.Module) -> None:
    """Whether `model` can be trained as a policy, before anything is sampled from it.

    Raises:
        ValueError: no parameter is trained, as after `PeftModel.from_pretrained(model, folder)`; or the adapter adds
            virtual tokens to the prompt (prompt tuning and its kin), which a view of prompt and completion lacks.
    """
    settings: dict[str, Any] = model.peft_config if isinstance(model, PeftModel) else {}
    for name, adapter in settings.items():
        if adapter.is_prompt_learning:
            raise ValueError(
                f"adapter {name!r} is of type {getattr(adapter.peft_type, 'value', adapter.peft_type)}, whose virtual "
                "tokens have no place in a masked view: train LoRA instead (peft_config=LoraConfig(...))."
            )
    if any(weight.requires_grad for weight in model.parameters()):
        return
    if settings:
        raise ValueError(
            "model: no parameter of the adapter is trainable; PeftModel.from_pretrained loads one for inference. Pass "
            "is_trainable=True there, or load both with load_model(base, adapter=folder)."
        )
    raise ValueError("model: no parameter has requires_grad=True; pass peft_config=LoraConfig(...) or unfreeze some.")


def adapters_to_float32(model: nn.Module) -> None:
    """Stores the trained weights of adapters in float32, in place: small steps would be lost to rounding in 16 bits.

    TRL casts the adapters of 4-bit models to bfloat16. The base weights stay as they are; float32 adapters cost
    2 bytes more for each of their parameters.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = {id(weight) for weight in module.get_base_layer().parameters()}
            for weight in module.parameters():
                if weight.requires_grad and weight.is_floating_point() and id(weight) not in base:
                    weight.data = weight.data.float()


def refuse_16_bit_training(model: nn.Module) -> None:
    """For an optimizer that updates the weights as they are stored, without a float32 copy (DeepSpeed keeps one).

    Raises:
        ValueError: weights stored in bfloat16 or float16 are trained. A bfloat16 number has 8 significant bits: ten
            AdamW steps at a learning rate of 3e-6 change fewer than 1 % of such weights at all.
    """
    rounded = [weight for weight in model.parameters() if weight.requires_grad and weight.dtype.itemsize == 2]
    if rounded:
        raise ValueError(
            f"model: {sum(weight.numel() for weight in rounded):,} trained parameters are stored in "
            f"{rounded[0].dtype}, where most updates round to nothing. Load it with dtype=float32 (bf16=True still "
            "computes in bfloat16), train with DeepSpeed, which keeps float32 copies, or train LoRA."
        )


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the active adapters are part of the base weights: one product for each layer instead of three.

    Afterwards the base weights are put back from a copy: subtracting the adapter again would leave its rounding in
    them, in bfloat16 a little more after each rollout. The copy takes the memory of the adapted weights.
    ValueError for quantized base weights and for adapters that are part of them already.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("merge_adapter_for_rollouts=True: the adapter is merged already; unmerge_adapter() first.")
    # All parameters: LoRA with lora_bias=True changes the bias as well.
    weights = [weight for layer in layers for weight in layer.get_base_layer().parameters()]
    if not all(weight.is_floating_point() for weight in weights):
        raise ValueError("merge_adapter_for_rollouts=True: quantized weights cannot take an adapter in; leave it off.")
    saved = [weight.detach().clone() for weight in weights]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.unmerge()
        with torch.no_grad():
            for weight, values in zip(weights, saved, strict=True):
                weight.copy_(values)
