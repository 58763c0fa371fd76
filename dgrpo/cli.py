"""The recipes under short names: `dgrpo train gsm8k` runs recipes/gsm8k.py as `python recipes/gsm8k.py` would."""

import argparse
import contextlib
import json
import math
import os
import runpy
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from dgrpo.secrets import without_secrets

_PACKAGE = Path(__file__).parent
# Beside the package in a checkout, within it in a wheel.
RECIPES = next(folder for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if folder.is_dir())

# From the folder, not from the tasks: `dgrpo --help` should not import them.
TRAINABLE = [file.stem for file in sorted(RECIPES.glob("*.py")) if file.stem not in ("evaluate", "merge")]

# Those that are trained by rewards, and so can be evaluated and compared.
STUDIED = [name for name in TRAINABLE if name not in ("sft", "vrpo")]

PROTOCOLS = ("strict", "d1")
REMASKING = ("low_confidence", "random", "entropy", "topk_margin", "sequential")
DTYPES = ("float32", "bfloat16", "float16")

# How long the other processes of a machine leave it to the first one to say what is wrong.
SECONDS_FOR_THE_FIRST = 10.0

# GPUs that `dgrpo plan` knows: memory in GB and dense bfloat16 TFLOP/s, from the makers' data sheets.
CARDS = {
    "h200": (141, 989),
    "h100": (80, 989),
    "a100-80": (80, 312),
    "a100-40": (40, 312),
    "l40s": (48, 362),
    "a6000": (48, 155),
    "rtx4090": (24, 165),
    "rtx3090": (24, 71),
}


class Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line; the usage is in --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`.\n")


def whole(text: str, least: int = 1, most: float = math.inf) -> int:
    """The type of an argument: a whole number of at least 1."""
    with contextlib.suppress(ValueError):
        if least <= int(text) <= most:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")


def seed(text: str) -> int:
    """The type of an argument: a seed."""
    return whole(text, 0, 2**32 - 1)


def positive_number(text: str) -> float:
    """The type of an argument: a number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def mapping(text: str) -> dict[str, Any]:
    """The type of an argument: a mapping as JSON."""
    with contextlib.suppress(json.JSONDecodeError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise argparse.ArgumentTypeError(f"{text!r} is no mapping in JSON, such as '{{\"a\": 1}}'")


def named(text: str) -> str:
    """The type of an argument: a name, a file or a folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name one, or leave the argument out")
    return text


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user got wrong ends the block, and the process, in one line, printed by one process of each machine.

    A launcher of several processes (`accelerate launch`, torchrun) then adds its own report of which process failed.

    Inside, no character that the console's encoding lacks is an error.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a TextIOWrapper, mostly
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        # Ours name the setting and the remedy, so the message is enough; of others one wants to know from where, but
        # for packages, files and hubs that are not there.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        ours = any(raised_in.is_relative_to(folder.resolve()) for folder in (_PACKAGE, RECIPES))
        if not ours and not isinstance(error, OSError | ImportError):
            raise
        message = " ".join(without_secrets(str(error)).split())
        if isinstance(error, ModuleNotFoundError) and error.name:
            message += f": pip install the package that has {error.name.partition('.')[0]!r}."
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Where the first process has the same error, the launcher ends this one meanwhile.
            time.sleep(SECONDS_FOR_THE_FIRST)
        sys.exit(f"dgrpo: {message}")


def print_help(recipe: str, words: list[str]) -> bool:
    """Prints the help of a training recipe where the words ask for it: without importing it, which takes seconds."""
    asked = next((word for word in words if word in ("-h", "--help", "--help-all", "--help_all")), None)
    if asked is None or recipe not in TRAINABLE:
        return False
    folder, ending = _PACKAGE / "run" / "help", "_all.txt" if asked.endswith("all") else ".txt"
    own = folder / f"{recipe}{ending}"
    sys.stdout.write((own if own.is_file() else folder / f"train{ending}").read_text())
    return True


def run_recipe(name: str, words: list[str]) -> None:
    """Runs a recipe's file with these words as its command line."""
    if print_help(name, words):
        return
    # Rewards and estimators of one's own are looked for where one stands, as `python -m` does; last, so that no file
    # there hides a module of somebody else's.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    sys.argv = [f"dgrpo {name}", *found_files(words)]
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")


def found_files(words: list[str]) -> list[str]:
    """The words, with `--config` and `--preset` files that are not here taken from the recipes' folder by name."""
    found = list(words)
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in ("--config", "--preset"):
            continue
        if equals:
            found[index] = f"{name}={found_file(name, value)}"
        elif index + 1 < len(words):
            found[index + 1] = found_file(name, words[index + 1])
    return found


def found_file(option: str, value: str) -> str:
    """The file itself, or that of this name, with or without `.yaml`, among the recipes (`--preset`: the presets)."""
    folder = RECIPES / "presets" if option == "--preset" else RECIPES
    places = (Path(value), folder / value, folder / f"{value}.yaml")
    for place in places:
        if place.is_file():
            return str(place)
    offered = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(f"{option.lstrip('-')}={value!r}: there is no such file here, nor among the recipes ({offered}).")
