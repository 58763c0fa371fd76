"""A comparison of methods: many short runs, each measured after the same rollouts or the same time; kept and resumed.

A run is a function of its settings and its seed. Its result is a JSON file, and a run whose file exists is not made
again. Runs are forked from one process that has imported everything, so that a start costs little.
"""

import json
import math
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging
from trl import ModelConfig

from dgrpo.cli import RECIPES, found_files
from dgrpo.evaluation.answers import as_in_training, evaluate, greedy
from dgrpo.report.metrics import FIGURES
from dgrpo.report.study import study_plot, study_table
from dgrpo.run.own_data import OwnDataRecipeConfig, recipe_task
from dgrpo.run.settings import RecipeConfig, parse_recipe
from dgrpo.run.steps import build
from dgrpo.tasks import TASKS, Task
from dgrpo.trainers import DiffuGRPOConfig

# None of the seeds that are compared: the learning rate is not chosen on the runs that it is judged by.
SWEEP_SEED = 100
# Of every run, unless the study says otherwise. The schedule cannot know when a budget of seconds is spent.
DEFAULTS = {
    "max_steps": "1000000",
    "lr_scheduler_type": "constant_with_warmup",
    "report_to": "none",
    "save_strategy": "no",
    "log_completions": "false",
    "disable_tqdm": "true",
}
# A study asks what a method does, not what these approximations of the rollouts change.
EXACT = ("threshold", "cache")


@dataclass(frozen=True)
class Budget:
    """When a run is measured; it ends with the last of these.

    Args:
        seconds: of training, evaluations aside; of the process's CPU time where the model is on a CPU.
        rollouts: batches of rollouts.
        at_most: seconds after which rollouts are not waited for.
    """

    seconds: tuple[float, ...] = ()
    rollouts: tuple[int, ...] = ()
    at_most: float = math.inf

    def __post_init__(self):
        if not self.seconds and not self.rollouts:
            raise ValueError("seconds, rollouts: give at least one of them; a run has to end.")

    def half(self) -> "Budget":
        """Half of the whole, measured at its end."""
        seconds, rollouts = max(self.seconds, default=0.0) / 2, max(self.rollouts, default=0) // 2
        return Budget((seconds,) * bool(seconds), (max(1, rollouts),) * bool(self.rollouts), self.at_most / 2)


@dataclass(frozen=True)
class Run:
    """One run: settings as words of a command line, those of the whole study and, over them, its own."""

    task: str
    name: str
    seed: int
    budget: Budget
    common: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in self.name)
        return f"{self.task}-{name}-{self.seed}"

    def parse(self, *words: str) -> tuple[Any, DiffuGRPOConfig, ModelConfig]:
        """The settings of the whole study with these over them."""
        words = (*self.common, *words)
        asked = {word.partition("=")[0] for word in words}
        given = [f"--{name}={value}" for name, value in DEFAULTS.items() if f"--{name}" not in asked]
        given += [f"--{name}=none" for name in EXACT if f"--{name}" not in asked]
        recipe_type = RecipeConfig if self.task in TASKS else OwnDataRecipeConfig
        argv = [*given, *found_files(list(words)), "--seed", str(self.seed)]
        return parse_recipe(str(RECIPES / f"{self.task}.py"), recipe_type, DiffuGRPOConfig, ModelConfig, argv=argv)


class Measure(TrainerCallback):
    """Evaluates where the budget says so, and ends the run; the evaluations' own time is not counted."""

    def __init__(self, run: Run, trainer: Any, task: Task, rows: list[dict], sampler: Any):
        self.budget, self.trainer, self.task, self.rows, self.sampler = run.budget, trainer, task, rows, sampler
        self.points: list[dict[str, Any]] = []
        self.clock = time.process_time if trainer.args.device.type == "cpu" else time.perf_counter
        self.spent = self.since = 0.0

    def _measure(self, step: int, after: list[str]) -> None:
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        with as_in_training(model):
            found = evaluate(
                model,
                trainer.processing_class,
                self.rows,
                self.task.grade,
                self.sampler,
                measure=self.task.measure,
                batch_size=trainer.args.per_device_eval_batch_size,
                template_settings=trainer.args.chat_template_kwargs,
            )
        self.points.append(
            {
                "after": after,
                "rollouts": step / trainer.num_iterations,
                "updates": step,
                "seconds": round(self.spent, 2),
                found.measure: found.figure,
                "reasons": sum(found.reasons) / found.n,
            }
        )

    def on_train_begin(self, args, state, control, **kwargs):
        self._measure(state.global_step, [])
        self.since = self.clock()

    def on_step_end(self, args, state, control, **kwargs):
        before, now = self.spent, self.clock()
        self.spent += now - self.since
        batches, rest = divmod(state.global_step, self.trainer.num_iterations)
        after = [f"{each:g} s" for each in self.budget.seconds if before < each <= self.spent]
        after += [f"{each} rollouts" for each in self.budget.rollouts if rest == 0 and each == batches]
        in_time = self.spent >= max(self.budget.seconds, default=0)
        done = (in_time and batches >= max(self.budget.rollouts, default=0)) or self.spent > self.budget.at_most
        done |= state.global_step >= state.max_steps
        if after or done:
            self._measure(state.global_step, after)
        control.should_training_stop |= done
        self.since = self.clock()


def train(run: Run) -> dict[str, Any]:
    """The run's points: held-out figure, rollouts, updates and seconds; and what was logged for each rollout."""
    recipe, args, model_config = run.parse(*run.words)
    # Everything is measured by one sampler, whatever the rollouts of a variant are drawn with.
    sampler = greedy(run.parse()[1].sampler())
    task = TASKS[run.task] if run.task in TASKS else recipe_task(recipe, args)
    with tempfile.TemporaryDirectory() as scratch:
        args.output_dir = scratch
        trainer, held_out = build(task, recipe, args, model_config)
        for printed in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(printed)
        measure = Measure(run, trainer, task, list(held_out), sampler)
        trainer.add_callback(measure)
        trainer.train()
    names = ("reward", "frac_reward_zero_std", "rollout/distinct_completions", "time/rollout")
    # The reward is logged once for each rollout, not at each of its updates.
    logs = [row for row in trainer.state.log_history if "reward" in row]
    kept = {name: [round(row.get(name, 0.0), 4) for row in logs] for name in names}
    return {"measure": task.measure, "n": len(measure.rows), "points": measure.points, "logs": kept}


def _child(run: Run, folder: Path) -> None:
    # A fork leaves torch's thread pool to be made anew by the first who needs it; two threads at once would fail.
    torch.set_num_threads(torch.get_num_threads())
    logging.set_verbosity_error()
    file = folder / f"{run.key}.json"
    with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            result = train(run)
        except ValueError as error:
            traceback.print_exc()
            file.with_suffix(".error").write_text(str(error))
            raise SystemExit(1) from error
    file.with_suffix(".tmp").write_text(json.dumps({"run": asdict(run), **result}))
    file.with_suffix(".tmp").replace(file)


def _kept(run: Run, folder: Path) -> dict[str, Any] | None:
    """The result of an earlier time; ValueError where it is that of other settings."""
    file = folder / f"{run.key}.json"
    if not file.exists():
        return None
    result = json.loads(file.read_text())
    if result["run"] != json.loads(json.dumps(asdict(run))):
        raise ValueError(f"output_dir={str(folder)!r}: {file.name} is of other settings; choose another folder.")
    return result


def results(runs: Sequence[Run], folder: Path, workers: int = 1) -> list[dict[str, Any]]:
    """The result of each run, made now where there is none yet; a run that fails ends the study."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    waiting = [run for run in runs if _kept(run, folder) is None]
    active: list[tuple[Run, Any]] = []
    while waiting or active:
        while waiting and len(active) < workers:
            run = waiting.pop(0)
            (folder / f"{run.key}.error").unlink(missing_ok=True)
            process = context.Process(target=_child, args=(run, folder))
            process.start()
            active.append((run, process))
        time.sleep(0.1)
        for run, process in [each for each in active if not each[1].is_alive()]:
            active.remove((run, process))
            process.join()
            if process.exitcode:
                error = folder / f"{run.key}.error"
                reason = error.read_text() if error.exists() else f"it ended with {process.exitcode}"
                for _, other in active:
                    other.terminate()
                raise ValueError(f"{run.key}: {reason} See {folder / 'log.txt'}.")
            print(f"{run.key}: {_line(_kept(run, folder) or {})}", flush=True)
    return [_kept(run, folder) or {} for run in runs]


def _line(result: dict[str, Any]) -> str:
    """A run's held-out figures, in a line."""
    unit = FIGURES[result["measure"]]
    shown = [(unit.number(point[result["measure"]]) + unit.sign, point) for point in result["points"]]
    return ", ".join(f"{figure} at {point['rollouts']:.0f} ({point['seconds']:.0f} s)" for figure, point in shown)


def _at_best_rates(
    variants: Mapping[str, Run], rates: Sequence[float], folder: Path, workers: int
) -> Iterator[tuple[str, Run, dict[float, float]]]:
    """Each variant at the learning rate that ends best over half of the budget, and what all of them came to."""
    for name, run in variants.items():
        at = {rate: replace(run, words=(*run.words, "--learning_rate", f"{rate:g}")) for rate in rates}
        tried = [
            replace(each, name=f"{name}-{rate:g}", seed=SWEEP_SEED, budget=run.budget.half())
            for rate, each in at.items()
        ]
        found = results(tried, folder / "sweep", workers)
        # With two budgets, the mean of both.
        ends = {rate: fmean(p[r["measure"]] for p in r["points"][1:]) for rate, r in zip(at, found, strict=True)}
        best = max(ends, key=ends.__getitem__)
        yield name, replace(at[best], name=f"{name}-{best:g}"), ends


def study(
    task: str,
    variants: Mapping[str, Sequence[str]],
    budget: Budget,
    folder: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    common: Sequence[str] = (),
    learning_rates: Sequence[float] = (),
    workers: int = 1,
) -> str:
    """Trains each variant with each seed and writes `TASK.md` and `TASK.png` into the folder.

    Args:
        task: of `dgrpo train`; "grpo" with the rows and columns of one's own in `common`.
        variants: settings, as words of a command line, by the name under which they are compared.
        budget: when the runs are measured, and when they end.
        folder: where results are kept; the same command continues there.
        common: settings of all runs. Held-out problems are answered greedily by the sampler that these describe.
        learning_rates: each variant first tries all of them over half of the budget, with one seed that is not one of
            `seeds`, and takes the one that ends best. None: its own.
        workers: runs at a time.

    Returns:
        The table, in Markdown.

    Raises:
        ValueError: settings that cannot be trained, or results of other settings in the folder.
    """
    runs = {name: Run(task, name, seeds[0], budget, tuple(common), tuple(words)) for name, words in variants.items()}
    for run in runs.values():
        run.parse(*run.words)
    sweeps: dict[str, dict[float, float]] = {}
    if learning_rates:
        for name, run, ends in _at_best_rates(dict(runs), learning_rates, folder, workers):
            runs[name], sweeps[name] = run, ends
    found = {name: results([replace(run, seed=seed) for seed in seeds], folder, workers) for name, run in runs.items()}
    table = study_table(task, found, sweeps)
    (folder / f"{task}.md").write_text(table + "\n")
    study_plot(folder / f"{task}.png", task, found)
    return table
