"""VRPO: the ELBO it compares, whose draws it shares, and that preferences are learned."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trainers import MASK

from dgrpo import VRPOConfig, VRPOTrainer
from dgrpo.estimators import draw_masks
from dgrpo.models.families import FAMILIES

PAIRS = [
    {"prompt": "a b c", "chosen": "d e", "rejected": "f"},
    {"prompt": "g", "chosen": "h", "rejected": "i j k l"},
]


def with_lora(model, dropout=0.0):
    targets = FAMILIES["llada"].lora_targets
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return get_peft_model(
            model, LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
        )


@pytest.fixture
def trainer(model, tokenizer, tmp_path):
    """A function (pairs, **settings) -> VRPOTrainer with a random adapter."""

    def build(pairs=PAIRS, dropout=0.0, **settings) -> VRPOTrainer:
        defaults = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 1, "report_to": "none"}
        defaults |= {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
        args = VRPOConfig(**(defaults | settings))
        dataset = Dataset.from_list(pairs)
        return VRPOTrainer(with_lora(model, dropout), args, dataset, tokenizer, dataset)

    return build


def test_masks_follow_the_elbo_s_law():
    """Counts uniform in 1..C of the row's own C, subsets of a size equally likely, weights C/(n l)."""
    is_completion = torch.tensor([[False, True, True, True, False], [True, False, False, False, False]])
    drawn = draw_masks(is_completion, 12000, torch.Generator().manual_seed(0))
    hidden, weights = (each.transpose(0, 1) for each in drawn)
    assert not (hidden & ~is_completion).any()
    assert hidden[:, 1, 0].all()
    counts = hidden.sum(-1)
    expected = (is_completion.sum(1) / (12000 * counts))[..., None] * hidden
    torch.testing.assert_close(weights, expected, check_dtype=False)
    for count in (1, 2, 3):
        subsets = list(itertools.combinations((1, 2, 3), count))
        assert (counts[:, 0] == count).float().mean().item() == pytest.approx(1 / 3, abs=1e-3)
        for subset in subsets:
            same = hidden[:, 0] == torch.isin(torch.arange(5), torch.tensor(subset))
            assert same.all(-1).float().mean().item() == pytest.approx(1 / 3 / len(subsets), abs=0.015)


def test_elbo_is_the_weighted_sum_over_the_pictures(trainer):
    """Of completions of different lengths, padded beside each other, against one text at a time."""
    run = trainer()
    run.model.eval()
    batch = run._collate(list(run.train_dataset))
    *texts, is_open = run._texts(run.model, batch)
    hidden, weights = draw_masks(is_open, 3, torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = run._log_bound(run.model, texts, (hidden, weights))
        for row in range(4):
            seen = batch["attention_mask"][row]
            ids, expected = batch["input_ids"][row][seen], 0.0
            for picture, weight in zip(hidden[row][:, seen], weights[row][:, seen], strict=True):
                logps = run.model(ids.masked_fill(picture, MASK)[None]).logits[0].log_softmax(-1)
                expected += (weight * logps.gather(-1, ids[:, None])[:, 0]).sum().item()
            assert found[row].item() == pytest.approx(expected, rel=1e-4)


def test_loss_is_log_two_where_the_policy_is_its_reference(trainer):
    run = trainer()
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    batch = run._collate(list(run.train_dataset))
    assert run.compute_loss(run.model, batch).item() == pytest.approx(math.log(2))
    assert run._preferences["preference/margin"] == [0.0]


def test_the_policy_has_no_dropout_that_its_reference_lacks(trainer):
    run = trainer(dropout=0.5)
    run.model.train()
    batch = run._collate(list(run.train_dataset))
    *texts, is_open = run._texts(run.model, batch)
    masks = draw_masks(is_open, 3, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(*(run._log_bound(run.model, texts, masks) for _ in range(2)))


def test_preferences_of_training_and_evaluation_are_logged_apart(trainer):
    run = trainer(max_steps=2, eval_strategy="steps", eval_steps=1)
    run.train()
    for prefix in ("", "eval_"):
        logs = [row for row in run.state.log_history if f"{prefix}loss" in row]
        assert len(logs) == 2
        other = "" if prefix else "eval_"
        assert all(f"{prefix}preference/margin" in row and f"{other}preference/margin" not in row for row in logs)


@pytest.mark.slow
def test_preferences_are_learned(trainer):
    run = trainer(max_steps=14, learning_rate=1e-2, beta=0.5, lr_scheduler_type="constant")
    run.train()
    logs = [row for row in run.state.log_history if "preference/margin" in row]
    assert len(logs) == 14
    margins = [row["preference/margin"] for row in logs]
    assert sum(margins[-4:]) > sum(margins[:4]) + 4
    assert logs[-1]["preference/accuracy"] == 1
    assert logs[-1]["preference/chosen"] > logs[-1]["preference/rejected"]


def test_what_vrpo_refuses(trainer, model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="without its adapter"):
        VRPOTrainer(model, VRPOConfig(str(tmp_path)), Dataset.from_list(PAIRS), processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"needs the columns \['rejected'\]"):
        trainer([{"prompt": "a", "chosen": "b"}])
    with pytest.raises(ValueError, match="beta=0.0"):
        trainer(beta=0.0)
    with pytest.raises(ValueError, match="num_samples=0"):
        trainer(num_samples=0)
