"""Results of evaluations side by side: a table, a file of numbers, and accuracy over generation length as a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.table import Table

from dgrpo.evaluation.stored import Report
from dgrpo.report.curves import COLOURS, INK, MUTED, dress


@dataclass(frozen=True)
class Result:
    """The accuracy, or mean score, of one set of texts by one protocol, with its 95 % interval; n texts count."""

    checkpoint: str
    name: str
    length: int | None
    protocol: str
    n: int
    accuracy: float
    interval: tuple[float, float]
    mean_length: float | None = None
    tokens_per_second: float | None = None
    ended: float | None = None  # share of the texts that came to their end
    metric: str = "accuracy"  # or pass@k, majority of N, best of N; "score", the mean grade


def stored_result(name: str, report: Report) -> Result:
    """The result of stored texts, of which no more than their grades is known."""
    return Result("", name, None, report.protocol, report.n, report.accuracy, report.interval)


def results_table(results: Sequence[Result]) -> Table:
    """One line for each result; empty columns are omitted."""
    scores = any(result.metric == "score" for result in results)
    figure, written = ("score", "{:.3f}".format) if scores else ("accuracy", "{:.2%}".format)
    columns = {
        "checkpoint": [result.checkpoint for result in results],
        "set": [result.name for result in results],
        "protocol": [result.protocol for result in results],
        "metric": [result.metric for result in results],
        "n": [str(result.n) for result in results],
        figure: [written(result.accuracy) for result in results],
        "95 % interval": [
            f"{written(low).rstrip('%')} - {written(high)}" for low, high in (result.interval for result in results)
        ],
        "mean length": ["" if r.mean_length is None else f"{r.mean_length:.1f}" for r in results],
        "ended": ["" if r.ended is None else f"{r.ended:.0%}" for r in results],
        "tokens/s": ["" if r.tokens_per_second is None else f"{r.tokens_per_second:.0f}" for r in results],
    }
    for name in ("checkpoint", "metric"):
        if len(set(columns[name])) == 1:
            del columns[name]
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table()
    for name in shown:
        justify = "left" if name in ("checkpoint", "set", "protocol", "metric") else "right"
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for line in zip(*shown.values(), strict=True):
        table.add_row(*line)
    return table


def show_results(results: Sequence[Result]) -> None:
    """Print the table, whole even where the window is narrower."""
    console, table = Console(), results_table(results)
    console.width = max(console.width, console.measure(table, options=console.options.update(width=10**4)).maximum)
    console.print(table)


def write_results(folder: Path, results: Sequence[Result]) -> None:
    """`results.json`, `accuracy.png` over generation length, and with several samples `coverage.png` over k."""
    (folder / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    draw_accuracy(
        folder / "accuracy.png", [result for result in results if result.metric in ("accuracy", "score", "pass@1")]
    )
    if any(result.metric.startswith("pass@") for result in results):
        draw_coverage(folder / "coverage.png", results)


def draw_accuracy(path: Path, results: Sequence[Result]) -> None:
    """Accuracy over generation length: a line for each checkpoint, solid by `strict`, dashed by `d1`."""
    place = {length: i for i, length in enumerate(sorted({result.length or 0 for result in results}))}
    names = list(dict.fromkeys(result.checkpoint for result in results))
    protocols = list(dict.fromkeys(result.protocol for result in results))
    lines = len(names) * len(protocols)
    figure = Figure(figsize=(7.2, 4.2 + 0.14 * lines), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    axis = figure.subplots()
    for number, name in enumerate(names):
        for protocol in protocols:
            line = sorted(
                (r for r in results if (r.checkpoint, r.protocol) == (name, protocol)), key=lambda r: r.length or 0
            )
            # Lines are set apart a little, so that no interval hides another.
            shift = 0.08 * ((number * len(protocols) + protocols.index(protocol)) - (lines - 1) / 2) / max(lines, 4)
            axis.errorbar(
                [place[result.length or 0] + shift for result in line],
                [result.accuracy for result in line],
                yerr=[
                    [max(result.accuracy - result.interval[0], 0.0) for result in line],
                    [max(result.interval[1] - result.accuracy, 0.0) for result in line],
                ],
                color=COLOURS[number % len(COLOURS)],
                linestyle="-" if protocol == "strict" else "--",
                linewidth=1.8,
                marker="o",
                markersize=4,
                capsize=3,
                label=f"{name} ({protocol})" if len(protocols) > 1 else name,
            )
    scores = any(result.metric == "score" for result in results)
    dress(axis, f"{'Mean score' if scores else 'Accuracy'}, with 95 % intervals")
    axis.set_xticks(list(place.values()), [str(length) for length in place])
    axis.set_xlim(-0.5, len(place) - 0.5)
    axis.set_xlabel("generation length in tokens", fontsize=9, color=MUTED, loc="right")
    if not scores:
        axis.set_ylim(bottom=0.0)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, dpi=130)


def draw_coverage(path: Path, results: Sequence[Result]) -> None:
    """pass@k over k: a line for each checkpoint and set, and a cross for each way of choosing a sample."""
    figure = Figure(figsize=(7.2, 4.6), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    axis = figure.subplots()
    lines = list(dict.fromkeys((result.checkpoint, result.name) for result in results))
    for number, (checkpoint, name) in enumerate(lines):
        own = [result for result in results if (result.checkpoint, result.name) == (checkpoint, name)]
        colour = COLOURS[number % len(COLOURS)]
        passes = {int(r.metric.removeprefix("pass@")): r for r in own if r.metric.startswith("pass@")}
        ks, values = list(passes), [result.accuracy for result in passes.values()]
        lows, highs = zip(*(result.interval for result in passes.values()), strict=True)
        axis.fill_between(ks, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axis.plot(
            ks, values, color=colour, linewidth=1.8, marker="o", markersize=4, label=f"{checkpoint} {name}".strip()
        )
        for result in own:
            if result.metric.split()[0] in ("majority", "best"):
                axis.plot(ks[-1], result.accuracy, color=colour, marker="x", linestyle="")
                axis.annotate(
                    result.metric, (ks[-1], result.accuracy), (6, -3), textcoords="offset points", fontsize=8
                )
    dress(axis, "pass@k, with 95 % intervals")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("samples of each problem (k)", fontsize=9, color=MUTED, loc="right")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axis.margins(x=0.18)
    axis.set_ylim(bottom=0.0)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, dpi=130)
