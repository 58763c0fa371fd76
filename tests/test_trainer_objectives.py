"""Objectives of our own inside the trainer: accumulation, rows left out, what is scored for them and what logged."""

import math

import pytest
import torch
from trainers import EOS, lora, place_in_group

METHODS = {
    "spg": {"estimator": "block_random", "estimator_kwargs": {"block_length": 3}},
    "bgpo": {"estimator": "elbo"},
    "wd1": {},
    "stable_drl": {"estimator": "block_random", "estimator_kwargs": {"block_length": 3}},
    "espo": {"estimator": "elbo", "estimator_kwargs": {"complementary": True}},
}
EVERY = pytest.mark.parametrize("objective", METHODS)


@pytest.fixture
def run_of(trainer):
    """A function (objective, **settings) -> trainer of that method with full groups in each micro-batch."""

    def build(objective, **settings):
        return trainer(objective=objective, **METHODS[objective] | {"reward": place_in_group} | settings)

    return build


def gradient_norm(run) -> float:
    """Of the first update, on a group of four rollouts none of which came to its end."""
    run.model.train()
    source = run.rollout_source

    class CutOff:
        update = source.update

        def __call__(self, *args):
            rollout = source(*args)
            rollout.completion_ids.masked_fill_(rollout.completion_ids == EOS, 7)
            rollout.completion_mask.fill_(True)
            return rollout

    run.rollout_source = CutOff()
    run.current_gradient_accumulation_steps = 1
    inputs = run._prepare_inputs([{"prompt": "a b", "letter": "a"}] * 4)
    assert (inputs["completion_ids"] != EOS).all()
    run.compute_loss(run.model, inputs).backward()
    return torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]).norm().item()


@EVERY
def test_truncated_rows_have_no_gradient_where_they_are_masked(run_of, tiny_llada, objective):
    norms = {}
    for masked in (False, True):
        settings = {"per_device_train_batch_size": 4, "num_iterations": 1, "mask_truncated_completions": masked}
        norms[masked] = gradient_norm(run_of(objective, own_model=tiny_llada(), **settings))
    assert norms[False] > 1e-4
    assert norms[True] == 0


@EVERY
def test_micro_batches_times_accumulation_does_not_matter(run_of, tiny_llada, objective):
    """16 x 1 equals 8 x 2 where all rows are equally long."""
    weights = []
    for size, accumulation in ((16, 1), (8, 2)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        run = run_of(objective, own_model=tiny_llada(), stop_at_eos=False, **settings)
        run.train()
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
        # Adam divides by the size of a gradient, its rounding included.
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("objective", "passes"), [("wd1", 0), ("spg", 0), ("espo", 1), ("bgpo", 1), ("stable_drl", 1)]
)
def test_the_old_policy_is_scored_only_where_there_is_a_ratio(run_of, objective, passes):
    run = run_of(objective, num_iterations=2, max_steps=2)
    scored = []
    score = run._logps_of_draws

    def spy(*given):
        scored.append(given)
        return score(*given)

    run._logps_of_draws = spy
    run.train()
    assert len(scored) == (objective in ("bgpo", "espo", "stable_drl"))


@EVERY
def test_the_kl_is_logged_beside_an_objective(run_of, tiny_llada, objective):
    finals, logged = [], []
    for log_kl in (False, True):
        run = run_of(objective, own_model=tiny_llada(), lora=lora(), log_kl=log_kl, learning_rate=1e-2)
        run.train()
        finals.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
        logged.append([row["kl"] for row in run.state.log_history if "kl" in row])
    assert torch.equal(*finals)
    assert logged[0] == []
    assert len(logged[1]) == 4
    assert all(value != 0 for value in logged[1])


def test_where_every_row_is_skipped_no_kl_is_logged(trainer):
    run = trainer(reward=lambda prompts, completions, **columns: [1.0] * len(prompts), lora=lora(), log_kl=True)
    run.train()
    assert not any("kl" in row or row.get("entropy") is not None for row in run.state.log_history)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"estimator": "trace", "estimator_kwargs": {"top_k": 2}},
        {"estimator": "quadrature", "importance_sampling_level": "sequence"},
        {"estimator": "elbo", "estimator_kwargs": {"num_samples": 1}, "importance_sampling_level": "sequence"},
        {"objective": "spg", **METHODS["spg"]},
        {"objective": "espo", **METHODS["espo"]},
    ],
    ids=str,
)
def test_the_entropy_that_is_logged_is_that_of_the_tokens_that_are_scored(trainer, tiny_llada, settings):
    """A network whose every prediction is uniform has log of the number of words."""
    policy = tiny_llada()
    for parameter in policy.parameters():
        parameter.data.zero_()
    run = trainer(own_model=policy, learning_rate=0.0, max_steps=2, reward=place_in_group, **settings)
    run.train()
    logged = [row["entropy"] for row in run.state.log_history if "entropy" in row]
    assert logged == pytest.approx([math.log(policy.config.vocab_size)] * 2, rel=1e-4)
