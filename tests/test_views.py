"""Masked views as data: drawn from a stream of their own, checked for leaks, shown as pictures."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from trainers import MASK

from dgrpo.noise import stream
from dgrpo.sampling import Rollout
from dgrpo.views import MaskedViews, draw_views

KEY = ("masks", 7, 3)


def coin_flips(rollout, *, generator: torch.Generator) -> MaskedViews:
    """An estimator that draws for whatever width it is given, padding included: draw_views must not give it any."""
    num_rows, width = rollout.prompt_mask.shape
    prompt = torch.rand(width, generator=generator).expand(num_rows, 2, width)
    completion = torch.rand(num_rows, 2, rollout.completion_ids.shape[1], generator=generator)
    hidden = torch.cat([(prompt < 0.5) & rollout.prompt_mask[:, None], completion < 0.7], -1)
    return MaskedViews(hidden, completion * (completion < 0.7))


def wider(rollout: Rollout, by: int) -> Rollout:
    pad = torch.nn.functional.pad
    return replace(rollout, prompt_ids=pad(rollout.prompt_ids, (by, 0)), prompt_mask=pad(rollout.prompt_mask, (by, 0)))


def some_rows(rollout: Rollout, rows: list[int]) -> Rollout:
    tensors = {name: value[rows] for name, value in vars(rollout).items() if isinstance(value, torch.Tensor)}
    return replace(rollout, **tensors)


def test_views_depend_on_key_unit_and_draw_alone(rollout):
    unit = torch.tensor([4, 4, 4, 9, 9, 9])
    drawn = draw_views(coin_flips, rollout, unit, KEY, num_draws=3)
    hidden, weights = drawn.hidden, drawn.weights
    assert hidden.shape == (6, 3, 2, 11)
    assert weights.shape == (6, 3, 2, 5)

    # Each row has what the estimator said of it, behind the padding of the batch.
    short = replace(some_rows(rollout, [0, 1, 2]), prompt_mask=rollout.prompt_mask[:3, 2:])
    for draw in range(3):
        expected = coin_flips(short, generator=stream(*KEY, 4, draw))
        assert torch.equal(hidden[:3, draw, :, 2:], expected.hidden)
        assert torch.equal(weights[:3, draw], expected.weights)
    assert not hidden[:3, ..., :2].any()

    # Another width, other rows beside it, another order of units.
    drawn = draw_views(coin_flips, wider(rollout, 4), unit, KEY, num_draws=3)
    again, weights_again = drawn.hidden, drawn.weights
    assert torch.equal(again[..., 4:], hidden)
    assert not again[..., :4].any()
    assert torch.equal(weights_again, weights)
    rows = [3, 4, 5]
    drawn = draw_views(coin_flips, some_rows(rollout, rows), unit[rows], KEY, num_draws=3)
    alone, weights_alone = drawn.hidden, drawn.weights
    assert torch.equal(alone, hidden[rows])
    assert torch.equal(weights_alone, weights[rows])
    rows = [3, 0, 4, 1, 5, 2]
    drawn = draw_views(coin_flips, some_rows(rollout, rows), unit[rows], KEY, num_draws=3)
    mixed, weights_mixed = drawn.hidden, drawn.weights
    assert torch.equal(mixed, hidden[rows])
    assert torch.equal(weights_mixed, weights[rows])

    # A later draw does not depend on how many are drawn; draws, units and keys differ.
    fewer = draw_views(coin_flips, rollout, unit, KEY, num_draws=2).hidden
    assert torch.equal(fewer, hidden[:, :2])
    assert len({hidden[0, draw].numpy().tobytes() for draw in range(3)}) == 3
    assert not torch.equal(draw_views(coin_flips, rollout, unit + 1, KEY).hidden, hidden[:, :1])
    assert not torch.equal(draw_views(coin_flips, rollout, unit, ("masks", 7, 4)).hidden, hidden[:, :1])


def test_unit_number_is_part_of_the_key(rollout):
    same = some_rows(rollout, [0] * 4)
    hidden = draw_views(coin_flips, same, torch.tensor([0, 1, 2, 1]), KEY).hidden
    assert torch.equal(hidden[1, 0, :, :6], hidden[3, 0, :, :6])  # one unit, drawn together: one prompt noise
    assert not torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden[1], hidden[2])


def test_draw_views_leaves_global_random_states_alone(rollout):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    first = draw_views(coin_flips, rollout, rollout.group, KEY, num_draws=2)
    assert states() == before
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        second = draw_views(coin_flips, rollout, rollout.group, KEY, num_draws=2)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), second.tensors().values(), strict=True))


def test_draw_views_refuses_an_estimator_that_scores_what_it_shows(rollout):
    def leaky(rollout, *, generator):
        views = coin_flips(rollout, generator=generator)
        return MaskedViews(views.hidden, views.weights + 1)

    with pytest.raises(ValueError, match="score hidden tokens only"):
        draw_views(leaky, rollout, rollout.group, KEY)


def test_streams_differ_by_every_part_of_their_key():
    numbers = [torch.rand(2, generator=stream(*key)) for key in [(1, 2), (2, 1), (12,), (1, "2"), ("a", 1), ("a", 2)]]
    assert len({tuple(number.tolist()) for number in numbers}) == len(numbers)
    assert torch.equal(torch.rand(2, generator=stream("a", 1)), numbers[4])


def test_streams_are_the_same_in_every_process_and_version():
    # Checkpoints resume with the numbers that they would have drawn: this value may never change.
    assert torch.randint(10**6, (3,), generator=stream("masks", 0, 1)).tolist() == [332570, 780309, 662679]


def test_check_refuses_a_scored_token_that_the_picture_shows():
    hidden = torch.tensor([[[False, True, True, False]]])
    weights = torch.tensor([[[1.0, 0.0]]])
    views = MaskedViews(hidden, weights)
    assert views.check() is views
    with pytest.raises(ValueError, match="weights are nonzero at positions that are not hidden"):
        MaskedViews(hidden, torch.tensor([[[1.0, 0.5]]])).check()
    with pytest.raises(ValueError, match="score hidden tokens only"):
        MaskedViews(hidden, torch.tensor([[[0.0, -0.5]]])).check()


def test_refuses_tensors_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"hidden must be bool.*torch.float32 \[2, 1, 4\]"):
        MaskedViews(torch.zeros(2, 1, 4), torch.zeros(2, 1, 2))
    with pytest.raises(ValueError, match=r"\[2, 3, 4\] and \[2, 1, 2\]"):
        MaskedViews(torch.zeros(2, 3, 4, dtype=torch.bool), torch.zeros(2, 1, 2))
    with pytest.raises(ValueError, match="4 positions cannot hold 5 completion tokens"):
        MaskedViews(torch.zeros(2, 1, 4, dtype=torch.bool), torch.zeros(2, 1, 5))


def test_canvases_show_mask_at_hidden_positions_and_the_text_elsewhere():
    hidden = torch.tensor([[[True, False, True], [False, False, True]]])
    canvases = MaskedViews(hidden, torch.zeros(1, 2, 1)).canvases(torch.tensor([[4, 5, 6]]), MASK)
    assert canvases.tolist() == [[[MASK, 5, MASK], [4, 5, MASK]]]
