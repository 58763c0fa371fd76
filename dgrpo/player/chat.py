"""A conversation with a model: in a terminal each answer is played as it was denoised, elsewhere it is plain text."""

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from dgrpo.evaluation.answers import as_in_training, encode_prompts, read_completions
from dgrpo.noise import row_keys
from dgrpo.player.terminal import play
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
    steps_per_second: float = 8.0,
    template_settings: dict[str, Any] | None = None,
    console: Console | None = None,
    ask: Callable[[str], str] = input,
) -> None:
    """Answers line after line, each with the whole conversation before it, until the input ends.

    Args:
        seed: of the noise, which is a function of it and of the number of the line.
        steps_per_second: of what is played.
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
            rollout = generate(model, prompt_ids, prompt_mask, config, row_keys=keys)
            [text], [ended] = read_completions(rollout, tokenizer, end_token_ids(model))
            if console.is_terminal:
                play(rollout, tokenizer, steps_per_second=steps_per_second, console=console)
                if not ended:
                    console.print("No end of text: raise --max_completion_length.", style="dim")
            else:
                console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
            messages.append({"role": "assistant", "content": text})
            number += 1
