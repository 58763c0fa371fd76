"""The order in which prompts are met, and which of them are short enough."""

from transformers.utils import logging
from trl.trainer.utils import RepeatSampler

from dgrpo.noise import stream

logger = logging.get_logger(__name__)


class EpochSampler(RepeatSampler):
    """TRL's prompt order, as a function of (seed, epoch): a resumed run meets the prompts that it would have met."""

    def set_epoch(self, epoch: int) -> None:
        self.generator = stream("prompts", self.seed or 0, epoch)


def without_long_prompts(dataset, tokenizer, max_prompt_length: int, template_settings: dict | None = None):
    """The dataset without prompts of more than `max_prompt_length` tokens; logs how many were skipped."""

    def fits(row: dict) -> bool:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return len(tokenizer(prompt)["input_ids"]) <= max_prompt_length
        settings = {"add_generation_prompt": True, "return_dict": True} | (template_settings or {})
        return len(tokenizer.apply_chat_template(prompt, **settings)["input_ids"]) <= max_prompt_length

    kept = dataset.filter(fits)
    if len(kept) == 0:
        raise ValueError(f"max_prompt_length={max_prompt_length}: no prompt of the dataset is that short; raise it.")
    if left_out := len(dataset) - len(kept):
        logger.warning(f"max_prompt_length={max_prompt_length}: {left_out} of {len(dataset)} prompts are skipped.")
    return kept
