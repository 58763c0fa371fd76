"""Where rollouts come from, and what is logged of them.

Shapes: B rollouts of this process, P prompt tokens (padded on the left), C completion tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from dgrpo.models.adapters import merged_adapters
from dgrpo.sampling import Rollout, SamplerConfig, agreement, generate

# Prompts of a process on which a shortcut is compared with the exact sampler: enough for two digits, a small share of
# a rollout's time.
AGREEMENT_PROMPTS = 4


class RolloutSource(Protocol):
    """Samples completions for the trainer: `DenoisedRollouts`, or one of your own (`rollout_source=`)."""

    def update(self, model: Any, step: int) -> None:
        """Called before each round of rollouts: the policy's network, and how many updates it has had."""

    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, config: SamplerConfig, row_keys: Tensor, group: Tensor
    ) -> Rollout:
        """Completions of the prompts [B, P]; `row_keys` [B] decide the noise, `group` [B] numbers the prompts."""


class DenoisedRollouts:
    """Rollouts denoised by the policy itself, on the process that trains it."""

    def __init__(self, accelerator: Accelerator, args: Any):
        self.accelerator, self.args = accelerator, args
        self._distributed = DistributedBackend(accelerator)
        fsdp = getattr(accelerator.state, "fsdp_plugin", None) is not None
        deepspeed = accelerator.state.deepspeed_plugin
        for name in ("merge_adapter_for_rollouts", "compile_rollouts"):
            value = getattr(args, name)
            if value and (fsdp or (deepspeed is not None and deepspeed.zero_stage == 3)):
                raise ValueError(
                    f"{name}={value}: under ZeRO-3 and FSDP the base weights are in pieces; leave it off."
                )
        # Weights that stay partitioned are gathered at each pass: all processes must then pass equally often.
        self._any_rank = self.any_process if fsdp or not args.ds3_gather_for_generation else bool

    def update(self, model: Any, step: int) -> None:
        self._model = model

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is true on any process."""
        return bool(self.accelerator.gather(torch.tensor([flag], device=self.accelerator.device)).any())

    @contextmanager
    def _policy(self) -> Iterator[Any]:
        """The network as it is sampled from: unwrapped, gathered where asked, its adapter merged where asked."""
        with (
            unwrap_model_for_generation(
                self._model,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as unwrapped,
            self._distributed.summon_full_params(self._model, recurse=False),
            merged_adapters(unwrapped) if self.args.merge_adapter_for_rollouts else nullcontext(),
        ):
            yield unwrapped

    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, config: SamplerConfig, row_keys: Tensor, group: Tensor
    ) -> Rollout:
        with self._policy() as policy:
            return generate(
                policy,
                prompt_ids,
                prompt_mask,
                config,
                row_keys=row_keys,
                group=group,
                batch_size=self.args.rollout_batch_size,
                any_rank=self._any_rank,
            )

    def agreement(self, prompt_ids: Tensor, prompt_mask: Tensor, config: SamplerConfig, row_keys: Tensor) -> float:
        """Share of tokens of a few prompts, one row of each given, that the config's shortcuts leave as they were."""
        few = slice(AGREEMENT_PROMPTS)
        with self._policy() as policy:
            return agreement(
                policy, prompt_ids[few], prompt_mask[few], config, row_keys=row_keys[few], any_rank=self._any_rank
            )


def rollout_metrics(rollout: Rollout, seconds: float, batch_size: int | None, accelerator: Accelerator) -> dict:
    """What a round of rollouts cost, and how many of its completions differ, over all processes."""
    num_tokens = rollout.completion_mask.sum()
    distinct = torch.cat([rollout.group[:, None], rollout.completion_ids], 1).unique(dim=0)
    # Steps at which a row wrote a token; -1 fills up the history.
    written = rollout.history[:, :, 0].sort(dim=1).values
    num_steps = (written.diff(dim=1, prepend=torch.full_like(written[:, :1], -1)) > 0).sum()
    totals = torch.stack([num_tokens.float(), num_tokens.new_tensor(len(distinct)).float(), num_steps.float()])
    all_tokens, num_distinct, all_steps = accelerator.reduce(totals, "sum").tolist()
    num_rows = len(rollout.completion_ids)
    rows_at_a_time = min(batch_size or num_rows, num_rows)
    return {
        "time/rollout": seconds,
        "tokens_per_second": all_tokens / seconds,
        "rollout/forwards": float(rollout.num_forwards),
        "rollout/forwards_per_token": rollout.num_forwards * rows_at_a_time / num_tokens.item(),
        "rollout/steps_per_row": all_steps / (num_rows * accelerator.num_processes),
        "rollout/distinct_completions": num_distinct / (num_rows * accelerator.num_processes),
    }
