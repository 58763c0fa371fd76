"""Loss curves of short runs under a seed: `python tests/loss_curves.py` writes what test_loss_curves.py compares.

Settings in which rounding cannot grow: plain SGD (Adam would turn the sign of a tiny gradient into a whole step), a
small model, a learning rate that moves it visibly, and completions whose every draw keeps its word when the weights
are disturbed by far more than any processor's rounding (`--disturbed` shows it).
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from trainers import lora, place_in_group, tiny_llada, tiny_trainer

STORED = Path(__file__).parent / "data" / "loss_curves.json"
COMMON = {
    "max_steps": 16,
    "num_iterations": 3,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "log_completions": False,
}
ESPO = {"objective": "espo", "estimator": "elbo", "estimator_kwargs": {"complementary": True}}
BLOCKS = {"estimator": "block_random", "estimator_kwargs": {"block_length": 3}}
# The settings of each run; `adapter`: with LoRA, whose base is the reference.
RUNS: dict[str, dict] = {
    **{name: {"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo")},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "main job": {"epsilon": 0.2, "log_kl": True, "adapter": True, "prompt_mask_scope": "group"},
    "d1": {"beta": 0.04, "adapter": True, "epsilon": 0.5},
    "exact kl": {"beta": 0.5, "kl": "exact", "adapter": True},
    "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 1e-3, "epsilon_high": 2e-3},
    "sequence of draws": {"importance_sampling_level": "sequence", "estimator": "elbo"},
    "two-sided clip": {"epsilon": 0.01, "epsilon_high": 0.02, "delta": 1.05, "scale_rewards": "group"},
    "quantile": {"top_entropy_quantile": 0.4},
    "entropy bonus": {"entropy_coef": 0.3, "loss_type": "dapo"},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 3.0},
    "truncated": {"mask_truncated_completions": True, "loss_type": "dapo", "std": 0.03},
    "bias-corrected kl": {"beta": 0.1, "adapter": True, "use_bias_correction_kl": True},
    "coupled": {"estimator": "coupled", "prompt_mask_scope": "row"},
    "trace": {"estimator": "trace", "estimator_kwargs": {"top_k": 2}},
    "spg": {"objective": "spg", **BLOCKS},
    "bgpo": {"objective": "bgpo", "estimator": "elbo"},
    "wd1": {"objective": "wd1"},
    "stable_drl": {"objective": "stable_drl", **BLOCKS},
    "espo": {**ESPO, "beta": 0.1, "adapter": True},
}


def curve(name: str, folder: str, disturbed: float = 0.0) -> dict:
    """The loss of every micro-batch of 16 updates, and a digest of all completions."""
    settings = COMMON | RUNS[name]
    model = tiny_llada(std=settings.pop("std", 0.15))
    adapter = lora() if settings.pop("adapter", False) else None
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + disturbed * torch.randn(parameter.shape, generator=noise))
    written: list[str] = []

    def reward(prompts, completions, **columns):
        written.extend(completions)
        return place_in_group(prompts, completions)

    trainer = tiny_trainer(folder, reward=reward, lora=adapter, own_model=model, **settings)
    losses: list[float] = []
    inner = trainer.compute_loss

    def spy(*args, **kwargs):
        loss = inner(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = spy
    trainer.train()
    return {"losses": losses, "completions": hashlib.sha256("\n".join(written).encode()).hexdigest()[:16]}


if __name__ == "__main__":
    disturbed = float(sys.argv[sys.argv.index("--disturbed") + 1]) if "--disturbed" in sys.argv else 0.0
    found = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = curve(name, folder, disturbed)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 and not sys.argv[1].startswith("--") else STORED
    target.write_text(json.dumps(found, indent=1) + "\n")
