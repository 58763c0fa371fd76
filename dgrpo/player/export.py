"""A rollout's denoising as a web page and as an animated image; rollouts on disk."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from rich.cells import cell_len
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dgrpo.player.frames import COLOURS, LEVELS, PROMPT_LINES, Frame, Token, frames, prompt_text
from dgrpo.player.terminal import canvas_lines
from dgrpo.report.page import write_page
from dgrpo.sampling.rollout import Rollout

# Ink, muted ink, empty positions and ground of the image; then the grounds of the five confidence levels.
LIGHT = ("#1b1b1a", "#6d6c67", "#e2e1dc", "#ffffff"), ("#f9c4bb", "#f9d3a6", "#efe3a0", "#c3e8d6", "#d4e5fa")
DARK = ("#efeeea", "#a3a29b", "#363531", "#1e1e1c"), ("#6e2b22", "#65400f", "#524a10", "#164a3a", "#1d3a5e")


def _as_json(token: Token | None) -> dict | None:
    if token is None:
        return None
    confidence, entropy = round(token.confidence, 4), round(token.entropy, 4)
    values = {"text": token.text, "step": token.step, "confidence": confidence, "entropy": entropy}
    return values | ({"ends": True} if token.ends else {}) | ({"earlier": token.earlier} if token.earlier else {})


def write_html(
    path: str | Path,
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[int] | None = None,
    *,
    block_length: int | None = None,
    title: str = "Denoising, step by step",
) -> Path:
    """Write one page that plays the denoising of the chosen rows (None: all), with a slider over the steps."""
    players = []
    for row in range(len(rollout.completion_ids)) if rows is None else rows:
        shots = frames(rollout, tokenizer, row, block_length)
        blank = (None,) * len(shots[0].tokens)
        steps = [
            {
                "step": shot.step,
                "block": shot.block,
                # What differs from the frame before, as [position, token or null].
                "changes": [
                    [position, _as_json(token)]
                    for position, (token, old) in enumerate(zip(shot.tokens, before, strict=True))
                    if token != old
                ],
            }
            for shot, before in zip(shots, [blank, *(shot.tokens for shot in shots)], strict=False)
        ]
        length, block = len(blank), shots[0].block_length
        players.append(
            {"prompt": prompt_text(rollout, tokenizer, row), "length": length, "block_length": block, "steps": steps}
        )
    return write_page(path, "player", title, {"levels": LEVELS, "num_steps": rollout.num_steps, "rows": players})


def _thinned(shots: list[Frame], limit: int) -> list[Frame]:
    """At most `limit` of the frames, evenly spaced, with the first and the last."""
    if len(shots) <= limit:
        return shots
    return [shots[round(index * (len(shots) - 1) / (limit - 1))] for index in range(limit)]


def _draw(
    frame: Frame, since: int, num_steps: int, question: list[str], columns: int, num_lines: int, dark: bool
) -> Image.Image:
    """One frame of the image, with room for `num_lines`; what was written after the step `since` is underlined."""
    (ink, muted, empty, ground), tints = DARK if dark else LIGHT
    cell, row_height, margin = 11, 28, 22
    # A character of this font is 0.602 of the size wide.
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), cell / 0.602)
    tokens = frame.tokens
    per_row = columns * cell // 10
    canvas_rows = -(-len(tokens) // per_row)
    top = margin + row_height * len(question) + (12 if question else 0)
    below = top + row_height * num_lines + 14
    image = Image.new("RGB", (2 * margin + columns * cell, below + 10 * canvas_rows + 44), ground)
    draw = ImageDraw.Draw(image)
    for number, text in enumerate(question):
        draw.text((margin, margin + row_height * number), text, fill=muted, font=font)
    for number, line in enumerate(canvas_lines(frame, columns)):
        x, y = margin, top + row_height * number
        for position, char in line:
            token, width = tokens[position], cell * cell_len(char)
            box, foot = (x, y, x + width - 1, y + row_height - 6), (x, y + row_height - 5, x + width - 1)
            if token is None:
                # A gap on the right tells one hidden token from the next.
                draw.rectangle((x, y, x + width - 3, y + row_height - 6), fill=empty)
                if position in frame.rehidden:
                    draw.rectangle((*foot[:2], x + width - 3, y + row_height - 3), fill=COLOURS[0])
            else:
                draw.rectangle(box, fill=tints[token.level] if token.step >= 0 else ground)
                draw.text((x, y), char, fill=ink, font=font)
                if frame.fresh(position, since):
                    draw.rectangle((*foot, y + row_height - 3), fill=COLOURS[token.level])
                if token.earlier:
                    draw.line((x, y + 2, x + width - 1, y + 2), fill=COLOURS[0])
            x += width
    for position, token in enumerate(tokens):
        x, y = margin + 10 * (position % per_row), below + 10 * (position // per_row)
        draw.rectangle((x, y, x + 7, y + 7), fill=empty if token is None else COLOURS[token.level])
    status = f"step {frame.step + 1}/{num_steps}  block {frame.block + 1}/{frame.num_blocks}"
    draw.text((margin, below + 10 * canvas_rows + 10), status, fill=muted, font=font)
    return image


def write_gif(
    path: str | Path,
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
    row: int = 0,
    *,
    steps_per_second: float = 8.0,
    block_length: int | None = None,
    columns: int = 72,
    dark: bool = False,
    max_frames: int = 120,
) -> Path:
    """Write one row's denoising as an animated image; the last frame stays for two seconds.

    Args:
        columns: characters to a line.
        max_frames: a longer rollout skips steps, at the same speed.
    """
    shots = frames(rollout, tokenizer, row, block_length)
    kept = _thinned(shots, max_frames)
    prompt = prompt_text(rollout, tokenizer, row).splitlines()
    question = [line for paragraph in prompt for line in wrap(paragraph, columns)][-PROMPT_LINES:]
    num_lines = max(len(canvas_lines(shot, columns)) for shot in kept)
    since = [-1, *(shot.step for shot in kept)]
    images = [
        _draw(shot, last, rollout.num_steps, question, columns, num_lines, dark)
        for shot, last in zip(kept, since, strict=False)
    ]
    # One palette for all frames keeps colours from flickering; the first and the last frame have all of them.
    both = Image.new("RGB", (images[0].width, 2 * images[0].height))
    both.paste(images[0], (0, 0))
    both.paste(images[-1], (0, images[0].height))
    palette = both.quantize(colors=64)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    pause = round(1000 / steps_per_second * len(shots) / len(kept))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=[pause] * (len(images) - 1) + [2000], loop=0
    )
    return path


def save_rollout(path: str | Path, rollout: Rollout) -> None:
    """Store a rollout as one safetensors file."""
    values = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    tensors = {name: value.detach().cpu().clone() for name, value in values.items() if isinstance(value, Tensor)}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata={name: str(value) for name, value in values.items() if name not in tensors})


def load_rollout(path: str | Path) -> Rollout:
    """The rollout that `save_rollout` stored; ValueError when the file holds something else."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file is no dict
            numbers = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no stored rollout: {error}.") from error
    numbers = {name: number for name, number in numbers.items() if number != "None"}
    # Rollouts stored before there were such fields lack them.
    later = {"history", "prompt_tail", "block_length"} - {*tensors, *numbers}
    names = [field.name for field in fields(Rollout) if field.name not in later]
    if missing := [name for name in names if name not in {*tensors, *numbers}]:
        raise ValueError(f"{path} is no stored rollout: it lacks {', '.join(missing)}.")
    values: dict[str, Any] = {name: int(number) for name, number in numbers.items() if name != "format"} | tensors
    return Rollout(**{name: values[name] for name in names})
