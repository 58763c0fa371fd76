"""What keeps a run alive, or stops it in time, when its numbers go wrong."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from dgrpo.report.metrics import WATCHED, cliffs

logger = logging.get_logger(__name__)

# Skipped updates whose batches each process keeps; a run that limps on must not fill the disk.
MAX_KEPT = 20


class _MicroBatch(NamedTuple):
    inputs: dict[str, Tensor]
    loss: float


class SkipsBadUpdates:
    """What it adds to TRL's GRPOTrainer: an update with a NaN or infinite loss or gradient is not made.

    Its batch is named and kept in `bad_batches`; `max_skipped_updates` in a row end the run.
    """

    _skipped_in_a_row = 0

    def __init__(self, *args, **kwargs):
        self._update: list[_MicroBatch] = []
        self._num_kept = 0
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.max_skipped_updates is None or self._mode != "train":
            return loss
        value = float(loss.detach())
        self._update.append(_MicroBatch(inputs, value))
        # Its gradient may happen to be finite; made NaN it shows on every process, and under ZeRO, in the norm.
        return loss if torch.isfinite(loss) else loss * torch.nan

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm; where it is not finite the gradient is gone when the optimizer comes to it."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.args.max_skipped_updates is None:
            return norm
        # DeepSpeed has come to its step by now, and found the same; its sharded optimizers skip it themselves.
        bad = self.accelerator.optimizer_step_was_skipped or not torch.isfinite(torch.as_tensor(float(norm)))
        self._metrics["train"]["skipped_updates"].append(float(bad))
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if bad else 0
        if bad:
            model.zero_grad()
            self._keep_and_tell(float(norm))
        self._update = []
        return norm

    def _keep_and_tell(self, norm: float) -> None:
        step, rank = self.state.global_step + 1, self.accelerator.process_index
        bad = [number for number, each in enumerate(self._update) if not torch.isfinite(torch.tensor(each.loss))]
        path = Path(self.args.output_dir) / "bad_batches" / f"update_{step}_process_{rank}"
        # Where every loss is finite it cannot be told whose gradient was not: all processes keep what they had.
        located = self.any_process(bool(bad))
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
        if self._skipped_in_a_row >= self.args.max_skipped_updates:
            raise FloatingPointError(
                f"max_skipped_updates={self.args.max_skipped_updates}: so many updates in a row had a NaN or infinite "
                f"loss or gradient, the last one update {step}. Their batches are in {path.parent}. The weights are "
                "as they were before. Lower learning_rate or max_grad_norm, look at the rewards, or resume from an "
                "earlier checkpoint."
            )

    def _in_words(self, micro_batch: _MicroBatch) -> dict:
        """A micro-batch to read: its loss and, row by row, prompt, completion and advantage."""
        inputs, decode = micro_batch.inputs, self._tokenizer.decode
        rows = zip(
            inputs["prompt_ids"].cpu(),
            inputs["prompt_mask"].bool().cpu(),
            inputs["completion_ids"].cpu(),
            inputs["completion_mask"].bool().cpu(),
            inputs["advantages"].tolist(),
            strict=True,
        )
        texts = [
            {"prompt": decode(prompt[shown]), "completion": decode(completion[kept]), "advantage": advantage}
            for prompt, shown, completion, kept, advantage in rows
        ]
        return {"loss": str(micro_batch.loss), "rows": texts}


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
