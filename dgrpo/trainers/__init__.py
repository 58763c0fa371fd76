"""Trainers: diffu-GRPO, masked supervised fine-tuning and VRPO."""

from dgrpo.trainers.config import DiffuGRPOConfig
from dgrpo.trainers.grpo import DiffuGRPOTrainer
from dgrpo.trainers.sft import MaskedSFTConfig, MaskedSFTTrainer
from dgrpo.trainers.vrpo import VRPOConfig, VRPOTrainer

__all__ = [
    "DiffuGRPOConfig",
    "DiffuGRPOTrainer",
    "MaskedSFTConfig",
    "MaskedSFTTrainer",
    "VRPOConfig",
    "VRPOTrainer",
]
