"""The columns of metrics.csv: what each means, what is healthy, which are drawn together, and what is a warning."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

# metric -> [(step, value)], by increasing step
# Points of each column by step, or by whatever a comparison counts.
Metrics = dict[str, list[tuple[float, float]]]


class Unit(NamedTuple):
    """How a held-out figure is written."""

    factor: float
    digits: int
    sign: str
    of_gain: str

    def number(self, value: float, plus: str = "") -> str:
        return f"{self.factor * value:{plus}.{self.digits}f}"


# By what a summary calls its figure.
FIGURES = {"accuracy": Unit(100, 1, " %", "percentage points"), "score": Unit(1, 3, "", "of the mean score")}


def figure_of(result: dict) -> tuple[str, float | None, Unit]:
    """The held-out figure of a summary's `before` or `after`: its name, its value (None: there is none), its unit."""
    name = next((name for name in FIGURES if result.get(name) is not None), "accuracy")
    return name, result.get(name), FIGURES[name]


@dataclass(frozen=True)
class Metric:
    """A column of metrics.csv, or several where the name holds `*`."""

    name: str
    meaning: str
    healthy: str = ""  # in words; empty where no range is better than another
    least: float | None = None  # bounds of the mean over the last quarter of the run, beyond which it is a warning
    most: float | None = None
    remedy: str = ""


# The one list of metrics: the report warns by it, and `metrics_reference` prints it.
METRICS = (
    Metric("step", "optimizer updates so far; 0 is the evaluation before training"),
    Metric("reward", "mean over the rollout of the weighted sum of the rewards", "rises in steps, with noise"),
    Metric("reward_std", "mean standard deviation of the reward within a group", "above 0"),
    Metric(
        "frac_reward_zero_std",
        "share of groups whose completions all have the same reward: they teach nothing",
        "well below 1",
        most=0.9,
        remedy="raise temperature or num_generations, or take problems that are neither too easy nor too hard",
    ),
    Metric("rewards/*/mean", "mean of one reward function, before weighting", "rises, if it is paid for"),
    Metric("rewards/*/std", "standard deviation of one reward function over the rollout"),
    Metric("rewards/*/errors", "calls of the reward function that raised", "0", most=0.0, remedy="mend the reward"),
    Metric(
        "rewards/*/timeouts",
        "calls that took longer than reward_timeout",
        "0",
        most=0.0,
        remedy="speed it up",
    ),
    Metric("rewards/*/non_finite", "values that were NaN or infinite", "0", most=0.0, remedy="mend the reward"),
    Metric("eval_accuracy", "share of held-out problems answered right", "follows the reward"),
    Metric("eval_score", "mean over the held-out rows of the rewards, or of `grade`", "follows the reward"),
    Metric("eval_reasons", "share of held-out completions in the format that was asked for"),
    Metric("kl", "KL divergence to the reference policy, per token", "grows slowly"),
    Metric(
        "clip_ratio/region_mean",
        "share of tokens whose ratio was clipped",
        "a few per cent",
        most=0.3,
        remedy="lower learning_rate or num_iterations",
    ),
    Metric("clip_ratio/*", "the same, below or above the clip range; min and max over processes"),
    Metric("entropy", "entropy of the policy at the scored tokens, in nats", "falls slowly; near 0 all texts are one"),
    Metric(
        "completions/clipped_ratio",
        "share of completions without an end: the canvas was too short for them",
        "below a third",
        most=1 / 3,
        remedy="raise max_completion_length",
    ),
    Metric("completions/*", "lengths in tokens, of all completions and of those that came to an end", "settle"),
    Metric(
        "rollout/distinct_completions",
        "distinct completions of a group, as a share of all",
        "well above one over num_generations",
    ),
    Metric("rollout/agreement", "share of tokens on which the fast sampler agrees with the exact one", "near 1"),
    Metric(
        "rollout/steps_per_row",
        "steps at which a completion got tokens, in the mean; with a threshold it falls as the policy grows surer",
    ),
    Metric("rollout/*", "cost and shape of the rollout: forward passes, and forward passes per token"),
    Metric("tokens_per_second", "completion tokens per second of sampling"),
    Metric("num_tokens", "tokens of prompts and completions so far"),
    Metric("grad_norm", "norm of the gradient before it was clipped"),
    Metric(
        "skipped_updates",
        "updates that were not made, since loss or gradient were not finite",
        "0",
        most=0.0,
        remedy="lower learning_rate or max_grad_norm",
    ),
    Metric("loss", "the objective's value; near 0 by construction in GRPO"),
    Metric("learning_rate", "the learning rate of this update"),
    Metric("epoch", "passes over the training prompts"),
    Metric("step_time", "seconds of a training step, rollout included"),
    Metric("time/*", "seconds of one phase: rollout, rewards, scoring, update, evaluation"),
)


def metric_of(column: str) -> Metric | None:
    """The entry of the list that describes a column; the first that fits."""
    return next((metric for metric in METRICS if fnmatchcase(column, metric.name)), None)


def metrics_reference() -> str:
    """The list of metrics as a Markdown table."""
    lines = ["| column | meaning | healthy |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{m.name}` | {m.meaning} | {m.healthy} |" for m in METRICS)]) + "\n"


@dataclass(frozen=True)
class Chart:
    """Curves that are drawn in one frame."""

    title: str
    unit: str  # begins with % where the values are shares
    series: dict[str, str]  # column, where `*` stands for any part, and its name in the legend
    right: str | None = None  # of `series`, the column with an axis of its own on the right, which is in per cent
    in_image: bool = False  # also in curves.png and in the comparison of runs


# The one list of charts: the page draws all of them, curves.png and `dgrpo compare` those `in_image`.
CHARTS = (
    Chart(
        "Reward and held-out accuracy",
        "reward on the left, accuracy in % on the right",
        {"reward": "reward", "eval_accuracy": "held-out accuracy"},
        right="eval_accuracy",
    ),
    Chart("Reward", "mean of the batch", {"reward": "reward"}, in_image=True),
    Chart("Held-out score", "mean of the held-out rows", {"eval_score": "score"}, in_image=True),
    Chart("Reward by function", "before weighting", {"rewards/*/mean": "*"}),
    Chart(
        "Held-out accuracy",
        "% of problems",
        {"eval_accuracy": "right", "eval_reasons": "in the format, with reasoning"},
        in_image=True,
    ),
    Chart("KL to the reference", "per token", {"kl": "KL"}, in_image=True),
    Chart(
        "Clip ratio",
        "% of tokens",
        {"clip_ratio/region_mean": "clipped", "clip_ratio/low_mean": "below", "clip_ratio/high_mean": "above"},
        in_image=True,
    ),
    Chart("Entropy", "nats per token", {"entropy": "entropy"}),
    Chart("Completion length", "tokens", {"completions/mean_length": "mean"}),
    Chart("Groups without spread", "% of groups, their rewards all equal", {"frac_reward_zero_std": "groups"}),
    Chart("Throughput", "completion tokens per second", {"tokens_per_second": "tokens/s"}),
)
PHASES = ("rollout", "rewards", "scoring", "update", "evaluation")


def columns_of(chart: Chart, metrics: Metrics) -> dict[str, str]:
    """The columns of a chart that say anything: logged, and not 0 throughout; with their names in the legend."""
    found = {}
    for pattern, label in chart.series.items():
        for column in metrics:
            if fnmatchcase(column, pattern) and any(value for _, value in metrics[column]):
                found[column] = column.split("/")[1] if label == "*" else label
    return found


# What the guard against collapse watches.
WATCHED = ("reward", "entropy", "completions/mean_length")


def cliffs(history: Mapping[str, Sequence[float]], window: int) -> dict[str, str]:
    """What went over a cliff, in words: reward, entropy, length, each as the mean of its last `window` values.

    Reward: a quarter below its best window, and by five standard errors. Entropy: halved from the window before, and
    below a tenth of the first. Length: more than twice that of the first window, with no more reward than then.
    """
    means = {
        name: [statistics.fmean(values[i : i + window]) for i in range(len(values) - window + 1)]
        for name, values in history.items()
    }
    rewards, entropies, lengths = (means.get(name, []) for name in WATCHED)
    found = {}
    if len(rewards) > window:
        best = max(rewards[:-window])
        windows = (history["reward"][at : at + window] for at in (rewards.index(best), len(rewards) - 1))
        error = (sum(map(statistics.variance, windows)) / window) ** 0.5
        if best - rewards[-1] > max(abs(best) / 4, 5 * error):
            found["reward"] = f"the reward fell from {best:.3g} to {rewards[-1]:.3g}"
    if len(entropies) > window and entropies[-1] < min(entropies[-1 - window] / 2, entropies[0] / 10):
        found["entropy"] = f"the entropy fell from {entropies[-1 - window]:.3g} to {entropies[-1]:.3g}"
    if len(lengths) > window and lengths[-1] > 2 * lengths[0] and rewards and rewards[-1] <= rewards[0]:
        found["length"] = f"completions grew from {lengths[0]:.3g} to {lengths[-1]:.3g} tokens and earn no more"
    return found


def warnings(metrics: Metrics, summary: dict, config: dict) -> list[str]:
    """What a reader should know before any curve: nothing trained, no spread, collapse, unhealthy values."""
    steps, asked = summary.get("steps"), config.get("max_steps")
    found = []
    if steps == 0:
        found.append("Nothing was trained: the run made no update.")
    elif steps is not None and isinstance(asked, int) and 0 < steps < asked:
        found.append(f"The run ended after {steps} of {asked} updates.")
    results = [summary.get(key) or {} for key in ("before", "after")]
    if all(result.get("interval") for result in results) and results[1]["interval"][1] < results[0]["interval"][0]:
        (measure, start, unit), (_, end, _) = map(figure_of, results)
        if start is not None and end is not None:
            fall = f"from {unit.number(start)}{unit.sign} to {unit.number(end)}{unit.sign}"
            found.append(f"The held-out {measure} fell {fall}, by more than chance: lower the learning rate.")
    before, after = (result.get("coverage") or {} for result in results)
    for sampler in [name for name, scores in before.items() if isinstance(scores, dict) and name in after]:
        # The largest k stands last.
        k, (first, low, _) = list(before[sampler].items())[-1]
        last, _, high = after[sampler].get(k, (first, 0.0, 1.0))
        if last < low and high < first:
            found.append(f"Coverage fell: {k} ({sampler} sampler) was {first:.1%} and is {last:.1%}.")
    for name, words in (("grad_norm", "the gradient"), ("learning_rate", "the learning rate")):
        if metrics.get(name) and not any(value for _, value in metrics[name]):
            found.append(f"Nothing was learned: {words} was 0 at every update.")
    for column, points in metrics.items():
        metric = metric_of(column)
        if metric is None or (metric.least is None and metric.most is None):
            continue
        last = [value for _, value in points[-max(1, len(points) // 4) :]]
        # Faults count whenever they happened; other values as the run ended.
        value = max(value for _, value in points) if metric.most == 0 else statistics.fmean(last)
        if (metric.most is not None and value > metric.most) or (metric.least is not None and value < metric.least):
            found.append(
                f"{column} is {value:.3g} (healthy: {metric.healthy}): {metric.meaning}. To do: {metric.remedy}."
            )
    window = config.get("collapse_window") or 8
    rollouts = dict(metrics.get("reward", []))
    history = {name: [value for step, value in metrics.get(name, []) if step in rollouts] for name in WATCHED}
    # During the run too, not only at its end: what the guard would have told.
    num = len(history["reward"])
    collapses: dict[str, str] = {}
    for end in sorted({*range(window + 1, num, max(1, num // 20)), num}):
        for name, words in cliffs({key: values[:end] for key, values in history.items()}, window).items():
            collapses.setdefault(name, f"Collapse: {words} within {window} rollouts.")
    return [*found, *collapses.values()]
