"""Objectives against their formulas written out, and the bounds against an explicit joint distribution."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from enumeration import WORDS, elbo_law, expected_views, rows_of, seeded, subsets
from joint_table import JointTable

from dgrpo import estimators
from dgrpo.estimators import ESTIMATORS
from dgrpo.logprobs import per_token_logps
from dgrpo.objectives import (
    KL_FORMS,
    OBJECTIVES,
    ObjectiveInputs,
    check_combination,
    evidence_bounds,
    facts_of,
    kl_exact,
)
from dgrpo.views import MaskedViews

LENGTHS = [4, 2, 4, 3, 1, 4]
ADVANTAGES = [1.0, -0.5, -0.5, 0.25, 0.0, -0.25]


@pytest.fixture
def batch() -> ObjectiveInputs:
    """Two groups of three rollouts, four positions, elbo views; no view hides the one token of row 4."""
    generator = seeded(3)
    mask = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
    rollout = replace(rows_of(6, 4), completion_mask=mask)
    weights = estimators.elbo(rollout, generator=generator, num_samples=3).weights
    weights[4] = 0
    scored = weights != 0

    def logps() -> torch.Tensor:
        return torch.where(scored, -3 * torch.rand(weights.shape, generator=generator), 0.0)

    current, old, reference = logps(), logps(), logps()
    return ObjectiveInputs(
        logps_per_view=current.requires_grad_(),
        weights=weights,
        old_logps=(weights * old).sum(1),
        ref_logps=(weights * reference).sum(1),
        advantages=torch.tensor(ADVANTAGES),
        completion_mask=mask,
        group=torch.tensor([7, 3, 7, 3, 7, 3]),
        old_logps_per_view=old,
    )


def scores(batch: ObjectiveInputs, logps_per_view: torch.Tensor) -> list[float]:
    """Sum over tokens and views of weight * log p, one for each row."""
    return (batch.weights * logps_per_view).sum((1, 2)).tolist()


def upper_bound(batch: ObjectiveInputs, row: int, beta: float) -> float:
    tokens = []
    for k in range(4):
        terms = [
            w.item() * math.exp(beta * logp.item())
            for w, logp in zip(batch.weights[row, :, k], batch.logps_per_view[row, :, k], strict=True)
            if w != 0
        ]
        if terms:
            tokens.append(math.log(sum(terms)) / beta)
    return sum(tokens) / len(tokens) if tokens else 0.0


def gradient(loss: torch.Tensor, batch: ObjectiveInputs) -> torch.Tensor:
    return torch.autograd.grad(loss, batch.logps_per_view)[0]


def sandwich(batch: ObjectiveInputs, beta: float, weight: float) -> list[float]:
    bounds = []
    for row, score in enumerate(scores(batch, batch.logps_per_view)):
        lower, upper = score / LENGTHS[row], upper_bound(batch, row, beta)
        bounds.append(lower if ADVANTAGES[row] > 0 else weight * upper + (1 - weight) * lower)
    return bounds


@pytest.mark.parametrize(("beta", "weight"), [(1.5, 0.5), (1.0, 1.0), (2.0, 0.0)])
def test_spg_is_the_sandwich_weighted_by_length(batch, beta, weight):
    loss, metrics = OBJECTIVES["spg"](batch, eubo_beta=beta, eubo_weight=weight)
    bounds = sandwich(batch, beta, weight)
    expected = -sum(n * a * b for n, a, b in zip(LENGTHS, ADVANTAGES, bounds, strict=True)) / sum(LENGTHS)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    lower = [score / n for score, n in zip(scores(batch, batch.logps_per_view), LENGTHS, strict=True)]
    assert metrics["elbo"].item() == pytest.approx(sum(lower) / 6, rel=1e-5)
    assert metrics["eubo"].item() == pytest.approx(
        sum(upper_bound(batch, row, beta) for row in range(6)) / 6, rel=1e-5
    )


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_spg_raises_good_rows_through_the_elbo_and_lowers_bad_ones_by_responsibility(batch):
    # Tokens without a view must not pass through log 0, not even to be masked out later.
    with torch.autograd.detect_anomaly():
        grad = gradient(OBJECTIVES["spg"](batch, eubo_weight=1.0)[0], batch)
    assert grad.isfinite().all()
    good = -batch.weights[0] * ADVANTAGES[0] / sum(LENGTHS)
    torch.testing.assert_close(grad[0], good)
    # d EUBO / d log p_nk is view n's share of w p^b, and the shares of a token add up to 1.
    covered = (batch.weights[1] != 0).any(0)
    expected = torch.where(covered, -ADVANTAGES[1] * LENGTHS[1] / sum(LENGTHS) / covered.sum(), 0.0)
    torch.testing.assert_close(grad[1].sum(0), expected)


def all_pictures(num_completion: int) -> MaskedViews:
    """One view per hidden set, with the weight that it has in the mean over all draws of `elbo`."""
    hidden = [s for s in subsets(range(num_completion)) if s]
    views = [(s, 1 / (len(s) * math.comb(num_completion, len(s)))) for s in hidden]
    positions, weights = expected_views(views, num_completion, num_completion)
    return MaskedViews(positions[None], weights[None])


def test_bounds_enclose_the_log_likelihood_of_a_consistent_model():
    model = JointTable(num_words=4, num_completion=3)
    ids = torch.tensor(list(itertools.product(range(4), repeat=3)))
    rollout = replace(rows_of(len(ids), 3), completion_ids=ids)
    one = all_pictures(3)
    views = MaskedViews(one.hidden.expand(len(ids), -1, -1), one.weights.expand(len(ids), -1, -1))
    logps = per_token_logps(model, rollout.prompt_ids, rollout.prompt_mask, ids, views, reduce=None)
    batch = ObjectiveInputs(
        logps, views.weights, None, None, torch.zeros(len(ids)), rollout.completion_mask, rollout.group
    )
    exact = model.log_likelihood(ids).float()
    previous = exact
    for beta in (1.0, 1.5, 3.0):
        lower, upper = (3 * bound for bound in evidence_bounds(batch, beta))
        # Every order is an exact chain rule here, so the lower bound touches.
        torch.testing.assert_close(lower, exact, rtol=0, atol=1e-4)
        # Power means grow with their exponent: the bound loosens.
        assert (upper >= previous - 1e-5).all()
        assert (upper - previous).mean() > 0.05
        previous = upper


def test_elbo_lies_below_the_log_likelihood_of_an_inconsistent_model(tiny_llada):
    """A random network's likelihood is that of its random-order sampler: the mean over orders of products."""
    model = tiny_llada(vocab_size=WORDS, mask_token_id=5, eos_token_id=4, pad_token_id=4, std=0.5)
    for seed in range(3):
        rollout = rows_of(1, 4, seed=seed)
        views = all_pictures(4)
        logps = per_token_logps(
            model, rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, views, reduce=None
        )[0]
        pictures = {tuple(hidden.tolist()): row for hidden, row in zip(views.hidden[0, :, 2:], logps, strict=True)}
        chances = []
        for order in itertools.permutations(range(4)):
            states = [tuple(k in order[step:] for k in range(4)) for step in range(4)]
            chances.append(math.exp(sum(pictures[state][k].item() for state, k in zip(states, order, strict=True))))
        likelihood = math.log(sum(chances) / len(chances))
        assert (views.weights[0] * logps).sum().item() < likelihood - 0.01


def test_log_of_a_mean_over_few_views_lies_below_the_upper_bound():
    """The bias of the EUBO on one completion of a consistent model, exactly, by enumeration of all draws.

    In nats of the whole sequence (log-likelihood -7.20, upper bound -6.75): with every token hidden at least once the
    estimate falls short by 0.35 at 3 views, 0.17 at 6: by 1/n. With fewer views tokens are left out, and it says
    nothing: -5.69 at 1.
    """
    model = JointTable(num_words=5, num_completion=3)
    rollout = replace(rows_of(1, 3), completion_ids=torch.tensor([[0, 1, 2]]))

    def bounds(hidden: torch.Tensor, weights: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(hidden)
        prompt_ids, prompt_mask, ids, mask = (
            tensor.expand(rows, -1)
            for tensor in (rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, rollout.completion_mask)
        )
        logps = per_token_logps(model, prompt_ids, prompt_mask, ids, MaskedViews(hidden, weights), reduce=None)
        none = torch.zeros(rows)
        lower, upper = evidence_bounds(ObjectiveInputs(logps, weights, None, None, none, mask, none.long()), beta)
        return 3 * lower, 3 * upper

    exact = model.log_likelihood(rollout.completion_ids).item()
    limit = bounds(all_pictures(3).hidden, all_pictures(3).weights, 1.0)[1].item()
    mean = {}
    for num_samples in (1, 3, 6):
        law = list(elbo_law(3, num_samples))
        hidden, weights = map(torch.stack, zip(*(expected_views(views, 3, 3) for _, views in law), strict=True))
        chance = torch.tensor([probability for probability, _ in law])
        lower, upper = bounds(hidden, weights, 1.0)
        assert (chance * lower).sum().item() == pytest.approx(exact, abs=1e-4)
        assert (lower > exact).any(), "single draws may lie on either side"
        mean[num_samples] = (chance * upper).sum().item()
    assert exact == pytest.approx(-7.20, abs=0.01)
    assert limit == pytest.approx(-6.75, abs=0.01)
    assert [mean[n] for n in (1, 3, 6)] == pytest.approx([-5.69, -7.09, -6.91], abs=0.01)
    assert (limit - mean[3]) / (limit - mean[6]) == pytest.approx(2, abs=0.2)


def test_bgpo_is_a_lower_bound_that_touches_where_the_policy_has_not_moved(batch):
    for advantages in (batch.advantages, -batch.advantages):
        moved = replace(batch, advantages=advantages)
        loss, metrics = OBJECTIVES["bgpo"](moved)
        log_ratio = [
            (new - old) / n
            for new, old, n in zip(
                scores(batch, batch.logps_per_view), scores(batch, batch.old_logps_per_view), LENGTHS, strict=True
            )
        ]
        ratio = sum(a * math.exp(d) for a, d in zip(advantages.tolist(), log_ratio, strict=True)) / 6
        assert -loss.item() < ratio
        assert metrics["max_abs_log_ratio"] > 0
        here = replace(moved, old_logps_per_view=batch.logps_per_view.detach())
        loss, _ = OBJECTIVES["bgpo"](here)
        assert loss.item() == pytest.approx(-advantages.mean().item())
        expected = -(batch.weights * (advantages / torch.tensor(LENGTHS) / 6)[:, None, None])
        torch.testing.assert_close(gradient(loss, batch), expected)


def test_bgpo_is_the_published_bound(batch):
    loss, _ = OBJECTIVES["bgpo"](batch)
    expected = 0.0
    for row, advantage in enumerate(ADVANTAGES):
        moves = [
            3 * (batch.weights[row, n] * (batch.logps_per_view - batch.old_logps_per_view)[row, n]).sum().item()
            for n in range(3)
        ]
        moves = [move / LENGTHS[row] for move in moves]
        expected += advantage * (1 + sum(moves) / 3 if advantage >= 0 else sum(math.exp(move) for move in moves) / 3)
    assert loss.item() == pytest.approx(-expected / 6, rel=1e-5)


def test_bgpo_needs_no_other_view_for_a_views_gradient(batch):
    grad = gradient(OBJECTIVES["bgpo"](batch)[0], batch)
    changed = batch.logps_per_view.detach().clone()
    changed[:, 1:] -= 1
    other = replace(batch, logps_per_view=changed.requires_grad_())
    torch.testing.assert_close(gradient(OBJECTIVES["bgpo"](other)[0], other)[:, 0], grad[:, 0])


def test_bgpo_wants_the_old_policy_view_by_view(batch):
    with pytest.raises(ValueError, match="old_logps_per_view"):
        OBJECTIVES["bgpo"](replace(batch, old_logps_per_view=None))


def softmax(values: list[float]) -> list[float]:
    return [math.exp(v) / sum(map(math.exp, values)) for v in values]


def by_group(values: list[float]) -> dict[int, list[float]]:
    return {0: values[0::2], 1: values[1::2]}


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_wd1_weighs_within_the_group(batch, temperature):
    loss, _ = OBJECTIVES["wd1"](batch, temperature=temperature)
    expected = 0.0
    for group, advantages in by_group(ADVANTAGES).items():
        logps = scores(batch, batch.logps_per_view)[group::2]
        up = softmax([a / temperature for a in advantages])
        down = softmax([-a / temperature for a in advantages])
        expected += sum((d - u) * logp for u, d, logp in zip(up, down, logps, strict=True))
    assert loss.item() == pytest.approx(expected / 2, rel=1e-5)


def test_wd1_teaches_nothing_where_all_advantages_are_equal(batch):
    loss, _ = OBJECTIVES["wd1"](replace(batch, advantages=torch.full((6,), 0.7)))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert gradient(loss, batch).abs().max() < 1e-7


@pytest.mark.parametrize("clip", [5.0, 1.0])
def test_stable_drl_normalises_clipped_weights_within_the_group(batch, clip):
    loss, metrics = OBJECTIVES["stable_drl"](batch, clip=clip)
    new, old = scores(batch, batch.logps_per_view), batch.old_logps.sum(1).tolist()
    log_ratio = [(a - b) / n for a, b, n in zip(new, old, LENGTHS, strict=True)]
    bounds = sandwich(batch, 1.5, 0.5)
    expected, grad = 0.0, torch.zeros(6)
    for group, ratios in by_group(log_ratio).items():
        weights = softmax([min(d, math.log(clip)) for d in ratios])
        for weight, row in zip(weights, range(group, 6, 2), strict=True):
            expected -= weight * ADVANTAGES[row] * bounds[row] / 2
            grad[row] = -weight * ADVANTAGES[row] / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["clip_ratio/region_mean"].item() == pytest.approx(sum(d > math.log(clip) for d in log_ratio) / 6)
    # The weights carry no gradient: a good row moves by its weight along the ELBO alone.
    torch.testing.assert_close(gradient(loss, batch)[0], grad[0] * batch.weights[0] / LENGTHS[0])


def test_stable_drl_on_policy_is_the_plain_policy_gradient(batch):
    on_policy = replace(batch, old_logps=None)
    loss, metrics = OBJECTIVES["stable_drl"](on_policy, eubo_weight=0.0)
    lower = [score / n for score, n in zip(scores(batch, batch.logps_per_view), LENGTHS, strict=True)]
    assert loss.item() == pytest.approx(-sum(a * b for a, b in zip(ADVANTAGES, lower, strict=True)) / 6, rel=1e-5)
    assert metrics["max_ratio"] == 1


@pytest.mark.parametrize(("kl", "per_token"), [*((kl, True) for kl in KL_FORMS), ("k2", False)])
def test_espo_clips_the_ratio_of_sequences_and_adds_their_kl(batch, kl, per_token):
    loss, metrics = OBJECTIVES["espo"](batch, epsilon=0.2, epsilon_high=0.3, beta=0.1, kl=kl, per_token=per_token)
    new, old, ref = (
        scores(batch, batch.logps_per_view),
        batch.old_logps.sum(1).tolist(),
        batch.ref_logps.sum(1).tolist(),
    )
    expected, clipped, divergences = 0.0, 0, []
    for row, (advantage, length) in enumerate(zip(ADVANTAGES, LENGTHS, strict=True)):
        ratio = math.exp((new[row] - old[row]) / (length if per_token else 1))
        bounded = min(max(ratio, 0.8), 1.3)
        expected -= min(ratio * advantage, bounded * advantage)
        clipped += bounded * advantage < ratio * advantage
        gap = new[row] - ref[row]
        divergences.append({"k1": gap, "k2": gap**2 / 2, "k3": math.exp(-gap) - 1 + gap}[kl] / length)
    assert loss.item() == pytest.approx((expected + 0.1 * sum(divergences)) / 6, rel=1e-4)
    assert metrics["clip_ratio/region_mean"].item() == pytest.approx(clipped / 6)
    assert metrics["kl"].item() == pytest.approx(sum(divergences) / 6, rel=1e-4)
    assert 0 < clipped < 6


def test_espo_needs_a_reference_for_its_kl(batch):
    with pytest.raises(ValueError, match="ref_logps"):
        OBJECTIVES["espo"](replace(batch, ref_logps=None), beta=0.1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_unmoved_policy_has_ratio_one_and_no_objective_reads_more_than_it_is_given(batch, name):
    unmoved = replace(
        batch, old_logps=batch.logps.detach(), ref_logps=None, old_logps_per_view=batch.logps_per_view.detach()
    )
    without = replace(unmoved, old_logps=None, old_logps_per_view=None)
    (loss, metrics), (same, _) = (OBJECTIVES[name](part) for part in (unmoved, without))
    assert loss.item() == same.item()
    assert (gradient(loss, batch) == gradient(same, batch)).all()
    for key in {"ratio", "max_ratio", "ratio_bound"} & metrics.keys():
        assert metrics[key] == 1
    assert all(value.shape in ((), (2,)) and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_without_advantage_do_not_move(batch, name):
    loss, _ = OBJECTIVES[name](replace(batch, advantages=torch.zeros(6)))
    assert gradient(loss, batch).abs().max() < 1e-7


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_do_not_depend_on_the_order_of_rows(batch, name):
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    tensors = {key: value[order] for key, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    mixed = replace(batch, **tensors)
    assert OBJECTIVES[name](mixed)[0].item() == pytest.approx(OBJECTIVES[name](batch)[0].item(), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if facts_of(OBJECTIVES[name]).whole_groups])
def test_objectives_of_whole_groups_average_over_them(batch, name):
    parts = []
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        tensors = {key: value[rows] for key, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        parts.append(OBJECTIVES[name](replace(batch, **tensors))[0])
    assert OBJECTIVES[name](batch)[0].item() == pytest.approx(sum(part.item() for part in parts) / 2, rel=1e-5)


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(8)
    return torch.randn(7, generator=generator).double(), torch.randn(7, generator=generator).double()


def test_kl_forms_in_the_mean_and_their_gradients():
    """Mean and gradient under samples of p, by enumeration of the words."""
    logits, ref_logits = distributions()
    logits.requires_grad_()
    p, q = logits.log_softmax(0), ref_logits.log_softmax(0)
    forward, backward = (
        torch.autograd.grad(kl_exact(*pair), logits, retain_graph=True)[0] for pair in ((p, q), (q, p))
    )
    exact = (p.exp() * (p - q)).sum().item()
    assert kl_exact(p, q).item() == pytest.approx(exact)
    chance = p.detach().exp()
    means = {name: (chance * form(p, q)).sum().item() for name, form in KL_FORMS.items()}
    assert means["k1"] == pytest.approx(exact)
    assert means["k3"] == pytest.approx(exact)
    assert means["k2"] != pytest.approx(exact, rel=0.05)
    grads = {
        name: torch.autograd.grad((chance * form(logits.log_softmax(0), q)).sum(), logits)[0]
        for name, form in KL_FORMS.items()
    }
    torch.testing.assert_close(grads["k1"], torch.zeros(7).double())
    torch.testing.assert_close(grads["k2"], forward)
    torch.testing.assert_close(grads["k3"], backward)


def test_kl_exact_keeps_leading_dimensions_and_is_zero_for_equal_distributions():
    logits = torch.randn(2, 3, 5, generator=seeded())
    assert kl_exact(logits.log_softmax(-1), logits.log_softmax(-1)).abs().max() == 0
    assert kl_exact(logits.log_softmax(-1), logits.flip(0).log_softmax(-1)).shape == (2, 3)


@pytest.mark.parametrize(
    ("estimator", "level", "settings", "message"),
    [
        ("elbo", "token", {}, "importance_sampling_level='token'"),
        ("quadrature", "token", {}, "set importance_sampling_level='sequence'"),
        ("block_random", "token", {}, "ratio makes sense per sequence only"),
        ("elbo", "sequence", {"beta": 0.04}, "set beta to 0"),
        ("one_step", "token", {"objective": "spg"}, "averages over draws"),
        ("trace", "sequence", {"objective": "bgpo"}, "averages over draws"),
        ("one_step", "token", {"objective": "wd1", "beta": 0.04}, "beta=0.04 with objective='wd1': it has no KL"),
        ("elbo", "token", {"objective": "bgpo", "beta": 0.04}, "set beta to 0"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(estimator, level, settings, message):
    with pytest.raises(ValueError, match=message):
        check(estimator, level, **settings)


def check(estimator: str, level: str = "token", objective: str = "grpo", beta: float = 0.0) -> None:
    settings = {"importance_sampling_level": level, "beta": beta}
    check_combination(ESTIMATORS[estimator], OBJECTIVES[objective], settings)


def test_combinations_of_the_published_methods_pass():
    for estimator in ESTIMATORS:
        if estimator not in ("elbo", "quadrature", "block_random"):
            check(estimator, "token", beta=0.04)
        check(estimator, "sequence")
        for objective in ("wd1", "stable_drl", "espo"):
            check(estimator, "token", objective=objective, beta=0.04 if objective == "espo" else 0.0)
    check("block_random", objective="spg")
    check("elbo", objective="bgpo")


def test_an_estimator_of_ones_own_is_refused_and_accepted_where_elbo_is():
    def own(rollout, *, generator):
        return estimators.elbo(rollout, generator=generator)

    with pytest.raises(ValueError, match="estimator='own' with objective='spg': .* say `draws = True`"):
        check_combination(own, OBJECTIVES["spg"], {})
    check_combination(own, OBJECTIVES["grpo"], {"importance_sampling_level": "token"})
    own.draws = True
    check_combination(own, OBJECTIVES["spg"], {})
    check_combination(functools.partial(own), OBJECTIVES["spg"], {})
    with pytest.raises(ValueError, match="estimator='own' with importance_sampling_level='token'"):
        check_combination(own, OBJECTIVES["grpo"], {"importance_sampling_level": "token"})
    check_combination(own, OBJECTIVES["grpo"], {"importance_sampling_level": "sequence"})


def test_a_fact_that_is_none_is_refused():
    def own(batch):
        return batch.logps.sum(), {}

    own.old_policy = "views"
    with pytest.raises(ValueError, match="old_policy='views' of .*: say 'summed', 'per_view' or None"):
        facts_of(own)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("spg", {"eubo_beta": 0.5}, "eubo_beta=0.5"),
        ("spg", {"eubo_weight": 1.5}, "eubo_weight=1.5"),
        ("wd1", {"temperature": 0.0}, "temperature=0.0"),
        ("stable_drl", {"clip": 0.0}, "clip=0.0"),
        ("espo", {"kl": "k4"}, "kl='k4'"),
    ],
)
def test_settings_out_of_range_are_refused(batch, name, settings, message):
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name](batch, **settings)
