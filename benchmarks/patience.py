"""Do the likelihood bounds learn when they are given time? Their presets on the embedded default, five times as long.

    python benchmarks/patience.py --output_dir runs/patience

`benchmarks/estimators.py` gives every preset 40 CPU seconds, in which those that score many views of each rollout
make few updates. Here they train for 200, `--seeds` of each at one learning rate. A table and a plot. Four
CPU-minutes a run.
"""

from study import one_thread, study_parser, words

from dgrpo.run.study import Budget, study

RATES = {"espo": 3e-4, "spg": 3e-4, "gdpo": 3e-4, "bgpo": 1e-3}
SETTINGS = {"per_device_train_batch_size": 64, "log_kl": False, "num_eval_problems": 256, "warmup_steps": 4}


def main() -> None:
    parser = study_parser(__doc__, "patience")
    parser.add_argument("--presets", nargs="+", choices=RATES, default=list(RATES))
    arguments = parser.parse_args()
    one_thread()
    variants = {name: ["--preset", name, *words({"learning_rate": RATES[name]})] for name in arguments.presets}
    budget, common = Budget(seconds=(40.0, 100.0, 200.0)), words(SETTINGS)
    folder, seeds, workers = arguments.output_dir, arguments.seeds, arguments.workers
    print("\n" + study("gsm8k", variants, budget, folder, seeds=seeds, common=common, workers=workers))


if __name__ == "__main__":
    main()
