"""One run at a time writes a folder."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path


def lock_file(output_dir: str | Path) -> Path:
    """Beside the folder, which a new run may rename; within it, where nothing can be written beside it."""
    folder = Path(output_dir).absolute()
    beside = os.access(folder.parent, os.W_OK) or not folder.parent.exists()
    return folder.with_name(f".{folder.name}.lock") if beside else folder / ".lock"


@contextlib.contextmanager
def locked(output_dir: str | Path) -> Iterator[None]:
    """Holds the folder for the length of the block.

    The lock is the kernel's, which releases it when the process ends, however it ends; processes that a run forks do
    not inherit it. Within one process it does nothing.

    Raises:
        ValueError: another process holds it.
    """
    path = lock_file(output_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise ValueError(
                f"output_dir={str(output_dir)!r} is being written by another run ({holder}): wait for its end, "
                "or choose another folder."
            ) from None
        # The run that held it before may have deleted the file in this instant.
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
