"""Programs are judged by what their functions return, whatever else they do."""

import sys

import pytest

from rewards import programs as rewards_programs
from rewards import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "def test_small():\n    assert add(1, 2) == 3\n\ndef test_large():\n    assert add(10**30, 1) == 10**30 + 1\n"


def scores(programs, tests):
    completions = [f"<answer>\n```python\n{program}\n```\n</answer>" for program in programs]
    return rewards_programs.tests_reward([None] * len(programs), completions, [tests] * len(programs))


def score(program, tests):
    return scores([program], tests)[0]


def test_share_of_tests_passed():
    three, zero = "def add(a, b): return 3", "def add(a, b): return 0"
    leaves_at_first = "def add(a, b):\n    if a == 1: raise SystemExit(0)\n    return a + b"
    assert scores([ADD, three, zero, leaves_at_first], TESTS) == [1.0, 0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    "tests",
    [
        TESTS,
        "from solution import add\n" + TESTS,
        "import solution\nassert solution.add(1, 2) == 3",
        "from solution import *\nassert add(1, 2) == 3",
        ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"],
        "import math\nexpected = math.floor(3.5)\nassert add(1, 2) == expected",
        "print('the tests may print')\nassert add(1, 2) == 3",
        "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 0\n\ncheck(add)\n",
    ],
)
def test_forms_of_tests(tests):
    assert score(ADD, tests) == 1.0


@pytest.mark.parametrize(
    "tests", [None, "", [], "x = 1", "def check(f):\n    assert f() == 1", "def broken(:", ["(" * 500]]
)
def test_rows_without_tests_get_none(tests):
    assert score(ADD, tests) is None


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{ADD}```",
        f"Sure:\n```\nprint(1)\n```\nor better\n```py\n{ADD}\n```\ndone",
        f"<reasoning>\n```python\nbroken(\n```\n</reasoning>\n<answer>\n```python\n{ADD}\n```\n</answer>",
        f"<answer>\n{ADD}\n</answer>",
        ADD,
    ],
)
def test_where_the_program_is_found(text):
    assert rewards_programs.tests_reward([None], [text], [TESTS]) == [1.0]
    assert rewards_programs.tests_reward([None], [[{"role": "assistant", "content": text}]], [TESTS]) == [1.0]


@pytest.mark.parametrize(
    "text",
    ["", "\x00", "```python", "```python\n```", "\ud800", "def add(a, b:\n", "1/0", "x" * 100_000, "(" * 40_000],
)
def test_texts_that_are_no_program_score_zero(text):
    assert rewards_programs.tests_reward([None], [text], [TESTS]) == [0.0]


ZERO = "def add(a, b): return 0\n"
HOSTILE = {
    "marker printed": "print('1' * 100)\nprint('PASSED')\nprint('{\"passed\": 2}')",
    "exit at once": "import sys\nsys.exit(0)",
    "hard exit at once": "import os\nos._exit(0)",
    "exit when called": "import sys\ndef add(a, b): sys.exit(0)",
    "hard exit when called": "import os\ndef add(a, b): os._exit(0)",
    "exit by exception": "def add(a, b): raise SystemExit(0)",
    "interrupt": "def add(a, b): raise KeyboardInterrupt",
    "equals everything": """
class Any:
    def __eq__(self, other): return True
    def __hash__(self): return 0
    def __bool__(self): return True
    def __sub__(self, other): return 0
    __rsub__ = __sub__
    __ge__ = __le__ = __lt__ = __gt__ = __eq__
def add(a, b): return Any()
""",
    "integer that equals everything": """
class Any(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def add(a, b): return Any(7)
""",
    "equals everything, in a list": """
class Any:
    def __eq__(self, other): return True
def add(a, b): return [Any()]
""",
    "function that is an object": "class F:\n    def __eq__(self, other): return True\nadd = F()",
    "no assertions": ZERO + "import builtins\nbuiltins.AssertionError = AssertionError = Warning",
    "built-in functions": ZERO
    + """
import builtins
builtins.isinstance = builtins.all = lambda *a: True
def all(*a): return True
def isinstance(*a): return True
def test_small(): pass
def test_large(): pass
def check(f): pass
""",
    "at exit": ZERO + "import atexit, os\natexit.register(lambda: os.write(1, b'11'))",
    "every descriptor": ZERO
    + """
import os
for fd in range(3, 64):
    try: os.write(fd, b'11')
    except OSError: pass
""",
    "forged replies": ZERO
    + """
import os, json
def send(**message):
    data = json.dumps(message).encode()
    for fd in range(3, 64):
        try: os.write(fd, len(data).to_bytes(8, 'big') + data)
        except OSError: pass
send(names={'__builtins__': {'dict': []}, 'all': {'mine': 0}}, errors={'AssertionError': ['int']})
send(do='getattr', on={'yours': 0}, args=['__globals__'], names=[], kwargs=[])
send(result={'mine': 0})
send(result=0)
""",
    "frames": """
import sys
def add(a, b):
    frame = sys._getframe()
    while frame:
        for name in list(frame.f_globals):
            if 'pass' in name or 'result' in name: frame.f_globals[name] = b'1'
        frame = frame.f_back
    return 0
""",
    "spying on the tests": """
import gc
def add(a, b):
    return next((o for o in gc.get_objects() if isinstance(o, list) and 'assert' in str(o)), 0)
""",
    "the judge's memory": """
import os
def add(a, b):
    for pid in os.listdir('/proc'):
        try: open(f'/proc/{pid}/mem', 'r+b').write(b'1')
        except OSError: pass
    return 0
""",
    "killing": """
import os
def add(a, b):
    for pid in (os.getppid(), os.getpid() + 1, os.getpid() - 1):
        try: os.kill(pid, 0)
        except OSError: pass
        else: return a + b
    return 0
""",
    "endless": "def add(a, b):\n    while True: pass",
    "endless output": "def add(a, b):\n    while True: print('1' * 1000)",
    "endless answer": "def add(a, b): return [0] * 10**8",
    "deep answer": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "recursion": "def add(a, b): return add(a, b)",
    "memory": "def add(a, b): return len(bytearray(10**11))",
    "threads": ZERO + "import threading\nthreading.Thread(target=print, args=('1',)).start()",
}


@pytest.mark.slow
def test_hostile_programs_score_zero(monkeypatch):
    monkeypatch.setattr(rewards_programs, "LIMITS", sandbox.Limits(idle_seconds=30.0, cpu_seconds=1))
    got = scores(HOSTILE.values(), TESTS)
    assert dict(zip(HOSTILE, got, strict=True)) == dict.fromkeys(HOSTILE, 0.0)


@pytest.mark.parametrize(
    "tests",
    [
        "import solution\nassert all(solution.add(1, 2) == x for x in [3])",
        "from solution import add as f\nassert all(f(1, 2) == x for x in [3])",
        "assert abs(add(1, 2) - 3) < 1e-6",
        "assert all(x == y for x, y in zip([add(1, 2)], [3]))",
        "assert add(1, 2) in (3, 4)",
        "assert isinstance(add(1, 2), int) and add(1, 2) >= 3",
        "import math\nassert math.isclose(add(1, 2), 3)",
        "import pytest\nassert add(1, 2) == pytest.approx(3)",
        "assert not add(1, 2) != 3",
        "assert sorted([add(1, 2), 3]) == [3, 3]",
    ],
)
def test_adaptive_objects_learn_no_expected_value(tests):
    adaptive = """
class Any:
    def __getattr__(self, name): return lambda *a: True
    def __eq__(self, other): return True
    def __hash__(self): return 3
    def __bool__(self): return True
    def __float__(self): return 1e99
    def __iter__(self): return iter([])
    def same(self, *a): return self
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __abs__ = __neg__ = same
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def __ne__(self, other): return False
def add(a, b): return Any()
def abs(x): return 0
def sorted(x): return [3, 3]
def all(x): return True
math = Any()
"""
    assert scores([ADD, adaptive], tests) == [1.0, 0.0]


def test_a_program_cannot_look_into_functions_that_it_is_given():
    program = "def apply(f):\n    return f.__globals__['expected']"
    assert score(program, "expected = 12345\nassert apply(lambda: 0) == expected") == 0.0
    assert score("def apply(f): return f() + 1", "expected = 1\nassert apply(lambda: 0) == expected") == 1.0


def test_a_program_that_speaks_for_itself_cannot_replace_the_tests_built_in_functions():
    program = """
import sys
def add(a, b): return 0
peer = sys._getframe(1).f_locals['peer']
peer.objects = [add, lambda *a: True]
peer.send(names={'add': {'mine': 0}, '__builtins__': {'dict': [['all', {'mine': 1}]]}}, errors={})
while True: peer.answer(peer.receive())
"""
    tests = "from solution import *\nassert all(sum == 3 for sum in [add(1, 2)])"
    assert scores([ADD, program], tests) == [1.0, 0.0]
    assert score(program, "assert add(1, 2) == 0") == 1.0  # it does speak the protocol


def test_what_crosses_between_tests_and_program():
    program = """
from collections import Counter, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
import datetime

class BadInput(ValueError):
    pass

class Stack:
    def __init__(self, items=()):
        self.items = list(items)
    def push(self, item):
        self.items.append(item)
        return self
    def __len__(self):
        return len(self.items)
    def __iter__(self):
        return iter(self.items)
    def __getitem__(self, i):
        return self.items[i]
    def __eq__(self, other):
        return self.items == other.items
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.items.clear()

def same(x, **more): return x
def sort_in_place(items): items.sort()
def bump(table, target=1): table["n"] = table.get("n", 0) + target
def apply(f, items): return [f(x) for x in items]
def fail(kind): raise {"bad": BadInput("bad input"), "key": KeyError("k")}[kind]
def count(n):
    for i in range(n): yield i
def counter(text): return Counter(text)
Point = namedtuple("Point", "x y")
"""
    tests = """
import datetime, math, pytest
from collections import deque
from decimal import Decimal
from fractions import Fraction
from solution import BadInput

def test_values():
    for value in (None, True, 0, -2**200, 1.5, float("inf"), 2 + 3j, "\\u00e9\\ud800", b"\\x00", [1, (2, {3})],
                  {(1, 2): [None]}, frozenset({1}), deque([1]), Decimal("1.10"), Fraction(1, 3), set(), (), {},
                  datetime.date(2024, 2, 29)):
        assert same(value) == value and type(same(value)) is type(value)
    assert math.isnan(same(float("nan")))
    assert same(x=[1], target=2, operation=3, self=4) == [1]

def test_changes_in_place():
    items, table = [3, 1, 2], {}
    sort_in_place(items)
    bump(table, target=5)
    assert items == [1, 2, 3] and table == {"n": 5}

def test_functions_as_arguments():
    assert apply(lambda x: x * 2, [1, 2]) == [2, 4]
    assert apply(str, [1]) == ["1"] and apply(len, ["ab"]) == [2]

def test_iterators():
    assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0 and sum(count(4)) == 6

def test_derived_classes():
    assert counter("aab") == {"a": 2, "b": 1} and Point(1, 2) is not None

def test_exceptions():
    with pytest.raises(BadInput, match="bad"):
        fail("bad")
    with pytest.raises(ValueError) as info:
        fail("bad")
    assert str(info.value) == "bad input"
    try:
        fail("key")
    except KeyError as error:
        assert error.args == ("k",)
    with pytest.raises(TypeError):
        same()
    with pytest.raises(StopIteration):
        next(count(0))

def test_objects():
    stack = Stack([1])
    assert len(stack.push(2)) == 2 and list(stack) == [1, 2] and stack[1] == 2 and stack.items == [1, 2]
    assert stack == Stack([1, 2]) and stack != Stack([]) and isinstance(stack, Stack) and not isinstance(3, Stack)
    assert 2 in stack and 9 not in stack
    stack.items = [5]
    assert stack.items == [5]
    with stack:
        pass
    assert len(stack) == 0 and not stack

def test_approx():
    assert same([0.1 + 0.2, 1]) == pytest.approx([0.3, 1.0]) and same({"a": 0.3}) == pytest.approx({"a": 0.1 + 0.2})
    assert same(0.31) != pytest.approx(0.3)
"""
    setup, *steps = rewards_programs.runnable((tests,))
    alone = {step: rewards_programs.share_passed(program, (setup, step), sandbox.Limits()) for step in steps}
    assert alone == dict.fromkeys(alone, 1.0)
    assert len(alone) == tests.count("def test_")


def test_a_function_named_like_a_built_in_one_is_the_programs_when_it_is_what_is_tested():
    assert score("def sum(a, b):\n    return a * b", "assert sum(10, 15) == 150") == 1.0
    assert (
        score("def add(a, b):\n    return 0\ndef sum(x):\n    return 3", "assert add(0, 0) + sum([1, 2]) == 3") == 1.0
    )


def test_a_name_of_the_tests_is_never_the_programs():
    # The set-up fails for want of `add`, or by what it raises; the program's own names must not step in.
    tests = "from solution import add\n" + TESTS
    assert scores([ADD, "def test_small(): pass\ndef test_large(): pass"], tests) == [1.0, 0.0]
    program = "expected = 5\ndef f(x):\n    if x == 2: return 5\n    raise ValueError"
    assert scores(["def f(x): return x", program], "expected = f(1) + 1\nassert f(2) == expected") == [1.0, 0.0]


@pytest.mark.slow
def test_tests_before_a_limit_count(monkeypatch):
    monkeypatch.setattr(rewards_programs, "LIMITS", sandbox.Limits(idle_seconds=30.0, cpu_seconds=1))
    program = "def add(a, b):\n    while a > 5: pass\n    return a + b"
    assert score(program, TESTS) == 0.5


def test_a_machine_that_cannot_confine_programs_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox, "layers", sandbox.layers.__wrapped__)
    monkeypatch.setattr(sandbox, "try_layers", lambda bubblewrap: "nothing works here")
    with pytest.raises(RuntimeError, match="nothing works here"):
        score(ADD, TESTS)


def test_order_and_length_are_kept():
    programs = [f"def add(a, b):\n    return {n}" for n in range(4)]
    completions = [f"```\n{program}\n```" for program in programs]
    tests = [f"assert add(0, 0) == {n if n % 2 else -1}" for n in range(4)]
    assert rewards_programs.tests_reward([None] * 4, completions, tests) == [0.0, 1.0, 0.0, 1.0]
