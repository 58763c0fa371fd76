"""What the trainers check alike before anything is trained."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from dgrpo.logprobs import block_length_of
from dgrpo.models.adapters import check_policy, refuse_16_bit_training
from dgrpo.objectives import facts_of, name_of


def default_to_bf16(args: TrainingArguments) -> None:
    """Where bf16 is not set: on where there is a GPU; a CPU trains in float32."""
    if args.bf16 is None:
        args.bf16 = torch.cuda.is_available() and not args.use_cpu and not args.fp16


def refuse_data_parallel(args: TrainingArguments) -> None:
    """ValueError where Trainer would wrap the model in nn.DataParallel, which cuts a scoring pass in pieces."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process: start one process for each (accelerate launch, torchrun), "
            "or show it one (CUDA_VISIBLE_DEVICES=0)."
        )


def check_rows(name: str, dataset: Any, columns: tuple[str, ...]) -> Dataset:
    """The dataset; ValueError where it is no datasets.Dataset with rows and these columns."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{name}: rows cannot be streamed, as each epoch meets all of them; load the dataset.")
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{name}={type(dataset).__name__}: give one datasets.Dataset (Dataset.from_list makes one).")
    if missing := sorted(set(columns) - set(dataset.column_names)):
        words = {"messages": "conversations", "text": "plain texts"}
        others = [f"{name!r} holds {words[name]}" for name in words if name in dataset.column_names]
        raise ValueError(
            f"{name} needs the columns {missing}; it has {dataset.column_names}. "
            + (f"{others[0]}: divide each into what is given and what is to be written." if others else "Rename them.")
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: it has no rows.")
    return dataset


def check_model(model: Any, tokenizer: Any, args: TrainingArguments) -> None:
    """ValueError where the model or its tokenizer cannot be trained with."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r}: pass the model itself, as dgrpo.load_model({model!r}) returns it.")
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.mask_token_id is None:
        raise ValueError("processing_class: a tokenizer with a mask token is needed; load it with dgrpo.load_model.")
    check_policy(model)
    if args.deepspeed_plugin is None:
        refuse_16_bit_training(model)
    refuse_data_parallel(args)


def check_blocks(model: Any, args: Any, estimator: Callable | None) -> None:
    """ValueError where settings of the trainer speak of full attention and the model attends block by block.

    `model` is the network or its configuration.
    """
    if (size := block_length_of(model)) is None:
        return
    told = f"the model attends in blocks of {size} tokens, each behind a clean past"
    if args.p_mask_prompt:
        raise ValueError(f"p_mask_prompt={args.p_mask_prompt}: {told}; leave it out, or set it to 0.")
    if estimator is not None and facts_of(estimator).whole_canvas:
        raise ValueError(f"estimator={name_of(estimator)!r}: {told}; take 'elbo', which draws on each block.")
    args.sampler().of(size)


def context_length(model: nn.Module) -> int | None:
    """The tokens that the model's positions are made for; None where its configuration does not say."""
    config = getattr(model, "config", None)
    names = ("max_sequence_length", "max_position_embeddings")
    return next((value for name in names if (value := getattr(config, name, None))), None)
