"""Estimators against brute force: on six words and a few positions every mask can be enumerated."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from enumeration import (
    EOS,
    GAUSS,
    MASK,
    WORDS,
    assert_frequencies,
    block_random_law,
    code,
    complementary_law,
    coupled_law,
    elbo_law,
    expected_views,
    one_step_law,
    quadrature_law,
    rows_of,
    seeded,
    subsets,
)

from dgrpo import estimators
from dgrpo.estimators import ESTIMATORS
from dgrpo.logprobs import per_token_logps
from dgrpo.sampling import SamplerConfig, generate
from dgrpo.views import MaskedViews, draw_views

# Every estimator under several settings; block lengths divide the canvases below.
EVERY = pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("one_step", {}),
        ("one_step", {"prompt_mask_scope": "row", "p_mask_prompt": 0.5}),
        ("coupled", {}),
        ("elbo", {"num_samples": 3}),
        ("elbo", {"num_samples": 2, "complementary": True}),
        ("elbo", {"num_samples": 2, "min_ratio": 0.3, "max_ratio": 0.9}),
        ("quadrature", {"num_nodes": 3}),
        ("trace", {}),
        ("trace", {"shrink": 2}),
        ("trace", {"num_segments": 3}),
        ("trace", {"top_k": 3}),
        ("every_write", {}),
        ("left_to_right", {}),
        ("block_random", {"block_length": 1}),
        ("block_random", {"block_length": 5, "p_mask_prompt": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()),
)


# Canvas, its tokens up to the end of text, settings, law.
LAWS = {
    "one_step": (5, 5, {"p_mask_prompt": 0.3}, one_step_law(5, 0.3)),
    "elbo, 1 view": (4, 4, {"num_samples": 1}, elbo_law(4, 1)),
    "elbo, 2 views of 3 positions": (3, 3, {"num_samples": 2}, elbo_law(3, 2)),
    "elbo, 2 views of 4 positions, ended": (4, 2, {"num_samples": 2}, elbo_law(4, 2)),
    "elbo, 1 to 3 of 5 positions": (
        5,
        5,
        {"num_samples": 1, "min_ratio": 0.2, "max_ratio": 0.6},
        elbo_law(5, 1, 1, 3),
    ),
    "elbo, complementary": (4, 4, {"num_samples": 1, "complementary": True}, complementary_law(4)),
    "elbo, complementary, ended": (4, 3, {"num_samples": 1, "complementary": True}, complementary_law(4)),
    "elbo, complementary, 2 pairs": (3, 3, {"num_samples": 2, "complementary": True}, complementary_law(3, 2)),
    "quadrature, 2 nodes": (3, 3, {"num_nodes": 2}, quadrature_law(3, 2)),
    "quadrature, 3 nodes": (2, 2, {"num_nodes": 3}, quadrature_law(2, 3)),
    "block_random": (
        4,
        4,
        {"block_length": 2, "num_samples": 1, "p_mask_prompt": 0.3},
        block_random_law(4, 4, 2, 0.3),
    ),
    "block_random, ended": (
        6,
        3,
        {"block_length": 2, "num_samples": 1, "p_mask_prompt": 0.3},
        block_random_law(6, 3, 2, 0.3),
    ),
    "block_random, 2 views": (
        4,
        4,
        {"block_length": 2, "num_samples": 2, "p_mask_prompt": 0.5},
        block_random_law(4, 4, 2, 0.5, 2),
    ),
    "block_random, 2 views, ended": (
        4,
        3,
        {"block_length": 2, "num_samples": 2, "p_mask_prompt": 0.5},
        block_random_law(4, 3, 2, 0.5, 2),
    ),
}
LAWS = {case: (*rest, list(law)) for case, (*rest, law) in LAWS.items()}


@pytest.mark.parametrize("case", LAWS)
def test_draws_have_the_exact_masks_weights_and_probabilities(case):
    num_completion, length, settings, law = LAWS[case]
    rollout = rows_of(150_000, num_completion, length)
    views = ESTIMATORS[case.split(",")[0]](rollout, generator=seeded(1), **settings).check()
    merged: dict[int, tuple[float, torch.Tensor]] = {}
    for probability, drawn in law:
        hidden, weights = expected_views(drawn, num_completion, length)
        key = code(hidden[None]).item()
        merged[key] = (merged.get(key, (0.0,))[0] + probability, weights)
    keys, index = code(views.hidden).unique(return_inverse=True)
    assert set(keys.tolist()) <= set(merged)
    probabilities, weights = zip(*(merged[key] for key in keys.tolist()), strict=True)
    torch.testing.assert_close(views.weights, torch.stack(weights)[index])
    assert_frequencies(index.bincount(), torch.tensor(probabilities))


# Closed forms, from raw logits and the definition of each score.


@pytest.fixture
def six_words(tiny_llada):
    return tiny_llada(vocab_size=WORDS, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS, std=0.5)


def raw_logps(model, rollout, hidden) -> torch.Tensor:
    """log p of every completion token [C] in the picture of row 0 that hides `hidden` (negative: in the prompt)."""
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)[:1].clone()
    ids[0, [rollout.prompt_ids.shape[1] + k for k in hidden]] = MASK
    log_probs = model(ids).logits[0, rollout.prompt_ids.shape[1] :].log_softmax(-1)
    return log_probs.gather(1, rollout.completion_ids[0, :, None])[:, 0]


def order_scores(model, rollout) -> list[torch.Tensor]:
    """Entry l: the mean over all orders of C * log p(the token revealed while l are hidden), tokens past the end 0."""
    num_completion, length = rollout.completion_ids.shape[1], int(rollout.completion_mask[0].sum())
    pictures = {hidden: raw_logps(model, rollout, hidden) for hidden in subsets(range(num_completion)) if hidden}
    totals = [torch.zeros(()) for _ in range(num_completion + 1)]
    orders = list(itertools.permutations(range(num_completion)))
    for order in orders:
        for step, token in enumerate(order):
            if token < length:
                left = num_completion - step
                totals[left] = totals[left] + pictures[tuple(sorted(order[step:]))][token]
    return [num_completion * total / len(orders) for total in totals]


def at_ratio(scores: list[torch.Tensor], t: float) -> torch.Tensor:
    """(1/t) E sum over hidden k of log p_k when each of the C positions is hidden with probability t."""
    num_completion = len(scores) - 1
    return sum(
        math.comb(num_completion, left)
        * t ** (left - 1)
        * (1 - t) ** (num_completion - left)
        * (left / num_completion)
        * scores[left]
        for left in range(1, num_completion + 1)
    )


def mean_over_ratios(scores: list[torch.Tensor], low: float, high: float) -> torch.Tensor:
    """`at_ratio` averaged over t ~ U(low, high)."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    return sum(w / 2 * at_ratio(scores, low + (high - low) * (x + 1) / 2) for x, w in zip(nodes, weights, strict=True))


def law_score(model, rollout, law) -> torch.Tensor:
    """Expected score of row 0, sum over tokens, through the scoring path: one view per distinct picture."""
    num_completion, length = rollout.completion_ids.shape[1], int(rollout.completion_mask[0].sum())
    merged: dict[tuple[int, ...], torch.Tensor] = {}
    for probability, drawn in law:
        hidden, weights = expected_views(drawn, num_completion, length)
        for picture, weight in zip(hidden, weights, strict=True):
            key = tuple(picture.tolist())
            merged[key] = merged.get(key, 0) + probability * weight
    views = MaskedViews(torch.tensor(list(merged))[None], torch.stack(list(merged.values()))[None])
    row = rollout.rows([0])
    return per_token_logps(model, row.prompt_ids, row.prompt_mask, row.completion_ids, views).sum()


def assert_same_score_and_gradient(model, score: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(score, expected.float(), rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(score, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


def one_step_form(model, rollout):
    whole = tuple(range(5))
    return sum(
        0.3 ** len(noise) * 0.7 ** (2 - len(noise)) * raw_logps(model, rollout, noise + whole).sum()
        for noise in subsets((-2, -1))
    )


def mean_of_counts(*counts: int):
    """Every count equally likely. With all counts it is the mean over all orders of the chain rule's sum: the ELBO."""
    return lambda model, rollout: sum(order_scores(model, rollout)[count] for count in counts) / len(counts)


def quadrature_form(num_nodes: int):
    return lambda model, rollout: sum(w * at_ratio(order_scores(model, rollout), t) for t, w in GAUSS[num_nodes])


def block_chance(hidden: tuple[int, ...], block: int, num_completion: int, chance: float) -> float:
    """The probability that a view of this block of 2 positions hides exactly `hidden`, of prompt and completion."""
    start = 2 * block
    part = sum(start <= k < start + 2 for k in hidden)
    if not part or not set(range(start + 2, num_completion)) <= set(hidden):
        return 0.0
    earlier = [chance if k in hidden else 1 - chance for k in range(-2, start)]
    # One of 2 counts; one position alone is either of two.
    return math.prod(earlier) / 2 / (2 if part == 1 else 1)


def block_random_form(chance: float):
    """The completion's length times the mean of log p over the hidden tokens."""

    def form(model, rollout):
        num_completion, length = rollout.completion_ids.shape[1], int(rollout.completion_mask[0].sum())
        blocks, total = range((length + 1) // 2), torch.zeros(())
        for hidden in subsets(range(-2, num_completion)):
            probability = sum(block_chance(hidden, block, num_completion, chance) for block in blocks) / len(blocks)
            if probability and (tokens := [k for k in hidden if 0 <= k < length]):
                total = total + probability * length * raw_logps(model, rollout, hidden)[tokens].mean()
        return total

    return form


CLOSED_FORMS = {
    "one_step": one_step_form,
    "elbo, 1 view": mean_of_counts(1, 2, 3, 4),
    "elbo, 2 views of 3 positions": mean_of_counts(1, 2, 3),
    "elbo, 2 views of 4 positions, ended": mean_of_counts(1, 2, 3, 4),
    "elbo, 1 to 3 of 5 positions": mean_of_counts(1, 2, 3),
    "elbo, complementary": mean_of_counts(1, 2, 3, 4),
    "elbo, complementary, ended": mean_of_counts(1, 2, 3, 4),
    "quadrature, 2 nodes": quadrature_form(2),
    "quadrature, 3 nodes": quadrature_form(3),
    "elbo, complementary, 2 pairs": mean_of_counts(1, 2, 3),
    "block_random": block_random_form(0.3),
    "block_random, ended": block_random_form(0.3),
    "block_random, 2 views": block_random_form(0.5),
}


@pytest.mark.parametrize("case", CLOSED_FORMS)
def test_mean_score_and_its_gradient_equal_the_closed_form(six_words, case):
    num_completion, length, _, law = LAWS[case]
    rollout = rows_of(1, num_completion, length)
    assert_same_score_and_gradient(
        six_words, law_score(six_words, rollout, law), CLOSED_FORMS[case](six_words, rollout)
    )


def test_every_count_comes_once_when_there_are_as_many_views_as_positions():
    counts = estimators.elbo(rows_of(50, 6), generator=seeded(), num_samples=6).hidden.sum(2).sort(1).values
    assert (counts == torch.arange(1, 7)).all()


def test_quadrature_is_the_elbo_of_four_positions_but_not_of_six(six_words):
    for num_completion, num_nodes, exact in ((4, 2, True), (6, 2, False), (6, 3, True)):
        rollout = rows_of(1, num_completion)
        with torch.no_grad():
            scores = order_scores(six_words, rollout)
            rule = sum(w * at_ratio(scores, t) for t, w in GAUSS[num_nodes])
            gap = abs(rule - sum(scores) / num_completion).item()
        assert (gap < 1e-5) if exact else (gap > 1e-3)


def test_quadrature_at_six_positions_is_the_quadrature_sum(six_words):
    rollout = rows_of(1, 6)
    score = law_score(six_words, rollout, quadrature_law(6, 2))
    assert_same_score_and_gradient(six_words, score, quadrature_form(2)(six_words, rollout))


def test_quadrature_draws_at_six_positions_follow_the_law_of_each_node():
    """Both views together have 4,096 pictures: each by itself, and that they are independent by their sizes."""
    views = estimators.quadrature(rows_of(100_000, 6), generator=seeded(2), num_nodes=2).check()
    pictures = views.hidden[..., 2:]
    sizes = torch.tensor([pattern.bit_count() for pattern in range(2**6)])
    chances = []
    for number, (t, w) in enumerate(GAUSS[2]):
        torch.testing.assert_close(views.weights[:, number], pictures[:, number] * torch.tensor(w / t).float())
        assert_frequencies(
            code(pictures[:, number : number + 1]).bincount(minlength=2**6), t**sizes * (1 - t) ** (6 - sizes)
        )
        chances.append(torch.tensor([math.comb(6, size) * t**size * (1 - t) ** (6 - size) for size in range(7)]))
    both = pictures.sum(2).clamp(min=2, max=4) - 2
    first, second = (torch.stack([each[:3].sum(), each[3], each[4:].sum()]) for each in chances)
    assert_frequencies((both[:, 0] * 3 + both[:, 1]).bincount(minlength=9), (first[:, None] * second).flatten())


def test_coupled_scores_each_token_once_in_its_pair_and_once_fully_masked():
    views = estimators.coupled(rows_of(500, 6, length=4), generator=seeded()).check()
    whole, part, rest = views.hidden[..., 2:].unbind(1)
    assert whole.all()
    assert (part ^ rest).all()
    assert not views.hidden[..., :2].any()
    scored = views.weights[..., :4] != 0
    assert (scored[:, 0] & (scored[:, 1] ^ scored[:, 2])).all()
    assert (views.weights[..., 4:] == 0).all()


def test_coupled_draws_ratio_and_masks_from_their_joint_law():
    num_completion, num_bins = 3, 5
    views = estimators.coupled(rows_of(100_000, num_completion), generator=seeded(3))
    part, rest = (2 * views.weights[:, index].double().amax(1) for index in (1, 2))
    ratio = torch.where(part > 0, 1 / part, 1 - 1 / rest)
    both = (part > 0) & (rest > 0)
    torch.testing.assert_close((1 / part + 1 / rest)[both], torch.ones(int(both.sum())).double(), atol=1e-6, rtol=0)
    assert ratio.min() > 0.2
    assert ratio.max() < 0.8
    bins = ((ratio - 0.2) / 0.6 * num_bins).long().clamp(0, num_bins - 1)
    index = bins * 2**num_completion + code(views.hidden[:, 1:2, 2:])
    nodes, weights = np.polynomial.legendre.leggauss(6)
    probabilities = []
    for number, pattern in itertools.product(range(num_bins), range(2**num_completion)):
        ratios = 0.2 + 0.6 / num_bins * (number + (nodes + 1) / 2)
        size = pattern.bit_count()
        probabilities.append((weights / 2 * ratios**size * (1 - ratios) ** (num_completion - size)).sum() / num_bins)
    assert_frequencies(index.bincount(minlength=len(probabilities)), torch.tensor(probabilities))


def test_coupled_has_the_published_score_of_expected_weight_three_halves(six_words):
    rollout = rows_of(1, 4)
    law = list(coupled_law(4))
    weight = sum(p * sum(w for hidden, w in views if 0 in hidden) for p, views in law)
    assert weight == pytest.approx(3 / 2)
    # One half of the fully masked score and, a part and its complement being alike, the mean over ratios.
    scores = order_scores(six_words, rollout)
    expected = scores[4] / 2 + mean_over_ratios(scores, 0.2, 0.8)
    assert_same_score_and_gradient(six_words, law_score(six_words, rollout, law), expected)


def test_complementary_pairs_partition_the_canvas():
    views = estimators.elbo(rows_of(300, 5, length=3), generator=seeded(), num_samples=4, complementary=True).check()
    pictures, complements = views.hidden[..., 2:].split(4, 1)
    assert (pictures ^ complements).all()
    assert {0, 5} <= set(pictures.sum(2).unique().tolist())
    scored = views.weights != 0
    assert ((scored[:, :4] ^ scored[:, 4:])[..., :3]).all()
    assert not scored[..., 3:].any()


def traced(revealed_at, num_steps, length=None, entropy=None, **settings):
    rollout = rows_of(1, len(revealed_at), length)
    rollout = replace(rollout, revealed_at=torch.tensor([revealed_at]), num_steps=num_steps)
    if entropy is not None:
        rollout = replace(rollout, entropy=torch.tensor([entropy]))
    views = estimators.trace(rollout, generator=seeded(), **settings).check()
    assert not views.hidden[..., :2].any()
    assert ((views.weights == 0) | (views.weights == 1)).all()
    return [
        ("".join("M" if h else "." for h in hidden), "".join("x" if w else "." for w in weights))
        for hidden, weights in zip(views.hidden[0, :, 2:].tolist(), views.weights[0].tolist(), strict=True)
    ]


def test_trace_shows_each_step_what_the_sampler_saw():
    assert traced([2, 0, 1, 1], num_steps=3) == [
        ("MMMM", ".x.."),
        ("M.MM", "..xx"),
        ("M...", "x..."),
    ]
    # Behind the end, but committed in the same step as token 1: not yet seen there.
    assert traced([0, 1, 1], num_steps=2, length=2) == [("MMM", "x.."), (".MM", ".x.")]


def test_trace_leaves_out_given_and_never_revealed_tokens_and_steps_behind_the_end():
    # Token 0 was given, 4 was revealed at a step of its own behind the end, 5 never.
    assert traced([-1, 3, 0, 4, 1, 6], num_steps=6, length=4) == [
        (".MMMMM", "..x..."),
        (".M.M.M", ".x...."),
        ("...M.M", "...x.."),
        ("......", "......"),
        ("......", "......"),
        ("......", "......"),
    ]


def test_trace_merges_shrink_steps_and_cuts_segments():
    order = [4, 0, 3, 1, 2]
    assert traced(order, 5, shrink=2) == [("MMMMM", ".x.x."), ("M.M.M", "..x.x"), ("M....", "x....")]
    assert traced(order, 5, num_segments=2) == [("MMMMM", ".x.xx"), ("M.M..", "x.x..")]
    # Ended after token 2: three steps count, the fewer are cut just as finely.
    assert traced(order, 5, length=3, num_segments=3) == [("MMMMM", ".x..."), ("M.M..", "..x.."), ("M....", "x....")]
    assert traced([0, 0, 0], 3, num_segments=2) == [("MMM", "xxx"), ("...", "...")]


def test_trace_keeps_the_steps_of_highest_mean_entropy():
    order, entropy = [0, 1, 1, 2, 3], [1.6, 1.5, 1.5, 2.0, 0.5]
    assert traced(order, 4, entropy=entropy, top_k=2) == [("MMMMM", "x...."), ("...MM", "...x.")]
    assert traced(order, 4, entropy=entropy, top_k=3)[1] == (".MMMM", ".xx..")
    assert traced(order, 4, entropy=entropy, top_k=6)[3:] == [
        ("....M", "....x"),
        (".....", "....."),
        (".....", "....."),
    ]
    assert traced(order, 4, entropy=entropy, length=1, top_k=2) == [("MMMMM", "x...."), (".....", ".....")]


def test_trace_of_a_left_to_right_rollout_is_left_to_right():
    for length in (5, 3):
        rollout = rows_of(2, 5, length)
        from_trace, from_order = (
            estimator(rollout, generator=seeded()) for estimator in (estimators.trace, estimators.left_to_right)
        )
        assert (from_trace.weights == from_order.weights).all()
        assert (from_trace.hidden == from_order.hidden).all()


def test_left_to_right_is_the_chain_rule(six_words):
    rollout = rows_of(1, 4)
    views = estimators.left_to_right(rollout, generator=seeded()).check()
    score = per_token_logps(six_words, rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, views)
    expected = torch.stack([raw_logps(six_words, rollout, range(k, 4))[k] for k in range(4)])
    torch.testing.assert_close(score[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_length", [2, 6])
@pytest.mark.parametrize("steps", [3, 6])
def test_trace_scores_are_the_samplers_own_probabilities(model, prompts, block_length, steps):
    config = SamplerConfig(6, block_length, steps, temperature=1.0)
    rollout = generate(model, *prompts, config, generator=seeded(5))
    whole = rollout.completion_mask.all(1)
    assert whole.sum() >= 3
    for settings in ({}, {"top_k": steps}, {"num_segments": steps}):
        views = estimators.trace(rollout, generator=seeded(), **settings)
        logps = per_token_logps(model, *prompts, rollout.completion_ids, views)
        torch.testing.assert_close(logps[whole].exp(), rollout.confidence[whole], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("length", "num_open"), [(6, 3), (3, 2), (2, 1), (1, 1)])
def test_block_random_views_have_blocks_of_their_own_and_share_the_weight(length, num_open):
    rollout = rows_of(400, 6, length)
    views = estimators.block_random(rollout, generator=seeded(), block_length=2, num_samples=2, p_mask_prompt=0.0)
    hidden = views.hidden[..., 2:]
    block = hidden.int().argmax(2) // 2
    assert (block < num_open).all()
    assert ((block[:, 0] == block[:, 1]) == (num_open == 1)).all()
    scoring = hidden[..., :length].any(2)
    expected = torch.where(scoring, length / scoring.sum(1, keepdim=True).clamp(min=1), 0.0)
    torch.testing.assert_close(views.weights.sum(2), expected)
    assert scoring.all() == (length % 2 == 0)


@EVERY
def test_padding_on_the_left_changes_nothing(rollout, name, settings):
    wider = replace(
        rollout,
        prompt_ids=torch.nn.functional.pad(rollout.prompt_ids, (3, 0)),
        prompt_mask=torch.nn.functional.pad(rollout.prompt_mask, (3, 0)),
    )
    narrow, wide = (ESTIMATORS[name](part, generator=seeded(7), **settings).check() for part in (rollout, wider))
    assert not wide.hidden[..., :3].any()
    assert (wide.hidden[..., 3:] == narrow.hidden).all()
    assert (wide.weights == narrow.weights).all()
    assert not (narrow.hidden[..., :6] & ~rollout.prompt_mask[:, None]).any()


@EVERY
def test_only_the_generator_decides_and_no_global_state_is_touched(rollout, name, settings):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first, again, other = (ESTIMATORS[name](rollout, generator=seeded(s), **settings) for s in (1, 1, 2))
    assert (torch.get_rng_state() == states[0]).all()
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert (first.hidden == again.hidden).all()
    assert (first.weights == again.weights).all()
    assert (first.hidden != other.hidden).any() == (name not in ("trace", "every_write", "left_to_right"))


@EVERY
def test_the_number_of_views_does_not_depend_on_the_text(rollout, name, settings):
    ended_at_once = replace(
        rollout,
        completion_mask=torch.arange(5).expand(6, -1) < 1,
        revealed_at=torch.zeros_like(rollout.revealed_at),
        entropy=torch.zeros_like(rollout.entropy),
    )
    shapes = {
        ESTIMATORS[name](part, generator=seeded(), **settings).check().weights.shape
        for part in (rollout, ended_at_once)
    }
    assert len(shapes) == 1


@EVERY
def test_tokens_behind_the_end_count_nothing(rollout, name, settings):
    weights = ESTIMATORS[name](rollout, generator=seeded(), **settings).weights
    # One counts until the answer is complete.
    assert (weights * ~rollout.completion_mask[:, None]).any() == (name == "every_write")
    assert weights.any()
    assert weights.dtype == torch.float32


@EVERY
def test_views_of_a_row_follow_from_its_key_alone(rollout, name, settings):
    def draw(part, **inputs):
        return ESTIMATORS[name](part, **inputs, **settings)

    key = ("views", 3, 14)
    drawn = draw_views(draw, rollout, torch.arange(6), key, num_draws=2)
    hidden, weights = drawn.hidden, drawn.weights
    order = [4, 1, 0]
    drawn = draw_views(draw, rollout.rows(order), torch.tensor(order), key, num_draws=2)
    some_hidden, some_weights = drawn.hidden, drawn.weights
    width = rollout.prompt_mask.shape[1]
    assert (some_hidden == hidden[order][..., -some_hidden.shape[-1] :]).all()
    assert (some_weights == weights[order]).all()
    if name not in ("trace", "every_write", "left_to_right"):
        assert (hidden[:, 0] != hidden[:, 1]).any()
        assert not hidden[0, :, :, : width - 4].any()


def test_prompt_mask_scope(rollout):
    whole = [estimators.one_step(rollout, generator=seeded(), p_mask_prompt=0.5).hidden[:, 0, :6]]
    whole.append(
        estimators.one_step(rollout, generator=seeded(), p_mask_prompt=0.5, prompt_mask_scope="row").hidden[:, 0, :6]
    )
    by_group, by_row = ([len(part.unique(dim=0)) for part in hidden.split(3)] for hidden in whole)
    assert by_group == [1, 1]
    assert by_row[1] > 1


def test_views_that_score_nothing_pass_through_the_network_unharmed(six_words):
    rollout = rows_of(2, 4, length=1)
    views = estimators.left_to_right(rollout, generator=seeded())
    logps = per_token_logps(
        six_words, rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, views, views_per_pass=1
    )
    assert (logps[:, 1:] == 0).all()
    logps.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in six_words.parameters())


def test_a_users_own_estimator_needs_no_registration(six_words, rollout):
    def every_other(rollout, *, generator, offset=0):
        """Odd or even positions hidden, each scored once."""
        parity = (torch.arange(rollout.completion_ids.shape[1]) + torch.arange(2)[:, None] + offset) % 2 == 0
        hidden = parity.expand(len(rollout.completion_ids), -1, -1)
        prompt = torch.zeros_like(rollout.prompt_mask)[:, None].expand(-1, 2, -1)
        return MaskedViews(torch.cat([prompt, hidden], 2), (hidden & rollout.completion_mask[:, None]).float())

    drawn = draw_views(every_other, rollout, torch.arange(6), ("mine",), num_draws=2)
    hidden, weights = drawn.hidden, drawn.weights
    assert hidden.shape == (6, 2, 2, 11)
    views = MaskedViews(hidden[:, 0], weights[:, 0])
    logps = per_token_logps(
        six_words, rollout.prompt_ids % EOS, rollout.prompt_mask, rollout.completion_ids % EOS, views
    )
    assert ((logps != 0) == rollout.completion_mask).all()


def test_draw_views_refuses_an_estimator_that_scores_what_it_shows(rollout):
    def cheating(rollout, *, generator):
        shown = torch.zeros(len(rollout.prompt_ids), 1, rollout.prompt_ids.shape[1] + 5, dtype=torch.bool)
        return MaskedViews(shown, torch.ones(len(shown), 1, 5))

    with pytest.raises(ValueError, match="score hidden tokens only"):
        draw_views(cheating, rollout, torch.arange(6), ("mine",))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("one_step", {"p_mask_prompt": 1.5}, "p_mask_prompt=1.5"),
        ("one_step", {"prompt_mask_scope": "batch"}, "prompt_mask_scope='batch'"),
        ("coupled", {"min_ratio": 0.0}, "min_ratio=0.0"),
        ("coupled", {"min_ratio": 0.5, "max_ratio": 0.4}, "min_ratio=0.5"),
        ("elbo", {"num_samples": 0}, "num_samples=0"),
        ("elbo", {"min_ratio": 0.7, "max_ratio": 0.6}, "min_ratio=0.7"),
        ("elbo", {"min_ratio": 0.41, "max_ratio": 0.59}, "no count of 5 positions"),
        ("elbo", {"complementary": True, "max_ratio": 0.9}, "complementary=True"),
        ("quadrature", {"num_nodes": 0}, "num_nodes=0"),
        ("trace", {"shrink": 2, "top_k": 3}, "shrink=2, top_k=3: set only one"),
        ("trace", {"num_segments": 0}, "num_segments=0"),
        ("block_random", {"block_length": 2}, "block_length=2"),
        ("block_random", {"block_length": 5, "num_samples": 0}, "num_samples=0"),
        ("block_random", {"block_length": 5, "p_mask_prompt": -0.1}, "p_mask_prompt=-0.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(rollout, name, settings, message):
    with pytest.raises(ValueError, match=message):
        ESTIMATORS[name](rollout, generator=seeded(), **settings)
