"""Several runs side by side: a table, and their curves with seeds as bands."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dgrpo.report.curves import draw_curves, with_summary_accuracy
from dgrpo.report.run_folder import Metrics, read_config, read_metrics, read_summary
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
    return Run(printable(run_dir.resolve().name), summary, kind, with_summary_accuracy(metrics, summary))


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
    for name in ("run", "task", "model"):
        table.add_column(name, overflow="fold")
    for name in ("seed", "before", "after", "gain", "steps", "wall"):
        table.add_column(name, justify="right", no_wrap=True)
    for runs in kinds.values():
        for run in runs:
            table.add_row(*_cells(run.name, run.summary))
        if len(runs) > 1:
            table.add_row(*_cells(f"mean of {len(runs)}", _mean(runs)), style="bold")
        table.add_section()
    return table


def _cells(name: str, summary: dict) -> list[Text]:
    accuracies = [(summary.get(key) or {}).get("accuracy") for key in ("before", "after")]
    before, after = accuracies
    gain = None if before is None or after is None else after - before
    texts = [
        name,
        *(str(summary.get(key, "")) for key in ("task", "model", "seed")),
        *("-" if value is None else f"{100 * value:.1f} %" for value in accuracies),
        "-" if gain is None else f"{100 * gain:+.1f}",
        str(summary.get("steps", "-")),
        duration(summary["wall_seconds"]) if summary.get("wall_seconds") is not None else "-",
    ]
    cells = [Text(printable(text)) for text in texts]
    if gain:
        cells[6].stylize("green" if gain > 0 else "red")
    return cells


def _mean(runs: Sequence[Run]) -> dict:
    """The means over runs, of what all of them have."""
    mean: dict = {}
    for key in ("before", "after"):
        results = [run.summary.get(key) or {} for run in runs]
        if all("accuracy" in result for result in results):
            mean[key] = {"accuracy": sum(result["accuracy"] for result in results) / len(runs)}
    for key in ("steps", "wall_seconds"):
        if all(key in run.summary for run in runs):
            mean[key] = round(sum(run.summary[key] for run in runs) / len(runs))
    return mean


def compare(
    run_dirs: Sequence[str | Path], png: str | Path | None = "compare.png", *, console: Console | None = None
) -> dict[str, list[Run]]:
    """Print a table of the runs and draw their curves into `png` (None: no image); returns the runs by kind.

    Runs that differ in nothing but their seed are one kind, drawn as one line (mean) in a band (lowest to highest).
    """
    if not run_dirs:
        raise ValueError("run_dirs: name at least one run folder.")
    kinds = kinds_of([read_run(run_dir) for run_dir in run_dirs])
    (console or Console()).print(compare_table(kinds))
    if png is not None:
        (console or Console()).print(f"Curves: {png}", highlight=False)
        draw_curves(png, {kind: [run.metrics for run in runs] for kind, runs in kinds.items()})
    return kinds
