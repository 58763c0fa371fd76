"""Do the likelihood bounds learn when they are given time? Their presets on the embedded default, five times as long.

    python benchmarks/patience.py --output_dir runs/patience

`benchmarks/estimators.py` gives every preset 40 CPU seconds, in which those that score many views of each rollout
make few updates. Here they train for 200, `--seeds` of each at one learning rate. A table and `patience.png`. Four
CPU-minutes a run.
"""

import argparse
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from study import Run, accuracy, one_thread, results, spread

from dgrpo.report.curves import COLOURS, INK, MUTED, dress

SECONDS = (40, 100, 200)
RATES = {"espo": 3e-4, "spg": 3e-4, "gdpo": 3e-4, "bgpo": 1e-3}
# Rollouts between evaluations, so that each method has about a dozen of them.
EVERY = {"espo": 2, "spg": 4, "gdpo": 2, "bgpo": 2}
SETTINGS = {"per_device_train_batch_size": 64, "log_kl": False, "num_eval_problems": 256, "warmup_steps": 4}


def run_of(preset: str, seed: int) -> Run:
    """200 CPU seconds of a preset, evaluations aside."""
    settings = SETTINGS | {"learning_rate": RATES[preset]}
    points = range(EVERY[preset], 1000, EVERY[preset])
    return Run(preset, "gsm8k", seed, settings, 0, float(SECONDS[-1]), points=points, preset=preset)


def before(result: dict, seconds: float) -> dict:
    """The last evaluation of a run within so many CPU seconds, or the one that these ended in."""
    return [point for point in result["points"] if point["cpu_seconds"] <= 1.05 * seconds][-1]


def table(found: dict[str, list[dict]]) -> str:
    """Markdown: a row for each preset, accuracy after equal CPU time."""
    start = accuracy(next(iter(found.values()))[0]["points"][0])
    lines = [
        f"{start:.1%} before; mean [least, most] of the seeds.\n",
        f"| preset | seeds | rate | {' | '.join(f'{seconds} CPU-s' for seconds in SECONDS)} | rollouts, updates |",
        "|---|---|---|" + "---|" * (len(SECONDS) + 1),
    ]
    for preset, runs in found.items():
        cells = [spread([accuracy(before(each, seconds)) for each in runs]) for seconds in SECONDS]
        ends = [each["points"][-1] for each in runs]
        lines.append(
            f"| {preset} | {len(runs)} | {RATES[preset]:g} | {' | '.join(cells)} | "
            f"{mean(end['rollouts'] for end in ends):.0f}, {mean(end['updates'] for end in ends):.0f} |"
        )
    return "\n".join(lines)


def draw(path: Path, found: dict[str, list[dict]]) -> None:
    """Accuracy over CPU time: a line for each preset, the range of its seeds as a band."""
    figure = Figure(figsize=(8.4, 4.4), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    axis = figure.subplots()
    for number, (preset, runs) in enumerate(found.items()):
        times = range(0, SECONDS[-1] + 1, 10)
        values = [[100 * accuracy(before(each, seconds)) for each in runs] for seconds in times]
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(times, [mean(each) for each in values], color=colour, label=preset, linewidth=1.8)
        axis.fill_between(times, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12)
    dress(axis, "held-out problems right, %")
    axis.set_xlabel("CPU seconds of training", fontsize=9, color=MUTED, loc="right")
    axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right", ncols=2)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/patience"))
    parser.add_argument("--presets", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    one_thread()
    folder = arguments.output_dir.resolve()
    found = {
        preset: results([run_of(preset, seed) for seed in arguments.seeds], folder, arguments.workers)
        for preset in arguments.presets
    }
    draw(folder / "patience.png", found)
    print("\n" + table(found))


if __name__ == "__main__":
    main()
