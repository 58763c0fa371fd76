"""Curves of one or several runs as an image; runs of one kind, which differ in their seed only, are one band."""

from pathlib import Path

import numpy as np

from dgrpo.report.metrics import CHARTS, Metrics, columns_of, figure_of

# matplotlib is imported where it draws: reading a run and writing its page do without.

COLOURS = ("#2a78d6", "#eb6834", "#139a68", "#8a5cd0", "#c98a00", "#d6457f", "#5d7d1a", "#6b7280")
INK, MUTED, GRID = "#1b1b1a", "#5d5c58", "#e2e1dc"


def with_summary_accuracy(metrics: Metrics, summary: dict) -> Metrics:
    """The metrics, with the figure before and after training as ends of the held-out curve where it lacks them."""
    name = f"eval_{figure_of(summary.get('before') or {})[0]}"
    points = dict(metrics.get(name, []))
    last = summary.get("steps") or max((values[-1][0] for values in metrics.values()), default=0)
    for key, step in (("before", 0), ("after", last)):
        figure = figure_of(summary.get(key) or {})[1]
        if figure is not None:
            points.setdefault(step, figure)
    return {**metrics, name: sorted(points.items())} if points else metrics


def moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` neighbours, fewer at the ends."""
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def band(runs: list[Metrics], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and one row of values per run, smoothed when dense; over the steps that all these runs share."""
    curves = [dict(run[name]) for run in runs if run.get(name)]
    if not curves:
        return np.empty(0), np.empty((0, 0))
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])
    if len(curves) > 1 and len(steps) < min(map(len, curves)) / 2:
        # Tokens and seconds: no two runs are measured at the same ones, so each curve is read between its own points.
        low, high = max(min(curve) for curve in curves), min(max(curve) for curve in curves)
        steps = list(np.linspace(low, high, max(map(len, curves))))
        values = np.array([np.interp(steps, list(curve), list(curve.values())) for curve in curves])
    width = len(steps) // 25
    if width > 1:
        values = np.array([moving_mean(row, width) for row in values])
    return np.array(steps), values


def draw_curves(path: str | Path, kinds: dict[str, list[Metrics]], x_label: str = "updates") -> Path:
    """Draw a panel per metric: for each kind of run the mean over its runs, and the range from lowest to highest.

    Args:
        kinds: the runs of each kind by its name in the legend; an empty name is not shown.
        x_label: what the steps of these metrics count.
    """
    from matplotlib.figure import Figure

    # The first column of each chart; a chart that no run has anything but zeros for is no panel.
    first = [(chart, next(iter(chart.series))) for chart in CHARTS if chart.in_image]
    panels = [
        (chart, name)
        for chart, name in first
        if any(name in columns_of(chart, run) for runs in kinds.values() for run in runs)
    ]
    panels = panels or first[:1]
    num_rows = -(-len(panels) // 2)
    legend_rows = -(-len(kinds) // 2) if any(kinds) else 0
    figure = Figure(figsize=(10.4, 2.9 * num_rows + 0.28 * legend_rows), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    axes = figure.subplots(num_rows, min(2, len(panels)), squeeze=False)
    for axis, (chart, name) in zip(axes.flat, panels, strict=False):
        for number, (kind, runs) in enumerate(kinds.items()):
            _draw_kind(axis, runs, name, kind, COLOURS[number % len(COLOURS)])
        _dress_panel(axis, chart.title, chart.unit.startswith("%"))
        axis.set_xlabel(x_label, fontsize=9, color=MUTED, loc="right")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines() if line.get_label() in kinds}
    if any(lines):
        figure.legend(
            handles=lines.values(), loc="outside lower left", ncols=2, frameon=False, fontsize=9, labelcolor=INK
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _draw_kind(axis, runs: list[Metrics], name: str, kind: str, colour: str) -> None:
    steps, values = band(runs, name)
    if not len(steps):
        return
    if len(runs) == 1 and len(steps) >= 50:
        raw = np.array(runs[0][name])
        axis.plot(raw[:, 0], raw[:, 1], color=colour, alpha=0.25, linewidth=0.8)
    elif len(values) > 1:
        axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
    marker = "o" if len(steps) <= 20 else None
    axis.plot(steps, values.mean(0), color=colour, linewidth=1.8, marker=marker, markersize=4, label=kind)


def dress(axis, title: str, grid: str = "y") -> None:
    """The look of every plot: a title on the left, a light grid across `grid`, no frame."""
    axis.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axis.grid(axis=grid, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    axis.tick_params(colors=MUTED, labelsize=9, length=0)


def _dress_panel(axis, title: str, is_share: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    dress(axis, title)
    if not axis.has_data():
        axis.set(xticks=[], yticks=[])
        axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", va="center", color=MUTED)
        return
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_ylim(bottom=min(0.0, axis.dataLim.y0))
    if is_share:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
