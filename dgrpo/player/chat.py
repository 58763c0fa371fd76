"""A conversation with a model: in a terminal each answer is drawn while it is denoised, elsewhere it is plain text."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console

from dgrpo.evaluation.answers import as_in_training, encode_prompts, read_completions
from dgrpo.noise import row_keys
from dgrpo.player.live import LiveCanvas
from dgrpo.sampling import SamplerConfig, end_token_ids, generate
from dgrpo.text import printable

HELP = "/new starts a new conversation, /exit (or Ctrl-D) ends it."


def chat(
    model: Any,
    tokenizer: Any,
    config: SamplerConfig,
    *,
    system_prompt: str | None = None,
    seed: int = 0,
    steps_per_second: float = 30.0,
    template_settings: dict[str, Any] | None = None,
    console: Console | None = None,
    ask: Callable[[str], str] = input,
) -> None:
    """Answers line after line, each with the whole conversation before it, until the input ends.

    Args:
        seed: of the noise, which is a function of it and of the number of the line.
        steps_per_second: that are drawn, at most.
        ask: where lines come from; gets what to show before a line, raises EOFError at the end.
    """
    console = console or Console()
    first = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = list(first)
    if console.is_terminal:
        console.print(HELP, style="dim")
    number, device = 0, model.get_input_embeddings().weight.device
    with as_in_training(model):
        while True:
            try:
                line = ask("> " if console.is_terminal else "").strip()
            except EOFError:
                break
            if line == "/exit":
                break
            if line == "/new":
                messages = list(first)
            if not line or line == "/new":
                continue
            messages.append({"role": "user", "content": line})
            prompt_ids, prompt_mask = encode_prompts(tokenizer, [messages], device, template_settings)
            keys = row_keys(torch.tensor([number]), "chat", seed)
            sample = partial(generate, model, prompt_ids, prompt_mask, config, row_keys=keys)
            if console.is_terminal:
                with LiveCanvas(tokenizer, console, steps_per_second) as canvas:
                    rollout = sample(on_step=canvas)
                    canvas.finish(rollout)
            else:
                rollout = sample()
            [text], [ended] = read_completions(rollout, tokenizer, end_token_ids(model))
            if not console.is_terminal:
                console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
            elif not ended:
                console.print("No end of text: raise --max_completion_length.", style="dim")
            messages.append({"role": "assistant", "content": text})
            number += 1
