"""What a completion says, and the answer in it: the one place where all tasks read model text.

The format that models are asked for is d1's:

    <reasoning>
    ...
    </reasoning>
    <answer>
    ...
    </answer>

The answer is what stands in the one `<answer>` block. There is no answer when a tag of the answer is missing (the text
was cut off), misspelt or repeated, when a reasoning tag is repeated or comes after `<answer>` (nested blocks), or when
the block is blank. Two blocks are no answer rather than the last of them: whoever echoes the prompt's template or
offers several answers has not answered. Where the reasoning is not closed or not there, the answer still counts: the
format has its own reward. Text after `</answer>` is not read.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

# No answer of these tasks is longer; a bound keeps every rule below cheap on 100 kB of text.
MAX_ANSWER_CHARS = 500

BOXED = "\\boxed{"

# Bold, italics and code around words or numbers; not the operators `*` and `**`, which stand between them.
EMPHASIS = re.compile(
    r"(?<![\w)}*])(\*{1,3})(?=[^\s*])([^*]+)(?<=\S)\1(?![\w({*\\])|(?<!\w)(__)(?=\S)([^_]+)(?<=\S)__(?!\w)"
)
# The same around a whole answer, where nothing else can be meant: with spaces within, or operators.
WRAPPED = re.compile(r"(\*{1,3}|__)(?![*_])((?:(?!\1).)+)\1\.?", re.DOTALL)
# Signs that are not seen, and spaces that do not break a line.
UNSEEN = str.maketrans(dict.fromkeys("\u200b\u200c\u2060\ufeff") | dict.fromkeys("\u00a0\u2009\u202f", " "))
# A narrow space between groups of three digits; marks that something was checked; tags around words or numbers.
NARROW = re.compile(r"(?<=\d)[\u2009\u202f](?=\d{3}(?!\d))")
CHECKED = re.compile(r"\s*[✓✔✅☑∎■]\ufe0f?\s*$")
TAGGED = re.compile(r"<(b|strong|i|em|u|p|center)>(.*?)</\1>", re.DOTALL)
FENCE = re.compile(r"```(?:latex|tex|math|text)?[ \t]*\n|`")


def completion_text(completion: Completion) -> str:
    """The text of one completion, given as a string or as a list of messages (the first one's `content`)."""
    text = completion if isinstance(completion, str) else completion[0].get("content") if completion else ""
    return text if isinstance(text, str) else ""


def answer_block(text: str) -> str | None:
    """What stands in the only `<answer>` block, stripped; None when there is no such block (see the module)."""
    reasoning, end_of_reasoning, start, end = TAGS
    if text.count(start) != 1 or text.count(end) != 1 or text.count(reasoning) > 1 or text.count(end_of_reasoning) > 1:
        return None
    opened, closed = text.index(start), text.index(end)
    if closed < opened or text.rfind(reasoning) > opened or text.rfind(end_of_reasoning) > opened:
        return None
    return text[opened + len(start) : closed].strip() or None


def unwrapped(text: str) -> str:
    """The text without code marks, unseen signs, and what Markdown puts around the whole of it."""
    text = TAGGED.sub(r"\2", CHECKED.sub("", NARROW.sub("", text)))
    text = FENCE.sub("", text.translate(UNSEEN)).strip()
    match = WRAPPED.fullmatch(text)
    return match[2].strip() if match else text


def without_markdown(text: str) -> str:
    """The text without Markdown's bold, italics and code: `**73**`, `*73*`, `__73__`, `` `73` `` are 73."""
    return EMPHASIS.sub(lambda match: match[2] or match[4], unwrapped(text))


def boxed_contents(text: str) -> list[str] | None:
    r"""The contents of every outermost `\boxed{...}`, in order; None when a brace is left open."""
    contents = []
    start = text.find(BOXED)
    while start >= 0:
        begin = start + len(BOXED)
        depth, end = 1, begin
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:
            return None
        contents.append(text[begin : end - 1].strip())
        start = text.find(BOXED, end)
    return contents


def short_answer(text: str) -> str | None:
    r"""The answer of one completion's text: its `<answer>` block, or what the block's one `\boxed{...}` holds.

    None when there is no answer block, when it is longer than `MAX_ANSWER_CHARS`, when a box is left open or empty, or
    when several boxes do not all hold the same text.
    """
    block = answer_block(text)
    if block is None or len(block) > MAX_ANSWER_CHARS:
        return None
    boxes = boxed_contents(block)
    if boxes is None or len(set(boxes)) > 1:
        return None
    if not boxes:
        return block
    inner = boxed_contents(boxes[0])
    while inner and boxes[0] == f"{BOXED}{inner[0]}}}":
        boxes, inner = inner, boxed_contents(inner[0])
    return boxes[0] or None
