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
    """The accuracy of one set of texts by one protocol, with its 95 % interval; n texts count."""

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


def stored_result(name: str, report: Report) -> Result:
    """The result of stored texts, of which no more than their grades is known."""
    return Result("", name, None, report.protocol, report.n, report.accuracy, report.interval)


def results_table(results: Sequence[Result]) -> Table:
    """One line for each result; columns that say nothing are left out."""
    columns = {
        "checkpoint": [result.checkpoint for result in results],
        "set": [result.name for result in results],
        "protocol": [result.protocol for result in results],
        "n": [str(result.n) for result in results],
        "accuracy": [f"{result.accuracy:.2%}" for result in results],
        "95 % interval": [f"{100 * low:.2f} - {high:.2%}" for low, high in (result.interval for result in results)],
        "mean length": ["" if r.mean_length is None else f"{r.mean_length:.1f}" for r in results],
        "ended": ["" if r.ended is None else f"{r.ended:.0%}" for r in results],
        "tokens/s": ["" if r.tokens_per_second is None else f"{r.tokens_per_second:.0f}" for r in results],
    }
    if len(set(columns["checkpoint"])) == 1:
        del columns["checkpoint"]
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table()
    for name in shown:
        justify = "left" if name in ("checkpoint", "set", "protocol") else "right"
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
    """`results.json`, and `accuracy.png` over generation length."""
    (folder / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    draw_accuracy(folder / "accuracy.png", results)


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
    dress(axis, "Accuracy, with 95 % intervals")
    axis.set_xticks(list(place.values()), [str(length) for length in place])
    axis.set_xlim(-0.5, len(place) - 0.5)
    axis.set_xlabel("generation length in tokens", fontsize=9, color=MUTED, loc="right")
    axis.set_ylim(bottom=0.0)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, dpi=130)
