"""Reading what a run wrote: metrics, summary, configuration, completions. Anything may be missing, or half written."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

import yaml
from pyarrow import ArrowException, Table, types
from pyarrow.parquet import ParquetFile

from dgrpo.report.metrics import Metrics
from dgrpo.text import printable

# A long run logs thousands of tables of completions; this many of them, evenly spaced, tell its story.
MAX_TABLES = 300


@dataclass(frozen=True)
class Completion:
    """One logged completion and what it earned."""

    step: int
    prompt: str
    text: str
    rewards: dict[str, float | None]  # by reward function; None where it did not apply
    total: float  # weighted sum, as trained on
    advantage: float | None


def number(text: object) -> float | None:
    """A finite number, or None for anything else."""
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def read_metrics(run_dir: str | Path) -> Metrics:
    """Every column of metrics.csv; of a step that was logged twice (after a resume) the last value counts."""
    path = Path(run_dir) / "metrics.csv"
    if not path.exists():
        return {}
    values: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(line.replace("\0", "") for line in file):
            step = number(row.pop("step", None))
            if step is None:
                continue
            for name, cell in row.items():
                value = number(cell)
                if name and value is not None:
                    values.setdefault(name, {})[int(step)] = value
    return {name: sorted(points.items()) for name, points in values.items()}


def read_json(run_dir: str | Path, name: str) -> dict | list | None:
    """The content of a JSON file of the run, None when it is missing or half written."""
    try:
        return json.loads((Path(run_dir) / name).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def read_summary(run_dir: str | Path) -> dict:
    summary = read_json(run_dir, "summary.json")
    return summary if isinstance(summary, dict) else {}


def read_config(run_dir: str | Path) -> tuple[str, dict]:
    """config.yaml as text and as a dict; empty when missing or half written."""
    path = Path(run_dir) / "config.yaml"
    if not path.exists():
        return "", {}
    text = path.read_text("utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    return text, config if isinstance(config, dict) else {}


def method_of(config: dict, summary: dict) -> str:
    """The method that a run was trained by, from its settings: estimator, and objective or TRL's loss."""
    estimator = config.get("estimator", summary.get("estimator", "one_step"))
    return f"{estimator} + {config.get('objective') or config.get('loss_type') or 'grpo'}" if config else estimator


def message_text(message: str | list[dict] | None) -> str:
    """The text of a prompt or completion: of a conversation, the last message; never a character that misleads."""
    if isinstance(message, str):
        return printable(message)
    return printable(str(message[-1].get("content") or "")) if message else ""


def _completion_tables(run_dir: Path) -> tuple[list[Table], list[str]]:
    """Tables of completions by step, at most `MAX_TABLES`, and the names of the files that cannot be read."""
    paths = sorted((run_dir / "completions").glob("completions_*.parquet"))
    if len(paths) > MAX_TABLES:
        paths = [paths[round(index * (len(paths) - 1) / (MAX_TABLES - 1))] for index in range(MAX_TABLES)]
    tables: list[Table] = []
    unreadable = []
    for path in paths:
        try:
            table = ParquetFile(path).read()
            texts = table.select(["prompt", "completion"])
        except (OSError, ArrowException, KeyError):  # still being written, cut off, or another table
            unreadable.append(path.name)
            continue
        # Inner updates between two rollouts log the same completions again.
        if not tables or not texts.equals(tables[-1].select(texts.column_names)):
            tables.append(table)
    return tables, unreadable


def read_completions(run_dir: str | Path) -> tuple[list[Completion], list[str]]:
    """The logged completions by step, each batch once, and the names of the files that cannot be read.

    A reward is a column for which metrics.csv has `rewards/<column>/mean`; without metrics, any column of numbers.
    """
    run_dir = Path(run_dir)
    known = [
        name.split("/")[1] for name in read_metrics(run_dir) if name.startswith("rewards/") and name.endswith("/mean")
    ]
    weights = read_config(run_dir)[1].get("reward_weights")
    tables, unreadable = _completion_tables(run_dir)
    completions = []
    for table in tables:
        numeric = [c.name for c in table.schema if types.is_floating(c.type) or types.is_integer(c.type)]
        rewards = [name for name in table.column_names if name in known]
        rewards = rewards or [name for name in numeric if name not in ("step", "advantage")]
        weight = dict(zip(rewards, weights, strict=False)) if isinstance(weights, list) else {}
        for row in table.to_pylist():
            scores = {name: number(row[name]) for name in rewards}
            total = sum(score * float(weight.get(name, 1.0)) for name, score in scores.items() if score is not None)
            prompt, text = message_text(row["prompt"]), message_text(row["completion"])
            completions.append(Completion(int(row["step"]), prompt, text, scores, total, number(row.get("advantage"))))
    return completions, unreadable
