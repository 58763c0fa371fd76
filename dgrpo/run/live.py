"""Bytes of the tensors that are alive: of real ones, or of tensors without memory that a network's own code makes."""

import weakref
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages made inside: `now`, and at their `peak`. What the model holds before does not count."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        held = [*model.parameters(), *model.buffers()]
        held += [weight.grad for weight in model.parameters() if weight.grad is not None]
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def without_memory(model: nn.Module) -> FakeTensorMode:
    """Gives a model on the meta device tensors of a CPU without memory, and the context in which it computes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, torch.Tensor] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in made:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                        is_weight = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                    if tensor is not None:
                        tensors[name] = made[id(tensor)]  # type: ignore[assignment]  # a parameter where one was
        for weight in model.parameters():
            if weight.requires_grad:
                # As in every update but the first: gradients are there, and counted with the optimizer.
                weight.grad = torch.empty_like(weight)
    return mode
