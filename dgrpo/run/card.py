"""The model card of a run, filled from its files, and the folder's way to the Hugging Face Hub."""

import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, constants
from transformers import TrainingArguments

from dgrpo.report.metrics import figure_of
from dgrpo.report.run_folder import method_of, read_config, read_summary
from dgrpo.tasks import EMBEDDED_MODELS

# What decides what a run learns, in the order of the card; whatever else was set is in config.yaml.
_SETTINGS = {
    "method settings": ("estimator", "objective", "loss_type", "kl", "beta", "epsilon", "num_iterations"),
    "optimizer": ("learning_rate", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "rollouts": ("num_generations", "temperature", "max_completion_length", "block_length", "diffusion_steps"),
    "shortcuts of rollouts": ("remasking", "cache", "threshold"),
    "other settings": ("use_peft", "lora_r", "lora_alpha", "instruction", "seed"),
}
# Where a method was described: by estimator or objective.
PAPERS = {
    "one_step": ("d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning", "2504.12216"),
    "coupled": ("DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation", "2506.20639"),
    "elbo": ("Large Language Diffusion Models", "2502.09992"),
    "quadrature": ("GDPO", "2510.08554"),
    "trace": ("TraceRL", "2509.06949"),
    "left_to_right": ("JustGRPO", "2601.15165"),
    "block_random": ("SPG", "2510.09541"),
    "spg": ("SPG", "2510.09541"),
    "bgpo": ("BGPO", "2510.11683"),
    "wd1": ("wd1", "2507.08838"),
    "stable_drl": ("StableDRL", "2603.06743"),
    "espo": ("ESPO", "2512.03759"),
}
# Of a run's folder, what is never uploaded: checkpoints, rows, completions and logs.
_NOT_UPLOADED = ["checkpoint-*", "damaged-*", "unfinished/*", "best/*", "runs/*", "completions/*", "bad_batches/*"]
_NOT_UPLOADED += ["*.html", "*.jsonl", "samples.json", "evaluation_before.json", "training_args.bin", "*.tmp", ".*"]


def model_card(folder: str | Path, *, merged: bool = False, method: str = "fine-tuning") -> str:
    """The card of a run's folder as Markdown with the metadata that the hub reads.

    Args:
        folder: a run's folder, with whatever it holds of config.yaml, summary.json and adapter_config.json.
        merged: for the folder of a model into which the run's adapter was merged.
        method: what a run without rewards did.
    """
    folder = Path(folder)
    config, summary = read_config(folder)[1], read_summary(folder)
    adapter = json.loads(file.read_text()) if (file := folder / "adapter_config.json").is_file() else None
    model = str(config.get("model_name_or_path") or (adapter or {}).get("base_model_name_or_path") or "unknown")
    embedded, rewards = model in EMBEDDED_MODELS, config.get("reward_funcs") or []
    kind = "adapter" if adapter is not None and not merged else "model"
    method = method_of(config, summary) if rewards else method
    data = config.get("dataset") or (f"the task's own ({summary['task']})" if summary.get("task") else "not recorded")
    metadata: dict[str, Any] = {"tags": ["dgrpo", "masked-diffusion", *(["grpo"] if rewards else [])]}
    # Only what the hub knows: a local folder would be a broken link.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists():
        metadata["base_model"] = model
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(data)) and not Path(str(data)).exists():
        metadata["datasets"] = [data]
    metadata |= {"library_name": "peft" if kind == "adapter" else "dgrpo", "pipeline_tag": "text-generation"}
    name = "the embedded model of dgrpo" if embedded else f"`{model}`"
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", "", f"# {folder.absolute().name}", ""]
    lines += [f"A masked diffusion language model: {kind} made from {name} by `{method}` with dgrpo.", ""]
    lines += ["## Training", "", f"- Method: `{method}`"]
    weights = config.get("reward_weights") or [1.0] * len(rewards)
    for reward, weight in zip(rewards, weights, strict=False):
        lines.append(f"- Reward: `{reward}`, weight {weight}")
    lines.append(f"- Data: {f'`{data}`' if config.get('dataset') else data}")
    if summary.get("steps") is not None:
        lines.append(f"- {summary['steps']} updates in {summary.get('wall_seconds')} s on "
                     f"{summary.get('num_processes')} process(es)")  # fmt: skip
    for what, names in _SETTINGS.items():
        given = [f"`{name}: {config[name]}`" for name in names if config.get(name) not in (None, "")]
        lines += [f"- {what[0].upper() + what[1:]}: {', '.join(given)}"] if given else []
    lines += _results(summary) + ["", "## Use", "", *_usage(kind, model), "", "## Versions", ""]
    versions = summary.get("versions") or _versions()
    lines += [", ".join(f"{name} {number}" for name, number in versions.items()), "", "## Citation", ""]
    return "\n".join([*lines, *_citations(config, summary)]) + "\n"


def _results(summary: dict[str, Any]) -> list[str]:
    rows = []
    for when in ("before", "after"):
        if (found := summary.get(when)) and found.get("interval"):
            measure, figure, unit = figure_of(found)
            value, *ends = (unit.number(each or 0.0) + unit.sign.strip() for each in (figure, *found["interval"]))
            rows.append(f"| {when} | {value} | {' to '.join(ends)} | {found['n']} |")
    if not rows:
        return []
    head = [f"| training | {measure} | 95 % interval | problems |", "|---|---|---|---|"]
    return ["", "## Results", "", f"{summary.get('task')}, held-out problems, greedy:", "", *head, *rows]


def _usage(kind: str, model: str) -> list[str]:
    embedded = model in EMBEDDED_MODELS
    base = f'str(CHECKPOINTS / "gsm8k{EMBEDDED_MODELS[model]}")' if embedded else repr(model)
    lines = ["```python", "from dgrpo import load_model"]
    lines += ["from dgrpo.run import CHECKPOINTS"] if embedded and kind == "adapter" else []
    call = (
        f'load_model({base}, adapter="FOLDER OR HUB NAME")'
        if kind == "adapter"
        else 'load_model("FOLDER OR HUB NAME")'
    )
    lines += ["", f"model, tokenizer = {call}", "```", ""]
    return [*lines, "`dgrpo.generate` denoises completions; a causal `generate` does not write anything sensible."]


def _versions() -> dict[str, str]:
    found = {}
    for name in ("dgrpo", "torch", "trl", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _citations(config: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    names = [config.get("estimator") or summary.get("estimator") or "one_step", config.get("objective")]
    papers = dict.fromkeys(PAPERS[name] for name in names if name in PAPERS) if config.get("reward_funcs") else {}
    lines = ["```bibtex"]
    for title, number in papers:
        lines += [f"@misc{{arxiv_{number.replace('.', '_')},", f"  title = {{{title}}},"]
        lines += [f"  eprint = {{{number}}}, archivePrefix = {{arXiv}}, url = {{https://arxiv.org/abs/{number}}}", "}"]
    lines += ["@software{dgrpo,", "  title = {dgrpo: reinforcement learning for masked diffusion language models},"]
    return [*lines, f"  version = {{{_versions().get('dgrpo', '')}}}", "}", "```"]


def write_card(folder: str | Path, target: str | Path | None = None, **settings: Any) -> Path:
    """Writes `model_card` as README.md into `target`, or into the run's own folder."""
    path = Path(target or folder) / "README.md"
    path.write_text(model_card(folder, **settings), "utf-8")
    return path


def run_of(adapter: str | Path) -> Path | None:
    """The folder of the run that wrote this adapter: its own, or the one above it; None where there is none."""
    folder = Path(adapter)
    inner = folder.name == "best" or folder.name.startswith("checkpoint-")
    folder = folder.parent if inner else folder
    return folder if (folder / "config.yaml").is_file() else None


def publish(args: TrainingArguments) -> None:
    """Writes the card, and with `push_to_hub` uploads weights, tokenizer, card, settings, metrics and curves.

    Neither checkpoints nor rows nor completions are uploaded.
    """
    folder = Path(str(args.output_dir))
    method = {"MaskedSFTConfig": "masked supervised fine-tuning", "VRPOConfig": "VRPO (arXiv:2505.19223)"}
    for target in (folder, folder / "best"):
        if target.is_dir():
            write_card(folder, target, method=method.get(type(args).__name__, "fine-tuning"))
    if not args.push_to_hub:
        return
    api = HfApi(endpoint=constants.ENDPOINT, token=args.hub_token)
    name = args.hub_model_id or folder.absolute().name
    repository = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repository, folder_path=folder, ignore_patterns=_NOT_UPLOADED, commit_message="End of training"
    )
