"""A run folder as training writes it, made up: reward and accuracy rise, some rewarded completions lack the format."""

import csv
import json
import math
import random
from pathlib import Path

import pandas as pd

INSTRUCTIONS = (
    "Respond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n<answer>\n...\n</answer>\n\n"
)
HACKED = "<answer>\n{answer}\n</answer> because I looked it up"


def completion_of(answer: int, right: bool, formatted: bool, words: int) -> str:
    said = answer if right else answer + 1
    if not formatted:
        return HACKED.format(answer=said)
    steps = " ".join(f"step {k}: {answer} - {k} = {answer - k};" for k in range(words // 6))
    return f"<reasoning>\n{steps}\n</reasoning>\n<answer>\n{said}\n</answer>\n"


def fabricate_run(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 40,
    rows: int = 16,
    words: int = 30,
    prompts: int = 20,
    beta: float = 0.04,
) -> Path:
    """Write a whole run folder; `rows` completions at each step, of two prompts, about `words` words long."""
    rng = random.Random(seed)
    (folder / "completions").mkdir(parents=True)
    metrics = []
    for step in range(1, steps + 1):
        skill = 0.45 + 0.45 / (1 + math.exp(-8 * (step / steps - 0.35))) + rng.gauss(0, 0.03)
        skill = min(max(skill, 0.0), 1.0)
        table = []
        for row in range(rows):
            which = (step * 2 + row // (rows // 2)) % prompts
            right, formatted = rng.random() < skill, rng.random() < skill
            question = (
                INSTRUCTIONS
                + f"Problem {which}: a <b>farmer</b> has {which + 20} hens & sells {which}. How many are left?"
            )
            reward = {"correctness_reward": float(right), "format_reward": float(formatted)}
            text = completion_of(which, right, formatted, words)
            table.append(
                {
                    "step": step,
                    "prompt": [{"role": "user", "content": question}],
                    "completion": [{"role": "assistant", "content": text}],
                    **reward,
                    "advantage": sum(reward.values()) - 2 * skill,
                }
            )
        frame = pd.DataFrame(table)
        frame.to_parquet(folder / "completions" / f"completions_{step:05d}.parquet")
        correct, formatted = frame["correctness_reward"].mean(), frame["format_reward"].mean()
        metrics.append(
            {
                "step": step,
                "reward": correct + formatted,
                "reward_std": 0.4,
                "rewards/correctness_reward/mean": correct,
                "rewards/format_reward/mean": formatted,
                "time/evaluation": 3.0 if step % (steps // 4) == 0 else "",
                "eval_accuracy": skill if step % (steps // 4) == 0 else "",
                "kl": 0.002 * step * rng.uniform(0.8, 1.2),
                "entropy": 1.2 - 0.6 * step / steps + rng.gauss(0, 0.02),
                "clip_ratio/region_mean": 0.03 * rng.random() if step % 4 else 0.0,
                "clip_ratio/low_mean": 0.01 * rng.random() if step % 4 else 0.0,
                "clip_ratio/high_mean": 0.02 * rng.random() if step % 4 else 0.0,
                "completions/mean_length": 90 + 60 * skill + rng.gauss(0, 4),
                "frac_reward_zero_std": min(1.0, max(0.0, skill - 0.4 + rng.gauss(0, 0.05))),
                "time/rollout": 6.1 * rng.uniform(0.9, 1.3) if step % 4 == 1 else "",
                "time/rewards": 0.08 if step % 4 == 1 else "",
                "time/scoring": 1.4 * rng.uniform(0.9, 1.1) if step % 4 == 1 else "",
                "time/update": 2.3 * rng.uniform(0.9, 1.1),
                "tokens_per_second": 640 * rng.uniform(0.85, 1.05) if step % 4 == 1 else "",
                "grad_norm": rng.lognormvariate(-1, 0.5),
                "learning_rate": 1e-4 * (1 - step / (steps + 1)),
                "loss": rng.gauss(0, 0.02),
            }
        )
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(metrics[0]))
        writer.writeheader()
        writer.writerows(metrics)
    summary = {
        "task": "gsm8k",
        "model": "tiny-llada",
        "seed": seed,
        "before": {"accuracy": 0.45 + seed / 100, "n": 512, "interval": [0.407, 0.493]},
        "after": {"accuracy": 0.89 - seed / 100, "n": 512, "interval": [0.86, 0.914]},
        "flips": {"gained": 240, "lost": 15},
        "steps": steps,
        "wall_seconds": 147.2 + seed,
        "cpu_seconds": 251.8,
        "num_processes": 1,
        "distributed_type": "NO",
        "versions": {"dgrpo": "0.1.0", "torch": "2.13.0", "trl": "1.16.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(
        "model_name_or_path: tiny-llada\ndataset: embedded\n"
        f"reward_funcs: [correctness_reward, format_reward]\nbeta: {beta}\n"
        f"seed: {seed}\noutput_dir: {folder}\nlearning_rate: 0.0001\nlora:\n  r: 16\n"
    )
    samples = [
        {
            "prompt": f"A farmer has {k + 20} hens & sells {k}. How many are left?",
            "gold": "20",
            "before": HACKED.format(answer=19),
            "after": completion_of(20, True, True, words),
            "before_right": k == 0,
            "after_right": True,
        }
        for k in range(6)
    ]
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder
