"""Tests in pytest's form: those that can be run here count, and no program is blamed for the others."""

import sys

import pytest

from rewards import programs as rewards_programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

ADD = "def add(a, b):\n    return a + b\n"
ZERO = "def add(a, b): return 0\n"


def scores(programs, tests):
    completions = [f"```python\n{program}\n```" for program in programs]
    return rewards_programs.tests_reward([None] * len(programs), completions, [tests] * len(programs))


PLAIN = "def test_plain():\n    assert add(1, 2) == 3\n"
CASES = """
import pytest
from solution import add

@pytest.mark.parametrize("b", [0, pytest.param(5, id="five")], ids=str)
@pytest.mark.parametrize("a", (1, 10))
def test_stacked(a, b):
    assert add(a, b) == a + b

@pytest.mark.slow
@pytest.mark.timeout(5)
@pytest.mark.parametrize(("a", "b", "total"), [(1, 1, 2), pytest.param(0, 5, 5, marks=pytest.mark.slow)])
def test_rows(a, b, total, shift=0):
    assert add(a, b) == total + shift

@pytest.mark.parametrize("a", [*range(3)])
def test_all_of_them_together(a):
    assert add(a, 0) == a

@pytest.mark.parametrize("b,", range(2))
def test_these_too(b):
    assert add(1, b) == 1 + b

@pytest.mark.parametrize(argnames="a, b", argvalues=[])
def test_never(a, b):
    assert False

def test_raises_when_called():
    pytest.raises(TypeError, add, 1, b="x", match="unsupported")

def test_raises_and_approx():
    with pytest.raises(TypeError) as info:
        add(None, 1)
    assert info.type is TypeError
    assert add(0.1, float("nan")) == pytest.approx(float("nan"), nan_ok=True)

def test_fail():
    try:
        import no_such_package
    except ImportError:
        pass
    try:
        add(None, 1)
        pytest.fail("nothing was raised")
    except Exception:
        pass
"""


def test_parametrized_tests():
    wrong_at_two, ignores_five = "def add(a, b): return a + b + (a == 2)", "def add(a, b): return a + b * (b != 5)"
    assert scores([ADD, wrong_at_two, ignores_five], CASES) == [1.0, 13 / 14, 11 / 14]
    assert scores(["def add(a, b):\n    try: return a + b\n    except TypeError: pass"], CASES) == [11 / 14]


@pytest.mark.parametrize(
    "test",
    [
        "def test_it(tmp_path):\n    assert add(1, 2) == 3",
        "def test_it(capsys, n=1):\n    assert add(1, 2) == 3",
        "def test_it(*, three):\n    assert add(1, 2) == three",
        "import pytest\n@pytest.fixture\ndef x():\n    return 3\ndef test_it(x):\n    assert add(1, 2) == x",
        "import pytest\n@pytest.fixture(scope='module')\ndef x():\n    yield 1\n"
        "@pytest.mark.parametrize('a', [1])\ndef test_it(a, x):\n    assert add(a, x) == 2",
        "import pytest\n@pytest.mark.parametrize('x', [1], indirect=True)\ndef test_it(x):\n    assert add(x, x) == 2",
        "import pytest\n@pytest.mark.skip(reason='broken')\ndef test_it():\n    assert add(1, 2) == 4",
        "import pytest\n@pytest.mark.xfail\ndef test_it():\n    assert add(1, 2) == 4",
        "import pytest\n@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.xfail)])\n"
        "def test_it(x):\n    assert add(x, x) == 3",
        "import pytest\n@pytest.mark.usefixtures('db')\ndef test_it():\n    assert add(1, 2) == 3",
        "import pytest\ndef test_it():\n    pytest.importorskip('numpy')\n    assert add(1, 2) == 3",
        "def test_it():\n    import no_such_package\n    assert add(1, 2) == 3",
        "import random, sys\nrandom.seed(0)\nclass TestIt:\n    def test_it(self):\n        assert add(1, 2) == 3\n"
        "sys.path.insert(0, add.__module__)",
        "import random\nrandom.seed(0)\nasync def test_it():\n    assert add(1, 2) == 3",
        "from unittest.mock import patch\n@patch('builtins.print')\ndef test_it(printed):\n    assert printed.called",
    ],
)
def test_a_test_that_cannot_be_run_here_does_not_count(test):
    assert scores([ADD, ZERO, "broken("], test) == [None] * 3
    assert scores([ADD, ZERO, "broken("], test + "\n\n" + PLAIN) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "tests",
    [
        "import no_such_package\n" + PLAIN,
        "from solution import add\nfrom collections import NoSuchName\n" + PLAIN,
        ["import no_such_package as np", "assert add(1, 2) == 3"],
        ["import no_such_package as np\ndef check(f):\n    assert f(1, 2) == 3\ncheck(add)"],
        "from .solution import add\n" + PLAIN,
        "from pytest import skip\n" + PLAIN,
        "with open('data.json') as file:\n    data = file.read()\n" + PLAIN,
        "table = {1: 2}\nexpected = table[3]\nassert add(1, 2) == expected",
        "import pytest\n@pytest.mark.parametrize('a, b', [(1, 2, 3)])\ndef test_it(a, b):\n    assert add(a, b) == 3",
        "import pytest\n@pytest.fixture(autouse=True)\ndef fresh():\n    clear()\n" + PLAIN,
        "def setup_module():\n    load()\n" + PLAIN,
        "def twice(a, a):\n    pass\n" + PLAIN,
    ],
)
def test_no_score_where_the_tests_own_set_up_fails(tests):
    assert scores([ADD, ZERO, "broken("], tests) == [None] * 3


@pytest.mark.parametrize(
    "setup",
    [
        "try:\n    import no_such_package\nexcept ImportError:\n    no_such_package = None",
        "import os, sys\nsys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))",
        "import importlib\nsolution = importlib.import_module('solution')\nadd = solution.add",
        "'About the solution.'\nfrom __future__ import annotations\nimport solution as s\nadd = s.add",
        "items = []\nitems.append(add(1, 2))\nfirst = items[0]",
        "def helper():\n    return add(1, 2)\nthree = helper()\nassert_three = {3: 3}[three]",
        "if __name__ == '__main__':\n    import pytest\n    pytest.main()",
    ],
)
def test_set_up_that_works_with_a_right_program(setup):
    assert scores([ADD], setup + "\n" + PLAIN) == [1.0]


def test_a_program_cannot_make_its_failure_not_applicable():
    tests = "import pytest\nfrom solution import add, LIMITS\nlimit = LIMITS[0]\n" + CASES + PLAIN
    right = ADD + "LIMITS = [1]\n"
    failures = [
        "raise ImportError('no module named numpy')",
        "import no_such_package\n" + right,
        "def add(a, b): import no_such_package\nLIMITS = [1]",
        "LIMITS = [1]",
        ADD + "LIMITS = []",
        "import sys\nsys.modules['pytest'] = sys\nsys.exit()",
        "def add(a, b): raise SystemExit(5)\nLIMITS = [1]",
    ]
    assert scores([right, *failures], tests)[0] == 1.0
    assert None not in scores(failures, tests)
    assert max(scores(failures[:2] + failures[3:6], tests)) == 0.0
