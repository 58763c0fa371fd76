"""CPU time of judging one program, in all processes together, and of a bare interpreter for comparison.

python benchmarks/programs.py            # some seconds on a core
"""

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rewards import sandbox  # noqa: E402
from rewards.programs import tests_reward  # noqa: E402

PROGRAM = "```python\ndef add(a, b):\n    return a + b\n```"
TESTS = "def test_small():\n    assert add(1, 2) == 3\n\ndef test_large():\n    assert add(10**9, 1) == 10**9 + 1\n"
ROLLOUTS, PROGRAMS = 7, 64


def cpu_seconds() -> float:
    """Of this process, of its children that have ended, and of the running warm parent with its own."""
    ended = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    warm = 0
    if "bubblewrap" in sandbox.layers():
        return ended
    for parent in sandbox._parents.values():
        fields = Path(f"/proc/{parent.process.pid}/stat").read_text().rpartition(")")[2].split()
        warm += sum(map(int, fields[11:15]))
    return ended + warm / os.sysconf("SC_CLK_TCK")


def milliseconds_per(call, count: int) -> float:
    """The median over a few rollouts of the CPU time of one of `count` programs."""
    times = []
    for _ in range(ROLLOUTS):
        before = cpu_seconds()
        call()
        times.append((cpu_seconds() - before) / count * 1000)
    return statistics.median(times)


def judge() -> None:
    assert set(tests_reward([None] * PROGRAMS, [PROGRAM] * PROGRAMS, [TESTS] * PROGRAMS)) == {1.0}


def main() -> None:
    judge()
    bare = [os.path.realpath(sys.executable), "-S", "-s", "-c", "pass"]
    print(f"layers: {', '.join(sandbox.layers())}")
    print(f"a program, across two processes: {milliseconds_per(judge, PROGRAMS):.1f} CPU ms")
    print(f"a bare interpreter: {milliseconds_per(lambda: [subprocess.run(bare) for _ in range(8)], 8):.1f} CPU ms")


if __name__ == "__main__":
    main()
