"""The output head that scores targets in float32 without the [rows, V] tensor of all logits.

Shapes: Q positions, T scored tokens, V vocabulary, d width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dgrpo.vocabulary import chunk_bytes, first_argmax, row_products, spread_beside

# Two float32 [rows, V] buffers of at most this size live at once while scoring; larger jobs go through in chunks. The
# size is for a CPU, where larger chunks were not faster; a GPU takes larger ones (`chunk_bytes`).
MAX_LOGITS_BYTES = 48 * 2**20


class Scores(NamedTuple):
    """Answers to a ScoringPass, float32: log p(target) for each target; entropy and divergence at each position."""

    logps: Tensor  # [T]
    entropy: Tensor  # [Q]
    divergence: Tensor | None = None  # [Q] KL(model, reference) over the whole vocabulary, if a reference was given


class _WideProduct(torch.autograd.Function):
    """a @ b.T in float32 from 16-bit factors on CUDA, where torch.mm with out_dtype has no derivative of its own."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.mm(a, b.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad = grad.to(b.dtype)
        return (grad @ b if ctx.needs_input_grad[0] else None), (grad.t() @ a if ctx.needs_input_grad[1] else None)


def float_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Float32 logits [rows, V]: products of the stored precision, summed and kept in float32.

    Logits rounded to bf16 are spaced 0.06 to 0.12 apart at the sizes that LLaDA produces, which would step the ratio
    by several percent.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype == torch.float32:
            hidden = hidden.float()
            if not hidden.is_cuda and 2 < len(hidden) < 12 and len(weight) > 8192:
                # MKL reads a tall weight twice for so few rows; seen from the other side it reads it once.
                return (weight @ hidden.t().contiguous()).t().contiguous()
            return F.linear(hidden, weight)
        if hidden.is_cuda:
            return _WideProduct.apply(hidden.to(weight.dtype), weight)
        return F.linear(hidden.float(), weight.float())


def _chunks(hidden: Tensor, vocab_size: int, target_index: Tensor) -> list[tuple[slice, slice]]:
    """Slices of the Q positions and of the targets that fall on them."""
    num_rows, step = len(hidden), max(1, chunk_bytes(hidden.device, MAX_LOGITS_BYTES) // (4 * vocab_size))
    if num_rows <= step:
        return [(slice(0, num_rows), slice(0, len(target_index)))]
    starts = torch.arange(0, num_rows, step, device=target_index.device)
    bounds = [*torch.searchsorted(target_index, starts).tolist(), len(target_index)]
    rows = [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
    return [(row, slice(bounds[i], bounds[i + 1])) for i, row in enumerate(rows)]


class _FrozenHeadScores(torch.autograd.Function):
    """Scores under a head that is not trained, without keeping or recomputing [rows, V] for the backward pass.

    d log p(t) / d h = W[t] - E_p[W], dH / d h = -E_p[(log p + H) W] and dKL / d h = E_p[(log p - log q - KL) W] are
    linear in what comes back, so the expectations are taken while the chunk's probabilities exist. The weight is not
    needed in the backward pass, where ZeRO-3 would have partitioned it again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target_index, targets, temperature, entropy_grad, reference):
        needs_grad = ctx.needs_input_grad[0]
        logps = hidden.new_empty(targets.shape, dtype=torch.float32)
        entropy = hidden.new_empty(hidden.shape[:1], dtype=torch.float32)
        mean_row: Any = torch.empty_like(hidden, dtype=torch.float32) if needs_grad else None
        target_row: Any = (
            hidden.new_empty((len(targets), hidden.shape[1]), dtype=torch.float32) if needs_grad else None
        )
        entropy_row = torch.empty_like(mean_row) if needs_grad and entropy_grad else None
        divergence = None if reference is None else torch.empty_like(entropy)
        divergence_row = torch.empty_like(mean_row) if needs_grad and reference is not None else None
        for rows, scored in _chunks(hidden, len(weight), target_index):
            logits = float_logits(hidden[rows], weight)
            if temperature != 1:
                logits /= temperature
            top = first_argmax(logits)[:, None]
            logits -= logits.gather(-1, top)
            index = target_index[scored] - rows.start
            probs: Any = torch.empty_like(logits) if needs_grad or reference is not None else None
            others, energy = spread_beside(logits, top, probs)
            total, log_total = 1 + others, others.log1p()
            logps[scored] = logits[index, targets[scored]] - log_total[index, 0]
            entropy[rows] = log_total[:, 0] - energy
            if needs_grad:
                # E_p[W] - W[top], and W[t] - W[top] beside it: where the model is sure, W[t] - E_p[W] is far smaller
                # than its terms and would drown in their bfloat16 rounding.
                row = probs.scatter_(1, top, -others / total).to(weight.dtype)
                with torch.autocast(hidden.device.type, enabled=False):
                    mean_row[rows] = (row @ weight).float()
                target_row[scored] = weight[targets[scored]].float() - weight[top[index, 0]].float()
            if divergence is not None:
                gap = logits - log_total - (float_logits(reference[rows], weight) / temperature).log_softmax(-1)
                share = probs.scatter_(1, top, 1 / total)
                divergence[rows] = row_products(share, gap)
                if divergence_row is not None:
                    gap -= divergence[rows, None]
                    with torch.autocast(hidden.device.type, enabled=False):
                        divergence_row[rows] = ((share * gap).to(weight.dtype) @ weight).float()
            if entropy_row is not None:
                logits += (entropy[rows] - log_total[:, 0])[:, None]
                share = probs.scatter_(1, top, 1 / total).mul_(logits).to(weight.dtype)
                with torch.autocast(hidden.device.type, enabled=False):
                    entropy_row[rows] = (share @ weight).float()
        if needs_grad:
            ctx.save_for_backward(target_index, mean_row, target_row, entropy_row, divergence_row)
            ctx.temperature, ctx.dtype = temperature, hidden.dtype
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logps, entropy, divergence

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy, grad_divergence):
        target_index, mean_row, target_rows, entropy_row, divergence_row = ctx.saved_tensors
        per_position = mean_row.new_zeros(len(mean_row)).index_add_(0, target_index, grad_logps)
        grad = mean_row * -per_position[:, None]
        grad.index_add_(0, target_index, target_rows * grad_logps[:, None])
        if entropy_row is not None:
            grad -= entropy_row * grad_entropy[:, None]
        if divergence_row is not None:
            grad += divergence_row * grad_divergence[:, None]
        return (grad / ctx.temperature).to(ctx.dtype), None, None, None, None, None, None


def _plain_scores(hidden: Tensor, weight: Tensor, target_index: Tensor, targets: Tensor, temperature: float):
    """log p of the targets [T] and the entropy at each position [Q], with gradients of the weight as well."""
    logits = float_logits(hidden, weight)
    logps = (logits / temperature if temperature != 1 else logits).log_softmax(-1)
    return logps[target_index, targets], -row_products(logps.exp(), logps)


class ScoringHead(nn.Linear):
    """An output head that also scores targets in float32 without a [rows, V] tensor above MAX_LOGITS_BYTES.

    It is called as a module so that ZeRO-3 and FSDP gather its weight around the whole call.
    """

    def forward(  # type: ignore[override]  # scores as well, so that the weight is gathered once
        self,
        hidden: Tensor,
        target_index: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        reference: Tensor | None = None,
    ) -> Tensor | Scores:
        """Float32 logits [..., V] of hidden states, or Scores when targets are given.

        Args:
            hidden: [..., d]; [Q, d] with targets.
            target_index: [T], ascending: the position (0..Q-1) on which targets[t] is scored.
            targets: [T] token ids.
            temperature: divides the logits.
            entropy_grad: whether the entropy carries gradients.
            reference: [Q, d], another model's hidden states for this head, to measure the KL against.

        Raises:
            ValueError: `reference` beside a head that is trained.
        """
        if targets is None or target_index is None:
            return float_logits(hidden.flatten(0, -2), self.weight).unflatten(0, hidden.shape[:-1])
        # A head that is trained always takes the second path, with and without gradients: the log-probabilities of
        # one policy must agree in every bit, or the ratio would not be 1 where the policy has not moved.
        if not self.weight.requires_grad:
            scores = _FrozenHeadScores.apply(
                hidden, self.weight, target_index, targets, temperature, entropy_grad, reference
            )
            return Scores(*scores)
        if reference is not None:
            raise ValueError("reference: the exact KL needs a head that is not trained; fine-tune with LoRA.")
        chunks = _chunks(hidden, len(self.weight), target_index)
        recompute = len(chunks) > 1 and torch.is_grad_enabled()
        parts = []
        for rows, scored in chunks:
            chunk = (hidden[rows], self.weight, target_index[scored] - rows.start, targets[scored], temperature)
            parts.append(
                checkpoint(_plain_scores, *chunk, use_reentrant=False) if recompute else _plain_scores(*chunk)
            )
        logps, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return Scores(logps, entropy if entropy_grad else entropy.detach())
