"""MATH: what counts as equal, and a time limit that holds in threads and after forks."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards import math500
from rewards.math500 import boxed_reward, correctness_reward

PROJECT = Path(__file__).parents[1]
GENERATIONS = sorted((Path(__file__).parent / "data/d1").glob("math500*_generations.json"))


def score(answer, gold, box="\\boxed{%s}"):
    return correctness_reward([None], ["<answer>\n" + box % answer + "\n</answer>"], [gold])[0]


def score_hard_and_easy(_):
    """For other processes: one answer that runs into the limit, then one that does not."""
    return score("9^{9^{9^9}}", "9^9"), score("2\\sqrt{5}", "\\sqrt{20}")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("\\frac12", "\\frac{1}{2}"),
        ("0.5", "\\frac{1}{2}"),
        ("1/2", "\\frac 12"),
        ("12.", "12"),
        ("x = 5", "5"),
        ("5", "x=5"),
        ("8 + 15 = 23", "23"),
        ("-2,1", "1,-2"),
        ("\\left( 3, \\dfrac{\\pi}{2} \\right)", "(3, \\frac{\\pi}{2})"),
        ("30", "30^\\circ"),
        ("30^{\\circ}", "30"),
        ("18.90", "\\$18.90"),
        ("5.4", "5.4 \\text{ cents}"),
        ("2\\sqrt{5}", "\\sqrt{20}"),
        ("3 + 2x", "2x + 3"),
        ("(x-1)(x+1)", "x^2-1"),
        ("\\text{east}", "east"),
        ("C", "\\text{(C)}"),
        ("1,600", "1600"),
        ("[-2, 7]", "x \\in [-2,7]"),
        ("36\\text{ cm}^2", "36"),
        ("36\\text{ cm}^{2}", "36"),
        ("36\\ \\mathrm{m}^3", "36"),
        ("9.8\\mathrm{~m}\\text{ s}^{-2}", "9.8"),
        ("15", "15\\mbox{ cm}^2"),
        ("15 \\text{ sq. cm}^2", "15\\mbox{ cm}^2"),
        ("4210", "4210_{5}"),
        ("4210_5", "4210_{5}"),
        ("$2516_{8}$", "2516_8"),
        ("\\{x_2, x_1\\}", "\\{x_1, x_2\\}"),
        ("5", 5),
    ],
)
def test_equal(answer, gold):
    assert score(answer, gold) == 1.0
    assert score(answer, gold, box="%s") == 1.0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("13", "12"),
        ("", "12"),
        ("12 or 13", "12"),
        ("12, 13", "12"),
        ("\\{12, 13\\}", "12"),
        ("x \\in [0, 100]", "12"),
        ("12.0000001", "12"),
        ("2 \\cdot 6", "12"),  # calculations left undone
        ("7 + 5", "12"),
        ("\\binom{12}{1}", "12"),
        ("\\sqrt{144}", "12"),
        ("13 - 1", "12"),
        ("\\max(11, 12)", "12"),
        ("x + 1", "x"),
        ("30 + 6", "36\\text{ cm}^2"),
        ("6^2\\text{ cm}^2", "36"),
        ("6\\text{ cm}^2", "36"),
        ("6\\text{}^2", "36"),
        ("\\text{6}^2", "36"),
        ("4210_{7}", "4210_{5}"),
        ("4210_5", "4210_7"),
        ("2516_{10}", "2516_8"),
        ("$2516_{10}$.", "2516_8"),
        ("(1, 2)", "(2, 1)"),
        ("12}\\boxed{13", "12"),
        ("\\frac{12", "12"),
        ("\ud800", "12"),
        ("\x00", "12"),
        ("٣", "3"),
        ("\u202e21", "12"),
    ],
)
def test_different(answer, gold):
    assert score(answer, gold) == 0.0


HOSTILE = [
    "9^{9^{9^9}}",
    "100000000!",
    "9!!!!!",
    "\\sum_{n=1}^{10^9} n^{3/2}",
    "\\prod_{n=1}^{10^8} n",
    "\\int_0^1 x^{x^x} dx",
    "(x+y+z)^{3000}",
    "\\binom{10^9}{10^8}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "(" * 250 + ")" * 240,
    "{" * 200 + "}" * 200,
    "\\sqrt{" * 70,
    "1" * 490,
    "1+" * 200 + "1",
    "a" * 490,
]


@pytest.mark.parametrize("answer", HOSTILE)
def test_hostile_answers_are_wrong_within_the_limit(monkeypatch, answer):
    monkeypatch.setattr(math500, "REPLY_SECONDS", 600.0)
    score("2\\sqrt{5}", "\\sqrt{20}")  # the worker is there
    worker = math500.math_verify.workers[0]
    # The reference holds an operation, so that the answer does reach math-verify.
    assert score(answer, "9^9") == 0.0
    assert score("2\\sqrt{5}", "\\sqrt{20}") == 1.0
    assert math500.math_verify.workers[0] is worker, "it answers by its own clock of CPU time, nobody has to end it"


def test_from_threads():
    jobs = [("x+1", "1+x"), ("9^{9^{9^9}}", "9^9"), ("3\\pi", "4\\pi"), ("2+x", "x+2")] * 2
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda job: score(*job), jobs)) == [1.0, 0.0, 0.0, 1.0] * 2


@pytest.mark.slow
def test_after_a_fork_even_while_another_thread_asks():
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            score("2\\sqrt{5}", "\\sqrt{20}")

    thread = threading.Thread(target=ask)
    thread.start()
    child = os.fork()
    if child == 0:
        os._exit(0 if score_hard_and_easy(0) == (0.0, 1.0) else 1)
    _, status = os.waitpid(child, 0)
    stop.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
    assert score("2\\sqrt{5}", "\\sqrt{20}") == 1.0


@pytest.mark.slow
def test_in_a_spawned_process():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(score_hard_and_easy, [0])) == [(0.0, 1.0)]


def test_a_lost_worker_is_replaced():
    score("2\\sqrt{5}", "\\sqrt{20}")
    math500.math_verify.workers[0].process.kill()
    math500.math_verify.workers[0].process.wait()
    score("2\\sqrt{5}", "\\sqrt{20}")  # this answer is lost with it
    assert score("2\\sqrt{5}", "\\sqrt{20}") == 1.0


class Interrupted(BaseException):
    """What a time limit around a reward raises, or Ctrl-C."""


@pytest.mark.slow
@pytest.mark.parametrize("started", [True, False])
def test_an_interrupted_question_shifts_no_later_verdict(started, monkeypatch):
    def interrupt(number, frame):
        raise Interrupted

    monkeypatch.setattr(math500, "math_verify", math500.MathVerify())
    if started:
        score("2\\sqrt{5}", "\\sqrt{20}")
    previous = signal.signal(signal.SIGUSR2, interrupt)
    timer = threading.Timer(0.3, signal.pthread_kill, [threading.get_ident(), signal.SIGUSR2])
    timer.start()
    try:
        with pytest.raises(Interrupted):
            score("9^{9^{9^9}}", "9^9")
    finally:
        timer.join()
        signal.signal(signal.SIGUSR2, previous)
    assert [score("2\\sqrt{5}", "\\sqrt{20}"), score("3\\pi", "4\\pi"), score("x+1", "1+x")] == [1.0, 0.0, 1.0]


@pytest.mark.slow
def test_the_worker_ends_with_its_process():
    script = (
        f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n"
        "from rewards import math500\n"
        "math500.correctness_reward([None], ['<answer>x+1</answer>'], ['1+x'])\n"
        "print(math500.math_verify.workers[0].process.pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    state = Path(f"/proc/{int(done.stdout)}/stat")
    for _ in range(3000):
        # Ended, even where nobody has asked for its exit code yet.
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX":
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its process")


def test_a_worker_that_cannot_start_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("import no_such_package")
    monkeypatch.setattr(math500, "WORKER", broken)
    monkeypatch.setattr(math500, "math_verify", math500.MathVerify())
    with pytest.raises(RuntimeError, match="no_such_package"):
        score("2\\sqrt{5}", "\\sqrt{20}")


def test_no_reference_no_score():
    texts = ["<answer>\\boxed{5}</answer>"] * 4
    assert correctness_reward([None] * 4, texts, [None, "", " ", "5"]) == [None, None, None, 1.0]


def test_messages_are_read():
    assert correctness_reward([0], [[{"role": "assistant", "content": "<answer>\\boxed{5}</answer>"}]], ["5"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>\\boxed{5}</answer>", 1.0),
        ("<answer>It is \\boxed{\\frac{1}{2}}.</answer>", 1.0),
        ("<answer>5</answer>", 0.0),
        ("<answer>\x08oxed{5}</answer>", 0.0),
        ("<answer>\\boxed{}</answer>", 0.0),
        ("<answer>\\boxed{5</answer>", 0.0),
        ("<answer>\\boxed{5} \\boxed{5}</answer>", 0.0),
        ("\\boxed{5} <answer>5</answer>", 0.0),
        ("\\boxed{5}", 0.0),
        ("", 0.0),
        ("<answer>" + "\\boxed{" * 14_000 + "</answer>", 0.0),
    ],
)
def test_boxed_reward(text, expected):
    assert boxed_reward([None], [text], answer=["5"]) == [expected]


@pytest.mark.slow
def test_gold_answers_of_math500():
    golds = [item["ground_truth"] for path in GENERATIONS for item in json.loads(path.read_text())["generations"]]
    assert len(golds) == 114
    for box in ("\\boxed{%s}", "\\boxed{%s }.", "%s"):
        texts = ["<answer>\n" + box % gold + "\n</answer>" for gold in golds]
        assert correctness_reward(golds, texts, golds) == [1.0] * len(golds)
    # And by math-verify itself, where the texts differ.
    assert all(math500.math_verify.equal([(gold, f"{gold} ") for gold in golds]))
