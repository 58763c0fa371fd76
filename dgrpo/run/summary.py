"""What a run came to: summary.json, and the same problems before and after, on the console."""

import os
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from trl import ModelConfig

from dgrpo.run.callbacks import FORMATS, HeldOutEvaluation
from dgrpo.trainers import DiffuGRPOTrainer


def summary_of(
    trainer: DiffuGRPOTrainer,
    evaluation: HeldOutEvaluation,
    model_config: ModelConfig,
    wall_seconds: float,
    cpu_seconds: float,
) -> dict:
    """What summary.json holds: accuracy before and after, and what the run took, on what."""
    args = trainer.args
    assert evaluation.before is not None
    assert evaluation.after is not None
    return {
        "task": evaluation.task.name,
        "model": model_config.model_name_or_path,
        "seed": args.seed,
        "eval_sampler": evaluation.sampler,
        "before": evaluation.before.summary(),
        "after": evaluation.after.summary(),
        "flips": evaluation.before.flips(evaluation.after),
        "steps": trainer.state.global_step,
        "wall_seconds": round(wall_seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "estimator": args.estimator if isinstance(args.estimator, str) else "custom",
        "versions": {name: version(name) for name in ("dgrpo", "torch", "trl", "transformers", "peft", "deepspeed")},
    }


def samples_of(evaluation: HeldOutEvaluation, number: int = 24) -> list[dict]:
    """Held-out problems with the completions before and after training; those whose grade changed come first."""
    before, after = evaluation.before, evaluation.after
    assert before is not None
    assert after is not None
    grades = before.scores or before.correct, after.scores or after.correct
    order = sorted(range(before.n), key=lambda k: grades[0][k] == grades[1][k])
    return [
        {
            "prompt": str(evaluation.rows[k]["question"]),
            "gold": str(evaluation.rows[k].get("answer", "")),
            "before": before.completions[k],
            "after": after.completions[k],
        }
        | (
            {"before_right": before.correct[k], "after_right": after.correct[k]}
            if before.scores is None or after.scores is None
            else {"before_score": before.scores[k], "after_score": after.scores[k]}
        )
        for k in order[:number]
    ]


def show_summary(summary: dict, samples: list[dict], output_dir: Path) -> None:
    """The same problems before and after, and accuracy as a small table."""
    console = Console()
    for sample in samples:
        prompt, gold = escape(sample["prompt"]), escape(sample["gold"])
        console.print(f"\n[bold]{prompt}[/bold]{f'  (answer {gold})' if gold else ''}", highlight=False)
        for when in ("before", "after"):
            console.print(f"  {when:>6}: {sample[when]!r}", markup=False, highlight=False)
    sampler = "" if summary["eval_sampler"] == "exact" else f" ({summary['eval_sampler']} sampler)"
    table = Table(title=f"{summary['task']}, held-out, greedy{sampler}, n={summary['before']['n']}")
    measure = "score" if "score" in summary["before"] else "accuracy"
    for column in ("", measure, "95 % interval", "reason", "length"):
        table.add_column(column, justify="left" if not column else "right")
    for when in ("before", "after"):
        found = summary[when]
        figure, low, high = (f"{each:{FORMATS[measure]}}" for each in (found[measure], *found["interval"]))
        table.add_row(
            when,
            figure,
            f"{low} - {high}",
            f"{found['reasons']:.0%}",
            f"{found['mean_length']:.1f}",
        )
    console.print()
    console.print(table)
    before = summary["before"]
    where_it_reasons = before["accuracy_where_it_reasons"]
    if where_it_reasons is not None and measure == "accuracy":
        console.print(
            f"Before training, the model showed its reasoning on {round(before['reasons'] * before['n'])} of "
            f"{before['n']} problems; {where_it_reasons:.1%} of those answers were right."
        )
    console.print(
        f"{summary['steps']} updates in {summary['wall_seconds']:.0f} s ({summary['cpu_seconds']:.0f} CPU-s); "
        f"everything is in {output_dir}{os.sep}"
    )
