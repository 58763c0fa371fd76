"""The reverse process: sampling completions from a mask predictor."""

from dgrpo.sampling.config import SamplerConfig
from dgrpo.sampling.generate import agreement, end_token_ids, generate
from dgrpo.sampling.rollout import Rollout

__all__ = ["Rollout", "SamplerConfig", "agreement", "end_token_ids", "generate"]
