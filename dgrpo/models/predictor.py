"""The one question a masked diffusion model answers: what are the hidden tokens of this picture?

Shapes: U distinct pictures, L tokens in each, Q asked positions, T scored tokens, V vocabulary, d width.
A position is a flat index into the U * L tokens of the pictures, and always means the token that is *predicted*
there; families whose logits are shifted by one (Dream) read the hidden state of the neighbour, here and nowhere else.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from transformers.modeling_outputs import MaskedLMOutput

from dgrpo.vocabulary import first_argmax, row_products, spread_beside

# Two float32 [rows, V] buffers of at most this size live at once while scoring; larger jobs go through in chunks.
MAX_LOGITS_BYTES = 48 * 2**20

EVERYWHERE = slice(None)


class ScoringPass(NamedTuple):
    """What one pass through the network shows and asks: U pictures, Q positions, T targets on these positions."""

    input_ids: Tensor  # [U, L]
    attention_mask: Tensor | None  # [U, L]; None when nothing is padded
    positions: Tensor  # [Q], ascending, distinct
    target_index: Tensor  # [T], ascending: the asked position (0..Q-1) on which targets[t] is scored
    targets: Tensor  # [T]
    columns: slice = EVERYWHERE  # of L, where all the asked positions are
    reference: Tensor | None = None  # [Q, d] the reference model's hidden states at the positions


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


def _rows_per_chunk(vocab_size: int) -> int:
    return max(1, MAX_LOGITS_BYTES // (4 * vocab_size))


def _chunks(num_rows: int, vocab_size: int, target_index: Tensor) -> list[tuple[slice, slice]]:
    """Slices of the asked positions and of the targets that fall on them."""
    step = _rows_per_chunk(vocab_size)
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
        mean_row = torch.empty_like(hidden, dtype=torch.float32) if needs_grad else None
        target_row = hidden.new_empty((len(targets), hidden.shape[1]), dtype=torch.float32) if needs_grad else None
        entropy_row = torch.empty_like(mean_row) if needs_grad and entropy_grad else None
        divergence = None if reference is None else torch.empty_like(entropy)
        divergence_row = torch.empty_like(mean_row) if needs_grad and reference is not None else None
        for rows, scored in _chunks(len(hidden), len(weight), target_index):
            logits = float_logits(hidden[rows], weight)
            if temperature != 1:
                logits /= temperature
            top = first_argmax(logits)[:, None]
            logits -= logits.gather(-1, top)
            index = target_index[scored] - rows.start
            probs = torch.empty_like(logits) if needs_grad or reference is not None else None
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
                gap = _log_softmax(float_logits(reference[rows], weight), temperature)
                gap = logits - log_total - gap
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


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits / temperature if temperature != 1 else logits
    return logits - logits.logsumexp(-1, keepdim=True)


def _plain_scores(hidden: Tensor, weight: Tensor, target_index: Tensor, targets: Tensor, temperature: float):
    # The arithmetic of _FrozenHeadScores, operation by operation: log-probabilities of one policy must agree in every
    # bit whether or not gradients are recorded, or the ratio would not be 1 where the policy has not moved.
    logits = float_logits(hidden, weight)
    if temperature != 1:
        logits = logits / temperature
    top = first_argmax(logits)[:, None]
    logits = logits - logits.gather(-1, top)
    probs = logits.exp().scatter(1, top, 0)
    others = probs.sum(-1, keepdim=True)
    log_total = others.log1p()
    logps = logits[target_index, targets] - log_total[target_index, 0]
    return logps, log_total[:, 0] - row_products(probs / (1 + others), logits)


class ScoringHead(nn.Linear):
    """An output head that also scores targets in float32 without a [rows, V] tensor above MAX_LOGITS_BYTES.

    It is called as a module so that ZeRO-3 and FSDP gather its weight around the whole call.
    """

    def forward(
        self,
        hidden: Tensor,
        target_index: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        reference: Tensor | None = None,
    ) -> Tensor | Scores:
        """Float32 logits [..., V] of hidden states, or Scores when `targets` [T] and `target_index` [T] are given.

        `reference` [Q, d] holds another model's hidden states for this head, to measure the KL against.
        """
        if targets is None:
            return float_logits(hidden.flatten(0, -2), self.weight).unflatten(0, hidden.shape[:-1])
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            asked = (hidden, self.weight, target_index, targets, temperature, entropy_grad, reference)
            return Scores(*_FrozenHeadScores.apply(*asked))
        if reference is not None:
            raise ValueError("reference: the exact KL needs a head that is not trained; fine-tune with LoRA.")
        chunks = _chunks(len(hidden), len(self.weight), target_index)
        parts = []
        for rows, scored in chunks:
            asked = (hidden[rows], self.weight, target_index[scored] - rows.start, targets[scored], temperature)
            many = len(chunks) > 1
            parts.append(checkpoint(_plain_scores, *asked, use_reentrant=False) if many else _plain_scores(*asked))
        logps, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return Scores(logps, entropy if entropy_grad else entropy.detach())


def _refuse_generate(*args, **kwargs):
    raise TypeError("Masked diffusion models are sampled by dgrpo.generate, not by transformers' generate().")


class MaskPredictor:
    """What every family adds to its transformers class: answers at chosen positions instead of logits everywhere.

    A family provides `hidden_states(input_ids, attention_mask, position_ids, past_key_values, columns)` after the
    final norm, at the slice `columns` of the L positions; a `ScoringHead` as output embedding; and `logit_shift`
    (1 when position i predicts token i + 1).
    """

    logit_shift = 0

    def __init__(self, config, *args, **kwargs):
        attention = config._attn_implementation or "sdpa"
        if attention not in ("sdpa", "eager") and "flash" not in attention:
            # Flex attention, for one, would add a mask of trues and falses to its scores.
            raise ValueError(f"attn_implementation={attention!r}: choose 'sdpa', 'eager' or 'flash_attention_2'.")
        super().__init__(config, *args, **kwargs)
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
        # PEFT's causal wrapper looks this up when it is built. Set on the instance: a method of the class would make
        # transformers treat the model as one that its own generate() can drive.
        self.prepare_inputs_for_generation = _refuse_generate

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Puts a linear layer, such as resize_token_embeddings makes, where the head was, as a `ScoringHead`."""
        # The class, not the module: weights that are tied, sharded or still on the meta device stay what they are.
        new_embeddings.__class__ = ScoringHead
        head = self.get_output_embeddings()
        self.set_submodule(next(name for name, module in self.named_modules() if module is head), new_embeddings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        positions: Tensor | None = None,
        columns: slice = EVERYWHERE,
        passes: list[ScoringPass] | None = None,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        hidden_only: bool = False,
        **unused,
    ):
        """Scores of each of `passes`; or float32 logits [Q, V] at `positions`; or all logits [U, L, V].

        `hidden_only` gives the hidden states [Q, d] of each of `passes`, for another call's `reference`.
        `columns` promises that all positions lie in this slice of the L columns: the last layer is left out elsewhere.
        Several passes are checkpointed one by one: activations of one pass live at a time, for one more forward.
        """
        if given := [name for name, value in unused.items() if value is not None and value is not False]:
            raise TypeError(f"A mask predictor's forward does not take {', '.join(given)}.")
        if passes is not None:
            if hidden_only:
                return [self._asked_rows(each) for each in passes]
            if len(passes) == 1 or not torch.is_grad_enabled():
                return [self._score(each, temperature, entropy_grad) for each in passes]
            return [checkpoint(self._score, each, temperature, entropy_grad, use_reentrant=False) for each in passes]
        head = self.get_output_embeddings()
        if positions is None:
            hidden = self.hidden_states(input_ids, attention_mask, position_ids, past_key_values)
            if self.logit_shift:
                hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
            return MaskedLMOutput(logits=head(hidden))
        assert input_ids is not None
        return head(self._rows(positions, columns, input_ids, attention_mask, position_ids, past_key_values))

    def _rows(self, positions: Tensor, columns: slice, input_ids: Tensor, *context) -> Tensor:
        """Hidden states [Q, d] that predict the tokens at `positions`, all of them in `columns`."""
        length = input_ids.shape[1]
        if columns.start:
            columns = slice(columns.start - self.logit_shift, columns.stop)
        hidden = self.hidden_states(input_ids, *context, columns=columns)
        column = positions % length
        if self.logit_shift:
            column = column - (column > 0).long()
        return hidden.flatten(0, 1)[positions // length * hidden.shape[1] + column - (columns.start or 0)]

    def _score(self, asked: ScoringPass, temperature: float, entropy_grad: bool) -> Scores:
        head, rows = self.get_output_embeddings(), self._asked_rows(asked)
        return head(rows, asked.target_index, asked.targets, temperature, entropy_grad, asked.reference)

    def _asked_rows(self, asked: ScoringPass) -> Tensor:
        return self._rows(asked.positions, asked.columns, asked.input_ids, asked.attention_mask)
