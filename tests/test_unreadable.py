"""Folders of models and adapters with files missing, cut or of another kind: one line that says what to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from dgrpo.models import load_model
from dgrpo.run import CHECKPOINTS


def _only(folder: Path, *kept: str) -> Path:
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    return folder


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


# What is done to a copy of the embedded checkpoint, and what is said of it.
DAMAGED_MODELS = {
    "no tokenizer": (
        lambda f: _only(f, "config.json", "model.safetensors"),
        r"it holds no tokenizer .*: copy tokenizer.json",
    ),
    "cut tokenizer": (lambda f: _cut(f / "tokenizer.json"), "its tokenizer cannot be read .* copy or download"),
    "no config": (lambda f: (f / "config.json").unlink(), "it holds no configuration"),
    "cut config": (lambda f: _cut(f / "config.json"), "its configuration cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "its configuration cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"it holds no \*.safetensors: save them"),
    "only .bin": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"it holds no \*.safetensors, only pytorch_model.bin: save them as safetensors",
    ),
    "cut weights": (lambda f: _cut(f / "model.safetensors"), "its weights cannot be read"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED_MODELS.values(), ids=DAMAGED_MODELS)
def test_a_model_that_cannot_be_read_is_told_in_one_line(tmp_path, damage, message):
    folder = shutil.copytree(CHECKPOINTS / "gsm8k", tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError, match=f"model_name_or_path='{re.escape(str(folder))}': .*{message}") as told:
        load_model(folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "there is no such folder"),
        (str(CHECKPOINTS / "gsm8k/config.json"), "this is a file; give the folder"),
        ("nobody/nothing", "no folder of this name is here, .* without a network, download it beforehand"),
        ("tea pot!", "no folder of this name is here"),
    ],
)
def test_a_model_that_is_nowhere_is_told_in_one_line(monkeypatch, name, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        load_model(name)


def _as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def _changed(**settings):
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


DAMAGED_ADAPTERS = {
    "only .bin": (_as_bin, "it holds no adapter_model.safetensors, only adapter_model.bin: save the adapter as"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "it holds no adapter_model.safetensors"),
    "cut weights": (lambda f: _cut(f / "adapter_model.safetensors"), "its adapter cannot be read"),
    "other rank": (_changed(r=3), "its adapter cannot be read .*size mismatch"),
    "other targets": (_changed(target_modules=["tea"]), "its adapter cannot be read .*tea.*model that it was trained"),
    "cut config": (lambda f: _cut(f / "adapter_config.json"), "no adapter_config.json that can be read"),
    "unknown kind": (_changed(peft_type="TEA"), "no adapter_config.json that can be read"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED_ADAPTERS.values(), ids=DAMAGED_ADAPTERS)
def test_an_adapter_that_cannot_be_read_is_told_in_one_line(tmp_path, damage, message):
    model = load_model(CHECKPOINTS / "gsm8k")[0]
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"adapter=.*{message}"):
        load_model(CHECKPOINTS / "gsm8k", adapter=str(tmp_path / "adapter"))
