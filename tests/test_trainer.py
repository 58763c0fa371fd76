"""diffu-GRPO's trainer on a tiny random LLaDA: what must hold between rollout, views and loss."""

import inspect
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trainers import PROMPTS, lora, place_in_group, share_of_b
from trl import GRPOTrainer

from dgrpo import DiffuGRPOTrainer
from dgrpo.evaluation.answers import Evaluation
from dgrpo.models.adapters import merged_adapters
from dgrpo.run import callbacks
from dgrpo.tasks import TASKS
from dgrpo.trainers.data import without_long_prompts
from dgrpo.trainers.rollouts import rollout_metrics
from dgrpo.views import MaskedViews


def global_random_state() -> tuple:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


def spy_on_scores(trainer) -> list[tuple[torch.Tensor, dict]]:
    """Every (new log-probs, inputs) that a loss is computed from."""
    seen = []
    score = trainer._score

    def spy(model, batch, views, as_reference=None):
        result = score(model, batch, views, as_reference)
        if torch.is_grad_enabled():
            seen.append(((views.weights * result[0]).sum(1).detach(), batch))
        return result

    trainer._score = spy
    return seen


@pytest.mark.parametrize("scope", ["group", "row"])
@pytest.mark.parametrize("estimator", ["one_step", "coupled", "trace"])
@pytest.mark.parametrize("adapter", [lora(dropout=0.3), None], ids=["lora", "full"])
def test_ratio_is_exactly_one_where_the_policy_has_not_moved(trainer, scope, estimator, adapter):
    run = trainer(
        lora=adapter,
        estimator=estimator,
        prompt_mask_scope=scope,
        learning_rate=0.0,
        num_iterations=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=8,
        max_steps=6,
        beta=0.1 if adapter else 0.0,
        reward=place_in_group,
    )
    seen = spy_on_scores(run)
    run.train()
    assert len(seen) == 12
    with_old = [(new, inputs) for new, inputs in seen if "old_per_token_logps" in inputs]
    assert len(with_old) == 8, "the first inner iteration needs no old log-probabilities, the others do"
    for new, inputs in with_old:
        assert torch.equal(new, inputs["old_per_token_logps"])
        assert (new < 0).any()


def test_every_draw_meets_every_micro_batch_exactly_once(trainer):
    run = trainer(num_iterations=3, gradient_accumulation_steps=2, max_steps=6)
    met = []
    inner = run._slice

    def spy(batch, iteration):
        met.append((batch["completion_ids"].numpy().tobytes(), iteration))
        return inner(batch, iteration)

    run._slice = spy
    run.train()
    assert len(met) == 12
    for rollout in (met[:6], met[6:]):
        batches = {batch for batch, _ in rollout}
        assert len(batches) == 2
        assert {(batch, iteration) for batch in batches for iteration in range(3)} == set(rollout)


def test_global_random_state_is_untouched_by_rollout_masking_and_scoring(trainer):
    run = trainer(beta=0.1, lora=lora())
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    rows = [{"prompt": prompt, "letter": "a"} for prompt in PROMPTS[:2] for _ in range(4)]
    before = global_random_state()
    inputs = run._prepare_inputs(rows)
    run.compute_loss(run.model, inputs).backward()
    assert global_random_state() == before


def test_the_canvas_keeps_all_positions_and_nothing_after_the_end_is_scored(trainer, tiny_llada):
    run = trainer(
        own_model=tiny_llada(std=0.03),
        estimator="elbo",
        importance_sampling_level="sequence",
        per_device_train_batch_size=32,
    )
    run.model.train()
    batch = run._generate_and_score_completions([{"prompt": p, "letter": "a"} for p in PROMPTS for _ in range(4)])
    assert batch["completion_ids"].shape == (32, 6)
    assert batch["hidden"].shape[1] == 2, "one draw for each inner iteration"
    assert not batch["completion_mask"].all(), "some completion ends early"
    after_end = (batch["completion_mask"] == 0)[:, None, None].expand_as(batch["weights"])
    assert (batch["weights"][after_end] == 0).all()
    assert batch["hidden"][..., -6:][after_end].any()


def test_a_group_shares_one_pass_through_the_network(trainer, model):
    run = trainer(reward=place_in_group, num_iterations=1, max_steps=1)
    rows = []
    layer = model.model.transformer["blocks"][0]
    layer.register_forward_hook(lambda module, args, output: rows.append(len(output)) if module.training else None)
    run.train()
    assert rows == [2], "two groups of four in the micro-batch: two rows in the one training pass"


def test_views_follow_their_row_through_the_shuffle(trainer):
    run = trainer(num_iterations=2, prompt_mask_scope="row", estimator="coupled", per_device_train_batch_size=16)
    run.model.train()
    rows = [{"prompt": prompt, "letter": "a"} for prompt in PROMPTS[:4] for _ in range(4)]
    batch = run._generate_and_score_completions(rows)
    shuffled = run._shuffled(batch)
    assert not torch.equal(shuffled["completion_ids"], batch["completion_ids"])
    for key in ("hidden", "weights", "advantages", "prompt_ids", "revealed_at", "confidence", "entropy"):
        tagged = {(tuple(ids), tuple(hidden)): value for ids, hidden, value in zip(
            batch["completion_ids"].tolist(), batch["hidden"].flatten(1).tolist(), batch[key].tolist(), strict=True
        )}  # fmt: skip
        for ids, hidden, value in zip(
            shuffled["completion_ids"].tolist(),
            shuffled["hidden"].flatten(1).tolist(),
            shuffled[key].tolist(),
            strict=True,
        ):
            assert tagged[tuple(ids), tuple(hidden)] == value


def test_micro_batches_times_accumulation_does_not_matter(trainer, tiny_llada):
    """The global batch decides: 16 x 1 equals 8 x 2, with the token mean taken over the whole batch."""
    weights = []
    for size, accumulation in ((16, 1), (8, 2)):
        run = trainer(
            own_model=tiny_llada(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            loss_type="dapo",
            num_iterations=2,
            max_steps=4,
        )
        run.train()
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert torch.allclose(*weights, atol=1e-6)


def test_rows_without_advantage_are_left_out_without_changing_the_gradient(trainer, tiny_llada):
    def reward(prompts, completions, **columns):
        place = place_in_group(prompts, completions)
        return [value if prompt in ("a b", "g") else 0.5 for prompt, value in zip(prompts, place, strict=True)]

    gradients, rows = [], []
    for skip in (True, False):
        policy = tiny_llada()
        run = trainer(reward=reward, own_model=policy, num_iterations=1, per_device_train_batch_size=32, max_steps=1)
        if not skip:
            type(run)._skips_idle_rows, kept = False, type(run)._skips_idle_rows
        try:
            run.model.train()
            inputs = run._prepare_inputs([{"prompt": p, "letter": "a"} for p in PROMPTS for _ in range(4)])
            policy.model.transformer["blocks"][0].register_forward_hook(lambda m, a, o: rows.append(len(o)))
            run.current_gradient_accumulation_steps = 1
            run.compute_loss(run.model, inputs).backward()
        finally:
            if not skip:
                type(run)._skips_idle_rows = kept
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert rows == [2, 8]
    assert torch.allclose(*gradients, atol=1e-7)
    assert gradients[0].abs().max() > 0


def test_kl_is_zero_while_the_adapter_is_the_reference(trainer):
    run = trainer(lora=LoraConfig(r=4, target_modules=r".*blocks.*q_proj"), beta=0.1, learning_rate=0.0, max_steps=2)
    run.train()
    assert [logs["kl"] for logs in run.state.log_history if "kl" in logs] == [0.0, 0.0]


def test_watching_the_kl_does_not_change_training(trainer, tiny_llada):
    finals, logs = [], []
    for log_kl in (False, True):
        run = trainer(own_model=tiny_llada(), lora=lora(), log_kl=log_kl, learning_rate=1e-2, reward=place_in_group)
        run.train()
        finals.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
        logs.append([row["kl"] for row in run.state.log_history if "kl" in row])
    assert torch.equal(*finals)
    assert logs[0] == []
    assert len(logs[1]) == 4
    assert min(logs[1]) > 0


def test_the_reference_is_scored_for_a_metric_only_where_it_is_due(trainer):
    run = trainer(lora=lora(), log_kl=True, log_kl_every=2, num_iterations=2, max_steps=8, reward=place_in_group)
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    assert ["kl" in row for row in rows] == [True, True, False, False, True, True, False, False]


def test_exact_kl_is_the_mean_of_the_divergences_and_pulls_towards_the_reference(trainer, tiny_llada):
    finals = {}
    for beta in (1e-6, 10.0):
        run = trainer(
            own_model=tiny_llada(),
            lora=lora(),
            kl="exact",
            beta=beta,
            learning_rate=1e-2,
            reward=place_in_group,
        )
        seen = []
        score = run._score

        def spy(*given, score=score, seen=seen):
            result = score(*given)
            if result.divergences is not None:
                seen.append((result.divergences.sum() / (result.divergences != 0).sum()).item())
            return result

        run._score = spy
        run.train()
        logged = [row["kl"] for row in run.state.log_history if "kl" in row]
        assert len(logged) == len(seen) == 4
        assert logged == pytest.approx(seen, rel=1e-5)
        finals[beta] = logged[-1]
    assert 0 < finals[10.0] < 0.8 * finals[1e-6]


def test_exact_kl_needs_a_head_that_is_not_trained(trainer):
    with pytest.raises(ValueError, match="kl='exact' needs a head that is not trained"):
        trainer(kl="exact", beta=0.1)


def test_merged_rollouts_are_the_same_and_leave_the_base_weights_as_they_were(trainer, tiny_llada):
    tokens, bases = [], []
    for merge in (False, True):
        run = trainer(own_model=tiny_llada(), lora=lora(), merge_adapter_for_rollouts=merge, reward=place_in_group)
        layer = run.model.base_model.model.model.transformer["blocks"][0].q_proj
        before, inside = layer.base_layer.weight.clone(), []
        layer.base_layer.register_forward_hook(lambda module, *_, inside=inside: inside.append(module.weight.clone()))
        rows = [{"prompt": prompt, "letter": "a"} for prompt in PROMPTS[:2] for _ in range(4)]
        tokens.append(run._generate_and_score_completions(rows)["completion_ids"])
        bases.append((torch.equal(inside[0], before), torch.equal(layer.base_layer.weight, before), layer.merged))
    assert torch.equal(*tokens)
    assert bases == [(True, True, False), (False, True, False)]


def test_merged_weights_are_put_back_when_a_rollout_fails(model):
    adapted = get_peft_model(model, lora())
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    with pytest.raises(KeyError), merged_adapters(adapted):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


@pytest.mark.parametrize(("settings", "measured"), [({"cache": "dual"}, 2), ({"threshold": 0.05}, 2), ({}, 0)])
def test_what_a_shortcut_changes_is_logged_now_and_then(trainer, settings, measured):
    run = trainer(max_steps=8, agreement_every=2, reward=place_in_group, **settings)
    run.train()
    agreements = [row["rollout/agreement"] for row in run.state.log_history if "rollout/agreement" in row]
    assert len(agreements) == measured
    assert all(0 <= share <= 1 for share in agreements)
    passes = [
        row["rollout/forwards_per_token"] for row in run.state.log_history if "rollout/forwards_per_token" in row
    ]
    assert len(passes) == 4
    assert (min(passes) < 1) == ("threshold" in settings)


def test_steps_per_row_counts_the_steps_that_wrote(rollout):
    # Six rows write at 1, 2, 3, 4, 5 and 5 different steps; the network ran five times.
    at = torch.tensor([[0] * 5, [0, 0, 0, 0, 4], [0, 2, 2, 4, 4], [3, 2, 1, 0, 0], [*range(5)], [4, 3, 2, 1, 0]])
    shown = rollout_metrics(replace(rollout, revealed_at=at, history=None), 1.0, None, Accelerator(cpu=True))
    assert shown["rollout/steps_per_row"] == pytest.approx(20 / 6)


def test_full_fine_tuning_keeps_a_reference_model(trainer, model, tokenizer, tmp_path):
    from dgrpo import load_model

    model.config.architectures = ["LLaDAModelLM"]
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded, _ = load_model(str(tmp_path / "base"))
    run = trainer(own_model=loaded, beta=0.1, max_steps=4, learning_rate=1e-2)
    run.train()
    kl = [logs["kl"] for logs in run.state.log_history if "kl" in logs]
    assert kl[0] == 0.0
    assert kl[-1] > 0


def test_it_learns(trainer, tiny_llada):
    run = trainer(
        own_model=tiny_llada(std=0.15),
        per_device_train_batch_size=32,
        max_steps=40,
        learning_rate=3e-3,
        max_grad_norm=1.0,
    )
    run.train()
    rewards = [logs["reward"] for logs in run.state.log_history if "reward" in logs]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3


def test_training_mode_is_restored_and_rollouts_have_no_dropout(trainer, model):
    run = trainer(lora=lora(dropout=0.5), disable_dropout=False)
    run.model.train()
    rows = [{"prompt": prompt, "letter": "a"} for prompt in PROMPTS[:2] for _ in range(4)]
    modes = {name: module.training for name, module in run.model.named_modules()}
    first = run._generate_and_score_completions(rows)["completion_ids"]
    assert {name: module.training for name, module in run.model.named_modules()} == modes
    assert torch.equal(run._generate_and_score_completions(rows)["completion_ids"], first)


def test_evaluation_in_the_middle_changes_nothing_that_follows(trainer, tiny_llada):
    finals = []
    for evaluates in (False, True):
        run = trainer(own_model=tiny_llada(), max_steps=4, per_device_eval_batch_size=8)
        if evaluates:
            run.eval_dataset = run.train_dataset
            step = run.training_step
            run.training_step = lambda *a, run=run, step=step: (run.evaluate(), run.model.train(), step(*a))[2]
        run.train()
        finals.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert torch.equal(*finals)


def test_a_reward_that_raises_costs_its_rows_only(trainer, caplog):
    calls = []

    def moody(prompts, completions, **columns):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a bad day")
        return [float("nan")] + [1.0] * (len(prompts) - 1)

    run = trainer(reward=[share_of_b, moody], num_iterations=1, max_steps=2)
    run.train()
    first, second = [logs for logs in run.state.log_history if "reward" in logs]
    assert (first["rewards/moody/errors"], second["rewards/moody/errors"]) == (1.0, 0.0)
    assert second["rewards/moody/non_finite"] == 1.0
    assert first["rewards/moody/mean"] is None
    assert second["rewards/moody/mean"] == 1.0


def test_a_reward_of_wrong_length_is_an_error_at_once(trainer):
    def short(prompts, completions, **columns):
        return [1.0]

    with pytest.raises(ValueError, match="returned 1 rewards, but 8 were expected"):
        trainer(reward=short).train()


def test_a_missing_column_is_told_before_training(trainer):
    def needs_answer(prompts, completions, answer, **columns):
        return [0.0] * len(prompts)

    with pytest.raises(ValueError, match=r"needs_answer asks for the columns \['answer'\]"):
        trainer(reward=needs_answer)


def test_long_prompts_are_left_out_with_a_count(tokenizer):
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    assert without_long_prompts(dataset, tokenizer, 3)["prompt"] == ["a b", "g", "h i j", "p q", "r s t", "u a"]
    with pytest.raises(ValueError, match="max_prompt_length=0"):
        without_long_prompts(dataset, tokenizer, 0)


def test_a_users_own_estimator_trains(model, tokenizer, config):
    def all_hidden(rollout, *, generator):
        hidden = torch.cat([torch.zeros_like(rollout.prompt_mask), torch.ones_like(rollout.completion_mask)], 1).bool()
        return MaskedViews(hidden[:, None], rollout.completion_mask.float()[:, None])

    run = DiffuGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=config(max_steps=2),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        reward_funcs=share_of_b,
        estimator=all_hidden,
    )
    run.train()
    assert run.state.global_step == 2


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("use_vllm", True, "dgrpo's own sampler"),
        ("top_p", 0.9, "use temperature"),
        ("top_k", 5, "use temperature"),
        ("min_p", 0.1, "use temperature"),
        ("repetition_penalty", 1.2, "no repetition penalty"),
        ("cache_implementation", "static", "use `cache`"),
        ("generation_kwargs", {"top_p": 0.5}, "block_length"),
        ("use_transformers_continuous_batching", True, "dgrpo's own sampler"),
        ("block_length", 4, "must divide max_completion_length=6"),
        ("diffusion_steps", 1, "raise it to 2"),
        ("estimator", "two_step", "choose one_step"),
        ("estimator", "no_such_module:f", "cannot import"),
        ("prompt_mask_scope", "batch", "choose 'group', 'row'"),
        ("p_mask_prompt", 1.5, "within"),
        ("per_device_train_batch_size", 6, "multiple of num_generations=4"),
        ("num_generations", 1, "at least 2"),
        ("score_temperature", 0.0, "positive"),
        ("kl", "k9", "choose None, 'k1', 'k2', 'k3', 'exact'"),
        ("kl", "exact", "set beta"),
        ("agreement_every", -1, "0 or a positive"),
    ],
)
def test_wrong_settings_are_refused_by_name_value_and_remedy(config, setting, value, remedy):
    with pytest.raises(ValueError, match=remedy) as error:
        config(**{setting: value})
    if setting != "num_generations":
        assert setting in str(error.value)
    assert str(value).strip("{}") in str(error.value)


def test_adapter_on_the_model_is_trained_as_it_is(trainer, model):
    run = trainer(reward=place_in_group, own_model=get_peft_model(model, lora()), max_steps=2, learning_rate=1e-2)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    assert all(not torch.equal(before[n], p) for n, p in run.model.named_parameters() if n in before)


def test_trl_has_the_methods_that_are_overridden():
    expected = {
        "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
        "_generate_and_score_completions": ["inputs"],
        "_prepare_inputs": ["generation_batch"],
        "_compute_loss": ["model", "inputs"],
        "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "_get_train_sampler": ["dataset"],
        "_get_grad_norm": ["model", "grad_norm"],
        "_tokenize_prompts": ["prompts"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters)[1:] == parameters, name
    assert "return logps, entropies, aux_loss" in inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
    # What rollout_func returns beside ids and log-probabilities becomes a column of the rows.
    generate = inspect.getsource(GRPOTrainer._generate)
    assert "output = self.rollout_func(prompts, self)" in generate
    assert "extra_fields = {k: v for k, v in output.items() if k not in required_keys}" in generate
    assert "elif not isinstance(values, list):" in inspect.getsource(GRPOTrainer._generate_and_score_completions)


def test_every_method_of_trl_that_is_overridden_is_in_the_docstring():
    own = {name for name, value in vars(DiffuGRPOTrainer).items() if callable(value)} - {"__init__"}
    overridden = {name for name in own if hasattr(GRPOTrainer, name)}
    assert {name for name in overridden if f"`{name}`" not in DiffuGRPOTrainer.__doc__} == set()
    assert len(overridden) <= 13


def test_held_out_prompts_are_put_as_the_training_prompts_are(trainer, tmp_path, monkeypatch):
    seen = {}

    def spy(*args, template_settings, **settings):
        seen.update(template_settings)
        return Evaluation([""], [True], [False], [1], 1.0, 1)

    monkeypatch.setattr(callbacks, "evaluate", spy)
    run = trainer(chat_template_kwargs={"enable_thinking": False})
    metrics = callbacks.MetricsFile(tmp_path / "metrics.csv")
    callbacks.HeldOutEvaluation(run, TASKS["gsm8k"], Dataset.from_list([{"prompt": "a"}]), 0, metrics).measure()
    assert seen == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("name", "threshold", "cache"), [("exact", None, None), ("parallel", 0.9, None), ("training", 0.9, "dual")]
)
def test_held_out_problems_are_decoded_as_asked(trainer, tmp_path, monkeypatch, name, threshold, cache):
    seen = []
    monkeypatch.setattr(
        callbacks,
        "evaluate",
        lambda *args, **settings: seen.append(args[4]) or Evaluation([""], [True], [False], [1], 1.0, 1),
    )
    run, metrics = trainer(threshold=0.9, cache="dual"), callbacks.MetricsFile(tmp_path / "metrics.csv")
    rows = Dataset.from_list([{"prompt": "a"}])
    callbacks.HeldOutEvaluation(run, TASKS["gsm8k"], rows, 0, metrics, sampler=name).measure()
    assert [(each.threshold, each.cache, each.temperature) for each in seen] == [(threshold, cache, 0.0)]


def test_rewards_of_an_evaluation_do_not_depend_on_its_batches(trainer):
    """Nor does a batch draw what another drew: four times the same prompt."""
    found, texts = [], []
    for size in (4, 8, 16):
        run = trainer(per_device_eval_batch_size=size, temperature=1.0)
        written = []
        run.reward_funcs[0] = lambda prompts, completions, written=written, **columns: (
            written.extend(completions) or share_of_b(prompts, completions)
        )
        metrics = run.evaluate(Dataset.from_dict({"prompt": ["a b"] * 4, "letter": ["a"] * 4}))
        found.append(metrics["eval_reward"])
        texts.append(written)
    assert found[0] == pytest.approx(found[1])
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 12
