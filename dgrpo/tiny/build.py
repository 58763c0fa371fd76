"""Makes an embedded default's checkpoint: `python -m dgrpo.tiny.build TASK --output_dir DIR [--seed S]`.

Supervised training of a tiny LLaDA on a designed corpus, in minutes on two cores; the block model is a Llama of the
same size that attends block by block. The result is a folder in the family's published layout (float16 safetensors)
that the recipes load like any other checkpoint.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_cosine_with_min_lr_schedule_with_warmup,
)
from transformers.utils import logging

from dgrpo.models.converted import A2DLlamaLMHeadModel, ConvertedLlamaConfig
from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM
from dgrpo.tiny import countdown, problems, sudoku
from dgrpo.tiny.tokenizer import build_grid_tokenizer, build_tokenizer
from dgrpo.trainers.sft import MaskedSFTConfig, MaskedSFTTrainer


@dataclass(frozen=True)
class Corpus:
    """What one tiny model is fitted to, and its size."""

    examples: Callable[[int, int], list[dict]]
    num_examples: int
    # Completions are filled up to so many tokens with EOS; 0: the end is learned where a block model fills its block.
    completion_canvas: int
    steps: int
    width: int
    mlp: int
    tokenizer: Callable[[list[str]], PreTrainedTokenizerFast] = build_tokenizer
    # The learning rate falls over so many steps (None: `steps`). A run that stops half-way leaves weights that a small
    # step still improves; where the rate had come down, steps of the same length along the policy gradient did harm.
    schedule_steps: int | None = None
    # Tokens in a block of a model that attends block by block; None: full attention.
    block_length: int | None = None


SEED = 11
CORPORA = {
    "gsm8k": Corpus(problems.sft_examples, num_examples=38400, completion_canvas=16, steps=2400, width=96, mlp=256),
    "gsm8k_block": Corpus(
        partial(problems.sft_examples, reasoning_share=0.35),
        num_examples=38400,
        completion_canvas=0,
        steps=1500,
        width=96,
        mlp=256,
        block_length=4,
    ),
    "sudoku": Corpus(
        sudoku.sft_examples,
        num_examples=32000,
        completion_canvas=19,
        steps=500,
        schedule_steps=1000,
        width=64,
        mlp=176,
        tokenizer=lambda questions: build_grid_tokenizer(),
    ),
    "countdown": Corpus(
        partial(countdown.sft_examples, reasoning_share=0.0),
        num_examples=38400,
        completion_canvas=10,
        steps=600,
        schedule_steps=1200,
        width=64,
        mlp=176,
    ),
}


def orthogonal(matrices: Tensor) -> Tensor:
    """Muon's five Newton-Schulz iterations on matrices [N, H, W], in float32.

    torch.optim.Muon iterates in bfloat16, which is slow on a CPU that lacks it.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.mT if is_tall else x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the matrices of the layers, AdamW on everything else, behind one list of parameter groups."""

    def __init__(self, model: nn.Module, lr: float):
        is_matrix = {
            name: p.dim() == 2 and ("blocks" in name or "layers" in name) for name, p in model.named_parameters()
        }
        matrices = [p for name, p in model.named_parameters() if is_matrix[name]]
        others = [p for name, p in model.named_parameters() if not is_matrix[name]]
        self.shapes = {p.shape: [q for q in matrices if q.shape == p.shape] for p in matrices}
        self.momentum = {shape: torch.zeros(len(same), *shape) for shape, same in self.shapes.items()}
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        super().__init__([{"params": matrices}, {"params": others}], {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        lr = self.param_groups[0]["lr"]
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        for shape, parameters in self.shapes.items():
            gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
            self.momentum[shape].lerp_(gradient, 0.05)
            update = orthogonal(gradient.lerp(self.momentum[shape], 0.95))
            torch._foreach_add_(list[torch.Tensor](parameters), list(update), alpha=-lr * 0.2 * max(shape) ** 0.5)


def from_scratch(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> LLaDAModelLM:
    """A LLaDA of the corpus's size with random weights."""
    config = LLaDAConfig(
        d_model=corpus.width,
        n_heads=4,
        n_layers=3,
        mlp_hidden_size=corpus.mlp,
        vocab_size=len(tokenizer),
        max_sequence_length=256,
        rope_theta=10000.0,
        init_std=0.05,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LLaDAModelLM"],
    )
    return LLaDAModelLM(config)


# What a LLaDA's parameters are called in a Llama, whose arithmetic is the same.
_LLAMA_NAMES = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.blocks": "model.layers",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def in_blocks(base: Any, block_length: int | None) -> A2DLlamaLMHeadModel:
    """A LLaDA's weights in a Llama that attends block by block and predicts each token in its place."""
    old = base.config
    config = ConvertedLlamaConfig(
        hidden_size=old.d_model,
        num_attention_heads=old.n_heads,
        num_key_value_heads=old.n_kv_heads,
        num_hidden_layers=old.n_layers,
        intermediate_size=old.mlp_hidden_size,
        vocab_size=old.vocab_size,
        max_position_embeddings=old.max_sequence_length,
        rms_norm_eps=old.rms_norm_eps,
        rope_theta=old.rope_theta,  # type: ignore[call-arg]  # read from the keyword arguments
        mask_token_id=old.mask_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
        block_length=block_length,
        architectures=["A2DLlamaLMHeadModel"],
    )
    model, weights = A2DLlamaLMHeadModel(config), {}
    for name, weight in base.state_dict().items():
        for llada, llama in _LLAMA_NAMES.items():
            name = name.replace(f"{llada}.", f"{llama}.", 1) if llama not in name else name
        weights[name] = weight
    model.load_state_dict(weights)
    return model


def build(corpus: Corpus, output_dir: Path, seed: int) -> None:
    """Trains from scratch and writes the checkpoint folder."""
    rows = corpus.examples(corpus.num_examples, seed)
    questions = [row["prompt"][0]["content"] for row in rows[:4000]]
    torch.manual_seed(seed)
    tokenizer = corpus.tokenizer(questions)
    model: PreTrainedModel = from_scratch(corpus, tokenizer)
    if corpus.block_length:
        model = in_blocks(model, corpus.block_length)
    optimizer = MuonWithAdamW(model, lr=3e-3)
    schedule_steps = corpus.schedule_steps or corpus.steps
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 100, schedule_steps, min_lr_rate=0.05)
    args = MaskedSFTConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=64,
        max_steps=corpus.steps,
        completion_canvas=corpus.completion_canvas,
        max_grad_norm=1.0,
        seed=seed,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = MaskedSFTTrainer(
        model, args, Dataset.from_list(rows), processing_class=tokenizer, optimizers=(optimizer, schedule)
    )
    trainer.train()
    model.half().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    build(CORPORA[arguments.corpus], arguments.output_dir, arguments.seed)


if __name__ == "__main__":
    main()
