"""GRPO's loss against TRL's own `_compute_loss`: value and gradient, for every setting that is honoured."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trainers import place_in_group, tiny_llada, tiny_trainer
from trl import GRPOConfig, GRPOTrainer

from dgrpo.objectives import LOSS_TYPES, SHARED, ObjectiveInputs, grpo, kl_k1, kl_k2

DEFAULTS = {name: GRPOConfig.__dataclass_fields__[name].default for name in SHARED if name != "kl"}
SETTINGS = [
    *({"loss_type": name} for name in LOSS_TYPES),
    *({"loss_type": name, "importance_sampling_level": "sequence"} for name in LOSS_TYPES),
    *({"loss_type": name, "beta": 0.3} for name in LOSS_TYPES),
    {"epsilon": 0.05, "epsilon_high": 0.4},
    {"delta": 1.1},
    {"loss_type": "cispo", "epsilon_high": 1.5},
    {"beta": 0.3, "use_bias_correction_kl": False},
    {"beta": 0.3, "importance_sampling_level": "sequence"},
    {"top_entropy_quantile": 0.3},
    {"loss_type": "dapo", "top_entropy_quantile": 0.6, "entropy_coef": 0.2},
    {"loss_type": "grpo", "entropy_coef": 0.2},
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5},
    {
        "loss_type": "vespo",
        "vespo_k_pos": 1.0,
        "vespo_lambda_pos": 2.0,
        "vespo_k_neg": 2.5,
        "vespo_lambda_neg": 1.5,
    },
]


def inputs(on_policy: bool = False) -> dict[str, torch.Tensor]:
    """Six completions of at most five tokens, one of them left out, and scores under three policies."""
    generator = torch.Generator().manual_seed(5)
    logps, old, ref = (-2 * torch.rand(6, 5, generator=generator) for _ in range(3))
    mask = torch.arange(5) < torch.tensor([5, 3, 0, 1, 4, 5])[:, None]
    return {
        "logps": (logps * mask).requires_grad_(),
        "entropies": (torch.rand(6, 5, generator=generator) * mask).requires_grad_(),
        "old_per_token_logps": None if on_policy else old * mask,
        "ref_per_token_logps": ref * mask,
        "advantages": torch.tensor([1.0, -0.5, 0.7, 0.0, -1.5, 0.25]),
        "completion_mask": mask.long(),
        "prompt_ids": torch.zeros(6, 1).long(),
        "prompt_mask": torch.ones(6, 1).long(),
        "completion_ids": torch.zeros(6, 5).long(),
        "num_items_in_batch": torch.tensor(36),
    }


def of_trl(given: dict, settings: dict) -> tuple[torch.Tensor, dict]:
    """Loss and metrics of TRL, for a generation batch of two micro-batches."""
    values = DEFAULTS | settings
    alone = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, **kwargs: x,
    )  # fmt: skip
    high = values["epsilon_high"]
    trainer = SimpleNamespace(
        **values | {"epsilon_high": values["epsilon"] if high is None else high, "epsilon_low": values["epsilon"]},
        args=SimpleNamespace(**values, steps_per_generation=2),
        model=SimpleNamespace(training=True),
        accelerator=alone,
        aux_loss_enabled=False,
        off_policy_mask_threshold=None,
        use_vllm=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=values["entropy_coef"] != 0,
        max_completion_length=5,
        current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list)},
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (given["logps"], given["entropies"], None),
    )
    trainer.get_high_entropy_mask = lambda *args: GRPOTrainer.get_high_entropy_mask(trainer, *args)
    return GRPOTrainer._compute_loss(trainer, None, given), trainer._metrics["train"]


def of_ours(given: dict, settings: dict, **more) -> tuple[torch.Tensor, dict]:
    batch = ObjectiveInputs(
        logps_per_view=given["logps"][:, None],
        weights=torch.ones(6, 1, 5),
        old_logps=given["old_per_token_logps"],
        ref_logps=given["ref_per_token_logps"],
        advantages=given["advantages"],
        completion_mask=given["completion_mask"].bool(),
        group=torch.tensor([0, 0, 0, 1, 1, 1]),
        entropies=given["entropies"],
        tokens_per_batch=given["num_items_in_batch"] / 2,
        **more,
    )
    return grpo(batch, **settings)


def gradients(loss: torch.Tensor, given: dict) -> torch.Tensor:
    found = torch.autograd.grad(loss, [given["logps"], given["entropies"]], allow_unused=True)
    return torch.stack([torch.zeros(6, 5) if each is None else each for each in found])


@pytest.mark.parametrize("on_policy", [False, True], ids=["", "on policy"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_loss_gradient_and_metrics_are_trls(settings, on_policy):
    given = inputs(on_policy)
    (expected, theirs), (loss, ours) = (
        of_trl(given, settings),
        of_ours(given, DEFAULTS | {"entropy_coef": None} | settings),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradients(loss, given), gradients(expected, given), rtol=1e-5, atol=1e-7)
    for name, value in ours.items():
        if name != "bonus_entropy":
            value = value if value.dim() == 0 else value[0] / value[1]
            assert value.item() == pytest.approx(theirs[name][0], rel=1e-5, abs=1e-7), name


def test_every_shared_setting_is_tried_against_trl():
    tried = {name for settings in SETTINGS for name in settings}
    assert tried == set(DEFAULTS)


@pytest.mark.parametrize(("kl", "form"), [("k1", kl_k1), ("k2", kl_k2)])
def test_other_forms_of_the_kl_are_a_mean_over_tokens(kl, form):
    given = inputs()
    mask = given["completion_mask"]
    plain, paid = (of_ours(given, {"kl": kl, "beta": beta, "use_bias_correction_kl": False})[0] for beta in (0, 0.3))
    divergence = (form(given["logps"], given["ref_per_token_logps"]) * mask).sum() / mask.sum()
    torch.testing.assert_close(paid - plain, 0.3 * divergence)


def test_the_exact_kl_is_what_was_measured_without_correction():
    given = inputs()
    mask, measured = given["completion_mask"], torch.rand(6, 5)
    plain, paid = (of_ours(given, {"kl": "exact", "beta": beta}, divergences=measured)[0] for beta in (0, 0.3))
    torch.testing.assert_close(paid - plain, 0.3 * (measured * mask).sum() / mask.sum())
    with pytest.raises(ValueError, match="kl='exact': the reference policy was not scored"):
        of_ours(given, {"kl": "exact", "beta": 0.3})


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss_type": name} for name in LOSS_TYPES),
        {"loss_type": "dapo", "use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 2.5},
        {"loss_type": "dapo", "top_entropy_quantile": 0.5, "entropy_coef": 0.1},
    ],
    ids=str,
)
def test_in_a_run_every_micro_batch_has_trls_loss(tmp_path, settings):
    """Two micro-batches an update, rollouts of four, truncated rows left out: TRL sees the same scores and batch."""
    trainer = tiny_trainer(
        tmp_path, place_in_group, None, tiny_llada(std=0.03), num_iterations=2, gradient_accumulation_steps=2,
        steps_per_generation=4, mask_truncated_completions=True, learning_rate=1e-2, max_steps=8, **settings,
    )  # fmt: skip
    inner, pairs, coefs = trainer._compute_loss, [], []

    def spy(model, inputs):
        state = {
            name: getattr(trainer, name) for name in ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
        }
        seen = []
        score = trainer._score
        trainer._score = lambda *args, **kwargs: seen.append(score(*args, **kwargs)) or seen[-1]
        loss = inner(model, inputs)
        trainer._score = score
        after = {name: getattr(trainer, name) for name in state}
        logps, entropies = ((inputs["weights"] * seen[0].logps).sum(1), seen[0].entropies.sum(1))
        trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, entropies, None)
        metrics, trainer._metrics = trainer._metrics, {"train": defaultdict(list)}
        trainer.__dict__.update(state)
        expected = GRPOTrainer._compute_loss(trainer, model, inputs)
        del trainer._get_per_token_logps_and_entropies
        coefs.append((trainer.entropy_coef, after["entropy_coef"]))
        trainer._metrics = metrics
        trainer.__dict__.update(after)
        pairs.append((loss.item(), expected.item()))
        return loss

    trainer._compute_loss = spy
    trainer.train()
    assert len(pairs) == 16
    assert any(abs(loss) > 1e-3 for loss, _ in pairs)
    for loss, expected in pairs:
        assert loss == pytest.approx(expected, rel=1e-5, abs=2e-7)
    for ours, theirs in coefs:
        assert ours == pytest.approx(theirs)


def test_the_divisor_counts_the_tokens_that_the_mask_keeps(tmp_path):
    """Also of a completion whose last token is [PAD], which TRL takes for an end of text."""
    trainer = tiny_trainer(tmp_path, mask_truncated_completions=True, loss_type="dapo")
    source = trainer.rollout_source

    class Padded:
        update = source.update

        def __call__(self, *args):
            rollout = source(*args)
            rollout.completion_ids.copy_(torch.tensor([1, 2, 3, 4, 5, 23]))
            rollout.completion_ids[0] = torch.tensor([1, 2, 3, 21, 21, 21])
            rollout.completion_mask[:] = True
            rollout.completion_mask[0, 4:] = False
            return rollout

    trainer.rollout_source = Padded()
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "a b", "letter": "a"}] * 8)
    assert batch["completion_mask"].sum(1).tolist() == [4, 0, 0, 0, 0, 0, 0, 0]
    assert batch["num_items_in_batch"] == 4
