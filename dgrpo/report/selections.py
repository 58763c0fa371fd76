"""Which completions of a run to read: where the policy does well, fails, has changed, or is paid for a wrong thing."""

from collections.abc import Sequence
from itertools import groupby

from dgrpo.report.run_folder import Completion
from rewards.format import has_format

# (completion, an earlier one for the same prompt to compare with, change of the prompt's mean reward between them)
Row = tuple[Completion, Completion | None, float | None]


def best(completions: Sequence[Completion], limit: int) -> list[Row]:
    """Highest total reward; of equals the latest, each text once."""
    return _distinct(sorted(completions, key=lambda c: (-c.total, -c.step)), limit)


def worst(completions: Sequence[Completion], limit: int) -> list[Row]:
    """Lowest total reward; of equals the latest, each text once."""
    return _distinct(sorted(completions, key=lambda c: (c.total, -c.step)), limit)


def most_changed(completions: Sequence[Completion], limit: int) -> list[Row]:
    """Prompts whose mean reward moved most from the first to the last step that sampled them.

    Of each group the completion with the reward nearest to the group's mean speaks for it.
    """
    rows: list[Row] = []
    by_prompt = sorted(completions, key=lambda c: (c.prompt, c.step))
    for _, same_prompt in groupby(by_prompt, key=lambda c: c.prompt):
        groups = [list(group) for _, group in groupby(same_prompt, key=lambda c: c.step)]
        if len(groups) < 2:
            continue
        (first, mean_first), (last, mean_last) = _typical(groups[0]), _typical(groups[-1])
        rows.append((last, first, mean_last - mean_first))
    return sorted(rows, key=lambda row: -abs(row[2] or 0.0))[:limit]


def paid_without_format(completions: Sequence[Completion], limit: int) -> list[Row]:
    """Highest reward, without that for format, among completions in the wrong format: where reward hacking shows.

    The format is judged by the reward with "format" in its name. Without one it is `rewards.format.has_format`, and
    the view is empty if no completion of the run ever has that format: the task then asks for another.
    """
    judge = next((name for c in completions for name in c.rewards if "format" in name), None)
    if judge is not None:
        full = max((c.rewards.get(judge) or 0.0 for c in completions), default=0.0)
        wrong = [c for c in completions if (c.rewards.get(judge) or 0.0) < full]
    else:
        wrong = [c for c in completions if not has_format(c.text)]
        wrong = wrong if len(wrong) < len(completions) else []

    def other_rewards(completion: Completion) -> float:
        return sum(value or 0.0 for name, value in completion.rewards.items() if name != judge)

    paid = [c for c in wrong if other_rewards(c) > 0]
    return _distinct(sorted(paid, key=lambda c: (-other_rewards(c), -c.step)), limit)


def evenly_spaced(completions: Sequence[Completion], limit: int) -> list[Row]:
    """At most `limit` completions, evenly spaced over the run, the first and the last among them."""
    if len(completions) > limit:
        completions = [completions[round(i * (len(completions) - 1) / (limit - 1))] for i in range(limit)]
    return [(completion, None, None) for completion in completions]


def groups(completions: Sequence[Completion], limit: int) -> list[Row]:
    """Whole groups, evenly spaced over the run, of at most `limit` completions together; highest reward first.

    A group is the completions of one prompt at one step. Groups with spread are preferred: only these teach anything.
    """
    by_group = sorted(completions, key=lambda c: (c.step, c.prompt, -c.total))
    whole = [list(group) for _, group in groupby(by_group, key=lambda c: (c.step, c.prompt))]
    whole = [group for group in whole if len(group) > 1]
    whole = [group for group in whole if len({c.total for c in group}) > 1] or whole
    if not whole:
        return []
    number = max(1, min(len(whole), limit // max(map(len, whole))))
    picked = [whole[round(i * (len(whole) - 1) / max(1, number - 1))] for i in range(number)]
    return [(completion, None, None) for group in picked for completion in group]


def _distinct(completions: Sequence[Completion], limit: int) -> list[Row]:
    kept: dict[tuple[str, str], Completion] = {}
    for completion in completions:
        kept.setdefault((completion.prompt, completion.text), completion)
        if len(kept) == limit:
            break
    return [(completion, None, None) for completion in kept.values()]


def _typical(group: Sequence[Completion]) -> tuple[Completion, float]:
    mean = sum(c.total for c in group) / len(group)
    return min(group, key=lambda c: abs(c.total - mean)), mean
