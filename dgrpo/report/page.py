"""Self-contained web pages: a template, its style, its script and its data in one file that needs no network."""

import json
import os
from html import escape
from importlib.resources import files
from pathlib import Path

TEMPLATES = files("dgrpo.report") / "templates"
SCRIPTS = {"player": ["player.js"], "report": ["report.js", "report_table.js"]}


def write_page(path: str | Path, name: str, title: str, data: dict) -> Path:
    """Write the page `name`, made of all templates of that name, over `data`; a reader never meets half a file."""
    # A "<" inside the data could end the script element that holds it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "{{title}}": escape(title),
        "{{style}}": (TEMPLATES / "page.css").read_text("utf-8") + (TEMPLATES / f"{name}.css").read_text("utf-8"),
        "{{script}}": "".join((TEMPLATES / script).read_text("utf-8") for script in SCRIPTS[name]),
        "{{data}}": text,
    }
    page = (TEMPLATES / f"{name}.html").read_text("utf-8")
    # The data comes last: a marker that a model wrote is then never filled in.
    for marker, part in parts.items():
        page = page.replace(marker, part)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(page, "utf-8", errors="replace")
    os.replace(unfinished, path)
    return path
