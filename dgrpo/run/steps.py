"""The steps of a run: build the trainer from the settings, train, evaluate, write what came out."""

import contextlib
import errno
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging
from trl import ModelConfig, get_peft_config

from dgrpo.cli import one_line_errors
from dgrpo.models import load_model
from dgrpo.models.loading import family_of, load_config
from dgrpo.reliability.checks import check_blocks
from dgrpo.reliability.columns import check_columns, checked_rewards
from dgrpo.reliability.manifest import move_earlier_run_aside, refuse_to_mix_runs, resume_checkpoint, whole_checkpoints
from dgrpo.reliability.same_run import refuse_another_run
from dgrpo.report.data import write_curves, write_report
from dgrpo.run.allocator import keep_freed_memory
from dgrpo.run.callbacks import (
    HeldOutEvaluation,
    MetricsFile,
    ProgressLine,
    attach,
    no_bars_without_a_terminal,
    shows_bars,
)
from dgrpo.run.card import publish
from dgrpo.run.checks import check_folder, check_settings
from dgrpo.run.lock import lock_file, locked
from dgrpo.run.settings import RecipeConfig, begun_with, parse_recipe, write_config
from dgrpo.run.stopping import StopOnSignal
from dgrpo.run.summary import samples_of, show_summary, summary_of
from dgrpo.run.validate import validated
from dgrpo.tasks import EMBEDDED, EMBEDDED_MODELS, Task, load_rows
from dgrpo.trainers import DiffuGRPOConfig, DiffuGRPOTrainer
from dgrpo.trainers.plugins import configured_estimator, resolve_reward
from dgrpo.trainers.rollouts import RolloutSource
from dgrpo.trainers.sft import MaskedSFTConfig
from dgrpo.trainers.sft import check_blocks as check_sft_blocks
from dgrpo.views import MaskedViews

CHECKPOINTS = Path(__file__).parents[1] / "tiny" / "checkpoint"


# transformers 5.23 warns of its own renaming, which TRL has not followed yet.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


def embedded_checkpoint(task: Task, name: str = EMBEDDED) -> Path:
    """The tiny model of this name for a task; that of gsm8k where the task has none of its own."""
    own, default = (CHECKPOINTS / f"{each}{EMBEDDED_MODELS[name]}" for each in (task.name, "gsm8k"))
    return own if own.is_dir() else default


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
    if name in EMBEDDED_MODELS:
        name = str(embedded_checkpoint(task, name))
        default_to_one_thread()
    if args.device.type == "cpu":
        keep_freed_memory()
    convert = getattr(recipe, "convert", None)
    # Without an adapter, and without DeepSpeed's float32 copies, updates of weights in bfloat16 round to nothing.
    rounds = not (model_config.use_peft or recipe.adapter_name_or_path or args.deepspeed_plugin)
    family = family_of(name, model_config.model_revision, convert=convert)
    # Of the model; that in `args` is the sampler's, and must be the same where the model attends in blocks.
    block_length = getattr(recipe, "block_length", None)
    network = load_config(name, model_config.model_revision, convert=convert, block_length=block_length)
    if isinstance(args, DiffuGRPOConfig):
        check_blocks(network, args, configured_estimator(args) if args.estimator else None)
    elif isinstance(args, MaskedSFTConfig):
        check_sft_blocks(network, args)
    peft_config: LoraConfig | None = get_peft_config(model_config)  # type: ignore[assignment]  # TRL makes LoRA alone
    if peft_config is not None and model_config.lora_target_modules is None:
        peft_config.target_modules = family.lora_targets
    elif peft_config is not None and peft_config.target_modules != "all-linear":
        with torch.device("meta"):
            names = [name for name, _ in family.model_class(network).named_modules()]
        if not any(check_target_module_exists(peft_config, name) for name in names):
            raise ValueError(
                f"lora_target_modules={model_config.lora_target_modules}: the model has none of them; such as "
                f"{family.lora_targets}."
            )
    set_seed(args.seed)
    model, tokenizer = load_model(
        name,
        dtype=model_config.dtype or ("bfloat16" if args.bf16 and not rounds else "float32"),
        attn_implementation=model_config.attn_implementation or "sdpa",
        load_in_4bit=model_config.load_in_4bit,
        load_in_8bit=model_config.load_in_8bit,
        adapter=recipe.adapter_name_or_path,
        revision=model_config.model_revision,
        convert=convert,
        block_length=block_length,
    )
    return model, tokenizer, None if recipe.adapter_name_or_path is not None else peft_config


def rewards_of(recipe: RecipeConfig) -> list:
    """The reward functions that the recipe names."""
    if not recipe.reward_funcs:
        raise ValueError(
            "reward_funcs=[]: name at least one reward, as 'package.module:function', or settings that do (--config). "
            "Those of the embedded model are not taken for another one."
        )
    return [resolve_reward(name) for name in recipe.reward_funcs]


def build(
    task: Task,
    recipe: RecipeConfig,
    args: DiffuGRPOConfig,
    model_config: ModelConfig,
    estimator: Callable[..., MaskedViews] | None = None,
    rollout_source: RolloutSource | None = None,
) -> tuple[DiffuGRPOTrainer, Dataset]:
    """The trainer of a run and its held-out rows. Whatever can be refused is, before a model is loaded.

    Args:
        task: where the rows come from and what counts as right.
        recipe: rows, rewards and evaluation.
        args: the trainer's settings.
        model_config: the model and its adapter.
        estimator: a callable in place of the one that `args.estimator` names.
        rollout_source: where completions come from, if not from the policy on the process that trains it.
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
    checked_rewards(rewards, train_rows, args)
    check_columns([task.grade], train_rows.column_names)
    if recipe.validate:
        assert args.output_dir is not None
        train_rows = validated(train_rows, rewards, task, Path(args.output_dir) / "left_out.jsonl")
    args.check_num_prompts(len(train_rows))
    model, tokenizer, peft_config = prepare_model(task, recipe, args, model_config)
    trainer = DiffuGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=args,
        peft_config=peft_config,
        train_dataset=train_rows,
        reward_funcs=rewards,
        estimator=estimator,
        rollout_source=rollout_source,
    )
    return trainer, held_out


@contextlib.contextmanager
def _told_where(output_dir: str | Path) -> Iterator[None]:
    """Adds to an error of writing what to do; checkpoints, whose errors have no errno, tell it themselves."""
    try:
        yield
    except OSError as error:
        place = str(Path(output_dir).absolute())
        file = Path(str(error.filename)).absolute()
        ours = file == lock_file(output_dir) or file.is_relative_to(place) or Path(place).is_relative_to(file)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
        if error.errno is None or not (full or ours):
            raise
        whole = whole_checkpoints(output_dir) if Path(output_dir).is_dir() else []
        rest = f"resume from {whole[-1]} with --resume true" if whole else "start again; it has no checkpoint yet"
        raise OSError(
            f"output_dir={str(output_dir)!r} cannot be written: {error}. Make room or choose a folder that can be "
            f"written, and {rest}."
        ) from error


@contextlib.contextmanager
def run_folder(args: TrainingArguments, recipe: Any, model_config: ModelConfig) -> Iterator[str | None]:
    """The run's folder, held against other runs, and the checkpoint to resume from; before a model is loaded.

    Raises:
        ValueError: another run writes there, an earlier one's checkpoints are there, none of them is whole, or they
            were made with other settings.
        OSError: something in the folder could not be written, as on a full disk; with the remedy.
    """
    model_config.model_name_or_path = model_config.model_name_or_path or EMBEDDED
    no_bars_without_a_terminal()
    check_folder(args.output_dir or "")
    check_settings(args, recipe, model_config)
    main = PartialState().is_main_process
    assert args.output_dir is not None
    with _told_where(args.output_dir), locked(args.output_dir) if main else contextlib.nullcontext():
        checkpoint = resume_checkpoint(args.output_dir, recipe.resume)
        if checkpoint:
            now = {"trainer": args.to_dict(), "num_processes": PartialState().num_processes}
            refuse_another_run(checkpoint, now | begun_with(recipe, model_config))
        elif not recipe.resume:
            refuse_to_mix_runs(args.output_dir)
            move_earlier_run_aside(args.output_dir)
        yield checkpoint


def train_until_stopped(trainer: Trainer, checkpoint: str | None, recipe: Any, model_config: ModelConfig) -> None:
    """Trains, writes the settings down, and saves the weights; the process ends where Ctrl-C or SIGTERM ends the run.

    Raises:
        ValueError: fewer updates were made than asked for.
    """
    assert trainer.args.output_dir is not None
    trainer.checkpoints.settings |= begun_with(recipe, model_config)  # type: ignore[attr-defined]  # all of ours have them
    if trainer.accelerator.is_main_process:
        Path(trainer.args.output_dir).mkdir(parents=True, exist_ok=True)
        write_config(Path(trainer.args.output_dir), recipe, trainer.args, model_config, resumed=checkpoint is not None)
    if not shows_bars() and any(type(each) is ProgressCallback for each in trainer.callback_handler.callbacks):
        # A line for each record instead of transformers' own bar.
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(PrinterCallback)
    stop = StopOnSignal(trainer)
    trainer.add_callback(stop)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, HeldOutEvaluation):
            callback.interrupted = lambda: stop.stopped
    with stop:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            stop.leave()
    if stop.stopped:
        stop.leave()
    # Pushed when its card is written.
    trainer.save_model(_internal_call=True)
    done, asked = trainer.state.global_step, trainer.state.max_steps
    if done < asked and not getattr(trainer.args, "stop_on_collapse", False):
        raise ValueError(
            f"max_steps={asked}: the run ended after {done} updates, the weights of which are in "
            f"output_dir={str(trainer.args.output_dir)!r}; something other than this recipe stopped it."
        )


def train(
    trainer: DiffuGRPOTrainer,
    task: Task,
    held_out: Dataset,
    recipe: RecipeConfig,
    model_config: ModelConfig,
    checkpoint: str | None = None,
) -> dict:
    """Trains with progress and metrics, evaluates before and after, and writes the run's folder; its summary."""
    assert trainer.args.output_dir is not None
    output_dir = Path(trainer.args.output_dir)
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
    started, cpu_started = time.perf_counter(), time.process_time()
    train_until_stopped(trainer, checkpoint, recipe, model_config)
    seconds = time.perf_counter() - started, time.process_time() - cpu_started
    summary = summary_of(trainer, evaluation, model_config, *seconds)
    if trainer.accelerator.is_main_process:
        metrics.flush()
        samples = samples_of(evaluation)
        (output_dir / "samples.json").write_text(json.dumps(samples, indent=1))
        (output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        write_curves(output_dir)
        write_report(output_dir)
        publish(trainer.args)
        show_summary(summary, samples[:4], output_dir)
    return summary


def run_task(
    task: Task | Callable[[Any, DiffuGRPOConfig], Task],
    recipe_file: str,
    recipe_type: type = RecipeConfig,
    rollout_source: RolloutSource | None = None,
) -> dict:
    """A recipe, from its settings to its results: the summary.

    Args:
        task: the task, or a function of (recipe, args) that makes it.
        recipe_file: the recipe; the settings of the embedded model are in the YAML beside it.
        recipe_type: what the recipe's own settings are.
        rollout_source: where rollouts come from; by default the policy itself.
    """
    recipe, args, model_config = parse_recipe(recipe_file, recipe_type, DiffuGRPOConfig, ModelConfig)
    with run_folder(args, recipe, model_config) as checkpoint:
        task = task if isinstance(task, Task) else task(recipe, args)
        trainer, held_out = build(task, recipe, args, model_config, rollout_source=rollout_source)
        return train(trainer, task, held_out, recipe, model_config, checkpoint)


def main(
    task: Task | Callable[[Any, DiffuGRPOConfig], Task],
    recipe_file: str,
    recipe_type: type = RecipeConfig,
    rollout_source: RolloutSource | None = None,
) -> None:
    """`run_task` as a program: a user's error is printed in one line."""
    with one_line_errors():
        run_task(task, recipe_file, recipe_type, rollout_source)
