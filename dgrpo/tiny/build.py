"""Makes an embedded default's checkpoint: `python -m dgrpo.tiny.build TASK --output_dir DIR [--seed S]`.

Supervised training of a tiny LLaDA on a designed corpus, in minutes on two cores. The result is a folder in LLaDA's
published layout (float16 safetensors) that the recipes load like any other checkpoint.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerFast, get_cosine_with_min_lr_schedule_with_warmup
from transformers.utils import logging

from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM
from dgrpo.tiny import countdown, problems, sudoku
from dgrpo.tiny.tokenizer import build_grid_tokenizer, build_tokenizer
from dgrpo.trainers.sft import MaskedSFTConfig, MaskedSFTTrainer


@dataclass(frozen=True)
class Corpus:
    """What one tiny model is fitted to, and its size."""

    examples: Callable[[int, int], list[dict]]
    num_examples: int
    completion_canvas: int
    steps: int
    width: int
    mlp: int
    tokenizer: Callable[[list[str]], PreTrainedTokenizerFast] = build_tokenizer
    # The learning rate falls over so many steps (None: `steps`). A run that stops half-way leaves weights that a small
    # step still improves; where the rate had come down, steps of the same length along the policy gradient did harm.
    schedule_steps: int | None = None


SEED = 11
CORPORA = {
    "gsm8k": Corpus(problems.sft_examples, num_examples=38400, completion_canvas=16, steps=2400, width=96, mlp=256),
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


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the matrices of the layers, AdamW on everything else, behind one list of parameter groups."""

    def __init__(self, model: nn.Module, lr: float):
        is_matrix = {name: "blocks" in name and p.dim() == 2 for name, p in model.named_parameters()}
        matrices = [p for name, p in model.named_parameters() if is_matrix[name]]
        others = [p for name, p in model.named_parameters() if not is_matrix[name]]
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
        ]
        super().__init__([{"params": matrices}, {"params": others}], {"lr": lr})

    def step(self, closure=None):
        for group, part in zip(self.param_groups, self.parts, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()


def build(corpus: Corpus, output_dir: Path, seed: int) -> None:
    """Trains from scratch and writes the checkpoint folder."""
    rows = corpus.examples(corpus.num_examples, seed)
    questions = [row["prompt"][0]["content"] for row in rows[:4000]]
    tokenizer = corpus.tokenizer(questions)
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
    torch.manual_seed(seed)
    model = LLaDAModelLM(config)
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
