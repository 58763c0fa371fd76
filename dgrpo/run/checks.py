"""What a run refuses before rows are read and a model is loaded: settings that transformers and PEFT meet late."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, get_scheduler
from transformers.integrations import integration_utils
from trl import ModelConfig, get_peft_config

from dgrpo.models.loading import adapter_file, adapter_settings
from dgrpo.reliability.ranges import check_range


def check_folder(output_dir: str | Path) -> None:
    """ValueError where the setting names no folder that a run can make or write."""
    path = Path(output_dir).absolute()
    if not str(output_dir) or not path.name or (path.exists() and not path.is_dir()):
        raise ValueError(f"output_dir={str(output_dir)!r} is no folder for a run; name a new or an empty one.")


def check_settings(args: Any, recipe: Any, model_config: ModelConfig) -> None:
    """ValueError where adapter, optimizer, trackers or evaluation are set to what cannot be or has no effect."""
    for name in ("lora_r", "lora_alpha", "lora_dropout"):
        check_range(name, getattr(model_config, name))
    if recipe.adapter_name_or_path is not None:
        adapter_settings(recipe.adapter_name_or_path)
        adapter_file(recipe.adapter_name_or_path)
    try:
        get_peft_config(model_config)
    except ValueError as error:
        raise ValueError(f"the adapter's settings (lora_...): {error}") from error
    known, installed = (
        integration_utils.INTEGRATION_TO_CALLBACK,
        integration_utils.get_available_reporting_integrations(),
    )
    for tracker in args.report_to:
        if tracker not in known:
            raise ValueError(f"report_to={tracker!r}: choose {', '.join(known)} or none.")
        if tracker not in installed:
            raise ValueError(f"report_to={tracker!r}: its package is not installed; install it, or set none.")
    if args.eval_strategy != "no" or args.load_best_model_at_end or args.save_strategy == "best":
        raise ValueError(
            f"eval_strategy={str(args.eval_strategy.value)!r}, load_best_model_at_end={args.load_best_model_at_end}, "
            f"save_strategy={str(args.save_strategy.value)!r}: transformers' own evaluation has no rows here; remove "
            "them. GRPO's recipes evaluate with evaluate_every and keep the best weights with keep_best."
        )
    if args.fp16 and (args.use_cpu or not torch.cuda.is_available()):
        raise ValueError("fp16=True: there is no GPU to train on; remove it.")
    known_kwargs = {*inspect.signature(checkpoint).parameters, "preserve_rng_state"} - {"function", "args", "kwargs"}
    if unknown := sorted(set(args.gradient_checkpointing_kwargs or {}) - known_kwargs):
        raise ValueError(f"gradient_checkpointing_kwargs: unknown keys {unknown}; known are {sorted(known_kwargs)}.")
    if args.optim_target_modules and not any(each in args.optim for each in ("galore", "apollo")):
        raise ValueError(
            f"optim_target_modules={args.optim_target_modules!r}: optim={str(args.optim.value)!r} does not read it."
        )
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise ValueError(f"optim={str(args.optim)!r}, optim_args={args.optim_args!r}: {error}") from error
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type={str(args.lr_scheduler_type.value)!r}, lr_scheduler_kwargs="
            f"{args.lr_scheduler_kwargs!r}: {error}"
        ) from error
