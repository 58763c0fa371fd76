"""Filling the holes of a text: words stay where they are, and the model writes what is hidden between them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from dgrpo.evaluation.answers import as_in_training, encode_prompts
from dgrpo.logprobs import log_likelihood
from dgrpo.noise import row_keys
from dgrpo.sampling import SamplerConfig, end_token_ids, generate

HOLE = "[MASK]"


class Filled(NamedTuple):
    """A text without holes, and the bound of its log-likelihood in nats."""

    text: str
    bound: float
    num_tokens: int  # that were written


def with_holes(tokenizer: Any, text: str, num_tokens: int | None = None) -> list[int]:
    """Token ids of a text in which each `[MASK]` is a hidden token; `num_tokens` replaces those of its only hole.

    Raises:
        ValueError: A text without a hole, or a length where there are several holes.
    """
    pieces = text.replace(tokenizer.mask_token or HOLE, HOLE).split(HOLE)
    if len(pieces) == 1:
        raise ValueError(f"text={text!r} has no hole: write {HOLE} for each token that is to be filled in.")
    if num_tokens is not None:
        if any(pieces[1:-1]):
            raise ValueError(f"lengths={num_tokens}: the text has several holes; give one, or leave lengths out.")
        pieces = [pieces[0], *[""] * (num_tokens - 1), pieces[-1]]
    words = [tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else [] for piece in pieces]
    return words[0] + [token for each in words[1:] for token in (tokenizer.mask_token_id, *each)]


def fill(
    model: Any,
    tokenizer: Any,
    text: str,
    config: SamplerConfig,
    *,
    prompt: list[dict[str, str]] | None = None,
    template_settings: dict[str, Any] | None = None,
    lengths: Sequence[int] | None = None,
    num_samples: int = 1,
    num_views: int = 128,
    seed: int = 0,
) -> list[Filled]:
    """Different ways of filling a text's holes, the likeliest first.

    The whole text and the end behind it are one block; the end of text is never drawn. Candidates are compared by the
    lower bound of log p(text and its end | prompt), each on a canvas of its own length
    (`dgrpo.logprobs.log_likelihood`): p(hole | rest) alone would prefer short holes. With few views it is noisy.

    Args:
        text: with `[MASK]` for each hidden token; words beside a hole are tokenized apart from what fills it.
        config: how it is sampled; its lengths and steps are replaced, one token a step but under a parallel rule.
        prompt: messages before the text; left out, the text follows the tokenizer's BOS token, or its own first token.
        lengths: numbers of tokens to try for the text's only hole; left out, as many as it has masks.
        num_samples: of each length, at a temperature above 0.
        num_views: masked views of each candidate's bound.

    Raises:
        ValueError: A text without a hole, or that begins with one and has nothing before it; a model that attends
            block by block, which does not see what stands behind a hole.
    """
    if getattr(model, "block_length", None):
        raise ValueError(
            f"block_length={model.block_length}: this model attends block by block and does not see the words behind "
            "a hole. Take one with full attention."
        )
    device = model.get_input_embeddings().weight.device
    found: dict[str, Filled] = {}
    with as_in_training(model):
        tried: Sequence[int | None] = lengths or [None]
        for number, length in enumerate(tried):
            ids = with_holes(tokenizer, text, length)
            if prompt is not None:
                prompt_ids, _ = encode_prompts(tokenizer, [prompt], device, template_settings)
            elif tokenizer.bos_token_id is not None:
                prompt_ids = torch.tensor([[tokenizer.bos_token_id]], device=device)
            else:
                prompt_ids, ids = torch.tensor([ids[:1]], device=device), ids[1:]
                if prompt_ids[0, 0] == tokenizer.mask_token_id:
                    raise ValueError(f"text={text!r} begins with a hole: put a word or a prompt before it.")
            fixed = torch.tensor([[*ids, int(end_token_ids(model)[0])]] * num_samples, device=device)
            hidden = fixed[0] == tokenizer.mask_token_id
            settings = replace(
                config,
                max_completion_length=fixed.shape[1],
                block_length=fixed.shape[1],
                diffusion_steps=int(hidden.sum()),
                logits_eos_inf=True,
                stop_at_eos=False,
            )
            prompts = prompt_ids.repeat(num_samples, 1)
            keys = row_keys(torch.arange(num_samples) + number * num_samples, "fill", seed)
            rollout = generate(
                model, prompts, torch.ones_like(prompts, dtype=torch.bool), settings, row_keys=keys, fixed=fixed
            )
            first = [] if prompt is not None or tokenizer.bos_token_id is not None else prompt_ids[0].tolist()
            for completion in rollout.completion_ids.unique(dim=0):
                generator = torch.Generator().manual_seed(seed)
                bound = log_likelihood(model, prompt_ids, completion[None], num_views, generator=generator).item()
                words = tokenizer.decode(first + completion[:-1].tolist())
                found[words] = Filled(words, bound, int(hidden.sum()))
    return sorted(found.values(), key=lambda each: -each.bound)
