"""A sandbox for programs that a model wrote: run them outside this process, without rights, within hard limits.

    outcome = run("print(1 + 1)")          # Outcome(output="2\\n", exit_code=0, timed_out=False)
    layers()                               # ("own files", "own user", "resource limits", "landlock", "seccomp")

A program runs in Python's own interpreter without third-party packages, with empty standard input and a scrubbed
environment. It has no network and starts no process, so there is nothing to escape into and nothing left to kill.
It is a child of a warm parent (`rewards/sandbox/parent.py`), one for each process that judges programs; what holds it
is written in `rewards/sandbox/confine.py`. Bounded for each program, in every mode:

- processor time (`cpu_seconds`), and time without using or waiting for a processor (`idle_seconds`);
- memory: one process, with its threads, of `memory_mib`;
- output and largest file (`file_mib`), and all files together: 16 MiB in memory that end with the program, where a
  folder of its own can be mounted (layer "own files"); elsewhere a program can make or change no file.

Where `bwrap` works (tried once by running it), the warm parent and its children are inside bubblewrap, which also
hides which files exist outside; without it the same limits, user, Landlock rules and system call filter hold on their
own. `layers` says which are in force; a machine that can offer too little is refused rather than trusted.

Linux 5.3 or later. Any number of programs may run at once, from any threads.
"""

import atexit
import dataclasses
import functools
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Executed in this order in the warm parent, which need not, and in bubblewrap could not, read this project's files.
MODULES = ("confine", "bridge", "judge", "parent")
BOOT = """
import json, sys, types
with open(int(sys.argv[1]), "rb") as file:
    file.seek(0)
    sources, arguments = json.load(file)
for name, source in sources.items():
    module = sys.modules[name] = types.ModuleType(name)
    package, _, child = name.rpartition(".")
    if package:
        setattr(sys.modules[package], child, module)
    exec(compile(source, name, "exec"), module.__dict__)
sys.modules["rewards.sandbox.parent"].main(*arguments)
"""
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
START_SECONDS = 60.0

Part = tuple[str, Sequence[Any]]


@dataclass(frozen=True)
class Limits:
    """What one program may use; a program that wants more fails, or is killed."""

    idle_seconds: float = 5.0
    """For which it may sleep; time for which it uses or waits for a processor does not count."""
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
    """Whether it was killed because it slept."""


def readable_paths() -> list[str]:
    """Where Python and its libraries lie, the interpreter's own folder first; the only files a program can read."""
    system = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    devices = ["/dev/urandom", "/dev/random", "/dev/zero"]
    return [sys.base_prefix, *system, "/usr/share/zoneinfo", *devices]


def bubblewrap_command() -> list[str]:
    """bwrap's arguments: the system read-only, no network, its own processes."""
    # The full path: the scrubbed environment's PATH need not name the folder that it was found in.
    command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--new-session", "--cap-drop", "ALL"]
    # With this right the warm parent mounts a folder for each program; the programs give it up.
    command += ["--cap-add", "CAP_SYS_ADMIN"]
    for path in dict.fromkeys([sys.base_prefix, "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]):
        command += ["--ro-bind-try", path, path]
    return [*command, "--proc", "/proc", "--dev", "/dev", "--dir", "/tmp", "--remount-ro", "/"]


def in_memory(data: bytes) -> int:
    """The descriptor of a new file in memory."""
    fd = os.memfd_create("dgrpo-sandbox")
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    return fd


class WarmParent:
    """A running warm parent, as the process that started it sees it."""

    def __init__(self, bubblewrap: bool) -> None:
        folder = Path(__file__).parent
        sources = {"rewards": "", "rewards.sandbox": ""}
        sources |= {f"rewards.sandbox.{name}": folder.joinpath(f"{name}.py").read_text("utf-8") for name in MODULES}
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = in_memory(json.dumps([sources, [theirs.fileno(), readable_paths(), bubblewrap]]).encode())
        self.complaints = open(in_memory(b""), "r+b")  # noqa: SIM115 - `close` does
        # The base interpreter, not the virtual environment's: no third-party packages.
        python = [os.path.realpath(sys.executable), "-s", "-S", "-P", "-B", "-c", BOOT, str(settings)]
        self.process = subprocess.Popen(
            [*bubblewrap_command(), *python] if bubblewrap else python,
            stdin=subprocess.DEVNULL,
            stdout=self.complaints,
            stderr=self.complaints,
            env=ENVIRONMENT,
            cwd="/",
            pass_fds=(theirs.fileno(), settings),
            start_new_session=True,
        )
        theirs.close()
        os.close(settings)

    def ask(self, parts: Sequence[Part], limits: Limits, seconds: float | None) -> Outcome | None:
        """What became of a job's last part; None where the warm parent ended, or gave no answer in time."""
        fds = [in_memory(b""), *(in_memory(json.dumps(part).encode()) for part in parts)]
        answer, status = os.pipe()
        try:
            try:
                request = json.dumps(dataclasses.asdict(limits)).encode()
                socket.send_fds(self.control, [request], [status, *fds])
            except OSError:
                return None
            finally:
                os.close(status)
            if seconds is not None and not select.select([answer], [], [], seconds)[0]:
                return None
            if not (said := os.read(answer, 4096)):
                return None
            return Outcome(os.pread(fds[0], limits.file_mib * 2**20, 0).decode(errors="replace"), **json.loads(said))
        finally:
            for fd in [answer, *fds]:
                os.close(fd)

    def close(self) -> str:
        """End it with all its programs; what it complained of."""
        self.control.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with self.complaints:
            self.complaints.seek(0)
            return self.complaints.read(4096).decode(errors="replace").strip()


_parents: dict[tuple[int, bool], WarmParent] = {}
_lock = threading.Lock()


def warm_parent(bubblewrap: bool, instead_of: WarmParent | None = None) -> WarmParent:
    """This process's warm parent; a new one where there is none, or instead of one that has ended."""
    key = os.getpid(), bubblewrap  # a fork of this process has its own
    with _lock:
        if _parents.get(key) is instead_of:
            if instead_of is not None:
                instead_of.close()
            _parents[key] = WarmParent(bubblewrap)
        return _parents[key]


@atexit.register
def close_parents() -> None:
    """End the warm parents of this process; the next program starts a new one."""
    with _lock:
        for key in [key for key in _parents if key[0] == os.getpid()]:
            _parents.pop(key).close()


def try_layers(bubblewrap: bool) -> tuple[str, ...] | str:
    """The layers that hold on this machine with or without bubblewrap, or why a program cannot be run so."""
    parent = warm_parent(bubblewrap)
    outcome = parent.ask([("report", [])], Limits(), START_SECONDS)
    if outcome is None:
        with _lock:
            _parents.pop((os.getpid(), bubblewrap), None)
        return parent.close() or f"no answer in {START_SECONDS} s"
    if outcome.exit_code != 0 or not outcome.output.startswith("["):
        return outcome.output.strip() or f"exit code {outcome.exit_code}"
    return tuple(json.loads(outcome.output))


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


def call(*parts: Part, limits: Limits) -> Outcome:
    """The outcome of the last of one or two calls (`parent.CALLS`), each in a confined process of its own.

    RuntimeError where the warm parent ends twice, as where the machine has no memory left.
    """
    bubblewrap = "bubblewrap" in layers()
    parent = None
    for _ in range(2):
        parent = warm_parent(bubblewrap, instead_of=parent)
        if (outcome := parent.ask(parts, limits, None)) is not None:
            return outcome
    raise RuntimeError(f"the process that runs programs has ended: {parent.close() if parent else ''}")


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run a program to its end or to a limit, whichever comes first."""
    return call(("run", [program]), limits=limits or Limits())
