"""What keeps a run alive, or stops it in time, when its numbers go wrong."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from dgrpo.report.metrics import WATCHED, cliffs

logger = logging.get_logger(__name__)

# Skipped updates whose batches each process keeps; a run that limps on must not fill the disk.
MAX_KEPT = 20


class _MicroBatch(NamedTuple):
    inputs: dict[str, Tensor]
    loss: float


class UpdateGuard(TrainerCallback):
    """An update with a NaN or infinite loss or gradient is not made; weights that become NaN end the run.

    The batch of a skipped update is named and kept in `bad_batches`; `limit` skipped updates in a row end the run.
    """

    def __init__(self, limit: int, output_dir: str, accelerator: Accelerator, decode: Callable[[Tensor], str]):
        self.limit, self.folder = limit, Path(output_dir) / "bad_batches"
        self.accelerator, self.decode = accelerator, decode
        self.skipped_in_a_row = 0
        self._update: list[_MicroBatch] = []
        self._num_kept = 0

    def state_dict(self) -> dict[str, int]:
        """What a resumed run must know."""
        return {"skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped_in_a_row = state["skipped_in_a_row"]

    def watched(self, inputs: dict, loss: Tensor) -> Tensor:
        """The loss of a micro-batch; where it is not finite, one whose gradient is NaN."""
        self._update.append(_MicroBatch(inputs, float(loss.detach())))
        # Poison the gradient too: a NaN survives the all-reduce, so every rank sees it in the norm.
        return loss if torch.isfinite(loss) else loss * torch.nan

    def skips(self, model: nn.Module, norm: float, step: int) -> bool:
        """Whether update `step` is skipped, by its gradient's norm; the gradient is then gone."""
        # DeepSpeed has come to its step by now, and found the same; its sharded optimizers skip it themselves.
        bad = self.accelerator.optimizer_step_was_skipped or not math.isfinite(norm)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
        if bad:
            model.zero_grad()
            self._keep(norm, step)
        self._update = []
        return bad

    def _keep(self, norm: float, step: int) -> None:
        rank = self.accelerator.process_index
        bad = [number for number, each in enumerate(self._update) if not math.isfinite(each.loss)]
        path = self.folder / f"update_{step}_process_{rank}"
        # Where every loss is finite it cannot be told whose gradient was not: all processes keep what they had.
        flag = torch.tensor([bool(bad)], device=self.accelerator.device)
        located = self.accelerator.gather(flag).any()
        if (bad or not located) and self._num_kept < MAX_KEPT:
            self._num_kept += 1
            path.parent.mkdir(parents=True, exist_ok=True)
            batches = [{k: v for k, v in each.inputs.items() if isinstance(v, Tensor)} for each in self._update]
            torch.save([{k: v.detach().cpu() for k, v in batch.items()} for batch in batches], path.with_suffix(".pt"))
            texts = [self._in_words(each) for each in self._update]
            path.with_suffix(".json").write_text(json.dumps(texts, indent=1))
            logger.warning(
                f"Update {step} is skipped: losses {[each.loss for each in self._update]} of its micro-batches on "
                f"process {rank}, gradient norm {norm}. The batch is kept in {path}.json and .pt; it begins with "
                f"{texts[bad[0] if bad else 0]['rows'][0]['prompt'][-80:]!r}."
            )
        if self.skipped_in_a_row >= self.limit:
            raise FloatingPointError(
                f"max_skipped_updates={self.limit}: so many updates in a row had a NaN or infinite loss or gradient, "
                f"the last one update {step}. Their batches are in {path.parent}, the weights as they were before: "
                "lower learning_rate or max_grad_norm, look at the rewards, or resume from an earlier checkpoint."
            )

    def _in_words(self, micro_batch: _MicroBatch) -> dict:
        """A micro-batch to read: its loss and, row by row, prompt, completion and advantage."""
        inputs = micro_batch.inputs
        rows = zip(
            inputs["prompt_ids"].cpu(),
            inputs["prompt_mask"].bool().cpu(),
            inputs["completion_ids"].cpu(),
            inputs["completion_mask"].bool().cpu(),
            inputs["advantages"].tolist(),
            strict=True,
        )
        texts = [
            {"prompt": self.decode(prompt[shown]), "completion": self.decode(completion[kept]), "advantage": advantage}
            for prompt, shown, completion, kept, advantage in rows
        ]
        return {"loss": str(micro_batch.loss), "rows": texts}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """After the step and before a checkpoint: weights that are NaN or infinite must not be saved."""
        norm = torch.nn.utils.get_total_norm([each.detach() for each in model.parameters() if each.requires_grad])
        if self.accelerator.reduce(norm.float(), "sum").isfinite():
            return
        raise FloatingPointError(
            f"Update {state.global_step + 1} made weights NaN or infinite, from a finite gradient; no checkpoint has "
            f"them. Lower learning_rate={args.learning_rate} or weight_decay={args.weight_decay}, and resume from the "
            "last checkpoint."
        )


class RewardGuard:
    """Ends a run whose rewards give no value at all, for any row, in `limit` rollouts in a row."""

    def __init__(self, limit: int, weights: Sequence[float]):
        # What counts for nothing must not hide that nothing counts.
        self.limit, self.counted = limit, [index for index, weight in enumerate(weights) if weight != 0]
        self.failed_in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """What a resumed run must know."""
        return {"failed_in_a_row": self.failed_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.failed_in_a_row = state["failed_in_a_row"]

    def check(self, rewards: Tensor) -> None:
        """RuntimeError at the last of so many rollouts; `rewards` [rows of all processes, functions], NaN for None."""
        nothing = bool(rewards[:, self.counted].isnan().all())
        self.failed_in_a_row = self.failed_in_a_row + 1 if nothing else 0
        if self.failed_in_a_row >= self.limit:
            raise RuntimeError(
                f"max_failed_rollouts={self.limit}: for so many rollouts in a row no reward gave a value for any row, "
                "so nothing was learned. The log has the first traceback of each reward; look at its arguments, its "
                "time limit (reward_timeout) and the dataset's references."
            )


class CollapseGuard(TrainerCallback):
    """Warns once of each cliff that the logged metrics go over; `stop_on_collapse` ends the run there."""

    def __init__(self, window: int, stops: bool):
        self.window, self.stops = window, stops
        self.history: dict[str, list[float]] = {}
        self.told: set[str] = set()

    def _add(self, logs: Mapping[str, float | None]) -> None:
        for name in WATCHED if "reward" in logs else ():
            if (value := logs.get(name)) is not None:
                self.history[name].append(value)

    def on_train_begin(self, args, state, control, **kwargs):
        self.history, self.told = {name: [] for name in WATCHED}, set()
        for logs in state.log_history:
            self._add(logs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in (logs or {}):
            return
        self._add(logs)
        found = cliffs(self.history, self.window)
        for name in sorted(found.keys() - self.told):
            self.told.add(name)
            remedy = "the run stops here" if self.stops else "stop_on_collapse=true would stop the run"
            if state.is_world_process_zero:
                logger.warning(f"Step {state.global_step}: {found[name]} within {self.window} rollouts; {remedy}.")
        # Every process logs the same averages, so that all stop together.
        control.should_training_stop |= bool(found) and self.stops
