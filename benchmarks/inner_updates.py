"""d1's claim on the embedded default: do randomly masked prompts allow more inner updates of one rollout?

    python benchmarks/inner_updates.py --output_dir runs/inner_updates

Accuracy after equal rollouts for mu = 1 to 12 updates of each, with the prompt left as it is and 15 % of it masked;
with a mask of its own for each update and one mask for all of them; and one prompt mask for a group against one for
each row. Three seeds each, constant learning rate. A table and `inner_updates.png`. Twenty CPU-minutes.
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from study import Run, accuracy, one_thread, results, spread

from dgrpo.estimators import one_step
from dgrpo.noise import stream
from dgrpo.report.curves import COLOURS, INK, MUTED, dress

UPDATES = (1, 2, 4, 8, 12)
SEEDS = (0, 1, 2)
ROLLOUTS = 12
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
    "15 % masked once": {},
    "15 % masked anew, each row": {"p_mask_prompt": P_MASK, "prompt_mask_scope": "row"},
}


def run_of(kind: str, num_updates: int, seed: int) -> Run:
    settings = SETTINGS | KINDS[kind] | {"num_iterations": num_updates}
    name = f"{kind.replace(' ', '_').replace('%', 'percent').replace(',', '')}-{num_updates}"
    estimator = one_mask_for_all_updates if kind == "15 % masked once" else None
    return Run(name, "gsm8k", seed, settings, ROLLOUTS, points=(ROLLOUTS // 2,), estimator=estimator)


def table(found: dict[str, dict[int, list[dict]]]) -> str:
    """Markdown: a row for each kind of mask and budget, a column for each number of updates."""
    start = accuracy(found["prompt shown"][UPDATES[0]][0]["points"][0])
    lines = [
        f"{start:.1%} before; mean [least, most] of {len(SEEDS)} seeds.\n",
        f"| prompt | after | {' | '.join(f'mu = {mu}' for mu in UPDATES)} |",
        "|---|---|" + "---|" * len(UPDATES),
    ]
    for index, budget in ((1, f"{ROLLOUTS // 2} rollouts"), (2, f"{ROLLOUTS} rollouts")):
        for kind, runs in found.items():
            cells = [
                spread([accuracy(each["points"][index]) for each in runs[mu]]) if mu in runs else "" for mu in UPDATES
            ]
            lines.append(f"| {kind} | {budget} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, found: dict[str, dict[int, list[dict]]]) -> None:
    """Accuracy against mu after half and all of the rollouts: a line for each kind of mask, its range beside it."""
    figure = Figure(figsize=(10.4, 4.2), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, index in zip(axes, (1, 2), strict=True):
        for number, (kind, runs) in enumerate(found.items()):
            places = [UPDATES.index(mu) + 0.08 * (number - 1.5) for mu in runs]
            values = [[100 * accuracy(each["points"][index]) for each in each_mu] for each_mu in runs.values()]
            axis.plot(places, [mean(each) for each in values], "o-", color=COLOURS[number], label=kind, markersize=5)
            axis.vlines(places, [min(v) for v in values], [max(v) for v in values], color=COLOURS[number], alpha=0.4)
        axis.axhline(100 * accuracy(runs[min(runs)][0]["points"][0]), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axis.set_xticks(range(len(UPDATES)), [str(mu) for mu in UPDATES])
        dress(axis, f"after {ROLLOUTS * index // 2} rollout batches")
        axis.set_xlabel("updates of each rollout (mu); dashed: before", fontsize=9, color=MUTED, loc="right")
    axes[0].set_ylabel("held-out problems right, %", fontsize=9, color=MUTED)
    axes[0].legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right", bbox_to_anchor=(1, 0.06))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/inner_updates"))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    one_thread()
    folder = arguments.output_dir.resolve()
    found: dict[str, dict[int, list[dict]]] = {}
    for kind in KINDS:
        # d1's claim takes every number of updates; beside it two of them show whether the kind of mask matters.
        chosen = UPDATES if kind in ("prompt shown", "15 % masked anew") else (4, 12)
        found[kind] = {
            mu: results([run_of(kind, mu, seed) for seed in SEEDS], folder, arguments.workers) for mu in chosen
        }
    draw(folder / "inner_updates.png", found)
    print("\n" + table(found))


if __name__ == "__main__":
    main()
