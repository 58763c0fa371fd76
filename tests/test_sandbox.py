"""Attacks on the sandbox, each bounded so that a broken sandbox would not take the machine with it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards import sandbox
from rewards.sandbox import Limits, run

PROJECT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


LESS = ("no mounts", "old kernel", "bubblewrap, old kernel")


@pytest.fixture(
    params=["resource limits", "bubblewrap", *(pytest.param(mode, marks=pytest.mark.slow) for mode in LESS)]
)
def mode(request, monkeypatch):
    """The ways to confine a program, whichever this machine would choose; old: without Landlock and mounts."""
    with_bubblewrap, less = "bubblewrap" in request.param, request.param in LESS
    if with_bubblewrap and shutil.which("bwrap") is None:
        pytest.skip("bwrap is not installed")
    if less:
        sandbox.close_parents()
        read, calls = Path.read_text, "= 442, " if request.param == "no mounts" else "= 44[24], "
        monkeypatch.setattr(Path, "read_text", lambda path, *args: re.sub(calls, "= 1999, ", read(path, *args)))
    try:
        found = sandbox.try_layers(bubblewrap=with_bubblewrap)
        if isinstance(found, str):
            pytest.skip(f"{request.param} does not work here: {found}")
        monkeypatch.setattr(sandbox, "layers", lambda: found)
        assert not less or "own files" not in found
        assert "old" not in request.param or "landlock" not in found
        yield request.param
    finally:
        if less:
            sandbox.close_parents()


def attempt(body: str) -> str:
    """A program that reports whether the attack in `body` raised."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    return (
        f"try:\n{lines}\nexcept BaseException as e:\n    print('refused', type(e).__name__)\nelse:\n    print('DONE')"
    )


def test_a_plain_program_runs_with_empty_input(mode):
    outcome = run("import sys\nprint(repr(sys.stdin.read()), __name__)\nprint(sum(range(10)))")
    assert (outcome.output, outcome.exit_code, outcome.timed_out) == ("'' __main__\n45\n", 0, False)


def test_it_says_what_confines_programs(mode):
    layers = sandbox.layers()
    assert ("bubblewrap" in layers) == ("bubblewrap" in mode)
    assert {"resource limits", "seccomp"} <= set(layers)
    assert {"landlock", "own user", "bubblewrap"} & set(layers)


def test_files_can_be_written_in_an_empty_folder_and_are_gone_afterwards(mode):
    program = (
        "import os, tempfile\nprint(os.listdir('.'))\nopen('note.txt', 'w').write('kept')\n"
        "with tempfile.TemporaryDirectory() as folder, open(f'{folder}/a', 'w') as file: file.write('b')\n"
        "os.rename('note.txt', 'n')\nprint(os.listdir('.'), open('n').read())"
    )
    for _ in range(2):
        outcome = run(program)
        if "own files" in sandbox.layers():
            assert outcome.output == "[]\n['n'] kept\n"
        else:
            assert "PermissionError" in outcome.output


def test_errors_and_exit_codes_are_reported(mode):
    outcome = run("1 / 0")
    assert outcome.exit_code == 1
    assert "ZeroDivisionError" in outcome.output
    assert run("import sys; sys.exit(7)").exit_code == 7
    assert run("import os; os._exit(0)").exit_code == 0
    assert "null bytes" in run("print(1)\x00").output
    assert run("print('\ud800')").exit_code == 1


def test_endless_work_ends_at_the_limit_of_cpu_time(mode):
    outcome = run("while True: pass", Limits(cpu_seconds=1, idle_seconds=600))
    assert outcome.exit_code != 0
    assert not outcome.timed_out


@pytest.mark.slow
def test_endless_work_ends_where_the_kernel_does_not_count_it(monkeypatch):
    sandbox.layers()
    sandbox.close_parents()
    read, limit = Path.read_text, '(limits["cpu_seconds"], limits["cpu_seconds"] + 1)'
    assert limit in read(PROJECT / "rewards/sandbox/confine.py")
    monkeypatch.setattr(Path, "read_text", lambda path, *args: read(path, *args).replace(limit, "(-1, -1)"))
    try:
        outcome = run("while True: pass", Limits(cpu_seconds=1, idle_seconds=600))
    finally:
        sandbox.close_parents()
    assert (outcome.exit_code, outcome.timed_out) == (-signal.SIGKILL, False)


def test_sleep_ends_at_the_limit_of_idle_time(mode):
    assert run("import time\ntime.sleep(600)", Limits(idle_seconds=0.5)).timed_out
    many_short = "import time\nwhile True: time.sleep(0.001)"
    assert run(many_short, Limits(idle_seconds=0.5, cpu_seconds=60)).timed_out
    assert not run("sum(range(10**7))", Limits(idle_seconds=0.2)).timed_out  # work is no idleness, however slow


@pytest.mark.slow
def test_ignored_signals_do_not_prolong_it(mode):
    program = """
import signal
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
"""
    outcome = run(program + "while True: pass", Limits(cpu_seconds=1, idle_seconds=600))
    assert outcome.exit_code == -signal.SIGKILL or outcome.exit_code == 128 + signal.SIGKILL


def test_memory_bomb(mode):
    outcome = run("x = bytearray(2 * 10**9)\nprint('DONE')", Limits(memory_mib=128))
    assert "MemoryError" in outcome.output
    outcome = run("x = []\nwhile True: x.append(bytearray(10**6))", Limits(memory_mib=128))
    assert outcome.exit_code != 0


def test_endless_output_is_cut_off(mode):
    outcome = run("while True: print('x' * 1000)", Limits(file_mib=1, cpu_seconds=1))
    assert outcome.exit_code != 0
    assert len(outcome.output) <= 2**20
    outcome = run("import os\nwhile True: os.write(2, b'x' * 4096)", Limits(file_mib=1, cpu_seconds=1))
    assert len(outcome.output) <= 2**20


def test_a_large_file_is_refused(mode):
    outcome = run(attempt("open('big', 'wb').write(bytes(3 * 2**20))"), Limits(file_mib=1))
    assert outcome.output in ("refused OSError\n", "refused PermissionError\n")


@pytest.mark.parametrize(
    "body",
    [
        "import os\nif os.fork() == 0: os._exit(0)",
        "import os\nfor _ in range(50):\n    if os.fork() == 0: os._exit(0)",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import os\nos.system('true') and 1 / 0",
        "import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'true'], {})",
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo DONE'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    ],
)
def test_no_further_process(mode, body):
    # A bounded fork "bomb": were it let through, fifty short processes would be all.
    assert run(attempt(body)).output.splitlines()[-1].startswith("refused")


@pytest.mark.parametrize(
    ("victim", "number"), [("os.getppid()", 0), ("-1", 0), ("1", 0), ("os.getpid()", 9), ("{neighbour}", 9)]
)
def test_no_signal_reaches_anyone(mode, victim, number):
    # Signal 0 asks whether a signal could be sent: were the sandbox broken, this process would not die of it.
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as neighbour:
        outcome = run(attempt(f"import os\nos.kill({victim.format(neighbour=neighbour.pid)}, {number})"))
        assert outcome.output in ("refused PermissionError\n", "refused ProcessLookupError\n")
        assert neighbour.poll() is None
        neighbour.kill()


@pytest.mark.parametrize(
    "body",
    [
        "fcntl.fcntl(a, fcntl.F_SETOWN, os.getppid())",
        "fcntl.fcntl(a, 15, struct.pack('ii', 1, os.getppid()))",
        "fcntl.fcntl(a, 10, 9)",
        "fcntl.fcntl(a, fcntl.F_SETFL, 0x2000)",
        "fcntl.fcntl(os.open('/usr/lib', os.O_RDONLY), fcntl.F_NOTIFY, 1)",
        "fcntl.fcntl(os.open('/usr/lib', os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
        "fcntl.ioctl(a, 0x8901, struct.pack('i', os.getppid()))",
        "fcntl.ioctl(a, 0x8902, struct.pack('i', os.getppid()))",
        "fcntl.ioctl(a, 0x5452, struct.pack('i', 1))",
        "import signal\nsignal.raise_signal(0)",
        "import signal\nsignal.pidfd_send_signal(0, 0)",
    ],
)
def test_the_kernel_sends_no_signal_for_a_program(mode, body):
    outcome = run(attempt(f"import fcntl, os, socket, struct\na, b = socket.socketpair()\n{body}"))
    assert outcome.output.splitlines()[-1] == "refused PermissionError"


def test_pipes_sockets_and_event_loops_work_inside(mode):
    program = (
        "import asyncio, os\nasync def f(): return 5\nprint(asyncio.run(f()))\nos.set_blocking(os.pipe()[0], False)"
    )
    assert run(program).output == "5\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has users to give away")
def test_as_root_the_program_is_someone_without_rights(mode):
    outcome = run("import os\nprint(os.getresuid())")
    user = outcome.output.splitlines()[0]
    assert ("own user" in sandbox.layers()) == ("(0, 0, 0)" not in user)
    if mode == "resource limits":
        assert "own user" in sandbox.layers()


def test_the_environment_is_scrubbed(mode, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "very-secret")
    outcome = run(
        "import os\nprint(dict(os.environ))\n"
        "for pid in ['self', os.getppid(), 1]:\n"
        "    try: print(open(f'/proc/{pid}/environ').read())\n    except OSError as e: print(e)"
    )
    assert "very-secret" not in outcome.output
    assert "PATH" in outcome.output
    assert str(PROJECT) not in outcome.output


@pytest.mark.parametrize(
    "path",
    [str(Path.home()), str(PROJECT), str(PROJECT / "setup.cfg"), __file__, "/etc/passwd", "/proc/self/mem", "/tmp"],
)
def test_files_outside_cannot_be_read(mode, path):
    if "bubblewrap" in mode and path == "/proc/self/mem" or not Path(path).exists():
        pytest.skip("absent, or its own")
    if "old" in mode and path in ("/tmp", "/etc/passwd", str(Path.home())):
        pytest.skip("without Landlock a program reads what everybody may read, in bubblewrap empty folders of its own")
    if path == "/tmp" and "own files" in sandbox.layers():
        assert run("import os\nprint(os.listdir('/tmp'))").output == "[]\n"
        return
    body = f"import os\nprint(os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}, 'rb').read(1))"
    assert run(attempt(body)).output.splitlines()[-1].startswith("refused")


def test_files_outside_cannot_be_changed(mode, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("intact")
    for folder in [tmp_path, *tmp_path.parents][:-1]:
        if folder.stat().st_uid == os.getuid() and "pytest" in folder.name:
            folder.chmod(0o777)
    victim.chmod(0o666)
    before = victim.stat()
    for attack in (
        f"open({str(victim)!r}, 'w').write('changed')",
        f"import os; os.unlink({str(victim)!r})",
        f"import os; os.chmod({str(victim)!r}, 0)",
        f"import os; os.utime({str(victim)!r}, (0, 0))",
        f"import os; os.truncate({str(victim)!r}, 0)",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.symlink({str(victim)!r}, 'link'); open('link', 'w').write('changed')",
        f"import os; os.link({str(victim)!r}, 'link')",
        "import os; [os.mkdir('d') or os.chdir('d') for _ in range(3000)]",
        "import os; os.rename('/tmp', '/gone')",
        "open('/dev/shm/left-behind-by-a-program', 'w')",
        "open('/tmp/left-behind-by-a-program', 'w')",
    ):
        outcome = run(attempt(attack))
        if "/tmp/left" not in attack:  # which may be its own
            assert outcome.output.startswith("refused"), attack
    after = victim.stat()
    assert victim.read_text() == "intact"
    assert (before.st_mode, before.st_mtime, before.st_nlink) == (after.st_mode, after.st_mtime, after.st_nlink)
    assert [path.name for path in tmp_path.iterdir()] == ["victim.txt"]
    assert not Path("/dev/shm/left-behind-by-a-program").exists()
    assert not Path("/tmp/left-behind-by-a-program").exists()


def test_no_network(mode):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        body = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert run(attempt(body)).output.startswith("refused")
        assert run(attempt("import socket\nsocket.socket(socket.AF_UNIX)")).output.startswith("refused")


@pytest.mark.parametrize(
    "body",
    [
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (60, 60))",
        "import os\nos.setuid(0)\n1 / (os.getuid() == 0 and os.getpid() == -1)",
        "import ctypes\nlibc = ctypes.CDLL(None)\n1 / (libc.prctl(1, 0, 0, 0, 0) + 1)",
        "import ctypes\nlibc = ctypes.CDLL(None)\n1 / (libc.ptrace(0, 0, 0, 0) + 1)",
        "import ctypes\nlibc = ctypes.CDLL(None)\n1 / (libc.unshare(0x10000000) + 1)",
        "import ctypes\nlibc = ctypes.CDLL(None)\n1 / (libc.mount(b'none', b'/', b'tmpfs', 0, None) + 1)",
        "import ctypes\nlibc = ctypes.CDLL(None)\n1 / (libc.shmget(1, 4096, 0o1666) + 1)",
        "import ctypes\nlibc = ctypes.CDLL(None)\n1 / (libc.syscall(425, 1, bytes(120)) + 1)",
        "import os\nos.setpriority(os.PRIO_PROCESS, 0, 19)",
        "import os\nos.sched_setaffinity(0, os.sched_getaffinity(0))",
        "import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))",
        "import os\nos.chmod('.', 0o700)",
    ],
)
def test_rights_cannot_be_regained(mode, body):
    # Calls through ctypes answer -1 when refused, which the divisions turn into an error.
    assert run(attempt(body)).output.splitlines()[-1].startswith("refused")


@pytest.mark.slow
def test_hostile_code_cannot_crash_its_way_out(mode):
    assert run("import ctypes\nctypes.string_at(0)").exit_code != 0
    assert run("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", Limits(memory_mib=256)).exit_code != 0
    assert run("(" * 10_000).exit_code != 0
    assert run("import os\nos.abort()").exit_code != 0


def test_only_named_descriptors_are_inherited(mode):
    with tempfile.TemporaryFile() as secret:
        os.set_inheritable(secret.fileno(), True)
        outcome = run(
            "import os\nopen_ones = []\n"
            "for fd in range(64):\n"
            "    try: os.fstat(fd); open_ones.append(fd)\n"
            "    except OSError: pass\nprint(open_ones)"
        )
    assert outcome.output == "[0, 1, 2]\n"


def test_many_at_once_each_in_its_own_folder(mode):
    if "own files" not in sandbox.layers():
        pytest.skip("no folder of its own here")
    program = (
        "import os, time\nopen('mine', 'w').write('{n}')\ntime.sleep(0.2)\nprint(os.listdir('.'), open('mine').read())"
    )
    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(lambda n: run(program.format(n=n), Limits(idle_seconds=600)), range(32)))
    assert [outcome.output for outcome in outcomes] == [f"['mine'] {n}\n" for n in range(32)]


def test_a_program_dies_with_the_process_that_started_it(mode):
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(PROJECT)!r})\n"
        "from rewards import sandbox\n"
        f"parent = sandbox.warm_parent({'bubblewrap' in mode})\n"
        "print(parent.process.pid, flush=True)\n"
        "parent.ask([('run', ['import time\\ntime.sleep(600)'])], sandbox.Limits(idle_seconds=600), None)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as trainer:
        pid = int(trainer.stdout.readline())
        children = Path(f"/proc/{pid}/task/{pid}/children")
        while not (started := children.read_text().split()):
            time.sleep(0.05)
        trainer.kill()
        trainer.wait()
    for _ in range(3000):
        if all(has_ended(each) for each in [pid, *started]):
            return
        time.sleep(0.1)
    pytest.fail("a program outlived the process that started it")


def has_ended(pid) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_a_warm_parent_that_has_ended_is_started_again(mode):
    assert run("print(1)").output == "1\n"
    parent = sandbox.warm_parent("bubblewrap" in mode)
    parent.control.shutdown(socket.SHUT_RDWR)
    with ThreadPoolExecutor(4) as pool:
        assert [each.output for each in pool.map(lambda n: run(f"print({n})"), range(8))] == [
            f"{n}\n" for n in range(8)
        ]
    assert sandbox.warm_parent("bubblewrap" in mode) is not parent


def test_all_files_together_are_bounded(mode):
    program = (
        "import os\nnum = 0\ntry:\n    while num < 200:\n        open(f'file{num}', 'wb').write(bytes(2**20))\n"
        "        num += 1\nexcept OSError: pass\nprint(num)"
    )
    assert int(run(program).output) == (16 if "own files" in sandbox.layers() else 0)
    assert run(program).output == run(program).output  # a new folder each time


def test_programs_share_nothing_but_what_was_there_before(mode):
    run("import math, json, sys\nmath.pi = 3\njson.dumps = None\nsys.modules['later'] = json\nopen('left', 'w')")
    assert run("import math, json, os, sys\nprint(math.pi > 3, json.dumps(1), 'later' in sys.modules)").output == (
        "True 1 False\n"
    )


def test_threads_are_bounded(mode):
    program = """
import threading, time
started = 0
try:
    while started < 2000:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        started += 1
except RuntimeError: pass
print(started)
"""
    started = int(run(program, Limits(memory_mib=4096)).output)
    assert started < 2000
    assert "own user" not in sandbox.layers() or 0 < started < 40


def test_sleeping_programs_hold_up_nobody(mode):
    with ThreadPoolExecutor(33) as pool:
        sleeping = [pool.submit(run, "import time\ntime.sleep(600)", Limits(idle_seconds=2)) for _ in range(32)]
        assert run("print(1)", Limits(idle_seconds=600)).output == "1\n"
        assert all(each.result().timed_out for each in sleeping)


def test_refuses_rather_than_trusts_where_nothing_holds(monkeypatch):
    monkeypatch.setattr(sandbox, "try_layers", lambda bubblewrap: "no such thing")
    monkeypatch.setattr(sandbox, "layers", sandbox.layers.__wrapped__)
    with pytest.raises(RuntimeError, match="Install bubblewrap"):
        sandbox.run("print(1)")


def test_works_from_a_thread(mode):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run("print(1)")))
    thread.start()
    thread.join()
    assert outcomes[0].output == "1\n"
