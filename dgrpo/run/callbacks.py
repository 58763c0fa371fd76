"""What a run shows and writes while it trains: progress, a line of metrics, metrics.csv, held-out accuracy."""

import contextlib
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import transformers
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from huggingface_hub.utils import disable_progress_bars
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl.models import unwrap_model_for_generation

from dgrpo.evaluation.answers import Evaluation, as_in_training, evaluate, greedy
from dgrpo.evaluation.samples import coverage
from dgrpo.sampling import SamplerConfig
from dgrpo.tasks import Task
from dgrpo.trainers import DiffuGRPOTrainer

# Metric as it is logged, its name and format in the line that is printed, as many as fit. `equal`: groups of which all
# rewards are equal.
_SHOWN = {
    "reward": ("reward", "{:.3f}"),
    "rewards/format_reward/mean": ("reasons", "{:.0%}"),
    "completions/mean_length": ("length", "{:.1f}"),
    "frac_reward_zero_std": ("equal", "{:.0%}"),
    "kl": ("kl", "{:.3f}"),
    "clip_ratio/region_mean": ("clip", "{:.0%}"),
    "entropy": ("entropy", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
}


# How the held-out figure is written, by what the task measures.
FORMATS = {"accuracy": ".1%", "score": ".3f"}

# Logged at every update. A line stands for a rollout and shows their mean since the line before: at a rollout's first
# update the policy is still the one that sampled.
_OF_UPDATES = ("kl", "clip_ratio/region_mean", "entropy")


COLUMNS = 80


def metrics_line(step: int, max_steps: int, logs: dict[str, float]) -> str:
    """One readable line of what matters in `logs`, of at most 80 columns."""
    line = f"step {step:>{len(str(max_steps))}}/{max_steps}"
    for key, (name, form) in _SHOWN.items():
        if logs.get(key) is not None and len(longer := f"{line}  {name} {form.format(logs[key])}") <= COLUMNS:
            line = longer
    return line


def shows_bars() -> bool:
    """Whether progress bars are drawn: only where a person watches them."""
    with contextlib.suppress(AttributeError, ValueError):
        return sys.stdout.isatty()
    return False


def no_bars_without_a_terminal() -> None:
    """Turns the libraries' own progress bars off where standard output is a file or a pipe."""
    if not shows_bars():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        disable_progress_bars()


class CompletionsOnce(TrainerCallback):
    """Has TRL store completions when a rollout is logged, not again at each inner update on it."""

    def __init__(self, trainer: DiffuGRPOTrainer):
        self.trainer, self.wanted = trainer, trainer.log_completions

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.trainer.log_completions = self.wanted and not {"reward", "eval_reward"}.isdisjoint(logs or {})


class ProgressLine(ProgressCallback):
    """transformers' progress bar; a line of metrics for every rollout, and a completion now and then."""

    def __init__(self, trainer: DiffuGRPOTrainer, sample_every: int = 0):
        super().__init__()
        self.trainer, self.sample_every, self.rollouts = trainer, sample_every, 0
        self.of_updates: dict[str, list[float]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if shows_bars():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.training_bar is not None:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def write(self, text: str) -> None:
        (self.training_bar or tqdm).write(text)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        for name in _OF_UPDATES:
            # None where every row of the batch was skipped.
            if logs.get(name) is not None:
                self.of_updates.setdefault(name, []).append(logs[name])
        if "reward" not in logs:
            return
        means = {name: sum(values) / len(values) for name, values in self.of_updates.items()}
        self.of_updates = {}
        self.write(metrics_line(state.global_step, state.max_steps, logs | means))
        self.rollouts += 1
        if self.sample_every and self.rollouts % self.sample_every == 1 and self.trainer.logged_completions:
            prompt, completion, advantage = self.trainer.logged_completions[0]
            text = completion if isinstance(completion, str) else completion[0]["content"]
            question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            self.write(f"  {question[-200:]!r}\n  -> {text[:400]!r}  (advantage {advantage:+.2f})")


class MetricsFile(TrainerCallback):
    """Every logged metric as a row of metrics.csv; a resumed run continues from its checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        # From the checkpoint, not from the file, which may end before it or hold rows from after it.
        for row in state.log_history:
            self.add(row["step"], {name: value for name, value in row.items() if name != "step"})

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Adds `values` to the row of `step`."""
        if not self.rows or int(self.rows[-1]["step"]) != step:
            self.rows.append({"step": step})
        self.rows[-1].update(values)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            self.add(state.global_step, logs)
            if len(self.rows) % 10 == 0:
                self.flush()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.flush()

    on_train_end = on_save

    def flush(self) -> None:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.replace(self.path)


class HeldOutEvaluation(TrainerCallback):
    """Greedy accuracy, or mean score, on held-out rows before, after and every `every` updates; disturbs nothing."""

    def __init__(
        self,
        trainer: DiffuGRPOTrainer,
        task: Task,
        rows: Dataset,
        every: int,
        metrics: MetricsFile,
        keeps_best: bool = False,
        coverage_problems: int = 0,
        sampler: Literal["exact", "parallel", "training"] = "exact",
    ):
        self.trainer, self.task, self.rows, self.every, self.metrics = trainer, task, list(rows), every, metrics
        self.keeps_best, self.coverage_problems, self.sampler = keeps_best, coverage_problems, sampler
        # Set where the run is stopped before its end, which is not the time for a last measurement.
        self.interrupted: Callable[[], bool] = lambda: False
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None

    def _samplers(self) -> dict[str, SamplerConfig]:
        """The samplers at which coverage is measured: that of the rollouts, and the same without approximations."""
        config = self.trainer.sampler_config
        return {"exact": config.exact()} | ({"training sampler": config} if config.approximate else {})

    def measure(self, with_coverage: bool = False) -> Evaluation:
        trainer, accelerator, started = self.trainer, self.trainer.accelerator, time.perf_counter()
        plugin = accelerator.state.deepspeed_plugin
        partitioned = trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
        hidden = not (accelerator.is_main_process and shows_bars())
        bar = tqdm(total=len(self.rows), desc="held-out problems", leave=False, disable=hidden)
        with (
            bar,
            unwrap_model_for_generation(
                trainer.model_wrapped,
                accelerator,
                gather_deepspeed3_params=True,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,  # type: ignore[arg-type]  # parsed
            ) as model,
            # Equal within rounding in float32; partitioned weights cannot take an adapter in.
            nullcontext() if partitioned or trainer.args.bf16 else as_in_training(model),
        ):
            settings: dict[str, Any] = {
                "batch_size": trainer.args.per_device_eval_batch_size,
                "process_index": accelerator.process_index,
                "num_processes": accelerator.num_processes,
                # ZeRO-3's weights are gathered above; FSDP's stay partitioned, so all processes make the same passes.
                "any_rank": trainer.any_process if trainer.is_fsdp_enabled else bool,
                "template_settings": trainer.args.chat_template_kwargs,
            }
            asked = (model, trainer.processing_class)
            config = replace(trainer.sampler_config, temperature=0.0)
            if self.sampler != "training":
                config = greedy(config) if self.sampler == "exact" else replace(config, cache=None, cache_refresh=None)
            measure = self.task.measure
            found = evaluate(
                *asked, self.rows, self.task.grade, config, measure=measure, on_batch=bar.update, **settings
            )
            if with_coverage and self.coverage_problems:
                few = self.rows[: self.coverage_problems]
                found = replace(found, coverage=coverage(*asked, few, self.task.grade, self._samplers(), **settings))
        step = trainer.state.global_step
        logs = {f"eval_{measure}": found.figure, "eval_reasons": sum(found.reasons) / found.n}
        logs["time/evaluation"] = time.perf_counter() - started
        trainer.state.log_history.append({**logs, "step": step})
        if trainer.state.is_world_process_zero:
            self.metrics.add(step, logs)
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
                    tracker = cast(TrainerCallback, callback)
                    tracker.on_log(trainer.args, trainer.state, trainer.control, logs=dict(logs), model=trainer.model)
            figure, low, high = (f"{each:{FORMATS[measure]}}" for each in (found.figure, *found.interval))
            reason = f", {sum(found.reasons) / found.n:.0%} reason" if measure == "accuracy" else ""
            tqdm.write(f"held-out {measure} at step {step}: {figure} ({low} to {high}, n={found.n}){reason}")
        return found

    def on_train_begin(self, args, state, control, **kwargs):
        stored = self.metrics.path.with_name("evaluation_before.json")
        # A resumed run began where its first part did. Only the main process wrote that down, perhaps on its own disk.
        found = [None]
        if state.global_step and state.is_world_process_zero and stored.exists():
            found = [json.loads(stored.read_text())]
        broadcast_object_list(found)
        if found[0] is not None:
            self.before = Evaluation(**found[0])
            if self.before.n != len(self.rows):
                raise ValueError(
                    f"num_eval_problems={len(self.rows)}: the run that is resumed began with {self.before.n} held-out "
                    "problems; ask for as many."
                )
            return
        self.before = self.measure(with_coverage=True)
        if state.is_world_process_zero:
            stored.write_text(json.dumps(asdict(self.before)))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            # Not when training has ended: by then trackio has closed its run.
            self._measure_the_end()
        elif self.every and state.global_step % self.every == 0:
            self._keep_if_best(self.measure().figure)

    def on_train_end(self, args, state, control, **kwargs):
        if self.after is None and not self.interrupted():
            self._measure_the_end()

    def _measure_the_end(self) -> None:
        self.after = self.measure(with_coverage=True)
        if self.every:
            self._keep_if_best(self.after.figure)

    def _keep_if_best(self, figure: float) -> None:
        """Saves the weights as `best` where no earlier ones of this run, the untrained ones aside, answer as well."""
        state, name = self.trainer.state, f"eval_{self.task.measure}"
        known = [row[name] for row in state.log_history[:-1] if row["step"] and name in row]
        if self.keeps_best and figure > max(known, default=-math.inf):
            self.trainer.checkpoints.save_best({"step": state.global_step, name: figure})


def attach(trainer: DiffuGRPOTrainer, callbacks: Sequence[TrainerCallback]) -> None:
    """Puts callbacks on a trainer in place of transformers' own progress output."""
    for printed in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printed)
    for callback in [*callbacks, CompletionsOnce(trainer)]:
        trainer.add_callback(callback)
