"""Runs a recipe in children forked from one process that has imported everything: a start costs a second, not ten.

As a program it serves requests, one JSON line in, one out. A child may be told to die of SIGKILL at a chosen call.
"""

import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
# A run that has not ended by then hangs, however slow the machine.
LIMIT_SECONDS = 3600


class Warm:
    """The serving process, from a test's side."""

    def __init__(self):
        command = [sys.executable, __file__]
        # The tests' own settings are not a child's.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, log: Path, argv: list[str], **request) -> SimpleNamespace:
        """codes (negative: the signal that killed it) and output of the processes that run `argv` as a recipe.

        `config`: an accelerate YAML's name, whose processes it starts; `faults`: what goes wrong, a list of mappings
        for `install`.
        """
        self.process.stdin.write(json.dumps({"log": str(log), "argv": [str(word) for word in argv]} | request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the serving process is gone"
        return SimpleNamespace(codes=json.loads(answer), output=log.read_text(errors="replace"))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


def install(fault: dict) -> None:
    """Wraps `module:attribute`, whose `nth` call, and `times` in all, goes wrong in one of these ways.

    The call "*": it dies at the `nth` call of any Python function at all.

    `when` it dies: "before" or "after" the call, or after it with the file it wrote cut in "half". `raises`: the
    arguments of an OSError. `sleeps`: seconds before the call. `returns`: this instead. `factor`: on what it returns.
    """
    if fault["call"] == "*":
        return die_at_call(fault["nth"])
    module, _, path = fault["call"].partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    original, calls = getattr(owner, name), [0]

    # Under its name: metrics are called after a reward.
    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        calls[0] += 1
        late = calls[0] - fault.get("nth", 1)
        happens = 0 <= late < fault.get("times", 1)
        if happens and "raises" in fault:
            raise OSError(*fault["raises"])
        if happens and "sleeps" in fault:
            time.sleep(fault["sleeps"])
        if happens and "returns" in fault:
            return fault["returns"]
        result = None if happens and fault.get("when") == "before" else original(*args, **kwargs)
        if not happens or "sleeps" in fault:
            return result
        if "factor" in fault:
            return result * float(fault["factor"])
        if fault["when"] == "half":
            files = [
                word for word in [*args, *kwargs.values()] if isinstance(word, str | Path) and os.path.isfile(word)
            ]
            os.truncate(files[0], os.path.getsize(files[0]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(owner, name, wrapped)
    return None


def die_at_call(nth: int) -> None:
    calls = 0

    def count(frame, event, argument) -> None:
        nonlocal calls
        calls += event == "call"
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def environments(config: str | None) -> list[dict[str, str]]:
    """The environment of each process that `accelerate launch --config_file` would start."""
    if config is None:
        return [{"ACCELERATE_USE_CPU": "true"}]
    import yaml
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    file = str(ROOT / f"recipes/accelerate/{config}.yaml")
    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", file, "--main_process_port", port, "recipe.py"])
    )
    args.deepspeed_fields_from_accelerate_config = ",".join(
        yaml.safe_load(Path(file).read_text()).get("deepspeed_config", ())
    )
    common = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(args.num_processes)}
    common |= {"LOCAL_WORLD_SIZE": str(args.num_processes)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(args.num_processes)]


def child(request: dict, environment: dict[str, str]) -> None:
    """Runs the recipe; does not return."""
    code = 1
    try:
        descriptor = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.environ.update(environment)
        for fault in request.get("faults", []):
            if str(fault.get("rank", 0)) == environment.get("RANK", "0"):
                install(fault)
        from dgrpo.run import main
        from dgrpo.tasks import gsm8k

        sys.argv = ["gsm8k.py", *request["argv"]]
        main(gsm8k.TASK, str(ROOT / "recipes/gsm8k.py"))
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run(request: dict) -> list[int]:
    """Exit codes of the request's processes; when one fails the others are killed, as torchrun does."""
    pids = {}
    for environment in environments(request.get("config")):
        pid = os.fork()
        if pid == 0:
            child(request, environment)
        pids[pid] = None
    until = time.monotonic() + LIMIT_SECONDS
    while None in pids.values():
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            pids[pid] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.01)
        if time.monotonic() > until or any(pids.values()):
            for running in [pid for pid, code in pids.items() if code is None]:
                os.kill(running, signal.SIGKILL)
                pids[running] = os.waitstatus_to_exitcode(os.waitpid(running, 0)[1])
    return list(pids.values())


def serve() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)
    import deepspeed  # noqa: F401

    import dgrpo.run  # noqa: F401

    for line in sys.stdin:
        os.write(answers, (json.dumps(run(json.loads(line))) + "\n").encode())


if __name__ == "__main__":
    serve()
