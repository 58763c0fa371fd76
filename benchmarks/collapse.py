"""What makes a run collapse: from a setting that does, one thing changed at a time.

    python benchmarks/collapse.py --output_dir runs/collapse

Both embedded tasks, with a learning rate a few times too high and none of the usual brakes: no warm-up, no KL, small
batches. Every change keeps that rate but the one that lowers it. Three seeds; a table for each task: accuracy on the
way and how many seeds end below their start. Forty CPU-minutes.
"""

import argparse
from pathlib import Path
from typing import Any

from study import Run, accuracy, one_thread, results, spread

SEEDS = (0, 1, 2)
ROLLOUTS = 16
TASKS: dict[str, dict[str, Any]] = {
    "gsm8k": {"per_device_train_batch_size": 64, "log_kl": False, "learning_rate": 5e-3},
    "sudoku": {
        "per_device_train_batch_size": 128,
        "learning_rate": 2.5e-4,
        "estimator": "one_step",
        "num_iterations": 4,
    },
}
COMMON = {"warmup_steps": 0, "num_eval_problems": 256}
CHANGES: dict[str, dict[str, Any]] = {
    "nothing changed": {},
    "a fifth of the learning rate": {},
    "warm-up over 4 rollouts": {"warmup_steps": 16},
    "1 update a rollout": {"num_iterations": 1},
    "12 updates a rollout": {"num_iterations": 12},
    "KL 0.04": {"beta": 0.04},
    "KL 0.4": {"beta": 0.4},
    "clip range 0.5": {"epsilon": 0.5},
    "clip range 0.05": {"epsilon": 0.05},
    "gradient norm 0.2": {"max_grad_norm": 0.2},
    "batch four times as large": {},
    "temperature 0.3": {"temperature": 0.3},
    "temperature 1.5": {"temperature": 1.5},
    "prompt shown": {"p_mask_prompt": 0.0},
    "the rollout's states scored": {"estimator": "trace"},
    "the same, 1 update": {"estimator": "trace", "num_iterations": 1},
}


def run_of(task: str, name: str, seed: int) -> Run:
    """The task's setting on the brink with the change of that name."""
    settings = COMMON | TASKS[task]
    if name == "a fifth of the learning rate":
        settings["learning_rate"] = TASKS[task]["learning_rate"] / 5
    elif name == "batch four times as large":
        settings["per_device_train_batch_size"] = 4 * TASKS[task]["per_device_train_batch_size"]
    if CHANGES[name].get("estimator") == "trace":
        # Two views of gsm8k's sixteen steps, all four of Sudoku's.
        settings["estimator_kwargs"] = {"shrink": {"gsm8k": 8, "sudoku": 1}[task]}
    key = "".join(letter if letter.isalnum() or letter == "." else "_" for letter in name)
    return Run(key, task, seed, settings | CHANGES[name], ROLLOUTS, points=(ROLLOUTS // 4, ROLLOUTS // 2))


def table(task: str, found: dict[str, list[dict]]) -> str:
    """Markdown: a row for each change."""
    start = accuracy(found["nothing changed"][0]["points"][0])
    quarter, half = ROLLOUTS // 4, ROLLOUTS // 2
    lines = [
        f"{task}: {start:.1%} before; mean [least, most] of {len(SEEDS)} seeds.\n",
        f"| changed | after {quarter} rollouts | after {half} | after {ROLLOUTS} | seeds that end below the start |",
        "|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        cells = [spread([accuracy(each["points"][index]) for each in runs]) for index in (1, 2, 3)]
        below = sum(accuracy(each["points"][-1]) < start for each in runs)
        lines.append(f"| {name} | {' | '.join(cells)} | {below} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    one_thread()
    folder = arguments.output_dir.resolve()
    tables = []
    for task in arguments.tasks:
        found = {
            name: results([run_of(task, name, seed) for seed in SEEDS], folder, arguments.workers) for name in CHANGES
        }
        tables.append(table(task, found))
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    main()
