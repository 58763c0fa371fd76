"""A canvas drawn in the terminal while the sampler writes it."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from transformers import PreTrainedTokenizerBase

from dgrpo.player.frames import Canvas, Frame, Token, frames, token_texts
from dgrpo.player.terminal import render, room
from dgrpo.sampling.denoise import Denoiser
from dgrpo.sampling.rollout import Rollout


class LiveCanvas:
    """Draws the first row of a batch after each step: `generate(..., on_step=canvas)` inside `with canvas:`.

    Args:
        steps_per_second: at most; a model that is slower is not slowed down.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console, steps_per_second: float):
        self.tokenizer, self.console, self.pause = tokenizer, console, 1 / steps_per_second
        self.canvas: Canvas | None = None
        self.num_steps, self.shown_at = 0, float("-inf")
        self.live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> "LiveCanvas":
        self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)

    def __call__(self, loop: Denoiser) -> None:
        """Draws what the loop's last step wrote."""
        tail = int(loop.prompt_tail[0])
        if self.canvas is None:
            self.canvas = Canvas(loop.config.max_completion_length, loop.block_length)
            self.num_steps = loop.config.steps_per_block * loop.config.num_blocks
            self.canvas.write(-1, [(position, Token("", -1, 1.0, 0.0)) for position in range(tail)])
        _, columns, steps, ids, probs, entropy = (value[0].tolist() for value in loop.log[-1])
        changed = [k for k, step in enumerate(steps) if step >= 0]
        if not changed:
            return
        # Texts within the block: a character that is split between two blocks is only seen at the end.
        start = columns[0] // loop.block_length * loop.block_length
        first = loop.prompt_width + start
        texts = token_texts(self.tokenizer, loop.ids[0, first : first + loop.block_length].tolist())
        changes: list[tuple[int, Token | None]] = []
        for k in changed:
            position, ends = columns[k], columns[k] >= tail and ids[k] in loop.end_ids.tolist()
            token = Token(texts[position - start], steps[k], probs[k], entropy[k], ends)
            changes.append((position, None if ids[k] == loop.mask_token_id else token))
        time.sleep(max(0.0, self.shown_at + self.pause - time.monotonic()))
        self._show(self.canvas.write(steps[changed[0]], changes))
        self.shown_at = time.monotonic()

    def finish(self, rollout: Rollout) -> None:
        """Leaves the whole completion on the screen."""
        self._show(frames(rollout, self.tokenizer)[-1], whole=True)

    def _show(self, frame: Frame, whole: bool = False) -> None:
        width, height = room(self.console, len(frame.tokens))
        panel = render(
            frame, num_steps=self.num_steps, width=width, height=len(frame.tokens) * 99 if whole else height
        )
        self.live.update(panel, refresh=True)
