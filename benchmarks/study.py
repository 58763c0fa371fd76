"""What the studies share: one training run with accuracy at equal rollouts and at equal CPU time, many of them, kept.

A run is a function of its settings and its seed; its result is a JSON file, and a run whose file exists is not run
again. Runs are forked from one process that has imported everything, so a start costs no CPU time to speak of.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

from dgrpo.evaluation.answers import evaluate, greedy
from dgrpo.run import build, parse_recipe
from dgrpo.tasks import TASKS
from dgrpo.trainers import DiffuGRPOTrainer

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """One training run: `settings` over the task's recipe, then measured at `rollouts` and at `cpu_seconds`."""

    name: str
    task: str
    seed: int
    settings: dict[str, Any]
    rollouts: int  # the run goes on until it has seen so many rollout batches ...
    cpu_seconds: float = 0.0  # ... and trained for so long, evaluations aside
    at_most: float = float("inf")  # but no longer than this
    points: Sequence[int] = ()  # more counts of rollouts at which it is evaluated
    preset: str | None = None
    estimator: Any = field(default=None, compare=False)

    @property
    def key(self) -> str:
        return f"{self.task}-{self.name}-{self.seed}"


class Measure(TrainerCallback):
    """Evaluates where the run asks for it, and ends the run; the evaluations' own time is not counted."""

    def __init__(self, run: Run, trainer: DiffuGRPOTrainer, rows: list[dict], sampler):
        self.run, self.trainer, self.rows, self.sampler = run, trainer, rows, sampler
        self.points: list[dict[str, Any]] = []
        self.spent = self.since = 0.0

    def measure(self, state) -> None:
        self.spent += time.process_time() - self.since
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        found = evaluate(
            model, trainer.processing_class, self.rows, TASKS[self.run.task].grade, self.sampler, batch_size=256
        )
        self.points.append(
            {
                "rollouts": state.global_step / trainer.num_iterations,
                "updates": state.global_step,
                "cpu_seconds": round(self.spent, 2),
                "correct": "".join("01"[mark] for mark in found.correct),
                "reasons": sum(found.reasons) / found.n,
            }
        )
        self.since = time.process_time()

    def on_train_begin(self, args, state, control, **kwargs):
        self.since = time.process_time()
        self.measure(state)

    def on_step_end(self, args, state, control, **kwargs):
        run, before = self.run, self.points[-1]["cpu_seconds"] if self.points else 0.0
        spent = self.spent + time.process_time() - self.since
        batches, rest = divmod(state.global_step, self.trainer.num_iterations)
        in_time = before < run.cpu_seconds <= spent and not any(point.get("in_time") for point in self.points)
        enough = batches >= run.rollouts
        if in_time or (rest == 0 and batches in {run.rollouts, *run.points}):
            self.measure(state)
            self.points[-1]["in_time"] = in_time
        if (enough and spent >= run.cpu_seconds) or spent > run.at_most:
            if self.points[-1]["updates"] != state.global_step:
                self.measure(state)
            control.should_training_stop = True


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Trains as the run says; its points, and per rollout the mean reward and what else is logged."""
    recipe_file = ROOT / "recipes" / f"{run.task}.yaml"
    original = yaml.safe_load(recipe_file.read_text())
    argv = ["--output_dir", str(folder / "scratch" / run.key), "--seed", str(run.seed), "--report_to", "none"]
    argv += ["--log_completions", "false", "--disable_tqdm", "true", "--lr_scheduler_type", "constant_with_warmup"]
    argv += ["--max_steps", "100000", "--config", str(recipe_file)]
    for name, value in run.settings.items():
        argv += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    if run.preset is not None:
        argv += ["--preset", str(ROOT / "recipes" / "presets" / f"{run.preset}.yaml")]
    recipe, args, model_config = parse_recipe(str(recipe_file), argv=argv)
    # The studies ask what a method does, not what a shortcut of the rollouts changes.
    for name in {"threshold", "cache"} - set(run.settings):
        setattr(args, name, None)
    trainer, held_out = build(TASKS[run.task], recipe, args, model_config, estimator=run.estimator)
    for printed in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printed)
    names = ("max_completion_length", "block_length", "diffusion_steps", "temperature")
    sampler = greedy(type(trainer.sampler_config)(**{name: original[name] for name in names}))
    measure = Measure(run, trainer, list(held_out), sampler)
    trainer.add_callback(measure)
    trainer.train()
    kept = {
        "reward": "reward",
        "no_spread": "frac_reward_zero_std",
        "distinct": "rollout/distinct_completions",
        "clipped": "clip_ratio/region_mean",
        "rollout_seconds": "time/rollout",
    }
    # The reward is logged once for each rollout, not at each of its updates.
    logs = [row for row in trainer.state.log_history if "reward" in row]
    return {
        "name": run.name,
        "task": run.task,
        "seed": run.seed,
        "settings": {"preset": run.preset, **run.settings},
        "points": measure.points,
        "logs": {name: [round(row.get(key, 0.0), 4) for row in logs] for name, key in kept.items()},
    }


def _child(run: Run, folder: Path) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        result = train(run, folder)
    file = folder / f"{run.key}.json"
    file.with_suffix(".tmp").write_text(json.dumps(result))
    file.with_suffix(".tmp").replace(file)


def results(runs: Sequence[Run], folder: Path, workers: int = 1) -> list[dict[str, Any]]:
    """The result of each run, trained now where there is none yet; a run that fails ends the study."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    waiting = [run for run in runs if not (folder / f"{run.key}.json").exists()]
    active: list[tuple[Run, Any]] = []
    while waiting or active:
        while waiting and len(active) < workers:
            run = waiting.pop(0)
            process = context.Process(target=_child, args=(run, folder))
            process.start()
            active.append((run, process))
        time.sleep(0.5)
        for run, process in [each for each in active if not each[1].is_alive()]:
            active.remove((run, process))
            process.join()
            if process.exitcode:
                raise RuntimeError(f"{run.key} failed; see {folder / 'log.txt'}.")
            print(f"{run.key}: {summary(json.loads((folder / f'{run.key}.json').read_text()))}", flush=True)
    return [json.loads((folder / f"{run.key}.json").read_text()) for run in runs]


def accuracy(point: dict[str, Any], part: slice = slice(None)) -> float:
    """The share of held-out problems that are right, of all or of a part of them."""
    marks = point["correct"][part]
    return marks.count("1") / len(marks)


def spread(values: list[float]) -> str:
    """Mean and range in per cent."""
    return f"{100 * mean(values):.1f} [{100 * min(values):.1f}, {100 * max(values):.1f}]" if values else "-"


def summary(result: dict[str, Any]) -> str:
    """Accuracy at each point of a run, in a line."""
    points = [(accuracy(point), point["rollouts"], point["cpu_seconds"]) for point in result["points"]]
    return ", ".join(f"{right:.1%} at {rollouts:.0f} ({seconds:.0f} s)" for right, rollouts, seconds in points)


def one_thread() -> None:
    """The settings of every study: one thread, no network, no warnings."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)
