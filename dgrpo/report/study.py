"""What a study found: a table in Markdown and a plot of the same figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dgrpo.report.curves import COLOURS, MUTED, dress
from dgrpo.report.metrics import FIGURES, Unit

Found = Mapping[str, Sequence[dict[str, Any]]]


def figures_after(runs: Sequence[dict[str, Any]], budget: str) -> list[float]:
    """The held-out figures of these runs at a budget, such as "12 rollouts"; of those that came so far."""
    return [point[run["measure"]] for run in runs for point in run["points"] if budget in point["after"]]


def budgets_of(found: Found) -> list[str]:
    """The budgets at which runs were measured: seconds, then rollouts, each in rising order."""
    names = {name for runs in found.values() for run in runs for point in run["points"] for name in point["after"]}
    return sorted(names, key=lambda name: (name.endswith("rollouts"), float(name.split()[0])))


def _spread(values: Sequence[float], unit: Unit) -> str:
    """Mean, least and most."""
    mean, least, most = (unit.number(value) for value in (fmean(values), min(values), max(values)))
    return f"{mean} [{least}, {most}]" if len(values) > 1 else mean


def study_table(task: str, found: Found, sweeps: Mapping[str, Mapping[float, float]]) -> str:
    """A row for each variant, the best at its end first: mean [least, most] over seeds after each budget."""
    runs = [run for each in found.values() for run in each]
    measure, unit, budgets = runs[0]["measure"], FIGURES[runs[0]["measure"]], budgets_of(found)
    rates = list(next(iter(sweeps.values()))) if sweeps else []
    start = fmean(run["points"][0][measure] for run in runs)
    names = ["variant", *(f"sweep {rate:g}" for rate in rates), *["rate"] * bool(rates), "seeds"]
    names += [*(f"after {budget}" for budget in budgets), "at its end: rollouts, updates, s", "seeds below the start"]
    lines = [
        f"{task}: held-out {measure} {unit.number(start)}{unit.sign} before, n={runs[0]['n']}; mean [least, most].\n",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    for name in sorted(found, key=lambda name: -fmean(run["points"][-1][measure] for run in found[name])):
        each = found[name]
        cells = [name]
        if rates:
            cells += [unit.number(sweeps[name][rate]) for rate in rates]
            cells.append(f"{max(rates, key=lambda rate: sweeps[name][rate]):g}")
        cells.append(str(len(each)))
        cells += [_spread(values, unit) if (values := figures_after(each, budget)) else "-" for budget in budgets]
        ends = [run["points"][-1] for run in each]
        cells.append(", ".join(f"{fmean(end[key] for end in ends):.0f}" for key in ("rollouts", "updates", "seconds")))
        cells.append(str(sum(run["points"][-1][measure] < run["points"][0][measure] for run in each)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def study_plot(path: Path, task: str, found: Found) -> None:
    """A panel for each budget: mean and range of each variant, the start as a dashed line."""
    from matplotlib.figure import Figure

    runs = [run for each in found.values() for run in each]
    measure, unit, budgets = runs[0]["measure"], FIGURES[runs[0]["measure"]], budgets_of(found)
    start = unit.factor * fmean(run["points"][0][measure] for run in runs)
    order = sorted(found, key=lambda name: fmean(run["points"][-1][measure] for run in found[name]))
    figure = Figure(figsize=(2 + 4.2 * len(budgets), 1.6 + 0.3 * len(order)), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    for axis, budget in zip(figure.subplots(1, len(budgets), squeeze=False, sharex=True)[0], budgets, strict=True):
        axis.axvline(start, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for height, name in enumerate(order):
            if values := [unit.factor * value for value in figures_after(found[name], budget)]:
                axis.plot([min(values), max(values)], [height] * 2, color=COLOURS[0], alpha=0.35, linewidth=5)
                axis.plot(fmean(values), height, "o", color=COLOURS[0], markersize=7)
        axis.set_yticks(range(len(order)), order if budget == budgets[0] else [])
        dress(axis, f"{task}: after {budget}", grid="x")
        axis.set_xlabel(f"held-out {measure}{unit.sign.replace(' ', ', ')}; dashed: before", fontsize=9, color=MUTED)
    figure.savefig(path, dpi=130)
