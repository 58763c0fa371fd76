"""Files of a checkpoint that cannot be read: one line that says which, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# By what is read: the files of which a folder must hold one, and what to do where it holds none.
_NEEDED = {
    "configuration": (("config.json",), "give the folder of a model, in which its config.json lies"),
    "tokenizer": (
        ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
        "copy tokenizer.json, tokenizer_config.json and chat_template.jinja of the model that it was made of into it",
    ),
    "weights": (("*.safetensors",), "save them as safetensors: model.save_pretrained(folder)"),
    "adapter": (
        ("adapter_model.safetensors",),
        "save the adapter as safetensors: load it with peft, which reads adapter_model.bin, and "
        "model.save_pretrained(folder)",
    ),
}


@contextmanager
def reading(setting: str, name: str | Path, part: str) -> Iterator[None]:
    """Turns whatever a library raises while it reads a part of a checkpoint into one line.

    Args:
        setting: the setting that names the checkpoint.
        name: its folder or its name on the hub.
        part: "configuration", "tokenizer", "weights" or "adapter".

    Raises:
        ValueError: it cannot be read, with the remedy.
    """
    try:
        yield
    except (torch.OutOfMemoryError, ImportError):
        raise
    except Exception as error:  # noqa: BLE001 - safetensors, tokenizers, PEFT and the hub have errors of their own
        folder, what = Path(name).expanduser(), f"{setting}={str(name)!r}"
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}".rstrip(".")
        needed, remedy = _NEEDED[part]
        if folder.is_file():
            problem = "this is a file; give the folder that it lies in."
        elif not folder.is_dir() and (str(name).startswith((".", "/", "~")) or str(name).count("/") > 1):
            problem = "there is no such folder."
        elif not folder.is_dir():
            problem = (
                f"no folder of this name is here, and its {part} did not come from the hub ({reason}). Mend the name; "
                "log in for a gated model (hf auth login); without a network, download it beforehand (hf download)."
            )
        elif not any(any(folder.glob(pattern)) for pattern in needed):
            others = sorted(path.name for path in folder.glob("*.bin"))
            problem = (
                f"it holds no {' or '.join(needed)}{f', only {others[0]}' if others else ''}: {remedy}."
                if part in ("weights", "adapter")
                else f"it holds no {part} ({', '.join(needed)}): {remedy}."
            )
        elif isinstance(error, ValueError) and part == "weights":
            raise  # ours, about the network
        else:
            fits = " or take the model that it was trained on" if part == "adapter" else ""
            problem = f"its {part} cannot be read ({reason}): copy or download it again{fits}."
        raise ValueError(f"{what}: {problem}") from error
