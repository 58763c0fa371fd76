"""VRPO: the ELBO it compares, whose draws it shares, and that preferences are learned."""

import itertools
import math

import pytest
import torch
from conftest import MASK
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from dgrpo import VRPOConfig, VRPOTrainer
from dgrpo.models.families import FAMILIES
from dgrpo.trainers.vrpo import draw_masks

PAIRS = [
    {"prompt": "a b c", "chosen": "d e", "rejected": "f"},
    {"prompt": "g", "chosen": "h", "rejected": "i j k l"},
]


def with_lora(model):
    targets = FAMILIES["llada"].lora_targets
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


@pytest.fixture
def trainer(model, tokenizer, tmp_path):
    """A function (pairs, **settings) -> VRPOTrainer with a random adapter."""

    def build(pairs=PAIRS, **settings) -> VRPOTrainer:
        defaults = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 1, "report_to": "none"}
        defaults |= {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
        args = VRPOConfig(**(defaults | settings))
        return VRPOTrainer(with_lora(model), args, Dataset.from_list(pairs), processing_class=tokenizer)

    return build


def test_mean_over_draws_is_the_elbo_of_each_completion(trainer, model):
    """Against the enumeration of all masks of each row's own completion, padded beside longer ones."""
    run = trainer()
    run.model.eval()
    batch = run._collate(list(run.train_dataset))
    total, repeats = torch.zeros(4), 1500
    with torch.no_grad():
        for repeat in range(repeats // 50):
            hidden, weights = draw_masks(batch["is_completion"], 50, torch.Generator().manual_seed(repeat))
            assert not (hidden & ~batch["is_completion"]).any()
            total += run._elbo(run.model, batch, hidden, weights) * 50 / repeats
        for row in range(4):
            ids = batch["input_ids"][row][batch["attention_mask"][row]]
            places = batch["is_completion"][row].nonzero()[:, 0].tolist()
            expected = 0.0
            for count in range(1, len(places) + 1):
                subsets = list(itertools.combinations(places, count))
                for subset in subsets:
                    picture = ids.clone()
                    picture[list(subset)] = MASK
                    logps = run.model(picture[None]).logits[0].log_softmax(-1)
                    score = sum(logps[place, ids[place]].item() for place in subset)
                    expected += score / count / len(subsets)
            assert total[row].item() == pytest.approx(expected, rel=0.04)


def test_loss_is_log_two_where_the_policy_is_its_reference(trainer):
    run = trainer()
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    batch = run._collate(list(run.train_dataset))
    assert run.compute_loss(run.model, batch).item() == pytest.approx(math.log(2))
    assert run._preferences["preference/margin"] == [0.0]


def test_preferences_are_learned(trainer):
    run = trainer(max_steps=25, learning_rate=5e-3, beta=0.5, lr_scheduler_type="constant")
    run.train()
    logs = [row for row in run.state.log_history if "preference/margin" in row]
    assert len(logs) == 25
    margins = [row["preference/margin"] for row in logs]
    assert sum(margins[-5:]) / 5 > sum(margins[:5]) / 5 + 1
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
