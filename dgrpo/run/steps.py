"""The few steps that every recipe shares: read the settings, load the model, train, evaluate, write what came out."""

import json
import os
import sys
import time
import warnings
from dataclasses import MISSING, asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import set_seed
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config

from dgrpo.models import load_model
from dgrpo.models.loading import family_of
from dgrpo.report.data import write_curves, write_report
from dgrpo.run.callbacks import HeldOutEvaluation, MetricsFile, ProgressLine, attach
from dgrpo.tasks import EMBEDDED, Task, load_rows
from dgrpo.trainers import DiffuGRPOConfig, DiffuGRPOTrainer
from dgrpo.trainers.checkpoints import checkpoint_to_go_on_from, move_earlier_run_aside, refuse_to_mix_runs
from dgrpo.trainers.plugins import resolve_reward
from dgrpo.trainers.rewards import check_columns

CHECKPOINTS = Path(__file__).parents[1] / "tiny" / "checkpoint"


# transformers 5.23 warns of its own renaming, which TRL has not followed yet.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


@dataclass
class RecipeConfig:
    """What a recipe adds to the trainer's and the model's settings."""

    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Rewards: 'package.module:function' or installed names."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub name, local .jsonl/.json/.csv/.parquet file, or 'embedded'."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out rows, if not of the same source."})
    num_train_problems: int | None = field(default=None, metadata={"help": "Use only so many training problems."})
    num_eval_problems: int = field(default=512, metadata={"help": "Held-out problems of each evaluation."})
    evaluate_every: int = field(default=0, metadata={"help": "Updates between evaluations; 0: before and after only."})
    instruction: str | None = field(default=None, metadata={"help": "Text before each question; default: the task's."})
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "A trained adapter (for example of recipes/sft.py) to go on from."}
    )
    sample_every: int = field(default=4, metadata={"help": "Rollouts between printed completions; 0: none."})
    keep_best: bool = field(
        default=True, metadata={"help": "Keep the weights of the best evaluation in output_dir/best (evaluate_every)."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})

    def __post_init__(self):
        for name, least in {
            "num_train_problems": 1,
            "num_eval_problems": 1,
            "evaluate_every": 0,
            "sample_every": 0,
        }.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value}: must be {least} or more.")


def parse_recipe(recipe: str, *config_types: type, argv: list[str] | None = None) -> tuple:
    """The recipe's settings: the YAML beside it or --config FILE, then --preset FILE, then the command line.

    Unknown keys of a YAML or of the command line are a ValueError.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    files = [_option(argv, "--config") or str(Path(recipe).with_suffix(".yaml")), _option(argv, "--preset")]
    settings: dict[str, Any] = {}
    for file in filter(None, files):
        loaded = yaml.safe_load(Path(file).read_text())
        if not isinstance(loaded, dict):
            raise ValueError(f"config={file!r}: must be a YAML mapping of settings.")
        settings |= loaded
    # Without abbreviations: `--learning_rat 1` must be refused, not read as the learning rate.
    parser = TrlParser(config_types or (RecipeConfig, DiffuGRPOConfig, ModelConfig), allow_abbrev=False)
    known = {action.dest for action in parser._actions}
    if unknown := sorted(set(settings) - known):
        raise ValueError(
            f"{' + '.join(filter(None, files))}: unknown keys {unknown}. Remove them or mend their spelling."
        )
    parser.set_defaults_with_config(**settings)
    *configs, rest = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if rest:
        raise ValueError(f"unknown arguments {rest}. `--help` lists the settings.")
    if checkpoint := next((c.resume_from_checkpoint for c in configs if hasattr(c, "resume_from_checkpoint")), None):
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} is not read; --resume true goes on from the newest whole "
            "checkpoint in output_dir."
        )
    return tuple(configs)


def _option(argv: list[str], name: str) -> str | None:
    """Takes `name VALUE` or `name=VALUE` out of argv."""
    for index, word in enumerate(argv):
        if word == name and index + 1 < len(argv):
            del argv[index]
            return argv.pop(index)
        if word.startswith(name + "="):
            return argv.pop(index).partition("=")[2]
    return None


def embedded_checkpoint(task: Task) -> Path:
    """The tiny model that comes with the package for a task; that of gsm8k where the task has none of its own."""
    own = CHECKPOINTS / task.name
    return own if own.is_dir() else CHECKPOINTS / "gsm8k"


def one_thread_unless_told() -> None:
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
    if model_config.model_name_or_path in (None, EMBEDDED):
        model_config.model_name_or_path = str(embedded_checkpoint(task))
        one_thread_unless_told()
    name = model_config.model_name_or_path
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


def main(task: Task, recipe_file: str) -> None:
    """A recipe, from its settings to its results."""
    recipe, args, model_config = parse_recipe(recipe_file)
    if not recipe.resume:
        refuse_to_mix_runs(args.output_dir)
        move_earlier_run_aside(args.output_dir)
    train_rows, held_out = load_rows(
        task,
        recipe.dataset,
        recipe.eval_dataset,
        num_train=recipe.num_train_problems,
        num_held_out=recipe.num_eval_problems,
        instruction=recipe.instruction,
        seed=args.seed,
    )
    model_config.model_name_or_path = model_config.model_name_or_path or EMBEDDED
    as_asked = replace(model_config)
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
    )
    train(trainer, task, held_out, recipe, as_asked)


def train(
    trainer: DiffuGRPOTrainer, task: Task, held_out: Dataset, recipe: RecipeConfig, model_config: ModelConfig
) -> dict:
    """Trains with progress and metrics, evaluates before and after, and writes the run's folder; its summary."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity(max(logging.get_verbosity(), logging.WARNING))
    metrics = MetricsFile(output_dir / "metrics.csv")
    evaluation = HeldOutEvaluation(trainer, task, held_out, recipe.evaluate_every, metrics, recipe.keep_best)
    attach(trainer, [metrics, ProgressLine(trainer, recipe.sample_every), evaluation])
    if trainer.accelerator.is_main_process:
        _write_config(output_dir, recipe, args, model_config)
    started, cpu_started = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=checkpoint_to_go_on_from(output_dir, recipe.resume))
    wall_seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    trainer.save_model()
    before, after = evaluation.before, evaluation.after
    summary = {
        "task": task.name,
        "model": model_config.model_name_or_path,
        "seed": args.seed,
        "before": before.summary(),
        "after": after.summary(),
        "steps": trainer.state.global_step,
        "wall_seconds": round(wall_seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "estimator": args.estimator if isinstance(args.estimator, str) else "custom",
        "versions": {name: version(name) for name in ("dgrpo", "torch", "trl", "transformers", "peft", "deepspeed")},
    }
    if trainer.accelerator.is_main_process:
        metrics.flush()
        samples = [
            {"prompt": row["question"], "gold": str(row.get("answer", "")), "before": old, "after": new}
            for row, old, new in list(zip(held_out, before.completions, after.completions, strict=True))[:16]
        ]
        (output_dir / "samples.json").write_text(json.dumps(samples, indent=1))
        (output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        write_curves(output_dir)
        write_report(output_dir)
        show_summary(summary, samples[:4], output_dir)
    return summary


def _write_config(output_dir: Path, recipe: RecipeConfig, args: DiffuGRPOConfig, model_config: ModelConfig) -> None:
    """Writes config.yaml: what was asked for beyond the defaults, of model, recipe and trainer; --config reads it."""
    settings = _changed(model_config, asdict(model_config)) | asdict(recipe) | _changed(args, args.to_dict())
    # The one follows from the other, and both are not taken.
    settings.pop("generation_batch_size", None)
    (output_dir / "config.yaml").write_text(
        yaml.safe_dump(json.loads(json.dumps(settings, default=str)), sort_keys=False)
    )


def _changed(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Those of a configuration's values that are not its defaults; no secrets."""
    plain = {name: each.default for name, each in type(config).__dataclass_fields__.items()}
    made = {
        name: each.default_factory()
        for name, each in type(config).__dataclass_fields__.items()
        if each.default_factory is not MISSING
    }
    return {name: value for name, value in values.items() if value != (plain | made).get(name) and "token" not in name}


def show_summary(summary: dict, samples: list[dict], output_dir: Path) -> None:
    """The same problems before and after, and accuracy as a small table."""
    console = Console()
    for sample in samples:
        prompt, gold = escape(sample["prompt"]), escape(sample["gold"])
        console.print(f"\n[bold]{prompt}[/bold]  (answer {gold})", highlight=False)
        for when in ("before", "after"):
            console.print(f"  {when:>6}: {sample[when]!r}", markup=False, highlight=False)
    table = Table(title=f"{summary['task']}, held-out, greedy, n={summary['before']['n']}")
    for column in ("", "accuracy", "95 % interval", "reason", "length"):
        table.add_column(column, justify="left" if not column else "right")
    for when in ("before", "after"):
        found = summary[when]
        low, high = found["interval"]
        table.add_row(
            when,
            f"{found['accuracy']:.1%}",
            f"{low:.1%} - {high:.1%}",
            f"{found['reasons']:.0%}",
            f"{found['mean_length']:.1f}",
        )
    console.print()
    console.print(table)
    before = summary["before"]
    where_it_reasons = before["accuracy_where_it_reasons"]
    if where_it_reasons is not None:
        console.print(
            f"Before training, the model showed its reasoning on {round(before['reasons'] * before['n'])} of "
            f"{before['n']} problems; {where_it_reasons:.1%} of those answers were right."
        )
    console.print(
        f"{summary['steps']} updates in {summary['wall_seconds']:.0f} s ({summary['cpu_seconds']:.0f} CPU-s); "
        f"everything is in {output_dir}{os.sep}"
    )
