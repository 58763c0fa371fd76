"""Trainers: diffu-GRPO and masked supervised fine-tuning."""

from dgrpo.trainers.config import DiffuGRPOConfig
from dgrpo.trainers.grpo import DiffuGRPOTrainer
from dgrpo.trainers.sft import MaskedSFTConfig, MaskedSFTTrainer

__all__ = ["DiffuGRPOConfig", "DiffuGRPOTrainer", "MaskedSFTConfig", "MaskedSFTTrainer"]
