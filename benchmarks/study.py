"""What the studies share: how they are called. What they do, many short runs side by side, is `dgrpo.run.study`."""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in settings.items()]


def study_parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The command line of every study."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / name)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    return parser


def one_thread() -> None:
    """The settings of every study: one thread, no network, no warnings."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)
