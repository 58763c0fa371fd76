"""Every preset side by side on two tasks: accuracy after equal rollouts and after equal CPU seconds.

    python benchmarks/estimators.py --output_dir runs/estimators

For each preset the same three learning rates, one seed, over half of the budget; then three other seeds with the best
of them over all of it. The presets are those of `recipes/presets`, the rest is the task's recipe, with a constant
learning rate after four updates of warm-up. A table and a plot for each task. About two CPU-hours.
"""

from typing import Any

from study import ROOT, one_thread, study_parser, words

from dgrpo.run.study import Budget, study

PRESETS = tuple(sorted(file.stem for file in (ROOT / "recipes" / "presets").glob("*.yaml")))
COMMON = {"warmup_steps": 4, "num_eval_problems": 512}
# Methods with many views need long for their rollouts: after `at_most` seconds they are not waited for. gsm8k has half
# of the recipe's rollouts in a batch, so that a method with one update each makes a number of them; on Sudoku, where
# most groups teach nothing, a quarter of the recipe's taught no method anything (one sweep).
TASKS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "budget": Budget(seconds=(40.0,), rollouts=(12,), at_most=60.0),
        "learning_rates": (3e-4, 1e-3, 3e-3),
        "settings": {"per_device_train_batch_size": 64, "log_kl": False},
    },
    "sudoku": {
        "budget": Budget(seconds=(45.0,), rollouts=(6,), at_most=70.0),
        "learning_rates": (2.5e-5, 8e-5, 2.5e-4),
        "settings": {"per_device_train_batch_size": 512},
    },
}
# SPG's own setting for Sudoku. Four denoising steps are four views, which TraceRL's default would merge into one.
ONLY: dict[tuple[str, str], dict[str, Any]] = {
    ("sudoku", "spg"): {"objective_kwargs": {"eubo_beta": 1.0, "eubo_weight": 0.5}},
    ("sudoku", "tracerl"): {"estimator_kwargs": {"shrink": 1}},
}


def main() -> None:
    parser = study_parser(__doc__, "estimators")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    arguments = parser.parse_args()
    one_thread()
    for task in arguments.tasks:
        setting = TASKS[task]
        table = study(
            task,
            {name: ["--preset", name, *words(ONLY.get((task, name), {}))] for name in arguments.presets},
            setting["budget"],
            arguments.output_dir,
            seeds=arguments.seeds,
            common=words(COMMON | setting["settings"]),
            learning_rates=setting["learning_rates"],
            workers=arguments.workers,
        )
        print("\n" + table)


if __name__ == "__main__":
    main()
