"""Completions of prompts from a file: JSON lines in the order of the prompts, continued where a run was cut off."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dgrpo.evaluation.answers import as_in_training, encode_prompts, read_completions
from dgrpo.evaluation.files import digest
from dgrpo.noise import row_keys
from dgrpo.sampling import SamplerConfig, end_token_ids, generate
from dgrpo.tasks.columns import PromptColumns
from dgrpo.tasks.sources import Rows, json_rows, read_rows, sources_of

Record = dict[str, Any]


def prompt_rows(source: str) -> Rows:
    """Rows with a prompt: those of a dataset (`dgrpo.tasks.sources`); of any other file, or of standard input ("-"),
    its JSON lines, or each line that is not blank as a prompt.

    Raises:
        ValueError: there is no such file, it cannot be read, or it holds no prompt.
    """
    if source != "-" and (not Path(source).is_file() or sources_of(source)[0].is_file):
        return read_rows(source, "train")
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text("utf-8-sig")
        is_json = text.lstrip().startswith(("{", "["))
        rows = json_rows(text) if is_json else [{"prompt": line} for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"prompts={source!r}: the file cannot be read: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"prompts={source!r}: give a prompt on each line, or JSON objects with a prompt or messages.")
    return rows


class Output:
    """Where records go as they are finished: standard output, or a file that a later run can continue.

    What a file's records were made with is beside it, in `FILE.settings.json`.
    """

    def __init__(self, path: str | None, settings: dict[str, Any], *, resume: bool = False):
        self.path, self.done = Path(path) if path else None, set[tuple[int, int]]()
        if self.path is None:
            if resume:
                raise ValueError("resume: only a file can be continued; name it with --output.")
            return
        self.beside = self.path.with_name(f"{self.path.name}.settings.json")
        self.settings = settings = json.loads(json.dumps(settings, default=str))
        if resume and self.path.exists():
            made_with = json.loads(self.beside.read_text()) if self.beside.is_file() else {}
            if other := sorted(key for key in settings if made_with.get(key) != settings[key]):
                raise ValueError(
                    f"resume: {str(self.path)!r} was written with other settings ({', '.join(other)}). Choose another "
                    "file, or the settings that it was begun with."
                )
            # Without a last line that was cut off.
            lines = [line for line in self.path.read_text("utf-8").splitlines(keepends=True) if line.endswith("}\n")]
            self.path.write_text("".join(lines), "utf-8")
            self.done = {(record["row"], record["sample"]) for record in map(json.loads, lines)}
        elif self.path.exists():
            raise ValueError(f"output={str(self.path)!r} exists: continue it with --resume, or choose another file.")

    def add(self, records: list[Record]) -> None:
        """Writes the records that are not there yet."""
        new = [each for each in records if (each["row"], each["sample"]) not in self.done]
        text = "".join(json.dumps(each, ensure_ascii=False, default=str) + "\n" for each in new)
        if self.path is None:
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.beside.write_text(json.dumps(self.settings, indent=1) + "\n")
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)


def complete(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    columns: PromptColumns,
    config: SamplerConfig,
    output: Output,
    *,
    num_samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    template_settings: dict[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """Answers each row's prompt `num_samples` times, in batches, and hands the records to `output`.

    A record has the row's fields and "row" (its number, from 0), "sample", "prompt" as the model got it, "completion",
    "num_tokens" (up to and with the end of text) and "ended" (False where the canvas was too short for an end). The
    noise of a completion is a function of (seed, row, sample).

    Args:
        columns: how a row becomes a prompt; an assistant's message at its end is not shown to the model.
        output: what it holds already is not sampled again, but for the rest of a batch.
        on_batch: called with the number of completions of each batch.
    """
    prompts = [columns.prompt_of(row) for row in rows]
    pairs = [(row, sample) for row in range(len(rows)) for sample in range(num_samples)]
    device = model.get_input_embeddings().weight.device
    with as_in_training(model):
        for first in range(0, len(pairs), batch_size):
            batch = pairs[first : first + batch_size]
            if not output.done.issuperset(batch):
                asked = [prompts[row] for row, _ in batch]
                prompt_ids, prompt_mask = encode_prompts(tokenizer, asked, device, template_settings)
                # One number for each pair, whatever the number of samples.
                numbers = torch.tensor([row + (sample << 32) for row, sample in batch])
                keys = row_keys(numbers, "generate", seed)
                rollout = generate(model, prompt_ids, prompt_mask, config, row_keys=keys)
                texts, ended = read_completions(rollout, tokenizer, end_token_ids(model))
                lengths = rollout.completion_mask.sum(1).tolist()
                output.add(
                    [
                        {
                            **rows[row],
                            **{"row": row, "sample": sample, "prompt": prompts[row], "completion": text},
                            **{"num_tokens": length, "ended": end},
                        }
                        for (row, sample), text, length, end in zip(batch, texts, lengths, ended, strict=True)
                    ]
                )
            if on_batch is not None:
                on_batch(len(batch))


def output_settings(rows: Rows, **settings: Any) -> dict[str, Any]:
    """What must be equal for an output to be continued."""
    return {"rows": digest(rows), **settings}
