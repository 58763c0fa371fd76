"""Operations on rows as wide as a vocabulary, by stretches: on the whole row torch takes longer or more memory.

Shapes: n rows, V entries.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_STRETCH = 256
# A few rows at a time, small enough for a CPU's cache; a GPU takes larger strips (`chunk_bytes`).
_STRIP_BYTES = 4 * 2**20
# On a GPU the number of launches counts: 1/256 of its memory is 320 MiB of 80 GiB, 640 rows of LLaDA's vocabulary.
_SHARE_OF_GPU = 256


def chunk_bytes(device: torch.device, on_cpu: int) -> int:
    """The size of a chunk of rows: `on_cpu`, or a share of a GPU's memory.

    A share of all of it, not of what happens to be free: chunks of another size would round differently, and the old
    and the new policy's log-probabilities must not.
    """
    if device.type != "cuda":
        return on_cpu
    return max(on_cpu, torch.cuda.get_device_properties(device).total_memory // _SHARE_OF_GPU)


def _in_stretches(values: Tensor, fill: float) -> Tensor:
    """Rows [n, V] cut into stretches [n, ceil(V / _STRETCH), _STRETCH], the last one filled up."""
    extra = -values.shape[1] % _STRETCH
    return (F.pad(values, (0, extra), value=fill) if extra else values).unflatten(1, (-1, _STRETCH))


def first_argmax(values: Tensor) -> Tensor:
    """The first entry of each row of [n, V] that is the largest, [n]: of the stretches' maxima, then in the stretch.

    torch's own argmax over a large vocabulary takes ten times as long as its maximum.
    """
    stretches = _in_stretches(values, -torch.inf)
    stretch = stretches.amax(-1).argmax(-1)
    return stretch * _STRETCH + stretches[torch.arange(len(values), device=values.device), stretch].argmax(-1)


def inverse_cdf(mass: Tensor, noise: Tensor) -> Tensor:
    """The entry of each row of `mass` [n, V] at which its running sum passes `noise` [n] times the total, [n].

    One uniform number per draw instead of one per vocabulary entry. Sums of stretches first, then within the stretch
    that is hit: a running sum is slow and, over a large vocabulary in float32, coarse.
    """
    stretches = _in_stretches(mass, 0.0)
    sums = stretches.sum(-1).double().cumsum(-1)
    threshold = _below(noise.double()[:, None] * sums[:, -1:], sums[:, -1:])
    # Logits that are not numbers find no entry: any will do, the guards of training stop such a run.
    stretch = torch.searchsorted(sums, threshold, right=True).clamp(max=sums.shape[1] - 1)
    before = torch.where(stretch > 0, sums.gather(1, (stretch - 1).clamp(min=0)), 0)
    within = stretches[torch.arange(len(mass), device=mass.device), stretch[:, 0]].double().cumsum(-1)
    entry = torch.searchsorted(within, _below(threshold - before, within[:, -1:]), right=True)
    return (stretch * _STRETCH + entry)[:, 0].clamp(max=mass.shape[1] - 1)


def _below(threshold: Tensor, total: Tensor) -> Tensor:
    """`threshold`, kept below the total by rounding: the entry found there could have probability zero."""
    return torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))


def spread_beside(logits: Tensor, top: Tensor, probs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the other entries weigh where entry `top` [n, 1] has logit 0: sum of their exp [n, 1], mean logit [n].

    The likeliest entry is kept apart because 1 - p would lose how little the others have. The mean is over the
    softmax of all entries, to which `top` adds nothing. `probs`, if given, receives the softmax, 0 at `top`; without
    it a few rows exist at a time, and never a second [n, V].
    """
    others, mean = logits.new_empty(len(logits), 1), logits.new_empty(len(logits))
    step = _rows_at_a_time(logits)
    spare = torch.empty_like(logits[:step] if probs is None else logits[:0])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        part = spare[: len(logits[rows])] if probs is None else probs[rows]
        torch.exp(logits[rows], out=part).scatter_(1, top[rows], 0)
        torch.sum(part, -1, keepdim=True, out=others[rows])
        part /= 1 + others[rows]
        mean[rows] = torch.linalg.vecdot(part, logits[rows])
    return others, mean


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row of a and b [n, V], [n]; a few rows at a time, or all the products would be kept."""
    step = _rows_at_a_time(a)
    # Autocast would take the products in 16 bits.
    with torch.autocast(a.device.type, enabled=False):
        return torch.cat([torch.linalg.vecdot(*pair) for pair in zip(a.split(step), b.split(step), strict=True)])


def _rows_at_a_time(values: Tensor) -> int:
    """How many rows of [n, V] are worked on where all of them would take too much memory."""
    return max(1, chunk_bytes(values.device, _STRIP_BYTES) // (4 * values.shape[1]))
