"""Accuracy of checkpoints or adapters on a task, at several generation lengths; or of stored generations.

    python recipes/evaluate.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct --lengths 128 256 512
    accelerate launch recipes/evaluate.py --task gsm8k --adapter none runs/gsm8k     # before and after, side by side
    python recipes/evaluate.py --generations generations/*.json --protocol d1 strict --disagreements

As in the papers: greedy, in blocks of 32, with half as many denoising steps as tokens. The folder then holds the texts
in d1's JSON format, results.json and accuracy.png. --resume continues an interrupted run.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from rich.console import Console
from rich.progress import Progress

from dgrpo.cli import DTYPES, Parser, mapping, named, one_line_errors, seed, whole
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
from dgrpo.sampling.config import Remasking
from dgrpo.tasks import EMBEDDED, EMBEDDED_MODELS, TASKS, Task, load_rows

PROTOCOLS = ("strict", "d1")


def known(arguments: argparse.Namespace, protocol: str) -> list[str]:
    """The stored generations that a protocol grades; where it was asked for, all of them."""
    if protocol == "strict" or arguments.protocol:
        return arguments.generations
    return [path for path in arguments.generations if infer_task(path) in D1]


def grade_stored(arguments: argparse.Namespace) -> None:
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
        files = [Path(__file__).with_name(f"{name}{EMBEDDED_MODELS[embedded]}.yaml") for name in (task.name, "gsm8k")]
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


def main() -> None:
    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", help="Stored generations to grade, without a model.")
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, help="Default: both, where d1 has the task.")
    parser.add_argument("--disagreements", action="store_true", help="Where the protocols differ on them, and why.")
    parser.add_argument("--task", choices=[*TASKS, "grpo"], help="'grpo': rows and rewards as the run had them.")
    parser.add_argument(
        "--model", nargs="+", type=named, help="Hub names or folders; default: the task's embedded checkpoint."
    )
    parser.add_argument(
        "--adapter", nargs="+", type=named, help="Trained adapters to put on top; 'none' is the model as it is."
    )
    parser.add_argument(
        "--dataset",
        type=named,
        help="What the model was trained on, of which the held-out part is asked; default: as its run.",
    )
    parser.add_argument(
        "--eval_dataset", type=named, help="Local file or dataset of which all rows are asked instead."
    )
    parser.add_argument("--instruction", help="Text before each question; default: as its run, or the task's.")
    parser.add_argument("--num_problems", type=whole, help="Default: all; of generated or undivided ones 512.")
    parser.add_argument("--lengths", nargs="+", type=whole, help="Tokens; default: 128 256 512.")
    parser.add_argument("--threshold", type=float, help="Commit every token at least this probable in a step.")
    parser.add_argument("--entropy_sum", type=float, help="SDAR's sum of entropies in nats, with remasking entropy.")
    parser.add_argument("--min_commit", type=whole, default=1, help="With one of these two: at least so many a step.")
    parser.add_argument("--remasking", choices=get_args(Remasking), default="low_confidence", help="Their order.")
    parser.add_argument("--top_k", type=int, default=0, help="Draw from the k most likely words; 0: all.")
    parser.add_argument("--top_p", type=float, default=1.0, help="Draw from the fewest words with this share; 1: all.")
    parser.add_argument("--block_length", type=whole, help="Default: the model's own, or 32.")
    parser.add_argument("--diffusion_steps", type=whole, help="Default: half as many as tokens.")
    parser.add_argument("--temperature", type=float, help="Default: 0; of several samples 1.")
    parser.add_argument("--sampler_policy", help="What a denoising step writes: package.module:function.")
    parser.add_argument("--sampler_policy_kwargs", type=mapping, help="Settings of the policy, as JSON.")
    parser.add_argument("--compile_rollouts", help="Compile a step's layers: inductor, cudagraphs or eager; exact.")
    parser.add_argument("--samples", type=whole, default=1, help="Completions of each problem; above 1: pass@k.")
    parser.add_argument(
        "--select",
        nargs="+",
        choices=["majority", "best"],
        default=[],
        help="Also the accuracy of one chosen sample: the most frequent answer, or the highest reward where that "
        "reads no reference (sudoku, countdown).",
    )
    parser.add_argument("--seed", type=seed, default=0, help="Of the noise at a temperature above 0.")
    parser.add_argument("--batch_size", type=whole, default=64, help="Rows that a process samples at a time.")
    parser.add_argument("--chat_template_kwargs", type=mapping, help='JSON, such as {"enable_thinking": false}.')
    parser.add_argument("--dtype", choices=DTYPES, help="Default: bfloat16, on a CPU float32.")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="Default: the accelerator, if there is one.")
    parser.add_argument("--output_dir", default="runs/evaluation")
    parser.add_argument("--resume", action="store_true", help="Go on from the rows that output_dir holds.")
    arguments = parser.parse_args()
    if arguments.samples < 1 or (arguments.select and arguments.samples < 2):
        parser.error(f"--samples {arguments.samples}: at least 1, and 2 or more where --select chooses among them")
    if arguments.temperature is None:
        arguments.temperature = 1.0 if arguments.samples > 1 else 0.0
    elif arguments.samples > 1 and not arguments.temperature > 0:
        parser.error("--temperature 0 gives the same completion in every sample; take one above 0")
    if arguments.generations:
        grade_stored(arguments)
    elif arguments.task:
        grade_models(arguments)
    else:
        parser.error("give --task, or --generations to grade stored ones")


if __name__ == "__main__":
    with one_line_errors():
        main()
