"""A sandbox for programs that a model wrote: run them outside this process, without rights, within hard limits.

    outcome = run("print(1 + 1)")          # Outcome(output="2\\n", exit_code=0, timed_out=False)
    layers()                               # ("own user", "resource limits", "landlock", "seccomp")

A program runs in Python's own interpreter without third-party packages, in an empty folder that is deleted afterwards,
with empty standard input and a scrubbed environment. Wall and CPU time, memory, output and file sizes and open files
are limited, it has no network, and it is one process with one thread: fork, exec and threads are refused, so there is
nothing to escape into and nothing left to kill. What holds it is written in `rewards/sandbox/confine.py`.

Where `bwrap` works (tried once by running it), all this happens inside bubblewrap, in namespaces of its own. Without
it the same limits, user, Landlock rules and system call filter hold on their own; `layers` says which are in force,
and a machine that can offer too little is refused rather than trusted. Two things need bubblewrap: a bound on the sum
of all files that a program writes within its time, and hiding which files exist outside.

Linux 5.3 or later. Any number of programs may run at once, from any threads.
"""

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CONFINE = Path(__file__).with_name("confine.py")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
FOLDER_IN_BUBBLEWRAP = "/program"
START_SECONDS = 30.0

Running = tuple[subprocess.Popen[bytes], IO[bytes]]


@dataclass(frozen=True)
class Limits:
    """What one program may use; a program that wants more fails, or is killed."""

    wall_seconds: float = 10.0
    """A last resort for programs that sleep; a busy machine must not make an honest program fail."""
    cpu_seconds: int = 3
    memory_mib: int = 512
    file_mib: int = 1
    """Largest file, and largest output on stdout and stderr together."""
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """What became of a program: its stdout and stderr, its exit code (negative: killed by that signal)."""

    output: str
    exit_code: int
    timed_out: bool


def readable_paths() -> list[str]:
    """Where Python and its libraries lie, the interpreter's own folder first; the only files a program can read."""
    system = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    devices = ["/dev/urandom", "/dev/random", "/dev/zero"]
    return [sys.base_prefix, *system, "/usr/share/zoneinfo", *devices]


def bubblewrap_command(limits: Limits) -> list[str]:
    """bwrap's arguments: the system read-only, a small folder in memory, no network, its own processes."""
    # The full path: the scrubbed environment's PATH need not name the folder that it was found in.
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
    ]
    for path in dict.fromkeys([sys.base_prefix, "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]):
        command += ["--ro-bind-try", path, path]
    size = str(16 * limits.file_mib * 2**20)
    command += ["--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", FOLDER_IN_BUBBLEWRAP]
    return [*command, "--chdir", FOLDER_IN_BUBBLEWRAP]


@contextlib.contextmanager
def confined(
    program: str, limits: Limits, *, bubblewrap: bool, pass_fds: Sequence[int] = (), report: bool = False
) -> Iterator[Running]:
    """A running program and the file that takes its output; killed, with its folder deleted, when the block ends."""
    settings = {
        "memory_bytes": limits.memory_mib * 2**20,
        "file_bytes": limits.file_mib * 2**20,
        "open_files": limits.open_files,
        "cpu_seconds": limits.cpu_seconds,
        "readable": readable_paths(),
        "bubblewrap": bubblewrap,
        "report": report,
    }
    # The base interpreter, not the virtual environment's: no third-party packages, and no need to read this project.
    python = [
        os.path.realpath(sys.executable),
        "-s",
        "-S",
        "-P",
        "-B",
        "-c",
        CONFINE.read_text(),
        json.dumps(settings),
    ]
    folder = tempfile.mkdtemp(prefix="dgrpo-sandbox-")
    try:
        with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as output:
            source.write(program.encode("utf-8", "surrogatepass"))
            source.seek(0)
            # Output goes to a file whose size the kernel limits: nothing to read while the program runs.
            process = subprocess.Popen(
                [*bubblewrap_command(limits), *python] if bubblewrap else python,
                stdin=source,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
                cwd=folder,
                pass_fds=pass_fds,
                start_new_session=True,
            )
            try:
                yield process, output
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for a process to end, without the polling of `Popen.wait`, which costs more than most programs run."""
    handle = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(1000 * seconds))
    finally:
        os.close(handle)


def try_layers(bubblewrap: bool) -> tuple[str, ...] | str:
    """The layers that hold on this machine with or without bubblewrap, or why a program cannot be run so."""
    with confined("", Limits(), bubblewrap=bubblewrap, report=True) as (process, output):
        if not ends_within(process, START_SECONDS):
            return f"no answer in {START_SECONDS} s"
        exit_code = process.wait()
        output.seek(0)
        said = output.read(4096).decode(errors="replace").strip()
    if exit_code != 0 or not said.startswith("["):
        return said or f"exit code {exit_code}"
    return tuple(json.loads(said))


@functools.cache
def layers() -> tuple[str, ...]:
    """What confines programs on this machine, tried once: with "bubblewrap" first where it works.

    RuntimeError where nothing sufficient works, with the reason and the remedy.
    """
    found = try_layers(bubblewrap=True) if shutil.which("bwrap") else "bwrap is not installed"
    if isinstance(found, str):
        reason, found = found, try_layers(bubblewrap=False)
        if isinstance(found, str):
            raise RuntimeError(
                f"programs cannot be run safely on this machine. With bubblewrap: {reason}. Without: {found}. "
                "Install bubblewrap (`apt-get install bubblewrap`), or use Linux 5.13 or later with seccomp."
            )
    return found


def start(program: str, limits: Limits, pass_fds: Sequence[int] = ()) -> contextlib.AbstractContextManager[Running]:
    """A running program and its output file, as a context; under the strongest confinement of this machine."""
    return confined(program, limits, bubblewrap="bubblewrap" in layers(), pass_fds=pass_fds)


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run a program to its end or to a limit, whichever comes first."""
    limits = limits or Limits()
    with start(program, limits) as (process, output):
        timed_out = not ends_within(process, limits.wall_seconds)
        if timed_out:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        said = output.read(limits.file_mib * 2**20).decode(errors="replace")
        return Outcome(said, process.returncode, timed_out)
