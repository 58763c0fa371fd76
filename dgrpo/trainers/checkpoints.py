"""What a checkpoint holds beyond the model and the optimizer, and which checkpoints can be resumed."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dgrpo.trainers.grpo import DiffuGRPOTrainer


def _state_file(trainer: "DiffuGRPOTrainer", folder: Path) -> Path:
    return folder / f"rollout_{trainer.accelerator.process_index}.pt"


def save_state(trainer: "DiffuGRPOTrainer", folder: Path) -> None:
    """Writes the micro-step counter, metrics not yet logged and, within a rollout's inner updates, its batches."""
    folder.mkdir(parents=True, exist_ok=True)
    within = trainer._step % trainer.generate_every != 0
    state = {
        "step": trainer._step,
        "num_processes": trainer.accelerator.num_processes,
        "buffered_inputs": trainer._buffered_inputs if within else None,
        "metrics": dict(trainer._metrics["train"]),
    }
    torch.save(state, _state_file(trainer, folder))


def load_state(trainer: "DiffuGRPOTrainer", folder: Path) -> None:
    """Puts what save_state wrote back; ValueError where it is missing or of another number of processes."""
    path = _state_file(trainer, folder)
    if not path.exists():
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r}: {path.name} is missing; not written by this trainer."
        )
    state = torch.load(path, map_location=trainer.accelerator.device, weights_only=True)
    if state["num_processes"] != trainer.accelerator.num_processes:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} comes from {state['num_processes']} processes, this run has "
            f"{trainer.accelerator.num_processes}; resume with the same number."
        )
    trainer._step, trainer._buffered_inputs = state["step"], state["buffered_inputs"]
    trainer._metrics["train"].update(state["metrics"])


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint whose writing was finished, or None; one cut off by a kill is passed over."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    whole = [path for path in folders if (path / "trainer_state.json").exists() and list(path.glob("rollout_*.pt"))]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None
