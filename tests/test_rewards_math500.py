"""MATH: what counts as equal, and a time limit that holds in threads and after forks."""

import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards import math500
from rewards.math500 import MathVerify, boxed_reward, correctness_reward

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


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("x^2+x+1=0", "\\boxed{x^2+x+2=0}", 0),
        ("x + y + z = 0", "\\boxed{0}", 0),
        ("xy=6", "6", 0),
        ("y=2x+3", "2x+3", 1),
        ("11/4", "1 1/4", 0),
        ("12", "1 2", 0),
        ("\\frac{5}{4}", "1 1/4", 1),
        ("58,500", "\\(58,500\\)", 1),
        ("20", "\\(20\\text{ miles}\\)", 1),
        ("30^\\circ.", "\\boxed{30^\\circ}", 1),
        ("\\frac{1}{2^{98}}", "\\frac{8}{2^{98}}", 0),
        ("2,-2", "\\boxed{\\pm 2}", 1),
        ("\\text{June 20}", "June 20", 1),
        ("\\text{June 20}", "June 21", 0),
        ("18", "3×6", 0),
        ("18", "3·6", 0),
        ("18", "3 x 6", 0),
        ("18", "√324", 0),
        ("18", "3(6)", 0),
        ("18", "(3)(6)", 0),
        ("18", "3 \\ast 6", 0),
        ("18", "18^1", 0),
        ("18", "3 times 6", 0),
        ("18", "3**6", 0),
        ("73", "**73**", 1),
        ("73", "`73`", 1),
        ("73", "The answer is $73$.", 1),
        ("73", "$73$.", 1),
        ("73", "The answer is $73$ or $74$.", 0),
        ("73", "$72$, $73$", 0),
        ("73", "The answer is 73.", 1),
        ("73", "It is **73** apples", 1),
        ("73", "$$73$$", 1),
        ("73", "\\[73\\]", 1),
        ("73", "**$73$**", 1),
        ("x^2+1=0", "x^2+2=0", 0),
        ("x^2+y^2=1", "2x^2+2y^2=2", 1),
        ("x^2+y^2=1", "x^2+y^2=2", 0),
        ("y=2x+3", "2x-y+3=0", 1),
        ("y=2x+3", "y=2x+4", 0),
        ("2x+y=3", "3", 0),
        ("x^4+1=0", "x^4+5=0", 0),
        ("x=5", "y=5", 0),
        ("x=5", "x=5", 1),
        ("5", "x=5", 1),
        ("12", "AB = 12", 1),
        ("12", "8+4=12", 1),
        ("12", "xy=12", 0),
        ("2,-2", "x=2, x=-2", 1),
        ("2,-2", "x=\\pm 2", 1),
        ("2,-2", "2 or -2", 1),
        ("2,-2", "$2$ and $-2$", 1),
        ("1\\pm\\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}", 1),
        ("1+\\sqrt{19},1-\\sqrt{19}", "1 \\pm \\sqrt{19}", 1),
        ("1\\pm\\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{18}", 0),
        ("1 \\pm \\sqrt{5}, -2", "-2, 1\\pm\\sqrt5", 1),
        ("5t", "5", 0),
        ("5", "5t", 0),
        ("5t", "5t", 1),
        ("\\frac{1}{10^{20}}", "\\frac{2}{10^{20}}", 0),
        ("10^{-9}", "10^{-10}", 0),
        ("0.00000001", "0.00000002", 0),
        ("\\frac{x}{10^{20}}", "\\frac{2x}{10^{20}}", 0),
        ("\\frac13", "0.333333", 1),
        ("\\frac13", "0.3333", 0),
        ("\\frac{2}{3}", "0.666667", 1),
        ("44\\%", "44", 1),
        ("44", "44%", 1),
        ("10\\sqrt{2}\\text{ cm}", "10\\sqrt2", 1),
        ("10\\sqrt{2}", "10\\sqrt{2}\\text{ cm}", 1),
        ("10\\sqrt{2}", "10\\sqrt{2} cm", 1),
        ("\\frac{\\sqrt{3}}{2}", "√3/2", 1),
        ("4\\pi", "4π", 1),
        ("4\\pi", "2 \\cdot 2\\pi", 0),
        ("(3,-1)", "(3, −1)", 1),
        ("(3,-1)", "(2+1,-1)", 0),
        ("(-\\infty,-8]\\cup [8,\\infty)", "(−∞,−8] ∪ [8,∞)", 1),
        ("x \\in [-2,7]", "[-2,7]", 1),
        ("\\text{(C)}", "C", 1),
        ("x^2+1", "x²+1", 1),
        ("2\\frac{1}{4}", "\\frac{9}{4}", 1),
        ("2\\frac14", "2 1/4", 1),
        ("-2\\frac14", "-\\frac94", 1),
        ("2.25", "2 1/4", 1),
        ("\\frac{9}{4}", "2 \\frac{1}{4}", 1),
        ("1234", "1 234", 0),
        ("12345", "12 345", 1),
        ("1,234", "1234", 1),
        ("1,234,567", "1\\,234\\,567", 1),
        ("1{,}234", "1234", 1),
        ("\\$18.90", "18.90 dollars", 1),
        ("5", "not 5", 0),
        ("5", "The answer is not $5$", 0),
        ("x+y+z=0", "x+y+z=0", 1),
        ("a=b", "b=a", 1),
        ("f(x)=2x+3", "2x+3", 1),
        ("\\sqrt{50}", "5\\sqrt2", 1),
        ("x > 3", "x>3", 1),
        ("x > 3", "(3,\\infty)", 1),
        ("x \\le 3", "x \\leq 3", 1),
        ("x^2<-1", "x^2<-2", 0),
        ("\\begin{pmatrix} -7 \\\\ 16 \\\\ 5 \\end{pmatrix}", "\\begin{pmatrix} -7 \\\\ 16 \\\\ 5 \\end{pmatrix}", 1),
        ("\\begin{pmatrix} -7 \\\\ 16 \\\\ 5 \\end{pmatrix}", "\\begin{pmatrix} -7 \\\\ 16 \\\\ 6 \\end{pmatrix}", 0),
        ("6-3i", "6 - 3i", 1),
        ("\\log_2 8", "\\log_{2} 8", 1),
        ("10\\text{ inches}", "10 inches", 1),
        ("36", "36\\text{ cm}^2", 1),
        ("3", "$x = 3$", 1),
        ("3", "x is 3", 1),
        ("3/4", "¾", 1),
        ("1.5", "1½", 1),
        ("-7", "−7", 1),
        ("90^\\circ", "90°", 1),
        ("90", "90 degrees", 1),
        ("\\frac{1}{2}", "$\\dfrac{1}{2}$", 1),
        ("\\left(0,\\frac12\\right)", "$\\left(0,\\frac{1}{2}\\right)$", 1),
        ("y = \\frac{1}{x}", "xy=1", 1),
        ("9", "3^2", 0),
        ("120", "5!", 0),
        ("6", "\\lvert -6 \\rvert", 0),
        ("6", "|−6|", 0),
    ],
)
def test_answers_as_people_write_them(gold, answer, expected):
    assert score(answer, gold, box="%s") == expected


def in_thousands(gold, comma):
    return f"{int(gold):,}".replace(",", comma) if re.fullmatch(r"\d{4,}", gold) else None


def if_number(gold, text):
    return text if re.fullmatch(r"-?\d+(\.\d+)?", gold) else None


def as_mixed(gold, form):
    match = re.fullmatch(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", gold)
    if match is None or int(match[1]) < int(match[2]) or int(match[1]) % int(match[2]) == 0:
        return None
    return form % (*divmod(int(match[1]), int(match[2])), int(match[2]))


FORMS = {
    "boxed": lambda gold: f"\\boxed{{{gold}}}",
    "parentheses": lambda gold: f"\\({gold}\\)",
    "dollar": lambda gold: f"${gold}$.",
    "dollars": lambda gold: f"$${gold}$$",
    "brackets": lambda gold: f"\\[ {gold} \\]",
    "bold": lambda gold: f"**{gold.strip()}**",
    "code": lambda gold: f"`{gold}`",
    "full stop": lambda gold: f"{gold}.",
    "prose": lambda gold: f"The answer is ${gold}$.",
    "bold prose": lambda gold: f"**The final answer is \\({gold}\\).**",
    "minus": lambda gold: gold.replace("-", "−"),
    "pi": lambda gold: re.sub(r"\\pi(?![a-z])", "π", gold),
    "fractions": lambda gold: re.sub(r"\\[dt]?frac", r"\\dfrac", gold),
    "unit": lambda gold: if_number(gold, f"\\({gold}\\text{{ miles}}\\)"),
    "plain unit": lambda gold: if_number(gold, f"{gold} cm²"),
    "name": lambda gold: if_number(gold, f"x = {gold}"),
    "thousands": lambda gold: in_thousands(gold, ","),
    "thousands in LaTeX": lambda gold: in_thousands(gold, "{,}"),
    "thin spaces": lambda gold: in_thousands(gold, "\\,"),
    "mixed": lambda gold: as_mixed(gold, "%d %d/%d"),
    "mixed in LaTeX": lambda gold: as_mixed(gold, r"%d\frac{%d}{%d}"),
}


def with_another_digit(gold):
    """The gold with its last digit changed; None where it has none."""
    places = [place for place, sign in enumerate(gold) if sign in "0123456789"]
    return (
        None if not places else gold[: places[-1]] + str((int(gold[places[-1]]) + 1) % 9 + 1) + gold[places[-1] + 1 :]
    )


@pytest.mark.parametrize("form", FORMS)
def test_gold_of_math_rewritten_stays_right_and_with_another_digit_it_is_wrong(form):
    golds = (Path(__file__).parent / "data/math/answers.txt").read_text().splitlines()
    for change, expected in ((str, 1.0), (with_another_digit, 0.0)):
        changed = {gold: change(gold) for gold in golds}
        pairs = [(gold, FORMS[form](other)) for gold, other in changed.items() if other]
        pairs = [(gold, text) for gold, text in pairs if text is not None]
        texts = [f"<answer>\n{text}\n</answer>" for _, text in pairs]
        scores = correctness_reward(texts, texts, [gold for gold, _ in pairs])
        assert pairs
        assert [pair for pair, score in zip(pairs, scores, strict=True) if score != expected] == []


@pytest.mark.slow
def test_many_answers_that_take_too_long_are_bounded_together_and_cost_no_other():
    """Counted in CPU time of the workers: 96 of them one after the other took 77 seconds."""
    bombs = [f"<answer>9^{{9^{{9^{{{n}}}}}}}</answer>" for n in range(9, 105)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answers = MathVerify()
    pairs = [("9^9", re.search("r>(.*)<", bomb)[1]) for bomb in bombs]
    assert answers.equal([*pairs, ("x+1", "1+x")]) == [False] * 96 + [True]
    for worker in answers.workers:
        worker.stop()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 60


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


@pytest.mark.parametrize(
    "frame",
    [
        "### Final Answer\n$%s$",
        "> $%s$",
        r"$\Rightarrow %s$",
        "∴ %s",
        "$%s$ ✓",
        "<b>%s</b>",
        '"%s"',
        "_$%s$_",
        r"\underline{%s}",
        r"\fbox{$%s$}",
        r"\boxed{\large %s}",
        r"\boxed{\mathbf{%s}}",
        r"\begin{equation*}\boxed{%s}\end{equation*}",
        r"\begin{align*}%s\end{align*}",
    ],
)
@pytest.mark.parametrize(("gold", "wrong"), [(r"-\frac{8}{15}", r"-\frac{8}{16}"), ("375", "376")])
def test_what_frames_a_whole_answer_says_nothing(frame, gold, wrong):
    answers = [f"<answer>\n{frame % text}\n</answer>" for text in (gold, wrong)]
    assert correctness_reward([None] * 2, answers, [gold] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (r"\frac{3}{16}", "(3/16)", "(3/17)"),
        (r"150 \sqrt{3}", "150 sqrt(3)", "150 sqrt(2)"),
        ("1133", "1\u202f133", "1\u202f134"),
        ("5", "= 5", "> 5"),
    ],
)
def test_a_value_in_another_notation(gold, right, wrong):
    answers = [f"<answer>\n{text}\n</answer>" for text in (right, wrong)]
    assert correctness_reward([None] * 2, answers, [gold] * 2) == [1.0, 0.0]
