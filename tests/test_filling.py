"""`dgrpo fill`: holes between words that stay, on the embedded model."""

import pytest

from dgrpo import SamplerConfig, load_model
from dgrpo.__main__ import main
from dgrpo.evaluation.filling import fill, with_holes
from dgrpo.run.steps import CHECKPOINTS

SUE = "Sue has 3 nuts, buys 12 more and gives away 11. How many nuts are left?"
SOLVED = "<reasoning>\n3+12=15;15-11=4\n</reasoning>\n<answer>\n4\n</answer>\n"


@pytest.fixture(scope="module")
def embedded():
    return load_model(CHECKPOINTS / "gsm8k")


def test_words_around_holes_stay_and_the_right_ones_are_written(embedded):
    prompt = [{"role": "user", "content": SUE}]
    text = SOLVED.replace("3+12", "3+[MASK]").replace("-11=4", "-11=[MASK]")
    [found] = fill(*embedded, text, SamplerConfig(), prompt=prompt, num_views=2)
    assert found[:1] + found[2:] == (SOLVED, 2)
    # Words that the model would not have written stay too.
    [found] = fill(
        *embedded, text.replace("4\n</answer>", "9\n</answer>"), SamplerConfig(), prompt=prompt, num_views=2
    )
    assert found.text.endswith("<answer>\n9\n</answer>\n")


@pytest.mark.slow
def test_the_length_of_a_hole_is_found_by_the_bound(embedded):
    prompt = [{"role": "user", "content": SUE}]
    text = SOLVED.replace("3+12=15;15-11=4", "[MASK]")
    found = fill(*embedded, text, SamplerConfig(), prompt=prompt, lengths=range(8, 14), num_views=32)
    assert len(found) == 6
    assert (found[0].text, found[0].num_tokens) == (SOLVED, 11)
    assert found[0].bound > found[1].bound + 5


def test_holes_are_tokens_and_a_length_is_of_one_hole(embedded):
    _, tokenizer = embedded
    mask = tokenizer.mask_token_id
    three, equals = (tokenizer(word)["input_ids"] for word in ("3", "="))
    assert with_holes(tokenizer, "3[MASK]=") == [*three, mask, *equals]
    assert with_holes(tokenizer, f"3[MASK]{tokenizer.mask_token}=", 3) == [*three, mask, mask, mask, *equals]
    with pytest.raises(ValueError, match="has no hole: write"):
        with_holes(tokenizer, "3=")
    with pytest.raises(ValueError, match="lengths=2: the text has several holes"):
        with_holes(tokenizer, "[MASK]=[MASK]", 2)


@pytest.mark.slow
def test_as_a_command(capsys):
    main(["fill", "--prompt", SUE, SOLVED.replace("15;", "[MASK]"), "--lengths", "1", "2", "--views", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:7] == SOLVED.splitlines()
    assert "nats, 2 tokens" in lines[0]
    for words, error in {
        ("[MASK]3",): "begins with a hole",
        ("3[MASK]", "--model", "embedded-block"): "does not see the words behind a hole",
        ("3[MASK]", "--samples", "2"): "temperature=0.0 fills a text in one way",
    }.items():
        with pytest.raises(SystemExit, match=error):
            main(["fill", *words])
