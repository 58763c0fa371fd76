"""Masked supervised fine-tuning: LLaDA's objective on completions (arXiv:2502.09992, equation 5)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging

from dgrpo.logprobs import scoring_pass
from dgrpo.noise import stream
from dgrpo.reliability.checkpoints import WholeCheckpoints
from dgrpo.secrets import WritesNoSecrets
from dgrpo.trainers.checks import check_model, check_rows, context_length, default_to_bf16
from dgrpo.trainers.ranges import check_ranges

logger = logging.get_logger(__name__)

# t is drawn from (MIN_RATIO, 1]: the weight 1/t stays finite, as in LLaDA's code.
MIN_RATIO = 1e-3


# Settings of transformers that the loss has no place for.
_REFUSED = {
    "label_smoothing_factor": (0.0, "the loss has no labels"),
    "neftune_noise_alpha": (None, "the network scores masked views, whose embeddings carry no noise"),
    "use_liger_kernel": (False, "scoring has its own chunked head"),
    "auto_find_batch_size": (False, "masks are drawn for the batch as it is; lower per_device_train_batch_size"),
    "group_by_length": (False, "rows are met in the order that resuming relies on"),
    "ignore_data_skip": (False, "a resumed run would meet the rows of the epoch's beginning again"),
    "torch_compile": (False, "masks are drawn anew for each batch"),
}


@dataclass
class MaskedSFTConfig(WritesNoSecrets, TrainingArguments):
    """transformers' TrainingArguments and what masked fine-tuning adds."""

    bf16: bool | None = field(default=None, metadata={"help": "Compute in bfloat16; default: where there is a GPU."})
    learning_rate: float = field(default=1e-5)
    remove_unused_columns: bool | None = field(default=False)
    max_length: int = field(
        default=4096,
        metadata={"help": "Longest prompt + completion in tokens; longer rows are left out, with a count."},
    )
    completion_canvas: int = field(
        default=0,
        metadata={
            "help": "Fill completions with EOS up to this many tokens and train on them, so that a canvas of this "
            "length learns where to stop. 0: train up to the first EOS only. Padding is never trained on."
        },
    )

    def __post_init__(self):
        for name, (neutral, reason) in _REFUSED.items():
            if (value := getattr(self, name, neutral)) != neutral:
                raise ValueError(f"{name}={value!r} cannot be honoured: {reason}. Leave it at {neutral!r}.")
        check_ranges(self)
        if self.completion_canvas < 0:
            raise ValueError(f"completion_canvas={self.completion_canvas}: must be 0 or a number of tokens.")
        default_to_bf16(self)
        super().__post_init__()


def from_s1k(row: dict) -> dict:
    """prompt and completion of a row of s1K as d1 fine-tunes on it: the trajectory is the reasoning, then the attempt.

    Raises KeyError for rows without `question`, `thinking_trajectories` and `attempt`.
    """
    thinking = "\n".join(row["thinking_trajectories"])
    text = f"<reasoning>\n{thinking}\n</reasoning>\n<answer>\n{row['attempt']}\n</answer>"
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": text}],
    }


def encode(row: dict, tokenizer: PreTrainedTokenizerBase, completion_canvas: int = 0) -> dict[str, list[int]]:
    """Token ids of one row's `prompt` and `completion` (strings, or lists of messages), the completion with its EOS.

    The prompt ends where the model starts to write: behind the header of the assistant's turn.
    """
    prompt, completion = row["prompt"], row["completion"]
    if type(prompt) is not type(completion) or not isinstance(prompt, str | list):
        raise ValueError(
            f"prompt={prompt!r:.80}, completion={completion!r:.80}: give two strings, or two conversations."
        )
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
        completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    else:
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template([*prompt, *completion], return_dict=True)["input_ids"]
        if whole[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                "chat_template: a conversation does not start with its prompt (add_generation_prompt=True), so the "
                "prompt's length is not defined. Use a template that only appends."
            )
        completion_ids = whole[len(prompt_ids) :]
    if not completion_ids or completion_ids[-1] != tokenizer.eos_token_id:
        completion_ids = [*completion_ids, tokenizer.eos_token_id]
    fill = [tokenizer.eos_token_id] * (completion_canvas - len(completion_ids))
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids + fill}


def fitting(encoded, max_length: int, prefixes: tuple[str, ...] = ("",)):
    """The rows whose prompt and completion together have at most `max_length` tokens, under each of the `prefixes`."""

    def fits(row: dict) -> bool:
        return all(len(row[f"{p}prompt_ids"]) + len(row[f"{p}completion_ids"]) <= max_length for p in prefixes)

    kept = encoded.filter(fits)
    if len(encoded) and not len(kept):
        raise ValueError(f"max_length={max_length}: all {len(encoded)} rows are longer; raise it, or shorten them.")
    if left_out := len(encoded) - len(kept):
        logger.warning(f"max_length={max_length}: {left_out} of {len(encoded)} rows are longer and are skipped.")
    return kept


class MaskedSFTTrainer(Trainer):
    """Trainer whose loss is -(1/t) sum over hidden completion tokens of log p / number of completion tokens.

    Each row draws t ~ U(0, 1], stratified over the batch, and hides each completion token with probability t. The
    masks are a function of (seed, step, micro-batch, process): evaluation and resuming do not disturb them. Padding is
    neither attended nor trained. Checkpoints are written aside and renamed when they are whole.
    """

    columns: tuple[str, ...] = ("prompt", "completion")

    def __init__(self, model, args: MaskedSFTConfig, train_dataset, processing_class, eval_dataset=None, **kwargs):
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("compute_metrics cannot be honoured: an evaluation gives losses, no predictions.")
        check_model(model, processing_class, args)
        self._micro_steps = {"train": (0, 0), "eval": (0, 0)}
        longest = min(args.max_length, context_length(model) or args.max_length)
        datasets: list[Any] = []
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None or name == "train_dataset":
                check_rows(name, dataset, self.columns)
                dataset = self._encode(dataset, processing_class, args, longest)
            datasets.append(dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=datasets[0],
            eval_dataset=datasets[1],
            processing_class=processing_class,
            data_collator=self._collate,
            **kwargs,
        )
        self.checkpoints = WholeCheckpoints(self)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        return super().train(self.checkpoints.check(resume_from_checkpoint), *args, **kwargs)

    def _get_output_dir(self, trial):
        return self.checkpoints.folder(super()._get_output_dir(trial=trial))

    def _save_checkpoint(self, model, trial):
        self.checkpoints.save(lambda: super(MaskedSFTTrainer, self)._save_checkpoint(model, trial))

    def _run_epoch(self, *args, **kwargs):
        if not self.checkpoints.at_end():
            super()._run_epoch(*args, **kwargs)

    @staticmethod
    def _encode(dataset, tokenizer, args: MaskedSFTConfig, max_length: int):
        settings = {"tokenizer": tokenizer, "completion_canvas": args.completion_canvas}
        encoded = dataset.map(encode, fn_kwargs=settings, remove_columns=dataset.column_names)
        return fitting(encoded, max_length)

    def _collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """Right-padded batch: input_ids, attention_mask (True on tokens), is_completion, all [B, L]."""
        sequences = [torch.tensor(row["prompt_ids"] + row["completion_ids"]) for row in rows]
        completions = [
            torch.arange(len(sequence)) >= len(row["prompt_ids"])
            for sequence, row in zip(sequences, rows, strict=True)
        ]
        return {
            "input_ids": pad_sequence(sequences, batch_first=True, padding_value=self.processing_class.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(s).bool() for s in sequences], batch_first=True),
            "is_completion": pad_sequence(completions, batch_first=True),
        }

    def _generator(self) -> torch.Generator:
        mode = "train" if self.model.training else "eval"
        step, micro = self._micro_steps[mode]
        self._micro_steps[mode] = (self.state.global_step, micro + 1 if step == self.state.global_step else 0)
        return stream("sft", mode, self.args.seed, *self._micro_steps[mode], self.args.process_index)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        input_ids, is_completion = inputs["input_ids"], inputs["is_completion"]
        generator = self._generator()
        # Evenly spaced from a random start: uniform for each row, with far less variance of 1/t over the batch.
        spaced = (torch.rand(1, generator=generator) + torch.arange(len(input_ids)) / len(input_ids)) % 1
        ratio = 1 - spaced[:, None] * (1 - MIN_RATIO)
        hidden = torch.rand(input_ids.shape, generator=generator) < ratio
        hidden = hidden.to(input_ids.device) & is_completion
        attention_mask = None if inputs["attention_mask"].all() else inputs["attention_mask"]
        canvases = input_ids.masked_fill(hidden, self.processing_class.mask_token_id)
        asked, answer = scoring_pass(canvases, attention_mask, input_ids, hidden)
        (scores,) = model(passes=[asked])
        weights = 1 / (ratio.to(input_ids.device) * is_completion.sum(1, keepdim=True))
        loss = -(scores.logps * weights.expand_as(hidden).flatten()[answer]).sum() / len(input_ids)
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None
