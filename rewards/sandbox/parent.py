"""The warm parent: one process that has imported what programs need, and forks a confined child for each of them.

`rewards.sandbox` starts one in each process that judges programs, with an environment of its own and nothing to hide,
and sends it jobs through a socket. A job has one part or two, each a call in a child of its own; two are connected by
pipes. The children share with the parent, and with each other, only what was in memory before any job came. The parent
reads nothing that a program wrote, cannot be looked into (`confine.py`), and ends with the process that started it.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

from rewards.sandbox import bridge, judge
from rewards.sandbox.confine import Confinement

REFUSED = 125  # exit code: the machine offers too little to confine a program
# What programs and tests import most, so that they need not; anything else of the standard library they can import.
WARM = """
abc argparse array ast asyncio base64 bisect calendar cmath collections.abc concurrent.futures contextlib copy csv
dataclasses datetime decimal enum fnmatch fractions functools hashlib heapq inspect io itertools json locale logging
math numbers operator os pathlib pprint queue random re secrets shutil statistics string struct tempfile textwrap
threading traceback types typing unicodedata unittest.mock urllib.parse uuid warnings weakref zoneinfo
""".split()  # noqa: SIM905


def busy_seconds(pid: int) -> tuple[float, float]:
    """For how long a process has used a processor, and waited for one; only the rest of the time did it sleep."""
    used = time.clock_gettime(~pid << 3 | 2)  # the clock of that process, as clock_getcpuclockid(3) makes it
    waited = 0
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/schedstat") as file:
                waited += int(file.read().split()[1])
    except (OSError, IndexError):  # a thread has ended, or a kernel without this file
        pass
    return used, waited / 1e9


@dataclasses.dataclass
class Job:
    """The children of one job by their handles, the last part's first, and when to look whether they sleep."""

    status: int
    idle_seconds: float
    cpu_seconds: float
    children: dict[int, int]
    last: int
    started: float = dataclasses.field(default_factory=time.monotonic)
    used: float = 0.0
    look_at: float = 0.0
    timed_out: bool = False

    def look(self) -> None:
        """Kill the children if together they have slept too long or one has worked too long; else set the next look.

        The kernel's own limit of processor time (`confine.py`) counts ticks; a busy virtual machine may miss many.
        """
        now = time.monotonic()
        slept, most_used = now - self.started - self.used, 0.0
        for pid in self.children.values():
            with contextlib.suppress(OSError):  # it has just ended
                used, waited = busy_seconds(pid)
                slept -= used + waited
                most_used = max(most_used, used)
        left = min(self.idle_seconds - slept, self.cpu_seconds - most_used)
        self.look_at = now + max(left, 0.05)
        if left <= 0:
            self.timed_out = slept >= self.idle_seconds
            self.kill()

    def kill(self) -> None:
        for handle in self.children:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

    def reap(self, handle: int) -> None:
        """Take note of a child that has ended; with the last part the job ends, and its exit code is told."""
        _, status, usage = os.wait4(self.children.pop(handle), 0)
        os.close(handle)
        self.used += usage.ru_utime + usage.ru_stime
        if handle == self.last:
            self.kill()
            try:
                code = os.waitstatus_to_exitcode(status)
                os.write(self.status, json.dumps({"exit_code": code, "timed_out": self.timed_out}).encode())
            except BrokenPipeError:
                pass


@dataclasses.dataclass
class Part:
    """What a child has to do: a call as JSON behind `source`, with `output` and `pipes` to the other part."""

    source: int
    output: int | None
    pipes: list[int]
    limits: dict[str, Any]


def start_job(limits: dict[str, Any], fds: list[int]) -> Job | Part:
    """A running job of the parts behind all descriptors but the first two; in a child, its part."""
    status, output, *sources = fds
    pipes: list[list[int]] = [[] for _ in sources]
    if len(sources) == 2:
        (read, their_write), (their_read, write) = os.pipe(), os.pipe()
        pipes = [[their_read, their_write], [read, write]]
    children, last = {}, -1
    for source, ends in zip(sources, pipes, strict=True):
        is_last = source == sources[-1]
        if not (pid := os.fork()):
            return Part(source, output if is_last else None, ends, limits)
        last = os.pidfd_open(pid)
        children[last] = pid
    for fd in [output, *sources, *sum(pipes, [])]:
        os.close(fd)
    job = Job(status, limits["idle_seconds"], limits["cpu_seconds"], children, last)
    job.look_at = job.started + min(job.idle_seconds, job.cpu_seconds)
    return job


def next_part(control: socket.socket) -> Part:
    """Start and watch jobs until the other end of `control` closes; returns in a child, with its part."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    jobs: dict[int, Job] = {}  # by the descriptors that tell of them: of their children, and of whoever asked
    while True:
        waiting = [job.look_at for job in jobs.values()]
        seconds = min(waiting) - time.monotonic() if waiting else None
        for fd, _ in poll.poll(None if seconds is None else max(1000 * seconds, 0)):
            if fd == control.fileno():
                text, fds, _, _ = socket.recv_fds(control, 4096, 4)
                if not text:
                    os._exit(0)  # its children are told by the kernel
                started = start_job(json.loads(text), fds)
                if isinstance(started, Part):
                    return started
                poll.register(started.status, 0)  # an error, when nobody waits any more
                for handle in started.children:
                    poll.register(handle, select.POLLIN)
                jobs |= dict.fromkeys([started.status, *started.children], started)
                continue
            if (job := jobs.pop(fd, None)) is None:
                continue
            poll.unregister(fd)
            if fd == job.status:
                job.kill()
            else:
                job.reap(fd)
            if not job.children:
                if jobs.pop(job.status, None):
                    poll.unregister(job.status)
                os.close(job.status)
        now = time.monotonic()
        for job in {id(job): job for job in jobs.values() if job.look_at <= now}.values():
            job.look()


def run_program(text: str) -> None:
    """Execute a program as `python program.py` would."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    exec(compile(text, "program.py", "exec"), module.__dict__)


def report(layers: list[str]) -> None:
    """Say what holds, once a module that was not imported before could be read."""
    importlib.import_module("colorsys")
    sys.stdout.write(json.dumps(layers))


CALLS: dict[str, Callable[..., None]] = {
    "run": run_program,
    "serve": bridge.serve,
    "judge": judge.judge,
    "judge_together": judge.judge_together,
    "rehearse": judge.rehearse,
}


def exit_code_of(call: Callable[[], None]) -> int:
    """Do the call, and give the exit code with which Python would end after it."""
    try:
        call()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return int(error.code or 0)
        sys.stderr.write(f"{error.code}\n")
        return 1
    except BaseException:  # noqa: BLE001 - as Python does, whatever it is
        traceback.print_exc()
        return 1
    return 0


def do_part(part: Part, confinement: Confinement) -> int:
    """What a child does: give up its rights, then make the call; its exit code."""
    null = os.open(os.devnull, os.O_RDWR)
    output = null if part.output is None else part.output
    for fd, number in ((null, 0), (output, 1), (output, 2)):
        os.dup2(fd, number, inheritable=False)
    kept = sorted([2, part.source, *part.pipes, *confinement.paths])
    for fd, after in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(fd + 1, after)
    try:
        layers = confinement.enter(part.limits)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"the sandbox could not be set up: {error}\n")
        return REFUSED
    for fd in confinement.paths:
        os.close(fd)
    with open(part.source, "rb") as file:
        file.seek(0)
        name, arguments = json.load(file)
    gc.enable()
    if name == "report":
        return exit_code_of(lambda: report(layers))
    return exit_code_of(lambda: CALLS[name](*arguments, *part.pipes))


def main(control_fd: int, readable: list[str], bubblewrap: bool) -> NoReturn:
    """Become the warm parent; its children come here too."""
    for name in WARM:
        importlib.import_module(name)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory ends, a program goes before the trainer
    gc.collect()
    gc.freeze()
    gc.disable()
    confinement = Confinement(readable, bubblewrap)
    part = next_part(socket.socket(fileno=control_fd))
    code = do_part(part, confinement)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
