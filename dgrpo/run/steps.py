"""The steps of a run: build the trainer from the settings, train, evaluate, write what came out."""

import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from transformers.utils import logging
from trl import ModelConfig, get_peft_config

from dgrpo.models import load_model
from dgrpo.models.loading import family_of
from dgrpo.report.data import write_curves, write_report
from dgrpo.run.callbacks import HeldOutEvaluation, MetricsFile, ProgressLine, attach
from dgrpo.run.settings import RecipeConfig, parse_recipe, write_config
from dgrpo.run.summary import samples_of, show_summary, summary_of
from dgrpo.tasks import EMBEDDED, Task, load_rows
from dgrpo.trainers import DiffuGRPOConfig, DiffuGRPOTrainer
from dgrpo.trainers.manifest import move_earlier_run_aside, refuse_to_mix_runs, resume_checkpoint
from dgrpo.trainers.plugins import resolve_reward
from dgrpo.trainers.rewards import check_columns
from dgrpo.views import MaskedViews

CHECKPOINTS = Path(__file__).parents[1] / "tiny" / "checkpoint"


# transformers 5.23 warns of its own renaming, which TRL has not followed yet.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


def embedded_checkpoint(task: Task) -> Path:
    """The tiny model that comes with the package for a task; that of gsm8k where the task has none of its own."""
    own = CHECKPOINTS / task.name
    return own if own.is_dir() else CHECKPOINTS / "gsm8k"


def default_to_one_thread() -> None:
    """For the embedded models: several threads take longer over them than one, several times on a busy machine."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


# Fields of TRL's ModelConfig that nothing here reads: 4-bit weights are NF4, quantized twice.
_NOT_READ = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")


def prepare_model(task: Task, recipe: RecipeConfig, args: DiffuGRPOConfig, model_config: ModelConfig):
    """Model, tokenizer and LoRA settings (None when fine-tuning in full or going on with an adapter)."""
    for name in _NOT_READ:
        if (value := getattr(model_config, name)) != ModelConfig.__dataclass_fields__[name].default:
            raise ValueError(f"{name}={value!r} is not read: load_in_4bit takes NF4, quantized twice. Remove it.")
    name = model_config.model_name_or_path = model_config.model_name_or_path or EMBEDDED
    if name == EMBEDDED:
        name = str(embedded_checkpoint(task))
        default_to_one_thread()
    convert = getattr(recipe, "convert", None)
    family = family_of(name, model_config.model_revision, convert=convert)
    set_seed(args.seed)
    model, tokenizer = load_model(
        name,
        dtype=model_config.dtype or ("bfloat16" if args.bf16 else "float32"),
        attn_implementation=model_config.attn_implementation or "sdpa",
        load_in_4bit=model_config.load_in_4bit,
        load_in_8bit=model_config.load_in_8bit,
        adapter=recipe.adapter_name_or_path,
        revision=model_config.model_revision,
        convert=convert,
    )
    peft_config: LoraConfig | None = get_peft_config(model_config)
    if recipe.adapter_name_or_path is not None:
        return model, tokenizer, None
    if peft_config is not None and model_config.lora_target_modules is None:
        peft_config.target_modules = family.lora_targets
    return model, tokenizer, peft_config


def rewards_of(recipe: RecipeConfig) -> list:
    """The reward functions that the recipe names."""
    if not recipe.reward_funcs:
        raise ValueError("reward_funcs=[]: name at least one reward, as 'package.module:function'.")
    return [resolve_reward(name) for name in recipe.reward_funcs]


def build(
    task: Task,
    recipe: RecipeConfig,
    args: DiffuGRPOConfig,
    model_config: ModelConfig,
    estimator: Callable[..., MaskedViews] | None = None,
) -> tuple[DiffuGRPOTrainer, Dataset]:
    """The trainer of a run and its held-out rows. Whatever can be refused is, before a model is loaded.

    Args:
        task: where the rows come from and what counts as right.
        recipe: rows, rewards and evaluation.
        args: the trainer's settings.
        model_config: the model and its adapter.
        estimator: a callable in place of the one that `args.estimator` names.
    """
    train_rows, held_out = load_rows(
        task,
        recipe.dataset,
        recipe.eval_dataset,
        num_train=recipe.num_train_problems,
        num_held_out=recipe.num_eval_problems,
        instruction=recipe.instruction,
        seed=args.seed,
    )
    rewards = rewards_of(recipe)
    check_columns(rewards, train_rows.column_names)
    model, tokenizer, peft_config = prepare_model(task, recipe, args, model_config)
    trainer = DiffuGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=args,
        peft_config=peft_config,
        train_dataset=train_rows,
        reward_funcs=rewards,
        estimator=estimator,
    )
    return trainer, held_out


def train(
    trainer: DiffuGRPOTrainer, task: Task, held_out: Dataset, recipe: RecipeConfig, model_config: ModelConfig
) -> dict:
    """Trains with progress and metrics, evaluates before and after, and writes the run's folder; its summary."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity(max(logging.get_verbosity(), logging.WARNING))
    metrics = MetricsFile(output_dir / "metrics.csv")
    evaluation = HeldOutEvaluation(
        trainer,
        task,
        held_out,
        recipe.evaluate_every,
        metrics,
        recipe.keep_best,
        recipe.coverage_problems,
        recipe.eval_sampler,
    )
    attach(trainer, [metrics, ProgressLine(trainer, recipe.sample_every), evaluation])
    if trainer.accelerator.is_main_process:
        write_config(output_dir, recipe, args, model_config)
    started, cpu_started = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=resume_checkpoint(output_dir, recipe.resume))
    seconds = time.perf_counter() - started, time.process_time() - cpu_started
    trainer.save_model()
    summary = summary_of(trainer, evaluation, model_config, *seconds)
    if trainer.accelerator.is_main_process:
        metrics.flush()
        samples = samples_of(evaluation)
        (output_dir / "samples.json").write_text(json.dumps(samples, indent=1))
        (output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        write_curves(output_dir)
        write_report(output_dir)
        show_summary(summary, samples[:4], output_dir)
    return summary


def main(task: Task, recipe_file: str) -> None:
    """A recipe, from its settings to its results."""
    recipe, args, model_config = parse_recipe(recipe_file)
    if not recipe.resume:
        refuse_to_mix_runs(args.output_dir)
        move_earlier_run_aside(args.output_dir)
    trainer, held_out = build(task, recipe, args, model_config)
    train(trainer, task, held_out, recipe, model_config)
