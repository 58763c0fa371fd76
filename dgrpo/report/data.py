"""One page per run: curves, time, completions worth reading, configuration. Written while training and at its end."""

import os
from pathlib import Path

from dgrpo.report import selections
from dgrpo.report.curves import draw_curves, with_summary_accuracy
from dgrpo.report.metrics import CHARTS, PHASES, Chart, Metrics, columns_of, figure_of, warnings
from dgrpo.report.page import write_page
from dgrpo.report.run_folder import (
    Completion,
    message_text,
    method_of,
    read_completions,
    read_config,
    read_json,
    read_metrics,
    read_summary,
)
from dgrpo.text import duration, printable

MAX_POINTS = 600  # of a curve; more are averaged
MAX_SPREAD_ROWS, MAX_ROWS = 240, 60  # of the view over the whole run, and of each other view
MAX_TEXT_BYTES = 3_000_000  # of all prompts and completions together
MAX_SAMPLES = 24
GROUPS = "Groups"


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run's folder, from whatever files the run has written so far."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"run_dir={str(run_dir)!r}: there is no such folder.")
    data = report_data(run_dir)
    return write_page(run_dir / "report.html", "report", data["title"], data)


def write_curves(run_dir: str | Path) -> Path:
    """Write `curves.png` into a run's folder: reward, held-out accuracy, KL and clip ratio against steps."""
    run_dir = Path(run_dir)
    metrics = with_summary_accuracy(read_metrics(run_dir), read_summary(run_dir))
    return draw_curves(run_dir / "curves.png", {"": [metrics]})


def report_data(run_dir: Path) -> dict:
    """Everything that the page shows, ready for JSON."""
    summary, (config_text, config) = read_summary(run_dir), read_config(run_dir)
    metrics = with_summary_accuracy(read_metrics(run_dir), summary)
    completions, unreadable = read_completions(run_dir)
    task, seed = (summary.get(key, config.get(key)) for key in ("task", "seed"))
    model = summary.get("model", config.get("model_name_or_path"))
    rate, rows = config.get("learning_rate"), config.get("dataset")
    header = {
        "method": method_of(config, summary) if config or summary else None,
        "rate": None if rate is None else f"{rate:g}" if isinstance(rate, float) else rate,
        "data": rows,
        "model": model,
        "seed": seed,
        "folder": run_dir.resolve().name,
    }
    notes = [f"{name} cannot be read and is left out." for name in unreadable]
    if not summary.get("after"):
        notes.append("The run has not ended, or has not written its summary: this is what it has logged so far.")
    return {
        "title": printable(" ".join(str(part) for part in (task or run_dir.resolve().name, "run report"))),
        "subtitle": printable(", ".join(f"{key} {value}" for key, value in header.items() if value is not None)),
        "warnings": [printable(text) for text in warnings(metrics, summary, config)],
        "notes": notes,
        "tiles": tiles(summary, metrics),
        "charts": charts(metrics),
        "time": time_split(metrics),
        "more": other_charts(metrics),
        "constants": constants(metrics),
        "flips": flips_in_words(summary),
        "samples": samples(read_json(run_dir, "samples.json")),
        "completions": completion_table(completions),
        "config": printable(config_text),
        "versions": _flat({k: v for k, v in summary.items() if k not in ("before", "after", "task", "model", "seed")}),
    }


def tiles(summary: dict, metrics: Metrics) -> list[dict]:
    """The few numbers at the top: label, value and a remark."""
    shown = []
    figures = []
    for key in ("before", "after"):
        result = summary.get(key) or {}
        name, figure, unit = figure_of(result)
        if figure is not None:
            parts = [f"{result['n']} problems"] if result.get("n") else []
            if interval := result.get("interval"):
                parts.insert(0, " to ".join(unit.number(end) for end in interval) + unit.sign)
            value = unit.number(figure) + unit.sign
            shown.append({"label": f"{name.capitalize()} {key}", "value": value, "remark": ", ".join(parts)})
            figures.append(figure)
    if len(figures) == 2:
        gain = {"value": unit.number(figures[1] - figures[0], "+"), "remark": unit.of_gain}
        shown.append({"label": "Gain"} | gain)
    shown += coverage_tiles(summary)
    if rewards := [value for _, value in metrics.get("reward", [])]:
        tenth = max(1, len(rewards) // 10)
        first, last = sum(rewards[:tenth]) / tenth, sum(rewards[-tenth:]) / tenth
        shown.append({"label": "Reward", "value": f"{last:.3g}", "remark": f"last tenth; the first: {first:.3g}"})
    steps = summary.get("steps") or max((points[-1][0] for points in metrics.values()), default=None)
    if steps is not None:
        shown.append({"label": "Steps", "value": f"{steps:,}", "remark": ""})
    if (seconds := summary.get("wall_seconds")) is not None:
        cpu = summary.get("cpu_seconds")
        shown.append(
            {
                "label": "Time",
                "value": duration(seconds),
                "remark": f"{duration(cpu)} of CPU" if cpu is not None else "",
            }
        )
    if (processes := summary.get("num_processes", 1)) > 1:
        shown.append(
            {"label": "Processes", "value": str(processes), "remark": str(summary.get("distributed_type", ""))}
        )
    return shown


def coverage_tiles(summary: dict) -> list[dict]:
    """pass@k before and after, for each sampler that it was measured at."""
    before, after = ((summary.get(key) or {}).get("coverage") or {} for key in ("before", "after"))
    return [
        {
            "label": f"{name}, {sampler}",
            "value": f"{100 * first[0]:.0f} \u2192 {100 * after[sampler][name][0]:.0f} %",
            "remark": f"before and after, {before['n']} problems",
        }
        for sampler, scores in before.items()
        if isinstance(scores, dict) and sampler in after
        for name, first in scores.items()
        if name in after[sampler]
    ]


def thin(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[list[float]]:
    """The curve as at most `limit` points, each the mean of its neighbours and at the last one's step."""
    size = -(-len(points) // limit)
    parts = [points[start : start + size] for start in range(0, len(points), size)] if points else []
    return [[part[-1][0], float(f"{sum(value for _, value in part) / len(part):.5g}")] for part in parts]


def charts(metrics: Metrics) -> list[dict]:
    """The curves of a run; those that were not logged, or are 0 throughout, are omitted."""
    drawn = []
    for chart in CHARTS:
        columns = columns_of(chart, metrics)
        # Two axes say something only where there are curves for both.
        if columns and not (chart.right and len(columns) < len(chart.series)):
            drawn.append(_chart(chart, columns, metrics))
    return drawn


def _chart(chart: Chart, columns: dict[str, str], metrics: Metrics) -> dict:
    series = [
        {"name": printable(label), "points": thin(metrics[name]), "right": name == chart.right}
        for name, label in columns.items()
    ]
    return {"title": printable(chart.title), "unit": chart.unit, "series": series}


def _not_in_charts(metrics: Metrics) -> list[str]:
    shown = {name for chart in CHARTS for name in columns_of(chart, metrics)}
    return sorted(name for name in metrics if name not in shown | {f"time/{phase}" for phase in PHASES})


def other_charts(metrics: Metrics) -> list[dict]:
    """A curve for each metric that is shown nowhere else and changes."""
    names = [name for name in _not_in_charts(metrics) if len({value for _, value in metrics[name]}) > 1]
    return [_chart(Chart(name, "", {}), {name: name}, metrics) for name in names]


def constants(metrics: Metrics) -> str:
    """The metrics that never change, in words: a curve would say no more."""
    names = [name for name in _not_in_charts(metrics) if len({value for _, value in metrics[name]}) == 1]
    return printable(", ".join(f"{name} {metrics[name][0][1]:g}" for name in names))


def time_split(metrics: Metrics, max_bars: int = 40) -> dict:
    """Mean seconds per step in each phase, over at most `max_bars` stretches of the run; phases not logged took 0.

    Where the update is not timed, it is what the other phases leave of `step_time`.
    """
    logged = {phase: dict(metrics.get(f"time/{phase}", [])) for phase in PHASES}
    if not logged["update"]:
        rest = {
            step: seconds - sum(logged[p].get(step, 0.0) for p in PHASES)
            for step, seconds in metrics.get("step_time", [])
        }
        logged["update"] = {step: max(0.0, seconds) for step, seconds in rest.items()}
    steps = sorted({step for values in logged.values() for step in values})
    size = max(1, -(-len(steps) // max_bars))
    stretches = [steps[start : start + size] for start in range(0, len(steps), size)]
    phases = [
        {
            "name": phase,
            "values": [float(f"{sum(values.get(step, 0.0) for step in part) / len(part):.5g}") for part in stretches],
        }
        for phase, values in logged.items()
        if values
    ]
    return {"from": [part[0] for part in stretches], "to": [part[-1] for part in stretches], "phases": phases}


def samples(stored: object) -> list[dict]:
    """The same problems before and after training, with their verdicts; changed verdicts first."""
    items = [item for item in stored if isinstance(item, dict)] if isinstance(stored, list) else []
    keys = ("prompt", "gold", "before", "after")
    shown = [
        {
            key: message_text(v if isinstance(v := item.get(key), str | list) else "" if v is None else str(v))[:6000]
            for key in keys
        }
        | {mark: item[mark] for mark in ("before_right", "after_right") if isinstance(item.get(mark), bool)}
        for item in items
    ]
    return sorted(shown, key=lambda item: item.get("before_right") == item.get("after_right"))[:MAX_SAMPLES]


def flips_in_words(summary: dict) -> str:
    """How many held-out problems changed from wrong to right, and from right to wrong."""
    flips = summary.get("flips") or {}
    if not {"gained", "lost"} <= flips.keys():
        return ""
    return (
        f"{flips['gained']} problems that were wrong before training are right after it, {flips['lost']} that were "
        "right are wrong."
    )


def completion_table(completions: list[Completion]) -> dict:
    """The views of the completions, over one pool of texts that stays under `MAX_TEXT_BYTES`."""
    views = [
        ("Whole run", "evenly spaced over the run", selections.evenly_spaced(completions, MAX_SPREAD_ROWS)),
        (
            GROUPS,
            "whole groups over the run: the completions of one prompt in one rollout, with their advantages",
            selections.groups(completions, MAX_SPREAD_ROWS),
        ),
        ("Best", "highest reward, latest first", selections.best(completions, MAX_ROWS)),
        ("Worst", "lowest reward, latest first", selections.worst(completions, MAX_ROWS)),
        (
            "Most changed",
            "prompts sampled more than once, by the change of their mean reward between the first and the last time",
            selections.most_changed(completions, MAX_ROWS),
        ),
        (
            "Rewarded, wrong format",
            "reward without its format part; read these for reward hacking",
            selections.paid_without_format(completions, MAX_ROWS),
        ),
    ]
    prefix = common_beginning({completion.prompt for completion in completions})
    pool: dict[str, int] = {}

    def as_row(completion: Completion, earlier: Completion | None, change: float | None) -> dict:
        row = {
            "step": completion.step,
            "prompt": pool.setdefault(completion.prompt[len(prefix) :], len(pool)),
            "text": pool.setdefault(completion.text, len(pool)),
            "rewards": [_short(completion.rewards.get(name)) for name in names],
            "total": _short(completion.total),
            "advantage": _short(completion.advantage),
        }
        if earlier is not None:
            text = pool.setdefault(earlier.text, len(pool))
            row["earlier"] = {"step": earlier.step, "text": text, "total": _short(earlier.total)}
            row["change"] = _short(change)
        return row

    names = list(dict.fromkeys(name for completion in completions for name in completion.rewards))
    shown = [
        {"name": name, "help": help, "grouped": name == GROUPS, "rows": [as_row(*row) for row in rows]}
        for name, help, rows in views
        if rows
    ]
    return {
        "rewards": [printable(name) for name in names],
        "prefix": prefix,
        "views": shown,
        "texts": cut_texts(list(pool), MAX_TEXT_BYTES),
        "logged": len(completions),
    }


def common_beginning(prompts: set[str]) -> str:
    """The instructions that all prompts begin with, whole lines; empty when short or for a single prompt."""
    if len(prompts) < 2:
        return ""
    prefix = os.path.commonprefix(list(prompts))
    end = prefix.rfind("\n") + 1
    return prefix[:end] if end >= 60 else ""


def cut_texts(texts: list[str], max_bytes: int) -> list[str]:
    """The texts, cut to the longest of a few lengths at which they fit into `max_bytes` together."""
    for length in (20_000, 8000, 4000, 2000, 1000, 500, 200):
        cut = [text if len(text) <= length else f"{text[:length]} [cut: {len(text):,} characters]" for text in texts]
        if sum(len(text.encode()) for text in cut) <= max_bytes:
            break
    return cut


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _flat(values: dict, prefix: str = "") -> list[list[str]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append([printable(f"{prefix}{key}"), printable(str(value))])
    return rows
