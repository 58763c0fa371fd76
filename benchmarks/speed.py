"""Rollouts, scoring and a whole training cycle beside the textbook procedure, on the same weights.

    python benchmarks/speed.py                                   # three vocabularies on a CPU, an hour
    python benchmarks/speed.py --vocab 1024 --repeats 5          # one of them, minutes
    python benchmarks/speed.py --device cuda --model 8b          # LLaDA-8B's shapes, random weights, bfloat16, LoRA

Cases are interleaved in one process on one thread; times are medians of CPU seconds (wall seconds on a GPU), ratios
are textbook / ours. On a CPU freed memory stays with the process for both sides, as in training
(`dgrpo/run/allocator.py`); without that the textbook spends a quarter of a rollout in the kernel. Peak memory is above
the weights, each case in a fresh process without that setting (on a GPU: of the allocator).
"""

import argparse
import ctypes
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from speed_bench import Bench

from dgrpo import generate
from dgrpo.models import head
from dgrpo.run.allocator import keep_freed_memory

SMALL_CHUNK = 8 * 2**20

# What the project set itself for the small model, by vocabulary: 1,024, 32,000, 126,464.
VOCABULARIES = (1024, 32000, 126464)
GOALS: dict[str, tuple[float | None, float | None, float | None]] = {
    "exact rollout, T=0": (1.10, 1.95, 3.8),
    "exact-in-law rollout, T=0.9": (1.15, 3.8, 8.5),
    "dual cache, T=0.9": (None, None, 10.5),
    "dual cache, T=0.9, 16 steps a block": (4.5, 8.8, None),
    "scoring, own mask per row": (1.0, 1.5, 1.8),
    "scoring, one mask per group of 6": (5.5, 8.5, 9.5),
    "the same in chunks of 8 MiB": (None, None, 7.0),
    "scoring, one mask per group of 16": (14, 20, 22),
    "whole cycle, exact": (1.8, 4.7, 8.9),
    "whole cycle, dual cache": (4.9, 8.8, 10.4),
}
MEMORY_GOALS = {
    "scoring, own mask per row": 1.0,
    "scoring, one mask per group": 6.5,
    "scoring, own mask per row, small chunks": 3.9,
    "scoring, one mask per group, small chunks": 9.0,
    "old + reference of 4 draws, one mask per group": 35.0,
}


def time_cases(bench: Bench, repeats: int, cycle_repeats: int) -> list[tuple[str, float, list[float], list[float]]]:
    """(what, ratio, textbook's seconds, our seconds) of each row of the table; textbook and ours take turns."""
    rows = bench.shape.batch
    group = bench.shape.group
    pairs: list[tuple[str, Callable, dict[str, Callable]]] = [
        (
            "rollout T=0",
            lambda: bench.sample("textbook", 0.0, rows),
            {"exact rollout, T=0": lambda: bench.sample("ours", 0.0, rows)},
        ),
        (
            "rollout T=0.9",
            lambda: bench.sample("textbook", 0.9, rows),
            {
                "exact-in-law rollout, T=0.9": lambda: bench.sample("ours", 0.9, rows),
                "dual cache, T=0.9": lambda: bench.sample("ours", 0.9, rows, "dual"),
            },
        ),
        (
            "scoring",
            lambda: bench.score("textbook", "row", group),
            {
                "scoring, own mask per row": lambda: bench.score("ours", "row", group),
                f"scoring, one mask per group of {group}": lambda: bench.score("ours", "group", group),
                f"the same in chunks of {SMALL_CHUNK >> 20} MiB": lambda: chunked(
                    lambda: bench.score("ours", "group", group)
                ),
            },
        ),
        (
            "scoring, 16",
            lambda: bench.score("textbook", "row", 16),
            {"scoring, one mask per group of 16": lambda: bench.score("ours", "group", 16)},
        ),
    ]
    if bench.shape.sampler.block_length >= 16:
        # As many steps a block as d1 takes: the cache's first pass in each block weighs less.
        slow = {"dual cache, T=0.9, 16 steps a block": lambda: bench.sample("ours", 0.9, rows, "dual", 16)}
        pairs.insert(2, ("16 steps", lambda: bench.sample("textbook", 0.9, rows, steps=16), slow))
    if cycle_repeats:
        cycles = {
            "whole cycle, exact": lambda: bench.cycle("ours"),
            "whole cycle, dual cache": lambda: bench.cycle("ours", "dual"),
        }
        pairs.append(("cycle", lambda: bench.cycle("textbook"), cycles))
    table = []
    for name, theirs, ours in pairs:
        seconds: dict[str, list[float]] = {case: [] for case in (name, *ours)}
        # Scoring takes a second: more repeats weigh little, and its median needs them on a shared machine.
        often = {"cycle": cycle_repeats, "scoring": 3 * repeats, "scoring, 16": 3 * repeats}
        for _ in range(often.get(name, repeats)):
            for case, run in {name: theirs, **ours}.items():
                bench.reset()
                started = bench.clock
                run()
                seconds[case].append(bench.clock - started)
        base = statistics.median(seconds[name])
        for case in ours:
            ratio = base / statistics.median(seconds[case])
            table.append((case, ratio, seconds[name], seconds[case]))
            print(f"  {case}: {ratio:.2f}", file=sys.stderr, flush=True)
    return table


def chunked(run: Callable):
    """`run` with the head in small chunks."""
    shipped, head.MAX_LOGITS_BYTES = head.MAX_LOGITS_BYTES, SMALL_CHUNK
    try:
        return run()
    finally:
        head.MAX_LOGITS_BYTES = shipped


def check(bench: Bench) -> list[str]:
    """The gates: same tokens, same log-probabilities and gradients, same loss of the first update."""
    rows, group = bench.shape.batch, bench.shape.group
    same = (bench.sample("textbook", 0.0, rows) == bench.sample("ours", 0.0, rows)).float().mean()
    lines = [f"tokens equal at T=0: {same:.2%}"]
    refreshed = replace(bench.shape.sampler, cache="dual", cache_refresh=1)
    prompt = bench.prompts(rows)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    same = (generate(bench.network, prompt, mask, refreshed).completion_ids == bench.sample("ours", 0.0, rows)).all()
    lines.append(f"dual cache refreshed at every step equals the exact rollout: {bool(same)}")
    for scope in ("row", "group"):
        found = {}
        for how in ("textbook", "ours"):
            bench.reset()
            found[how] = bench.score(how, scope, group)
        (plain, plain_grads), (ours, our_grads) = found["textbook"], found["ours"]
        apart = (plain - ours).abs().max()
        scale = torch.cat([g.flatten() for g in plain_grads]).norm()
        difference = torch.cat([(a - b).flatten() for a, b in zip(plain_grads, our_grads, strict=True)]).norm()
        mask_of = "each row" if scope == "row" else "the group"
        lines.append(
            f"scoring, a mask for {mask_of}: log-probabilities within {apart:.1e}, gradient {difference / scale:.1e}"
        )
    rollout = bench.rollouts(group)
    draws = bench.views(rollout, "group", 1)
    losses = {}
    for how in ("textbook", "ours"):
        bench.reset()
        losses[how] = bench.update(how, rollout, draws)[0]
    lines.append(f"loss of the first update: textbook {losses['textbook']:.9f}, ours {losses['ours']:.9f}")
    return lines


MEMORY_CASES: dict[str, Callable[[Bench], object]] = {
    "scoring, textbook": lambda b: b.score("textbook", "row", b.shape.group),
    "scoring, own mask per row": lambda b: b.score("ours", "row", b.shape.group),
    "scoring, one mask per group": lambda b: b.score("ours", "group", b.shape.group),
    "scoring, own mask per row, small chunks": lambda b: chunked(lambda: b.score("ours", "row", b.shape.group)),
    "scoring, one mask per group, small chunks": lambda b: chunked(lambda: b.score("ours", "group", b.shape.group)),
    "old + reference of 4 draws, textbook": lambda b: b.old_and_reference("textbook", "row"),
    "old + reference of 4 draws, one mask per group": lambda b: b.old_and_reference("ours", "group"),
}


def peak_memory(bench: Bench, case: str) -> float:
    """MiB that one run of a case needs at its highest above what stood before it."""
    # Code is read from disk when it first runs: not the case's own memory.
    MEMORY_CASES[case](Bench("small", 64, bench.device.type))
    bench.reset()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        MEMORY_CASES[case](bench)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Memory that was freed but is still held would hide what the case takes.
    ctypes.CDLL(None).malloc_trim(0)
    # Linux: 5 resets the high-water mark of the resident set to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    MEMORY_CASES[case](bench)
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    """KiB that /proc says of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def memory_table(arguments: argparse.Namespace, vocab: int) -> list[str]:
    found = {}
    for case in MEMORY_CASES:
        command = [sys.executable, __file__, "--memory", case, "--vocab", str(vocab)]
        command += ["--model", arguments.model, "--device", arguments.device]
        found[case] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    lines = ["| peak memory above the weights, fresh process | MiB | textbook / ours | goal |", "|---|---|---|---|"]
    for case, size in found.items():
        base = found[case.split(",")[0] + ", textbook"]
        goal = MEMORY_GOALS.get(case, "") if (arguments.model, vocab) == ("small", VOCABULARIES[-1]) else ""
        lines.append(f"| {case} | {size:.0f} | {base / size:.1f} | {goal} |")
    return lines


def goal_of(model: str, vocab: int, case: str) -> str:
    """The ratio that was aimed at, if there was one."""
    if model != "small" or vocab not in VOCABULARIES or case not in GOALS:
        return ""
    goal = GOALS[case][VOCABULARIES.index(vocab)]
    return "" if goal is None else f"{goal:g}"


def describe(bench: Bench, vocab: int) -> str:
    config, shape = bench.network.config, bench.shape
    sampler = shape.sampler
    return (
        f"V={vocab:,}: width {config.d_model}, {config.n_layers} layers, prompt {shape.prompt}, completion "
        f"{sampler.max_completion_length}, block {sampler.block_length}, {sampler.diffusion_steps} steps, rollouts of "
        f"{shape.batch}, groups of {shape.group}, {shape.draws} inner iterations, {bench.device.type}, "
        f"{next(bench.network.parameters()).dtype}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--model", choices=["small", "8b"], default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cycle_repeats", type=int, default=5, help="Of whole cycles, most of the time; 0: none.")
    parser.add_argument("--no_memory", action="store_true", help="Leave out the memory cases.")
    parser.add_argument("--memory", choices=MEMORY_CASES, help="Only print the peak of this case, in MiB.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print(peak_memory(Bench(arguments.model, arguments.vocab[0], arguments.device), arguments.memory))
        return
    if arguments.device == "cpu":
        keep_freed_memory()
    for vocab in [126464] if arguments.model == "8b" else arguments.vocab:
        bench = Bench(arguments.model, vocab, arguments.device)
        print(f"\n{describe(bench, vocab)}\n")
        print("\n".join(f"- {line}" for line in check(bench)), flush=True)
        clock = "wall" if arguments.device == "cuda" else "CPU"
        print(f"\n| textbook / ours, {clock} time | ratio | goal | textbook, s | ours, s |\n|---|---|---|---|---|")
        for case, ratio, theirs, ours in time_cases(bench, arguments.repeats, arguments.cycle_repeats):
            cells = [f"{statistics.median(t):.3f} [{min(t):.3f}, {max(t):.3f}]" for t in (theirs, ours)]
            goal = goal_of(arguments.model, vocab, case)
            print(f"| {case} | {ratio:.2f} | {goal} | {cells[0]} | {cells[1]} |", flush=True)
        if not arguments.no_memory:
            print("\n" + "\n".join(memory_table(arguments, vocab)), flush=True)


if __name__ == "__main__":
    main()
