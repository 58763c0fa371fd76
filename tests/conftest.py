"""Small fixtures: a tiny random LLaDA, its tokenizer, a rollout of two prompts, and a trainer."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dgrpo import DiffuGRPOConfig, DiffuGRPOTrainer
from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM
from dgrpo.sampling import Rollout

VOCAB, EOS, MASK, PAD = 24, 21, 22, 23


def _tiny_llada(seed: int = 0, std: float = 0.3, **settings) -> LLaDAModelLM:
    """Every parameter random, the norms' too, so that a forgotten or misplaced one changes the answer."""
    shape = {"d_model": 32, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 48, "vocab_size": VOCAB}
    tokens = {"eos_token_id": EOS, "mask_token_id": MASK, "pad_token_id": PAD}
    with torch.random.fork_rng(devices=[]):
        model = LLaDAModelLM(LLaDAConfig(**(shape | tokens | {"rope_theta": 50.0, "rms_norm_eps": 1e-5} | settings)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + (parameter.dim() == 1))
    return model.eval()


@pytest.fixture
def tiny_llada():
    """A function (seed, **config settings) -> LLaDAModelLM: 24 words, 2 layers, width 32, float32."""
    return _tiny_llada


@pytest.fixture
def model() -> LLaDAModelLM:
    return _tiny_llada()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One word per id: "a".."u", then end, mask and pad."""
    words = [chr(ord("a") + index) for index in range(VOCAB - 3)] + ["<eos>", "<mask>", "<pad>"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", mask_token="<mask>", pad_token="<pad>", unk_token="a"
    )


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


PROMPTS = ["a b", "c d e f", "g", "h i j", "k l m n o", "p q", "r s t", "u a"]


def share_of_b(prompts, completions, **columns) -> list[float]:
    return [completion.split().count("b") / 6 for completion in completions]


def lora(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=r".*blocks.*(q_proj|v_proj|ff_out)",
        init_lora_weights=False,
    )


def place_in_group(prompts, completions, **columns) -> list[float]:
    """A reward that every group of four disagrees on, whatever it wrote."""
    return [index % 4 / 4 for index in range(len(prompts))]


@pytest.fixture
def config(tmp_path):
    """A function (**settings) -> DiffuGRPOConfig: groups of 4, two of them a micro-batch, canvas of 6 tokens."""

    def build(**settings) -> DiffuGRPOConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "block_length": 3,
            "diffusion_steps": 6,
            "num_iterations": 2,
            "beta": 0.0,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return DiffuGRPOConfig(**(defaults | settings))

    return build


@pytest.fixture
def trainer(model, tokenizer, config):
    """A function (reward, lora, **settings) -> DiffuGRPOTrainer on eight prompts."""

    def build(reward=share_of_b, lora=None, own_model=None, **settings) -> DiffuGRPOTrainer:
        settings.setdefault("learning_rate", 1e-3)
        return DiffuGRPOTrainer(
            model=own_model or model,
            processing_class=tokenizer,
            args=config(**settings),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS, "letter": list("abcdefgh")}),
            reward_funcs=reward,
            peft_config=lora,
        )

    return build
