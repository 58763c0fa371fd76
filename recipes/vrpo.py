"""VRPO (LLaDA 1.5): preference optimization on ELBO differences, on rows of `prompt`, `chosen` and `rejected`.

    accelerate launch recipes/vrpo.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --use_peft --dataset pairs.jsonl

Rows are strings or lists of messages. Without arguments it teaches the embedded default to prefer worked answers, and
says what that does to held-out accuracy.
"""

from dataclasses import dataclass, field
from typing import Literal

from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import ModelConfig

from dgrpo import SamplerConfig, VRPOConfig, VRPOTrainer
from dgrpo.cli import one_line_errors
from dgrpo.evaluation.answers import evaluate
from dgrpo.reliability.checks import check_rows
from dgrpo.reliability.ranges import check_range
from dgrpo.run import parse_recipe, prepare_model
from dgrpo.run.card import publish
from dgrpo.run.steps import run_folder, train_until_stopped
from dgrpo.tasks import EMBEDDED, gsm8k, load_rows, read_rows
from dgrpo.tasks.columns import PromptColumns
from dgrpo.tiny import problems


@dataclass
class VRPORecipeConfig(PromptColumns):
    """What the recipe adds to the trainer's and the model's settings."""

    dataset: str = field(
        default=EMBEDDED, metadata={"help": "Hub name or local file of preference rows, or 'embedded'."}
    )
    chosen_column: str | None = field(default=None, metadata={"help": "Column of the better completion."})
    rejected_column: str | None = field(default=None, metadata={"help": "Column of the worse one."})
    prompt_format: Literal["chat", "plain"] = field(
        default="plain",
        metadata={"help": "Texts as they are, or 'chat': messages in the chat template."},
    )
    num_examples: int = field(default=1024, metadata={"help": "Generated pairs when the dataset is 'embedded'."})
    num_eval_problems: int = field(default=256, metadata={"help": "Held-out problems when it is; 0: none."})
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "A trained adapter to start from."})
    resume: bool = field(default=False, metadata={"help": "Resume from the last whole checkpoint in output_dir."})

    def __post_init__(self):
        super().__post_init__()
        check_range("num_examples", self.num_examples)
        if self.num_eval_problems < 0:
            raise ValueError(f"num_eval_problems={self.num_eval_problems}: must be 0 or more.")


def accuracy(model, tokenizer, num_problems: int) -> str:
    _, held_out = load_rows(gsm8k.TASK, EMBEDDED, num_train=1, num_held_out=num_problems, instruction="")
    found = evaluate(model, tokenizer, list(held_out), gsm8k.TASK.grade, SamplerConfig(16, 16, 16))
    return f"{found.accuracy:.1%} right, {sum(found.reasons) / found.n:.0%} reason (n={found.n})"


def run() -> None:
    recipe, args, model_config = parse_recipe(__file__, VRPORecipeConfig, VRPOConfig, ModelConfig)
    if not (model_config.use_peft or recipe.adapter_name_or_path):
        raise ValueError("use_peft=False: VRPO compares the policy with itself without its adapter; set it to true.")
    embedded = recipe.dataset == EMBEDDED
    with run_folder(args, recipe, model_config) as checkpoint:
        if embedded:
            rows = problems.preferences(recipe.num_examples, args.seed)
        else:
            columns = {"chosen": recipe.chosen_column, "rejected": recipe.rejected_column}
            rows = recipe.pairs(read_rows(recipe.dataset, "train"), columns)
        dataset = check_rows(f"dataset={recipe.dataset!r}", Dataset.from_list(rows), VRPOTrainer.columns)
        model, tokenizer, peft_config = prepare_model(gsm8k.TASK, recipe, args, model_config)
        if not isinstance(model, PeftModel):
            model = get_peft_model(model, peft_config)
        trainer = VRPOTrainer(model, args, dataset, processing_class=tokenizer)
        evaluated = embedded and recipe.num_eval_problems and trainer.is_world_process_zero()
        before = accuracy(model, tokenizer, recipe.num_eval_problems) if evaluated else ""
        train_until_stopped(trainer, checkpoint, recipe, model_config)
        if trainer.is_world_process_zero():
            publish(args)
        if evaluated:
            print(f"before: {before}\nafter:  {accuracy(model, tokenizer, recipe.num_eval_problems)}")


if __name__ == "__main__":
    with one_line_errors():
        run()
