"""Masked supervised fine-tuning: LLaDA's objective on completions (arXiv:2502.09992, equation 6), or on their blocks.

Shapes: B texts of L tokens, N views of each (2 with `complementary`, else 1), b tokens a block.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from dgrpo.estimators import draw_masks
from dgrpo.logprobs import block_length_of, text_passes
from dgrpo.noise import stream
from dgrpo.reliability.checkpoints import WholeCheckpoints
from dgrpo.reliability.checks import check_model, check_rows, context_length, default_to_bf16
from dgrpo.reliability.ranges import check_ranges
from dgrpo.secrets import WritesNoSecrets

logger = logging.get_logger(__name__)

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

    bf16: bool | None = field(  # type: ignore[assignment]  # transformers says bool and reads None too
        default=None, metadata={"help": "Compute in bfloat16; default: where there is a GPU."}
    )
    learning_rate: float = field(default=1e-5)
    remove_unused_columns: bool = field(default=False)
    max_length: int = field(
        default=4096,
        metadata={"help": "Longest prompt + completion in tokens; longer rows are skipped, with a count."},
    )
    completion_canvas: int = field(
        default=0,
        metadata={
            "help": "Fill completions with EOS up to this many tokens and train on them, so that a canvas of this "
            "length learns where to stop. 0: train up to the first EOS only. Padding is never trained on."
        },
    )

    complementary: bool = field(
        default=False, metadata={"help": "Also train on each view's complement, so that every token counts once."}
    )
    min_ratio: float = field(default=0.0, metadata={"help": "Smallest share of a text, or block, that is hidden."})
    max_ratio: float = field(default=1.0, metadata={"help": "Largest such share (LLaDA2.0: 0.3 to 0.8)."})
    token_weights: str = field(
        default="elbo",
        metadata={"help": "'elbo': weights that make the loss the bound per token; 'mean': all hidden tokens alike."},
    )
    mask_unit: str | None = field(
        default=None,
        metadata={
            "help": "Of what a share is hidden. Block models: of each 'block' (BD3-LM; the default) or of each 'text' "
            "(SDAR). With full attention: of each 'text'."
        },
    )
    block_schedule: list[int] | None = field(
        default=None,
        metadata={"help": "Block lengths of equal parts of the training, the model's own last, such as 1 2 4."},
    )

    def __post_init__(self):
        for name, (neutral, reason) in _REFUSED.items():
            if (value := getattr(self, name, neutral)) != neutral:
                raise ValueError(f"{name}={value!r} cannot be honoured: {reason}. Leave it at {neutral!r}.")
        check_ranges(self)
        if self.completion_canvas < 0:
            raise ValueError(f"completion_canvas={self.completion_canvas}: must be 0 or a number of tokens.")
        for name, choices in (("token_weights", ("elbo", "mean")), ("mask_unit", (None, "block", "text"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {', '.join(map(repr, choices))}.")
        if not 0 <= self.min_ratio <= self.max_ratio <= 1:
            raise ValueError(
                f"min_ratio={self.min_ratio}, max_ratio={self.max_ratio}: shares within [0, 1], the smaller one first."
            )
        if self.complementary and self.token_weights == "elbo" and (self.min_ratio, self.max_ratio) != (0, 1):
            raise ValueError(
                f"complementary=True with min_ratio={self.min_ratio}, max_ratio={self.max_ratio}: a complement leaves "
                "the range, so that the weights of token_weights='elbo' are none; set token_weights='mean'."
            )
        default_to_bf16(self)
        super().__post_init__()


def encode(row: dict, tokenizer: Any, completion_canvas: int = 0) -> dict[str, list[int]]:
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
        # The line feed that ChatML's templates write behind the end of a turn is never generated.
        while tokenizer.eos_token_id in completion_ids and not str(tokenizer.decode(completion_ids[-1:])).strip():
            completion_ids.pop()
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


def check_blocks(model: Any, args: MaskedSFTConfig) -> None:
    """ValueError where settings of blocks do not fit the model's attention."""
    size = block_length_of(model)
    if size is None and (args.mask_unit == "block" or args.block_schedule):
        raise ValueError(
            f"mask_unit={args.mask_unit!r}, block_schedule={args.block_schedule}: this model's attention is full; "
            "leave both out, or load it with convert='block'."
        )
    if args.block_schedule and (min(args.block_schedule) < 1 or args.block_schedule[-1] != size):
        raise ValueError(
            f"block_schedule={args.block_schedule}: its lengths must end with the model's own, block_length={size}."
        )


class MaskedSFTTrainer(Trainer):
    """Trainer whose loss is the negative ELBO of the completion per token, from one view of each row.

    l of a row's n completion tokens are hidden, l uniform in {1..n} and evenly spread over the batch; each hidden one
    weighs n/l (LLaDA, arXiv:2502.09992, equation 6: the mean of equation 5, with less variance). The masks are a
    function of (seed, step, micro-batch, process): evaluation and resuming do not disturb them. Padding is neither
    attended nor trained. Checkpoints are written aside and renamed when they are whole.

    A model that attends in blocks of b tokens is trained as BD3-LM (arXiv:2503.09573): rows are filled up to whole
    blocks with EOS, and l tokens of each block are hidden behind the clean text before it, or of all blocks together
    (`mask_unit`).
    """

    columns: tuple[str, ...] = ("prompt", "completion")
    args: MaskedSFTConfig
    model: nn.Module
    processing_class: Any

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
        check_blocks(self._network, args)
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
    def _encode(dataset, tokenizer, args: Any, max_length: int):
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

    def _texts(self, model, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Token ids, mask (None without padding) and trained positions, all [B, L]; for a block model in whole blocks.

        Blocks never see those behind them, so what pads the rows there needs no mask.
        """
        input_ids, mask, is_open = (inputs[name] for name in ("input_ids", "attention_mask", "is_completion"))
        if (size := block_length_of(model)) is None:
            return input_ids, None if mask.all() else mask, is_open
        length, more = mask.sum(1, keepdim=True), -input_ids.shape[1] % size
        input_ids, is_open = F.pad(input_ids, (0, more)), F.pad(is_open, (0, more))
        column = torch.arange(input_ids.shape[1], device=length.device)
        is_fill = (column >= length) & (column < length + -length % size)
        return input_ids.masked_fill(is_fill, self.processing_class.eos_token_id), None, is_open | is_fill

    def _set_block_length(self) -> None:
        """The block length of `block_schedule` at this step of the training."""
        schedule = self.args.block_schedule
        if schedule:
            stage = self.state.global_step * len(schedule) // max(1, self.state.max_steps)
            self._network.config.block_length = schedule[min(stage, len(schedule) - 1)]

    @property
    def _network(self):
        return self.accelerator.unwrap_model(self.model)

    def _draw(self, model, is_open: Tensor, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """What the views hide and what it weighs, [B, N, L]."""
        return draw_masks(
            is_open,
            num_samples,
            self._generator(),
            block_length=None if self.args.mask_unit == "text" else block_length_of(model),
            min_ratio=self.args.min_ratio,
            max_ratio=self.args.max_ratio,
            complementary=self.args.complementary,
        )

    def _log_bound(self, model, texts: tuple[Tensor, Tensor | None], views: tuple[Tensor, Tensor]) -> Tensor:
        """The weighted sum over views and tokens of log p, [B]; each view has a pass of its own."""
        (input_ids, mask), (hidden, weights) = texts, views
        passes, answers = text_passes(model, input_ids, mask, hidden, self.processing_class.mask_token_id)
        total = weights.new_zeros(len(input_ids))
        for answer, scores, weight in zip(answers, model(passes=passes), weights.unbind(1), strict=True):
            terms = scores.logps * weight.flatten()[answer]
            total = total.index_add(0, answer // input_ids.shape[1], terms.to(total.dtype))
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._set_block_length()
        input_ids, mask, is_open = self._texts(model, inputs)
        hidden, weights = self._draw(model, is_open)
        if self.args.token_weights == "mean":
            weights = hidden / hidden.sum()
        else:
            weights = weights / (is_open.sum(1)[:, None, None] * len(input_ids))
        loss = -self._log_bound(model, (input_ids, mask), (hidden, weights)).sum()
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None
