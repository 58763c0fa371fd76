"""Grades what LLaDA-8B-Instruct wrote as d1 published it (length 128, 64 steps), and compares with what is documented.

    python benchmarks/published_texts.py llada_8b_instruct_generations

The folder is that of https://github.com/dllm-reasoning/d1; `tests/data/d1` holds a sample of it. Prints the accuracies
by both protocols and the classes of texts on which they differ, and exits with 1 where a number is not that of
`docs/evaluation.md`.
"""

import re
import sys
from pathlib import Path

from dgrpo.evaluation.disagreement import disagreements
from dgrpo.evaluation.stored import grade_files

PAGE = Path(__file__).parents[1] / "docs/evaluation.md"


def documented_accuracies() -> dict[str, list[str]]:
    """Per cent by task, in the order GSM8K, MATH500, Countdown, Sudoku, of each protocol."""
    rows = re.findall(r"^\| `(d1|strict)` \|(.*% of.*)$", PAGE.read_text(), re.M)
    return {protocol: re.findall(r"([\d.]+) % of", row) for protocol, row in rows}


def documented_classes() -> dict[str, list[int]]:
    """How many texts each class of disagreement holds, by task."""
    sections = [section.partition("**") for section in PAGE.read_text().split("\n**")[1:]]
    return {task.lower(): sorted(map(int, re.findall(r"^\| (\d+) \|", text, re.M))) for task, _, text in sections}


def main(folder: Path) -> int:
    accuracies, classes, wrong = documented_accuracies(), documented_classes(), 0
    for index, task in enumerate(("gsm8k", "math500", "countdown", "sudoku")):
        files = sorted(folder.glob(f"{task}_instruct_*_generations.json"))
        for protocol, expected in accuracies.items():
            report = grade_files(files, protocol=protocol)
            found = f"{100 * report.accuracy:.2f}"
            wrong += found != expected[index]
            print(f"{task:10} {protocol:7} {found:>6} % of {report.n}; documented: {expected[index]} %")
        [differing] = disagreements(files).values()
        wrong += sorted(map(len, differing.values())) != classes[task]
        print(f"{task:10} differ  {sorted(map(len, differing.values()))}; documented: {classes[task]}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
