"""What `recipes/evaluate.py` does once its command line is read: grade stored generations, or models on a task."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress

from dgrpo.cli import PROTOCOLS, RECIPES
from dgrpo.evaluation.answers import processes
from dgrpo.evaluation.checkpoints import Checkpoint, checkpoints, evaluate_checkpoint
from dgrpo.evaluation.d1 import D1
from dgrpo.evaluation.disagreement import disagreement_lines, disagreements
from dgrpo.evaluation.results import show_results, stored_result, write_results
from dgrpo.evaluation.samples import check_selection
from dgrpo.evaluation.stored import grade_setups, infer_task
from dgrpo.models.loading import load_config
from dgrpo.report.run_folder import read_config
from dgrpo.run.allocator import keep_freed_memory
from dgrpo.run.callbacks import no_bars_without_a_terminal, shows_bars
from dgrpo.run.checks import check_folder
from dgrpo.run.own_data import task_of_run
from dgrpo.run.steps import default_to_one_thread, embedded_checkpoint
from dgrpo.sampling import SamplerConfig
from dgrpo.tasks import EMBEDDED, EMBEDDED_MODELS, TASKS, Task, load_rows


def known(arguments: argparse.Namespace, protocol: str) -> list[str]:
    """The stored generations that a protocol grades; where it was asked for, all of them."""
    if protocol == "strict" or arguments.protocol:
        return arguments.generations
    return [path for path in arguments.generations if infer_task(path) in D1]


def grade_stored(arguments: argparse.Namespace) -> None:
    """Prints the accuracy of stored generations, under each protocol."""
    results = [
        stored_result(name, report)
        for protocol in arguments.protocol or PROTOCOLS
        for name, report in grade_setups(known(arguments, protocol), protocol).items()
    ]
    show_results(results)
    console = Console()
    if arguments.disagreements:
        for line in disagreement_lines(disagreements(known(arguments, "d1"))):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def settings_of_run(chosen: Sequence[Checkpoint]) -> dict[str, Any]:
    """What the first of these that a run wrote was trained with: the config.yaml in the run's folder."""
    folders = [Path(checkpoint.adapter or checkpoint.model) for checkpoint in chosen]
    # Its checkpoints and its best weights lie one below.
    folders = [f.parent if f.name == "best" or f.name.startswith("checkpoint-") else f for f in folders]
    return next(filter(None, (read_config(folder)[1] for folder in folders)), {})


def samplers(
    arguments: argparse.Namespace, task: Task, embedded: str | None, attention_blocks: int | None
) -> list[SamplerConfig]:
    """The papers' samplers; the embedded checkpoint is sampled as its recipe trains it.

    A model that attends in blocks takes these, a token a step, as its papers' static evaluations do.
    """
    recipe = {}
    if embedded:
        files = [RECIPES / f"{name}{EMBEDDED_MODELS[embedded]}.yaml" for name in (task.name, "gsm8k")]
        recipe = yaml.safe_load(next(filter(Path.is_file, files)).read_text())
    configs = []
    for length in arguments.lengths or ([recipe["max_completion_length"]] if embedded else [128, 256, 512]):
        block = arguments.block_length or (None if attention_blocks else min(recipe.get("block_length", 32), length))
        own = recipe["diffusion_steps"] if length == recipe.get("max_completion_length") else None
        steps = arguments.diffusion_steps or own or (length if attention_blocks else length // 2)
        configs.append(
            SamplerConfig(
                length,
                block,
                steps,
                arguments.temperature,
                top_k=arguments.top_k,
                top_p=arguments.top_p,
                remasking=arguments.remasking,
                threshold=arguments.threshold,
                entropy_sum=arguments.entropy_sum,
                min_commit=arguments.min_commit,
                sampler_policy=arguments.sampler_policy,
                sampler_policy_kwargs=arguments.sampler_policy_kwargs,
                compile_rollouts=arguments.compile_rollouts,
            )
        )
    return configs


def grade_models(arguments: argparse.Namespace) -> None:
    """Prints and stores the accuracy of checkpoints or adapters on the held-out rows of a task."""
    check_folder(arguments.output_dir)
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    no_bars_without_a_terminal()
    state = processes(arguments.device)
    if arguments.device not in (None, state.device.type):
        raise ValueError(f"device={arguments.device!r}: there is none here, or accelerate is set to another.")
    if state.device.type == "cpu":
        keep_freed_memory()
    own_data = arguments.task == "grpo"
    folders = {
        name: str(embedded_checkpoint(TASKS["gsm8k" if own_data else arguments.task], name))
        for name in EMBEDDED_MODELS
    }
    models = [folders.get(model, model) for model in arguments.model or []]
    chosen = checkpoints(models, arguments.adapter or [], Path(folders[EMBEDDED]))
    run = settings_of_run(chosen)
    if own_data and arguments.instruction is not None:
        run = run | {"instruction": arguments.instruction}
    task = task_of_run(run) if own_data else TASKS[arguments.task]
    embedded = next(
        (
            name
            for name, folder in folders.items()
            if run.get("model_name_or_path") == name or all(each.model == folder for each in chosen)
        ),
        None,
    )
    if embedded:
        default_to_one_thread()
        run = {"dataset": EMBEDDED, "instruction": ""} | run
    check_selection(task, arguments.select)
    configs = samplers(arguments, task, embedded, getattr(load_config(chosen[0].model), "block_length", None))
    # As the run divided its rows, unless others are asked for: then all of these.
    evaluated = arguments.eval_dataset or (None if arguments.dataset else run.get("eval_dataset"))
    dataset = evaluated or arguments.dataset or run.get("dataset")
    many = dataset == EMBEDDED or (evaluated is None and task.held_out_split is None)
    _, held_out = load_rows(
        task,
        dataset,
        evaluated,
        num_held_out=arguments.num_problems or (512 if many else 10**6),
        instruction=run.get("instruction") if arguments.instruction is None else arguments.instruction,
    )
    folder, results = Path(arguments.output_dir), []
    with Progress(transient=True, disable=not (state.is_main_process and shows_bars())) as progress:
        for checkpoint in chosen:

            def on_start(name: str, total: int, done: int, label: str = checkpoint.label) -> Callable[[int], None]:
                bar = progress.add_task(f"{label}: {name}", total=total, completed=done)
                return lambda num_rows: progress.advance(bar, num_rows)

            results += evaluate_checkpoint(
                checkpoint,
                task,
                list(held_out),
                configs,
                folder if len(chosen) == 1 else folder / checkpoint.label,
                state,
                dtype=arguments.dtype or ("float32" if state.device.type == "cpu" else "bfloat16"),
                batch_size=arguments.batch_size,
                seed=arguments.seed,
                resume=arguments.resume,
                template_settings=arguments.chat_template_kwargs,
                num_samples=arguments.samples,
                select=arguments.select,
                on_start=on_start,
            )
    results = [result for result in results if result.protocol in (arguments.protocol or PROTOCOLS)]
    if state.is_main_process:
        write_results(folder, results)
        show_results(results)
        Console().print(f"Everything is in {folder}", highlight=False)
    state.destroy_process_group()
