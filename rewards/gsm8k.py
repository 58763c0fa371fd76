r"""GSM8K: 1.0 when the number in the answer equals the reference.

Rules, after `rewards.text` has found the answer:

- It is ASCII but for `−`, `€`, `£`, `°`, quotation marks, spaces that do not break and signs of no width: digits of
  other scripts and right-to-left controls are not read as numbers.
- `$`, `\$`, LaTeX's thin spaces (`\!`, `\,`) and `{,}` are notation: dropped, or read as the comma they stand for.
- Markdown around it (`**18**`, `` `18` ``) is dropped.
- A number is an optional sign, digits with or without correct thousands separators, and optional decimals: `18`, `-7`,
  `1,234.50`, `+3`. It ends where neither letter nor digit follows: `1e3`, `0x12` and `7th` are not numbers.
- The answer holds exactly one number and no other digit (`18 m2`); two numbers are hedging or a calculation.
- Words around it are fine (`18 dollars`, `x = 18.`, `20%`); an operator or `<`, `>`, `~` beside it (`- 18`, `<18`) is
  not.
- Equality is exact, by decimal value: `18.0` is 18, `17.999` is not.

The reference may be a number or a string, with thousands separators or not, or GSM8K's raw solution that ends in
`#### 18`.
"""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from rewards.text import Completion, completion_text, short_answer, without_markdown

NUMBER = re.compile(r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w]|[.,]\d)", re.ASCII)
BESIDE_AN_OPERATOR = re.compile(r"[-+*/^<>~]\s*#|#\s*[-+*/^<>~]")
SIGNS = str.maketrans({"−": "-", "€": "", "£": "", "°": " ", "“": '"', "”": '"'})
INTEGER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)", re.ASCII)


def to_decimal(number: object) -> Decimal | None:
    """The exact value of a reference or of a matched number; None when it is none, or not finite."""
    try:
        value = Decimal(str(number).rpartition("####")[2].replace(",", "").replace("$", "").strip())
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def read_number(answer: str | None) -> Decimal | None:
    """The value that the answer states; None when it states none by the rules."""
    plain = "" if answer is None else without_markdown(answer).translate(SIGNS)
    if not plain or not plain.isascii():
        return None
    plain = plain.replace("{,}", ",").replace("\\!", "").replace("\\,", "").replace("\\$", "").replace("$", "")
    around = NUMBER.sub("#", plain.replace("#", " "))
    if around.count("#") != 1 or re.search(r"\d", around) or BESIDE_AN_OPERATOR.search(around):
        return None
    return to_decimal(NUMBER.findall(plain)[0])


def correctness_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1.0 where the answer states the reference's value, 0.0 where not, None where the reference is no number."""
    golds = [to_decimal(gold) for gold in answer]
    found = [read_number(short_answer(completion_text(completion))) for completion in completions]
    return [None if gold is None else float(gold == value) for gold, value in zip(golds, found, strict=True)]


def integer_reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    """1.0 where the answer is one integer and nothing else (`-3` and `1,234` are), right or wrong; else 0.0."""
    answers = [short_answer(completion_text(completion)) for completion in completions]
    return [float(answer is not None and INTEGER.fullmatch(answer) is not None) for answer in answers]
