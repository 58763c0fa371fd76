"""Weight-compatible mask predictors and how to load them."""

from dgrpo.models.head import Scores, ScoringHead
from dgrpo.models.loading import load_model
from dgrpo.models.predictor import MaskPredictor, ScoringPass

__all__ = ["MaskPredictor", "Scores", "ScoringHead", "ScoringPass", "load_model"]
