"""What the trainer refuses before the first rollout, and what ends a run that cannot learn."""

import dataclasses
import math
import re

import pytest
import torch
from datasets import Dataset
from torch import nn
from trainers import PROMPTS, lora, place_in_group, tiny_llada, tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from dgrpo import DiffuGRPOConfig, MaskedViews, estimators, generate
from dgrpo.objectives import KL_FORMS
from dgrpo.reliability.ranges import RANGES
from dgrpo.trainers import grpo as module

ROWS = {"prompt": PROMPTS}


def without_columns(prompts, completions):
    return [0.0] * len(prompts)


def positional(prompts, completions, /, **columns):
    return [0.0] * len(prompts)


def asks(prompts, completions, answer, **columns):
    return [0.0] * len(prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward": None}, "reward_funcs: there is none; give a function"),
        ({"reward": []}, "reward_funcs: there is none; give a function"),
        ({"reward": nn.Linear(2, 1)}, "Linear is neither a function nor a model of transformers; wrap it"),
        ({"reward": 3}, "int is neither a function nor a model"),
        ({"reward": without_columns}, "without_columns cannot be called by keyword with .*unexpected keyword"),
        ({"reward": positional}, "positional cannot be called by keyword with"),
        ({"reward": asks, "remove_unused_columns": True}, "asks for the columns .'answer'.* after remove_unu"),
        ({"reward_weights": [1.0, 2.0]}, r"reward_weights=\[1.0, 2.0\]: give one for each of the 1 rewards"),
        ({"train_dataset": None}, "train_dataset=NoneType: give a datasets.Dataset with a column 'prompt'"),
        ({"dataset": [{"prompt": "a"}]}, "train_dataset=list: give a datasets.Dataset"),
        ({"dataset": Dataset.from_dict(ROWS).to_iterable_dataset().map(dict)}, "=IterableDataset: give a"),
        ({"dataset": Dataset.from_dict({"question": PROMPTS})}, "no column 'prompt' among .'question'."),
        ({"dataset": Dataset.from_dict(ROWS | {"completions": PROMPTS})}, "columns .'completions'.* rename them"),
        ({"eval_dataset": [1]}, "eval_dataset=list: give a datasets.Dataset"),
        ({"reward": asks, "dataset": Dataset.from_dict(ROWS | {"answer": [None] * 8})}, "no row has a value in what"),
        ({"dataset": Dataset.from_dict({"prompt": []})}, "the dataset has 0 prompts, one rollout takes 2"),
        ({"dataset": Dataset.from_dict({"prompt": ["a"]})}, "has 1 prompts, one rollout takes 2.*lower per_device"),
        ({"max_prompt_length": 1}, "has 1 prompts, one rollout takes 2"),
        ({"tools": [print]}, "tools=.* cannot be honoured: a denoised completion cannot wait"),
        ({"rollout_func": print}, "rollout_func=.* give a rollout_source"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* load_in_4bit"),
        ({"environment_factory": print}, "environment_factory=.* cannot wait for an environment"),
        ({"own_model": tiny_llada().bfloat16()}, "where most updates round to nothing.*dtype=float32"),
        ({"own_model": tiny_llada().requires_grad_(False)}, "no parameter has requires_grad=True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_what_cannot_train_is_refused_in_one_line(trainer, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        trainer(**arguments)
    assert "\n" not in str(error.value)


def test_an_argument_that_is_none_of_trls_is_a_type_error(trainer):
    with pytest.raises(TypeError, match="DiffuGRPOTrainer has no argument 'callback'"):
        trainer(callback=print)


def test_a_reward_of_weight_0_does_not_hide_that_nothing_has_a_reference(trainer, caplog):
    rows = Dataset.from_dict(ROWS | {"answer": [None] * 8})
    with pytest.raises(ValueError, match="no row has a value"):
        trainer(reward=[place_in_group, asks], reward_weights=[0.0, 1.0], dataset=rows)
    trainer(reward=[place_in_group, asks], dataset=rows)
    assert "8 of 8 rows lack ['answer'], which asks asks for" in caplog.text


def test_a_threshold_below_seven_tenths_is_warned_of(config, caplog):
    config(threshold=0.7)
    assert "threshold" not in caplog.text
    config(threshold=0.5)
    assert "threshold=0.5: below 0.7 a group's completions soon open alike" in caplog.text


def numbers() -> list[str]:
    own = [field for field in dataclasses.fields(DiffuGRPOConfig) if not field.name.startswith("vllm_")]
    return [field.name for field in own if any(kind in str(field.type) for kind in ("int", "float"))]


def test_every_number_has_a_range():
    elsewhere = {
        *("label_smoothing_factor", "neftune_noise_alpha", "data_seed", "router_aux_loss_coef", "top_p", "top_k"),
        *("min_p", "repetition_penalty", "max_tool_calling_iterations", "off_policy_mask_threshold"),
        *("num_generations", "local_rank", "pad_to_multiple_of"),
    }  # fmt: skip
    ranged = {name for _, _, names in RANGES for name in names.split()}
    assert set(numbers()) - elsewhere - ranged == set()


@pytest.mark.parametrize("value", [math.nan, math.inf, -2.0])
def test_no_number_may_be_nan_infinite_or_mean_something_else(config, value):
    refused = set()
    for name in numbers():
        try:
            config(**{name: [value] if name == "reward_weights" else value})
        except ValueError as error:
            refused |= {name} & set(re.findall(r"\w+", str(error)))
    accepted = {"local_rank", *(["reward_weights"] if value == -2 else [])}
    assert set(numbers()) - refused <= accepted


def test_a_reference_model_is_a_copy_of_the_policy_as_it_is(trainer):
    """Not what its name would load: the weights were changed in memory, the name leads nowhere."""
    policy = tiny_llada()
    policy.config._name_or_path = "no/such-model"
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(1.5)
    run = trainer(own_model=policy, beta=0.1, learning_rate=1e-2, reward=place_in_group)
    assert run.ref_model is not run.model
    assert all(
        torch.equal(old, new) and old.data_ptr() != new.data_ptr()
        for old, new in zip(run.ref_model.parameters(), run.model.parameters(), strict=True)
    )
    before = [each.clone() for each in run.ref_model.parameters()]
    run.train()
    kl = [row["kl"] for row in run.state.log_history if "kl" in row]
    assert kl[0] == 0.0
    assert kl[-1] > 0
    assert all(torch.equal(old, new) for old, new in zip(before, run.ref_model.parameters(), strict=True))


@pytest.mark.parametrize("kl", KL_FORMS)
def test_every_form_of_the_kl_trains(trainer, kl):
    run = trainer(lora=lora(), beta=0.1, kl=kl, learning_rate=1e-2, reward=place_in_group, num_iterations=1)
    run.train()
    assert all(math.isfinite(row["kl"]) for row in run.state.log_history if "kl" in row)


def test_weights_that_become_nan_end_the_run_before_they_are_saved(trainer, tmp_path):
    run = trainer(reward=place_in_group, save_strategy="steps", save_steps=1)

    class Spoils(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(model.parameters()).data[0] = math.nan

    run.callback_handler.callbacks.insert(0, Spoils())
    with pytest.raises(FloatingPointError, match="Update 2 made weights NaN or infinite.*Lower learning_rate|lower"):
        run.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


def fails(prompts, completions, **columns):
    raise RuntimeError("a bad day")


def test_rewards_that_fail_for_all_rows_in_a_row_end_the_run(trainer):
    run = trainer(reward=fails, num_iterations=1, max_steps=8, max_failed_rollouts=3)
    with pytest.raises(RuntimeError, match="max_failed_rollouts=3: for so many rollouts in a row no reward gave"):
        run.train()
    assert run.state.global_step == 2
    run = trainer(reward=[fails, place_in_group], reward_weights=[1.0, 0.0], num_iterations=1, max_failed_rollouts=3)
    with pytest.raises(RuntimeError, match="max_failed_rollouts=3"):
        run.train()
    trainer(reward=[fails, place_in_group], num_iterations=1, max_steps=4, max_failed_rollouts=3).train()
    trainer(reward=fails, num_iterations=1, max_steps=4, max_failed_rollouts=None).train()


def test_a_run_that_makes_fewer_updates_than_asked_fails(trainer, monkeypatch):
    run = trainer(max_steps=4)
    monkeypatch.setattr(module.EpochSampler, "__iter__", lambda sampler: iter(()))
    with pytest.raises(ValueError, match="max_steps=4: the run ended after 0 updates"):
        run.train()


def test_a_reward_model_is_given_its_tokenizer(trainer):
    shape = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    judge = BertForSequenceClassification(BertConfig(vocab_size=24, num_labels=1, pad_token_id=23, **shape))
    judge.config._name_or_path = "a/judge"
    run = trainer(reward=judge, reward_processing_classes=tiny_tokenizer(), max_steps=2)
    run.train()
    assert "rewards/judge/mean" in next(row for row in run.state.log_history if "reward" in row)


def test_rollouts_may_come_from_elsewhere(trainer):
    """From a source that knows nothing of confidence: it is asked with global keys and told of each update."""
    told, asked = [], []

    class Elsewhere:
        def update(self, model, step):
            told.append(step)
            self.model = model

        def __call__(self, prompt_ids, prompt_mask, config, row_keys, group):
            asked.append((row_keys.tolist(), group.tolist()))
            with torch.no_grad():
                rollout = generate(self.model, prompt_ids, prompt_mask, config, row_keys=row_keys, group=group)
            return dataclasses.replace(rollout, confidence=None, entropy=None)

    run = trainer(rollout_source=Elsewhere(), reward=place_in_group, threshold=0.5, agreement_every=1)
    run.train()
    assert told == [0, 2]
    assert [group for _, group in asked] == [[0] * 4 + [1] * 4] * 2
    keys = [key for keys, _ in asked for key in keys]
    assert len(set(keys)) == 16
    assert not any("rollout/agreement" in row for row in run.state.log_history)


def test_an_estimator_of_ones_own_that_draws_trains_with_spg(trainer, config):
    def own(rollout, *, generator, num_samples=2):
        return estimators.elbo(rollout, generator=generator, num_samples=num_samples)

    settings = {"args": config(estimator=None, objective="spg"), "estimator": own}
    with pytest.raises(ValueError, match="estimator='own' with objective='spg': .*draws = True"):
        trainer(**settings)
    own.draws = True
    run = trainer(reward=place_in_group, **settings)
    run.train()
    assert run.state.global_step == 4
    with pytest.raises(ValueError, match="estimator='own' with importance_sampling_level='token'"):
        trainer(**settings | {"args": config(estimator=None)})
    with pytest.raises(ValueError, match="estimator=None: name one in the settings"):
        trainer(args=config(estimator=None))


def test_what_no_view_hides_is_told(trainer):
    def open_eyed(rollout, *, generator):
        hidden = torch.zeros(len(rollout.prompt_mask), 1, rollout.prompt_mask.shape[1] + 6, dtype=torch.bool)
        return MaskedViews(hidden, rollout.completion_mask.float()[:, None])

    with pytest.raises(ValueError, match="not hidden; score hidden tokens only"):
        trainer(estimator=open_eyed).train()
