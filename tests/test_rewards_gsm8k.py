"""GSM8K's rules, one row for each decision."""

import json
from pathlib import Path

import pytest

from rewards.gsm8k import correctness_reward, integer_reward

DATA = Path(__file__).parent / "data/gsm8k"


def score(block, gold="72", text="<reasoning>\nr\n</reasoning>\n<answer>\n{}\n</answer>"):
    return correctness_reward([None], [text.format(block)], [gold])[0]


@pytest.mark.parametrize(
    ("block", "gold"),
    [
        ("72", "72"),
        ("72.", "72"),
        ("**72**", "72"),
        ("`72`", "72"),
        ("** 72**", "72"),
        ("**72 **", "72"),
        ("**x** = **72**", "72"),
        ("72\u200b", "72"),
        ("72\u00a0dollars", "72"),
        ("€72", "72"),
        ("72 £", "72"),
        ("72°", "72"),
        ("“72”", "72"),
        ("−72", "-72"),
        ("**The answer is 72.**", "72"),
        ("\\(1,234\\)", "1234"),
        ("72,", "72"),
        ("$72", "72"),
        ("\\$72.00", "72"),
        ("72.0", "72"),
        ("+72", "72"),
        ("072", "72"),
        ("72 dollars", "72"),
        ("72%", "72"),
        ("The answer is 72.", "72"),
        ("x = 72", "72"),
        ("\\boxed{72}", "72"),
        ("It is \\boxed{72} after 3 days", "72"),
        ("$\\boxed{\\$1{,}234}$", "1234"),
        ("1,234", "1234"),
        ("1,234,567.50", "1234567.5"),
        ("1\\,234", "1,234"),
        ("-7", "-7"),
        ("$-7", "-7"),
        ("0", "0"),
        ("72", 72),
        ("72", 72.0),
        ("1000", "1,000"),
        ("72", "48/2 = 24 ...\n#### 72"),
        ("0.1", 0.1),
    ],
)
def test_right_answers(block, gold):
    assert score(block, gold) == 1.0


@pytest.mark.parametrize(
    "block",
    [
        "73",
        "-72",
        "72.01",
        "71.9999999999999999999999",
        "7 2",
        "72 or 73",
        "72, 73",
        "72 72",
        "70 + 2",
        "36*2",
        "144/2",
        "- 72",
        "--72",
        "< 72",
        "~72",
        "72^1",
        "7.2e1",
        "0x48",
        "72nd",
        "x72",
        "7_2",
        "7,2",
        "072,000",
        "1,23,456",
        ".72",
        "72.0.0",
        "٧٢",  # Arabic-Indic digits
        "७२",
        "７２",  # full-width digits
        "𝟕𝟐",
        "七十二",
        "⑦②",
        "\u202e27\u202c",  # shown as 72
        "\u200f72",
        "תשובה 72",
        "−72",  # Unicode minus
        "72\u00b2",
        "seventy-two",
        "\\frac{144}{2}",
        "7\\boxed{2}",
        "...",
        "#",
        "nan",
        "inf",
        "1" * 400,
    ],
)
def test_wrong_answers(block):
    assert score(block) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "72",
        "#### 72",
        "\\boxed{72}",
        "<answer>72",
        "<answer>\n72\n</answe",
        "<answer>71</answer><answer>72</answer>",
        "<answer>72</answer><answer>72</answer>",
        "<answer><answer>72</answer></answer>",
        "<reasoning><answer>72</answer></reasoning>",
        "<final>72</final>",
        "Respond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>",
        "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n<reasoning>\nr\n</reasoning>\n<answer>\n72\n</answer>",
        "72 " * 33_000,
        "<answer>" + "72 " * 33_000 + "</answer>",
        "<answer>" * 12_000 + "72",
        "<answer>" + "0" * 100_000 + "72</answer>",
    ],
)
def test_texts_without_one_answer_score_zero(text):
    assert correctness_reward([None], [text], ["72"]) == [0.0]


def test_no_reference_no_score():
    completions = ["<answer>72</answer>"] * 5
    assert correctness_reward([None] * 5, completions, [None, "", "unknown", "nan", "72"]) == [None] * 4 + [1.0]


def test_messages_strings_order_and_length():
    message = [{"role": "assistant", "content": "<answer>1</answer>"}]
    assert correctness_reward(
        prompts=[1, 2], completions=[message, "<answer>1</answer>"], answer=[1, 2], id=[0, 0]
    ) == [
        1.0,
        0.0,
    ]
    with pytest.raises(ValueError, match="zip"):
        correctness_reward([None], [message], [1, 2])


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("72", 1.0),
        ("-3", 1.0),
        ("1,234", 1.0),
        ("\\boxed{5}", 1.0),
        ("7.0", 0.0),
        ("72 dollars", 0.0),
        ("٧٢", 0.0),
        ("12,34", 0.0),
    ],
)
def test_integer_reward(block, expected):
    assert integer_reward([None], [f"<answer>\n{block}\n</answer>"], answer=["0"]) == [expected]
    assert integer_reward([None], [block]) == [0.0]


def test_gold_answers_of_real_rows():
    rows = [
        json.loads(line) for split in ("train", "test") for line in (DATA / f"{split}.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 304
    golds = [row["answer"].rpartition("####")[2].strip() for row in rows]
    reasons = [row["answer"].rpartition("####")[0].strip() for row in rows]
    texts = [
        f"<reasoning>\n{reason}\n</reasoning>\n<answer>\n{gold}\n</answer>"
        for reason, gold in zip(reasons, golds, strict=True)
    ]
    assert correctness_reward(rows, texts, golds) == [1.0] * len(rows)
    assert correctness_reward(rows, texts, [row["answer"] for row in rows]) == [1.0] * len(rows)
    assert integer_reward(rows, texts) == [1.0] * len(rows)
    assert sum(correctness_reward(rows, [f"<answer>{gold}1</answer>" for gold in golds], golds)) == 0


@pytest.mark.parametrize("form", ["%s ✓", "<b>%s</b>", "%s°C"])
def test_check_marks_tags_and_degrees_beside_a_number(form):
    answers = [f"<answer>\n{form % text}\n</answer>" for text in ("16", "17")]
    assert correctness_reward([None] * 2, answers, ["16"] * 2) == [1.0, 0.0]
