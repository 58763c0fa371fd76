"""Masked supervised fine-tuning (LLaDA's objective) on rows of `prompt` and `completion`.

    accelerate launch recipes/sft.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --use_peft \\
        --dataset simplescaling/s1K
    accelerate launch recipes/sft.py --model_name_or_path Qwen/Qwen3-0.6B --convert bidirectional --use_peft false \\
        --dataset rows.jsonl                              # a causal model becomes a mask predictor
    accelerate launch recipes/sft.py --model_name_or_path Qwen/Qwen3-0.6B --convert block --block_schedule 1 2 4 \\
        --use_peft false --dataset rows.jsonl             # ... or a block-diffusion model

Rows are strings or lists of messages; rows of s1K's form (question, thinking_trajectories, attempt) become reasoning
and answer. Without arguments it fine-tunes the embedded default on generated problems.
"""

from dataclasses import dataclass, field
from typing import Literal

from datasets import Dataset
from peft import get_peft_model
from trl import ModelConfig

from dgrpo import MaskedSFTConfig, MaskedSFTTrainer
from dgrpo.cli import one_line_errors
from dgrpo.reliability.checks import check_rows
from dgrpo.reliability.ranges import check_range
from dgrpo.run import parse_recipe, prepare_model
from dgrpo.run.card import publish
from dgrpo.run.steps import run_folder, train_until_stopped
from dgrpo.tasks import EMBEDDED, gsm8k, read_rows
from dgrpo.tasks.columns import PromptColumns, from_s1k
from dgrpo.tiny import problems


@dataclass
class SFTRecipeConfig(PromptColumns):
    """What the recipe adds to the trainer's and the model's settings."""

    dataset: str = field(
        default=EMBEDDED, metadata={"help": "Hub name or local file of prompts and completions, or 'embedded'."}
    )
    completion_column: str | None = field(
        default=None,
        metadata={"help": "Column to learn; default: completion, or a conversation's last message."},
    )
    prompt_format: Literal["chat", "plain"] = field(
        default="plain",
        metadata={"help": "Texts as they are, or 'chat': messages in the chat template."},
    )
    num_examples: int = field(default=2048, metadata={"help": "Generated examples when the dataset is 'embedded'."})
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "A trained adapter to start from."})
    resume: bool = field(default=False, metadata={"help": "Resume from the last whole checkpoint in output_dir."})
    convert: str | None = field(
        default=None,
        metadata={"help": "How a causal Qwen2, Qwen3 or Llama model is read: 'bidirectional' or 'block'."},
    )
    block_length: int | None = field(
        default=None,
        metadata={"help": "Tokens in a block of a model that attends block by block; default: the checkpoint's."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_range("num_examples", self.num_examples)
        check_range("block_length", self.block_length)
        if self.convert not in (None, "bidirectional", "block"):
            raise ValueError(f"convert={self.convert!r}: choose 'bidirectional' or 'block'.")
        if self.convert and self.adapter_name_or_path:
            raise ValueError("convert: an adapter of the causal model does not fit; give one of the two.")


def run() -> None:
    recipe, args, model_config = parse_recipe(__file__, SFTRecipeConfig, MaskedSFTConfig, ModelConfig)
    if recipe.convert and model_config.use_peft:
        raise ValueError("convert: the mask token's embedding must be trained and saved; set --use_peft false.")
    with run_folder(args, recipe, model_config) as checkpoint:
        if recipe.dataset == EMBEDDED:
            rows = problems.sft_examples(recipe.num_examples, args.seed)
        else:
            rows = read_rows(recipe.dataset, "train")
            if rows and "thinking_trajectories" in rows[0]:
                rows = [from_s1k(row) for row in rows]
            else:
                rows = recipe.pairs(rows, {"completion": recipe.completion_column})
        dataset = check_rows(f"dataset={recipe.dataset!r}", Dataset.from_list(rows), MaskedSFTTrainer.columns)
        if args.block_schedule and recipe.block_length is None:
            recipe.block_length = args.block_schedule[-1]
        model, tokenizer, peft_config = prepare_model(gsm8k.TASK, recipe, args, model_config)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        trainer = MaskedSFTTrainer(model, args, dataset, processing_class=tokenizer)
        train_until_stopped(trainer, checkpoint, recipe, model_config)
        if trainer.is_world_process_zero():
            publish(args)


if __name__ == "__main__":
    with one_line_errors():
        run()
