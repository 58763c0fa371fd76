r"""MATH: 1.0 when the answer equals the reference.

Rules, after `rewards.text` has found the answer (the `<answer>` block, or what its `\boxed{...}` holds) and
`rewards.notation` has taken off Markdown, delimiters and prose and brought both texts into one spelling:

- The same text is right. White space counts only where it tells two words or numbers apart: `1 2` is not 12.
- A reference in words (`\text{June 20}`) is compared as words, without regard to capitals and parentheses.
- A reference that is one number, with or without a unit (`58,500`, `\frac{5}{4}`, `20\text{ miles}`, `30^\circ`), is
  compared exactly. The answer must be one number too, perhaps a mixed one or a fraction; of units only the power is
  compared. A calculation left undone is no number, in whatever notation. A decimal of six or more places stands for
  the fraction that it is the rounding of.
- A left side is dropped only when it is a single name (`x = 5`, `f(x) = 2x + 3`), in the answer also when it is a
  calculation of numbers (`8 + 15 = 23`). Otherwise an equation equals no value, and two equations must say the same.
- `\pm` stands for two values. Where both end in a base (`4210_{5}`), it must be the same one.
- Where the reference is free of operations (`+`, `\times`, `!`, `^`, `\sqrt`, ...), so must the answer be.
- What is left is compared by math-verify (https://github.com/huggingface/Math-Verify) without its list of units, which
  takes `5t` for 5: sets, intervals, matrices, roots, terms with letters.
- An answer that takes more than 0.8 seconds of CPU time to compare, or more than 2 GiB, is wrong. After 8 such
  answers in one call the others have 0.1 seconds each, and several processes share the work: a call is bounded.

math-verify's own time limit rests on signal.alarm and holds in no thread but the main one, so the comparison runs in
processes of their own (`rewards/_math_worker.py`). They are started at the first answers that need them, for each
process that asks, are shared by that process's threads, and end with it.
"""

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards.notation import bare, elements, plain_latex, plain_number, same_number, without_unit
from rewards.text import Completion, answer_block, boxed_contents, completion_text, short_answer

WORKER = Path(__file__).with_name("_math_worker.py")

# What holds a `^` that calculates nothing. Without a letter it is no unit: math-verify reads 6\text{}^2 as 36.
DEGREES_OR_UNIT = re.compile(
    r"\^\\circ|\\(?:text|mathrm|mbox)\{[~.]*[A-Za-z][A-Za-z\s~.]*\}\^(?:[0-9]|\{-?[0-9]+\})|\\mathrm\{[A-Za-z]+\}"
)
BASED = re.compile(r"(-?[0-9A-Z]+)_\{?([0-9]+)\}?")
OPERATION = re.compile(
    r"[+*!^|]|[\w)}]-|[)\d]\(|\)[\d]|\\(?:pm|mp|cdot|times|div|ast|star|bullet|[dt]?binom|sum|prod|int|lim|log|ln|exp|sin|cos"
    r"|tan|cot|sec|csc|arc|max|min|gcd|lcm|sqrt|[lr]floor|[lr]ceil|[lr]?vert|Vert|[bp]?mod|det|operatorname|overline)"
    r"|\b(?:times|plus|minus|divided|over|squared|cubed|sqrt|mod|choose)\b|\d ?x ?\d"
)
# One letter, also Greek or of several capitals as geometry has them, a function of something, or words.
NAME = re.compile(
    r"(?:\\angle ?)?(?:[A-Za-z]|[A-Z]{2,4}|[A-Za-z]{5,}|\\[A-Za-z]{2,}|\\(?:text|mathrm|operatorname)\{[^{}]*\})'*"
    r"(?:_(?:\w|\{\w+\}))?(?:\^\{-1\})?(?:\([\w, ]*\))?"
)
EQUALS = re.compile(r"(?<![<>!:\\])=")
TEXT = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm)\s*\{([^{}]*)\}")
WORDS = re.compile(r"[A-Za-z][A-Za-z\d .,:;'’()-]*")
DIGITS_APART = re.compile(r"(?<![_^{\d])\d+ \d")

# Import of sympy on a busy machine; and a last resort beside the worker's own clock of CPU time.
START_SECONDS = 120.0
REPLY_SECONDS = 20.0
# A time for each answer, honest ones needing some hundredths of a second, and how many may use it up in one call.
CPU_SECONDS, LATER_CPU_SECONDS, NUM_SLOW = 0.8, 0.1, 8
MAX_WORKERS = 4


class Worker:
    """One process that compares with math-verify, and which question it is at."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            # -P: the worker's folder holds modules named like the standard library's.
            [sys.executable, "-P", str(WORKER)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.question: int | None = None
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS

    def ask(self, question: int, request: dict[str, Any]) -> None:
        """Send a request; a worker that is gone is noticed when its reply is read."""
        self.question, self.deadline = question, time.monotonic() + REPLY_SECONDS
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")  # type: ignore[union-attr]

    def stop(self) -> bytes:
        """End the process and its child, if there is one, and return what it said on stderr."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        return self.process.communicate()[1]


class MathVerify:
    """math-verify in processes of its own: `equal(pairs)` from any thread, and after a fork."""

    def __init__(self) -> None:
        self.forget()
        # A forked child must not talk into the pipes of its parent's workers, nor wait for a lock held there.
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Leave the workers to whoever started them; the next question starts others."""
        self.lock = threading.Lock()
        self.workers: list[Worker] = []

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether math-verify finds each (reference, answer) equal, within the limits of time and memory."""
        distinct = list(dict.fromkeys(pairs))
        with self.lock:
            try:
                verdicts = self._judge(distinct)
            except BaseException:
                # A time limit or Ctrl-C: a reply that nobody has read would be taken for the next question's.
                for worker in self.workers:
                    worker.stop()
                self.workers = []
                raise
        found = dict(zip(distinct, verdicts, strict=True))
        return [found[pair] for pair in pairs]

    def _judge(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        verdicts: list[bool] = [False] * len(pairs)
        waiting, num_slow = list(range(len(pairs)))[::-1], 0
        for _ in range(min(len(pairs), MAX_WORKERS, len(os.sched_getaffinity(0))) - len(self.workers)):
            self.workers.append(Worker())
        while waiting or any(worker.question is not None for worker in self.workers):
            if not self.workers:
                self.workers.append(Worker())
            for worker in self.workers:
                if worker.ready and worker.question is None and waiting:
                    gold, answer = pairs[waiting[-1]]
                    seconds = CPU_SECONDS if num_slow < NUM_SLOW else LATER_CPU_SECONDS
                    worker.ask(waiting.pop(), {"gold": gold, "answer": answer, "seconds": seconds})
            for worker in self._with_news():
                line = worker.process.stdout.readline()  # type: ignore[union-attr]
                if not worker.ready and line != b"ready\n":
                    message = worker.stop().decode(errors="replace").strip()
                    raise RuntimeError(f"math-verify did not start; is math-verify installed? {message[-500:]}")
                if worker.question is not None:
                    verdicts[worker.question] = line == b"1\n"
                    num_slow += line == b"slow\n"
                worker.ready, worker.question = True, None
                if line not in (b"ready\n", b"1\n", b"0\n", b"slow\n"):
                    self._drop(worker)
            for worker in [each for each in self.workers if each.deadline < time.monotonic()]:
                if not worker.ready or worker.question is not None:
                    self._drop(worker)
        return verdicts

    def _with_news(self) -> list[Worker]:
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                if not worker.ready or worker.question is not None:
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
            return [key.data for key, _ in selector.select(1.0)] if selector.get_map() else []

    def _drop(self, worker: Worker) -> None:
        worker.stop()
        self.workers.remove(worker)


math_verify = MathVerify()


def words(text: str) -> str:
    """A text's words in small letters, without `\\text`, parentheses and marks around them."""
    return " ".join(re.sub(r"[(){}$.,;:\s]+", " ", TEXT.sub(r" \1 ", text)).lower().split())


def in_words(gold: str) -> bool:
    """Whether a reference is words, marked as text or of at least four letters, rather than mathematics."""
    if TEXT.search(gold) and not TEXT.sub("", gold).strip("(){}$. "):
        return re.search("[A-Za-z]", words(gold)) is not None
    return WORDS.fullmatch(gold.strip()) is not None and re.search("[A-Za-z]{4}", gold) is not None


def values(text: str) -> list[str]:
    r"""The elements of a list, `\pm` in any of them read as two."""
    found = []
    for element in elements(text):
        signs = [sign for sign in (r"\pm ", r"\pm", r"\mp ", r"\mp") if sign in element]
        if not signs or element.count(r"\pm") + element.count(r"\mp") > 1:
            found.append(element)
            continue
        before, _, after = element.partition(signs[0])
        found += [f"{before}{'+' if before else ''}{after}", f"{before}-{after}"]
    return found


def without_name(text: str, kept: str | None = None, calculations: bool = False) -> str | None:
    """What a text says of a single name, or of a calculation of numbers; None where it is an equation.

    A name other than `kept`, if given, is not dropped either.
    """
    first, *rest = EQUALS.split(text)
    if not rest:
        return text
    if NAME.fullmatch(first):
        return rest[-1] if kept in (None, first) else None
    return rest[-1] if calculations and not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", first)) else None


def verdict(answer: str | None, gold: str) -> bool | tuple[str, str]:
    """Whether the answer is right, or the (reference, answer) that math-verify must compare."""
    plain = None if answer is None else bare(answer)
    if not answer or not plain:
        return False
    gold = bare(gold) or gold
    if in_words(gold):
        return words(gold) in (words(plain), words(answer))
    wanted, found = plain_latex(gold), plain_latex(plain)
    if wanted == found:
        return True
    if DIGITS_APART.search(found) and plain_number(found.rpartition("=")[2]) is None:
        return False
    name = EQUALS.split(wanted)[0] if "=" in wanted and NAME.fullmatch(EQUALS.split(wanted)[0]) else None
    listed = elements(wanted)
    if len(listed) == 1 and "=" in wanted and name is None:
        return (wanted, found) if EQUALS.search(found) and len(elements(found)) == 1 else False
    if len(listed) == 1 or not any(EQUALS.search(element) for element in listed):
        # A reference `y = 2x + 3` is also met by another equation that says the same.
        left, *right = EQUALS.split(found)
        if name and right and left != name and re.search("[A-Za-z]", left):
            return wanted, found
        wanted = without_name(wanted) or wanted
        stripped = [without_name(element, name, calculations=True) for element in elements(found)]
        if None in stripped:
            return False
        found = ",".join(filter(None, stripped))
    elif not EQUALS.search(found):
        wanted = ",".join(without_name(element) or element for element in listed)
    return same_value(wanted, found)


def same_value(wanted: str, found: str) -> bool | tuple[str, str]:
    """Whether two values without names are equal, or what math-verify must compare."""
    if wanted == found:
        return True
    if r"\approx" in wanted:
        exact, _, rounded = wanted.partition(r"\approx")
        return r"\approx" not in found and True in [
            same_value(exact.strip(), found),
            same_value(rounded.strip(), found),
        ]
    base, given = BASED.fullmatch(wanted), BASED.fullmatch(found)
    if base:
        return found == base[1] or (given is not None and given.groups() == base.groups())
    golds, answers = ([without_unit(value) for value in values(text)] for text in (wanted, found))
    numbers = [plain_number(gold) for gold in golds]
    if None not in numbers and len(golds) == 1:
        number = plain_number(found)
        return number is not None and numbers[0] is not None and same_number(numbers[0], number)
    if OPERATION.search(DEGREES_OR_UNIT.sub("", ",".join(answers))) and not OPERATION.search(
        DEGREES_OR_UNIT.sub("", ",".join(golds))
    ):
        return False
    return ",".join(golds), ",".join(answers)


def correctness_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1.0 where the answer equals the reference, 0.0 where not, None where there is no reference."""
    golds = ["" if gold is None else str(gold).strip() for gold in answer]
    texts = [completion_text(completion) for completion in completions]
    verdicts = [verdict(short_answer(text), gold) if gold else None for text, gold in zip(texts, golds, strict=True)]
    undecided = [each for each in verdicts if isinstance(each, tuple)]
    decided = iter(math_verify.equal(undecided) if undecided else [])
    return [
        None if each is None else float(next(decided)) if isinstance(each, tuple) else float(each) for each in verdicts
    ]


def boxed_reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    r"""1.0 where the `<answer>` block holds exactly one `\boxed{...}` that is closed and not empty; else 0.0."""
    scores: list[float | None] = []
    for completion in completions:
        boxes = boxed_contents(answer_block(completion_text(completion)) or "")
        scores.append(float(boxes is not None and len(boxes) == 1 and bool(boxes[0])))
    return scores
