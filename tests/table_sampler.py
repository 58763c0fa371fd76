"""Tables over five words that the sampler can draw from, and the exact law of what a policy makes of them."""

import itertools
from types import SimpleNamespace

import torch
from joint_table import JointTable
from torch import Tensor, nn

from dgrpo.models.predictor import Scores, ScoringPass

WORDS = 5


class Tables(nn.Module):
    """A mask predictor over `num_completion` positions whose logits [pictures, C, 5] are parameters.

    `joint` fills them with the conditionals of one joint distribution; else they are random, and agree with none.
    """

    def __init__(self, num_completion: int, joint: bool = False, seed: int = 0):
        super().__init__()
        self.shape = (WORDS + 1,) * num_completion
        pictures = list(itertools.product(range(WORDS + 1), repeat=num_completion))
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(len(pictures), num_completion, WORDS, generator=generator, dtype=torch.float64)
        self.table = JointTable(WORDS, num_completion, seed=seed) if joint else None
        if self.table is not None:
            for index, picture in enumerate(pictures):
                for position in range(num_completion):
                    open_here = torch.tensor([*picture[:position], WORDS, *picture[position + 1 :]])
                    logits[index, position] = self.table.conditional(open_here, position).log()
        self.logits = nn.Parameter(logits)
        self.config = SimpleNamespace(mask_token_id=WORDS, vocab_size=WORDS + 1)
        self.generation_config = SimpleNamespace(eos_token_id=99)
        self.logit_shift = 0

    def log_probs(self, canvases: Tensor) -> Tensor:
        """[R, C, 5] of canvases [R, C]."""
        base = WORDS + 1
        index = sum(column * base ** (len(self.shape) - 1 - k) for k, column in enumerate(canvases.unbind(1)))
        return self.logits[index].log_softmax(-1)

    def forward(self, ids=None, mask=None, *, passes: list[ScoringPass] | None = None, positions=None, **kwargs):
        num_completion = len(self.shape)
        if passes is None:
            padded = torch.full((len(ids), ids.shape[1], WORDS + 1), -torch.inf)
            padded[:, -num_completion:, :WORDS] = self.log_probs(ids[:, -num_completion:]).float()
            return padded.flatten(0, 1)[positions]
        scores = []
        for asked in passes:
            width = asked.input_ids.shape[1]
            logps = self.log_probs(asked.input_ids[:, -num_completion:])
            answers = logps[asked.positions // width, asked.positions % width - (width - num_completion)]
            found = answers[asked.target_index, asked.targets]
            scores.append(Scores(found, torch.zeros(len(asked.positions), dtype=found.dtype)))
        return scores
