"""Rollouts inside TRL's trainer: denoised, with the trace of how, the views drawn on them, and what they cost."""

import time
from contextlib import nullcontext
from typing import Any

import torch
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import pad

from dgrpo.models.adapters import merged_adapters
from dgrpo.noise import row_keys
from dgrpo.sampling import agreement, generate
from dgrpo.views import draw_views

# Prompts of a process on which a shortcut is compared with the exact sampler.
AGREEMENT_PROMPTS = 4


class DenoisesRollouts:
    """The part of DiffuGRPOTrainer that takes the place of TRL's generation."""

    accelerator: Any
    args: Any
    model: Any
    # Rows of the evaluation that is going on: its batches draw on from each other.
    _rows_evaluated = 0

    def evaluation_loop(self, *args, **kwargs):
        self._rows_evaluated = 0
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _check_parallelism(self) -> None:
        plugin = self.accelerator.state.deepspeed_plugin
        partitioned = self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
        if self.args.merge_adapter_for_rollouts and partitioned:
            raise ValueError(
                "merge_adapter_for_rollouts=True: under ZeRO-3 and FSDP the base weights are in pieces; leave it off."
            )

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is true on any process."""
        return bool(self.accelerator.gather(torch.tensor([flag], device=self.accelerator.device)).any())

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        device = self.accelerator.device
        started = time.perf_counter()
        prompts = [torch.tensor(ids) for ids in prompt_ids]
        padded = pad(prompts, padding_value=self._tokenizer.pad_token_id, padding_side="left").to(device)
        mask = pad([torch.ones_like(ids) for ids in prompts], padding_value=0, padding_side="left").to(device)
        # Global row numbers: the noise of a row does not depend on how many processes share the batch.
        rows = torch.arange(len(prompts), device=device) + self.accelerator.process_index * len(prompts)
        if self._mode == "eval":
            rows += self._rows_evaluated
            self._rows_evaluated += self.accelerator.num_processes * len(prompts)
        # Weights that stay partitioned are gathered at each pass: all processes must then pass equally often.
        partitioned = self.is_fsdp_enabled or not self.args.ds3_gather_for_generation
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as unwrapped,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            merged_adapters(unwrapped) if self.args.merge_adapter_for_rollouts else nullcontext(),
        ):
            how = {
                "row_keys": row_keys(rows, "rollout", self._mode, self.args.seed, self._round),
                "any_rank": self.any_process if partitioned else bool,
            }
            self._rollout = generate(
                unwrapped,
                padded,
                mask,
                self.sampler_config,
                group=rows // num_generations,
                batch_size=self.args.rollout_batch_size,
                **how,
            )
            seconds = time.perf_counter() - started
            if self._measures_agreement:
                few = slice(None, None, num_generations)
                few_prompts = (padded[few][:AGREEMENT_PROMPTS], mask[few][:AGREEMENT_PROMPTS])
                how["row_keys"] = how["row_keys"][few][:AGREEMENT_PROMPTS]
                shared = agreement(unwrapped, *few_prompts, self.sampler_config, **how)
                self._metrics[self._mode]["rollout/agreement"].append(shared)
        unit = self._rollout.group if self.args.whole_groups else rows
        num_draws = self.num_iterations if self._mode == "train" else 1
        key = ("views", self._mode, self.args.seed, self._round)
        self._views = draw_views(self.estimator, self._rollout, unit, key, num_draws)
        self._log_rollout(seconds)
        ids, ended = self._rollout.completion_ids.cpu(), self._rollout.completion_mask.cpu()
        return [row[keep].tolist() for row, keep in zip(ids, ended, strict=True)], None

    @property
    def _measures_agreement(self) -> bool:
        """Whether these rollouts are compared with the exact sampler's, as some are where a shortcut is taken."""
        every = self.args.agreement_every
        return self._mode == "train" and self.sampler_config.approximate and every > 0 and self._round % every == 0

    def _log_rollout(self, seconds: float) -> None:
        rollout, metrics = self._rollout, self._metrics[self._mode]
        num_tokens = rollout.completion_mask.sum()
        distinct = torch.cat([rollout.group[:, None], rollout.completion_ids], 1).unique(dim=0)
        totals = torch.stack([num_tokens.float(), num_tokens.new_tensor(len(distinct)).float()])
        num_tokens, num_distinct = self.accelerator.reduce(totals, "sum").tolist()
        num_rows = len(rollout.completion_ids) * self.accelerator.num_processes
        metrics["time/rollout"].append(seconds)
        metrics["tokens_per_second"].append(num_tokens / seconds)
        metrics["rollout/forwards"].append(float(rollout.num_forwards))
        batch = min(self.args.rollout_batch_size or len(rollout.completion_ids), len(rollout.completion_ids))
        local_tokens = rollout.completion_mask.sum().item()
        metrics["rollout/forwards_per_token"].append(rollout.num_forwards * batch / local_tokens)
        metrics["rollout/distinct_completions"].append(num_distinct / num_rows)
