"""Adapters folded into their base model, written in the base's own layout, so that anybody's code loads the result.

Names, shards, precision, config.json, tokenizer and remote-code files are the base's own, byte for byte; only the
adapted weights differ. Adapters trained on 4-bit weights are folded into the full-precision ones.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from dgrpo.models.files import reading
from dgrpo.models.loading import adapter_settings, load_model, put_adapter
from dgrpo.run.card import run_of, write_card

_log = logging.getLogger(__name__)

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_INDEX = "model.safetensors.index.json"
# Weights, other copies of them, and what training leaves beside them.
_NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def merge_adapters(
    adapters: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
) -> Path:
    """The folder `output_dir` with the base model into which `adapters` are folded, one after the other.

    Links in the base's folder are followed within it and into the Hugging Face cache's `blobs`. Other companion files
    that are links are not copied, with a warning: they may point at anything. Weights are read wherever they lie.

    Args:
        adapters: Folders or hub names. Of several, each was trained on the base with those before it merged; an
            adapter from which another one was started is part of that one already. Without any: a copy of the base,
            equal in every bit.
        output_dir: A folder that is new or empty.
        base: By default the model that the first adapter names.
        revision: Of a base on the hub.
    """
    adapters = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if base is None:
        base = _base_of(adapters)
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output_dir={str(output)!r} is not an empty folder; choose another.")
    source = _local_folder(str(base), revision)
    with reading("base", base, "weights"):
        shards = _shards(source)
        stored = set().union(*(_stored_dtypes(source / shard) for shard in shards))
    if quantized := sorted(stored - set(_DTYPES)):
        raise ValueError(f"base={str(base)!r} is stored as {', '.join(quantized)}: name the full-precision weights.")
    # Weights of mixed precision go through float32 and come back unchanged.
    model: Any = load_model(source, _DTYPES[stored.pop()] if len(stored) == 1 else torch.float32)[0]
    tied = model.config.tie_word_embeddings
    for adapter in adapters:
        model = put_adapter(model, str(adapter), is_trainable=False).merge_and_unload(safe_merge=True)
        # PEFT turns this off where the adapter holds a head of its own; the file that is copied still says otherwise.
        model.config.tie_word_embeddings = tied
    _refuse_untied(model, str(base))
    weights = model.state_dict()
    output.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        _write_shard(source / shard, output / shard, weights)
    if (source / _INDEX).is_file():
        shutil.copyfile(source / _INDEX, output / _INDEX)
    copy_companions(source, output)
    if adapters and (run := run_of(adapters[-1])):
        # Instead of the base's own.
        write_card(run, output, merged=True)
    return output


def _base_of(adapters: list) -> str:
    """The model that the first adapter was trained on; ValueError if others were trained on the same."""
    if not adapters:
        raise ValueError("base=None: without an adapter, say which model to write.")
    base, *others = (adapter_settings(adapter).base_model_name_or_path for adapter in adapters)
    if base in others:
        again = str(adapters[1 + others.index(base)])
        raise ValueError(
            f"adapter {again!r} was trained on {base!r} itself, as {str(adapters[0])!r} was. If it went on from that "
            "one, it holds it already: fold it alone. If it was trained with the others folded in, give `base`."
        )
    return base  # type: ignore[return-value]  # PEFT writes it into every adapter


def _refuse_untied(model, base: str) -> None:
    """ValueError where the base stores one weight for embedding and head, and the adapters made two of it."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and not torch.equal(head, embedding):
        raise ValueError(
            f"base={base!r} has tie_word_embeddings=True, and with the adapters its head is no longer its embedding: "
            "the base's layout holds only one of them. Set ensure_weight_tying=True in the LoraConfig, leave both out "
            "of modules_to_save, or train on a copy of the base that is saved untied."
        )


def copy_companions(source: str | Path, output_dir: str | Path) -> None:
    """What a checkpoint's folder holds besides weights and their index: config.json, tokenizer, remote code.

    Files that `output_dir` already has stay as they are, and what a link outside the folder points at is not copied.
    For weights that were trained in full and saved elsewhere.
    """
    source = Path(source).resolve()
    # A snapshot of the hub's cache consists of links to ../../blobs.
    allowed = [source, *([source.parents[1] / "blobs"] if source.parent.name == "snapshots" else [])]
    outside = []
    for path in sorted([*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")]):
        target = Path(output_dir, path.relative_to(source))
        if path.name.startswith((".", "adapter_")) or path.name.endswith(_NOT_COPIED) or target.exists():
            continue
        if not any(path.resolve().is_relative_to(folder) for folder in allowed):
            outside.append(path.name)
        elif path.is_file():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    if outside:
        _log.warning(
            "base=%r: %s point outside the folder and were not copied; put the files themselves there if they belong "
            "to the model.",
            str(source),
            ", ".join(outside),
        )


def _local_folder(name_or_path: str, revision: str | None) -> Path:
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    ignored = [f"*{ending}" for ending in _NOT_COPIED if ending not in (".safetensors", ".index.json")]
    return Path(snapshot_download(name_or_path, revision=revision, ignore_patterns=ignored))


def _shards(folder: Path) -> list[str]:
    """Names of the files that hold the weights."""
    if (folder / _INDEX).is_file():
        return sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    return ["model.safetensors"]


def _stored_dtypes(shard: Path) -> set[str]:
    with safe_open(shard, "pt") as tensors:
        return {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118


def _write_shard(source: Path, target: Path, weights: dict[str, torch.Tensor]) -> None:
    """The tensors that `source` holds, with the values of `weights`, in the precision and order of `source`."""
    merged = {}
    with safe_open(source, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            original = tensors.get_tensor(name)
            weight = weights.get(name, original)
            if weight.shape != original.shape:
                raise ValueError(
                    f"{name}: the adapter turns {list(original.shape)} into {list(weight.shape)}, which does not fit "
                    "the base's config.json. Resize and save the base before training an adapter on it."
                )
            merged[name] = weight.to(original.dtype).contiguous()
        metadata = tensors.metadata()
    save_file(merged, target, metadata=metadata)
