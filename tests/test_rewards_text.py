"""The shared reading of answers, and the format rewards."""

import pytest

from rewards.format import format_reward, xml_structure_reward
from rewards.text import answer_block, boxed_contents, completion_text, short_answer

GOOD = "<reasoning>\nTwo lines\nof thought.\n</reasoning>\n<answer>\n72\n</answer>\n"


def test_completions_are_messages_or_strings():
    assert completion_text("text") == "text"
    assert completion_text([{"role": "assistant", "content": "text"}]) == "text"
    assert completion_text([]) == completion_text([{"role": "assistant", "content": None}]) == ""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "72"),
        ("<answer>72</answer>", "72"),
        ("thought\n</reasoning>\n<answer>\n7\n2\n</answer> and more text", "7\n2"),
        ("<reasoning> never closed <answer>72</answer>", "72"),
        ("", None),
        ("72", None),
        ("<answer></answer>", None),
        ("<answer>\n \n</answer>", None),
        ("<answer>72", None),  # cut off
        ("72</answer>", None),
        ("</answer>72<answer>", None),
        ("<answer>71</answer><answer>72</answer>", None),  # repeated
        ("<answer>72</answer></answer>", None),
        ("<answer><answer>72</answer></answer>", None),  # nested
        ("<reasoning><answer>72</answer></reasoning>", None),
        ("<answer><reasoning>x</reasoning>72</answer>", None),
        ("<answer>72</answer><reasoning>afterthought</reasoning>", None),
        ("<reasoning>a</reasoning><reasoning>b</reasoning><answer>72</answer>", None),
        ("<Answer>72</Answer>", None),  # wrong tags
        ("<answer >72</answer>", None),
        ("<ans>72</ans>", None),
        ("＜answer＞72＜/answer＞", None),
    ],
)
def test_answer_block(text, answer):
    assert answer_block(text) == answer


def test_boxes():
    assert boxed_contents(r"a \boxed{ 1 } b \boxed{\frac{1}{2}}") == ["1", r"\frac{1}{2}"]
    assert boxed_contents(r"\boxed{\boxed{1}}") == [r"\boxed{1}"]
    assert boxed_contents("none") == []
    assert boxed_contents(r"\boxed{1") is None


@pytest.mark.parametrize(
    ("block", "answer"),
    [
        (r"\boxed{72}", "72"),
        (r"so \boxed{72}, that is \boxed{72}", "72"),
        (r"\boxed{71} or \boxed{72}", None),
        (r"\boxed{}", None),
        (r"\boxed{72", None),
        ("x" * 501, None),
    ],
)
def test_short_answer(block, answer):
    assert short_answer(f"<answer>{block}</answer>") == answer


@pytest.mark.parametrize(
    ("text", "format_score", "structure_score"),
    [
        (GOOD, 1.0, 1.0),
        ("  <reasoning>a</reasoning><answer>b</answer>", 1.0, 1.0),
        (GOOD + "and so on", 0.0, 1.0 - 0.25 * 9 / 1000),
        (GOOD + "x" * 100_000, 0.0, 0.75),
        ("Well: " + GOOD, 0.0, 1.0),
        (GOOD.replace("</reasoning>", "</reasoning> so"), 0.0, 1.0),
        (GOOD + GOOD, 0.0, 0.0),
        (GOOD.replace("</reasoning>", ""), 0.0, 0.75),
        (GOOD.replace("</answer>", ""), 0.0, 0.75),
        (GOOD.replace("Two", "<answer>Two"), 0.0, 0.75),
        ("<answer>b</answer><reasoning>a</reasoning>", 0.0, 0.5 - 0.25 * 24 / 1000),
        ("</answer><answer></reasoning><reasoning>", 0.0, 0.25 - 0.25 * 31 / 1000),
        ("<reasoning></reasoning><answer>b</answer>", 0.0, 1.0),
        ("<reasoning>a</reasoning><answer> </answer>", 0.0, 1.0),
        ("", 0.0, 0.0),
        ("x" * 100_000, 0.0, 0.0),
        ("</answer>" + "x" * 100_000, 0.0, 0.0),
    ],
)
def test_format_rewards(text, format_score, structure_score):
    assert format_reward([None], [text]) == [format_score]
    assert xml_structure_reward([None], [text]) == [pytest.approx(structure_score)]
