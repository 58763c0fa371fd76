"""What trainers have, so that checkpoints are whole or not there and hold all that the rest of the run depends on."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from dgrpo.reliability.manifest import (
    UNFINISHED,
    put_in_place,
    resume_checkpoint,
    rotate,
    what_is_wrong,
    whole_checkpoints,
    write_manifest,
)
from dgrpo.reliability.same_run import RECORD, frozen_digest, plain, refuse_another_run, rows_digest


class WholeCheckpoints:
    """Checkpoints that are written aside and renamed when all of them is on the disk, with a manifest.

    Only then are old ones deleted. A write that fails leaves the last good one and says which that is. A trainer has
    one of these and calls it where transformers' Trainer saves and resumes.

    Args:
        trainer: whose checkpoints they are.

    Attributes:
        settings: what else the run was begun with, by section; compared when it is resumed.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.settings: dict[str, Any] = {}
        self.resumed_from: Path | None = None
        self._aside = False
        self._record: dict[str, Any] | None = None
        trainer.add_callback(_AtStart(self))

    def folder(self, output_dir: str) -> str:
        """Where Trainer is to write: aside, while a checkpoint is being written."""
        return os.path.join(output_dir, UNFINISHED) if self._aside else output_dir

    def _on_each_disk(self, action: Callable[[], None]) -> None:
        """Runs it on the main process, then on each machine's: without a shared disk each has files of its own."""
        accelerator = self.trainer.accelerator
        for chosen in (accelerator.is_main_process, accelerator.is_local_main_process):
            if chosen:
                action()
            accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _written_aside(self, final: Path, record: dict | None = None) -> Iterator[Path]:
        """A folder to write in, which then takes its name; a write that fails is an OSError with a remedy."""
        aside = final.parent / UNFINISHED
        self._on_each_disk(lambda: shutil.rmtree(aside, ignore_errors=True))

        def finish() -> None:
            written = aside / final.name
            if written.exists():
                if record is not None:
                    (written / RECORD).write_text(json.dumps(record, indent=1) + "\n")
                write_manifest(written)
            put_in_place(written, final)

        try:
            yield aside / final.name
            self.trainer.accelerator.wait_for_everyone()
            self._on_each_disk(finish)
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            whole = whole_checkpoints(final.parent)
            raise OSError(
                f"{final.name} could not be written: {error}. The last whole checkpoint is "
                f"{whole[-1] if whole else 'none'}; make room where output_dir={str(final.parent)!r} is, and resume."
            ) from error

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        assert self.trainer.args.output_dir is not None
        return Path(self.trainer.args.output_dir)

    def save(self, write: Callable[[], None]) -> None:
        """Has Trainer `write` a checkpoint aside, adds what it lacks, and gives it its name."""
        trainer, args = self.trainer, self.trainer.args
        final = self.output_dir / f"checkpoint-{trainer.state.global_step}"
        pushes = args.push_to_hub
        with self._written_aside(final, self._record or self.record()) as written:
            # Pushed when it is whole.
            self._aside, args.push_to_hub = True, False
            try:
                write()
                self._write_more(written)
            finally:
                self._aside, args.push_to_hub = False, pushes
        self.tidy(final)
        if pushes:
            trainer._push_from_checkpoint(str(final))

    def tidy(self, newest: Path | None = None) -> None:
        """Deletes what a kill left half written, and checkpoints beyond save_total_limit."""
        folder = self.output_dir
        best = self.trainer.state.best_model_checkpoint
        newest = newest or self.resumed_from
        keep = {Path(path) for path in (newest, best, *whole_checkpoints(folder)[-1:]) if path}
        self._on_each_disk(lambda: rotate(folder, self.trainer.args.save_total_limit, keep))

    def save_best(self, measured: dict) -> None:
        """Puts the weights into `best`, beside the checkpoints, with `measured` as best.json."""
        with self._written_aside(self.output_dir / "best") as written:
            self.trainer.save_model(str(written), _internal_call=True)
            if self.trainer.accelerator.is_main_process:
                (written / "best.json").write_text(json.dumps(measured) + "\n")

    def _write_more(self, written: Path) -> None:
        """Adds to the checkpoint what the trainer needs beyond transformers' files."""
        state = self.trainer.state
        if state.best_model_checkpoint and Path(state.best_model_checkpoint) == written:
            state.best_model_checkpoint = str(written.parents[1] / written.name)
            if self.trainer.args.should_save:
                state.save_to_json(str(written / "trainer_state.json"))

    def record(self) -> dict[str, Any]:
        """What the run was begun with: the trainer's settings, its rows and frozen weights, and `settings`."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        model = accelerator.unwrap_model(trainer.model)
        return plain(
            {
                "num_processes": accelerator.num_processes,
                "distributed_type": accelerator.distributed_type.value,
                "trainer": trainer.args.to_dict(),
                "training rows": rows_digest(trainer.train_dataset),
                "frozen weights": frozen_digest(model),
                **self.settings,
            }
        )

    def check(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint to resume from, verified, of this run; None for a new one.

        Raises:
            ValueError: the checkpoint is damaged, or was made with other settings.
        """
        self._record = self.record()
        if resume_from_checkpoint is True:
            checkpoint = resume_checkpoint(self.output_dir)
        else:
            checkpoint = resume_from_checkpoint or None
            if checkpoint and (wrong := what_is_wrong(checkpoint)):
                raise ValueError(
                    f"resume_from_checkpoint={checkpoint!r} cannot be resumed from: {wrong}. "
                    "resume_from_checkpoint=True takes the last one that is whole."
                )
        if checkpoint:
            refuse_another_run(checkpoint, self._record)
        self.resumed_from = Path(checkpoint) if checkpoint else None
        return checkpoint

    def at_end(self) -> bool:
        """Whether the run has made its last update: Trainer would make one more where it resumes from that."""
        trainer = self.trainer
        trainer.control.should_training_stop |= trainer.state.global_step >= trainer.state.max_steps
        return trainer.control.should_training_stop

    def restore(self) -> None:
        """Puts back, when all else is loaded, what `_write_more` has added."""


class _AtStart(TrainerCallback):
    """Trainer resets what it has summed since the last log after a checkpoint is loaded; this comes later still."""

    def __init__(self, checkpoints: WholeCheckpoints):
        self.checkpoints = checkpoints

    def on_train_begin(self, args, state, control, **kwargs):
        self.checkpoints.tidy()
        if self.checkpoints.resumed_from is not None:
            self.checkpoints.restore()


class ExactResume(WholeCheckpoints):
    """Checkpoints of a GRPO trainer: a run that resumes from one equals the run that was not stopped.

    Beside the model, optimizer and random states a checkpoint holds the micro-step counter, what was not logged yet,
    the last completions and, within a rollout's inner updates, the batches with their views; with `sync_ref_model` the
    reference model's weights.
    """

    trainer: Any  # a DiffuGRPOTrainer, whose module imports this one

    def __init__(self, trainer):
        super().__init__(trainer)
        plugin = trainer.accelerator.state.deepspeed_plugin
        if self._reference_moves and plugin is not None and plugin.zero_stage == 3:
            raise ValueError("sync_ref_model=True under ZeRO-3: the reference's weights cannot be saved; use ZeRO-2.")

    def _state_file(self, folder: Path) -> Path:
        return folder / f"rollout_{self.trainer.accelerator.process_index}.pt"

    def _write_more(self, written: Path) -> None:
        super()._write_more(written)
        trainer = self.trainer
        if trainer.args.save_only_model:
            return
        within = trainer._step % trainer.generate_every != 0
        logs: dict[str, Any] = {name: list(trainer._logs[name]) for name in ("prompt", "completion", "advantages")}
        for kind in ("rewards", "extra"):
            logs[kind] = {name: list(rows) for name, rows in trainer._logs[kind].items()}
        state = {
            "step": trainer._step,
            "buffered_inputs": trainer._buffered_inputs if within else None,
            "metrics": dict(trainer._metrics["train"]),
            "loss_sum": trainer._tr_loss.detach().clone(),
            "last_logged": trainer._globalstep_last_logged,
            "guards": [guard and guard.state_dict() for guard in (trainer.update_guard, trainer.reward_guard)],
            # As text: a reward may log objects that a safe load refuses.
            "logs": json.dumps(logs, default=str),
        }
        torch.save(state, self._state_file(written))
        if self._reference_moves and trainer.accelerator.is_local_main_process:
            torch.save(self._reference.state_dict(), written / "reference.pt")

    @property
    def _reference_moves(self) -> bool:
        return bool(self.trainer.args.sync_ref_model) and self.trainer.ref_model is not None

    @property
    def _reference(self) -> torch.nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.ref_model)

    def check(self, resume_from_checkpoint: str | bool | None) -> str | None:
        checkpoint = super().check(resume_from_checkpoint)
        if checkpoint and not self._state_file(Path(checkpoint)).exists():
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r}: {self._state_file(Path(checkpoint)).name} is missing; it was "
                "written by another trainer, by fewer processes, or with save_only_model=True."
            )
        return checkpoint

    def restore(self) -> None:
        # Several processes on a CPU call it cpu:0, cpu:1, ..., which torch.load does not know.
        trainer, device = self.trainer, self.trainer.accelerator.device
        where = "cpu" if device.type == "cpu" else device
        assert self.resumed_from is not None
        state = torch.load(self._state_file(self.resumed_from), map_location=where, weights_only=True)
        trainer._step, trainer._buffered_inputs = state["step"], state["buffered_inputs"]
        for guard, stored in zip((trainer.update_guard, trainer.reward_guard), state["guards"], strict=True):
            if guard and stored:
                guard.load_state_dict(stored)
        trainer._metrics["train"].update(state["metrics"])
        logs = json.loads(state["logs"])
        for name in ("prompt", "completion", "advantages"):
            trainer._logs[name].extend(logs[name])
        for kind in ("rewards", "extra"):
            for name, rows in logs[kind].items():
                trainer._logs[kind][name].extend(rows)
        trainer._tr_loss.copy_(state["loss_sum"])
        trainer._globalstep_last_logged = state["last_logged"]
        # `train_loss`, as the samples per second beside it, is of this part of the run alone.
        trainer._total_loss_scalar = -float(trainer._tr_loss)
        if self._reference_moves:
            weights = torch.load(self.resumed_from / "reference.pt", map_location="cpu", weights_only=True)
            self._reference.load_state_dict(weights)
