"""The trainer that tests build: a tiny random LLaDA on eight short prompts, any setting on top."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dgrpo import DiffuGRPOConfig, DiffuGRPOTrainer
from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM

VOCAB, EOS, MASK, PAD = 24, 21, 22, 23
PROMPTS = ["a b", "c d e f", "g", "h i j", "k l m n o", "p q", "r s t", "u a"]
SETTINGS = {
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


def tiny_llada(seed: int = 0, std: float = 0.3, **settings) -> LLaDAModelLM:
    """24 words, 2 layers, width 32. Every parameter random, the norms' too: a forgotten one changes the answer."""
    shape = {"d_model": 32, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 48, "vocab_size": VOCAB}
    tokens = {"eos_token_id": EOS, "mask_token_id": MASK, "pad_token_id": PAD}
    with torch.random.fork_rng(devices=[]):
        model = LLaDAModelLM(LLaDAConfig(**(shape | tokens | {"rope_theta": 50.0, "rms_norm_eps": 1e-5} | settings)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + (parameter.dim() == 1))
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word per id: "a".."u", then end, mask and pad."""
    words = [chr(ord("a") + index) for index in range(VOCAB - 3)] + ["<eos>", "<mask>", "<pad>"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", mask_token="<mask>", pad_token="<pad>", unk_token="a"
    )


def lora(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=r".*blocks.*(q_proj|v_proj|ff_out)",
        init_lora_weights=False,
    )


def share_of_b(prompts, completions, **columns) -> list[float]:
    return [completion.split().count("b") / 6 for completion in completions]


def place_in_group(prompts, completions, **columns) -> list[float]:
    """A reward that every group of four disagrees on, whatever it wrote."""
    return [index % 4 / 4 for index in range(len(prompts))]


def tiny_trainer(
    output_dir: Path | str, reward=share_of_b, lora=None, own_model=None, dataset=None, **settings
) -> DiffuGRPOTrainer:
    """A trainer of groups of 4, two of them a micro-batch, on a canvas of 6 tokens; 4 updates, two a rollout.

    `settings` are the config's, or arguments of the trainer (callbacks, a callable estimator, rollout_source ...).
    """
    fields = DiffuGRPOConfig.__dataclass_fields__
    own = {name for name in settings if name not in fields or (name == "estimator" and callable(settings[name]))}
    arguments = {name: settings.pop(name) for name in own}
    rows = {"prompt": PROMPTS, "letter": list("abcdefgh")}
    return DiffuGRPOTrainer(
        **{
            "model": tiny_llada() if own_model is None else own_model,
            "processing_class": tiny_tokenizer(),
            "args": DiffuGRPOConfig(**(SETTINGS | {"output_dir": str(output_dir)} | settings)),
            "train_dataset": Dataset.from_dict(rows) if dataset is None else dataset,
            "reward_funcs": reward,
            "peft_config": lora,
        }
        | arguments
    )
