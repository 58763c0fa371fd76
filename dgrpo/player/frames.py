"""Watching a rollout: its denoising step by step, in the terminal; rollouts on disk.

A frame is one moment of the reverse process. Web pages and images are drawn from the same frames, by
`dgrpo.player.export`.
"""

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dgrpo.sampling.rollout import Rollout
from dgrpo.text import printable

# Upper ends of the first four of five confidence levels, and a colour for each that is legible on black and on white.
LEVELS = (0.3, 0.5, 0.7, 0.9)
COLOURS = ("#d9432f", "#c06000", "#8f7d00", "#0d8a6a", "#2a78d6")
MUTED = "#808080"
PROMPT_LINES = 4
HIDDEN, LINE_END, EMPTY, SQUARE = "\u2591", "\u21b5", "\u25a1", "\u25a0"


@dataclass(frozen=True)
class Token:
    """One position of the completion: what it became, when, and how sure the model was."""

    text: str
    step: int  # denoising step that committed it; -1 given in advance, `num_steps` never
    confidence: float  # probability of the token when it was committed
    entropy: float  # nats, of the model's distribution at that moment
    block: int
    after_end: bool  # beyond the first end-of-text token: not part of the completion

    @property
    def level(self) -> int:
        """Which of the five confidence levels, 0 for the least sure."""
        return sum(self.confidence >= bound for bound in LEVELS)


@dataclass(frozen=True)
class Frame:
    """The completion after one denoising step; step -1 is the canvas before the first."""

    step: int
    block: int
    tokens: tuple[Token, ...]

    def shown(self, token: Token) -> bool:
        return token.step <= self.step

    def fresh(self, token: Token) -> bool:
        """Committed at this very step."""
        return token.step == self.step >= 0


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


def frames(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, row: int = 0, block_length: int | None = None
) -> list[Frame]:
    """What the completion of one row looked like before the first step and after each step that committed a token.

    block_length: as sampled; None reads it off the order of commitment.
    """
    if not -len(rollout.completion_ids) <= row < len(rollout.completion_ids):
        raise ValueError(f"row={row}: the rollout has rows 0 to {len(rollout.completion_ids) - 1}.")
    block_length = block_length or block_length_of(rollout)
    tokens = tuple(
        Token(text, step, confidence, entropy, position // block_length, not kept)
        for position, (text, step, confidence, entropy, kept) in enumerate(
            zip(
                token_texts(tokenizer, rollout.completion_ids[row].tolist()),
                rollout.revealed_at[row].tolist(),
                rollout.confidence[row].tolist(),
                rollout.entropy[row].tolist(),
                rollout.completion_mask[row].tolist(),
                strict=True,
            )
        )
    )
    block_of = {token.step: token.block for token in tokens if 0 <= token.step < rollout.num_steps}
    return [Frame(-1, 0, tokens), *(Frame(step, block_of[step], tokens) for step in sorted(block_of))]


def prompt_text(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> str:
    """The prompt of one row, without padding and special tokens."""
    ids = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()].tolist()
    return printable(str(tokenizer.decode(ids, skip_special_tokens=True))).strip()


def canvas_lines(tokens: tuple[Token, ...], width: int) -> list[list[tuple[int, str]]]:
    """The completion broken into lines of at most `width` cells, between words where it can be.

    A line is a list of (position, character). Positions after the end are left out; a token that is nothing but line
    ends shows a mark.
    """
    lines: list[list[tuple[int, str]]] = []
    line: list[tuple[int, str]] = []
    used = 0
    for position, token in enumerate(tokens):
        if token.after_end:
            break
        text = token.text if token.text.strip("\n") else LINE_END + token.text
        for char in text:
            if char == "\n":
                lines.append(line)
                line, used = [], 0
                continue
            if used + cell_len(char) > width:
                space = max((index for index, (_, c) in enumerate(line) if c == " "), default=-1)
                cut = len(line) if char == " " else space + 1 or len(line)
                lines.append(line[:cut])
                line = line[cut:]
                used = sum(cell_len(c) for _, c in line)
                if char == " ":
                    continue
            line.append((position, char))
            used += cell_len(char)
    return [*lines, line]


def window(lines: list[list[tuple[int, str]]], frame: Frame, height: int) -> list[list[tuple[int, str]]]:
    """At most `height` consecutive lines, from the start of the block at work unless what is new lies further down."""
    line_of = {position: number for number, line in enumerate(lines) for position, _ in line}
    at_work = [number for position, number in line_of.items() if frame.tokens[position].block == frame.block]
    new = [number for position, number in line_of.items() if frame.fresh(frame.tokens[position])]
    start = max(min(at_work, default=0), max(new, default=0) - height + 1)
    start = max(0, min(start, len(lines) - height))
    return lines[start : start + height]


def _legend() -> Text:
    legend = Text("confidence  ", style=MUTED)
    for colour, label in zip(COLOURS, (*(f"<{bound}" for bound in LEVELS), f"{LEVELS[-1]}-1"), strict=True):
        legend.append(f"{SQUARE} ", style=colour).append(f"{label}  ", style=MUTED)
    return legend


def render(frame: Frame, *, prompt: str = "", num_steps: int, width: int, height: int = 1000) -> Panel:
    """One frame as a panel `width` cells wide and at most `height` lines of text high, for a terminal."""
    tokens, inner = frame.tokens, width - 4
    body = Text(no_wrap=True, overflow="crop")
    for number, line in enumerate(window(canvas_lines(tokens, inner), frame, height)):
        body.append("\n" if number else "")
        for position, char in line:
            token = tokens[position]
            if not frame.shown(token):
                body.append(HIDDEN * cell_len(char), style=MUTED)
            elif token.step < 0:
                body.append(char, style="underline")
            else:
                fresh = f"bold #ffffff on {COLOURS[token.level]}"
                body.append(char, style=fresh if frame.fresh(token) else COLOURS[token.level])
    canvas = Text()
    for position, token in enumerate(tokens):
        if position and token.block != tokens[position - 1].block:
            canvas.append(" ")
        colour = COLOURS[token.level] if frame.shown(token) else MUTED
        canvas.append(SQUARE if frame.shown(token) else EMPTY, style=f"dim {colour}" if token.after_end else colour)
    question = Text("\n".join(line for line in prompt.splitlines() if line.strip()), style=MUTED)
    question = Text("\n").join(question.wrap(Console(width=inner), inner)[-PROMPT_LINES:])
    num_shown, num_blocks = sum(map(frame.shown, tokens)), tokens[-1].block + 1
    status = (
        f"step {frame.step + 1:>{len(str(num_steps))}}/{num_steps}   block {frame.block + 1}/{num_blocks}   "
        f"{num_shown:>{len(str(len(tokens)))}}/{len(tokens)} tokens"
    )
    parts = [question, Text()] if question else []
    return Panel(
        Group(*parts, body, Text(), canvas, Text(), _legend()),
        title="denoising",
        subtitle=status,
        title_align="left",
        subtitle_align="left",
        border_style=MUTED,
        width=width,
    )


def play(
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
    row: int = 0,
    *,
    steps_per_second: float = 12.0,
    block_length: int | None = None,
    console: Console | None = None,
) -> None:
    """Play one row's denoising in the terminal; where the output is no terminal, only its last frame is written."""
    console = console or Console()
    shots = frames(rollout, tokenizer, row, block_length)
    prompt, width = prompt_text(rollout, tokenizer, row), min(console.width, 100)
    # Border, prompt, canvas and legend need the rest of the screen.
    height = max(3, console.height - 14 - len(shots[0].tokens) // width)
    last = render(shots[-1], prompt=prompt, num_steps=rollout.num_steps, width=width)
    if not console.is_terminal:
        console.print(last)
        return
    with Live(console=console, auto_refresh=False) as live:
        for shot in shots:
            panel = render(shot, prompt=prompt, num_steps=rollout.num_steps, width=width, height=height)
            live.update(panel, refresh=True)
            time.sleep(1 / steps_per_second)
        live.update(last)


def save_rollout(path: str | Path, rollout: Rollout) -> None:
    """Store a rollout as one safetensors file."""
    values = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    tensors = {name: value.detach().cpu().clone() for name, value in values.items() if isinstance(value, Tensor)}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata={name: str(value) for name, value in values.items() if name not in tensors})


def load_rollout(path: str | Path) -> Rollout:
    """The rollout that `save_rollout` stored; ValueError when the file holds something else."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file is no dict
        numbers = file.metadata() or {}
    if missing := [field.name for field in fields(Rollout) if field.name not in {*tensors, *numbers}]:
        raise ValueError(f"{path} is no stored rollout: it lacks {', '.join(missing)}.")
    values: dict[str, Any] = {name: int(number) for name, number in numbers.items() if name != "format"} | tensors
    return Rollout(**{field.name: values[field.name] for field in fields(Rollout)})
