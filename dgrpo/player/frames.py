"""A rollout as frames: the canvas before the first denoising step and after each step that changed it.

A frame shows what was known at its moment and no more: a hidden position has no text and one width, and where the
completion ends is seen only once its end is committed. Terminal, page and image are drawn from the same frames.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from dgrpo.sampling.rollout import Rollout
from dgrpo.text import printable

# Upper ends of the first four of five confidence levels, and a colour for each that is legible on black and on white.
LEVELS = (0.3, 0.5, 0.7, 0.9)
COLOURS = ("#d9432f", "#c06000", "#8f7d00", "#0d8a6a", "#2a78d6")
PROMPT_LINES = 4
LINE_END = "\u21b5"


@dataclass(frozen=True)
class Token:
    """A token that stands on the canvas."""

    text: str
    step: int  # denoising step that wrote it; -1 given in advance
    confidence: float  # its probability when it was written
    entropy: float  # nats, of the model's distribution at that moment
    ends: bool = False  # the completion ends here
    earlier: tuple[str, ...] = ()  # tokens that stood here before: overwritten, or hidden again

    @property
    def level(self) -> int:
        """Which of the five confidence levels, 0 for the least sure."""
        return sum(self.confidence >= bound for bound in LEVELS)


@dataclass(frozen=True)
class Frame:
    """The canvas of one completion after one denoising step; step -1 is the canvas before the first."""

    step: int
    tokens: tuple[Token | None, ...]  # None: hidden
    block_length: int
    block: int = 0  # the block that the step worked on
    rehidden: frozenset[int] = frozenset()  # positions that the step hid again

    @property
    def length(self) -> int:
        """Positions up to and including the end of the completion; the whole canvas while no end is committed."""
        ends = (position for position, token in enumerate(self.tokens) if token is not None and token.ends)
        return next(ends, len(self.tokens) - 1) + 1

    @property
    def num_blocks(self) -> int:
        return -(-len(self.tokens) // self.block_length)

    def fresh(self, position: int, since: int | None = None) -> bool:
        """Whether the token was written by this very step, or after the step `since`."""
        token = self.tokens[position]
        return token is not None and token.step >= 0 and token.step > (self.step - 1 if since is None else since)


class Canvas:
    """A canvas of hidden tokens that is written step by step."""

    def __init__(self, length: int, block_length: int):
        self.tokens: list[Token | None] = [None] * length
        self.block_length = block_length
        self.earlier: dict[int, tuple[str, ...]] = {}

    def write(self, step: int, changes: list[tuple[int, Token | None]]) -> Frame:
        """The frame after a step that wrote these (position, token), None where it hid a token again."""
        for position, token in changes:
            if (before := self.tokens[position]) is not None:
                self.earlier[position] = (*before.earlier, before.text)
            self.tokens[position] = token and replace(token, earlier=self.earlier.get(position, ()))
        rehidden = frozenset(position for position, token in changes if token is None)
        block = changes[0][0] // self.block_length if changes and step >= 0 else 0
        return Frame(step, tuple(self.tokens), self.block_length, block, rehidden)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the text of the tokens before it; of a character split over tokens, the last has it."""
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if end < len(ids):
            text = text.rstrip("\ufffd")
        texts.append(printable(text[len(done) :]) if len(text) > len(done) else "")
        done = text if len(text) > len(done) else done
    return texts


def block_length_of(rollout: Rollout) -> int:
    """The shortest block length that the order of commitment agrees with, C when the canvas was one block.

    Blocks are denoised one after another in equal shares of the steps, so a block's tokens carry its steps' numbers.
    """
    length = rollout.completion_ids.shape[1]
    denoised = (rollout.revealed_at >= 0) & (rollout.revealed_at < rollout.num_steps)
    position = torch.arange(length, device=denoised.device)
    for size in range(1, length):
        num_blocks, rest = divmod(length, size)
        if rest or rollout.num_steps % num_blocks:
            continue
        block_of_step = rollout.revealed_at * num_blocks // rollout.num_steps
        if bool(((block_of_step == position // size) | ~denoised).all()):
            return size
    return length


def _writes(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, row: int
) -> Iterable[tuple[int, list[tuple[int, Token | None]]]]:
    """The changes of one row's canvas by step: (position, its new token, or None where it was hidden again).

    A rollout keeps confidence and entropy of a position's last token only; earlier ones have 0.
    """
    # The end of a prompt that begins the canvas is read with the prompt.
    tail = int(rollout.prompt_tail[row])
    ids, kept = rollout.completion_ids[row].tolist(), rollout.completion_mask[row, tail:].tolist()
    texts, last = [""] * tail + token_texts(tokenizer, ids[tail:]), tail + sum(kept) - 1

    def final(position: int, step: int) -> Token:
        confidence, entropy = rollout.confidence[row, position].item(), rollout.entropy[row, position].item()
        return Token(texts[position], step, confidence, entropy, ends=position == last and not all(kept))

    revealed_at = rollout.revealed_at[row].tolist()
    steps: dict[int, list[tuple[int, Token | None]]] = {-1: []}
    steps[-1] += [(position, final(position, -1)) for position, step in enumerate(revealed_at) if step == -1]
    for step, position, token_id in rollout.history[row].tolist():
        # Filled up, or drawn behind the end.
        if step < 0 or revealed_at[position] == rollout.num_steps:
            continue
        token = None
        if step == revealed_at[position]:
            token = final(position, step)
        elif token_id >= 0:
            token = Token(token_texts(tokenizer, [*ids[tail:position], token_id])[-1], step, 0.0, 0.0)
        steps.setdefault(step, []).append((position, token))
    return sorted(steps.items())


def frames(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, row: int = 0, block_length: int | None = None
) -> list[Frame]:
    """What the completion of one row looked like before the first step and after each step that changed it.

    Args:
        block_length: as sampled; None: that of the model's attention, or read off the order of commitment.
    """
    if not -len(rollout.completion_ids) <= row < len(rollout.completion_ids):
        raise ValueError(f"row={row}: the rollout has rows 0 to {len(rollout.completion_ids) - 1}.")
    block_length = block_length or rollout.block_length or block_length_of(rollout)
    canvas = Canvas(rollout.completion_ids.shape[1], block_length)
    return [canvas.write(step, changes) for step, changes in _writes(rollout, tokenizer, row)]


def prompt_text(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> str:
    """The prompt of one row, without padding and special tokens."""
    ids = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()].tolist()
    ids += rollout.completion_ids[row, : rollout.prompt_tail[row]].tolist()
    return printable(str(tokenizer.decode(ids, skip_special_tokens=True))).strip()
