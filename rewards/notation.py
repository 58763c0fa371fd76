r"""What people write around mathematics and how differently they write the same, brought into one spelling.

`bare(answer)` takes off what stands around an answer: Markdown, `$`, `\( \)`, `\[ \]`, words such as "The answer is".
`plain_latex(text)` brings Unicode signs, spaces, thousands separators and spellings of one thing into one LaTeX.
`plain_number(text)` reads a number with or without a unit, exactly. Nothing is calculated here but mixed numbers.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from rewards.text import without_markdown

MATHS = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|(?<!\\)\\\((.+?)(?<!\\)\\\)|(?<!\\)\\\[(.+?)(?<!\\)\\\]", re.DOTALL
)
# Prose around a formula; and the words before a bare answer: "The final answer is", "Answer:", "So we get x as".
PROSE = re.compile(r"[A-Za-z\s.,;:!'’()-]*")
INTRODUCTION = re.compile(
    r"\s*[A-Za-z][A-Za-z\s,'’-]*?(?:\b(?:is|are|was|be|equals?)\b(?:\s+(?:equal\s+)?to\b)?\s*:?|:)\s*"
)
# Words that take back, or leave open, what stands beside them.
RESERVATION = re.compile(
    r"\b(?:not|never|neither|nor|no|cannot|wrong|incorrect|except|than|most|least|about|approximately|roughly|either)\b"
    r"|n['’]t\b",
    re.IGNORECASE,
)
CONJUNCTION = re.compile(r"[\s,;]*(?:\band\b|\bor\b|,|;)[\s,;]*")

# What frames a whole answer and says nothing: marks of headings and quotations, arrows, sizes and spaces before and
# behind it; quotes and environments around it; commands of emphasis and braces, whose end is looked for.
BEFORE = re.compile(
    r"(?:#{1,6}\s+|>\s+(?=[$\\*#])|[=:⇒∴→]\s*|\\(?:Rightarrow|Longrightarrow|implies|therefore|displaystyle|textstyle"
    r"|small|normalsize|large|Large|LARGE|huge|Huge|bf|q?quad)(?![A-Za-z])\s*|\\[,;: ])+"
)
BEHIND = re.compile(r"(?:\s|\\q?quad(?![A-Za-z])|\\(?:blacksquare|checkmark)(?![A-Za-z]))+$")
AROUND = re.compile(
    r"\"(?P<quote>[^\"]*)\"|“(?P<curly>[^“”]*)”|_(?P<maths>\$.+\$|\\\(.+\\\))_"
    r"|\\begin\{((?:equation|align|gather|displaymath|math)\*?)\}\s*&?"
    r"(?P<lines>(?:(?!\\\\).)*|\\begin\{[bpv]?matrix\}.*\\end\{[bpv]?matrix\})(?:\\\\\s*)?\\end\{\4\}",
    re.DOTALL,
)
FRAME = re.compile(r"(?:\\(?:underline|fbox|ensuremath|mathbf|boldsymbol|bm|mathsf|mathit|textbf(?=\{[$\\\d]))\s*)?\{")


def unframed(text: str) -> str:
    """The answer without what frames the whole of it."""
    before = None
    while text != before:
        before = text
        text = BEHIND.sub("", BEFORE.sub("", text.strip(), count=1) if BEFORE.match(text.strip()) else text.strip())
        if around := AROUND.fullmatch(text):
            text = next(part for name, part in around.groupdict().items() if part is not None)
        if (frame := FRAME.match(text)) and text.endswith("}"):
            depth, end = 1, frame.end()
            while end < len(text) and depth:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            if end == len(text) and not depth:
                text = text[frame.end() : -1]
    return text


def bare(answer: str) -> str | None:
    r"""The answer without Markdown, delimiters of mathematics and prose around it; None where prose takes it back.

    Of prose around one formula, the formula counts; several formulas joined by commas, "and" or "or" are a list. What
    stands beside numbers, or between other formulas, is part of the answer.
    """
    text = without_markdown(re.sub(r"(?m)^#{1,6}\s+", "", answer)).strip()
    for _ in range(3):
        text = unframed(text)
        formulas = [next(filter(None, match.groups())).strip() for match in MATHS.finditer(text)]
        outside = MATHS.sub("\0", text)
        between = outside.split("\0")[1:-1]
        joined = all(CONJUNCTION.fullmatch(part) for part in between)
        if formulas and PROSE.fullmatch(outside.replace("\0", "")) and (joined or len(set(formulas)) == 1):
            if RESERVATION.search(outside):
                return None
            text = ", ".join(dict.fromkeys(formulas))
            continue
        text = MATHS.sub(lambda match: next(filter(None, match.groups())), text)
        introduction = INTRODUCTION.match(text)
        if introduction is None or introduction.end() == len(text):
            break
        if RESERVATION.search(introduction[0]):
            return None
        text = text[introduction.end() :]
    return unframed(text)


UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "‐": "-", "‑": "-", "×": r"\times ", "✕": r"\times ", "∗": "*", "·": r"\cdot ",
        "⋅": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "÷": r"\div ", "∕": "/", "⁄": "/", "±": r"\pm ", "∓": r"\mp ",
        "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
        "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "∑": r"\sum ",
        "∏": r"\prod ", "∫": r"\int ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
        "\u00a0": " ", "\u2009": r"\,", "\u202f": r"\,", "\u2002": " ", "\u2003": " ", "\u200b": "", "\ufeff": "",
        "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
        "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}",
        "⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}",
        "€": "", "£": "",
    }
)  # fmt: skip
RAISED, LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎"
SCRIPT = str.maketrans(RAISED + LOWERED, "0123456789+-()ni" + "0123456789+-()")

ORDER = {"leq": r"\le ", "geq": r"\ge ", "neq": r"\ne ", "varnothing": r"\emptyset "}
SPELLINGS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(rf"[{RAISED}]+"), lambda match: f"^{{{match[0].translate(SCRIPT)}}}"),
    (re.compile(rf"[{LOWERED}]+"), lambda match: f"_{{{match[0].translate(SCRIPT)}}}"),
    (re.compile(r"^\s*\\(?:text|mbox|mathrm)\s*\{\s*(-?[\d.,]*\d)\s*\}\s*$"), r"\1"),
    (re.compile(r"\\\\\s*$"), ""),
    (re.compile(r"√\s*(\d+|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√"), r"\\sqrt "),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\(?:lbrace|rbrace)(?![A-Za-z])"), lambda match: r"\{" if match[0] == r"\lbrace" else r"\}"),
    (re.compile(r"\\(leq|geq|neq|varnothing)(?![A-Za-z])"), lambda match: ORDER[match[1]]),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:mathbf|boldsymbol|bm|mathsf|mathit)\s*\{([^{}]*)\}"), r"\1"),
    # A space of LaTeX's between groups of three digits, and a comma that is protected from being a list's.
    (re.compile(r"(?<=\d)(?:,\\!\s*|\{,\}(?:\\!)?|(?<!\\)\\[,; ]|~)(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\{\s*,\s*\}"), ","),
    (re.compile(r"(?<!\\)\\!"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\(?:q?quad|thinspace|enspace)(?![A-Za-z])"), " "),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?"), r"^\\circ "),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"\\\$|\$"), ""),
    (re.compile(r"\\%|%"), r"\\%"),
    (re.compile(r"(?<=[\d}])\s*(?:\\text\s*\{\s*per\s?cent\s*\}|\bper\s?cent\b)"), r"\\%"),
    (re.compile(r"^\s*(-?)\s*\(\s*(\d+\s*/\s*\d+|\\frac\s*\{\d+\}\s*\{\d+\})\s*\)\s*$"), r"\1\2"),
    # White space only where it tells two words or numbers apart.
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])"), ""),
]  # fmt: skip
THOUSANDS = re.compile(r"(?<![\d.,])(?:\d{1,3}(?:,\d{3})+|\d{2,3}(?: \d{3})+)(?![\d]|,\d| \d)")


def plain_latex(text: str) -> str:
    """The text in one spelling of LaTeX; equal results mean equal answers, different ones mean nothing yet."""
    text = text.translate(UNICODE)
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    text = text.strip(" .,;")
    while text.startswith("{") and text.endswith("}") and "}" not in text[:-1]:
        text = text[1:-1].strip(" .,;")
    return "".join(
        THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), part) if depth == 0 else part
        for depth, part in by_depth(text)
    )


def by_depth(text: str) -> list[tuple[int, str]]:
    r"""The text in pieces, each with the number of brackets `(`, `[`, `\{`, `{` that it stands in."""
    pieces, depth, start = [], 0, 0
    for index, sign in enumerate(text):
        if sign in "([{":
            pieces.append((depth, text[start:index]))
            depth, start = depth + 1, index
        elif sign in ")]}":
            pieces.append((depth, text[start : index + 1]))
            depth, start = max(depth - 1, 0), index + 1
    return [*pieces, (depth, text[start:])]


def elements(text: str) -> list[str]:
    """The parts of a list `2, -2`, split at commas and semicolons outside of brackets, `and` and `or`."""
    text = re.sub(r",?(?:\\text\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))", ",", text)
    parts = [""]
    for depth, piece in by_depth(text):
        first, *others = re.split("[,;]", piece) if depth == 0 else [piece]
        parts[-1] += first
        parts += others
    return [part.strip() for part in parts]


class Number(NamedTuple):
    """A number as it is written."""

    value: Fraction
    form: str
    """`integer`, `decimal`, `fraction` or `mixed`."""
    percent: bool
    places: int
    """Digits after the decimal point."""
    power: str = ""
    """Of the unit."""


# Of two letters: units; of three and more, any word that is no part of a calculation.
SHORT_UNITS = "cm|mm|km|dm|kg|mg|ml|mL|ft|in|yd|mi|lb|oz|hr|am|pm|Hz|kW|sq|cu"
LONE_UNITS = "m|g|s|h|L|F|C|J|N|W|V"
NO_UNITS = re.compile(
    r"\b(?:pi|sqrt|sin|cos|tan|cot|sec|csc|log|exp|times|plus|minus|over|divided|squared|cubed|factorial|choose|mod|modulo|base|or"
    r"|and|to|not|root|power|half|halves|thirds?|quarters?|fourths?|fifths?|tenths?|hundred|thousand|million|billion|trillion|dozen"
    r"|score|more|less|than|infinity|infty|theta|alpha|beta)s?\b",
    re.IGNORECASE,
)
POWER = r"(?:\^\{?-?\d\}?)?"
TEXT_UNIT = r"\\(?:text|mathrm|mbox|textrm|textit|textbf|rm)\s*\{[A-Za-z.,/ -]*\}" + POWER
WORDS = rf"(?:[A-Za-z]{{3,}}|{SHORT_UNITS}|{LONE_UNITS})"
WORD_UNIT = rf"(?:(?<=\d)(?:cm|mm|km|kg|ft|mph|mL|ml)|(?<![A-Za-z\d]){WORDS})\.?(?![A-Za-z]){POWER}"
UNIT = rf"(?:\^\\circ(?: ?[FC](?![A-Za-z]))?|(?:[ /]|\\cdot)?(?:{TEXT_UNIT}|{WORD_UNIT}))+"
LAST_UNIT = re.compile(rf"(?<=[\w}})])(?:(?:[ /]|(?<=}}))?(?:{TEXT_UNIT}|(?<![A-Za-z\d])(?:{SHORT_UNITS}){POWER}))+$")
NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?:(?P<whole>\d+)(?:(?P<space> ?)\\frac\{(?P<a>\d+)\}\{(?P<b>\d+)\}| (?P<c>\d+)/(?P<d>\d+))"
    r"|\\frac\{(?P<minus>-?)(?P<e>\d+)\}\{(?P<f>\d+)\}|(?P<g>\d+)/(?P<h>\d+)|(?P<decimal>\d+\.?\d*|\.\d+))"
    rf"(?P<percent>\\%)?(?P<unit>{UNIT})?",
    re.ASCII,
)


def plain_number(text: str) -> Number | None:
    r"""The number that stands alone or with its unit in plain LaTeX: `-7`, `1.50`, `\frac{5}{4}`, `1 1/4`, `20 miles`.

    None for anything else, so for whatever is to be calculated first; also for an improper mixed number.
    """
    match = NUMBER.fullmatch(text)
    if match is None or NO_UNITS.search(match["unit"] or ""):
        return None
    sign = -1 if (match["sign"] == "-") != (match["minus"] == "-") else 1
    percent, power = match["percent"] is not None, "".join(re.findall(r"-?\d", match["unit"] or ""))
    if match["decimal"] is not None:
        digits = match["decimal"]
        places = len(digits.partition(".")[2])
        return Number(
            sign * Fraction(digits.rstrip(".") or "0"), "decimal" if places else "integer", percent, places, power
        )
    above = int(match["a"] or match["c"] or match["e"] or match["g"])
    below = int(match["b"] or match["d"] or match["f"] or match["h"])
    if below == 0:
        return None
    if match["whole"] is None:
        return Number(sign * Fraction(above, below), "fraction", percent, 0, power)
    if above >= below:
        return None
    return Number(sign * (int(match["whole"]) + Fraction(above, below)), "mixed", percent, 0, power)


def without_unit(text: str) -> str:
    r"""A value of roots or letters without the unit at its end, as in `10\sqrt{2}\text{ cm}`."""
    return text if plain_number(text) else LAST_UNIT.sub("", text)


# A decimal stands for the fraction that it is the rounding of, if it has at least so many places.
MIN_PLACES = 6


def same_number(gold: Number, answer: Number) -> bool:
    """Whether two numbers are equal, exactly; 44% is 44 and 0.44; cm^2 is not cm^3."""
    if gold.power and answer.power and gold.power != answer.power:
        return False
    golds, answers = (
        {each.value, each.value / 100} if each.percent and not other.percent else {each.value}
        for each, other in ((gold, answer), (answer, gold))
    )
    if golds & answers:
        return True
    exact, rounded = (gold, answer) if answer.form == "decimal" else (answer, gold)
    if exact.form not in ("fraction", "mixed") or rounded.places < MIN_PLACES or exact.percent != rounded.percent:
        return False
    return round(exact.value, rounded.places) == rounded.value
