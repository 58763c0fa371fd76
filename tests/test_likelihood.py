"""The Monte-Carlo likelihood against models whose likelihood is known."""

import random
from types import SimpleNamespace

import pytest
import torch
from enumeration import EOS, MASK, WORDS, seeded
from joint_table import JointTable

from dgrpo import estimators
from dgrpo.logprobs import log_likelihood, per_token_logps


def completions(num_rows: int, num_completion: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, EOS, (num_rows, num_completion), generator=seeded(seed))


def test_a_single_token_is_exact_with_one_sample(model, prompts):
    ids, mask = prompts
    tokens = completions(len(ids), 1)
    result = log_likelihood(model, ids, tokens, 1, generator=seeded(), prompt_mask=mask)
    for row, (length, token) in enumerate(zip(mask.sum(1).tolist(), tokens[:, 0].tolist(), strict=True)):
        canvas = torch.cat([ids[row, -length:], torch.tensor([model.config.mask_token_id])])
        expected = model(canvas[None]).logits[0, -1].log_softmax(-1)[token]
        assert result[row].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("complementary", [False, True])
def test_the_mean_is_the_log_likelihood_of_a_consistent_model(complementary):
    table = JointTable(num_words=5, num_completion=3)
    ids = torch.tensor([[0, 1, 2], [3, 3, 1], [4, 0, 4]])
    rounds = torch.stack(
        [
            log_likelihood(
                table,
                torch.zeros(3, 1, dtype=torch.long),
                ids,
                16,
                generator=seeded(number),
                complementary=complementary,
                batch_size=64,
            )
            for number in range(100)
        ]
    )
    error = rounds.std(0) / 10
    assert error.max() < 0.06
    assert ((rounds.mean(0) - table.log_likelihood(ids)).abs() < 4 * error).all()


def test_it_is_the_elbo_estimator_summed_over_tokens(model, prompts):
    ids, mask = prompts
    tokens = completions(len(ids), 4)
    rows = SimpleNamespace(prompt_mask=mask, completion_ids=tokens, completion_mask=torch.ones_like(tokens).bool())
    views = estimators.elbo(rows, generator=seeded(2), num_samples=5)
    expected = per_token_logps(model, ids, mask, tokens, views).sum(1).detach()
    result = log_likelihood(model, ids, tokens, 5, generator=seeded(2), prompt_mask=mask)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert result.dtype == torch.float32
    assert not result.requires_grad


def test_batch_size_and_padding_change_nothing(model, prompts):
    ids, mask = prompts
    tokens = completions(len(ids), 4)
    expected = log_likelihood(model, ids, tokens, 6, generator=seeded(), prompt_mask=mask, batch_size=1)
    wider = torch.nn.functional.pad(ids, (4, 0)), torch.nn.functional.pad(mask, (4, 0))
    for batch_size, (other_ids, other_mask) in ((4, prompts), (13, prompts), (1000, prompts), (7, wider)):
        result = log_likelihood(
            model, other_ids, tokens, 6, generator=seeded(), prompt_mask=other_mask, batch_size=batch_size
        )
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_no_more_pictures_at_a_time_than_batch_size(model, prompts, monkeypatch):
    seen = []
    forward = type(model).forward

    def counting(self, *args, passes, **settings):
        seen.extend(len(asked.input_ids) for asked in passes)
        return forward(self, *args, passes=passes, **settings)

    monkeypatch.setattr(type(model), "forward", counting)
    for batch_size in (1, 4, 12):
        seen.clear()
        log_likelihood(
            model, prompts[0], completions(5, 6), 5, generator=seeded(), prompt_mask=prompts[1], batch_size=batch_size
        )
        assert 1 <= max(seen) <= batch_size


def test_mode_and_random_state_are_left_as_they_were(model, prompts):
    model.train()
    states = torch.get_rng_state(), random.getstate()
    log_likelihood(model, prompts[0], completions(5, 3), 2, generator=seeded(), prompt_mask=prompts[1])
    assert model.training
    assert (torch.get_rng_state() == states[0]).all()
    assert random.getstate() == states[1]


def test_double_precision_weights_give_the_same(tiny_llada):
    single, double = (
        tiny_llada(vocab_size=WORDS, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS) for _ in range(2)
    )
    ids, tokens = completions(3, 2, seed=1), completions(3, 4)
    results = [log_likelihood(m, ids, tokens, 8, generator=seeded()) for m in (single, double.double())]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_prompts_padded_on_the_right_are_refused(model):
    # With a single row, cutting its shared padding off would leave nothing that looks wrong.
    ids, mask = completions(1, 4), torch.tensor([[True, True, False, False]])
    with pytest.raises(ValueError, match="prompt_mask: prompts must be padded on the left"):
        log_likelihood(model, ids, completions(1, 3), generator=seeded(), prompt_mask=mask)
    with pytest.raises(ValueError, match=r"prompt_ids \[1, 4\] and prompt_mask \[1, 3\]"):
        log_likelihood(model, ids, completions(1, 3), generator=seeded(), prompt_mask=mask[:, 1:])


def test_an_empty_prompt_is_refused_where_the_first_token_is_read_from_it(model):
    ids, tokens, mask = completions(2, 3), completions(2, 1), torch.tensor([[False] * 3, [True] * 3])
    result = log_likelihood(model, ids, tokens, 1, generator=seeded(), prompt_mask=mask)
    alone = model(torch.tensor([[model.config.mask_token_id]])).logits[0, 0].log_softmax(-1)[tokens[0, 0]]
    assert result[0].item() == pytest.approx(alone.item(), abs=1e-5)
    model.logit_shift = 1
    for width in (3, 0):
        with pytest.raises(ValueError, match="prompt_mask: a prompt is empty; give each at least one token"):
            log_likelihood(model, ids[:, :width], tokens, 1, generator=seeded(), prompt_mask=mask[:, :width])


def test_shapes_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match=r"\[B, P\] and \[B, C\]"):
        log_likelihood(model, completions(2, 3), completions(3, 3), generator=seeded())
    with pytest.raises(ValueError, match="batch_size=0"):
        log_likelihood(model, completions(2, 3), completions(2, 3), generator=seeded(), batch_size=0)
