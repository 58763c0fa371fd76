"""Weight-compatible mask predictors and how to load them."""

from dgrpo.models.loading import load_model
from dgrpo.models.predictor import MaskPredictor, Scores, ScoringHead, ScoringPass

__all__ = ["MaskPredictor", "Scores", "ScoringHead", "ScoringPass", "load_model"]
