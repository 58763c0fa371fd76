"""No text makes any reward raise, leave [0, 1] or stall; and `rewards` needs neither torch nor dgrpo."""

import subprocess
import sys
from pathlib import Path

import pytest
from effort import effort
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import countdown, format, gsm8k, math500, programs, sudoku

PROJECT = Path(__file__).parents[1]

COLUMNS = {
    "answer": "72",
    "numbers": [1, 5, 2],
    "target": 10,
    "puzzle": "3102200002100320",
    "solution": "3142243142131324",
    "tests": "assert f(1) == 1",
}
FAST = [
    format.format_reward,
    format.xml_structure_reward,
    gsm8k.correctness_reward,
    gsm8k.integer_reward,
    math500.boxed_reward,
    countdown.equation_reward,
    sudoku.cells_reward,
    sudoku.solved_reward,
]
SLOW = [math500.correctness_reward, programs.tests_reward]

TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "<answer", "\\boxed{", "```", "```python", "####"]
VALUES = [
    "72",
    "1,234",
    "-7",
    "1.5*2",
    "5*2*1",
    "2**3",
    "9**9",
    "1/0",
    "3142243142131324",
    "3142",
    "0x1",
    "1e9",
    "٧٢",
    "７２",
]
SIGNS = [
    "{",
    "}",
    "(",
    ")",
    "$",
    "\\$",
    "{,}",
    "\\frac{1}{2}",
    "−",
    "\u202e",
    "\ud800",
    "\x00",
    "\n",
    "=",
    "+",
    "-",
    "*",
    "/",
    "^",
]
FRAGMENTS = st.sampled_from([*TAGS, *VALUES, *SIGNS, "def f(x): return x"])
TEXTS = st.one_of(
    st.text(),
    st.lists(FRAGMENTS, max_size=40).map(" ".join),
    st.lists(FRAGMENTS, max_size=20).map(lambda parts: f"<answer>{''.join(parts)}</answer>"),
    st.text(alphabet="0123456789.,+-*/() =\\{}", max_size=80).map(lambda text: f"<answer>{text}</answer>"),
)


def check(reward, text):
    # A Sudoku's solution is no reference of a program.
    left_out = ["solution"] if reward is programs.tests_reward else []
    columns = {name: [value, value] for name, value in COLUMNS.items() if name not in left_out}
    completions = [text, [{"role": "assistant", "content": text}]]
    scores = []
    spent = effort(
        lambda: scores.extend(
            reward(prompts=[None, None], completions=completions, completion_ids=[[], []], **columns)
        )
    )
    assert len(scores) == 2
    assert scores[0] == scores[1]
    assert type(scores[0]) is float
    assert 0.0 <= scores[0] <= 1.0
    return spent


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_any_text(text):
    for reward in FAST:
        assert check(reward, text) < 100


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(TEXTS)
def test_any_text_where_other_processes_judge(text):
    for reward in SLOW:
        check(reward, text)


LONG = {
    "digits": "7" * 100_000,
    "spaces": " " * 100_000,
    "newlines": "\n" * 100_000,
    "numbers": "72 " * 33_000,
    "commas": "1," * 50_000,
    "separators": "1" + ",000" * 25_000,
    "points": "1." * 50_000,
    "open answers": "<answer>" * 12_000,
    "open tags": "<" * 100_000,
    "half tags": "<answer" * 14_000,
    "pairs": "<answer>72</answer>" * 5_000,
    "closing first": "</answer>" * 11_000,
    "nested": "<reasoning>" * 4_500 + "</reasoning>" * 4_500,
    "in one answer": "<answer>" + "72 " * 33_000 + "</answer>",
    "spaces in one answer": "<answer>" + " " * 100_000 + "72</answer>",
    "expression": "<answer>" + "1+" * 50_000 + "1</answer>",
    "parentheses": "<answer>" + "(" * 100_000 + "</answer>",
    "boxes": "<answer>" + "\\boxed{" * 14_000 + "</answer>",
    "closed boxes": "<answer>" + "\\boxed{1}" * 11_000 + "</answer>",
    "fences": "```\n" * 25_000,
    "unicode": "𝟕٧\u202e" * 30_000,
    "tail": "<reasoning>\na\n</reasoning>\n<answer>\n72\n</answer>" + "x" * 100_000,
}


@pytest.mark.parametrize("name", LONG)
def test_long_texts(name):
    for reward in [*FAST, math500.correctness_reward]:
        if reward is math500.correctness_reward:
            reward([None], ["<answer>1+x</answer>"], ["x+1"])  # the start of the worker is no part of it
        assert check(reward, LONG[name]) < 100, reward.__name__


def test_importing_rewards_imports_neither_torch_nor_dgrpo():
    script = (
        f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n"
        "import rewards.programs, rewards.countdown, rewards.format, rewards.gsm8k, rewards.math500, rewards.sudoku\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'dgrpo', 'sympy', 'numpy', 'trl'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_rewards_print_nothing_and_draw_nothing(capfd):
    import random

    state = random.getstate()
    for reward in [*FAST, *SLOW]:
        check(reward, "<answer>def f(x): return x</answer>")
    assert capfd.readouterr() == ("", "")
    assert random.getstate() == state
