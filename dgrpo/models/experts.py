"""Feed-forward layers as experts, of which each token goes through a few.

Shapes: n tokens, k experts chosen for each, d width.
"""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Expert(nn.Module):
    """SwiGLU, under the names of one expert."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def through_experts(experts: nn.ModuleList, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Each token's weighted sum over its experts, [n, d].

    Args:
        experts: the `Expert`s.
        tokens: [n, d].
        chosen: [n, k], numbers of experts.
        weights: [n, k].
    """
    num_chosen = chosen.shape[1]
    # (token, choice) pairs in the order of their experts.
    expert = chosen.flatten()
    pairs = expert.argsort(stable=True)
    # bincount would wait for a GPU.
    counts = expert.new_zeros(len(experts)).scatter_add_(0, expert, torch.ones_like(expert))
    x = tokens[pairs // num_chosen]
    answers = grouped(experts, x, counts) if can_group(experts, x) else _one_by_one(experts, x, counts)
    answers = answers[pairs.argsort()].unflatten(0, chosen.shape)
    return torch.einsum("nk,nkd->nd", weights.to(answers.dtype), answers)


def _one_by_one(experts: nn.ModuleList, x: Tensor, counts: Tensor) -> Tensor:
    # Every expert is called, also with no token: under ZeRO-3 all processes must make the same calls.
    slices = x.split(counts.tolist())
    return torch.cat([expert(part) for expert, part in zip(experts, slices, strict=True)])


def can_group(experts: nn.ModuleList, x: Tensor) -> bool:
    """Whether all experts can be computed in three products: plain bfloat16 weights on a GPU.

    Not quantized, adapted, or ZeRO-3's parts, which come together only around each module's own call.
    """
    if not x.is_cuda or not hasattr(F, "grouped_mm") or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    linears = chain.from_iterable(expert.children() for expert in experts)
    return all(
        type(linear) is nn.Linear and linear.weight.dtype == torch.bfloat16 and not hasattr(linear.weight, "ds_id")
        for linear in linears
    )


def grouped(experts: nn.ModuleList, x: Tensor, counts: Tensor) -> Tensor:
    """The same without a wait for the device: one launch for all experts instead of three for each.

    The price is a copy of the layer's weights side by side for as long as the layer runs.
    """
    gate, up, down = (
        torch.stack([getattr(expert, name).weight for expert in experts]).mT
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    ends = counts.cumsum(0).to(torch.int32)
    x = x.to(gate.dtype)
    inner = F.silu(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)
    return F.grouped_mm(inner, down, offs=ends)
