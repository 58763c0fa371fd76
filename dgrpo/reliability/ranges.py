"""The range of every numeric setting of the trainers; NaN and infinity are in none."""

import math
from collections.abc import Callable
from typing import Any, get_type_hints

# What is allowed, in words; whether a value is; the settings, of which a configuration may have only some.
RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    (
        "must be a positive whole number",
        lambda x: 1 <= x < math.inf and x == int(x),
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_generations_eval "
        "max_completion_length generation_batch_size steps_per_generation num_iterations ref_model_sync_steps "
        "max_prompt_length block_length diffusion_steps min_commit cache_refresh rollout_batch_size views_per_pass "
        "max_skipped_updates max_failed_rollouts eval_accumulation_steps torch_empty_cache_steps ddp_bucket_cap_mb "
        "ddp_timeout dataloader_prefetch_factor max_length log_kl_every lora_r "
        "save_total_limit num_examples",
    ),
    (
        "must be a positive finite number",
        lambda x: 0 < x < math.inf,
        "temperature score_temperature num_train_epochs adam_epsilon delta sapo_temperature_pos sapo_temperature_neg "
        "logging_steps save_steps eval_steps threshold factor entropy_sum reward_timeout lora_alpha clip",
    ),
    (
        "must be 0 or a positive finite number",
        lambda x: 0 <= x < math.inf,
        "learning_rate weight_decay warmup_steps max_grad_norm eval_delay epsilon epsilon_high beta entropy_coef "
        "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target vespo_k_pos vespo_lambda_pos vespo_k_neg "
        "vespo_lambda_neg cfg_scale entropy_bound dataloader_num_workers num_completions_to_print agreement_every",
    ),
    ("must be at least 0 and below 1", lambda x: 0 <= x < 1, "adam_beta1 adam_beta2 lora_dropout"),
    (
        "must lie within [0, 1]",
        lambda x: 0 <= x <= 1,
        "top_entropy_quantile p_mask_prompt ref_model_mixup_alpha eubo_weight",
    ),
    (
        "must be a positive number of updates, or -1 for num_train_epochs",
        lambda x: x == -1 or 1 <= x < math.inf,
        "max_steps",
    ),
    ("must be a whole number from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32 and x == int(x), "seed"),
    ("must be 2 or more rollouts, or 0 for no guard", lambda x: x == 0 or 2 <= x < math.inf, "collapse_window"),
    ("must be at least 1", lambda x: 1 <= x < math.inf, "eubo_beta"),
    ("must be finite", math.isfinite, "reward_weights"),
]


def check_range(name: str, given: Any, optional: bool = False) -> None:
    """ValueError where a setting is out of its range; None, and a setting without a range, pass."""
    for words, allowed, names in RANGES:
        if name in names.split():
            for value in given if isinstance(given, list) else [given]:
                if value is not None and not allowed(value):
                    raise ValueError(f"{name}={given}: {words}{', or null' if optional else ''}.")


def check_ranges(config: Any) -> None:
    """ValueError that names the first setting out of its range; None is left to whoever reads the setting."""
    # Not the fields' own types, which transformers' parser of command lines rewrites.
    hints = get_type_hints(type(config))
    for name in config.__dataclass_fields__:
        value = getattr(config, name)
        check_range(name, value, "None" in str(hints[name]))
        if name.endswith("_kwargs") and not (isinstance(value, dict | None) or str(value).startswith("{")):
            raise ValueError(f"{name}={value!r}: must be a mapping, on the command line JSON such as '{{\"a\": 1}}'.")
