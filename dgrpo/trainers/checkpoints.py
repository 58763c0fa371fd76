"""Checkpoints that are whole or not there, and hold all that the rest of the run depends on."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Where a checkpoint is written before it is whole, inside the run's folder; what a kill leaves there is never read.
UNFINISHED = "unfinished"


def whole_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints in the folder whose writing was finished, by increasing step."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    whole = [path for path in folders if (path / "trainer_state.json").exists()]
    return sorted(whole, key=lambda path: int(path.name.split("-")[1]))


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that all processes see whole, or None; one cut off by a kill is passed over."""
    # Machines without a shared disk were not killed in the same instant.
    seen = gather_object([[path.name for path in whole_checkpoints(output_dir)]])
    common = [path for path in whole_checkpoints(output_dir) if all(path.name in names for names in seen)]
    return str(common[-1]) if common else None


def refuse_to_mix_runs(output_dir: str | Path) -> None:
    """ValueError where a new run would write among the checkpoints of an earlier one."""
    if whole := whole_checkpoints(output_dir):
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds {whole[-1].name} of an earlier run: --resume true goes on with it; "
            "for a new run choose another folder, or delete this one."
        )


def move_earlier_run_aside(output_dir: str | Path) -> Path | None:
    """Renames the folder of an earlier run that left no checkpoint, or its report would show two runs as one.

    `runs/gsm8k` becomes `runs/gsm8k.1`, or the next free number; that folder, or None where there was no run.
    """
    folder, state = Path(output_dir), PartialState()
    moved = None
    written = ("metrics.csv", "summary.json", "evaluation_before.json")
    if state.is_main_process and any((folder / name).exists() for name in written):
        number = next(n for n in count(1) if not folder.with_name(f"{folder.name}.{n}").exists())
        moved = folder.rename(folder.with_name(f"{folder.name}.{number}"))
        logger.warning(f"output_dir={str(folder)!r} held an earlier run; it is in {moved} now.")
    state.wait_for_everyone()
    return moved


def resume_checkpoint(output_dir: str | Path, resume: bool) -> str | None:
    """The newest whole checkpoint where a run is to be resumed; None, with a warning, where there is none."""
    if not resume:
        return None
    if (checkpoint := last_complete_checkpoint(output_dir)) is None:
        logger.warning(f"resume=True: {output_dir} holds no whole checkpoint; the run starts from the beginning.")
    return checkpoint


def _write_through(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(written: Path, final: Path) -> None:
    """Renames a folder that is whole to its name, in place of one that stands there."""
    if not written.exists():
        return
    # Without this a power cut after the rename would leave empty files.
    for path in [*written.rglob("*"), written]:
        _write_through(path)
    if final.exists():
        replaced = written.with_name(f"replaced-{final.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        written.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        written.rename(final)
    written.parent.rmdir()
    _write_through(final.parent)


def rotate(output_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Deletes the oldest checkpoints beyond `limit`, none of `keep`, and what was left unfinished."""
    aside, whole, keep = output_dir / UNFINISHED, whole_checkpoints(output_dir), set(keep)
    surplus = len(whole) - limit if limit and limit > 0 else 0
    for old in [path for path in whole if path not in keep][: max(surplus, 0)]:
        # Out of sight first: half a checkpoint must not look like one.
        aside.mkdir(exist_ok=True)
        old.rename(aside / old.name)
    shutil.rmtree(aside, ignore_errors=True)


class WholeCheckpoints:
    """What it adds to transformers' Trainer: a checkpoint is written aside and renamed when all of it is on the disk.

    Only then are old ones deleted. A write that fails leaves the last good one and says which that is.
    """

    _writes_aside = False

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial=trial)
        return os.path.join(folder, UNFINISHED) if self._writes_aside else folder

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._writes_aside:
            super()._push_from_checkpoint(checkpoint_folder)

    def _on_each_disk(self, action) -> None:
        """Runs it on the main process, then on each machine's: without a shared disk each has files of its own."""
        for chosen in (self.accelerator.is_main_process, self.accelerator.is_local_main_process):
            if chosen:
                action()
            self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _written_aside(self, final: Path) -> Iterator[Path]:
        """A folder to write in, which then takes its name; a write that fails is an OSError with a remedy."""
        aside = final.parent / UNFINISHED
        self._on_each_disk(lambda: shutil.rmtree(aside, ignore_errors=True))
        try:
            yield aside / final.name
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            whole = whole_checkpoints(final.parent)
            raise OSError(
                f"{final.name} could not be written: {error}. The last whole checkpoint is "
                f"{whole[-1] if whole else 'none'}; make room where output_dir={str(final.parent)!r} is, and resume."
            ) from error
        self.accelerator.wait_for_everyone()
        self._on_each_disk(lambda: put_in_place(aside / final.name, final))

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial))
        final = folder / f"checkpoint-{self.state.global_step}"
        with self._written_aside(final) as written:
            self._writes_aside = True
            try:
                super()._save_checkpoint(model, trial)
                self._write_more(written)
            finally:
                self._writes_aside = False
        self._tidy(folder, final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _tidy(self, folder: Path, newest: Path | None) -> None:
        """Deletes what a kill left half written, and checkpoints beyond save_total_limit."""
        best = self.state.best_model_checkpoint
        keep = {Path(path) for path in (newest, best, *whole_checkpoints(folder)[-1:]) if path}
        self._on_each_disk(lambda: rotate(folder, self.args.save_total_limit, keep))

    def save_best(self, found: dict) -> None:
        """Puts the weights into `best`, beside the checkpoints, with `found` as best.json."""
        with self._written_aside(Path(self.args.output_dir) / "best") as written:
            self.save_model(str(written), _internal_call=True)
            if self.accelerator.is_main_process:
                (written / "best.json").write_text(json.dumps(found) + "\n")

    def _write_more(self, written: Path) -> None:
        """Adds to the checkpoint what the trainer needs beyond transformers' files."""
        best = self.state.best_model_checkpoint
        if best and Path(best) == written:
            self.state.best_model_checkpoint = str(written.parents[1] / written.name)
            if self.args.should_save:
                self.state.save_to_json(str(written / "trainer_state.json"))


class _AtStart(TrainerCallback):
    """Trainer resets what it has summed since the last log after a checkpoint is loaded; this comes later still."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, carried = self.trainer, self.trainer._carried
        trainer._tidy(Path(args.output_dir), None)
        if carried is None:
            return
        trainer._tr_loss.copy_(carried["loss_sum"])
        trainer._globalstep_last_logged = carried["last_logged"]
        # `train_loss`, as the samples per second beside it, is of this part of the run alone.
        trainer._total_loss_scalar = -float(trainer._tr_loss)
        trainer._carried = None


class ExactResume(WholeCheckpoints):
    """What it adds to TRL's GRPOTrainer: a run that goes on from a checkpoint equals the one that was not stopped.

    Beside the model, optimizer and random states a checkpoint holds the micro-step counter, what was not logged yet,
    the last completions and, within a rollout's inner updates, the batches with their views.
    """

    _carried: dict | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_AtStart(self))

    def _state_file(self, folder: Path) -> Path:
        return folder / f"rollout_{self.accelerator.process_index}.pt"

    def _write_more(self, written: Path) -> None:
        super()._write_more(written)
        if self.args.save_only_model:
            return
        within = self._step % self.generate_every != 0
        logs = {name: list(self._logs[name]) for name in ("prompt", "completion", "advantages")}
        logs |= {kind: {name: list(rows) for name, rows in self._logs[kind].items()} for kind in ("rewards", "extra")}
        state = {
            "step": self._step,
            "num_processes": self.accelerator.num_processes,
            "buffered_inputs": self._buffered_inputs if within else None,
            "metrics": dict(self._metrics["train"]),
            "loss_sum": self._tr_loss.detach().clone(),
            "last_logged": self._globalstep_last_logged,
            "guards": [guard and guard.state_dict() for guard in (self.update_guard, self.reward_guard)],
            # As text: a reward may log objects that a safe load refuses.
            "logs": json.dumps(logs, default=str),
        }
        torch.save(state, self._state_file(written))

    def _run_epoch(self, *args, **kwargs):
        # Trainer would make one more update where the checkpoint is that of the last one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = self._state_file(Path(checkpoint))
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r}: {path.name} is missing; it was written by another trainer, "
                "by fewer processes, or with save_only_model=True."
            )
        # Several processes on a CPU call it cpu:0, cpu:1, ..., which torch.load does not know.
        device = self.accelerator.device
        state = torch.load(path, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
        if state["num_processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} comes from {state['num_processes']} processes, this run has "
                f"{self.accelerator.num_processes}; resume with the same number."
            )
        self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
        for guard, stored in zip((self.update_guard, self.reward_guard), state["guards"], strict=True):
            if guard and stored:
                guard.load_state_dict(stored)
        self._metrics["train"].update(state["metrics"])
        logs = json.loads(state["logs"])
        for name in ("prompt", "completion", "advantages"):
            self._logs[name].extend(logs[name])
        for kind in ("rewards", "extra"):
            for name, rows in logs[kind].items():
                self._logs[kind][name].extend(rows)
        self._carried = {"loss_sum": state["loss_sum"], "last_logged": state["last_logged"]}
