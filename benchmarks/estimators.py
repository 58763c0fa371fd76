"""Every preset side by side on two tasks: accuracy after equal rollouts and after equal CPU seconds.

    python benchmarks/estimators.py --output_dir runs/estimators

For each preset the same three learning rates, one seed, over half of the budget; then three other seeds with the best
of them over all of it. The presets are those of `recipes/presets`, the rest is the task's recipe, with a constant
learning rate after four updates of warm-up. A table for each task and `estimators.png`. About two CPU-hours.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from study import ROOT, Run, accuracy, one_thread, results, spread

from dgrpo.report.curves import COLOURS, MUTED, dress

PRESETS = tuple(sorted(file.stem for file in (ROOT / "recipes" / "presets").glob("*.yaml")))
SWEEP_SEED, SEEDS = 100, (0, 1, 2)
COMMON = {"warmup_steps": 4, "num_eval_problems": 512}
# The budgets are `rollouts` batches and `seconds` of CPU time. Methods with many views need long for their rollouts:
# after `at_most` seconds they are not waited for. gsm8k has half of the recipe's rollouts in a batch, so that a method
# with one update each makes a number of them; on Sudoku, where most groups teach nothing, a quarter of the recipe's
# taught no method anything (one sweep).
TASKS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "rollouts": 12,
        "seconds": 40.0,
        "at_most": 60.0,
        "learning_rates": (3e-4, 1e-3, 3e-3),
        "settings": {"per_device_train_batch_size": 64, "log_kl": False},
    },
    "sudoku": {
        "rollouts": 6,
        "seconds": 45.0,
        "at_most": 70.0,
        "learning_rates": (2.5e-5, 8e-5, 2.5e-4),
        "settings": {"per_device_train_batch_size": 512},
    },
}
# SPG's own setting for Sudoku. Four denoising steps are four views, which TraceRL's default would merge into one.
ONLY: dict[tuple[str, str], dict[str, Any]] = {
    ("sudoku", "spg"): {"objective_kwargs": {"eubo_beta": 1.0, "eubo_weight": 0.5}},
    ("sudoku", "tracerl"): {"estimator_kwargs": {"shrink": 1}},
}


def run_of(task: str, preset: str, learning_rate: float, seed: int) -> Run:
    """The run of a preset over the whole budget."""
    settings = COMMON | TASKS[task]["settings"] | ONLY.get((task, preset), {}) | {"learning_rate": learning_rate}
    name = f"{preset}-{learning_rate:g}"
    budget = TASKS[task]
    return Run(name, task, seed, settings, budget["rollouts"], budget["seconds"], budget["at_most"], preset=preset)


def halved(run: Run) -> Run:
    """The same over half the budget."""
    return replace(
        run, rollouts=run.rollouts // 2, cpu_seconds=run.cpu_seconds / 2, at_most=run.at_most / 2, seed=SWEEP_SEED
    )


def at_rollouts(result: dict[str, Any], rollouts: int) -> dict[str, Any] | None:
    """The evaluation after so many rollout batches; None where the run never came so far."""
    found = [point for point in result["points"] if point["rollouts"] == rollouts]
    return found[0] if found else None


def in_time(result: dict[str, Any]) -> dict[str, Any]:
    """The evaluation after the CPU time that every run gets."""
    return next(point for point in result["points"] if point.get("in_time"))


def best_rate(sweep: list[dict[str, Any]]) -> float:
    """The learning rate of the run that ended best, by the mean of its evaluations after equal time and at its end."""
    return max(sweep, key=lambda each: accuracy(in_time(each)) + accuracy(each["points"][-1]))["settings"][
        "learning_rate"
    ]


def table(task: str, sweeps: dict[str, list[dict]], finals: dict[str, list[dict]]) -> str:
    """Markdown: a row for each preset, best after equal time first."""
    rates, rollouts, seconds = (TASKS[task][name] for name in ("learning_rates", "rollouts", "seconds"))
    start = accuracy(next(iter(finals.values()))[0]["points"][0])
    lines = [
        f"{task}: {start:.1%} before. Sweep: after {seconds / 2:.0f} CPU-s, one seed.\n",
        f"| preset | {' | '.join(f'sweep {rate:g}' for rate in rates)} | rate | after {seconds:.0f} CPU-s | rollouts, "
        f"updates then | after {rollouts} rollouts | CPU-s then | lowest point |",
        "|---|" + "---|" * (len(rates) + 6),
    ]
    for preset in sorted(finals, key=lambda name: -mean(accuracy(in_time(each)) for each in finals[name])):
        runs = finals[preset]
        timed = [in_time(each) for each in runs]
        rolled = [point for each in runs if (point := at_rollouts(each, rollouts))]
        needed = f"{mean(point['cpu_seconds'] for point in rolled):.0f}" if rolled else "-"
        lowest = min(accuracy(point) for each in runs for point in each["points"][1:])
        lines.append(
            f"| {preset} | {' | '.join(f'{accuracy(in_time(each)):.1%}' for each in sweeps[preset])} | "
            f"{runs[0]['settings']['learning_rate']:g} | {spread([accuracy(point) for point in timed])} | "
            f"{mean(point['rollouts'] for point in timed):.0f}, {mean(point['updates'] for point in timed):.0f} | "
            f"{spread([accuracy(point) for point in rolled])} | {needed} | {lowest:.1%} |"
        )
    return "\n".join(lines)


def draw(path: Path, found: dict[str, dict[str, list[dict]]]) -> None:
    """A panel for each task and budget: mean and range of each preset, the start as a line."""
    figure = Figure(figsize=(10.4, 7.2), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    axes = figure.subplots(len(found), 2, squeeze=False, sharex="row")
    for row, (task, finals) in zip(axes, found.items(), strict=True):
        start = accuracy(next(iter(finals.values()))[0]["points"][0])
        rollouts, seconds = TASKS[task]["rollouts"], TASKS[task]["seconds"]
        order = sorted(finals, key=lambda name: mean(accuracy(in_time(each)) for each in finals[name]))
        for axis, title in zip(row, (f"{seconds:.0f} CPU seconds", f"{rollouts} rollout batches"), strict=True):
            axis.axvline(100 * start, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            for height, preset in enumerate(order):
                points = [in_time(each) if axis is row[0] else at_rollouts(each, rollouts) for each in finals[preset]]
                values = [100 * accuracy(point) for point in points if point]
                if not values:
                    continue
                axis.plot([min(values), max(values)], [height] * 2, color=COLOURS[0], alpha=0.35, linewidth=5)
                axis.plot(mean(values), height, "o", color=COLOURS[0], markersize=7)
            axis.set_yticks(range(len(order)), order if axis is row[0] else [])
            dress(axis, f"{task}: after {title}", grid="x")
    for axis in axes[-1]:
        axis.set_xlabel("held-out problems right, %; dashed: before", fontsize=9, color=MUTED, loc="right")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/estimators"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    one_thread()
    folder = arguments.output_dir.resolve()
    found: dict[str, dict[str, list[dict]]] = {}
    tables = []
    for task in arguments.tasks:
        rates = TASKS[task]["learning_rates"]
        sweeps = {}
        for preset in arguments.presets:
            runs = [halved(run_of(task, preset, rate, SWEEP_SEED)) for rate in rates]
            sweeps[preset] = results(runs, folder / "sweep", arguments.workers)
        found[task] = {}
        for preset in arguments.presets:
            runs = [run_of(task, preset, best_rate(sweeps[preset]), seed) for seed in SEEDS]
            found[task][preset] = results(runs, folder / "full", arguments.workers)
        tables.append(table(task, sweeps, found[task]))
    draw(folder / "estimators.png", found)
    (folder / "settings.json").write_text(json.dumps({"common": COMMON, "tasks": TASKS}, indent=1))
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    main()
