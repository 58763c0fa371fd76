"""Reinforcement learning from verifiable rewards for masked diffusion language models."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dgrpo import estimators
    from dgrpo.logprobs import per_token_logps
    from dgrpo.models import load_model
    from dgrpo.sampling import Rollout, SamplerConfig, generate
    from dgrpo.trainers import (
        DiffuGRPOConfig,
        DiffuGRPOTrainer,
        MaskedSFTConfig,
        MaskedSFTTrainer,
        VRPOConfig,
        VRPOTrainer,
    )
    from dgrpo.views import MaskedViews

__version__ = "0.1.0"

# Imported when first asked for: torch, TRL and transformers take seconds, which `dgrpo --help` should not.
_HOMES = {
    "dgrpo.estimators": ("estimators",),
    "dgrpo.logprobs": ("per_token_logps",),
    "dgrpo.models": ("load_model",),
    "dgrpo.sampling": ("Rollout", "SamplerConfig", "generate"),
    "dgrpo.trainers": (
        "DiffuGRPOConfig",
        "DiffuGRPOTrainer",
        "MaskedSFTConfig",
        "MaskedSFTTrainer",
        "VRPOConfig",
        "VRPOTrainer",
    ),
    "dgrpo.views": ("MaskedViews",),
}

__all__ = [
    "DiffuGRPOConfig",
    "DiffuGRPOTrainer",
    "MaskedSFTConfig",
    "MaskedSFTTrainer",
    "MaskedViews",
    "Rollout",
    "SamplerConfig",
    "VRPOConfig",
    "VRPOTrainer",
    "estimators",
    "generate",
    "load_model",
    "per_token_logps",
]


def __getattr__(name: str):
    for home, names in _HOMES.items():
        if name in names:
            module = import_module(home)
            # A module of its own, or a name in one.
            found = module if home == f"dgrpo.{name}" else getattr(module, name)
            globals()[name] = found
            return found
    raise AttributeError(f"module 'dgrpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
