"""Rollouts, scoring and a whole training cycle beside the textbook procedure, on the same weights.

    python benchmarks/speed.py                                   # three vocabularies on a CPU, half an hour
    python benchmarks/speed.py --vocab 1024 --repeats 5          # one of them, minutes
    python benchmarks/speed.py --device cuda --model 8b          # LLaDA-8B's shapes, random weights, bfloat16, LoRA

Cases are interleaved in one process on one thread; times are medians of CPU seconds (wall seconds on a GPU), ratios
are textbook / ours. Peak memory is above the weights, each case in a fresh process (on a GPU: of the allocator).
"""

import argparse
import copy
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import textbook
import torch
from peft import LoraConfig, get_peft_model

from dgrpo import MaskedViews, SamplerConfig, generate, per_token_logps
from dgrpo.estimators import one_step
from dgrpo.models import predictor
from dgrpo.models.families import FAMILIES
from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM
from dgrpo.views import stream

P_MASK_PROMPT = 0.15
SMALL_CHUNK = 8 * 2**20


@dataclass(frozen=True)
class Shape:
    """What is run: prompt and completion, batch of the rollout cases, and the group that is scored."""

    prompt: int
    sampler: SamplerConfig
    batch: int
    group: int = 6
    draws: int = 12


def shape_of(model: str, vocab: int) -> Shape:
    if model == "8b":
        return Shape(200, SamplerConfig(256, 32, 128, stop_at_eos=False), batch=6)
    if vocab > 100_000:
        return Shape(50, SamplerConfig(64, 8, 32, stop_at_eos=False), batch=1)
    return Shape(100, SamplerConfig(128, 16, 64, stop_at_eos=False), batch=2 if vocab < 10_000 else 1)


class Bench:
    """Model, reference and a group of rollouts: everything that the cases share."""

    def __init__(self, name: str, vocab: int, device: str):
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.shape = shape_of(name, vocab)
        special = {"mask_token_id": vocab - 1, "eos_token_id": vocab - 2, "pad_token_id": vocab - 2}
        if name == "8b":
            config = LLaDAConfig(mlp_hidden_size=12288)
            with torch.device(self.device):
                torch.set_default_dtype(torch.bfloat16)
                model = LLaDAModelLM(config)
                torch.set_default_dtype(torch.float32)
            lora = LoraConfig(r=128, lora_alpha=64, target_modules=FAMILIES["llada"].lora_targets)
            self.model = get_peft_model(model, lora, autocast_adapter_dtype=False)
            self.network = self.model.get_base_model()
            self.reference, self.reference_context = self.model, self.model.disable_adapter
        else:
            small = {"d_model": 256, "n_layers": 6, "n_heads": 8, "mlp_hidden_size": 768, "init_std": 0.05}
            config = LLaDAConfig(**small, vocab_size=vocab, max_sequence_length=512, rope_theta=10000.0, **special)
            self.model = self.network = LLaDAModelLM(config).to(self.device)
            self.reference, self.reference_context = copy.deepcopy(self.model), nullcontext
            self.network.get_input_embeddings().requires_grad_(False)
            self.network.get_output_embeddings().requires_grad_(False)
        self.model.eval()
        self.start = copy.deepcopy({n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad})

    @property
    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def reset(self) -> None:
        """Weights and gradients as at the start: every repeat does the same work."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(self.start[name])
                parameter.grad = None

    def prompts(self, num_rows: int) -> torch.Tensor:
        """One prompt, `num_rows` times."""
        generator = torch.Generator().manual_seed(1)
        row = torch.randint(self.network.config.vocab_size - 2, (1, self.shape.prompt), generator=generator)
        return row.repeat(num_rows, 1).to(self.device)

    def rollouts(self, num_rows: int):
        """A group's rollouts as scoring meets them: 60 % of the completion lies before the end on average."""
        generator = torch.Generator().manual_seed(2)
        length = self.shape.sampler.max_completion_length
        ids = torch.randint(self.network.config.vocab_size - 2, (num_rows, length), generator=generator)
        ends = torch.linspace(0.2, 1.0, num_rows).mul(length).long()
        mask = torch.arange(length) < ends[:, None]
        ids = ids.where(mask, self.network.config.eos_token_id)
        prompt = self.prompts(num_rows)
        return SimpleNamespace(
            prompt_ids=prompt,
            prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
            completion_ids=ids.to(self.device),
            completion_mask=mask.to(self.device),
            group=torch.zeros(num_rows, dtype=torch.long, device=self.device),
        )

    def sample(self, how: str, temperature: float, rows: int, cache: str | None = None, steps: int | None = None):
        config = replace(self.shape.sampler, temperature=temperature, cache=cache)
        if steps is not None:
            config = replace(config, diffusion_steps=steps * config.num_blocks)
        prompt = self.prompts(rows)
        if how == "textbook":
            return textbook.generate(self.network, prompt, config)
        generator = torch.Generator().manual_seed(3)
        mask = torch.ones_like(prompt, dtype=torch.bool)
        return generate(self.network, prompt, mask, config, generator=generator).completion_ids

    def views(self, rollout, scope: str, num_draws: int) -> list[MaskedViews]:
        """The masks of the inner iterations: prompts masked once for the group, or each row's on its own."""
        settings = {"p_mask_prompt": P_MASK_PROMPT, "prompt_mask_scope": scope}
        return [one_step(rollout, generator=stream("benchmark", draw), **settings) for draw in range(num_draws)]

    def logps(self, how: str, model, rollout, views: MaskedViews) -> torch.Tensor:
        """[B, C] log-probabilities under one draw, by the textbook or by dgrpo."""
        if how == "textbook":
            return textbook.token_logps(model, self.inputs(rollout, views), rollout.completion_ids)
        return per_token_logps(model, rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, views)

    def inputs(self, rollout, views: MaskedViews) -> torch.Tensor:
        width = rollout.prompt_ids.shape[1]
        length = rollout.completion_ids.shape[1]
        mask_id = self.network.config.mask_token_id
        return textbook.masked_prompts(rollout.prompt_ids, views.hidden[:, 0, :width], mask_id, length)

    def score(self, how: str, scope: str, group: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward and backward of one update's log-probabilities; what came out, for comparison."""
        rollout = self.rollouts(group)
        (views,) = self.views(rollout, scope, 1)
        logps = self.logps(how, self.model, rollout, views) * rollout.completion_mask
        advantages = torch.linspace(-1, 1, group, device=self.device)[:, None]
        (logps * advantages).sum().backward()
        return logps.detach(), [p.grad for p in self.model.parameters() if p.requires_grad]

    def old_and_reference(self, how: str, scope: str) -> None:
        """Old and reference log-probabilities of four inner iterations, as the memory cases ask for them."""
        rollout = self.rollouts(self.shape.group)
        draws = self.views(rollout, scope, 4)
        self.frozen_logps(how, self.model, rollout, draws)
        with self.reference_context():
            self.frozen_logps(how, self.reference, rollout, draws)

    @torch.no_grad()
    def frozen_logps(self, how: str, model, rollout, draws: list[MaskedViews]) -> list[torch.Tensor]:
        """[B, C] for each draw; the textbook stacks the draws."""
        if how == "textbook":
            inputs = torch.stack([self.inputs(rollout, views) for views in draws])
            return list(textbook.stacked_logps(model, inputs, rollout.completion_ids))
        return [self.logps(how, model, rollout, views) for views in draws]

    def cycle(self, how: str, cache: str | None = None) -> None:
        """Rollouts of one group at T=0.9, old and reference log-probabilities, and the updates."""
        rollout = self.rollouts(self.shape.group)
        sampled = self.sample(how, 0.9, self.shape.group, cache)
        rollout.completion_ids = sampled.where(rollout.completion_mask, self.network.config.eos_token_id)
        self.update(how, rollout, self.views(rollout, "row" if how == "textbook" else "group", self.shape.draws))

    def update(self, how: str, rollout, draws: list[MaskedViews]) -> list[float]:
        """The inner iterations on one group of rollouts; their losses."""
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6)
        advantages = torch.linspace(-1, 1, len(rollout.completion_ids), device=self.device)
        # Before the first update the policy has not moved: ours takes the old log-probabilities from the update.
        skipped = 0 if how == "textbook" else 1
        old = [None] * skipped + self.frozen_logps(how, self.model, rollout, draws[skipped:])
        with self.reference_context():
            reference = self.frozen_logps(how, self.reference, rollout, draws)
        losses = []
        for views, old_logps, reference_logps in zip(draws, old, reference, strict=True):
            logps = self.logps(how, self.model, rollout, views)
            old_logps = logps.detach() if old_logps is None else old_logps
            loss = textbook.loss_of(logps, old_logps, reference_logps, advantages, rollout.completion_mask)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


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
        for _ in range(cycle_repeats if name == "cycle" else repeats):
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
    shipped, predictor.MAX_LOGITS_BYTES = predictor.MAX_LOGITS_BYTES, SMALL_CHUNK
    try:
        return run()
    finally:
        predictor.MAX_LOGITS_BYTES = shipped


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
    lines = ["| peak memory above the weights | MiB | textbook / ours |", "|---|---|---|"]
    for case, size in found.items():
        base = found[case.split(",")[0] + ", textbook"]
        lines.append(f"| {case} | {size:.0f} | {base / size:.1f} |")
    return lines


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
    parser.add_argument("--vocab", type=int, nargs="+", default=[1024, 32000, 126464])
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
    for vocab in [126464] if arguments.model == "8b" else arguments.vocab:
        bench = Bench(arguments.model, vocab, arguments.device)
        print(f"\n{describe(bench, vocab)}\n")
        print("\n".join(f"- {line}" for line in check(bench)), flush=True)
        clock = "wall" if arguments.device == "cuda" else "CPU"
        print(f"\n| textbook / ours, {clock} time | ratio | textbook, s | ours, s |\n|---|---|---|---|")
        for case, ratio, theirs, ours in time_cases(bench, arguments.repeats, arguments.cycle_repeats):
            cells = [f"{statistics.median(t):.3f} [{min(t):.3f}, {max(t):.3f}]" for t in (theirs, ours)]
            print(f"| {case} | {ratio:.2f} | {cells[0]} | {cells[1]} |", flush=True)
        if not arguments.no_memory:
            print("\n" + "\n".join(memory_table(arguments, vocab)), flush=True)


if __name__ == "__main__":
    main()
