"""What makes a run collapse: from a setting that does, one thing changed at a time.

    python benchmarks/collapse.py --output_dir runs/collapse

Both embedded tasks, with a learning rate a few times too high and none of the usual brakes: no warm-up, no KL, small
batches. Every change keeps that rate but the one that lowers it. Three seeds; a table for each task: accuracy on the
way and how many seeds end below their start. Forty CPU-minutes.
"""

from typing import Any

from study import one_thread, study_parser, words

from dgrpo.run.study import Budget, study

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


def variant(task: str, name: str) -> list[str]:
    """The change of that name to the task's setting on the brink."""
    settings = dict(CHANGES[name])
    if name == "a fifth of the learning rate":
        settings["learning_rate"] = TASKS[task]["learning_rate"] / 5
    elif name == "batch four times as large":
        settings["per_device_train_batch_size"] = 4 * TASKS[task]["per_device_train_batch_size"]
    if settings.get("estimator") == "trace":
        # Two views of gsm8k's sixteen steps, all four of Sudoku's.
        settings["estimator_kwargs"] = {"shrink": {"gsm8k": 8, "sudoku": 1}[task]}
    return words(settings)


def main() -> None:
    parser = study_parser(__doc__, "collapse")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    one_thread()
    for task in arguments.tasks:
        variants = {name: variant(task, name) for name in CHANGES}
        common = words(COMMON | TASKS[task])
        budget = Budget(rollouts=(4, 8, 16))
        folder, seeds, workers = arguments.output_dir, arguments.seeds, arguments.workers
        print("\n" + study(task, variants, budget, folder, seeds=seeds, common=common, workers=workers))


if __name__ == "__main__":
    main()
