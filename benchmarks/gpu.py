"""The first hour on a GPU: what works, how fast it is and what fits, as one JSON file and one table.

    python benchmarks/gpu.py --output gpu.json --stage smoke              # two minutes, before anything else
    python benchmarks/gpu.py --output gpu.json                            # every stage that is not in the file yet
    python benchmarks/gpu.py --output toy.json --device cpu --size tiny   # the same code on a CPU

LLaDA-8B's shape with random bfloat16 weights and LoRA, made on the device; nothing is downloaded. Each stage is stored
when it ends, in the JSON and the Markdown beside it, so a stopped run goes on where it was. An error is stored too.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from speed_bench import Bench, Shape
from torch.profiler import ProfilerActivity, profile

from dgrpo import SamplerConfig, generate, per_token_logps
from dgrpo.estimators import ESTIMATORS
from dgrpo.evaluation.answers import as_in_training
from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM
from dgrpo.noise import stream
from dgrpo.run.live import LiveBytes
from dgrpo.run.shapes import Network

ROOT = Path(__file__).parents[1]
GB = 1e9
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "dual cache": {"cache": "dual"},
    "prefix cache": {"cache": "prefix"},
    "threshold 0.9": {"threshold": 0.9},
    "guidance": {"cfg_scale": 1.0},
}
Rows = list[dict[str, Any]]


class Lab:
    """The device, the model's size, and how time and memory are taken."""

    def __init__(self, device: str, size: str):
        self.device, self.tiny, self.cuda = device, size == "tiny", device == "cuda"
        self._bench: Bench | None = None

    @property
    def bench(self) -> Bench:
        if self._bench is None:
            self._bench = Bench("small" if self.tiny else "8b", 1024, self.device)
            if self.tiny:
                self._bench.shape = Shape(12, SamplerConfig(16, 8, 8, stop_at_eos=False), batch=2, group=2, draws=2)
        return self._bench

    def seconds(self, call: Callable[[], Any], repeats: int = 2) -> float:
        """The fastest of a few calls after one that warms up."""
        call()
        taken = []
        for _ in range(repeats):
            self.wait()
            started = time.perf_counter()
            call()
            self.wait()
            taken.append(time.perf_counter() - started)
        return min(taken)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak(self, call: Callable[[], Any]) -> float:
        """GB above what is held before: of the allocator on a GPU, of live tensors on a CPU."""
        if not self.cuda:
            with LiveBytes(self.bench.model) as live:
                call()
            return live.peak / GB
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / GB

    def launches(self, call: Callable[[], Any]) -> int | None:
        """Kernels that a call starts; None without a GPU."""
        if not self.cuda:
            return None
        call()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            call()
            self.wait()
        return sum(event.count for event in found.key_averages() if "LaunchKernel" in event.key)

    def matmul_flops(self) -> float:
        """FLOP a second of a large product in the model's precision: the peak that shares are taken of."""
        n = 256 if self.tiny else 8192
        a = torch.randn(n, n, device=self.device, dtype=torch.float32 if self.tiny else torch.bfloat16)
        return 2 * n**3 / self.seconds(lambda: a @ a, 5)

    def sample(self, rows: int, **settings):
        """Rollouts of `rows` rows under the shape's sampler with these settings."""
        bench = self.bench
        config, prompt = replace(bench.shape.sampler, temperature=0.9, **settings), bench.prompts(rows)
        keys = torch.arange(rows, device=self.device)
        with as_in_training(bench.model):
            return generate(bench.network, prompt, torch.ones_like(prompt).bool(), config, row_keys=keys)


def smoke(lab: Lab) -> Rows:
    """Does everything run, and does a small float32 network answer as on the CPU?"""
    found: Rows = []

    def run(what: str, call: Callable[[], Any]) -> None:
        started = time.perf_counter()
        answer = call()
        lab.wait()
        found.append({"what": what, "seconds": time.perf_counter() - started, "finite": bool(answer)})

    tokens = {"vocab_size": 512, "eos_token_id": 510, "pad_token_id": 510, "mask_token_id": 511}
    shape = {"d_model": 64, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 128}
    torch.manual_seed(0)
    small, ids = LLaDAModelLM(LLaDAConfig(**shape, **tokens)).eval(), torch.randint(0, 500, (3, 40))
    mask = torch.arange(40) >= torch.tensor([0, 5, 12])[:, None]
    with torch.no_grad():
        expected = small(ids, mask).logits[mask]
        logits = small.to(lab.device)(ids.to(lab.device), mask.to(lab.device)).logits.cpu()[mask]
    found.append({"what": "largest difference from the CPU's logits", "value": (logits - expected).abs().max().item()})
    for name, settings in MODES.items():
        short = {} if lab.tiny else {"max_completion_length": 64, "diffusion_steps": 16}
        run(f"sample, {name}", lambda s=settings | short: lab.sample(2, **s).confidence.isfinite().all())
    rollout = lab.sample(2)
    for name, estimator in ESTIMATORS.items():
        if name == "left_to_right" and not lab.tiny:
            continue
        settings = {"block_length": rollout.completion_ids.shape[1] // 2} if name == "block_random" else {}
        views = estimator(rollout.to("cpu"), generator=stream("smoke"), **settings)
        views = type(views)(views.hidden.to(lab.device), views.weights.to(lab.device))

        def score(views=views):
            with as_in_training(lab.bench.model) if lab.cuda else torch.enable_grad():
                row = (rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids)
                logps = per_token_logps(lab.bench.model, *row, views, views_per_pass=1)
                logps.sum().backward()
            lab.bench.reset()
            return logps.isfinite().all()

        run(f"score and backward, {name}", score)
    for recipe in ("gsm8k", "sft", "vrpo"):
        run(f"two updates of recipes/{recipe}.py", lambda recipe=recipe: two_updates(lab, recipe))
    return found


def two_updates(lab: Lab, recipe: str) -> bool:
    """The embedded model's recipe in a process of its own; its output where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / f"recipes/{recipe}.py"), "--output_dir", f"{folder}/run"]
        command += ["--max_steps", "2", "--save_strategy", "no", "--report_to", "none"]
        command += ["--use_cpu", str(not lab.cuda).lower()]
        command += ["--num_eval_problems", "8"] if recipe == "gsm8k" else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{recipe}: {done.stderr[-800:]}")
    return True


def rollout(lab: Lab) -> Rows:
    """Tokens a second of each sampler at several numbers of rows; share of the measured peak of products."""
    found, peak, shape = [], lab.matmul_flops(), lab.bench.shape
    length = shape.sampler.max_completion_length
    for rows in (2,) if lab.tiny else (6, 24, 48):
        calls = {"textbook": lambda rows=rows: lab.bench.sample("textbook", 0.9, rows)}
        calls |= {
            name: lambda rows=rows, name=name: lab.sample(rows, **MODES[name])
            for name in ("exact", "dual cache", "threshold 0.9")
        }
        for name, call in calls.items():
            seconds = lab.seconds(call, 1)
            row = {"sampler": name, "rows": rows, "seconds": seconds, "tokens/s": rows * length / seconds}
            if name == "exact":
                network, block = Network(lab.bench.model), shape.sampler.block_length
                flops = sum(network.forward(rows, shape.prompt + length, block)) + rows * block // 2 * network.head()
                row["share of peak"] = shape.sampler.diffusion_steps * flops / seconds / peak
                row["launches a step"] = (lab.launches(call) or math.nan) / shape.sampler.diffusion_steps
            found.append(row)
    return [{"peak": f"{peak / 1e12:.2f} TFLOP/s of products"}, *found]


def cycle(lab: Lab) -> Rows:
    """A whole cycle (rollout of a group, old and reference scores, updates), the textbook's and ours; peaks."""
    found = []
    for how, cache in (("textbook", None), ("ours", None), ("ours", "dual")):
        seconds = lab.seconds(lambda how=how, cache=cache: lab.bench.cycle(how, cache), 1)
        peak = lab.peak(lambda how=how, cache=cache: lab.bench.cycle(how, cache))
        found.append({"cycle": f"{how}{', dual cache' if cache else ''}", "seconds": seconds, "peak GB": peak})
        lab.bench.reset()
    parts = {"rollout": lambda: lab.sample(lab.bench.shape.group)}
    parts["old + reference"] = lambda: lab.bench.old_and_reference("ours", "group")
    parts["update"] = lambda: (lab.bench.score("ours", "group", lab.bench.shape.group), lab.bench.reset())
    return found + [{"part": name, "peak GB": lab.peak(call)} for name, call in parts.items()]


def fit(lab: Lab) -> Rows:
    """The most distinct canvases of an update within 24, 40 and 80 GB, checkpointing off and on."""
    found: Rows = []
    for checkpointing in (False, True):
        if checkpointing:
            lab.bench.model.gradient_checkpointing_enable({"use_reentrant": False})
            if hasattr(lab.bench.model, "enable_input_require_grads"):
                lab.bench.model.enable_input_require_grads()
            lab.bench.model.train()
        for cap in (24, 40, 80):
            if lab.cuda:
                total = torch.cuda.get_device_properties(0).total_memory
                if cap * GB > total * 1.1:
                    continue
                torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GB / total))
            rows, largest, peak = 1, 0, 0.0
            while rows <= (2 if lab.tiny else 48):
                try:
                    peak = lab.peak(lambda rows=rows: lab.bench.score("ours", "row", rows))
                except torch.OutOfMemoryError:
                    break
                finally:
                    lab.bench.reset()
                largest, rows = rows, rows + (1 if lab.tiny else 3)
            found.append({"cap GB": cap, "checkpointing": checkpointing, "canvases": largest, "peak GB": peak})
    lab.bench.model.gradient_checkpointing_disable()
    lab.bench.model.eval()
    if lab.cuda:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def attention(lab: Lab) -> Rows:
    """A forward pass under each attention kernel, with and without padding."""
    found, network = [], lab.bench.network
    ids = lab.bench.prompts(2 if lab.tiny else 24)
    masks = {
        "no": None,
        "yes": torch.arange(ids.shape[1], device=lab.device) >= torch.arange(len(ids)).to(lab.device)[:, None] % 8,
    }
    for name in ("sdpa", "eager", "flash_attention_2"):
        before = network.config._attn_implementation
        try:
            network.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            found.append({"attention": name, "padding": "-", "not run": str(error).split(". ")[0]})
            continue
        for padded, mask in masks.items():
            with torch.no_grad():
                seconds = lab.seconds(lambda mask=mask: network.hidden_states(ids, mask))
            found.append({"attention": name, "padding": padded, "ms": 1000 * seconds})
        network.set_attn_implementation(before)
    return found


def compiled(lab: Lab) -> Rows:
    """torch.compile on the pass over a cached window, whose shapes do not change within a block."""
    network, block = lab.bench.network, lab.bench.shape.sampler.block_length
    ids = lab.bench.prompts(2 if lab.tiny else 6)[:, :block]
    found = []
    calls = {"off": network.hidden_states}
    # On a CPU only the tracing is tried: its compiler takes minutes.
    how = {"mode": "reduce-overhead"} if lab.cuda else {"backend": "eager"}
    calls["on"] = torch.compile(network.hidden_states, **how)
    for name, call in calls.items():
        with torch.no_grad():
            expected, answer = network.hidden_states(ids), call(ids)
            seconds = lab.seconds(lambda call=call: call(ids), 5)
        gap = (answer.float() - expected.float()).abs().max().item()
        found.append({"compile": name, "ms": 1000 * seconds, "largest difference": gap})
    return found


def block(lab: Lab) -> Rows:
    """Models that attend block by block, once they can be trained."""
    return [{"not run": "block-diffusion models are not benchmarked yet"}]


def distributed(lab: Lab) -> Rows:
    """The first losses of the embedded model under ZeRO-2 and ZeRO-3, beside one process."""
    if not lab.cuda or torch.cuda.device_count() < 2:
        return [{"not run": "needs two GPUs; on CPUs tests/test_distributed.py does this"}]
    found = []
    for config in ("one process", "zero2_8gpu", "zero3_8gpu", "fsdp2_8gpu"):
        with tempfile.TemporaryDirectory() as folder:
            number = 1 if config == "one process" else torch.cuda.device_count()
            start = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(number)]
            start += [] if number == 1 else ["--config_file", str(ROOT / f"recipes/accelerate/{config}.yaml")]
            words = [str(ROOT / "recipes/gsm8k.py"), "--output_dir", f"{folder}/run", "--max_steps", "4"]
            done = subprocess.run([*start, *words], cwd=ROOT, capture_output=True, text=True, check=False)
            row: dict[str, Any] = {"processes": config}
            if done.returncode:
                row["error"] = done.stderr[-300:]
            else:
                row["metrics"] = (Path(folder) / "run/metrics.csv").read_text().splitlines()[:6]
            found.append(row)
    return found


STAGES: dict[str, Callable[[Lab], Rows]] = {
    "smoke": smoke,
    "rollout": rollout,
    "cycle": cycle,
    "fit": fit,
    "attention": attention,
    "compile": compiled,
    "block": block,
    "distributed": distributed,
}


def about(lab: Lab) -> dict[str, str]:
    """What the numbers belong to."""
    name = torch.cuda.get_device_name() if lab.cuda else "CPU"
    return {"device": name, "size": "tiny" if lab.tiny else "LLaDA-8B", "torch": torch.__version__}


def markdown(results: dict) -> str:
    """The results as tables."""
    lines = [f"# {', '.join(results['about'].values())}"]
    for name, stage in results["stages"].items():
        lines += ["", f"## {name}: {stage['seconds']:.0f} s", "", STAGES[name].__doc__ or "", ""]
        if "error" in stage:
            lines += ["Failed:", "", *(f"    {line}" for line in stage["error"].splitlines()[-6:])]
        columns: list[tuple[str, ...]] = list(dict.fromkeys(tuple(row) for row in stage.get("rows", [])))
        for each in columns:
            lines += ["", f"| {' | '.join(each)} |", f"|{'---|' * len(each)}"]
            for row in stage["rows"]:
                if tuple(row) == each:
                    shown = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
                    lines.append(f"| {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> None:
    """Runs the stages that the output does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="JSON; Markdown is written beside it")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="8b", choices=["8b", "tiny"])
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: --device cpu --size tiny runs the same code on a toy")
    lab = Lab(arguments.device, arguments.size)
    results: dict[str, Any] = {"about": about(lab), "stages": {}}
    if arguments.output.exists():
        stored = json.loads(arguments.output.read_text())
        if stored["about"] != results["about"]:
            parser.error(f"{arguments.output} is of {stored['about']}: give another --output")
        results = stored
    for name in arguments.stage:
        if "rows" in results["stages"].get(name, {}):
            print(f"{name}: done before")
            continue
        started = time.perf_counter()
        try:
            stage: dict[str, Any] = {"rows": STAGES[name](lab)}
        except Exception:  # noqa: BLE001  # the other stages are still worth the hour
            stage = {"error": traceback.format_exc()}
        stage["seconds"] = time.perf_counter() - started
        results["stages"][name] = stage
        print(f"{name}: {'failed' if 'error' in stage else 'done'} after {stage['seconds']:.0f} s", flush=True)
        arguments.output.write_text(json.dumps(results, indent=1))
        arguments.output.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
