"""Accuracy of a checkpoint or adapter on a task, at several generation lengths; or of stored generations.

    python recipes/evaluate.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct --lengths 128 256 512
    python recipes/evaluate.py --task gsm8k --adapter runs/gsm8k
    python recipes/evaluate.py --generations generations/gsm8k_*.json --protocol d1

Greedy, with length / 2 denoising steps in blocks of 32, as in the papers. Generations are written in d1's JSON format.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dgrpo.evaluate import evaluate
from dgrpo.grading import grade_setups
from dgrpo.models import load_model
from dgrpo.run import CHECKPOINTS
from dgrpo.sampling import SamplerConfig
from dgrpo.tasks import TASKS, load_rows


def show(rows: list[tuple]) -> None:
    table = Table("set", "protocol", "n", "accuracy", "95 % interval", "mean length", "tokens/s")
    for name, protocol, n, accuracy, (low, high), length, speed in rows:
        table.add_row(name, protocol, str(n), f"{accuracy:.2%}", f"{low:.2%} - {high:.2%}", length, speed)
    Console().print(table)


def grade_stored(paths: list[str], protocols: list[str]) -> None:
    rows = []
    for protocol in protocols:
        for name, report in grade_setups(paths, protocol).items():
            rows.append((name, protocol, report.n, report.accuracy, report.interval, "", ""))
    show(rows)


def grade_model(arguments: argparse.Namespace) -> None:
    task = TASKS[arguments.task]
    embedded = arguments.model is None
    model, tokenizer = load_model(
        str(CHECKPOINTS / task.name) if embedded else arguments.model, arguments.dtype, adapter=arguments.adapter
    )
    model.to(arguments.device)
    _, held_out = load_rows(
        task,
        arguments.dataset or ("embedded" if embedded else None),
        arguments.dataset,
        num_held_out=arguments.num_problems or (512 if embedded else 10**6),
        instruction="" if embedded else None,
    )
    rows = []
    for length in arguments.lengths or ([16] if embedded else [256]):
        block = min(arguments.block_length, length)
        steps = length if embedded else length // 2
        config = SamplerConfig(length, block, steps)
        with Progress(transient=True) as progress:
            bar = progress.add_task(f"{task.name} at {length} tokens", total=len(held_out))
            found = evaluate(
                model,
                tokenizer,
                list(held_out),
                task.grade,
                config,
                batch_size=arguments.batch_size,
                on_batch=lambda n, bar=bar, progress=progress: progress.advance(bar, n),
            )
        stored = [
            {"question": row["question"], "generations": text, "ground_truth": row.get("answer")}
            for row, text in zip(held_out, found.completions, strict=True)
        ]
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{task.name}_{length}_{steps}"
        (folder / f"{name}_0_generations.json").write_text(json.dumps({"generations": stored}, indent=1))
        mean_length, speed = sum(found.lengths) / found.n, found.num_tokens / found.seconds
        rows.append((name, "strict", found.n, found.accuracy, found.interval, f"{mean_length:.1f}", f"{speed:.0f}"))
    show(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", help="Stored generations to grade, without a model.")
    parser.add_argument("--protocol", nargs="+", choices=["strict", "d1"], default=["strict"])
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--model", help="Hub name or folder; default: the task's embedded checkpoint.")
    parser.add_argument("--adapter", help="A trained adapter to put on top.")
    parser.add_argument("--dataset", help="Local file of the task's rows to evaluate on; default: the held-out split.")
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--block_length", type=int, default=32)
    parser.add_argument("--num_problems", type=int, help="Default: all; of generated problems 512.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output_dir", default="runs/evaluation")
    arguments = parser.parse_args()
    if arguments.generations:
        grade_stored(arguments.generations, arguments.protocol)
    elif arguments.task:
        grade_model(arguments)
    else:
        parser.error("give --task, or --generations to grade stored ones")


if __name__ == "__main__":
    main()
