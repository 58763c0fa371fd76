"""Several runs side by side: a table, and their curves with seeds as bands."""

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dgrpo.report.curves import draw_curves, with_summary_accuracy
from dgrpo.report.metrics import FIGURES, Metrics, figure_of
from dgrpo.report.run_folder import method_of, read_config, read_metrics, read_summary
from dgrpo.text import duration, printable

# What may differ between two runs of one kind: the seed, and where and under which name a run is written.
NOT_THE_KIND = ("seed", "data_seed", "output_dir", "logging_dir", "run_name", "hub_model_id", "resume")


@dataclass(frozen=True)
class Run:
    """One run folder as the comparison reads it."""

    name: str
    summary: dict
    config: dict  # one level deep, without what NOT_THE_KIND lists
    metrics: Metrics
    method: str = ""


def read_run(run_dir: str | Path) -> Run:
    """A run's summary, settings and metrics; ValueError when the folder holds none of them."""
    run_dir = Path(run_dir)
    summary, (_, config), metrics = read_summary(run_dir), read_config(run_dir), read_metrics(run_dir)
    if not summary and not metrics:
        raise ValueError(f"{run_dir}: no run here, neither summary.json nor metrics.csv can be read.")
    settings = _flatten(config) or {key: summary[key] for key in ("task", "model") if key in summary}
    kind = {key: str(value) for key, value in settings.items() if key.split(".")[-1] not in NOT_THE_KIND}
    known = {"model": config["model_name_or_path"]} if "model_name_or_path" in config else {}
    summary = known | summary
    metrics = with_summary_accuracy(metrics, summary)
    return Run(printable(run_dir.resolve().name), summary, kind, metrics, method_of(config, summary))


# What the curves may be drawn over, and the column of metrics.csv that tells it.
AXES = {"updates": None, "rollouts": "reward", "tokens": "num_tokens", "seconds": "step_time"}


def along(metrics: Metrics, x: str) -> Metrics:
    """The same curves over updates, rollouts, tokens or seconds of training so far, in place of updates.

    Rollouts are counted by the column that is logged once for each; tokens are logged as a total; seconds are summed,
    evaluations aside.
    """
    if x not in AXES:
        raise ValueError(f"x={x!r}: choose {', '.join(AXES)}.")
    column = AXES[x]
    if column is None:
        return metrics
    if column not in metrics:
        raise ValueError(f"x={x!r}: a run has no column {column} in metrics.csv; compare by updates.")
    so_far: dict[float, float] = {0: 0.0}
    total = 0.0
    for step, value in metrics[column]:
        total = value if x == "tokens" else total + (1.0 if x == "rollouts" else value)
        so_far[step] = total
    known = sorted(so_far)
    # Of a step between two that are known, what the earlier one had.
    at = {step: so_far[known[bisect_right(known, step) - 1]] for points in metrics.values() for step, _ in points}
    return {name: sorted({at[step]: value for step, value in points}.items()) for name, points in metrics.items()}


def caveats(runs: Sequence[Run]) -> list[str]:
    """What makes the numbers of these runs no comparison: other rewards, other tasks, other numbers of problems."""
    facts = {
        "rewards": {f"{run.config.get('reward_funcs')} {run.config.get('reward_weights')}" for run in runs},
        "tasks": {str(run.summary.get("task")) for run in runs if "task" in run.summary},
        "data": {f"{run.config.get('dataset')} {run.config.get('eval_dataset')}" for run in runs},
        "numbers of held-out problems": {
            str(result.get("n")) for run in runs for key in ("before", "after") if (result := run.summary.get(key))
        },
    }
    return [
        f"These runs have different {name} ({'; '.join(sorted(values))}): compare with care."
        for name, values in facts.items()
        if len(values) > 1
    ]


def _flatten(config: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def kinds_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by kind; one kind is named after the settings in which it differs from the others."""
    groups: list[list[Run]] = []
    for run in runs:
        same = next((group for group in groups if group[0].config == run.config), None)
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    settings = list(dict.fromkeys(key for run in runs for key in run.config))
    differing = [key for key in settings if len({group[0].config.get(key) for group in groups}) > 1]
    kinds = {}
    for group in groups:
        parts = [f"{key}={group[0].config.get(key, 'unset')}" for key in differing]
        name = printable(", ".join(parts)) if parts else str(group[0].summary.get("task", group[0].name))
        # A legend has room for a few words: many or long differences are in the folders' configurations.
        if len(differing) > 3 or len(name) > 60:
            name = group[0].name
        kinds[f"{name}, {len(group)} seeds" if len(group) > 1 else name] = group
    return kinds


def compare_table(kinds: dict[str, list[Run]]) -> Table:
    """One line per run, kind by kind, and the mean of each kind that has several runs."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("run", "method", "task", "model"):
        table.add_column(name, overflow="fold")
    for name in ("seed", "n", "before", "after", "gain", "steps", "wall"):
        table.add_column(name, justify="right", no_wrap=True)
    for runs in kinds.values():
        for run in runs:
            table.add_row(*_cells(run.name, {"method": run.method} | run.summary))
        if len(runs) > 1:
            table.add_row(*_cells(f"mean of {len(runs)}", _mean(runs)), style="bold")
        table.add_section()
    return table


def _cells(name: str, summary: dict) -> list[Text]:
    (_, before, unit), (_, after, _) = (figure_of(summary.get(key) or {}) for key in ("before", "after"))
    gain = None if before is None or after is None else after - before
    texts = [
        name,
        *(str(summary.get(key, "")) for key in ("method", "task", "model", "seed")),
        str((summary.get("after") or summary.get("before") or {}).get("n", "-")),
        *(_with_spread(summary.get(key) or {}) for key in ("before", "after")),
        "-" if gain is None else unit.number(gain, "+"),
        str(summary.get("steps", "-")),
        duration(summary["wall_seconds"]) if summary.get("wall_seconds") is not None else "-",
    ]
    cells = [Text(printable(text)) for text in texts]
    if gain:
        cells[8].stylize("green" if gain > 0 else "red")
    return cells


def _with_spread(result: dict) -> str:
    """A held-out figure with its interval, or with the standard deviation over seeds."""
    _, figure, unit = figure_of(result)
    if figure is None:
        return "-"
    text = unit.number(figure) + unit.sign
    if "spread" in result:
        return f"{text} \u00b1 {unit.number(result['spread'])}"
    if low_high := result.get("interval"):
        text += " ({} - {})".format(*map(unit.number, low_high))
    return text


def _mean(runs: Sequence[Run]) -> dict:
    """The means over runs, of what all of them have; of accuracies the standard deviation too."""
    mean: dict = {}
    for key in ("before", "after"):
        results = [run.summary.get(key) or {} for run in runs]
        for name in FIGURES:
            if all(name in result for result in results):
                values = [result[name] for result in results]
                mean[key] = {name: statistics.fmean(values), "spread": statistics.stdev(values)}
    for key in ("steps", "wall_seconds"):
        if all(key in run.summary for run in runs):
            mean[key] = round(sum(run.summary[key] for run in runs) / len(runs))
    return mean


def compare(
    run_dirs: Sequence[str | Path],
    png: str | Path | None = "compare.png",
    *,
    x: str = "updates",
    console: Console | None = None,
) -> dict[str, list[Run]]:
    """Print a table of the runs and draw their curves into `png` (None: no image); returns the runs by kind.

    Args:
        run_dirs: the folders of the runs.
        png: the image of the curves.
        x: what they are drawn over: updates, rollouts, tokens or seconds.
        console: where the table goes.

    Runs that differ in nothing but their seed are one kind, drawn as one line (mean) in a band (lowest to highest).
    """
    if not run_dirs:
        raise ValueError("run_dirs: name at least one run folder.")
    runs = [read_run(run_dir) for run_dir in run_dirs]
    kinds, console = kinds_of(runs), console or Console()
    curves = {kind: [along(run.metrics, x) for run in group] for kind, group in kinds.items()}
    table = compare_table(kinds)
    # Whole even where the window is narrower.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=10**4)).maximum)
    console.print(table)
    for caveat in caveats(runs):
        console.print(Text(printable(caveat)))
    if png is not None:
        console.print(f"Curves: {png}", highlight=False)
        draw_curves(png, curves, x)
    return kinds
