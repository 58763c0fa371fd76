"""Format rewards: whether a completion keeps the layout of `rewards.text`, whatever it says."""

from collections.abc import Sequence
from typing import Any

from rewards.text import TAGS, Completion, completion_text

# An end of text that wanders on loses at most one tag's worth, so rambling can never cost more than being wrong does.
TAG_SHARE = 1 / len(TAGS)
TRAILING_CHARS_FOR_FULL_COST = 1000


def has_format(text: str) -> bool:
    """Whether the text is one reasoning block, then one answer block, neither blank, with only white space around.

    The bodies may have any number of lines; a tag inside a body breaks the format.
    """
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    before, rest = text.split(TAGS[0])
    if TAGS[1] not in rest:
        return False
    reasoning, rest = rest.split(TAGS[1])
    if TAGS[2] not in rest:
        return False
    between, rest = rest.split(TAGS[2])
    if TAGS[3] not in rest:
        return False
    answer, after = rest.split(TAGS[3])
    return not (before.strip() or between.strip() or after.strip()) and bool(reasoning.strip() and answer.strip())


def structure_share(text: str) -> float:
    """A quarter for each tag that stands exactly once and after those before it, less up to a quarter for a tail.

    The tail is the text after `</answer>`, stripped: a thousand characters of it, or more, cost the whole quarter.
    """
    placed, end = 0, 0
    for tag in TAGS:
        position = text.find(tag, end)
        if position >= 0 and text.count(tag) == 1:
            placed, end = placed + 1, position + len(tag)
    tail = len(text.rpartition(TAGS[-1])[2].strip()) if TAGS[-1] in text else 0
    cost = TAG_SHARE * min(tail / TRAILING_CHARS_FOR_FULL_COST, 1.0)
    return max(TAG_SHARE * placed - cost, 0.0)


def format_reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    """1.0 where the completion is exactly one reasoning block, then one answer block; else 0.0."""
    return [float(has_format(completion_text(completion))) for completion in completions]


def xml_structure_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
) -> list[float | None]:
    """The share of correctly placed tags in [0, 1], less at most a quarter for text after the answer."""
    return [structure_share(completion_text(completion)) for completion in completions]
