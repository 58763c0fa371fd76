"""A process that compares answers with math-verify, one JSON line in, one out; `rewards.math500` starts and asks it.

math-verify guards itself with signal.alarm, which works in a main thread only and cannot interrupt one long operation
on integers. Here the kernel does it: a child that has used up its CPU seconds dies of SIGPROF, wherever it is, and the
parent says "wrong" in its place and forks the next one, with everything imported.
"""

import json
import logging
import os
import resource
import signal
import sys
from dataclasses import replace

# Only where a request does not say how many.
CPU_SECONDS = 0.8
RELATIVE_ERROR = 1e-6
MEMORY_BYTES = 2**31

# What takes long the first time, when grammars and rules are built: paid here, before a clock runs.
WARM_UP = [
    ("\\frac{1}{2}", "0.5"),
    ("x^2 + 3\\sqrt{5}", "x^2 + 3\\sqrt{5}"),
    ("16\\sqrt{3}", "2"),
    ("(1, 2) \\cup [3, \\infty)", "(1, 2) \\cup [3, \\infty)"),
    ("\\left[ \\frac{\\pi^2}{8}, 2\\pi \\right)", "[0, \\pi]"),
    ("\\left( -\\frac{3}{2}, \\sqrt{3} \\right)", "(3, -1)"),
    ("\\{1 \\pm \\sqrt{5}, -2\\}", "\\{1\\}"),
    ("(a + 5)(b + 2)", "ab + 5b"),
    ("y = 2x + 3", "y = 2x + b"),
    ("4210_{5}", "4210"),
]


def is_equal(gold: str, answer: str) -> bool:
    """Whether math-verify finds the answer equal to the reference; both are LaTeX without a box."""
    from math_verify import LatexExtractionConfig, parse, verify

    plain = LatexExtractionConfig()
    # Its units take the letter off `5t`; ours were taken off before, where they are units.
    config = replace(plain, normalization_config=replace(plain.normalization_config, units=False))
    wanted, found = (
        parse(f"\\boxed{{{text}}}", extraction_config=[config], parsing_timeout=None) for text in (gold, answer)
    )
    return bool(wanted) and bool(found) and bool(verify(wanted, found, timeout_seconds=None))


def mend_math_verify() -> None:
    """Two comparisons of math-verify's, which it looks up in its module, say "equal" too often.

    Equations whose lists of solutions are both empty are equal to it, so all without real roots: here the one must be
    a multiple of the other, or they must have the same solutions, and at least one. And numbers closer than six
    decimals are equal to it: here the error must be small relative to the number.
    """
    from math_verify import grader
    from sympy import Eq, solve
    from sympy import simplify as simplified

    solve_and_compare, numeric = grader.sympy_solve_and_compare, grader.sympy_numeric_eq

    def same_solutions(gold, pred, *precision) -> bool:  # type: ignore[no-untyped-def]
        if isinstance(gold, Eq) and isinstance(pred, Eq):
            factor = simplified((gold.lhs - gold.rhs) / (pred.lhs - pred.rhs))
            if factor.is_number and factor.is_finite and not factor.is_zero:
                return True
        if not all(list(solve(each, each.free_symbols)) for each in (gold, pred)):
            return False
        return bool(solve_and_compare(gold, pred, *precision))

    def close(a, b, *precision) -> bool:  # type: ignore[no-untyped-def]
        if not numeric(a, b, *precision):
            return False
        if getattr(a, "free_symbols", None) or getattr(b, "free_symbols", None):
            return bool(grader.sympy_symbolic_eq(a, b))
        if not hasattr(a, "evalf") or hasattr(a, "shape"):
            return True
        first, second = (complex(each.doit().evalf(20)) for each in (a, b))
        # A percentage equals its number too; which of both is meant is math-verify's to say.
        return any(abs(first * factor - second) <= RELATIVE_ERROR * abs(second) for factor in (1, 100, 0.01))

    grader.sympy_solve_and_compare, grader.sympy_numeric_eq = same_solutions, close


def answer_requests() -> None:
    """Answer requests until the input ends; the clock runs only while one is being worked on."""
    while line := sys.stdin.buffer.raw.readline():  # type: ignore[union-attr]  # there below the buffer
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request.get("seconds", CPU_SECONDS))
        try:
            equal = is_equal(request["gold"], request["answer"])
        except Exception:  # noqa: BLE001 - sympy fails on hostile text in more ways than it documents
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(equal)


def reply(equal: bool) -> None:
    os.write(1, b"1\n" if equal else b"0\n")


def main() -> None:
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mend_math_verify()
    for gold, answer in WARM_UP:
        is_equal(gold, answer)
    os.write(1, b"ready\n")
    while True:
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            answer_requests()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        os.write(1, b"slow\n")


if __name__ == "__main__":
    main()
