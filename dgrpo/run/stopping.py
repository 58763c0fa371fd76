"""Ctrl-C and SIGTERM: a checkpoint after the update that is being made, then one line that says how to resume."""

import signal
import sys
import threading
from types import FrameType

import torch
from transformers import Trainer, TrainerCallback

from dgrpo.reliability.manifest import whole_checkpoints


class StopOnSignal(TrainerCallback):
    """Ends a run when it is told to: within it, the first signal waits for the update and its checkpoint.

    Where the run saves no checkpoints, before the first update, and at the second signal it ends at once. `leave` then
    ends the process with the code that the shell expects: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.received: int | None = None
        self.stopped = False
        self._waits = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, number
        if again or not self._waits:
            # Of no Exception's kind: a reward's own `except Exception` does not swallow it.
            raise KeyboardInterrupt

    def on_train_begin(self, args, state, control, **kwargs):
        self._waits = args.save_strategy != "no"

    def on_step_end(self, args, state, control, **kwargs):
        accelerator, stops = self.trainer.accelerator, self.received is not None
        if accelerator.num_processes > 1:
            # All processes must stop after the same update.
            stops = bool(accelerator.gather(torch.tensor([stops], device=accelerator.device)).any())
        if stops and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            control.should_save = self._waits

    def leave(self) -> None:
        """Says how to resume, and ends the process."""
        step, folder = self.trainer.state.global_step, self.trainer.args.output_dir
        assert folder is not None
        strategy = str(getattr(self.trainer.args.save_strategy, "value", None))
        number = self.received or signal.SIGINT
        whole = whole_checkpoints(folder)
        rest = (
            f"the same command with --resume true resumes from {whole[-1]}"
            if whole
            else f"it has no checkpoint to resume from (save_strategy={strategy!r})"
        )
        if self.trainer.accelerator.is_main_process:
            print(
                f"Stopped by {signal.Signals(number).name} after update {step}; {rest}.", file=sys.stderr, flush=True
            )
        raise SystemExit(128 + number)
