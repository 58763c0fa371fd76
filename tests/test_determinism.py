"""The same seed gives the same bits, processes draw different noise, and nothing runs that was not asked to run."""

import pickle
import re
from pathlib import Path

import pytest
import torch
from trainers import tiny_trainer

from dgrpo.noise import row_keys, uniform
from dgrpo.reliability.manifest import write_manifest

ROOT = Path(__file__).parents[1]


def run(model, folder: Path, resume: Path | None = None, **settings) -> tuple[torch.Tensor, list]:
    """Weights and logged completions after a few updates."""
    settings = {"learning_rate": 1e-2} | settings
    trainer = tiny_trainer(folder, own_model=model, **settings)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), trainer.logged_completions


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bits(tiny_llada, tokenizer, tmp_path, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (one, texts), (other, more) = (run(tiny_llada(), tmp_path) for _ in range(2))
        different, _ = run(tiny_llada(), tmp_path, seed=1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, other)
    assert texts == more
    assert not torch.equal(one, different)


def test_rows_of_different_processes_draw_different_noise():
    keys = row_keys(torch.arange(8), "rollout", "train", 42, 0)
    noise = uniform(keys, 0, torch.arange(6).expand(8, 6))
    assert len(noise.flatten(1).unique(dim=0)) == 8
    again = uniform(row_keys(torch.arange(4, 8), "rollout", "train", 42, 0), 0, torch.arange(6).expand(4, 6))
    assert torch.equal(noise[4:], again), "what a row draws depends on its global number, not on who draws it"


SOURCES = [path for folder in ("dgrpo", "rewards", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_code_of_a_checkpoint_or_dataset_runs():
    assert len(SOURCES) > 30
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"trust_remote_code\s*=\s*True", text), path
        assert not re.search(r"\b(pickle|joblib|dill)\.loads?\(|(?<![.\w])eval\(|allow_pickle\s*=\s*True", text), path
        for call in re.finditer(r"torch\.load\(.*", text):
            assert "weights_only=True" in call.group(), f"{path}: {call.group()}"
        assert not re.search(r"safe_serialization\s*=\s*False|use_safetensors\s*=\s*False", text), path


def test_a_checkpoint_with_code_in_its_state_is_not_run(tiny_llada, tokenizer, tmp_path):
    run(tiny_llada(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    path = tmp_path / "checkpoint-2/rollout_0.pt"
    torch.save(torch.load(path, weights_only=True) | {"metrics": _Touches(tmp_path / "touched")}, path)
    # Whoever put the code there would have made the manifest fit.
    write_manifest(path.parent)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run(tiny_llada(), tmp_path, resume=tmp_path / "checkpoint-2")
    assert not (tmp_path / "touched").exists()


class _Touches:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
