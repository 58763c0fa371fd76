"""diffu-GRPO as the paper states it and as d1 runs it, written plainly: what the benchmarks measure against.

Full-length logits at every step, float32 Gumbel noise over the whole vocabulary, one row of the network per rollout in
scoring, and the old and reference log-probabilities of all inner iterations in one stacked pass. Nothing is done
slowly on purpose: each function is what one writes from the equations with ordinary tensor operations.

Shapes: B rollouts, P prompt tokens, C completion tokens, L = P + C, mu inner iterations, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def gumbel_argmax(logits: Tensor, temperature: float) -> Tensor:
    """Tokens [...] drawn from softmax(logits / temperature) [..., V] by the Gumbel-max trick."""
    if temperature == 0:
        return logits.argmax(-1)
    noise = torch.rand_like(logits)
    return (logits.exp() / (-noise.log()) ** temperature).argmax(-1)


@torch.no_grad()
def generate(model, prompt_ids: Tensor, config) -> Tensor:
    """Completions [B, C] by low-confidence remasking (LLaDA, arXiv:2502.09992, algorithm 5), nothing left out."""
    mask_id, prompt_width = model.config.mask_token_id, prompt_ids.shape[1]
    shape = (len(prompt_ids), config.max_completion_length)
    canvas = torch.cat([prompt_ids, prompt_ids.new_full(shape, mask_id)], 1)
    steps = config.diffusion_steps // config.num_blocks
    for block in range(config.num_blocks):
        stop = prompt_width + (block + 1) * config.block_length
        open_now = (canvas[:, stop - config.block_length : stop] == mask_id).sum(1)
        for step in range(steps):
            budget = open_now // steps + (step < open_now % steps)
            is_open = canvas == mask_id
            logits = model(canvas).logits
            logits[..., mask_id] = -torch.inf
            tokens = gumbel_argmax(logits, config.temperature)
            confidence = logits.softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
            confidence[:, stop:] = -torch.inf
            confidence = confidence.where(is_open, -torch.inf)
            tokens = tokens.where(is_open, canvas)
            for row in range(len(canvas)):
                chosen = confidence[row].topk(int(budget[row])).indices
                canvas[row, chosen] = tokens[row, chosen]
    return canvas[:, prompt_width:]


def masked_prompts(prompt_ids: Tensor, hidden: Tensor, mask_id: int, num_completion: int) -> Tensor:
    """Scoring inputs [..., L]: prompts with their `hidden` [..., P] tokens masked, and the whole completion masked."""
    prompts = torch.where(hidden, mask_id, prompt_ids)
    return F.pad(prompts, (0, num_completion), value=mask_id)


def token_logps(model, inputs: Tensor, completion_ids: Tensor) -> Tensor:
    """log p(completion token) [B, C] in float32 under `inputs` [B, L], the logits of the whole canvas first."""
    num_completion = completion_ids.shape[1]
    logits = model(inputs).logits[:, -num_completion:]
    losses = F.cross_entropy(logits.flatten(0, 1), completion_ids.flatten(), reduction="none")
    return -losses.view(completion_ids.shape).float()


@torch.no_grad()
def stacked_logps(model, inputs: Tensor, completion_ids: Tensor) -> Tensor:
    """The same for all inner iterations in one pass: inputs [mu, B, L] -> [mu, B, C]."""
    num_draws = len(inputs)
    logps = token_logps(model, inputs.flatten(0, 1), completion_ids.repeat(num_draws, 1))
    return logps.unflatten(0, (num_draws, -1))


def loss_of(logps: Tensor, old: Tensor, reference: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """d1's loss: clipped ratio with epsilon 0.5, k3 estimate of the KL with beta 0.04, mean over completion tokens."""
    ratio = (logps - old).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.5, 1.5) * advantages[:, None])
    gap = reference - logps
    return (((gap.exp() - gap - 1) * 0.04 - gain) * mask).sum() / mask.sum()


def clipped_loss(logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """The clipped part of d1's loss, summed over completion tokens; there is no reference model."""
    ratio = (logps - old).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - epsilon, 1 + epsilon) * advantages[:, None])
    return -(gain * mask).sum()
