"""Remasking policies on five words: the exact law of what they write, and what they never touch."""

import itertools

import pytest
import torch
from enumeration import assert_frequencies
from table_sampler import WORDS, Tables
from test_sampler_policy import KEYS, without_end

from dgrpo import estimators
from dgrpo.logprobs import per_token_logps
from dgrpo.policies import remasking
from dgrpo.sampling import SamplerConfig, generate
from dgrpo.sampling.policy import Sight

ROWS = 4000


def sample(model: Tables, policy, num_steps: int, num_rows: int = ROWS, **kwargs):
    width = len(model.shape)
    prompts = torch.zeros(num_rows, 1, dtype=torch.long)
    config = SamplerConfig(
        width, width, num_steps, 1.0, remasking="random", sampler_policy=policy, sampler_policy_kwargs=kwargs or None
    )
    return generate(model, prompts, torch.ones_like(prompts), config, generator=torch.Generator().manual_seed(7))


def assert_law(rollout, law: torch.Tensor) -> None:
    """Frequencies of both words [5, 5]; rare pairs count as one."""
    code = rollout.completion_ids[:, 0] * WORDS + rollout.completion_ids[:, 1]
    counts, law = code.bincount(minlength=WORDS**2).double(), law.detach().flatten()
    rare = law * len(code) < 20
    if rare.any():
        counts, law = (torch.cat([each[~rare], each[rare].sum()[None]]) for each in (counts, law))
    assert_frequencies(counts, law)


def law_of(model: Tables, rates: list[tuple[float, float]]) -> torch.Tensor:
    """Law [5, 5] of two words after steps that write an open and hide a shown one with these probabilities."""
    law = {(WORDS, WORDS): 1.0}
    for write, hide in rates:
        after: dict[tuple, torch.Tensor] = {}
        for canvas, chance in law.items():
            words = model.log_probs(torch.tensor([canvas]))[0].detach().exp()
            options = []
            for place, word in enumerate(canvas):
                keep = [(word, 1 - hide), (WORDS, hide)]
                fill = [*((new, write * words[place, new]) for new in range(WORDS)), (WORDS, 1 - write)]
                options.append(fill if word == WORDS else keep)
            for (first, p), (second, q) in itertools.product(*options):
                after[first, second] = after.get((first, second), 0.0) + chance * p * q
        law = after
    return torch.tensor([[float(law.get((a, b), 0.0)) for b in range(WORDS)] for a in range(WORDS)])


# Policy, steps, settings, and by hand: (write, hide) of each step and the share that it leaves shown.
CASES = {
    "ancestral, 1 step": ("ancestral", {}, [(1, 0)], [1]),
    "ancestral, 2 steps": ("ancestral", {}, [(1 / 2, 0), (1, 0)], [1 / 2, 1]),
    "ancestral, 3 steps": ("ancestral", {}, [(1 / 3, 0), (1 / 2, 0), (1, 0)], [1 / 3, 2 / 3, 1]),
    "cap": ("remdm_cap", {"eta": 0.4}, [(1 / 3, 0), (0.7, 0.4), (1, 0)], [1 / 3, 2 / 3, 1]),
    "rescale": ("remdm_rescale", {"eta": 0.5}, [(1 / 3, 0), (3 / 4, 1 / 2), (1, 0)], [1 / 3, 2 / 3, 1]),
    "loop": (
        "remdm_loop",
        {"eta": 0.25, "on": 0.5, "off": 0.25, "shown": 0.5},
        [(1 / 4, 0), (1 / 3, 0), (1 / 4, 1 / 4), (1, 0)],
        [1 / 4, 1 / 2, 1 / 2, 1],
    ),
}
CASES["cap, at the largest"] = (
    "remdm_cap",
    {"eta": 1.0},
    # 1/4 to 1/2: sigma 1 (largest 2), write (1/2) / (3/4); 1/2 to 3/4: 1/2, (3/4 - 1/4) / (1/2).
    [(1 / 4, 0), (2 / 3, 1), (1, 1 / 2), (1, 0)],
    [1 / 4, 1 / 2, 3 / 4, 1],
)


@pytest.mark.parametrize("case", CASES)
def test_policies_that_toss_coins_follow_their_law(case):
    name, kwargs, rates, shares = CASES[case]
    model = Tables(2)
    rollout = sample(model, getattr(remasking, name), len(rates), **kwargs)
    assert_law(rollout, law_of(model, rates))
    step, _, token = rollout.history.unbind(2)
    shown = 0.0
    for number, share in enumerate(shares):
        shown += (((token >= 0).double() - (token < 0).double()) * (step == number)).sum().item() / (2 * ROWS)
        assert shown == pytest.approx(share, abs=5 * (0.25 / (2 * ROWS)) ** 0.5)
    assert rollout.num_forwards == len(rates)


@pytest.mark.slow
def test_ancestral_sampling_in_one_step_is_one_step_and_in_many_the_order_averaged_law():
    model = Tables(2)
    rollout = sample(model, remasking.ancestral, 1)
    given = rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids
    with torch.no_grad():
        drawn, one_step = (
            per_token_logps(model, *given, views)
            for views in (
                estimators.trace(rollout, generator=torch.Generator()),
                estimators.one_step(rollout, generator=torch.Generator().manual_seed(1), p_mask_prompt=0.0),
            )
        )
    assert torch.equal(drawn, one_step)
    # Of 60 steps one text in 60 has both words from the same one.
    words = model.log_probs(torch.tensor([[WORDS, WORDS]]))[0].exp()
    second = torch.stack([model.log_probs(torch.tensor([[a, WORDS]]))[0, 1].exp() for a in range(WORDS)])
    first = torch.stack([model.log_probs(torch.tensor([[WORDS, b]]))[0, 0].exp() for b in range(WORDS)], 1)
    averaged = (words[0][:, None] * second + words[1][None] * first) / 2
    assert_law(sample(model, remasking.ancestral, 60, 20_000), averaged)
    with pytest.raises(AssertionError, match="chi-square"):
        assert_law(sample(model, remasking.ancestral, 2, 20_000), averaged)


def test_d3pms_bound_is_one_step_at_one_step_and_the_elbo_at_many():
    model = Tables(2, joint=True)
    ids = torch.tensor(list(itertools.product(range(WORDS), repeat=2)))

    def bound(num_steps: int) -> torch.Tensor:
        total = torch.zeros(len(ids), dtype=torch.float64)
        for i, hidden in itertools.product(range(1, num_steps + 1), itertools.product((False, True), repeat=2)):
            mask = torch.tensor(hidden)
            logps = model.log_probs(ids.masked_fill(mask, WORDS)).gather(2, ids[..., None])[..., 0]
            chance = (i / num_steps) ** sum(hidden) * (1 - i / num_steps) ** (2 - sum(hidden))
            total += chance / i * (logps * mask).sum(1)
        return total

    prompts = torch.zeros(len(ids), 1, dtype=torch.long)
    rollout = sample(model, remasking.ancestral, 1).rows(list(range(len(ids))))
    rollout = type(rollout)(**{**vars(rollout), "completion_ids": ids})
    views = estimators.one_step(rollout, generator=torch.Generator().manual_seed(1), p_mask_prompt=0.0)
    one_step = per_token_logps(model, prompts, torch.ones_like(prompts), ids, views).sum(1)
    torch.testing.assert_close(bound(1), one_step)
    # Of a consistent model the ELBO is the log-likelihood.
    errors = [(bound(steps) - model.table.log_likelihood(ids)).abs().max().item() for steps in (1, 10, 100)]
    assert errors[0] > 8 * errors[1] > 64 * errors[2] > 0


@pytest.mark.slow
def test_tokens_redrawn_one_by_one_keep_the_law_and_together_they_do_not():
    model = Tables(2, joint=True)
    assert_law(sample(model, remasking.redraw, 6, 20_000, num_tokens=2, num_rounds=2, by="random"), model.table.joint)
    with pytest.raises(AssertionError, match="chi-square"):
        assert_law(
            sample(model, remasking.redraw, 4, 20_000, num_tokens=2, num_rounds=2, by="random", one_by_one=False),
            model.table.joint,
        )


def sight(ids, confidence, probs, step=0, num_steps=4, given=None, noise=None) -> Sight:
    ids, confidence, probs = (torch.tensor([each]) for each in (ids, confidence, probs))
    is_open = ids == 9
    return Sight(
        ids=ids,
        is_open=is_open,
        tokens=torch.arange(ids.shape[1])[None] + 20,
        probs=probs,
        entropy=probs,
        order=probs,
        positions=torch.arange(ids.shape[1])[None],
        step=step,
        num_steps=num_steps,
        mask_token_id=9,
        end_ids=torch.tensor([99]),
        noise=torch.full(ids.shape, 0.5) if noise is None else noise,
        confidence=confidence,
        given=torch.zeros_like(is_open) if given is None else torch.tensor([given]),
    )


def test_rcr_hides_the_lowest_recorded_confidences_until_the_scheduled_number_is_shown():
    # A shown token of confidence 0 is the least sure one; a given one never is.
    seen = sight([1, 2, 9, 9, 9], [0.0, 0.8, 0, 0, 0], [0.9, 0.9, 0.5, 0.7, 0.6], given=[False, True, *[False] * 3])
    assert remasking.rcr(seen, torch.tensor([1]), None).tolist() == [[9, 2, 9, 23, 24]]
    assert remasking.rcr(seen, torch.tensor([3]), None).tolist() == [[1, 2, 22, 23, 24]]
    with pytest.raises(ValueError, match=r"^threshold=0.9: .*follows `diffusion_steps`"):
        SamplerConfig(32, 32, 32, sampler_policy="dgrpo.policies.remasking:rcr", threshold=0.9)


def test_conf_hides_by_the_softmax_of_recorded_probabilities():
    noise = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(3))
    seen = sight([1, 2, 3, 9], [0.1, 0.9, 1.0, 0.0], [0.5] * 4, 2, 4, given=[False, False, True, False], noise=noise)
    seen = seen._replace(**{n: v.expand(ROWS, -1) for n, v in seen._asdict().items() if getattr(v, "ndim", 0) == 2})
    after = remasking.remdm_conf(seen, None, None)
    # From 1/2 to 3/4: the largest sigma is 1/2; an open token is written with (1/4) / (1/2).
    share = torch.tensor([-0.1, -0.9]).softmax(0) / 2
    hidden = (after == 9).float().mean(0)
    torch.testing.assert_close(hidden, torch.tensor([*share, 0.0, 0.5]), rtol=0, atol=0.035)


def test_redraw_hides_the_least_sure_and_the_control_commits_one_at_a_time_at_the_end():
    kwargs = {"num_tokens": 2}
    filling = sight([1, 9, 9, 9], [0.4, 0, 0, 0], [0.9, 0.3, 0.8, 0.6], step=1)
    config = SamplerConfig()
    assert remasking.redraw(filling, None, config, **kwargs).tolist() == [[9, 9, 22, 23]]
    drawing = sight([9, 9, 22, 23], [0, 0, 0.8, 0.6], [0.4, 0.3, 0.8, 0.6], step=2)
    assert remasking.redraw(drawing, None, config, **kwargs).tolist() == [[20, 9, 22, 23]]
    with pytest.raises(
        ValueError, match="num_tokens=4, num_rounds=1: must be at least 1, and leave one of the 4 steps"
    ):
        remasking.redraw(filling, None, config)
    with pytest.raises(ValueError, match="by='doubt': choose 'confidence' or 'random'"):
        remasking.redraw(filling, None, config, by="doubt", **kwargs)
    counts, ids = [], [9] * 19
    for step in range(8):
        after = remasking.back_loaded(sight(ids, [0.0] * 19, [0.5] * 19, step, 8), None, config)[0].tolist()
        counts.append(ids.count(9) - after.count(9))
        ids = after
    assert counts == [4, 4, 4, 3, 1, 1, 1, 1]


@pytest.mark.parametrize("kwargs", [{"eta": 0.5}, {"num_tokens": 2}, {}], ids=["cap", "redraw", "rcr"])
def test_given_tokens_and_finished_blocks_are_never_touched(model, prompts, kwargs):
    name = {"eta": "remdm_cap", "num_tokens": "redraw"}.get(next(iter(kwargs), ""), "rcr")
    fixed = torch.full((5, 12), -1)
    fixed[0, [1, 4, 7]] = torch.tensor([3, 5, 9])
    fixed[1, :6] = 2
    config = SamplerConfig(
        12, 6, 12, 0.9, sampler_policy=f"dgrpo.policies.remasking:{name}", sampler_policy_kwargs=kwargs or None
    )
    rollout = generate(without_end(model), *prompts, config, row_keys=KEYS, fixed=fixed)
    given = fixed >= 0
    assert torch.equal(rollout.completion_ids[given], fixed[given])
    step, position, token = rollout.history.unbind(2)
    assert not given.gather(1, position.clamp(min=0))[step >= 0].any()
    assert torch.equal((step // 6)[step >= 0], (position // 6)[step >= 0])
    assert name == "rcr" or ((token == -1) & (step >= 0)).any()


def test_settings_of_a_policy_are_checked_with_it():
    cap = "dgrpo.policies.remasking:remdm_cap"
    assert SamplerConfig(sampler_policy=cap, sampler_policy_kwargs={"eta": 0.1}).policy.persists
    with pytest.raises(ValueError, match=r"config, \*\*\{'eat': 0.1\}\) as package.module:function;"):
        SamplerConfig(sampler_policy=cap, sampler_policy_kwargs={"eat": 0.1})
    with pytest.raises(ValueError, match="sampler_policy_kwargs=.*needs a sampler_policy that takes them"):
        SamplerConfig(sampler_policy_kwargs={"eta": 0.1})
