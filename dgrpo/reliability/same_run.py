"""A resumed run is the run that was begun: what it was begun with, and what of it may change."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.utils import logging

from dgrpo.secrets import redacted

logger = logging.get_logger(__name__)

RECORD = "settings.json"

# What a resumed run may change: where and how often it writes, measures and reports, limits of time and failure, and
# how much it holds in memory at a time.
_MAY_CHANGE = """
    resume output_dir run_name project report_to disable_tqdm log_level log_level_replica log_on_each_node
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter trackio_space_id trackio_bucket_id
    trackio_static_space_id include_num_input_tokens_seen log_completions log_unique_prompts log_multimodal
    num_completions_to_print log_completions_hub_repo sample_every evaluate_every keep_best agreement_every
    log_kl_every eval_sampler
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size eval_accumulation_steps
    prediction_loss_only num_generations_eval save_strategy save_steps save_total_limit save_only_model
    save_on_each_node enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision resume_from_checkpoint load_best_model_at_end metric_for_best_model
    greater_is_better restore_callback_states_from_checkpoint do_train do_eval do_predict debug local_rank
    skip_memory_metrics ddp_timeout dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context torch_empty_cache_steps reward_timeout
    max_skipped_updates max_failed_rollouts collapse_window stop_on_collapse views_per_pass rollout_batch_size
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs
"""
MAY_CHANGE = frozenset(_MAY_CHANGE.split())
# May grow: a run can be made longer, not shorter than it was planned.
MAY_GROW = ("max_steps", "num_train_epochs")


def plain(value: Any) -> Any:
    """The value as a JSON file holds it, without credentials."""
    return json.loads(json.dumps(redacted(value), default=str, sort_keys=True))


def rows_digest(dataset: Any) -> dict[str, Any] | None:
    """Number and SHA-256 of a dataset's rows in their order; None for what is no map-style dataset."""
    if not isinstance(dataset, Dataset):
        return None
    digest = hashlib.sha256()
    for rows in dataset.with_format(None).iter(batch_size=1000):
        digest.update(json.dumps(rows, default=str, sort_keys=True).encode())
    return {"rows": len(dataset), "sha256": digest.hexdigest()[:16]}


def frozen_digest(model: torch.nn.Module) -> str:
    """A digest of the first numbers of every weight that is not trained: another base model has another one."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad and weight.numel():
            digest.update(name.removeprefix("module.").encode())
            digest.update(weight.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def changes(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that a resumed run must not change, but does: "name=now, where the run was begun with then"."""
    found = []
    for section in begun.keys() & now.keys():
        old, new = begun[section], now[section]
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
            old, new = {section: old}, {section: new}
        for name in sorted(old.keys() & new.keys() - MAY_CHANGE):
            if old[name] == new[name] or (name in MAY_GROW and _grows(old[name], new[name])):
                continue
            found.append(f"{name}={new[name]!r}, begun with {old[name]!r}")
    return found


def _grows(old: Any, new: Any) -> bool:
    # max_steps=-1 stands for all epochs: which of the two is longer cannot be told from the settings.
    return isinstance(old, int | float) and isinstance(new, int | float) and 0 < old < new


def refuse_another_run(checkpoint: str | Path, now: Mapping[str, Any]) -> None:
    """ValueError where the checkpoint was made with settings that would make the rest another run."""
    begun = json.loads((Path(checkpoint) / RECORD).read_text())
    if found := changes(begun, plain(now)):
        raise ValueError(
            f"resume=True: {Path(checkpoint).name} is of another run: {'; '.join(found)}. Set them as they were, or "
            "start a new run in another output_dir (max_steps may grow; logging, saving and evaluation may change)."
        )
    for name in MAY_GROW:
        old, new = (dict(each.get("trainer", {})) for each in (begun, plain(now)))
        if name in old and name in new and old[name] != new[name] and "constant" not in str(new["lr_scheduler_type"]):
            logger.warning(
                f"resume=True: {name} grows from {old[name]} to {new[name]}: lr_scheduler_type="
                f"{new['lr_scheduler_type']!r} is spread over the longer run from here on."
            )
