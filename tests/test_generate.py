"""`dgrpo generate` and `dgrpo chat` as a user runs them, on the embedded model."""

import io
import json
from dataclasses import fields

import pytest
from rich.console import Console

from dgrpo import SamplerConfig, load_model
from dgrpo.__main__ import build_parser, main
from dgrpo.player.chat import chat
from dgrpo.run.steps import CHECKPOINTS

SUE = "Sue has 3 nuts, buys 12 more and gives away 11. How many nuts are left?"
ANN = "Ann has 8 cups, buys 9 more and gives away 3. How many cups are left?"


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(f"{SUE}\n\n{ANN}\n")
    return str(path)


def test_every_setting_of_the_sampler_is_an_argument_with_its_default():
    for command in ("watch", "chat", "generate"):
        given = vars(build_parser().parse_args([command]))
        for each in fields(SamplerConfig):
            if each.name not in ("max_completion_length", "diffusion_steps"):
                assert given[each.name] == each.default, each.name


@pytest.mark.slow
def test_an_output_that_was_cut_off_is_continued_to_the_same(prompts, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    words = ["generate", prompts, "--samples", "3", "--temperature", "1", "--batch_size", "2", "--output"]
    main([*words, str(whole)])
    found = records(whole)
    assert [(each["row"], each["sample"]) for each in found] == [(row, k) for row in range(2) for k in range(3)]
    assert found[3]["prompt"] == [{"role": "user", "content": ANN}]
    assert len({each["completion"] for each in found}) > 2
    with pytest.raises(ValueError, match=r"whole.jsonl' exists: continue it with --resume"):
        main_raw([*words, str(whole)])
    cut.write_text(whole.read_text()[:-200])
    (tmp_path / "cut.jsonl.settings.json").write_text((tmp_path / "whole.jsonl.settings.json").read_text())
    main([*words, str(cut), "--resume"])
    assert cut.read_text() == whole.read_text()
    with pytest.raises(ValueError, match=r"other settings \(sampler\)"):
        main_raw([*words, str(cut), "--resume", "--top_k", "5"])


def main_raw(words):
    """The command without the line that an error becomes."""
    arguments = build_parser().parse_args(words)
    arguments.run(arguments)


def test_json_lines_on_standard_input_give_json_lines_with_their_fields(monkeypatch, capsys):
    chats = [{"id": "a", "messages": [{"role": "user", "content": SUE}, {"role": "assistant", "content": "4"}]}]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(each) + "\n" for each in chats)))
    main(["generate", "--system_prompt", "Be brief."])
    [found] = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["id"] == "a"
    assert found["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SUE}]
    assert found["completion"]
    assert found["num_tokens"] <= 16


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_conversation_is_answered_turn_by_turn(is_terminal, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    model, tokenizer = load_model(str(CHECKPOINTS / "gsm8k"))
    asked: list[list[dict]] = []
    template = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda messages, **kwargs: (
        asked.append([dict(each) for each in messages]) or template(messages, **kwargs)
    )
    lines = iter([SUE, "", ANN, "/new", ANN])

    def ask(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    shown = io.StringIO()
    console = Console(file=shown, width=80, height=40, force_terminal=is_terminal)
    chat(model, tokenizer, SamplerConfig(16, 16, 16), system_prompt="s", console=console, ask=ask)
    assert [[each["role"] for each in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert ("denoising" in shown.getvalue()) == is_terminal
    assert asked[1][2]["content"]
    if not is_terminal:
        assert shown.getvalue().startswith(asked[1][2]["content"])
