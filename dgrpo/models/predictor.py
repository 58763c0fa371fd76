"""What every masked diffusion model computes: the distribution of the hidden tokens of a canvas.

Shapes: U distinct canvases, L tokens in each, Q requested positions, T scored tokens, V vocabulary, d width.
A position is a flat index into the U * L tokens of the canvases, and always means the token that is *predicted*
there; families whose logits are shifted by one (Dream) read the hidden state of the neighbour, here and nowhere else.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from transformers.modeling_outputs import MaskedLMOutput

from dgrpo.models import attention, blocks
from dgrpo.models.head import Scores, ScoringHead

EVERYWHERE = slice(None)


class ScoringPass(NamedTuple):
    """What one pass through the network shows and requests: U canvases, Q positions, T targets on these positions."""

    input_ids: Tensor  # [U, L]
    attention_mask: Tensor | None  # [U, L]; None when nothing is padded
    positions: Tensor  # [Q], ascending, distinct
    target_index: Tensor  # [T], ascending: the asked position (0..Q-1) on which targets[t] is scored
    targets: Tensor  # [T]
    columns: slice = EVERYWHERE  # of L, where all the asked positions are
    reference: Tensor | None = None  # [Q, d] the reference model's hidden states at the positions
    # Of models that attend block by block: [U, N, C], N noisy copies of the last C columns of the clean texts
    # `input_ids`. The positions are then flat indices into the copies (see models/blocks.py).
    copies: Tensor | None = None
    chunk: int = 32  # columns of the copies that go through the network together
    recompute: bool = False  # keep the activations of one chunk at a time, for one more forward pass of each


def _refuse_generate(*args, **kwargs):
    raise TypeError("Masked diffusion models are sampled by dgrpo.generate, not by transformers' generate().")


class MaskPredictor:
    """What every family adds to its transformers class: answers at chosen positions instead of logits everywhere.

    A family provides a `model` that `network` can call; a `ScoringHead` as output embedding; and `logit_shift` (1 when
    position i predicts token i + 1).
    """

    # Of the transformers class that comes after this one.
    config: Any
    model: Any
    get_input_embeddings: Callable[[], Any]
    get_output_embeddings: Callable[[], Any]
    named_modules: Callable[..., Any]
    set_submodule: Callable[..., None]
    logit_shift = 0

    def network(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, past_key_values: Any, columns: slice
    ) -> Tensor:
        """Hidden states [B, n, d] after the final norm at `columns` of the L positions; `mask` of `attention_mask`."""
        return self.model(input_ids, mask, position_ids, past_key_values, columns)

    @property
    def block_length(self) -> int | None:
        """Tokens in a block of a model that attends block by block; None where every token sees every other."""
        return getattr(self.config, "block_length", None)

    def __init__(self, config, *args, **kwargs):
        attention = config._attn_implementation or "sdpa"
        if attention not in ("sdpa", "eager") and "flash" not in attention:
            # Flex attention, for one, would add a mask of trues and falses to its scores.
            raise ValueError(f"attn_implementation={attention!r}: choose 'sdpa', 'eager' or 'flash_attention_2'.")
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # of the class after this one
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
        visible: Tensor | None = None,
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
        `columns` promises that all positions lie in this slice of the L columns: the last layer skips the others.
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
        assert input_ids is not None
        head = self.get_output_embeddings()
        if positions is None:
            hidden = self.hidden_states(input_ids, attention_mask, position_ids, past_key_values, visible)
            if self.logit_shift:
                hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
            return MaskedLMOutput(logits=head(hidden))
        return head(self._rows(positions, columns, input_ids, attention_mask, position_ids, past_key_values, visible))

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        visible: Tensor | None = None,
        columns: slice = EVERYWHERE,
    ) -> Tensor:
        """Hidden states [B, n, d] after the final norm at `columns` of the L tokens `input_ids` [B, L].

        Args:
            attention_mask: [B, K], False on padding, of the stored tokens and these.
            position_ids: [B or 1, L]; by default the columns, or the distance from the first token that is no pad
                where attention is block by block.
            past_key_values: keys and values of tokens before these (BlockPast, Clean), or around them (WindowCache).
            visible: [B or 1, L, K] bool, who sees whom apart from padding; by default what the family's attention
                says, with these tokens the last of K.
        """
        config, length = self.config, input_ids.shape[1]
        if self.block_length is not None:
            stored = 0 if past_key_values is None else past_key_values.length
            if visible is None:
                sizes = (length, stored + length, self.block_length)
                visible = attention.block_causal(*sizes, attention_mask, input_ids.device)
            if position_ids is None and attention_mask is not None:
                position_ids = attention.positions_of(attention_mask)[:, -length:]
            elif position_ids is None:
                position_ids = torch.arange(stored, stored + length, device=input_ids.device)[None]
        elif position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        dtype = self.get_input_embeddings().weight.dtype
        mask = attention.attention_mask(attention_mask, visible, config._attn_implementation, dtype)
        return self.network(input_ids, mask, position_ids, past_key_values, columns)

    def _rows(self, positions: Tensor, columns: slice, input_ids: Tensor, *context: Any) -> Tensor:
        """Hidden states [Q, d] that predict the tokens at `positions`, all of them in `columns`."""
        length = input_ids.shape[1]
        if columns.start:
            columns = slice(columns.start - self.logit_shift, columns.stop)
        hidden = self.hidden_states(input_ids, *context, columns=columns)  # type: ignore[misc]  # context ends before it
        column = positions % length
        if self.logit_shift:
            column = column - (column > 0).long()
        return hidden.flatten(0, 1)[positions // length * hidden.shape[1] + column - (columns.start or 0)]

    def _score(self, asked: ScoringPass, temperature: float, entropy_grad: bool) -> Scores:
        head, rows = self.get_output_embeddings(), self._asked_rows(asked)
        return head(rows, asked.target_index, asked.targets, temperature, entropy_grad, asked.reference)

    def _asked_rows(self, asked: ScoringPass) -> Tensor:
        if asked.copies is not None:
            return blocks.copies_hidden_states(self, asked)
        return self._rows(asked.positions, asked.columns, asked.input_ids, asked.attention_mask)
