"""The main job over seeds: three supervised checkpoints, three reinforcement-learning runs on each, as a table.

    python benchmarks/main_job.py --output_dir runs/main_job

    python benchmarks/main_job.py --embedded --seeds 0 1 2 3 4 5 6 7 8 9     # ten seeds of `make gsm8k`

Checkpoints are made by `dgrpo.tiny.build` where they are missing (6 to 15 minutes each on one shared core).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def table(summaries: list[tuple[str, dict]]) -> str:
    """Markdown: a row for each run, then the mean."""
    lines = [
        "| SFT seed | RL seed | before | after | ceiling | after / ceiling | reason before -> after | training, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    gains, shares = [], []
    for sft_seed, summary in summaries:
        before, after = summary["before"], summary["after"]
        ceiling = before["accuracy_where_it_reasons"]
        gains.append(after["accuracy"] - before["accuracy"])
        shares.append(after["accuracy"] / ceiling)
        lines.append(
            f"| {sft_seed} | {summary['seed']} | {before['accuracy']:.1%} | {after['accuracy']:.1%} | {ceiling:.1%} | "
            f"{shares[-1]:.1%} | {before['reasons']:.0%} -> {after['reasons']:.0%} | {summary['wall_seconds']:.0f} |"
        )
    mean_gain, mean_share = sum(gains) / len(gains), sum(shares) / len(shares)
    lines.append(
        f"\nMean gain {mean_gain:+.1%} (lowest {min(gains):+.1%}); mean share of the ceiling {mean_share:.1%} "
        f"(lowest {min(shares):.1%}); n={summaries[0][1]['before']['n']} held-out problems."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/main_job"))
    parser.add_argument("--sft_seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--embedded", action="store_true", help="start from the checkpoint that comes with the package"
    )
    arguments, more = parser.parse_known_args()
    folder = arguments.output_dir.resolve()
    summaries = []
    for sft_seed in ["embedded"] if arguments.embedded else arguments.sft_seeds:
        checkpoint = "embedded" if arguments.embedded else str(folder / f"sft_{sft_seed}")
        if not arguments.embedded and not (Path(checkpoint) / "model.safetensors").exists():
            build = [sys.executable, "-m", "dgrpo.tiny.build", "gsm8k"]
            run([*build, "--output_dir", checkpoint, "--seed", str(sft_seed)])
        for seed in arguments.seeds:
            output = folder / f"rl_{sft_seed}_{seed}"
            if not (output / "summary.json").exists():
                recipe = [sys.executable, "recipes/gsm8k.py", "--model_name_or_path", checkpoint]
                run([*recipe, "--seed", str(seed), "--output_dir", str(output), *more])
            summaries.append((str(sft_seed), json.loads((output / "summary.json").read_text())))
    print(table(summaries))


if __name__ == "__main__":
    main()
