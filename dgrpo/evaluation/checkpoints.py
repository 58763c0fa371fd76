"""Checkpoints on a task, at several generation lengths: which ones, what they answer, and what is written of it."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from dgrpo.evaluation.answers import Answer, Evaluation, answer_rows, as_in_training
from dgrpo.evaluation.d1 import D1
from dgrpo.evaluation.files import FinishedRows, d1_items, digest, fingerprint, write_generations
from dgrpo.evaluation.results import Result
from dgrpo.evaluation.samples import by_problem, check_selection, pass_scores, powers_up_to, selection_scores
from dgrpo.evaluation.stored import grade
from dgrpo.models import load_model
from dgrpo.models.loading import adapter_settings
from dgrpo.sampling import SamplerConfig
from dgrpo.tasks import Task

# What --adapter says for the model as it is, beside its adapters.
NO_ADAPTER = "none"


@dataclass(frozen=True)
class Checkpoint:
    """A model, perhaps with an adapter on it, and what it is called in tables."""

    label: str
    model: str
    adapter: str | None = None


def checkpoints(models: Sequence[str], adapters: Sequence[str], embedded: Path) -> list[Checkpoint]:
    """The models, or the adapters on the one model: the given one, else the one that each was trained on.

    The adapter "none" is the model as it is, in tables "base". Without a model the embedded checkpoint is meant.
    """
    if len(models) > 1 and adapters:
        raise ValueError(f"model={list(models)}: adapters go on one model; evaluate the models by themselves.")
    pairs: list[tuple[str, str | None]] = [(model, None) for model in models or ([] if adapters else [str(embedded)])]
    if adapters:
        pairs = []
        for adapter in adapters:
            if adapter == NO_ADAPTER:
                pairs.append((models[0] if models else str(embedded), None))
            else:
                pairs.append((models[0] if models else _base_of(adapter, embedded), adapter))
    names = labels([adapter or ("base" if adapters else model) for model, adapter in pairs])
    return [Checkpoint(name, *pair) for name, pair in zip(names, pairs, strict=True)]


def _base_of(adapter: str, embedded: Path) -> str:
    """The model that an adapter was trained on; the embedded one is known by its folder, wherever it was installed."""
    base = adapter_settings(adapter).base_model_name_or_path
    return str(embedded) if not base or Path(base).parts[-3:] == embedded.parts[-3:] else base


def labels(paths: Sequence[str]) -> list[str]:
    """A short name for each path: as many of its last parts as tell it from the others, joined by `-`."""
    parts = [[part for part in Path(path).parts if part != "/"] for path in paths]
    for size in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-size:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"model, adapter: {sorted(paths)} name the same checkpoint twice.")


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    task: Task,
    rows: Sequence[dict[str, Any]],
    configs: Sequence[SamplerConfig],
    folder: Path,
    state: PartialState,
    *,
    dtype: str,
    batch_size: int,
    seed: int = 0,
    resume: bool = False,
    template_settings: dict[str, Any] | None = None,
    num_samples: int = 1,
    select: Sequence[str] = (),
    on_start: Callable[[str, int, int], Callable[[int], None]],
) -> list[Result]:
    """Accuracy of a checkpoint under each sampler, by every protocol that the task has; its texts are in `folder`.

    With `num_samples` above 1 each problem is answered so often: pass@k, and the accuracy of the samples that `select`
    chooses (`majority`, `best`). All processes return the same. `on_start` is told the name of each set, its rows and
    how many of them are there already, and returns what is told of each further batch.
    """
    check_selection(task, select)
    drawn = list(rows) * num_samples
    model, tokenizer = load_model(checkpoint.model, dtype, adapter=checkpoint.adapter)
    model.to(state.device)
    results = []
    for config in configs:
        name = f"{task.name}_{config.max_completion_length}_{config.diffusion_steps}"
        settings = {
            "model": checkpoint.model,
            "adapter": checkpoint.adapter,
            "weights": [fingerprint(path) for path in (checkpoint.model, checkpoint.adapter) if path],
            "dtype": dtype,
            "task": task.name,
            "rows": digest(list(rows)),
            "sampler": asdict(config),
            "seed": seed,
            "template_settings": template_settings,
        } | ({"num_samples": num_samples} if num_samples > 1 else {})
        finished = FinishedRows(folder / name, settings, state, resume=resume)
        with as_in_training(model):
            answers = answer_rows(
                model,
                tokenizer,
                drawn,
                task.grade,
                config,
                batch_size=batch_size,
                seed=seed,
                process_index=state.process_index,
                num_processes=state.num_processes,
                on_batch=on_start(name, len(drawn), len(finished.answers)),
                finished=finished,
                template_settings=template_settings,
            )
        found = Evaluation.of(answers, state.num_processes, task.measure)
        items = d1_items(task, drawn, answers, tokenizer.eos_token)
        if state.is_main_process:
            about = {
                "model_path": checkpoint.model,
                "checkpoint_path": checkpoint.adapter or "",
                "gen_length": config.max_completion_length,
                "diffusion_steps": config.diffusion_steps,
                "block_length": config.of(getattr(model, "block_length", None)).block_length,
            }
            for sample in range(num_samples):
                # Each round of samples is a set of its own, which can be graded again by itself.
                own = name if num_samples == 1 else f"{name}_s{sample}"
                part = items[sample * len(rows) : (sample + 1) * len(rows)]
                write_generations(folder / f"{own}_0_generations.json", part, found.seconds / num_samples, about)
        results += _results(checkpoint.label, task, name, config, rows, items, answers, found, num_samples, select)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return results


def _results(
    label: str,
    task: Task,
    name: str,
    config: SamplerConfig,
    rows: Sequence[dict[str, Any]],
    items: list[dict[str, Any]],
    answers: Sequence[Answer],
    found: Evaluation,
    num_samples: int,
    select: Sequence[str],
) -> list[Result]:
    """The set's accuracy by the reward, and by d1's rules where they know the task; of several samples, pass@k."""
    of_all = (found.mean_length, found.tokens_per_second, sum(answer.ended for answer in answers) / found.n)
    length = config.max_completion_length
    if num_samples > 1:
        right = by_problem(found.correct, len(rows))
        scores = pass_scores(right, powers_up_to(num_samples))
        scores += selection_scores(task, rows, by_problem(found.completions, len(rows)), right, select)
        return [Result(label, name, length, "strict", len(rows), s.value, s.interval, *of_all, s.name) for s in scores]
    results = [Result(label, name, length, "strict", found.n, found.figure, found.interval, *of_all, task.measure)]
    if task.name in D1 and all(len(row.get("puzzle", "")) in (0, 16) for row in rows):
        report = grade(items, task.name, "d1")
        results.append(Result(label, name, length, "d1", report.n, report.accuracy, report.interval, *of_all))
    return results
