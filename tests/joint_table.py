"""A mask predictor that is consistent: its answers are the conditionals of one explicit joint distribution."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from dgrpo.models.predictor import Scores, ScoringPass


class JointTable(nn.Module):
    """A random p(o) over all completions of some words; the prompt is ignored, [MASK] is the word after them."""

    def __init__(self, num_words: int, num_completion: int, sharpness: float = 1.5, seed: int = 0):
        super().__init__()
        shape = (num_words,) * num_completion
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.joint = (sharpness * noise).flatten().softmax(0).view(shape)
        self.config = SimpleNamespace(mask_token_id=num_words)

    def log_likelihood(self, completion_ids: Tensor) -> Tensor:
        return self.joint[completion_ids.unbind(-1)].log()

    def conditional(self, picture: Tensor, position: int) -> Tensor:
        """p(word at `position` | the shown tokens of `picture` [C]), [num_words]."""
        shown = [slice(None) if token == self.config.mask_token_id else slice(token, token + 1) for token in picture]
        part = self.joint[tuple(shown)]
        marginal = part.sum([axis for axis in range(part.dim()) if axis != position])
        return marginal / marginal.sum()

    def forward(self, passes: list[ScoringPass], temperature: float = 1.0, entropy_grad: bool = False) -> list[Scores]:
        scores = []
        for asked in passes:
            width, num_completion = asked.input_ids.shape[1], self.joint.dim()
            pictures = asked.input_ids[:, -num_completion:].tolist()
            answers = torch.stack(
                [
                    self.conditional(pictures[position // width], position % width - (width - num_completion))
                    for position in asked.positions.tolist()
                ]
            )
            logps = answers[asked.target_index, asked.targets].log()
            scores.append(Scores(logps.float(), torch.special.entr(answers).sum(-1).float()))
        return scores
