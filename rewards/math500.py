r"""MATH: 1.0 when math-verify finds the answer equal to the reference.

Rules, after `rewards.text` has found the answer (the `<answer>` block, or what its `\boxed{...}` holds):

- A full stop at its end is dropped. The same text as the reference, white space apart, is right.
- A calculation left undone is wrong: where the reference is free of operations (`+`, `\times`, `!`, `^`, `\binom`,
  `\sqrt`, `\sum`, ...), so must the answer be. math-verify would calculate it, and a question copied as its own answer
  would be right. Fractions, signs, units (`36\text{ cm}^2`) and degrees are not operations; of `8 + 15 = 23` the last
  part counts.
- Where both end in a base (`4210_{5}`), it must be the same one: math-verify does not read it.
- Otherwise both are parsed as LaTeX and compared by math-verify (https://github.com/huggingface/Math-Verify), with its
  defaults: `\frac{1}{2}` equals `0.5`, `x = 5` equals `5`, sets and intervals compare as such.
- An answer that takes more than 0.8 seconds of CPU time to parse or compare, or more than 2 GiB, is wrong.

math-verify's own time limit rests on signal.alarm and holds in no thread but the main one, so the comparison runs in a
process of its own (`rewards/_math_worker.py`). It is started at the first answer that needs it, one for each process
that asks, is shared by that process's threads, and ends with it.
"""

import json
import os
import re
import selectors
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards.text import Completion, answer_block, boxed_contents, completion_text, short_answer

WORKER = Path(__file__).with_name("_math_worker.py")

# What holds a `^` that calculates nothing. Without a letter it is no unit: math-verify reads 6\text{}^2 as 36.
DEGREES_OR_UNIT = re.compile(
    r"\^\s*\{?\s*\\circ\s*\}?"
    r"|\\(?:text|mathrm|mbox)\s*\{[\s~.]*[A-Za-z][A-Za-z\s~.]*\}\s*\^\s*(?:[0-9]|\{\s*-?[0-9]+\s*\})"
)
BASE = re.compile(r"\b[0-9][0-9A-Z]*\s*_\s*\{?\s*([0-9]+)\s*\}?\W*$")
OPERATION = re.compile(
    r"[+*!^]|[\w)}]\s*-|\\(?:pm|mp|cdot|times|div|[dt]?binom|sum|prod|int|lim|log|ln|exp|sin|cos|tan|cot|sec|csc|arc|max|min"
    r"|gcd|lcm|sqrt|[lr]floor|[lr]ceil|[bp]?mod|det|operatorname)"
)

# Import of sympy on a busy machine; and a last resort beside the worker's own clock of CPU time.
START_SECONDS = 120.0
REPLY_SECONDS = 20.0


class MathVerify:
    """math-verify in a process of its own: `equal(gold, answer)` from any thread, and after a fork."""

    def __init__(self) -> None:
        self.forget()
        # A forked child must not talk into the pipes of its parent's worker, nor wait for a lock held there.
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Leave the worker to whoever started it; the next question starts another."""
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def equal(self, gold: str, answer: str) -> bool:
        """Whether math-verify finds the answer equal to the reference, within the limits of time and memory."""
        question = json.dumps({"gold": gold, "answer": answer}).encode() + b"\n"
        with self.lock:
            try:
                if self.process is None:
                    self.start()
                verdict = self.ask(question)
                if verdict not in (b"0\n", b"1\n"):
                    self.stop()
            except BaseException:
                # A time limit or Ctrl-C: the reply that nobody has read would be taken for the next question's.
                self.stop()
                raise
            return verdict == b"1\n"

    def start(self) -> None:
        """Start the worker; RuntimeError, with what it said, where it does not come up."""
        self.process = subprocess.Popen(
            # -P: the worker's folder holds modules named like the standard library's (code).
            [sys.executable, "-P", str(WORKER)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        if self.reply(START_SECONDS) != b"ready\n":
            message = self.stop().decode(errors="replace").strip()
            raise RuntimeError(f"math-verify did not start; is math-verify installed? {message[-500:]}")

    def ask(self, question: bytes) -> bytes:
        """The worker's line in reply; empty when it is gone or silent."""
        assert self.process is not None
        try:
            self.process.stdin.write(question)  # type: ignore[union-attr]
            return self.reply(REPLY_SECONDS)
        except BrokenPipeError:
            return b""

    def reply(self, seconds: float) -> bytes:
        """The worker's next line; empty when none came in time."""
        assert self.process is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            return self.process.stdout.readline() if selector.select(seconds) else b""  # type: ignore[union-attr]

    def stop(self) -> bytes:
        """End the worker and its child, if there is one, and return what it said on stderr."""
        process, self.process = self.process, None
        if process is None:
            return b""
        os.killpg(process.pid, 9)
        return process.communicate()[1]


math_verify = MathVerify()


def is_correct(text: str, gold: str) -> bool:
    """Whether the answer in a completion's text equals the reference."""
    answer = short_answer(text)
    if answer is None:
        return False
    answer = answer.rstrip(". ")
    if "".join(answer.split()) == "".join(gold.split()):
        return True
    value = DEGREES_OR_UNIT.sub("", answer.rpartition("=")[2])
    if OPERATION.search(value) and not OPERATION.search(DEGREES_OR_UNIT.sub("", gold)):
        return False
    wanted, found = BASE.search(gold), BASE.search(answer)
    if wanted and found and wanted[1] != found[1]:
        return False
    return math_verify.equal(gold, answer)


def correctness_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1.0 where the answer equals the reference, 0.0 where not, None where there is no reference."""
    golds = ["" if gold is None else str(gold).strip() for gold in answer]
    texts = [completion_text(completion) for completion in completions]
    return [float(is_correct(text, gold)) if gold else None for text, gold in zip(texts, golds, strict=True)]


def boxed_reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    r"""1.0 where the `<answer>` block holds exactly one `\boxed{...}` that is closed and not empty; else 0.0."""
    scores: list[float | None] = []
    for completion in completions:
        boxes = boxed_contents(answer_block(completion_text(completion)) or "")
        scores.append(float(boxes is not None and len(boxes) == 1 and bool(boxes[0])))
    return scores
