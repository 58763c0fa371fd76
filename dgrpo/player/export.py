"""A rollout's denoising as a web page and as an animated image."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from rich.cells import cell_len
from transformers import PreTrainedTokenizerBase

from dgrpo.player.frames import COLOURS, LEVELS, PROMPT_LINES, Frame, canvas_lines, frames, prompt_text
from dgrpo.report.page import write_page
from dgrpo.sampling.rollout import Rollout

# Ink, muted ink, empty positions and ground of the image; then the grounds of the five confidence levels.
LIGHT = ("#1b1b1a", "#6d6c67", "#e2e1dc", "#ffffff"), ("#f9c4bb", "#f9d3a6", "#efe3a0", "#c3e8d6", "#d4e5fa")
DARK = ("#efeeea", "#a3a29b", "#363531", "#1e1e1c"), ("#6e2b22", "#65400f", "#524a10", "#164a3a", "#1d3a5e")


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
    rows = range(len(rollout.completion_ids)) if rows is None else rows
    players = []
    for row in rows:
        shots = frames(rollout, tokenizer, row, block_length)
        tokens = [
            {
                "text": token.text,
                "step": token.step,
                "confidence": round(token.confidence, 4),
                "entropy": round(token.entropy, 4),
                "block": token.block,
                "after_end": token.after_end,
            }
            for token in shots[0].tokens
        ]
        steps = [shot.step for shot in shots]
        players.append({"prompt": prompt_text(rollout, tokenizer, row), "tokens": tokens, "steps": steps})
    return write_page(path, "player", title, {"levels": LEVELS, "num_steps": rollout.num_steps, "rows": players})


def _thinned(shots: list[Frame], limit: int) -> list[Frame]:
    """At most `limit` of the frames, evenly spaced, with the first and the last."""
    if len(shots) <= limit:
        return shots
    return [shots[round(index * (len(shots) - 1) / (limit - 1))] for index in range(limit)]


def _draw(frame: Frame, last_step: int, num_steps: int, question: list[str], columns: int, dark: bool) -> Image.Image:
    """One frame of the image; what was committed after `last_step` is underlined."""
    (ink, muted, empty, ground), tints = DARK if dark else LIGHT
    cell, row_height, margin = 11, 28, 22
    # A character of this font is 0.602 of the size wide.
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), cell / 0.602)
    tokens, lines = frame.tokens, canvas_lines(frame.tokens, columns)
    per_row = columns * cell // 10
    canvas_rows = -(-len(tokens) // per_row)
    top = margin + row_height * len(question) + (12 if question else 0)
    below = top + row_height * len(lines) + 14
    image = Image.new("RGB", (2 * margin + columns * cell, below + 10 * canvas_rows + 44), ground)
    draw = ImageDraw.Draw(image)
    for number, text in enumerate(question):
        draw.text((margin, margin + row_height * number), text, fill=muted, font=font)
    for number, line in enumerate(lines):
        x, y = margin, top + row_height * number
        for position, char in line:
            token, width = tokens[position], cell * cell_len(char)
            box = (x, y, x + width - 1, y + row_height - 6)
            if frame.shown(token):
                draw.rectangle(box, fill=tints[token.level] if token.step >= 0 else ground)
                draw.text((x, y), char, fill=ink, font=font)
                if token.step > last_step:
                    draw.rectangle(
                        (x, y + row_height - 5, x + width - 1, y + row_height - 3), fill=COLOURS[token.level]
                    )
            else:
                draw.rectangle(box, fill=empty)
            x += width
    for position, token in enumerate(tokens):
        x, y = margin + 10 * (position % per_row), below + 10 * (position // per_row)
        draw.rectangle((x, y, x + 7, y + 7), fill=COLOURS[token.level] if frame.shown(token) else empty)
    status = f"step {frame.step + 1}/{num_steps}  block {frame.block + 1}/{tokens[-1].block + 1}"
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

    columns: characters to a line. max_frames: a longer rollout skips steps, at the same speed.
    """
    shots = frames(rollout, tokenizer, row, block_length)
    kept = _thinned(shots, max_frames)
    prompt = prompt_text(rollout, tokenizer, row).splitlines()
    question = [line for paragraph in prompt for line in wrap(paragraph, columns)][-PROMPT_LINES:]
    before = [-1, *(shot.step for shot in kept)]
    images = [
        _draw(shot, last, rollout.num_steps, question, columns, dark) for shot, last in zip(kept, before, strict=False)
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
