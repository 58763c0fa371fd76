"""Where rows come from: a file, a dataset of the hub or on the disk, a part of one, or several of them.

rows.csv        rows.jsonl@train[:1000]        openai/gsm8k:main@train[:50%]        rows.csv + openai/gsm8k:main
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet
from datasets import Dataset, ReadInstruction, interleave_datasets, load_dataset, load_from_disk

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """One place of rows."""

    name: str
    config: str | None = None
    split: str | None = None  # as `datasets` writes it, slices too

    @property
    def is_file(self) -> bool:
        return Path(self.name).suffix.lower() in SUFFIXES


def sources_of(text: str) -> list[Source]:
    """The sources that a setting names: `NAME`, `NAME:CONFIG` or `NAME:CONFIG@SPLIT`, several joined by ` + `."""
    return [_source(part.strip()) for part in text.split(" + ")]


def _source(text: str) -> Source:
    if Path(text).exists():
        return Source(text)
    name, _, split = text.partition("@")
    before, colon, config = name.rpartition(":")
    if colon and before and "/" not in config and not Path(name).exists():
        return Source(before, config, split or None)
    return Source(name, None, split or None)


def has_splits(text: str) -> bool:
    """Whether this is one dataset with its own splits, rather than files, a part of one, or several."""
    first, *others = sources_of(text)
    return not (others or first.is_file or first.split)


def read_rows(
    text: str,
    split: str,
    config: str | None = None,
    *,
    weights: Sequence[float] | None = None,
    first: int | None = None,
    seed: int = 0,
) -> Rows:
    """The rows of a source, or of several one after the other.

    Args:
        text: see `sources_of`.
        split: what is read of a dataset where the source names no split.
        config: of a dataset where the source names none.
        weights: mixes several sources in these shares until the first of them is used up.
        first: only so many rows of each source are read; a dataset of the hub is then streamed, not downloaded.
        seed: of the mixture.

    Raises:
        ValueError: a file is missing, damaged (by line, where it has lines), empty or of another kind; a dataset has
            no such configuration or split.
    """
    sources = sources_of(text)
    if weights is not None and (len(weights) != len(sources) or min(weights) <= 0):
        raise ValueError(
            f"dataset_weights={list(weights)}: give a positive number for each of the {len(sources)} sources of "
            f"dataset={text!r}."
        )
    parts = [_read(source, split, config, first) for source in sources]
    if len(parts) == 1:
        return parts[0]
    places = [Dataset.from_dict({"part": [k] * len(rows), "row": range(len(rows))}) for k, rows in enumerate(parts)]
    if weights is not None:
        shares = [weight / sum(weights) for weight in weights]
        order = list(interleave_datasets(places, shares, seed=seed))
    else:
        order = [place for each in places for place in each]
    names = dict.fromkeys(name for rows in parts for name in rows[0])
    return [dict.fromkeys(names) | parts[place["part"]][place["row"]] for place in order]


def _read(source: Source, split: str, config: str | None, first: int | None) -> Rows:
    if source.is_file:
        rows = _file_rows(source.name)
        if source.split:
            rows = _sliced(source, rows)
        return rows[:first]
    path, split, config = Path(source.name), source.split or split, source.config or config
    if path.is_file():
        raise ValueError(
            f"dataset={source.name!r}: no {path.suffix or 'such'} files are read; {', '.join(SUFFIXES)} are."
        )
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            stored = load_from_disk(source.name)
            rows = list(stored if isinstance(stored, Dataset) else stored[split])[:first]
        elif first is not None:
            rows = list(load_dataset(source.name, config, split=split, streaming=True).take(first))
        else:
            rows = list(load_dataset(source.name, config, split=split))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"dataset={source.name!r}: {' '.join(str(error).split())} (read: configuration {config!r}, split "
            f"{split!r}; NAME:CONFIG@SPLIT names others{', no slices where rows are streamed' if first else ''})."
        ) from error
    if not rows:
        raise ValueError(f"dataset={source.name!r}: split {split!r} has no rows.")
    return rows


def _sliced(source: Source, rows: Rows) -> Rows:
    """The part of a file's rows, which are one split called train, that the source's split names."""
    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"dataset='{source.name}@{source.split}': {' '.join(str(error).split())} A file is one split, called "
            "train: write train[:1000] or train[90%:]."
        ) from error
    chosen = [row for part in parts for row in rows[part.from_ : part.to]]
    if not chosen:
        raise ValueError(f"dataset='{source.name}@{source.split}': none of the file's {len(rows)} rows.")
    return chosen


def _file_rows(file: str) -> Rows:
    """The rows of a local file."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"dataset={file!r}: there is no such file.")
    rows: Any
    try:
        if path.suffix.lower() == ".csv":
            rows = _csv_rows(path)
        elif path.suffix.lower() == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            rows = json_rows(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset={file!r}: the file is not in UTF-8 ({error}); save it in that encoding.") from error
    except (ValueError, pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise ValueError(f"dataset={file!r}: the file cannot be read: {reason}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"dataset={file!r}: must be rows of named fields, at least one.")
    return rows  # type: ignore[no-any-return]


def _csv_rows(path: Path) -> Rows:
    """The rows of a file with commas between its fields, or semicolons or tabs where its header has no comma."""
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline()
    divider = "," if "," in header else next((each for each in ";\t" if each in header), ",")
    # Digits such as "0102" are text: nothing may be read as a number on the way.
    rows: Rows = pd.read_csv(path, sep=divider, dtype=str, keep_default_na=False).to_dict("records")
    return rows


def json_rows(text: str) -> list[Any]:
    """The rows of one JSON list, or of an object on each line."""
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is no JSON object ({error.msg}, column {error.colno}).") from error
    return rows
