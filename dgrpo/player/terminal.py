"""A rollout's denoising in the terminal, step by step; and the breaking of a canvas into lines, which images share."""

import time

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dgrpo.player.frames import COLOURS, LEVELS, LINE_END, PROMPT_LINES, Frame, frames, prompt_text
from dgrpo.sampling.rollout import Rollout

MUTED = "#808080"
HIDDEN, EMPTY, SQUARE = "\u2591", "\u25a1", "\u25a0"


def canvas_lines(frame: Frame, width: int) -> list[list[tuple[int, str]]]:
    """The completion broken into lines of at most `width` cells, between words where it can be.

    A line is a list of (position, character); a hidden position is one `HIDDEN` character, whatever comes of it. A
    token that is nothing but line ends shows a mark.
    """
    lines: list[list[tuple[int, str]]] = []
    line: list[tuple[int, str]] = []
    used = 0
    for position, token in enumerate(frame.tokens[: frame.length]):
        text = HIDDEN if token is None else token.text if token.text.strip("\n") else LINE_END + token.text
        for char in text:
            if char == "\n":
                lines.append(line)
                line, used = [], 0
                continue
            if used + cell_len(char) > width:
                breaks = (k for k, (p, c) in enumerate(line) if c == " " or frame.tokens[p] is None)
                space = max(breaks, default=-1)
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
    at_work = [number for position, number in line_of.items() if position // frame.block_length == frame.block]
    new = [number for position, number in line_of.items() if frame.fresh(position)]
    start = max(min(at_work, default=0), max(new, default=0) - height + 1)
    start = max(0, min(start, len(lines) - height))
    return lines[start : start + height]


def _legend() -> Text:
    legend = Text("confidence  ", style=MUTED)
    for colour, label in zip(COLOURS, (*(f"<{bound}" for bound in LEVELS), f"{LEVELS[-1]}-1"), strict=True):
        legend.append(f"{SQUARE} ", style=colour).append(f"{label}  ", style=MUTED)
    return legend


def _style(frame: Frame, position: int) -> str:
    """How a position looks: hidden again in this step, hidden, given, new, or old; italic where it was overwritten."""
    token = frame.tokens[position]
    if token is None:
        return f"bold {COLOURS[0]}" if position in frame.rehidden else MUTED
    if token.step < 0:
        return "underline"
    look = f"bold #ffffff on {COLOURS[token.level]}" if frame.fresh(position) else COLOURS[token.level]
    return f"italic {look}" if token.earlier else look


def render(frame: Frame, *, prompt: str = "", num_steps: int, width: int, height: int = 1000) -> Panel:
    """One frame as a panel `width` cells wide and at most `height` lines of text high."""
    inner = width - 4
    body = Text(no_wrap=True, overflow="crop")
    for number, line in enumerate(window(canvas_lines(frame, inner), frame, height)):
        body.append("\n" if number else "")
        for position, char in line:
            body.append(char, style=_style(frame, position))
    canvas = Text()
    for position, token in enumerate(frame.tokens):
        if position and position % frame.block_length == 0:
            canvas.append(" ")
        colour = MUTED if token is None else COLOURS[token.level]
        canvas.append(
            EMPTY if token is None else SQUARE, style=f"dim {colour}" if position >= frame.length else colour
        )
    question = Text("\n".join(line for line in prompt.splitlines() if line.strip()), style=MUTED)
    question = Text("\n").join(question.wrap(Console(width=inner), inner)[-PROMPT_LINES:])
    num_tokens, num_shown = len(frame.tokens), sum(token is not None for token in frame.tokens)
    status = (
        f"step {frame.step + 1:>{len(str(num_steps))}}/{num_steps}   block {frame.block + 1}/{frame.num_blocks}   "
        f"{num_shown:>{len(str(num_tokens))}}/{num_tokens} tokens"
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


def room(console: Console, num_tokens: int) -> tuple[int, int]:
    """Width of the panel, and lines of text that fit beside its border, prompt, canvas and legend."""
    width = min(console.width, 100)
    return width, max(3, console.height - 14 - num_tokens // width)


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
    prompt, (width, height) = prompt_text(rollout, tokenizer, row), room(console, len(shots[0].tokens))
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
