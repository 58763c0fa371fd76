"""The embedded default's problems and tokenizer: splits over whole spaces, gold answers, lengths, round trips."""

import operator
import random
import re
from collections import Counter
from functools import cache

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dgrpo.models import load_model
from dgrpo.run.steps import CHECKPOINTS
from dgrpo.tiny import countdown, problems, sudoku
from dgrpo.tiny.build import CORPORA, SEED, in_blocks, orthogonal
from dgrpo.tiny.tokenizer import CHAT_TEMPLATE, FORMAT_TOKENS, build_grid_tokenizer, build_tokenizer

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
GENERATORS = [
    pytest.param(module.__dict__[name], id=f"{module.__name__.rpartition('.')[2]}.{name}")
    for module in (problems, sudoku, countdown)
    for name in ("train_problems", "held_out_problems", "sft_examples")
]


def followed(reasoning: str) -> int:
    """The last result of worked steps that are each right and each start from the result before."""
    results: list[int] = []
    for step in reasoning.split(";"):
        x, sign, y, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step).groups()
        assert SIGNS[sign](int(x), int(y)) == int(result), step
        assert not results or str(results[-1]) in (x, y), reasoning
        results.append(int(result))
    return results[-1]


def value(expression: str) -> int:
    """An expression of non-negative integers, + - * and one level of brackets."""
    while bracket := re.search(r"\((\d+[-+*]\d+)\)", expression):
        expression = expression.replace(bracket[0], str(value(bracket[1])))
    for signs in (r"\*", "[-+]"):
        while match := re.search(rf"(?<![\d-])(-?\d+)({signs})(\d+)|(\d+)({signs})(\d+)", expression):
            x, sign, y = (part for part in match.groups() if part is not None)
            expression = f"{expression[: match.start()]}{SIGNS[sign](int(x), int(y))}{expression[match.end() :]}"
    return int(expression)


@cache
def question_patterns() -> dict[str, re.Pattern]:
    patterns = {}
    for template, (text, _) in problems.TEMPLATES.items():
        operands = re.sub(r"\\{[abc]\\}", r"(\\d+)", re.escape(text))
        patterns[template] = re.compile(re.sub(r"\\{\w+\\}", r"\\w+", operands))
    return patterns


def understood(question: str) -> tuple[str, tuple[int, ...]]:
    """The template and the operands of a word problem, read back from its text."""
    matches = {template: pattern.fullmatch(question) for template, pattern in question_patterns().items()}
    [(template, match)] = [(template, match) for template, match in matches.items() if match]
    return template, tuple(map(int, match.groups()))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(row["question"] for row in problems.train_problems(4000, seed=0))


@pytest.mark.parametrize("generate", GENERATORS)
def test_a_seed_decides_everything_and_the_global_state_nothing(generate):
    random.seed(1)
    state = random.getstate()
    rows = generate(50, seed=3)
    assert random.getstate() == state
    random.seed(2)
    assert generate(50, seed=3) == rows
    assert generate(50, seed=4) != rows
    assert len(rows) == 50


def test_supervised_and_rl_draws_differ_for_the_same_seed():
    prompts = {example["prompt"][0]["content"] for example in problems.sft_examples(200, seed=0)}
    questions = {row["question"] for row in problems.train_problems(200, seed=0)}
    assert len(prompts & questions) < 10


def test_word_problem_split_covers_the_space_without_a_common_pair_or_worked_line():
    train, held_out = problems.operand_split()
    valid, lines = Counter(), ([], [])
    for template in problems.TEMPLATES:
        assert not set(train[template]) & set(held_out[template])
        valid[template] = len(set(train[template]) | set(held_out[template]))
        assert 0.05 < len(held_out[template]) / valid[template] < 0.18
        for part, side in zip((train, held_out), lines, strict=True):
            side.extend(";".join(problems.worked_steps(template, operands)[0]) for operands in part[template])
    # Counted by hand: ordered triples from 2..24 with a + b + c in 0..99, and with a - b - c >= 0.
    assert valid["colours"] == len(problems.OPERANDS) ** 3
    operands = problems.OPERANDS
    assert valid["take"] == sum(a - b - c >= 0 for a in operands for b in operands for c in operands)
    train_lines, held_out_lines = map(set, lines)
    assert not train_lines & held_out_lines
    shown = Counter(step for line in train_lines for step in line.split(";"))
    assert min(shown[step] for line in held_out_lines for step in line.split(";")) >= problems.MIN_TRAINING_LINES


def test_drawn_word_problems_stay_on_their_side():
    train, held_out = problems.operand_split()
    held_out_pairs = {(template, operands) for template in held_out for operands in held_out[template]}
    rl = {understood(row["question"]) for row in problems.train_problems(20000, seed=0)}
    sft = {understood(example["prompt"][0]["content"]) for example in problems.sft_examples(20000, seed=0)}
    assert not (rl | sft) & held_out_pairs
    rows = problems.held_out_problems(512, seed=0)
    _, operand_lists = problems.operand_split()
    pairs = {understood(row["question"]) for row in rows}
    assert pairs <= held_out_pairs
    assert len(pairs) == 512
    counts = Counter(template for template, _ in pairs)
    assert all(counts[name] in (max(counts.values()), len(operand_lists[name])) for name in problems.TEMPLATES)
    assert pairs == {(row["template"], tuple(row["operands"])) for row in rows}
    shown = {step for row in problems.train_problems(64000, seed=0) for step in row["reasoning"].split(";")}
    assert {step for row in rows for step in row["reasoning"].split(";")} <= shown


def test_more_held_out_problems_than_exist_are_refused():
    _, held_out = problems.operand_split()
    size = sum(map(len, held_out.values()))
    assert len({row["question"] for row in problems.held_out_problems(size, seed=0)}) > 0.9 * size
    with pytest.raises(ValueError, match=f"num_problems is {size + 1}, but only {size}"):
        problems.held_out_problems(size + 1, seed=0)
    with pytest.raises(ValueError, match="num_problems is 2000, but only 1307"):
        countdown.held_out_problems(2000, seed=0)


@pytest.mark.parametrize(
    ("template", "operands", "gold"),
    [
        ("buy_give", (9, 4, 3), 10),
        ("lose_find", (9, 4, 3), 8),
        ("give_sell", (9, 4, 3), 2),
        ("colours", (9, 4, 3), 16),
        ("pool", (9, 4, 3), 10),
        ("compare", (9, 4, 3), 8),
        ("take", (9, 4, 3), 2),
        ("start", (4, 9, 3), 8),
    ],
)
def test_template_means_what_a_reader_computes(template, operands, gold):
    steps, result = problems.worked_steps(template, operands)
    assert result == followed(";".join(steps)) == gold


def test_impossible_word_problems_are_outside_the_space():
    train, held_out = problems.operand_split()
    # Three left after buying nine and losing four; losing more than there is.
    for template, operands in (("start", (9, 4, 3)), ("lose_find", (4, 9, 8)), ("take", (9, 4, 6))):
        assert problems.worked_steps(template, operands)[1] == -1
        assert operands not in train[template] + held_out[template]


@pytest.mark.parametrize("draw", [problems.train_problems, problems.held_out_problems])
def test_word_problem_rows_read_like_gsm8k_and_their_steps_are_right(draw):
    for row in draw(700, seed=5):
        answer = int(row["answer"].split("#### ")[1])
        assert followed(row["reasoning"]) == answer
        assert answer in range(100)
        # Every number a question mentions is an operand, in the order a, b, c, and the steps use each once.
        assert list(map(int, re.findall(r"\d+", row["question"]))) == row["operands"]
        assert max(row["operands"]) <= 24
        assert re.findall(r"<<(.*?)>>", row["answer"]) == row["reasoning"].split(";")
        assert "{" not in row["question"]


def test_supervised_completions_reason_in_the_asked_share_and_guess_around_the_truth():
    examples = problems.sft_examples(20000, seed=1)
    texts = [example["completion"][0]["content"] for example in examples]
    reasons = [text for text in texts if text.startswith("<reasoning>\n")]
    assert abs(len(reasons) / len(texts) - 0.48) < 0.015
    for text in reasons:
        worked, answer = re.fullmatch(r"<reasoning>\n(.*)\n</reasoning>\n<answer>\n(\d+)\n</answer>\n", text).groups()
        assert followed(worked) == int(answer)

    errors = Counter()
    for example in problems.sft_examples(30000, seed=1, reasoning_share=0.0):
        truth = problems.worked_steps(*understood(example["prompt"][0]["content"]))[1]
        guess = int(re.fullmatch(r"<answer>\n(\d+)\n</answer>\n", example["completion"][0]["content"])[1])
        assert guess >= 0
        if truth >= 3:
            errors[guess - truth] += 1
        else:
            assert guess <= truth + 3
    assert set(errors) == set(range(-3, 4))
    assert all(abs(count / errors.total() - 1 / 7) < 0.01 for count in errors.values())


def test_prompts_come_from_the_given_builder():
    def builder(question: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": "Answer."}, {"role": "user", "content": question}]

    for module in (problems, sudoku, countdown):
        plain, built = module.sft_examples(20, seed=0), module.sft_examples(20, seed=0, prompt_builder=builder)
        assert [row["prompt"] for row in built] == [builder(row["prompt"][0]["content"]) for row in plain]
        assert [row["completion"] for row in built] == [row["completion"] for row in plain]


def test_tokenizer_prompts_and_completions_are_short_and_round_trip(tokenizer):
    examples = problems.sft_examples(5000, seed=0, reasoning_share=0.7)
    prompts = [example["prompt"] for example in examples]
    texts = [example["completion"][0]["content"] for example in examples]
    prompt_ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
    completion_ids = tokenizer(texts)["input_ids"]
    assert max(map(len, prompt_ids)) <= 26
    assert max(len(ids) + 1 for ids in completion_ids) == 16
    assert tokenizer.batch_decode(completion_ids, skip_special_tokens=True) == texts
    whole = tokenizer.apply_chat_template([row["prompt"] + row["completion"] for row in examples])["input_ids"]
    eos = [tokenizer.eos_token_id]
    assert whole == [prompt + ids + eos for prompt, ids in zip(prompt_ids, completion_ids, strict=True)]


def test_numbers_up_to_99_are_one_token_wherever_they_stand(tokenizer):
    reasoning = [
        "<reasoning>\n",
        "8",
        "+",
        "2",
        "=",
        "10",
        ";",
        "10",
        "-",
        "3",
        "=",
        "7",
        "\n</reasoning>\n<answer>\n",
        "7",
        "\n</answer>\n",
    ]
    assert tokenizer.tokenize("".join(reasoning)) == reasoning
    for number in range(100):
        ids = {
            tuple(i for i in tokenizer(text)["input_ids"] if tokenizer.decode([i]).strip().isdigit())
            for text in (
                f"{number}",
                f"has {number} pens",
                f"\n{number}\n",
                f"+{number}=",
                f"x{number},",
                f"({number})",
            )
        }
        assert ids == {(tokenizer.convert_tokens_to_ids(str(number)),)}
    spaced = [tokenizer.decode([i]) for i in tokenizer("Tom has 8 pens and 10 cups")["input_ids"]]
    assert spaced == ["Tom", " has ", "8", " pens", " and ", "10", " cups"]
    assert tokenizer.tokenize("135") == ["13", "5"]
    assert tokenizer.tokenize("12007") == ["12", "0", "0", "7"]


def test_any_text_round_trips(tokenizer):
    rng = random.Random(0)
    alphabet = [
        *map(chr, range(0x250)),
        *" \n\t0123456789<>|/",
        "\u3042",
        "\u65e5",
        "\u0663",
        "\U0001f642",
        "\u200d",
        "e\u0301",
    ]
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(2000)]
    pieces = [*FORMAT_TOKENS, " 135 ", "don't ,", "</reasoning>", "<answer>", " .", "  "]
    texts += ["".join(rng.choices(pieces, k=6)) for _ in range(500)]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_only_control_tokens_are_special_and_fall_out_of_decoded_text(tokenizer):
    special = [
        tokenizer.pad_token,
        tokenizer.eos_token,
        tokenizer.mask_token,
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
    ]
    assert sorted(tokenizer.all_special_tokens) == sorted(special)
    assert len(set(tokenizer.convert_tokens_to_ids(special))) == 6
    text = "<answer>\n7\n</answer>\n"
    for token in special:
        ids = tokenizer(f"{token}{text}{token} 8{token}")["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"{text} 8"
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_tokenizer_is_reproducible_and_loads_as_saved(tokenizer, tmp_path):
    again = build_tokenizer(row["question"] for row in problems.train_problems(4000, seed=0))
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    tokenizer.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 150_000
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    same = ["pad_token_id", "eos_token_id", "mask_token_id", "all_special_tokens"]
    same += ["padding_side", "chat_template", "model_input_names", "clean_up_tokenization_spaces"]
    assert [getattr(loaded, name) for name in same] == [getattr(tokenizer, name) for name in same]
    for example in problems.sft_examples(300, seed=2):
        messages = example["prompt"] + example["completion"]
        ids = tokenizer.apply_chat_template(messages)["input_ids"]
        assert loaded.apply_chat_template(messages)["input_ids"] == ids
        for skip in (True, False):
            decoded = loaded.decode(ids, skip_special_tokens=skip)
            assert decoded == tokenizer.decode(ids, skip_special_tokens=skip)


def test_sudoku_split_has_all_288_grids_and_puzzles_have_one_solution():
    train, held_out = sudoku.grid_split()
    assert (len(train), len(held_out), len({*train, *held_out})) == (240, 48, 288)
    units = [[4 * i + j for j in range(4)] for i in range(4)] + [[i + 4 * j for j in range(4)] for i in range(4)]
    units += [[corner, corner + 1, corner + 4, corner + 5] for corner in (0, 2, 8, 10)]
    for grid in train + held_out:
        assert all({grid[cell] for cell in unit} == set("1234") for unit in units)
    for draw, grids in ((sudoku.train_problems, train), (sudoku.held_out_problems, held_out)):
        rows = draw(600, seed=0)
        for row in rows:
            agreeing = [
                grid
                for grid in train + held_out
                if all(given in ("0", digit) for given, digit in zip(row["Puzzle"], grid, strict=True))
            ]
            assert agreeing == [row["Solution"]]
            assert row["Solution"] in grids
        assert {row["Puzzle"].count("0") for row in rows} == {6, 7, 8}
    assert len({row["Puzzle"] for row in sudoku.held_out_problems(2000, seed=0)}) == 2000
    assert sudoku.num_solutions("0" * 16) == 288
    assert sudoku.num_solutions("11" + "0" * 14) == 0


def test_sudoku_supervised_answers_are_training_grids():
    train, _ = sudoku.grid_split()
    blanks = {example["prompt"][0]["content"].count("0") for example in sudoku.sft_examples(300, seed=0)}
    assert blanks == set(range(6, 11))
    for example in sudoku.sft_examples(300, seed=0):
        puzzle, answer = example["prompt"][0]["content"], example["completion"][0]["content"]
        solution = re.fullmatch(r"<answer>\n([1-4]{16})\n</answer>\n", answer)[1]
        assert solution in train
        assert all(given in ("0", digit) for given, digit in zip(puzzle, solution, strict=True))


def test_the_grid_tokenizer_reads_one_cell_a_token_and_keeps_the_format():
    grids = build_grid_tokenizer()
    row = sudoku.train_problems(1, seed=0)[0]
    example = problems.sft_example(problems.user_message(row["Puzzle"]), row["Solution"])
    assert grids.tokenize(row["Puzzle"]) == list(row["Puzzle"])
    assert len(grids.apply_chat_template(example["prompt"], add_generation_prompt=True)["input_ids"]) == 18
    ids = grids.apply_chat_template(example["prompt"] + example["completion"])["input_ids"]
    # The canvas of the recipe: the two tags, 16 cells, the end.
    assert len(ids) - 18 == 19
    assert ids[-1] == grids.eos_token_id
    assert grids.decode(ids[18:], skip_special_tokens=True) == example["completion"][0]["content"]
    assert grids.tokenize("9 é") == ["9", "<|unknown|>", "<|unknown|>"]
    assert sorted(grids.get_vocab().values()) == list(range(len(grids)))


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_block", "sudoku", "countdown"])
def test_the_checkpoints_were_made_with_the_tokenizer_of_today(name):
    corpus = CORPORA[name]
    questions = [row["prompt"][0]["content"] for row in corpus.examples(corpus.num_examples, SEED)]
    stored = AutoTokenizer.from_pretrained(CHECKPOINTS / name, local_files_only=True)
    assert stored.backend_tokenizer.to_str() == corpus.tokenizer(questions[:4000]).backend_tokenizer.to_str()
    assert stored.chat_template == CHAT_TEMPLATE
    text = problems.completion_text("1")
    longest = max(len(stored(row["completion"][0]["content"])["input_ids"]) for row in corpus.examples(2000, SEED))
    assert longest + 1 == (corpus.completion_canvas or 16)  # a block model learns its end where a block is filled
    assert stored.decode(stored(text)["input_ids"]) == text


def test_the_block_model_reads_as_a_llada_of_the_same_weights_and_loads_with_its_blocks():
    base, tokenizer = load_model(str(CHECKPOINTS / "gsm8k"))
    ids = torch.randint(len(tokenizer), (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # One block that holds the whole text is full attention.
        torch.testing.assert_close(in_blocks(base, 24)(input_ids=ids).logits, base(input_ids=ids).logits)
    model, _ = load_model(str(CHECKPOINTS / "gsm8k_block"))
    assert model.block_length == CORPORA["gsm8k_block"].block_length == 4


def test_newton_schulz_brings_singular_values_near_one_and_keeps_their_vectors():
    matrices = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    for given in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonal(given))
        assert values.min() > 0.5
        assert values.max() < 1.3
        # With given = U S V' and its image U T V', the product U S T U' is symmetric.
        symmetric = given @ orthogonal(given).mT
        torch.testing.assert_close(symmetric, symmetric.mT, atol=1e-3, rtol=1e-3)


def test_countdown_gold_is_right_over_the_whole_space_and_the_split_covers_it():
    gold = countdown.gold_solutions()
    for problem, solution in gold.items():
        assert value(solution.expression) == problem.target == followed(solution.reasoning)
        assert sorted(map(int, re.findall(r"\d+", solution.expression))) == list(problem.numbers)
        assert problem.target in range(100)
        assert max(map(int, re.findall(r"\d+", solution.reasoning))) <= 99
    train, held_out = countdown.problem_split()
    assert not set(train) & set(held_out)
    assert {*train, *held_out} == set(gold)
    assert len(train) + len(held_out) == len(gold)


def test_countdown_draws_stay_on_their_side_and_examples_show_the_gold():
    train, held_out = map(set, countdown.problem_split())
    for row in countdown.train_problems(3000, seed=0):
        assert (tuple(sorted(row["numbers"])), row["target"]) in train
    rows = countdown.held_out_problems(1000, seed=0)
    problems_drawn = {(tuple(sorted(row["numbers"])), row["target"]) for row in rows}
    assert problems_drawn <= held_out
    assert len(problems_drawn) == 1000
    assert any(row["numbers"] != sorted(row["numbers"]) for row in rows)
    row = {"numbers": [8, 4, 5], "target": 12}
    assert countdown.question(row) == "Numbers: [8, 4, 5]\nTarget: 12"
    for example in countdown.sft_examples(500, seed=0):
        numbers, target = re.fullmatch(r"Numbers: \[(.*)\]\nTarget: (\d+)", example["prompt"][0]["content"]).groups()
        text = example["completion"][0]["content"]
        worked, answer = re.fullmatch(r"<reasoning>\n(.*)\n</reasoning>\n<answer>\n(.*)\n</answer>\n", text).groups()
        assert followed(worked) == value(answer) == int(target)
        assert sorted(re.findall(r"\d+", answer)) == sorted(numbers.split(", "))
    plain = countdown.sft_examples(50, seed=0, reasoning_share=0.0)
    assert all(example["completion"][0]["content"].startswith("<answer>\n") for example in plain)
