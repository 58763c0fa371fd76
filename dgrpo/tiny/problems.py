"""GSM8K-like word problems of two steps: rows for training and evaluation, completions for supervised fine-tuning.

Every problem is a template and three operands. The split into training and held-out is made once over that whole
space, by the line of worked steps: a held-out line such as `8+2=10;10-3=7` occurs in no training problem of any
template. Its single operations do occur, so a held-out problem asks for a new combination of known operations.
"""

import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import product, zip_longest
from operator import add, sub
from typing import Any, NamedTuple

from dgrpo.noise import fixed_order

Messages = list[dict[str, str]]
Operands = tuple[int, ...]

NAMES = [
    "Tom",
    "Ann",
    "Ben",
    "Eva",
    "Max",
    "Mia",
    "Sam",
    "Zoe",
    "Leo",
    "Ida",
    "Jon",
    "Kim",
    "Ned",
    "Liz",
    "Roy",
    "Sue",
]
ITEMS = ["apples", "pears", "plums", "nuts", "cups", "pens", "books", "cards", "coins", "shells", "stamps", "beads"]
OPERANDS = range(2, 13)
RESULTS = range(100)
HELD_OUT_SHARE = 0.15
# Every operation of a held-out problem occurs in at least this many training lines: rare ones (48+24) stay there.
MIN_TRAINING_LINES = 8


class Template(NamedTuple):
    """A question and its plan: `c+b-a` means first c+b, then minus a."""

    question: str
    plan: str


TEMPLATES = {
    "buy_give": Template(
        "{name} has {a} {items}, buys {b} more and gives away {c}. How many {items} are left?", "a+b-c"
    ),
    "lose_find": Template(
        "{name} has {a} {items}, loses {b} and then finds {c}. How many {items} are there now?", "a-b+c"
    ),
    "give_sell": Template(
        "{name} has {a} {items}, gives {b} to {other} and sells {c}. How many {items} are left?", "a-b-c"
    ),
    "colours": Template(
        "{name} buys {a} red, {b} blue and {c} green {items}. How many {items} are there in all?", "a+b+c"
    ),
    "pool": Template(
        "{name} has {a} {items} and {other} has {b}. They sell {c} of them. How many {items} are left?", "a+b-c"
    ),
    "compare": Template(
        "{name} has {a} {items}, {b} more than {other}. Then {other} buys {c}. How many has {other} now?", "a-b+c"
    ),
    "take": Template(
        "A box has {a} {items}. {name} takes {b} and {other} takes {c}. How many {items} are left?", "a-b-c"
    ),
    "start": Template(
        "{name} buys {a} {items}, loses {b} and now has {c}. How many {items} were there at first?", "c+b-a"
    ),
}
OPERATIONS = {"+": add, "-": sub}


def user_message(question: str) -> Messages:
    """The bare question as the only message: the prompt of the embedded default."""
    return [{"role": "user", "content": question}]


def completion_text(answer: str, reasoning: str | None = None) -> str:
    """A completion in d1's format (arXiv:2504.12216), with or without the reasoning block."""
    worked = "" if reasoning is None else f"<reasoning>\n{reasoning}\n</reasoning>\n"
    return f"{worked}<answer>\n{answer}\n</answer>\n"


def sft_example(prompt: Messages, answer: str, reasoning: str | None = None) -> dict[str, Messages]:
    """One supervised row in conversational format: `prompt` and `completion`."""
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": completion_text(answer, reasoning)}]}


def worked_steps(template: str, operands: Operands) -> tuple[tuple[str, str], int]:
    """The two steps, `("8+2=10", "10-3=7")`, and the result. The result is -1 when a step leaves 0..99."""
    first, sign, second, next_sign, third = tuple(TEMPLATES[template].plan)
    values = dict(zip("abc", operands, strict=True))
    middle = OPERATIONS[sign](values[first], values[second])
    result = OPERATIONS[next_sign](middle, values[third])
    steps = (f"{values[first]}{sign}{values[second]}={middle}", f"{middle}{next_sign}{values[third]}={result}")
    return steps, result if middle in RESULTS and result in RESULTS else -1


@cache
def operand_split() -> tuple[dict[str, list[Operands]], dict[str, list[Operands]]]:
    """Operands of every training and every held-out problem by template: the whole space, no worked line in both."""
    space: dict[tuple[str, Operands], tuple[str, str]] = {}
    for template, operands in product(TEMPLATES, product(OPERANDS, repeat=3)):
        steps, result = worked_steps(template, operands)
        if result >= 0:
            space[template, operands] = steps
    lines = sorted(set(space.values()), key=lambda steps: fixed_order(";".join(steps)))
    training_lines = Counter(step for steps in lines for step in steps)
    held_out_lines = set()
    for steps in lines[: round(HELD_OUT_SHARE * len(lines))]:
        if all(training_lines[step] > MIN_TRAINING_LINES for step in steps):
            held_out_lines.add(steps)
            training_lines.subtract(steps)
    train: dict[str, list[Operands]] = {template: [] for template in TEMPLATES}
    held_out: dict[str, list[Operands]] = {template: [] for template in TEMPLATES}
    for (template, operands), steps in space.items():
        (held_out if steps in held_out_lines else train)[template].append(operands)
    return train, held_out


def _row(rng: random.Random, template: str, operands: Operands) -> dict[str, Any]:
    name, other = rng.sample(NAMES, 2)
    slots = dict(zip("abc", operands, strict=True))
    steps, result = worked_steps(template, operands)
    worked = "\n".join(f"{step.split('=')[0]}=<<{step}>>{step.split('=')[1]}" for step in steps)
    return {
        "question": TEMPLATES[template].question.format(name=name, other=other, items=rng.choice(ITEMS), **slots),
        "answer": f"{worked}\n#### {result}",
        "reasoning": ";".join(steps),
        "template": template,
        "operands": list(operands),
    }


def _draw(rng: random.Random) -> dict[str, Any]:
    train, _ = operand_split()
    template = rng.choice(list(TEMPLATES))
    return _row(rng, template, rng.choice(train[template]))


def train_problems(num_problems: int, seed: int) -> list[dict[str, Any]]:
    """Problems drawn with replacement from the training part of the space; templates are equally likely.

    Rows carry GSM8K's `question` and `answer` (worked steps, then `#### N`), and `reasoning`, `template`, `operands`.
    """
    rng = random.Random(f"train {seed}")
    return [_draw(rng) for _ in range(num_problems)]


def held_out_problems(num_problems: int, seed: int) -> list[dict[str, Any]]:
    """Held-out problems, no two with the same template and operands; templates in equal shares while they last."""
    rng = random.Random(f"held out {seed}")
    _, held_out = operand_split()
    columns = [
        [(template, triple) for triple in rng.sample(triples, len(triples))] for template, triples in held_out.items()
    ]
    problems = [problem for tier in zip_longest(*columns) for problem in tier if problem is not None]
    if num_problems > len(problems):
        raise ValueError(
            f"num_problems is {num_problems}, but only {len(problems)} held-out problems exist: ask for fewer"
        )
    return [_row(rng, *problem) for problem in rng.sample(problems[:num_problems], num_problems)]


def sft_examples(
    num_examples: int,
    seed: int,
    *,
    reasoning_share: float = 0.48,
    careless_error: int = 3,
    prompt_builder: Callable[[str], Messages] = user_message,
) -> list[dict[str, Messages]]:
    """Supervised rows on training problems: a share of worked and right completions, the others careless guesses.

    A careless completion has no reasoning and answers truth + U{-careless_error..careless_error}, at least 0. The
    corpus is designed so that a model fitted to it can reason but mostly guesses.
    """
    rng = random.Random(f"sft {seed}")
    examples = []
    for _ in range(num_examples):
        problem = _draw(rng)
        prompt = prompt_builder(problem["question"])
        answer = int(problem["answer"].rpartition("#### ")[2])
        if rng.random() < reasoning_share:
            examples.append(sft_example(prompt, str(answer), problem["reasoning"]))
        else:
            examples.append(sft_example(prompt, str(max(0, answer + rng.randint(-careless_error, careless_error)))))
    return examples


def preferences(num_examples: int, seed: int) -> list[dict[str, Messages]]:
    """Pairs on training problems: worked and right is chosen, a careless guess without reasoning is rejected."""
    rng = random.Random(f"preferences {seed}")
    pairs = []
    for _ in range(num_examples):
        problem = _draw(rng)
        prompt, answer = user_message(problem["question"]), int(problem["answer"].rpartition("#### ")[2])
        worked = sft_example(prompt, str(answer), problem["reasoning"])
        guessed = sft_example(prompt, str(max(0, answer + rng.randint(-3, 3))))
        pairs.append({"prompt": prompt, "chosen": worked["completion"], "rejected": guessed["completion"]})
    return pairs
