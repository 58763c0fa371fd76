"""Small fixtures: a tiny random LLaDA, its tokenizer, a rollout of two prompts, and a trainer."""

import pytest
import torch
from trainers import EOS, PAD, SETTINGS, share_of_b, tiny_llada, tiny_tokenizer, tiny_trainer

from dgrpo import DiffuGRPOConfig
from dgrpo.sampling import Rollout


@pytest.fixture(name="tiny_llada")
def _tiny_llada():
    """A function (seed, **config settings) -> LLaDAModelLM."""
    return tiny_llada


@pytest.fixture
def model():
    return tiny_llada()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Five prompts of lengths 6, 6, 2, 4 and 1, padded on the left: the first two are equal."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(0, EOS, (5, 6), generator=generator)
    ids[1] = ids[0]
    mask = torch.arange(6) >= 6 - torch.tensor([6, 6, 2, 4, 1])[:, None]
    return ids.masked_fill(~mask, PAD), mask


@pytest.fixture
def rollout(prompts) -> Rollout:
    """Two prompts of lengths 4 and 6 with three completions each; two of them ended early, one in its first token."""
    num_rows, num_completion = 6, 5
    generator = torch.Generator().manual_seed(12)
    prompt_ids, prompt_mask = (tensor[[3, 3, 3, 0, 0, 0]] for tensor in prompts)
    completion_ids = torch.randint(0, EOS, (num_rows, num_completion), generator=generator)
    length = torch.tensor([5, 3, 5, 1, 5, 5])
    completion_mask = torch.arange(num_completion) < length[:, None]
    completion_ids[torch.arange(num_completion) >= length[:, None] - (length[:, None] < num_completion).long()] = EOS
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        revealed_at=torch.rand(num_rows, num_completion, generator=generator).argsort(1),
        confidence=torch.rand(num_rows, num_completion, generator=generator),
        entropy=torch.rand(num_rows, num_completion, generator=generator),
        group=torch.tensor([0, 0, 0, 1, 1, 1]),
        num_forwards=num_completion,
        num_steps=num_completion,
    )


@pytest.fixture
def config(tmp_path):
    """A function (**settings) -> DiffuGRPOConfig, on top of `trainers.SETTINGS`."""
    return lambda **settings: DiffuGRPOConfig(**(SETTINGS | {"output_dir": str(tmp_path / "run")} | settings))


@pytest.fixture
def trainer(model, tmp_path):
    """A function (reward, lora, own_model, **settings) -> DiffuGRPOTrainer of `trainers.tiny_trainer`."""
    return lambda reward=share_of_b, lora=None, own_model=None, **settings: tiny_trainer(
        settings.pop("output_dir", tmp_path / "run"), reward, lora, own_model or model, **settings
    )
