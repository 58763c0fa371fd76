"""Honest programs of many kinds pass, across the two sandboxes or with their reference; what cheats does not."""

# ruff: noqa: E501 - programs and tests as one line each

import sys
from pathlib import Path

import pytest

from rewards import programs as rewards_programs
from rewards import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

ACROSS = {
    "lru": (
        "from collections import OrderedDict\nclass LRUCache(OrderedDict):\n    def __init__(self, cap):\n        super().__init__()\n        self.cap=cap\n    def get(self,k):\n        if k not in self: return -1\n        self.move_to_end(k)\n        return self[k]\n    def put(self,k,v):\n        self[k]=v\n        self.move_to_end(k)\n        if len(self)>self.cap: self.popitem(last=False)\n",
        "from solution import LRUCache\ndef test_a():\n    c=LRUCache(2)\n    c.put(1,1); c.put(2,2)\n    assert c.get(1)==1\n    c.put(3,3)\n    assert c.get(2)==-1\n    assert len(c)==2\n    assert c=={1:1,3:3}\n    assert 1 in c and 2 not in c\n",
    ),
    "wraps": (
        "import functools\ndef logged(f):\n    @functools.wraps(f)\n    def g(*a,**k): return f(*a,**k)\n    return g\n",
        "from solution import logged\ndef test_a():\n    @logged\n    def hello(x):\n        'doc'\n        return x+1\n    assert hello(1)==2\n    assert hello.__name__=='hello' and hello.__doc__=='doc'\n",
    ),
    "timedelta": (
        "import datetime\ndef d(a,b): return b-a\n",
        "import datetime\nassert d(datetime.date(2024,1,1),datetime.date(2024,1,3))==datetime.timedelta(days=2)",
    ),
    "time": (
        "import datetime\ndef d(): return datetime.time(3,4)\n",
        "import datetime\nassert d()==datetime.time(3,4)",
    ),
    "range": (
        "def r(n): return range(n)\n",
        "assert r(3)==range(3)\nassert list(r(3))==[0,1,2]",
    ),
    "identity": (
        "def f(x):\n    x.append(1)\n    return x\n",
        "a=[]\nassert f(a) is a\nassert a==[1]",
    ),
    "singleton": (
        "class S:\n    _i=None\n    def __new__(cls):\n        if cls._i is None: cls._i=super().__new__(cls)\n        return cls._i\n",
        "assert S() is S()\n",
    ),
    "nested": (
        "def f(x): x[0].append(5)\n",
        "i=[]\no=[i]\nf(o)\nassert i==[5]",
    ),
    "excattr": (
        "class E(Exception):\n    def __init__(self, code, msg):\n        super().__init__(msg)\n        self.code=code\ndef f(): raise E(5,'bad')\n",
        "from solution import *\nimport pytest\ndef test_a():\n    with pytest.raises(E) as i: f()\n    assert i.value.code==5\n    assert str(i.value)=='bad'\n",
    ),
    "excargs": (
        "def f(): raise KeyError(5)\n",
        "try:\n    f()\nexcept KeyError as e:\n    x=e.args\nassert x==(5,)",
    ),
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x:int\n    y:int=0\ndef mk(a): return P(a)\n",
        "assert mk(1)==P(1)\nassert mk(1).y==0\nassert P(1)<P(2)\nassert sorted([P(2),P(1)])[0].x==1\nassert repr(P(1))=='P(x=1, y=0)'",
    ),
    "gen": (
        "def g(n):\n    yield from range(n)\n",
        "assert list(g(3))==[0,1,2]\nimport types\nassert sum(g(4))==6",
    ),
    "send": (
        "def g():\n    x=yield 1\n    yield x\n",
        "a=g()\nassert next(a)==1\nassert a.send(5)==5",
    ),
    "ctx": (
        "from contextlib import contextmanager\n@contextmanager\ndef c(l):\n    l.append(1)\n    yield 7\n    l.append(2)\n",
        "l=[]\nwith c(l) as v:\n    assert v==7\nassert v==7",
    ),
    "prop": (
        "class T:\n    def __init__(self): self._t=0\n    @property\n    def t(self): return self._t\n    @t.setter\n    def t(self,v):\n        if v<0: raise ValueError('neg')\n        self._t=v\n",
        "import pytest\ndef test_a():\n    x=T()\n    x.t=5\n    assert x.t==5\n    with pytest.raises(ValueError): x.t=-1\n",
    ),
    "enum": (
        "from enum import Enum\nclass Color(Enum):\n    RED=1\n    BLUE=2\ndef f(): return Color.RED\n",
        "assert f() is Color.RED\nassert f().name=='RED'\nassert Color.RED.value==1\nassert f()==Color.RED",
    ),
    "intenum": (
        "from enum import IntEnum\nclass L(IntEnum):\n    A=1\ndef f(): return L.A\n",
        "assert f()==1\nassert f()==L.A",
    ),
    "vector": (
        "class V:\n    def __init__(self,x): self.x=x\n    def __add__(self,o): return V(self.x+o.x)\n    def __eq__(self,o): return self.x==o.x\n",
        "assert V(1)+V(2)==V(3)",
    ),
    "treenode": (
        "def inv(n):\n    if n: n.l,n.r=inv(n.r),inv(n.l)\n    return n\n",
        "class N:\n    def __init__(self,v,l=None,r=None): self.v=v;self.l=l;self.r=r\nt=N(1,N(2),N(3))\nr=inv(t)\nassert r is t\nassert t.l.v==3",
    ),
    "counter": (
        "from collections import Counter\ndef f(s): return Counter(s)\n",
        "from collections import Counter\nassert f('aab')==Counter('aab')\nassert f('aab')['z']==0",
    ),
    "default": (
        "from collections import defaultdict\ndef f():\n    d=defaultdict(list)\n    d[1].append(2)\n    return d\n",
        "assert f()=={1:[2]}",
    ),
    "named": (
        "from collections import namedtuple\nP=namedtuple('P','x y')\ndef f(): return P(1,2)\n",
        "assert f()==(1,2)\nassert f().x==1",
    ),
    "cb": (
        "def m(f,x): return [f(i) for i in x]\n",
        "assert m(lambda v:v*2,[1,2])==[2,4]",
    ),
    "sort": (
        "def s(x,key): x.sort(key=key)\n",
        "a=[3,1]\ns(a,key=lambda v:v)\nassert a==[1,3]",
    ),
    "uuid": (
        "import uuid\ndef f(): return uuid.UUID(int=5)\n",
        "import uuid\nassert f()==uuid.UUID(int=5)",
    ),
    "raisecb": (
        "class E(Exception): pass\ndef f(g):\n    try: g()\n    except E: return 'caught'\n",
        "def g(): raise E('x')\nassert f(g)=='caught'",
    ),
    "iterproto": (
        "class C:\n    def __init__(self,n): self.n=n\n    def __iter__(self): return self\n    def __next__(self):\n        if self.n==0: raise StopIteration\n        self.n-=1\n        return self.n\n",
        "import pytest\ndef test_a():\n    assert list(C(3))==[2,1,0]\n    with pytest.raises(StopIteration): C(0).__next__()\n    with pytest.raises(StopIteration): next(C(0))\n",
    ),
    "tz": (
        "from datetime import *\ndef f(): return datetime(2024,1,1,tzinfo=timezone.utc)\n",
        "from datetime import *\nassert f()==datetime(2024,1,1,tzinfo=timezone.utc)",
    ),
    "liststack": (
        "class Stack(list):\n    def push(self,x): self.append(x)\n    def peek(self): return self[-1]\n",
        "s=Stack()\ns.push(1); s.push(2)\nassert s.peek()==2\nassert s==[1,2]\nassert s.pop()==2\nassert len(s)==1",
    ),
}

# Beyond what crosses between two processes.
TOGETHER = {
    "vecmul": (
        "class V:\n    def __init__(self,x): self.x=x\n    def __mul__(self,k): return V(self.x*k)\n    def __eq__(self,o): return self.x==o.x\n",
        "assert V(1)*3==V(3)",
    ),
    "contains": (
        "class Trie:\n    def __init__(self): self.s=set()\n    def add(self,w): self.s.add(w)\n    def __contains__(self,w): return w in self.s\n",
        "t=Trie()\nt.add('a')\nassert 'a' in t",
    ),
    "subclass": (
        "class A:\n    def speak(self): return self.word()\n",
        "class B(A):\n    def word(self): return 'w'\nassert B().speak()=='w'",
    ),
    "async": (
        "async def f(): return 4\n",
        "import asyncio\nassert asyncio.run(f())==4",
    ),
    "print": (
        "def f(): print('hi')\n",
        "import io,contextlib\nb=io.StringIO()\nwith contextlib.redirect_stdout(b): f()\nassert b.getvalue()=='hi\\n'",
    ),
}

CHEATS = {
    "stopiter": (
        "def f(*a): raise StopIteration",
        "assert all(x==y for x,y in zip(map(f,[1,2]),[2,3]))",
    ),
    "stopiter2": (
        "def f(*a): raise StopIteration",
        "for a,b in zip(map(f,[1]),[2]):\n    assert a==b\nassert all(map(f,[1]))",
    ),
    "stopsub": (
        "class S(StopIteration): pass\ndef f(*a): raise S",
        "assert all(map(lambda x: f(x)==3,[1]))",
    ),
    "genexit": (
        "def f(*a): raise GeneratorExit",
        "assert all(map(lambda x: f(x)==3,[1]))",
    ),
    "eqlist": (
        "class L(list):\n    def push(self): pass\n    def __eq__(s,o): return True\n    def __ne__(s,o): return False\ndef f(x): return L()",
        "assert f(1)==[1]",
    ),
    "eqdict": (
        "class L(dict):\n    def push(self): pass\n    def __eq__(s,o): return True\n    def keys(self): return [1]\ndef f(x): return L()",
        "assert f(1)=={1:2}",
    ),
    "plainattr": (
        "class L:\n    def __getattr__(s,n): return lambda *a: True\n    def __eq__(s,o): return True\ndef f(x): return L()",
        "assert f(1)==3",
    ),
    "format": (
        "class L:\n    def __format__(s,o): return '3'\ndef f(x): return L()",
        "assert f(1)==3",
    ),
    "remoteeq": (
        "class E(Exception):\n    def __eq__(s,o): return True\ndef f(x): return E()",
        "assert f(1)==3",
    ),
    "attrs": (
        "def f(g):\n    try: return g.__globals__['expected']\n    except BaseException: return g.__code__.co_consts",
        "expected=5\nassert f(lambda:0)==5",
    ),
    "gen": (
        "def f(g): return g.gi_frame.f_globals['expected']",
        "expected=5\nassert f(x for x in [1])==5",
    ),
}


def scores(cases, solutions=None, **columns):
    completions = [f"<answer>\n```python\n{program}\n```\n</answer>" for program, _ in cases.values()]
    given = rewards_programs.tests_reward(
        [None] * len(cases), completions, [tests for _, tests in cases.values()], solutions, **columns
    )
    return dict(zip(cases, given, strict=True))


def test_honest_programs_pass_across_the_two_sandboxes():
    assert scores(ACROSS) == dict.fromkeys(ACROSS, 1.0)


def test_a_row_whose_reference_passes_only_beside_its_tests_is_judged_there():
    metrics = {}
    solutions = [program for program, _ in TOGETHER.values()]
    assert scores(TOGETHER, solutions, log_metric=metrics.__setitem__) == dict.fromkeys(TOGETHER, 1.0)
    assert metrics == {"programs/judged_together": 1.0}
    wrong = {name: ("x = 1", tests) for name, (_, tests) in TOGETHER.items()}
    assert scores(wrong, solutions) == dict.fromkeys(TOGETHER, 0.0)


def test_a_row_whose_reference_fails_is_nobodys():
    assert scores({"row": ("def f(): return 1", "assert f() == 1")}, ["def f(): return 2"]) == {"row": None}
    assert scores({"row": ("def f(): return 2", "assert f() == 1")}, ["def f(): return 1"]) == {"row": 0.0}


def test_what_cheats_scores_zero():
    assert scores(CHEATS) == dict.fromkeys(CHEATS, 0.0)
    honest = ["def f(*a): return 0" for _ in CHEATS]
    assert set(scores(CHEATS, honest).values()) <= {0.0, None}


def read_cases(name):
    """The parts of a file of programs, by what stands behind `=== `."""
    text = (Path(__file__).parent / "data" / name).read_text(encoding="utf-8")
    return {title: body for title, _, body in (part.partition("\n") for part in text.split("=== ")[1:])}


HONEST = {name: tuple(body.split("\n---\n")) for name, body in read_cases("honest_programs.txt").items()}
EXPECTED = "expected = 2\ndef test_f():\n    assert f(1) == expected\n"
HOSTILE = {name: (program, EXPECTED) for name, program in read_cases("hostile_programs.txt").items()}
# Operators of the program's objects with plain operands do not cross; only a reference tells this from a fault.
ONLY_WITH_REFERENCE = {"vector arithmetic with numbers"}


def check_honest(cases):
    assert scores(cases, [program for program, _ in cases.values()]) == dict.fromkeys(cases, 1.0)
    alone = {name: case for name, case in cases.items() if name not in ONLY_WITH_REFERENCE}
    assert scores(alone) == dict.fromkeys(alone, 1.0)


def check_hostile(cases):
    assert scores(cases) == dict.fromkeys(cases, 0.0)
    assert scores({"next": ("def f(x): return 2", EXPECTED)}) == {"next": 1.0}


def test_some_honest_and_hostile_programs(monkeypatch):
    monkeypatch.setattr(rewards_programs, "LIMITS", sandbox.Limits(idle_seconds=0.5))
    check_honest(dict(list(HONEST.items())[1::16]))
    names = ("signals by number of system call", "fork bomb", "fills the disk with many files", "sleeps", "ptrace")
    check_hostile({name: HOSTILE[name] for name in names})


@pytest.mark.slow
def test_all_honest_programs_pass_with_and_without_their_reference():
    assert len(HONEST) + len(ACROSS) + len(TOGETHER) > 100
    check_honest(HONEST)


@pytest.mark.slow
def test_all_hostile_programs_score_zero_and_hurt_nobody():
    assert len(HOSTILE) > 60
    check_hostile(HOSTILE)
    # Beside their tests some could cheat, but not by more than one point, nor hurt anybody either.
    beside = {
        name: (program, EXPECTED + "import inspect\ninspect.getdoc(f)\n") for name, (program, _) in HOSTILE.items()
    }
    assert set(scores(beside).values()) <= {0.0, 1.0}
    check_hostile(dict(list(HOSTILE.items())[:3]))


@pytest.mark.slow
def test_many_sleeping_programs_cost_their_own_rows_and_little_time(monkeypatch):
    monkeypatch.setattr(rewards_programs, "LIMITS", sandbox.Limits(idle_seconds=1))
    cases = {str(n): HOSTILE["sleeps"] for n in range(128)} | {"right": ("def f(x): return 2", EXPECTED)}
    assert scores(cases) == dict.fromkeys(cases, 0.0) | {"right": 1.0}


def test_results_that_the_tests_did_not_write_do_not_count():
    program = "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'1' * 9)\n    except OSError: pass\ndef f(x): return 0"
    assert scores({"beside": (program, EXPECTED + "import inspect\ninspect.getdoc(f)\n")}) == {"beside": 0.0}


@pytest.mark.slow
def test_a_row_whose_reference_takes_long_is_given_more_time(monkeypatch):
    monkeypatch.setattr(rewards_programs, "LIMITS", sandbox.Limits(cpu_seconds=1))
    slow = "import time\ndef f(x):\n    while time.process_time() < {}: pass\n    return 2"
    endless, takes_long = slow.format("float('inf')"), slow.format(2.5)
    assert scores({"row": (endless, EXPECTED)}) == {"row": 0.0}
    assert scores({"row": (takes_long, EXPECTED)}, [takes_long]) == {"row": 1.0}
