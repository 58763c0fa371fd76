"""The race to an accuracy: textbook diffu-GRPO against this project, from the same weights on the same problems.

    python benchmarks/race.py --seeds 0 1 2                          # the embedded word problems
    python benchmarks/race.py --seeds 0 --settings '{"cache": "dual"}'
    python benchmarks/race.py --peer my_functions.py                 # another implementation in the textbook's place

The clock is CPU time of one thread and stands still while held-out accuracy is measured, after every rollout batch, by
the exact greedy sampler. Both sides have the recipe's batch, learning rate, schedule, number of inner updates, LoRA,
clip range and problems. The textbook is `benchmarks/textbook.py` in a loop: groups of one prompt unpadded, a prompt
mask for each row, old log-probabilities of all inner updates in one pass, AdamW, no Trainer, no reference model.

A peer is a Python file with `generate(model, prompt_ids, config)`, `token_logps(model, inputs, completion_ids)` or
both, with the textbook's signatures. Results are kept in the output folder; a race that is there is not run again.
"""

import argparse
import json
import runpy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import textbook
import torch
from study import ROOT, one_thread
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, get_scheduler

from dgrpo.evaluation.answers import encode_prompts, evaluate, greedy
from dgrpo.run import parse_recipe
from dgrpo.run.steps import build, rewards_of
from dgrpo.tasks import TASKS

LEVELS = (0.70, 0.78, 0.80)


class Clock:
    """CPU seconds of the parts of a race; nothing is counted outside them."""

    def __init__(self):
        self.spent: dict[str, float] = {}

    def part(self, name: str) -> "Clock":
        self.name, self.since = name, time.process_time()
        return self

    def __enter__(self) -> None:
        self.since = time.process_time()

    def __exit__(self, *raised) -> None:
        self.spent[self.name] = self.spent.get(self.name, 0.0) + time.process_time() - self.since

    @property
    def total(self) -> float:
        return sum(self.spent.values())


def textbook_rounds(trainer, rewards: list, peer: SimpleNamespace, clock: Clock) -> Iterator[None]:
    """diffu-GRPO in a plain loop on the trainer's model and rows; yields after each rollout batch and its updates."""
    args, model, tokenizer = trainer.args, trainer.model, trainer.processing_class
    rows = list(trainer.train_dataset)
    mask_id, group = tokenizer.mask_token_id, args.num_generations
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.weight_decay
    )
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, 0, args.max_steps)
    prompts_per_batch = args.per_device_train_batch_size // group
    eos = tokenizer.eos_token_id
    order: list[int] = []
    for _ in range(args.max_steps // args.num_iterations):
        if len(order) < prompts_per_batch:
            order = torch.randperm(len(rows), generator=generator).tolist()
        part, order = [rows[index] for index in order[:prompts_per_batch]], order[prompts_per_batch:]
        batches = []
        with clock.part("rollouts"):
            model.eval()
            for row in part:
                prompt_ids, _ = encode_prompts(tokenizer, [row["prompt"]], torch.device("cpu"))
                completions = peer.generate(model, prompt_ids.repeat(group, 1), trainer.sampler_config)
                is_end = (completions == eos).int()
                mask = (is_end.cumsum(1) - is_end == 0).float()
                batches.append((prompt_ids.repeat(group, 1), completions, mask))
        with clock.part("rewards"):
            advantages = []
            for row, (_, completions, mask) in zip(part, batches, strict=True):
                texts = [
                    tokenizer.decode(ids[keep.bool()], skip_special_tokens=True)
                    for ids, keep in zip(completions, mask, strict=True)
                ]
                messages = [[{"role": "assistant", "content": text}] for text in texts]
                columns = {name: [value] * group for name, value in row.items() if name != "prompt"}
                scores = [
                    weight * torch.tensor(reward(prompts=[row["prompt"]] * group, completions=messages, **columns))
                    for weight, reward in zip(args.reward_weights, rewards, strict=True)
                    if weight
                ]
                score = torch.stack(scores).sum(0)
                advantages.append(score - score.mean())
        draws = [
            torch.rand(args.num_iterations, *prompt_ids.shape, generator=generator) < args.p_mask_prompt
            for prompt_ids, _, _ in batches
        ]
        inputs = [
            textbook.masked_prompts(prompt_ids.expand(hidden.shape), hidden, mask_id, completions.shape[1])
            for hidden, (prompt_ids, completions, _) in zip(draws, batches, strict=True)
        ]
        with clock.part("old log-probabilities"):
            old = [
                textbook.stacked_logps(model, each, completions)
                for each, (_, completions, _) in zip(inputs, batches, strict=True)
            ]
        with clock.part("updates"):
            model.train()
            total = sum(mask.sum() for _, _, mask in batches)
            for draw in range(args.num_iterations):
                for index, (_, completions, mask) in enumerate(batches):
                    logps = peer.token_logps(model, inputs[index][draw], completions)
                    loss = textbook.clipped_loss(logps, old[index][draw], advantages[index], mask, args.epsilon)
                    (loss / total).backward()
                torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        yield


class _AfterEachRollout(TrainerCallback):
    def __init__(self, measure: Callable[[], None], every: int, clock: Clock):
        self.measure, self.every, self.clock = measure, every, clock

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock.part("all").__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.clock.__exit__()
            self.measure()
            self.clock.__enter__()


def race(name: str, task: str, seed: int, settings: dict[str, Any], peer: SimpleNamespace | None) -> dict[str, Any]:
    """One run from the task's checkpoint: (CPU seconds, held-out accuracy) after each rollout batch, and its parts."""
    file = ROOT / "recipes" / f"{task}.yaml"
    argv = ["--seed", str(seed), "--report_to", "none", "--log_completions", "false", "--disable_tqdm", "true"]
    argv += ["--output_dir", str(ROOT / "runs" / "race" / "scratch")]
    for key, value in settings.items():
        argv += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    recipe, args, model_config = parse_recipe(str(file), argv=argv)
    trainer, held_out = build(TASKS[task], recipe, args, model_config)
    rows, clock, points = list(held_out), Clock(), []
    sampler = greedy(trainer.sampler_config)

    def measure() -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        found = evaluate(model, trainer.processing_class, rows, TASKS[task].grade, sampler, batch_size=256)
        points.append((round(clock.total, 3), found.accuracy))

    measure()
    if peer is None:
        for printed in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(printed)
        trainer.add_callback(_AfterEachRollout(measure, trainer.num_iterations, clock))
        trainer.train()
        parts = {
            key: sum(row.get(f"time/{key}", 0.0) for row in trainer.state.log_history)
            for key in ("rollout", "rewards", "scoring")
        }
    else:
        for _ in textbook_rounds(trainer, rewards_of(recipe), peer, clock):
            measure()
        parts = clock.spent
    return {"name": name, "task": task, "seed": seed, "settings": settings, "points": points, "parts": parts}


def seconds_to(points: list[tuple[float, float]], level: float) -> float | None:
    """CPU seconds until the held-out accuracy first reaches `level`, None where it never does."""
    return next((seconds for seconds, accuracy in points if accuracy >= level), None)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each run, then the ratios of the textbook's times to ours."""
    lines = [
        "| | seed | CPU-s per rollout batch | " + " | ".join(f"to {level:.0%}" for level in LEVELS) + " | end |",
        "|---|---|---|" + "---|" * (len(LEVELS) + 1),
    ]
    times: dict[str, list[list[float | None]]] = {}
    for result in results:
        points = [tuple(point) for point in result["points"]]
        reached = [seconds_to(points, level) for level in LEVELS]
        per_batch = points[-1][0] / (len(points) - 1)
        times.setdefault(result["name"], []).append([per_batch, *reached])
        shown = " | ".join("not reached" if value is None else f"{value:.1f}" for value in reached)
        lines.append(f"| {result['name']} | {result['seed']} | {per_batch:.2f} | {shown} | {points[-1][1]:.1%} |")
    first, *others = times
    for other in others:
        pairs = list(zip(times[first], times[other], strict=False))
        cells = []
        for column in range(len(LEVELS) + 1):
            ratios = [a[column] / b[column] for a, b in pairs if a[column] is not None and b[column]]
            cells.append(f"{median(ratios):.1f} (mean {mean(ratios):.1f}, n={len(ratios)})" if ratios else "-")
        lines.append(f"| **{first} / {other}** | | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="gsm8k", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON over the recipe, for our side alone")
    parser.add_argument("--both", type=json.loads, default={}, help="JSON over the recipe, for both sides")
    parser.add_argument("--name", default="recipe", help="what our side is called in the table")
    parser.add_argument("--peer", help="a Python file in the textbook's place")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "race")
    arguments = parser.parse_args()
    one_thread()
    own = runpy.run_path(arguments.peer) if arguments.peer else {}
    peer = SimpleNamespace(**{name: own.get(name, getattr(textbook, name)) for name in ("generate", "token_logps")})
    peer_name = Path(arguments.peer).stem if arguments.peer else "textbook"
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for name, functions, settings in (
        (peer_name, peer, arguments.both),
        (arguments.name, None, arguments.both | arguments.settings),
    ):
        for seed in arguments.seeds:
            file = arguments.output_dir / f"{arguments.task}-{name}-{seed}.json"
            if not file.exists():
                file.write_text(json.dumps(race(name, arguments.task, seed, settings, functions)))
            results.append(json.loads(file.read_text()))
            if results[-1]["settings"] != settings:
                raise ValueError(f"{file} holds a race with other settings; name another --output_dir or --name.")
    print(table(results))
    for result in results:
        parts = ", ".join(f"{key} {value:.1f}" for key, value in result["parts"].items())
        print(f"{result['name']} seed {result['seed']}: {parts} s")


if __name__ == "__main__":
    main()
