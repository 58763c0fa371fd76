"""Estimators of a completion's log-probability: each is a distribution over masked views.

estimator(rollout, *, generator, **settings) -> MaskedViews. Of the rollout an estimator may read `prompt_mask` [B, P],
`completion_ids`, `completion_mask`, `revealed_at`, `entropy` [B, C], `group` [B], `num_steps`, and `history` where
tokens were written more than once. Tokens after the first end-of-text token get weight 0; hidden positions are drawn
over the whole canvas, or its open part would tell the answer's length. The number of views follows from the settings
and the canvas alone, never from the text.

Of a model that attends block by block, `dgrpo.views.views_of` gives an estimator each block as a canvas of its own.

Shapes: B rollouts, N views of each, P prompt tokens (padded on the left), C completion tokens, L = P + C.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from dgrpo.views import MaskedViews


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform noise; float64, because float32 ties would bias which masks are drawn."""
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _from_the_end(generator: torch.Generator, num_rows: int, width: int) -> Tensor:
    """Uniform noise [num_rows, width]; the last column is drawn first, so padding on the left only adds draws."""
    return torch.rand(width, num_rows, generator=generator).flip(0).t()


def _prompt_noise(rollout, generator: torch.Generator, scope: str) -> Tensor:
    """Uniform noise [B, P] for the prompt, one draw per group or per row; position counted from the prompt's end."""
    num_rows, width = rollout.prompt_mask.shape
    if scope not in ("group", "row"):
        raise ValueError(
            f"prompt_mask_scope={scope!r}: choose 'group' (one prompt mask for all rollouts of a prompt) or 'row'."
        )
    unit = torch.arange(num_rows) if scope == "row" else rollout.group.cpu().unique(return_inverse=True)[1]
    return _from_the_end(generator, int(unit.max()) + 1, width)[unit].to(rollout.prompt_mask.device)


def _subsets(noise: Tensor, counts: Tensor) -> Tensor:
    """Which of the C positions are hidden, [B, N, C] bool: `counts` [B, N] of them, every subset equally likely."""
    return noise.argsort(-1).argsort(-1) < counts[..., None]


def _range_of_counts(size: Tensor, min_ratio: float, max_ratio: float, complementary: bool) -> tuple[Tensor, Tensor]:
    """The fewest positions of `size` that a view hides, and how many counts there are from these on."""
    # 0.1 * 30 is a little more than 3.
    lowest = (min_ratio * size.double() - 1e-9).ceil().long()
    lowest = lowest if complementary and min_ratio == 0 else lowest.clamp(min=1)
    return lowest, (max_ratio * size.double() + 1e-9).floor().long() - lowest + 1


def _hide_counts(is_open: Tensor, counts: Tensor, noise: Tensor, complementary: bool) -> tuple[Tensor, Tensor]:
    """`counts` [R, n] of the open positions [R, L] hidden, [R, N, L], and what a hidden token weighs, [R, N].

    The weights make the sum over n views the ELBO; `complementary` adds the n complements, N = 2n.
    """
    size, num_samples = is_open.sum(1, keepdim=True), counts.shape[1]
    hidden = _subsets(noise.masked_fill(~is_open[:, None], 2.0), counts) & is_open[:, None]
    scale = size / num_samples
    if complementary:
        hidden = torch.cat([hidden, ~hidden & is_open[:, None]], 1)
        counts = torch.cat([counts, size - counts], 1)
        scale = (size + 1) / (2 * num_samples)
    return hidden, scale / counts.clamp(min=1)


def draw_masks(
    is_open: Tensor,
    num_samples: int,
    generator: torch.Generator,
    *,
    block_length: int | None = None,
    min_ratio: float = 0.0,
    max_ratio: float = 1.0,
    complementary: bool = False,
) -> tuple[Tensor, Tensor]:
    """Views of texts of different lengths: what they hide, and its weight, [R, N, L]; 0 on what is shown.

    The law of `elbo` on the open positions [R, L] of each text, or of each of its blocks of `block_length`, for
    fine-tuning and preferences. The counts are spread evenly over the n = `num_samples` views and over the texts,
    so that their mean hardly varies.
    """
    num_rows = len(is_open)
    if block_length is not None:
        is_open = is_open.unflatten(1, (-1, block_length)).flatten(0, 1)
    num_units, size = len(is_open), is_open.sum(1, keepdim=True)
    lowest, number = _range_of_counts(size, min_ratio, max_ratio, complementary)
    number = number.clamp(min=1)
    spread = torch.arange(num_units * num_samples).view(num_samples, num_units) / (num_units * num_samples)
    spread = spread[:, torch.randperm(num_units, generator=generator)].t().double()
    place = ((_noise(generator, 1) + spread) % 1).to(is_open.device)
    counts = lowest + (place * number).long().minimum(number - 1)
    noise = _noise(generator, num_units, num_samples, is_open.shape[1]).to(is_open.device)
    hidden, weights = _hide_counts(is_open, counts, noise, complementary)
    weights = torch.where(hidden, weights[..., None], 0.0)
    hidden, weights = (each.unflatten(0, (num_rows, -1)).transpose(1, 2).flatten(2) for each in (hidden, weights))
    return hidden, weights


def _views(
    rollout,
    hidden: Tensor,
    weights: Tensor,
    prompt_hidden: Tensor | None = None,
    may_score: Tensor | None = None,
) -> MaskedViews:
    """Views that hide completion positions `hidden` [B, N, C]; a token counts where it is hidden and not past the end.

    `weights` broadcasts to [B, N, C]. The prompt is shown unless `prompt_hidden` [B, N, P] says otherwise. `may_score`
    [B, C]: the tokens that count, where these are not those up to the end.
    """
    size = getattr(rollout, "block_length", None)
    if size is not None and (hidden.shape[2] > size or rollout.prompt_tail.any()):
        raise ValueError(
            f"block_length={size}: this rollout's model attends block by block; draw its views with "
            "dgrpo.views.views_of(estimator, rollout, generator), which draws on each block."
        )
    prompt_mask, device = rollout.prompt_mask.bool(), rollout.completion_ids.device
    hidden, weights = hidden.to(device), weights.to(device)
    if prompt_hidden is None:
        prompt_hidden = torch.zeros_like(prompt_mask)[:, None].expand(-1, hidden.shape[1], -1)
    scored = hidden & (rollout.completion_mask.bool() if may_score is None else may_score)[:, None]
    return MaskedViews(
        torch.cat([prompt_hidden.to(device) & prompt_mask[:, None], hidden], 2),
        torch.where(scored, weights, 0.0).float(),
    )


def _refuse(remedy: str, **setting) -> None:
    name, value = next(iter(setting.items()))
    raise ValueError(f"{name}={value!r}: {remedy}")


def one_step(
    rollout, *, generator: torch.Generator, p_mask_prompt: float = 0.15, prompt_mask_scope: str = "group"
) -> MaskedViews:
    """One view: the whole completion hidden, each prompt token hidden with probability `p_mask_prompt`, weight 1.

    d1 (arXiv:2504.12216, section 3.1): log p_k = log softmax f(q', [MASK]...[MASK])_k at o_k. The view does not
    contain the completion, so with `prompt_mask_scope="group"` all rollouts of a prompt share one.
    """
    if not 0 <= p_mask_prompt <= 1:
        _refuse("must be a probability.", p_mask_prompt=p_mask_prompt)
    prompt_hidden = _prompt_noise(rollout, generator, prompt_mask_scope) < p_mask_prompt
    whole = torch.ones_like(rollout.completion_mask, dtype=torch.bool)[:, None]
    return _views(rollout, whole, torch.ones(()), prompt_hidden[:, None])


def coupled(rollout, *, generator: torch.Generator, min_ratio: float = 0.2, max_ratio: float = 0.8) -> MaskedViews:
    """Three views: the whole completion (weight 1/2), a random part and its complement (1/(2t) and 1/(2(1-t))).

    DiffuCoder's coupled-GRPO (arXiv:2506.20639): one t ~ U(`min_ratio`, `max_ratio`) per rollout hides
    each position with probability t; log p_k = (log p_k(all hidden) + w_k log p_k(the part that hides k)) / 2. As
    published, weights add up to 3/2 in the mean: a score of each token, not a likelihood.
    """
    if not 0 < min_ratio <= max_ratio < 1:
        _refuse("ratios must satisfy 0 < min_ratio <= max_ratio < 1.", min_ratio=min_ratio)
    num_rows, num_completion = rollout.completion_ids.shape
    ratio = min_ratio + (max_ratio - min_ratio) * _noise(generator, num_rows, 1)
    part = _noise(generator, num_rows, num_completion) < ratio
    hidden = torch.stack([torch.ones_like(part), part, ~part], 1)
    weights = torch.stack([torch.full_like(ratio, 0.5), 0.5 / ratio, 0.5 / (1 - ratio)], 1)
    return _views(rollout, hidden, weights)


def elbo(
    rollout,
    *,
    generator: torch.Generator,
    num_samples: int = 2,
    complementary: bool = False,
    min_ratio: float = 0.0,
    max_ratio: float = 1.0,
) -> MaskedViews:
    """Monte-Carlo ELBO of the completion: n = `num_samples` views, or n pairs of a view and its complement.

    LLaDA's likelihood (arXiv:2502.09992, eq. 6), also VRPO's and ESPO's: hide l positions, l uniform in {1..C}, every
    subset equally likely, weight C/(n l); a token's expected weight is 1. The n counts of a rollout are spread evenly
    from a random start, and each is uniform on its own (not so where they are rounded, as in LLaDA's code).

    `complementary` (ESPO, arXiv:2512.03759): l uniform in {0..C} and the complement, N = 2n, weights (C+1)/(2nl) and
    (C+1)/(2n(C-l)); an empty view scores nothing, every token is scored once in a pair.

    `min_ratio`, `max_ratio` narrow the law of l to {ceil(min_ratio C)..floor(max_ratio C)}, the structured ratios of
    UniGRPO (arXiv:2505.15809). Expected weights stay 1, but the score is then not the ELBO.

    A bound on the log-likelihood of the whole canvas if all of it is scored; tokens after the first end-of-text token
    are context only.
    """
    if num_samples < 1:
        _refuse("draw at least one view.", num_samples=num_samples)
    if not 0 <= min_ratio <= max_ratio <= 1:
        _refuse(f"ratios must satisfy 0 <= min_ratio <= max_ratio={max_ratio} <= 1.", min_ratio=min_ratio)
    if complementary and (min_ratio, max_ratio) != (0, 1):
        _refuse("a complement leaves the range of ratios; drop min_ratio and max_ratio.", complementary=True)
    num_rows, num_completion = rollout.completion_ids.shape
    lowest, num_counts = (
        int(value) for value in _range_of_counts(torch.tensor(num_completion), min_ratio, max_ratio, complementary)
    )
    if num_counts < 1 and getattr(rollout, "block_length", None) is not None:
        # The few positions that a prompt leaves open in its last block.
        num_counts = 1
    if num_counts < 1:
        _refuse(f"no count of {num_completion} positions lies in the range of ratios.", max_ratio=max_ratio)
    # Whole steps from a uniform start keep every count uniform, also where n does not divide their number.
    start = torch.randint(num_counts, (num_rows, 1), generator=generator)
    counts = lowest + (start + torch.arange(num_samples) * num_counts // num_samples) % num_counts
    noise = _noise(generator, num_rows, num_samples, num_completion)
    hidden, weights = _hide_counts(torch.ones(num_rows, num_completion).bool(), counts, noise, complementary)
    return _views(rollout, hidden, weights[..., None])


def quadrature(rollout, *, generator: torch.Generator, num_nodes: int = 2) -> MaskedViews:
    """Gauss-Legendre quadrature of the ELBO over the masking ratio: one view per node t_i, weight w_i/t_i.

    GDPO (arXiv:2510.08554, section 3): each position is hidden with probability t_i; nodes and weights are those of
    the interval (0, 1). The mean is the quadrature sum, which is the ELBO where C <= 2 `num_nodes` and a biased
    stand-in for it beyond.
    """
    if num_nodes < 1:
        _refuse("use at least one node (published: 2 or 3).", num_nodes=num_nodes)
    num_rows, num_completion = rollout.completion_ids.shape
    nodes, weights = (torch.from_numpy(values)[:, None] / 2 for values in leggauss(num_nodes))
    ratios = nodes + 0.5
    hidden = _noise(generator, num_rows, num_nodes, num_completion) < ratios
    return _views(rollout, hidden, (weights / ratios)[None])


def _staged(rollout, order: Tensor, stage: Tensor, num_views: int) -> MaskedViews:
    """View n scores the tokens of `stage` n and hides all that comes with the first of them in `order`, or later.

    Both are [B, C]; stage -1 scores nothing. A view without a token hides and scores nothing.
    """
    scored = stage[:, None] == torch.arange(num_views, device=stage.device)[:, None]
    late = order.max() + 1
    first = torch.where(scored, order[:, None], late).amin(2, keepdim=True)
    hidden = (order[:, None] >= first) & (first < late)
    return _views(rollout, hidden, scored.float(), may_score=stage >= 0)


def trace(
    rollout,
    *,
    generator: torch.Generator,
    shrink: int | None = None,
    num_segments: int | None = None,
    top_k: int | None = None,
) -> MaskedViews:
    """The rollout's own states: tokens are scored, weight 1, in the view that the sampler had before them.

    One of three says which steps share a view (the one before the first of them); without any, each has its own
    (CJ-GRPO, arXiv:2509.23924). `shrink`: that many in a row (TraceRL, arXiv:2509.06949). `num_segments`: equal
    parts of the trajectory (StepMerge of d2, arXiv:2509.21474). `top_k`: only the steps with the highest entropy,
    averaged over the tokens that they committed, each with its own view (EGSPO, arXiv:2603.12554).

    Steps that committed no token up to the end of text do not count, so an answer that ended early is not cut more
    coarsely. Rows with fewer steps than views are filled up with empty views. The view is the sampler's up to the
    end of text; what was drawn behind it on a full canvas counts as never revealed and stays hidden. In the blocks of
    a block model it is shown as it was, and scored where it came before the last token of the answer: it had a part
    in what was drawn afterwards, and without it the gradient would be biased. Where a policy hid or overwrote tokens,
    one counts as hidden until it was last written.
    """
    chosen = {
        name: value
        for name, value in (("shrink", shrink), ("num_segments", num_segments), ("top_k", top_k))
        if value is not None
    }
    if len(chosen) > 1:
        raise ValueError(f"trace: {', '.join(f'{name}={value}' for name, value in chosen.items())}: set only one.")
    if any(value < 1 for value in chosen.values()):
        _refuse("must be at least 1.", **chosen)
    revealed_at, num_steps = rollout.revealed_at, rollout.num_steps
    scored = rollout.completion_mask.bool()
    if getattr(rollout, "block_length", None) is not None:
        scored = scored | (revealed_at < revealed_at.masked_fill(~scored, -1).amax(1, keepdim=True))
    scored = scored & (revealed_at >= 0) & (revealed_at < num_steps)
    at = revealed_at.clamp(0, num_steps - 1)
    tokens = torch.zeros(len(at), num_steps, device=at.device).scatter_add_(1, at, scored.float())
    used = tokens > 0
    if top_k is not None:
        entropy = torch.zeros_like(tokens).scatter_add_(1, at, torch.where(scored, rollout.entropy, 0.0))
        by_entropy = torch.where(used, entropy / tokens, -torch.inf).argsort(dim=1, descending=True, stable=True)
        used &= by_entropy.argsort(1) < top_k
    # The n-th step that counts gets number n.
    number = used.long().cumsum(1) - 1
    if top_k is not None:
        stage, num_views = number, top_k
    elif num_segments is not None:
        stage, num_views = number * num_segments // used.sum(1, keepdim=True).clamp(min=1), num_segments
    else:
        shrink = shrink or 1
        stage, num_views = number // shrink, -(-min(num_steps, revealed_at.shape[1]) // shrink)
    stage = torch.where(scored & used.gather(1, at), stage.gather(1, at), -1)
    return _staged(rollout, revealed_at, stage, num_views)


def every_write(rollout, *, generator: torch.Generator) -> MaskedViews:
    """Every token that was written, also those hidden or overwritten later, in the state it was written in; weight 1.

    The log-probability of the whole trajectory, but for which tokens were written and hidden: unbiased where this does
    not depend on the weights, as in `remdm_cap` and its kin; else it counts as the sampler's, as in `trace`, which
    without revisions scores the same. Tokens that an editing policy could have overwritten and kept are not scored.

    One view for each of the rollout's `num_steps` states. A token behind the end counts where the answer was not
    complete when it was written.
    """
    last = rollout.trace_ids().masked_fill(rollout.written_at() >= rollout.num_steps, -1)[:, None]
    states, steps = rollout.states()
    # States that a row does not have are as its last one, in which nothing is written.
    states = torch.cat([states.where(steps[..., None] >= 0, last), last.repeat(1, rollout.num_steps + 1, 1)], 1)
    before, after = states[:, : rollout.num_steps], states[:, 1 : rollout.num_steps + 1]
    written = (after != before) & (after >= 0)
    is_answer = written & rollout.completion_mask.bool()[:, None]
    # The answer still changes in a later state.
    goes_on = is_answer.any(2, keepdim=True).long().flip(1).cumsum(1).flip(1) > is_answer.any(2, keepdim=True).long()
    written &= rollout.completion_mask.bool()[:, None] | goes_on
    views = _views(rollout, before < 0, torch.zeros(()))
    return replace(views, weights=written.float(), shown=before.clamp(min=0), targets=after.clamp(min=0))


def left_to_right(rollout, *, generator: torch.Generator) -> MaskedViews:
    """C views: in view k everything from position k on is hidden and token k is scored, weight 1.

    JustGRPO (arXiv:2601.15165): log p(o) = sum over k of log p(o_k | q, o_<k, [MASK]...), the exact log-likelihood of
    a policy that decodes from left to right, one token at a time.
    """
    num_rows, num_completion = rollout.completion_ids.shape
    order = torch.arange(num_completion, device=rollout.completion_ids.device).expand(num_rows, -1)
    return _staged(rollout, order, torch.where(rollout.completion_mask.bool(), order, -1), num_completion)


def block_random(
    rollout,
    *,
    generator: torch.Generator,
    block_length: int = 32,
    num_samples: int = 2,
    p_mask_prompt: float = 0.15,
) -> MaskedViews:
    """n = `num_samples` views as block-wise sampling sees them: past shown, one block partly hidden, the rest hidden.

    SPG (arXiv:2510.09541): each view has a block of its own among those up to the end of text (again from
    the first when they run out); l of its positions are hidden, l uniform in {1..`block_length`}, with all later
    blocks; prompt and earlier blocks are perturbed: each token is hidden with probability `p_mask_prompt`. All hidden
    tokens are scored, weight 1/(n t) with t their share of the completion; views that score nothing are left out of n.

    The published code draws the count over the block's tokens up to the end of text and hides everything behind it;
    here it is drawn over the whole block, or the hidden tail would tell the answer's length.
    """
    num_rows, num_completion = rollout.completion_ids.shape
    if block_length < 1 or num_completion % block_length:
        _refuse(f"must divide the {num_completion} completion positions.", block_length=block_length)
    if num_samples < 1:
        _refuse("draw at least one view.", num_samples=num_samples)
    if not 0 <= p_mask_prompt <= 1:
        _refuse("must be a probability.", p_mask_prompt=p_mask_prompt)
    num_blocks = num_completion // block_length
    length = rollout.completion_mask.sum(1).cpu()
    num_open = ((length + block_length - 1) // block_length).clamp(min=1)
    order = torch.where(
        torch.arange(num_blocks) < num_open[:, None], _noise(generator, num_rows, num_blocks), 2.0
    ).argsort(1)
    block = order.gather(1, torch.arange(num_samples) % num_open[:, None])
    counts = 1 + torch.randint(block_length, (num_rows, num_samples), generator=generator)
    part = _subsets(_noise(generator, num_rows, num_samples, block_length), counts).repeat(1, 1, num_blocks)
    perturbed = _noise(generator, num_rows, num_samples, num_completion) < p_mask_prompt
    block_of = torch.arange(num_completion) // block_length
    hidden = torch.where(block_of == block[..., None], part, (block_of > block[..., None]) | perturbed)
    width = rollout.prompt_mask.shape[1]
    prompt_hidden = _from_the_end(generator, num_rows * num_samples, width).reshape(num_rows, num_samples, width)
    num_hidden = (hidden & rollout.completion_mask.bool().cpu()[:, None]).sum(2)
    num_scoring = (num_hidden > 0).sum(1, keepdim=True).clamp(min=1)
    weights = length[:, None] / (num_scoring * num_hidden.clamp(min=1))
    return _views(rollout, hidden, weights[..., None], prompt_hidden < p_mask_prompt)


ESTIMATORS: dict[str, Callable[..., MaskedViews]] = {
    "one_step": one_step,
    "coupled": coupled,
    "elbo": elbo,
    "quadrature": quadrature,
    "trace": trace,
    "every_write": every_write,
    "left_to_right": left_to_right,
    "block_random": block_random,
}
# Their views are independent draws of one integral (`dgrpo.objectives.Facts`): as `elbo.draws = True` would, in a way
# that type checkers read.
for _estimator in (elbo, quadrature, block_random):
    vars(_estimator)["draws"] = True
vars(block_random)["whole_canvas"] = True
