"""Wrong settings: the message names the field, the value and the remedy, and comes before a model is loaded."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import published
import pytest
from datasets import Dataset
from trl import GRPOConfig

import dgrpo.run.steps
from dgrpo import DiffuGRPOConfig, DiffuGRPOTrainer
from dgrpo.tasks import gsm8k
from dgrpo.trainers.config import _REFUSED

RECIPE = str(Path(__file__).parents[1] / "recipes/gsm8k.py")

# Fields of TRL's that mean something to a mask predictor, beside those that are refused and transformers' own.
HONOURED = (
    "disable_dropout num_generations num_generations_eval max_completion_length "
    "ds3_gather_for_generation shuffle_dataset generation_batch_size steps_per_generation temperature "
    "chat_template_kwargs use_vllm beta num_iterations epsilon delta epsilon_high sapo_temperature_neg "
    "sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg "
    "importance_sampling_level reward_weights multi_objective_aggregation scale_rewards loss_type "
    "mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps "
    "top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max "
    "entropy_coef_delta entropy_target use_bias_correction_kl log_completions log_multimodal "
    "num_completions_to_print log_unique_prompts log_completions_hub_repo"
)

WRONG = [
    ("model_init_kwargs", {"x": 1}, "loaded before the trainer"),
    ("save_total_limit", -1, "must be a positive whole number, or null"),
    ("threshold", 2.0, "is a probability"),
    ("trust_remote_code", True, "runs code of its checkpoint"),
    ("max_tool_calling_iterations", 3, "cannot wait for a tool"),
    ("transformers_continuous_batching_config", {"x": 1}, "dgrpo's own sampler"),
    ("use_transformers_paged", True, "dgrpo's own sampler"),
    ("use_liger_kernel", True, "own chunked head"),
    ("router_aux_loss_coef", 0.1, "load-balancing"),
    ("cast_lm_head_to_fp32", True, "float32 already"),
    ("off_policy_mask_threshold", 0.5, "own log-probabilities"),
    ("pad_to_multiple_of", 8, "Leave it at 'auto'"),
    ("label_smoothing_factor", 0.1, "no labels"),
    ("neftune_noise_alpha", 5.0, "moves the ratio"),
    ("auto_find_batch_size", True, "lower per_device_train_batch_size"),
    ("train_sampling_strategy", "group_by_length", "group by group"),
    ("data_seed", 7, "follows seed"),
    ("ignore_data_skip", True, "epoch's beginning"),
    ("vllm_mode", "server", "without vLLM. Remove it"),
    ("vllm_importance_sampling_cap", 2.0, "without vLLM. Remove it"),
    ("loss_type", "ppo", "choose 'grpo', 'bnpo'"),
    ("scale_rewards", "rows", "choose 'group', 'batch', 'none'"),
    ("importance_sampling_level", "batch", "choose 'token', 'sequence'"),
    ("multi_objective_aggregation", "max", "choose 'sum_then_normalize'"),
    ("reward_timeout", 0, "must be a positive finite number, or null"),
    ("max_skipped_updates", 0, "must be a positive whole number, or null"),
    ("max_prompt_length", 0, "must be a positive whole number, or null"),
    ("rollout_batch_size", 0, "must be a positive whole number, or null"),
    ("views_per_pass", 0, "must be a positive whole number"),
    ("num_iterations", 0, "must be a positive whole number"),
    ("collapse_window", 1, "2 or more"),
    ("num_generations", 1, "at least 2"),
    ("estimator_kwargs", {"num_sampels": 2}, "has no num_sampels; its settings are p_mask_prompt"),
    ("objective_kwargs", {"clip": 2}, "grpo has no clip; its settings are none"),
    ("objective", "ppo", "choose grpo, spg"),
    ("temperature", -1.0, "must be a positive finite number"),
    ("temperature", 0.0, "must be a positive finite number"),
    ("cfg_scale", -1.0, "must be 0"),
    ("remasking", "first", "choose low_confidence"),
    ("cache", "suffix", "choose prefix or dual"),
    ("cache_refresh", 4, "needs cache"),
    ("threshold", 0.0, "must be a positive finite number, or null"),
    ("factor", -1.0, "must be a positive finite number, or null"),
    ("entropy_bound", -1.0, "must be 0 or a positive finite number"),
    ("entropy_sum", 0.0, "must be a positive finite number, or null"),
    ("min_commit", 0, "must be a positive whole number"),
]


@pytest.fixture
def config(tmp_path):
    defaults = {"max_completion_length": 6, "block_length": 3, "diffusion_steps": 6, "num_generations": 4}
    return lambda **settings: DiffuGRPOConfig(
        **({"output_dir": str(tmp_path), "per_device_train_batch_size": 8, "use_cpu": True} | defaults | settings)
    )


@pytest.mark.parametrize(("setting", "value", "remedy"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_settings_are_refused_by_name_value_and_remedy(config, setting, value, remedy):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        config(**{setting: value})
    for part in (setting, str(value).strip("{}"), remedy):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "wd1", "delta": 2.0}, r"delta=2.0: objective='wd1' does not read it"),
        ({"objective": "wd1", "epsilon_high": 0.3}, r"epsilon_high=0.3: objective='wd1' does not read it"),
        ({"objective": "wd1", "entropy_coef": 0.1}, r"entropy_coef=0.1: objective='wd1' does not read it"),
        ({"objective": "wd1", "beta": 0.0, "objective_kwargs": {"clip": 2}}, r"wd1 has no clip; its settings are"),
        ({"objective": "wd1"}, r"beta=0.04 with objective=.wd1.: it has no KL term; set beta to 0"),
        ({"stop_on_collapse": True, "collapse_window": 0}, r"stop_on_collapse=True with collapse_window=0"),
        ({"threshold": 0.9, "factor": 1.0}, r"threshold=0.9: set only one"),
        ({"threshold": 0.9, "entropy_sum": 1.0}, r"threshold=0.9: set only one"),
        ({"min_commit": 2}, r"min_commit=2: needs one of"),
        ({"cache": "dual", "cfg_scale": 1.0}, r"cache='dual': does not go with cfg_scale"),
        ({"estimator": "elbo"}, r"estimator='elbo' with importance_sampling_level='token'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_every_field_of_trl_is_honoured_or_refused():
    own = {field.name for field in dataclasses.fields(GRPOConfig)}
    own -= {field.name for field in dataclasses.fields(GRPOConfig.__mro__[2])}
    neither = {name for name in own if not name.startswith("vllm_")} - set(HONOURED.split()) - set(_REFUSED)
    assert neither == set(), "a new field of TRL's: honour it or refuse it"


def test_every_refusal_is_tried():
    from test_trainer import test_wrong_settings_are_refused_by_name_value_and_remedy as more

    tried = {name for name, *_ in [*WRONG, *more.pytestmark[0].args[1]]}
    assert set(_REFUSED) <= tried


COMMAND_LINES = [
    (["--block_length", "3"], "block_length=3: must divide"),
    (["--estimator", "two_step"], "estimator='two_step': choose"),
    (["--reward_funcs", "rewards.gsm8k:no_such"], "module 'rewards.gsm8k' has no 'no_such'"),
    (["--reward_funcs", "no_such_module:f"], "cannot import 'no_such_module'"),
    (["--reward_funcs", "no_such"], "is no 'package.module:function' and not installed"),
    (["--reward_funcs", "rewards.countdown:equation_reward"], "asks for the columns"),
    (["--num_generations", "1"], "num_generations=1"),
    (["--reward_funcs", ":f"], "reward_funcs: cannot import '' of ':f' (ValueError: Empty module name)"),
    (["--estimator_kwargs", "{"], "a setting's mapping is no JSON"),
    (["--per_device_train_batch_size", "12"], "per_device_train_batch_size=12"),
    (["--num_eval_problems", "0"], "num_eval_problems=0: must be 1 or more"),
    (["--evaluate_every", "-1"], "evaluate_every=-1: must be 0 or more"),
    (["--top_p", "0.9"], "top_p=0.9 cannot be honoured"),
    (["--blok_length", "3"], "unknown arguments ['--blok_length'"),
]


@pytest.mark.parametrize(("words", "message"), COMMAND_LINES, ids=lambda value: " ".join(value)[:40])
def test_a_wrong_command_line_is_told_before_a_model_is_loaded(monkeypatch, tmp_path, words, message):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(dgrpo.run.steps, "load_model", loaded)
    monkeypatch.setattr(sys, "argv", ["gsm8k.py", "--output_dir", str(tmp_path / "run"), *words])
    with pytest.raises(ValueError) as error:  # noqa: PT011
        dgrpo.run.run_task(gsm8k.TASK, str(Path(__file__).parents[1] / "recipes/gsm8k.py"))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_new_run_in_a_used_folder_is_told_before_a_model_is_loaded(monkeypatch, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/trainer_state.json").write_text("{}")
    monkeypatch.setattr(dgrpo.run.steps, "load_model", None)
    monkeypatch.setattr(sys, "argv", ["gsm8k.py", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="holds checkpoint-3 of an earlier run: --resume true"):
        dgrpo.run.run_task(gsm8k.TASK, str(Path(__file__).parents[1] / "recipes/gsm8k.py"))


def test_a_models_name_is_no_model(config):
    with pytest.raises(ValueError, match=r"model='x/y': pass the model itself, as dgrpo.load_model\('x/y'\)"):
        DiffuGRPOTrainer("x/y", None, config(), Dataset.from_dict({"prompt": ["a"]}))


@pytest.mark.slow
def test_another_version_of_trl_is_told_when_a_trainer_is_imported():
    code = "import trl; trl.__version__ = '1.17.0'\nfrom dgrpo import DiffuGRPOConfig"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "private methods of trl 1.16, not of 1.17.0: pip install 'trl>=1.16,<1.17'" in done.stderr


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("--p_mask_prompt", "0.15", "p_mask_prompt=0.15: the model attends in blocks of 4 tokens"),
        # As recipes for full attention have it: never taken as the model's own.
        ("--block_length", "16", "block_length=16: the model attends in blocks of 4 tokens"),
    ],
)
def test_a_model_of_blocks_is_told_before_it_is_loaded(monkeypatch, tmp_path, setting, value, message):
    monkeypatch.setattr(dgrpo.run.steps, "load_model", None)
    folder = published.write_checkpoint(tmp_path / "sdar", "sdar")
    argv = [
        "gsm8k.py",
        "--model_name_or_path",
        str(folder),
        "--output_dir",
        str(tmp_path / "run"),
        "--use_cpu",
        "true",
    ]
    argv += [
        "--per_device_train_batch_size",
        "6",
        "--bf16",
        "false",
        setting,
        value,
        "--dataset",
        "embedded",
        "--reward_funcs",
        "rewards.gsm8k:correctness_reward",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match=message):
        dgrpo.run.main(gsm8k.TASK, str(Path(__file__).parents[1] / "recipes/gsm8k.py"))


def write_plugin(folder):
    (folder / "trial_plugin.py").write_text(
        "def nothing(): return []\ndef two(batch, *, clip): return 0, {}\n"
        "def est(rollout, *, generator, n: int = 2): pass"
    )


LATE = [
    (["--lora_r", "0"], "lora_r=0: must be a positive whole number"),
    (["--lora_alpha", "-1"], "lora_alpha=-1: must be a positive finite number"),
    (["--lora_dropout", "nan"], "lora_dropout=nan: must be at least 0 and below 1"),
    (["--lora_task_type", "TEA"], "Invalid task type"),
    (["--adapter_name_or_path", "nowhere"], "adapter='nowhere': no adapter_config.json"),
    (["--adapter_name_or_path", ""], "adapter='': no adapter_config.json"),
    (["--report_to", "tea"], "report_to='tea': choose"),
    (["--report_to", "comet_ml"], "report_to='comet_ml': its package is not installed"),
    (["--output_dir", ""], "output_dir='' is no folder"),
    (["--output_dir", "/"], "output_dir='/' is no folder"),
    (["--output_dir", __file__], "is no folder for a run"),
    (["--eval_strategy", "steps"], "eval_strategy='steps'"),
    (["--load_best_model_at_end", "true"], "load_best_model_at_end=True"),
    (["--save_strategy", "best"], "save_strategy='best'"),
    (["--fp16", "true"], "fp16=True"),
    (["--optim", "galore_adamw"], "optim="),
    (["--lr_scheduler_kwargs", '{"tea": 1}'], "lr_scheduler_kwargs={'tea': 1}"),
    (["--chat_template_kwargs", "[1]"], "chat_template_kwargs='[1]': must be a mapping"),
    (["--estimator_kwargs", "nowhere.json"], "estimator_kwargs='nowhere.json': must be a mapping"),
    (["--estimator_kwargs", '{"p_mask_prompt": 2}'], "p_mask_prompt=2: must be a probability"),
    (["--estimator_kwargs", '{"p_mask_prompt": "a"}'], "p_mask_prompt is of the type float"),
    (["--estimator_kwargs", '{"p_mask_prompt": true}'], "p_mask_prompt is of the type float"),
    (["--estimator", "trial_plugin:nothing"], "estimator='trial_plugin:nothing': it cannot be called as (rollout"),
    (["--objective", "trial_plugin:nothing", "--beta", "0"], "objective='trial_plugin:nothing': it cannot be called"),
    (["--objective", "trial_plugin:two", "--beta", "0"], "missing a required argument: 'clip'"),
    (["--estimator", "trial_plugin:est", "--estimator_kwargs", '{"n": 1.5}'], "n is of the type int"),
]


@pytest.mark.parametrize(("words", "message"), LATE, ids=lambda value: " ".join(value)[:40])
def test_what_libraries_meet_late_is_refused_before_rows_are_read(monkeypatch, tmp_path, words, message):
    write_plugin(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dgrpo.run.steps, "load_rows", None)
    monkeypatch.setattr(sys, "argv", ["gsm8k.py", "--output_dir", str(tmp_path / "run"), *words])
    with pytest.raises(SystemExit) as stopped:
        dgrpo.run.main(gsm8k.TASK, RECIPE)
    assert str(stopped.value).startswith("dgrpo: ")
    assert message in str(stopped.value)


KWARGS = [
    ("elbo", {"num_samples": 0}, "num_samples=0"),
    ("elbo", {"num_samples": 1.5}, "num_samples is of the type int"),
    ("elbo", {"min_ratio": 0.9, "max_ratio": 0.1}, "min_ratio=0.9"),
    ("trace", {"shrink": 0}, "shrink=0"),
    ("trace", {"shrink": "a"}, "shrink is of the type"),
    ("coupled", {"min_ratio": float("nan")}, "min_ratio=nan"),
    ("quadrature", {"num_nodes": True}, "num_nodes is of the type int"),
]


@pytest.mark.parametrize(("estimator", "kwargs", "message"), KWARGS, ids=str)
def test_settings_of_an_estimator_are_tried_before_a_model_is_loaded(config, estimator, kwargs, message):
    settings = {"objective": "espo", "beta": 0.0} if estimator in ("elbo", "quadrature") else {}
    with pytest.raises(ValueError, match=message):
        config(estimator=estimator, estimator_kwargs=kwargs, **settings)


@pytest.mark.parametrize(
    ("objective", "kwargs"),
    [
        ("spg", {"eubo_beta": 0.5}),
        ("spg", {"eubo_weight": 2}),
        ("spg", {"eubo_weight": "a"}),
        ("stable_drl", {"clip": -1.0}),
        ("wd1", {"temperature": float("nan")}),
    ],
    ids=str,
)
def test_settings_of_an_objective_are_in_range(config, objective, kwargs):
    estimator = "one_step" if objective == "wd1" else "elbo"
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        config(objective=objective, objective_kwargs=kwargs, beta=0.0, estimator=estimator)
