"""Checkpoint folders: which are whole, what is wrong with the others, and how one takes its name.

A checkpoint is whole when every file has the size and the SHA-256 that `manifest.json`, written last, says it has.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Where a checkpoint is written before it is whole, inside the run's folder; what a kill leaves there is never read.
UNFINISHED = "unfinished"
MANIFEST = "manifest.json"


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Everything in the folder that is named like a checkpoint, by increasing step."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def whole_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints in the folder whose writing was finished, by increasing step; their files are not read."""
    return [path for path in checkpoint_folders(output_dir) if (path / MANIFEST).exists()]


def files_of(folder: Path) -> dict[str, Path]:
    """A checkpoint's files by their name within it, but for the manifest and hidden ones."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name != MANIFEST and not path.name.startswith(".")}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Writes down names, sizes and SHA-256 of all files that the folder holds."""
    files = {name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for name, path in files_of(folder).items()}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")


def what_is_wrong(folder: str | Path) -> str | None:
    """What of a checkpoint is not as it was written, in a few words; None where it is whole."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {str(name): (int(each["size"]), str(each["sha256"])) for name, each in listed.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was cut off, or written before checkpoints had one"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    found = files_of(folder)
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name} does not belong to it" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        size, digest = expected[name]
        try:
            if (present := found[name].stat().st_size) != size:
                wrong.append(f"{name} has {present} bytes instead of {size}")
            elif sha256_of(found[name]) != digest:
                wrong.append(f"{name} has another content than was written (SHA-256)")
        except OSError as error:
            wrong.append(f"{name} cannot be read ({error.strerror})")
    more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return ", ".join(wrong[:3]) + more if wrong else None


def resume_checkpoint(output_dir: str | Path, resume: bool = True) -> str | None:
    """The newest checkpoint that is whole on every machine, where a run is to be resumed; None where there is none.

    Newer ones that are damaged are named and set aside. Collective: every process must call it.

    Raises:
        ValueError: there are checkpoints, but none of them is whole.
    """
    if not resume:
        return None
    folder, state = Path(output_dir), PartialState()
    # Machines without a shared disk were not killed in the same instant.
    names = set().union(*gather_object([[path.name for path in checkpoint_folders(folder)]]))
    wrong: dict[str, str] = {}
    for name in sorted(names, key=lambda name: int(name.split("-")[1]), reverse=True):
        # One process of each machine reads the files.
        problems = gather_object([what_is_wrong(folder / name) if state.is_local_main_process else None])
        if not any(problems):
            if state.is_local_main_process:
                _set_aside(folder, wrong)
            state.wait_for_everyone()
            if wrong and state.is_main_process:
                told = "; ".join(f"{name}: {problem}" for name, problem in wrong.items())
                logger.warning(f"{told}. Set aside as damaged-...; the run resumes from {name}.")
            return str(folder / name)
        wrong[name] = next(filter(None, problems))
    if wrong:
        told = "; ".join(f"{name}: {problem}" for name, problem in wrong.items())
        raise ValueError(
            f"resume=True: no checkpoint in output_dir={str(output_dir)!r} is whole ({told}). Restore its files, or "
            "start a new run in another folder."
        )
    if state.is_main_process:
        logger.warning(f"resume=True: {output_dir} holds no checkpoint; the run starts from the beginning.")
    return None


def _set_aside(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).exists():
            target = folder / f"damaged-{name}"
            shutil.rmtree(target, ignore_errors=True)
            (folder / name).rename(target)


def refuse_to_mix_runs(output_dir: str | Path) -> None:
    """ValueError where a new run would write among the checkpoints of an earlier one."""
    if found := checkpoint_folders(output_dir):
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds {found[-1].name} of an earlier run: --resume true resumes it; "
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
