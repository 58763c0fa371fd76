"""Adapters folded into their base weights for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def adapters_folded_in(model: nn.Module) -> Iterator[None]:
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
