"""What buys useful diversity: distinct completions and groups with spread, by sampler setting, and what they teach.

    python benchmarks/diversity.py --output_dir runs/diversity

First rollouts alone, from the embedded checkpoints; then short runs of the main job with some of the settings, three
seeds each. Two tables. Ten CPU-minutes.
"""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from study import ROOT, one_thread, study_parser, words
from transformers.utils import logging

from dgrpo import SamplerConfig, generate, load_model
from dgrpo.evaluation.answers import encode_prompts
from dgrpo.noise import row_keys
from dgrpo.run.steps import CHECKPOINTS
from dgrpo.run.study import Budget, study
from dgrpo.tasks import TASKS, load_rows

NUM_ROLLOUTS = 512
CHANGES: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {},
        {"temperature": 0.3},
        {"temperature": 1.2},
        {"temperature": 1.5},
        {"remasking": "random"},
        {"diffusion_steps": 8},
        {"diffusion_steps": 4},
        {"block_length": 4},
        {"group": 4},
        {"group": 16},
        {"group": 32},
    ],
    "sudoku": [
        {},
        {"diffusion_steps": 2},
        {"diffusion_steps": 8},
        {"diffusion_steps": 19},
        {"temperature": 0.5},
        {"temperature": 1.5},
        {"remasking": "random"},
        {"remasking": "random", "diffusion_steps": 19},
        {"group": 8},
        {"group": 16},
    ],
}
TAUGHT: dict[str, dict[str, Any]] = {
    "as the recipe": {},
    "temperature 1.5": {"temperature": 1.5},
    "random remasking": {"remasking": "random"},
    "8 steps": {"diffusion_steps": 8},
    "groups of 16": {"num_generations": 16},
}
TRAINING = {"per_device_train_batch_size": 64, "log_kl": False, "warmup_steps": 4, "num_eval_problems": 256}


@dataclass(frozen=True)
class Found:
    """What one setting's rollouts were like."""

    distinct: float  # of a group's completions, the share that differ
    spread: float  # the share of groups in which some but not all are right
    right: float  # pass@1
    any_right: float  # the share of prompts that any of the group solves
    cpu_seconds: float


def measure(task_name: str, change: dict[str, Any]) -> Found:
    """`NUM_ROLLOUTS` rollouts of the task's embedded checkpoint with the recipe's sampler, changed so."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{task_name}.yaml").read_text())
    group = change.get("group", recipe["num_generations"])
    names = ("max_completion_length", "block_length", "diffusion_steps", "temperature", "remasking")
    settings = {name: recipe[name] for name in names if name in recipe}
    sampler = SamplerConfig(**settings | {name: value for name, value in change.items() if name != "group"})
    task = TASKS[task_name]
    rows = list(load_rows(task, "embedded", num_train=NUM_ROLLOUTS // group, num_held_out=8, instruction="")[0])
    rows = [row for row in rows for _ in range(group)]
    model, tokenizer = load_model(str(CHECKPOINTS / task_name))
    prompt_ids, prompt_mask = encode_prompts(tokenizer, [row["prompt"] for row in rows], torch.device("cpu"))
    started = time.process_time()
    keys = row_keys(torch.arange(len(rows)), "diversity")
    ids = generate(model, prompt_ids, prompt_mask, sampler, row_keys=keys).completion_ids
    seconds = time.process_time() - started
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    marks = [mark == 1.0 for mark in task.grade([row["prompt"] for row in rows], texts, **columns)]
    groups = [slice(start, start + group) for start in range(0, len(rows), group)]
    solved = [sum(marks[each]) for each in groups]
    return Found(
        distinct=sum(len(Counter(texts[each])) for each in groups) / len(rows),
        spread=sum(0 < count < group for count in solved) / len(groups),
        right=sum(marks) / len(marks),
        any_right=sum(count > 0 for count in solved) / len(groups),
        cpu_seconds=seconds,
    )


def rollout_table(task: str) -> str:
    """Markdown: a row for each change of the sampler."""
    lines = [
        f"| {task} | distinct | groups with spread | pass@1 | any of the group | CPU-s |",
        "|---|---|---|---|---|---|",
    ]
    for change in CHANGES[task]:
        found = measure(task, change)
        name = ", ".join(f"{key} {value}" for key, value in change.items()) or "as the recipe"
        lines.append(
            f"| {name} | {found.distinct:.0%} | {found.spread:.0%} | {found.right:.1%} | {found.any_right:.1%} | "
            f"{found.cpu_seconds:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = study_parser(__doc__, "diversity").parse_args()
    one_thread()
    logging.set_verbosity_error()
    for task in CHANGES:
        print(f"\n{rollout_table(task)}", flush=True)
    variants, common = {name: words(change) for name, change in TAUGHT.items()}, words(TRAINING)
    folder, seeds, workers = arguments.output_dir, arguments.seeds, arguments.workers
    budget = Budget(rollouts=(6, 12))
    print("\n" + study("gsm8k", variants, budget, folder, seeds=seeds, common=common, workers=workers))


if __name__ == "__main__":
    main()
