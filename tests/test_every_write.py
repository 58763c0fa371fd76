"""Trajectories in which tokens are written, hidden and overwritten: every write is scored in the state it was in."""

import itertools
from dataclasses import replace

import pytest
import torch
from table_sampler import WORDS, Tables
from test_sampler_policy import BLOCKS, KEYS, edit, shuffle, without_end

from dgrpo import estimators
from dgrpo.logprobs import per_token_logps
from dgrpo.sampling import Rollout, generate
from dgrpo.sampling.rollout import completion_mask_of
from dgrpo.views import MaskedViews, draw_views

HIDE, WRITE, NUM_STEPS, END = 0.3, 0.6, 3, 4


def trajectories(model: Tables, canvas: tuple[int, ...], step: int = 0):
    """(chance of the coins, log-probability of the words, events, canvas) of a policy that hides and writes by coins.

    At each step a shown token is hidden with `HIDE`, an open one written with `WRITE`; the last step fills the rest.
    """
    if step == NUM_STEPS:
        yield 1.0, torch.zeros((), dtype=torch.float64), [], canvas
        return
    logps = model.log_probs(torch.tensor([canvas]))[0]
    last = step == NUM_STEPS - 1
    choices = []
    for position, word in enumerate(canvas):
        write = [(1.0 if last else WRITE, new, logps[position, new]) for new in range(WORDS)]
        stay = (
            [] if last and word == WORDS else [(1.0 if last else 1 - (WRITE if word == WORDS else HIDE), word, None)]
        )
        choices.append(stay + (write if word == WORDS else [] if last else [(HIDE, WORDS, None)]))
    for picked in itertools.product(*choices):
        coins, score = 1.0, torch.zeros((), dtype=torch.float64)
        for chance, _, logp in picked:
            coins, score = coins * chance, score if logp is None else score + logp
        after = tuple(word for _, word, _ in picked)
        events = [
            (step, place, -1 if new == WORDS else new)
            for place, (old, new) in enumerate(zip(canvas, after, strict=True))
            if new != old
        ]
        for more_coins, more_score, more, final in trajectories(model, after, step + 1):
            yield coins * more_coins, score + more_score, events + more, final


def rollout_of(events: list[list], finals: list, end: int) -> Rollout:
    """As `generate` gives it back: behind the end everything but the history says that nothing was written."""
    width, most = len(finals[0]), max(map(len, events))
    history = torch.tensor([[*each, *[(-1, -1, -1)] * (most - len(each))] for each in events])
    ids = torch.tensor(finals)
    revealed_at = torch.full(ids.shape, NUM_STEPS)
    for row, each in enumerate(events):
        for step, position, _ in each:
            revealed_at[row, position] = step
    shown = completion_mask_of(ids, torch.tensor([end]))
    return Rollout(
        prompt_ids=torch.zeros(len(ids), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(ids), 1, dtype=torch.bool),
        completion_ids=ids.where(shown, end),
        completion_mask=shown,
        revealed_at=revealed_at.where(shown, NUM_STEPS),
        confidence=torch.ones(len(ids), width),
        entropy=torch.zeros(len(ids), width),
        group=torch.zeros(len(ids), dtype=torch.long),
        num_forwards=0,
        num_steps=NUM_STEPS,
        history=history,
    )


def scores(model: Tables, rollout: Rollout, estimator) -> torch.Tensor:
    views = estimator(rollout, generator=torch.Generator()).check()
    given = rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, views
    return per_token_logps(model, *given).sum(1)


@pytest.mark.parametrize("end", [99, END], ids=["no end", "an end"])
def test_all_trajectories_of_a_remasking_policy_sum_to_one_and_have_the_exact_gradient(end):
    model = Tables(2)
    coins, logps, events, finals = zip(*trajectories(model, (WORDS, WORDS)), strict=True)
    exact, coins = torch.stack(logps), torch.tensor(coins, dtype=torch.float64)
    rollout = rollout_of(events, finals, end)
    # Some token was hidden again in most of them, and some were written behind the end.
    assert ((rollout.history[..., 2] == -1) & (rollout.history[..., 0] >= 0)).any(1).float().mean() > 0.5
    probs = coins * exact.exp()
    assert probs.sum().item() == pytest.approx(1)
    scored = scores(model, rollout, estimators.every_write)
    if end == 99:
        torch.testing.assert_close(scored, exact)
    # A reward of the answer alone; its expected gradient is that of all trajectories.
    code = (rollout.completion_ids * torch.tensor([7, 1])).sum(1)
    reward = torch.randn(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[code]
    (wanted,) = torch.autograd.grad((probs * reward).sum(), model.logits, retain_graph=True)
    (found,) = torch.autograd.grad((probs.detach() * reward * scored).sum(), model.logits)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    # What was written last does not say enough.
    (final,) = torch.autograd.grad(
        (probs.detach() * reward * scores(model, rollout, estimators.trace)).sum(), model.logits
    )
    assert (final - wanted).abs().max() > 0.01 * wanted.abs().max()


@pytest.mark.parametrize("policy", [edit, shuffle])
def test_views_are_the_states_and_score_what_was_written_in_them(model, prompts, policy):
    config = replace(BLOCKS, sampler_policy=policy)
    rollout = generate(without_end(model), *prompts, config, row_keys=KEYS)
    views = draw_views(estimators.every_write, rollout, torch.arange(5), ("key",)).each(lambda value: value[:, 0])
    canvases = views.canvases(torch.cat([rollout.prompt_ids, rollout.completion_ids], 1), -1)[..., -12:]
    states, steps = rollout.states()
    for row in range(5):
        count = int((steps[row] >= 0).sum())
        assert torch.equal(canvases[row, :count], states[row, :count])
        written = [(int(s), int(p), int(t)) for s, p, t in rollout.history[row] if s >= 0 and t >= 0]
        view, position = (views.weights[row] != 0).nonzero().unbind(1)
        found = zip(
            steps[row, view].tolist(), position.tolist(), views.targets[row, view, position].tolist(), strict=True
        )
        assert sorted(found) == sorted(written)


def test_without_revisions_it_is_the_trace(model, prompts):
    rollout = generate(model, *prompts, BLOCKS, row_keys=KEYS)
    given = rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids
    trace, every = (
        per_token_logps(model, *given, estimator(rollout, generator=torch.Generator())).sum(1)
        for estimator in (estimators.trace, estimators.every_write)
    )
    rows = rollout.completion_mask.all(1)
    assert rows.any()
    torch.testing.assert_close(trace[rows], every[rows], rtol=1e-5, atol=1e-5)


def test_a_shown_token_is_scored_only_where_another_is_the_target():
    hidden, weights = torch.zeros(1, 1, 3, dtype=torch.bool), torch.tensor([[[1.0, 0.0]]])
    shown, targets = torch.tensor([[[3, 4]]]), torch.tensor([[[2, 4]]])
    MaskedViews(hidden, weights, shown, targets).check()
    MaskedViews(hidden, weights, targets=targets).check(torch.tensor([[1, 4]]))
    for views in (MaskedViews(hidden, weights, shown, shown), MaskedViews(hidden, weights + 1, shown, targets)):
        with pytest.raises(ValueError, match="score hidden tokens only, or other tokens than those shown"):
            views.check()
    with pytest.raises(ValueError, match="score hidden tokens only"):
        MaskedViews(hidden, weights, targets=targets).check(torch.tensor([[2, 4]]))
    with pytest.raises(ValueError, match=r"targets \[1, 2\] must be \[1, 1, 2\]"):
        MaskedViews(hidden, weights, targets=targets[0])
