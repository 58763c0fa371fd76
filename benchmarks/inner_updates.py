"""d1's claim on the embedded default: do randomly masked prompts allow more inner updates of one rollout?

    python benchmarks/inner_updates.py --output_dir runs/inner_updates

Accuracy after equal rollouts for mu = 1 to 12 updates of each, with the prompt left as it is and 15 % of it masked;
with a mask of its own for each update and one mask for all of them; and one prompt mask for a group against one for
each row. Three seeds each, constant learning rate. A table and a plot. Twenty CPU-minutes.
"""

from typing import Any

from study import one_thread, study_parser, words

from dgrpo.estimators import one_step
from dgrpo.noise import stream
from dgrpo.run.study import Budget, study

UPDATES = (1, 2, 4, 8, 12)
P_MASK = 0.15
SETTINGS = {
    "per_device_train_batch_size": 64,
    "log_kl": False,
    "learning_rate": 1e-3,
    "warmup_steps": 4,
    "num_eval_problems": 256,
}


def one_mask_for_all_updates(rollout, *, generator):
    """`one_step` whose mask is a function of the rollout, and so the same at each of its updates."""
    fixed = stream("one mask", str(rollout.completion_ids.tolist()))
    return one_step(rollout, generator=fixed, p_mask_prompt=P_MASK)


KINDS: dict[str, dict[str, Any]] = {
    "prompt shown": {"p_mask_prompt": 0.0},
    "15 % masked anew": {"p_mask_prompt": P_MASK},
    "15 % masked once": {"estimator": "inner_updates:one_mask_for_all_updates"},
    "15 % masked anew, each row": {"p_mask_prompt": P_MASK, "prompt_mask_scope": "row"},
}


def main() -> None:
    arguments = study_parser(__doc__, "inner_updates").parse_args()
    one_thread()
    variants = {}
    for kind, settings in KINDS.items():
        # d1's claim takes every number of updates; beside it two of them show whether the kind of mask matters.
        for mu in UPDATES if kind in ("prompt shown", "15 % masked anew") else (4, 12):
            variants[f"{kind}, mu = {mu}"] = words(settings | {"num_iterations": mu})
    budget, common = Budget(rollouts=(6, 12)), words(SETTINGS)
    folder, seeds, workers = arguments.output_dir, arguments.seeds, arguments.workers
    print("\n" + study("gsm8k", variants, budget, folder, seeds=seeds, common=common, workers=workers))


if __name__ == "__main__":
    main()
