"""Text for people: what a terminal can show, and seconds in words."""

import re

# What a model writes may hold terminal commands, and marks that turn the reading direction round.
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with characters that would steer a terminal or turn the line round made visible."""
    return _UNPRINTABLE.sub(lambda match: "    " if match[0] == "\t" else "\ufffd", text)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 5 h 07 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
