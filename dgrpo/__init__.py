"""Reinforcement learning from verifiable rewards for masked diffusion language models."""

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
