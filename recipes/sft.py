"""Masked supervised fine-tuning (LLaDA's objective) on rows of `prompt` and `completion`.

    accelerate launch recipes/sft.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --dataset rows.jsonl --use_peft

Rows are strings or lists of messages. Without arguments it fine-tunes the embedded default on generated problems.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from peft import get_peft_model
from trl import ModelConfig

from dgrpo import MaskedSFTConfig, MaskedSFTTrainer
from dgrpo.run import parse_recipe, prepare_model
from dgrpo.tasks import EMBEDDED, gsm8k
from dgrpo.tasks.task import read_rows
from dgrpo.tiny import problems


@dataclass
class SFTRecipeConfig:
    """What the recipe adds to the trainer's and the model's settings."""

    dataset: str = field(
        default=EMBEDDED, metadata={"help": "Hub name or local file of prompt/completion rows, or 'embedded'."}
    )
    num_examples: int = field(default=2048, metadata={"help": "Generated examples when the dataset is 'embedded'."})
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "A trained adapter to go on from."})


def main() -> None:
    recipe, args, model_config = parse_recipe(__file__, SFTRecipeConfig, MaskedSFTConfig, ModelConfig)
    if recipe.dataset == EMBEDDED:
        rows = problems.sft_examples(recipe.num_examples, args.seed)
    else:
        rows = read_rows(recipe.dataset, "train")
    model, tokenizer, peft_config = prepare_model(gsm8k.TASK, recipe, args, model_config)
    if peft_config is not None:
        model = get_peft_model(model, peft_config)
    trainer = MaskedSFTTrainer(model, args, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
