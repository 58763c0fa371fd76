"""Does reinforcement learning improve the skill itself? Sudoku over seeds, against one-step and more supervised steps.

    python benchmarks/sudoku.py --output_dir runs/sudoku_study

From one supervised checkpoint: `recipes/sudoku.py` as it is (the trace estimator) and with the one-step estimator, and
supervised fine-tuning on the same training grids for as many CPU-seconds as the trace runs took on average. Solved
held-out grids, greedy, at the recipe's number of denoising steps and at one token a step. Minutes for each run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

from dgrpo import MaskedSFTConfig, MaskedSFTTrainer, SamplerConfig, load_model
from dgrpo.evaluation.answers import evaluate
from dgrpo.run.steps import CHECKPOINTS
from dgrpo.tasks import load_rows, sudoku
from dgrpo.tiny.sudoku import sft_examples

ROOT = Path(__file__).parents[1]
SETTINGS = yaml.safe_load((ROOT / "recipes" / "sudoku.yaml").read_text())
CANVAS = SETTINGS["max_completion_length"]
BASE = CHECKPOINTS / "sudoku"
RUNS: dict[str, list[str]] = {"trace": [], "one_step": ["--estimator", "one_step"]}


def reinforce(estimator: str, seed: int, output: Path, more: list[str]) -> float:
    """One run of the recipe; its CPU-seconds, evaluations included."""
    if not (output / "summary.json").exists():
        recipe = [sys.executable, "recipes/sudoku.py", "--seed", str(seed), "--output_dir", str(output)]
        command = [*recipe, "--report_to", "none", *RUNS[estimator], *more]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads((output / "summary.json").read_text())["cpu_seconds"]


class StopAfter(TrainerCallback):
    """Lowers the learning rate to 0 over a budget of CPU-seconds, whatever a step takes, and then stops."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        left = 1 - (time.process_time() - self.started) / self.seconds
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * max(left, 0.0)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = time.process_time() - self.started > self.seconds


def fine_tune(seconds: float, seed: int, output: Path) -> tuple[int, float]:
    """Supervised steps from the same checkpoint within `seconds` of CPU time; how many, and the time they took."""
    note = output / "steps.json"
    if not note.exists():
        model, tokenizer = load_model(str(BASE))
        most = int(seconds * 50)
        args = MaskedSFTConfig(
            output_dir=str(output), per_device_train_batch_size=64, max_steps=most, learning_rate=1e-3,
            lr_scheduler_type="constant", completion_canvas=CANVAS, seed=seed, save_strategy="no", report_to="none",
            use_cpu=True, disable_tqdm=True, logging_steps=100,
        )  # fmt: skip
        # Other rows than the checkpoint was made of: the seed differs from the one of `dgrpo.tiny.build`.
        rows = Dataset.from_list(sft_examples(25600, 1000 + seed))
        trainer = MaskedSFTTrainer(model, args, rows, processing_class=tokenizer, callbacks=[StopAfter(seconds)])
        started = time.process_time()
        trainer.train()
        spent = time.process_time() - started
        trainer.save_model()
        note.write_text(json.dumps([trainer.state.global_step, spent]))
    steps, spent = json.loads(note.read_text())
    return steps, spent


def solved(checkpoint: Path, rows: list[dict[str, Any]]) -> list[float]:
    """The share of solved held-out grids, greedy: at the recipe's denoising steps, and at one token a step."""
    model, tokenizer = load_model(str(checkpoint))
    shares = []
    for steps in (SETTINGS["diffusion_steps"], CANVAS):
        found = evaluate(model, tokenizer, rows, sudoku.TASK.grade, SamplerConfig(CANVAS, CANVAS, steps))
        shares.append(found.accuracy)
    return shares


def table(base: list[float], results: list[tuple[str, int, list[float], float]], num_rows: int) -> str:
    """Markdown: a row for each run, the gain in points in brackets."""
    lines = [
        f"| run | seed | {SETTINGS['diffusion_steps']} steps | {CANVAS} steps | CPU-s |",
        "|---|---|---|---|---|",
        f"| checkpoint | | {base[0]:.1%} | {base[1]:.1%} | |",
    ]
    for name, seed, shares, seconds in results:
        cells = " | ".join(
            f"{share:.1%} ({100 * (share - old):+.1f})" for share, old in zip(shares, base, strict=True)
        )
        lines.append(f"| {name} | {seed} | {cells} | {seconds:.0f} |")
    return "\n".join([*lines, f"\nn={num_rows} held-out puzzles on 48 solutions that no training puzzle has."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sudoku_study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments, more = parser.parse_known_args()
    folder = arguments.output_dir.resolve()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    _, held_out = load_rows(sudoku.TASK, "embedded", num_held_out=SETTINGS["num_eval_problems"], instruction="")
    rows = list(held_out)
    results = []
    for estimator in RUNS:
        for seed in arguments.seeds:
            output = folder / f"{estimator}_{seed}"
            seconds = reinforce(estimator, seed, output, more)
            results.append((estimator, seed, solved(output, rows), seconds))
    budget = sum(seconds for name, _, _, seconds in results if name == "trace") / len(arguments.seeds)
    for seed in arguments.seeds:
        output = folder / f"sft_{seed}"
        steps, seconds = fine_tune(budget, seed, output)
        results.append((f"{steps} supervised steps", seed, solved(output, rows), seconds))
    print(table(solved(BASE, rows), results, len(rows)))


if __name__ == "__main__":
    main()
