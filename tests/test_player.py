"""The player: what it shows of a rollout at each step, in the terminal, as a page and as an image."""

import io
from dataclasses import fields, replace

import pytest
import torch
from headless_chromium import EXECUTABLE, Chromium
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from dgrpo.evaluation.answers import encode_prompts
from dgrpo.models import load_model
from dgrpo.player.export import load_rollout, save_rollout, write_gif, write_html
from dgrpo.player.frames import LINE_END, Frame, Token, block_length_of, frames, prompt_text, token_texts
from dgrpo.player.live import LiveCanvas
from dgrpo.player.terminal import HIDDEN, canvas_lines, play, render, window
from dgrpo.run.steps import CHECKPOINTS
from dgrpo.sampling import Rollout, SamplerConfig, generate
from dgrpo.sampling.rollout import completion_mask_of
from dgrpo.text import printable
from dgrpo.tiny.tokenizer import build_tokenizer

PROMPT = "Ann has 3 red pens and buys 4 more. How many pens does she have?"
ANSWER = "<reasoning>\n3 + 4 = 7 pens for Ann\n</reasoning>\n<answer>\n7\n</answer>\n"
LENGTH, BLOCK = 48, 8
REMASKING = {"sampler_policy": "dgrpo.policies.remasking:remdm_cap", "sampler_policy_kwargs": {"eta": 0.3}}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([PROMPT, ANSWER])


def rollout_of(tokenizer, texts, seed=0) -> Rollout:
    """Rollouts of the given completions, each block committed in a random order until one holds EOS."""
    generator = torch.Generator().manual_seed(seed)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * LENGTH for text in texts]
    completion_ids = torch.tensor([row[:LENGTH] for row in ids])
    completion_mask = completion_mask_of(completion_ids, torch.tensor([tokenizer.eos_token_id]))
    order = [torch.randperm(BLOCK, generator=generator) + BLOCK * b for _ in texts for b in range(LENGTH // BLOCK)]
    denoised = -(-completion_mask.sum(1) // BLOCK) * BLOCK
    revealed_at = torch.cat(order).view(len(texts), LENGTH)
    revealed_at[torch.arange(LENGTH) >= denoised[:, None]] = LENGTH
    confidence = torch.rand(len(texts), LENGTH, generator=generator) * (revealed_at < LENGTH)
    return Rollout(
        prompt_ids=torch.tensor([[tokenizer.pad_token_id] * 2 + prompt] * len(texts)),
        prompt_mask=torch.tensor([[False] * 2 + [True] * len(prompt)] * len(texts)),
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        revealed_at=revealed_at,
        confidence=confidence,
        entropy=1 - confidence,
        group=torch.zeros(len(texts), dtype=torch.long),
        num_forwards=LENGTH,
        num_steps=LENGTH,
    )


@pytest.fixture(scope="module")
def rollout(tokenizer):
    return rollout_of(tokenizer, [ANSWER, "<answer>\n8\n</answer>\n"])


def test_token_texts_join_to_the_decoded_text(tokenizer):
    # Three bytes of one character are three tokens here; the character belongs to the last.
    text = "caf\u00e9 \u20ac 12\n\n" + ANSWER
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "\u20ac" in texts
    cut = tokenizer("\u20ac")["input_ids"][:-1]
    assert "".join(token_texts(tokenizer, cut)) == "\ufffd"


@pytest.mark.parametrize(
    ("checkpoint", "block_length", "settings"),
    [("gsm8k", 8, {}), ("gsm8k_block", None, {}), ("gsm8k", 16, REMASKING)],
)
def test_what_is_drawn_while_sampling_is_what_is_replayed(checkpoint, block_length, settings, monkeypatch):
    model, tokenizer = load_model(str(CHECKPOINTS / checkpoint))
    chat = [{"role": "user", "content": "Sue has 3 nuts, buys 12 more and gives away 11. How many nuts are left?"}]
    prompt_ids, prompt_mask = encode_prompts(tokenizer, [chat], torch.device("cpu"))
    config = SamplerConfig(16, block_length, 16, temperature=1.0, **settings)
    drawn: list[Frame] = []
    monkeypatch.setattr(LiveCanvas, "_show", lambda self, frame: drawn.append(frame))
    with LiveCanvas(tokenizer, Console(file=io.StringIO()), 1e9) as canvas:
        keys = torch.tensor([3])
        rollout = generate(model, prompt_ids, prompt_mask, config, row_keys=keys, on_step=canvas)
    replayed = {shot.step: shot for shot in frames(rollout, tokenizer) if shot.step >= 0}
    length = max(replayed.items())[1].length
    live = {shot.step: shot for shot in drawn}
    assert replayed.keys() <= live.keys()
    assert drawn[-1].length == length
    assert any(shot.rehidden for shot in drawn) == bool(settings)
    for step, shot in replayed.items():
        assert {place for place in live[step].rehidden if place < length} == shot.rehidden
        for then, now in zip(shot.tokens[:length], live[step].tokens[:length], strict=True):
            assert (then and (then.text, then.step, then.earlier)) == (now and (now.text, now.step, now.earlier))
    assert torch.equal(rollout.history, generate(model, prompt_ids, prompt_mask, config, row_keys=keys).history)


def test_frames_follow_the_order_of_commitment(rollout, tokenizer):
    for row in range(2):
        shots = frames(rollout, tokenizer, row)
        revealed_at = rollout.revealed_at[row]
        steps = sorted({step for step in revealed_at.tolist() if step < LENGTH})
        assert [shot.step for shot in shots] == [-1, *steps]
        for shot in shots:
            assert [token is not None for token in shot.tokens] == (revealed_at <= shot.step).tolist()
            fresh = [position for position in range(LENGTH) if shot.fresh(position)]
            assert fresh == (revealed_at == shot.step).nonzero().flatten().tolist()
            if fresh:
                assert shot.block == fresh[0] // BLOCK
        last = shots[-1]
        assert last.length == rollout.completion_mask[row].sum()
        said = "".join(token.text for token in last.tokens[: last.length])
        assert said == tokenizer.decode(rollout.completion_ids[row][rollout.completion_mask[row]])


def test_frames_tell_nothing_of_what_comes(rollout, tokenizer):
    """Until its commitment, neither a token's length nor the end of the completion can be seen."""
    other = rollout_of(tokenizer, ["<answer>\n8\n</answer>\n", ANSWER])
    first, second = (frames(each, tokenizer, 0)[0] for each in (rollout, other))
    assert canvas_lines(first, 40) == canvas_lines(second, 40)
    assert first.length == LENGTH
    for shot in frames(rollout, tokenizer, 0):
        end = int(rollout.completion_mask[0].sum()) - 1
        assert shot.length == (end + 1 if rollout.revealed_at[0, end] <= shot.step else LENGTH)
        drawn_ = {position: char for line in canvas_lines(shot, 40) for position, char in line}
        hidden = [position for position in range(shot.length) if shot.tokens[position] is None]
        assert all(drawn_[position] == HIDDEN for position in hidden)


def test_given_tokens_are_there_from_the_start(rollout, tokenizer):
    given = rollout.revealed_at.clone()
    given[0, 3] = -1
    first = frames(replace(rollout, revealed_at=given, history=None), tokenizer, 0)[0]
    assert [token is not None for token in first.tokens] == [position == 3 for position in range(LENGTH)]


def test_frames_show_what_was_hidden_again_and_what_was_overwritten(rollout, tokenizer):
    hidden, changed = (rollout.revealed_at[0, :BLOCK] >= 5).nonzero().flatten().tolist()[:2]
    first, other = tokenizer("7 9")["input_ids"][::2]
    again = torch.tensor([[1, hidden, first], [3, hidden, -1], [4, changed, other]])
    history = torch.cat([rollout.history[:1], again[None]], 1)
    late = torch.where(history[..., 0] < 0, LENGTH, history[..., 0]).argsort(stable=True)
    history = history.gather(1, late[..., None].expand_as(history))
    revised = replace(rollout.rows([0]), history=history)
    shots = {shot.step: shot for shot in frames(revised, tokenizer)}
    plain_shots = {shot.step: shot for shot in frames(rollout, tokenizer)}
    assert set(shots) == set(plain_shots)
    for step, shot in shots.items():
        texts = [token and token.text for token in shot.tokens]
        expected = [token and token.text for token in plain_shots[step].tokens]
        if 1 <= step < 3:
            expected[hidden] = "7"
        if 4 <= step < rollout.revealed_at[0, changed]:
            expected[changed] = "9"
        assert texts == expected
        assert shot.rehidden == ({hidden} if step == 3 else set())
    last = list(shots.values())[-1]
    assert (last.tokens[hidden].earlier, last.tokens[changed].earlier) == (("7",), ("9",))


def test_row_out_of_range_is_refused(rollout, tokenizer):
    with pytest.raises(ValueError, match="row=2"):
        frames(rollout, tokenizer, 2)


def test_block_length_is_read_off_the_order(rollout):
    assert block_length_of(rollout) == BLOCK
    whole = torch.stack([torch.randperm(LENGTH, generator=torch.Generator().manual_seed(5))] * 2)
    assert block_length_of(replace(rollout, revealed_at=whole)) == LENGTH


@pytest.mark.parametrize(("block_length", "threshold"), [(4, None), (8, None), (16, None), (8, 0.2)])
def test_block_length_of_sampled_rollouts(tiny_llada, block_length, threshold):
    config = SamplerConfig(16, block_length, 16, temperature=1.0, remasking="random", stop_at_eos=False)
    if threshold is not None:
        config = replace(config, threshold=threshold, remasking="low_confidence")
    prompt = torch.arange(1, 5).repeat(6, 1)
    generator = torch.Generator().manual_seed(0)
    sampled = generate(tiny_llada(), prompt, torch.ones_like(prompt), config, generator=generator)
    assert block_length_of(sampled) == block_length


def test_prompt_is_shown_without_padding_and_special_tokens(rollout, tokenizer):
    assert prompt_text(rollout, tokenizer, 0) == PROMPT


def test_levels_of_confidence():
    levels = [Token("a", 0, value, 0.0).level for value in (0.0, 0.29, 0.3, 0.5, 0.69, 0.7, 0.89, 0.9, 1.0)]
    assert levels == [0, 0, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("width", [7, 20, 100])
def test_lines_keep_the_text_and_the_width(rollout, tokenizer, width):
    for shot in frames(rollout, tokenizer):
        lines = canvas_lines(shot, width)
        assert all(len(line) <= width for line in lines)
        positions = [position for line in lines for position, _ in line]
        assert positions == sorted(positions)
    text = "".join(token.text for token in shot.tokens[: shot.length])
    drawn = "".join(char for line in lines for _, char in line)
    without = str.maketrans("", "", f"\n {LINE_END}")
    assert drawn.translate(without) == text.translate(without)
    if width == 100:
        assert ["".join(char for _, char in line) for line in lines] == text.split("\n")


def test_lines_break_between_words_and_hidden_tokens():
    texts = ("one", " two", " th", "ree", "\n\n", "four")
    tokens = tuple(Token(text, 0, 1.0, 0.0) for text in texts)
    lines = ["".join(char for _, char in line) for line in canvas_lines(Frame(0, tokens, 6), 10)]
    assert lines == ["one two ", "three" + LINE_END, "", "four"]
    hidden = (None, None, None, None, *tokens[2:4])
    assert [len(line) for line in canvas_lines(Frame(0, hidden, 6), 6)] == [5, 5]


def drawn(renderable, width=100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


def test_terminal_shows_what_is_committed_and_no_more(rollout, tokenizer):
    shots = frames(rollout, tokenizer, 0)
    first, last = (drawn(render(shots[k], num_steps=LENGTH, width=100)) for k in (0, -1))
    assert "</answer>" in last
    assert HIDDEN not in last
    assert "answer" not in first
    assert first.count(HIDDEN) == LENGTH
    assert f"step {LENGTH:>2}" in drawn(render(replace(shots[-1], step=LENGTH - 1), num_steps=LENGTH, width=100))
    for width in (40, 60, 100):
        assert {
            len(line) for line in drawn(render(shots[5], prompt=PROMPT, num_steps=LENGTH, width=width)).splitlines()
        } <= {width}


def test_tall_completions_show_what_is_new(rollout, tokenizer):
    for shot in frames(rollout, tokenizer, 0):
        lines = canvas_lines(shot, 96)
        seen = window(lines, shot, 2)
        assert len(seen) == min(2, len(lines))
        positions = {position for line in seen for position, _ in line}
        assert {k for k in range(shot.length) if shot.fresh(k)} <= positions
        assert window(lines, shot, 100) == lines


def test_play_writes_every_frame_to_a_terminal_and_the_last_to_a_file(rollout, tokenizer, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, height=50, color_system="truecolor")
    play(rollout, tokenizer, 0, steps_per_second=1e6, console=terminal)
    written = terminal.file.getvalue()
    assert written.count("denoising") == len(frames(rollout, tokenizer, 0)) + 1
    monkeypatch.setattr("dgrpo.player.terminal.time.sleep", pytest.fail)
    file = Console(file=io.StringIO(), width=80)
    play(rollout, tokenizer, 0, console=file)
    assert file.file.getvalue().count("denoising") == 1
    assert "</answer>" in file.file.getvalue()


def test_hostile_text_cannot_steer_the_terminal(tokenizer):
    hostile = "\x1b[2J\x1b]0;title\x07[red]bold[/red]\r\u202e\u2028"
    assert printable(hostile) == "\ufffd[2J\ufffd]0;title\ufffd[red]bold[/red]\ufffd\ufffd\ufffd"
    shots = frames(rollout_of(tokenizer, [hostile]), tokenizer)
    written = drawn(render(shots[-1], prompt=printable(hostile), num_steps=LENGTH, width=100))
    assert "\x1b" not in written
    assert "[red]bold[/red]" in written


def test_rollouts_survive_storage(rollout, tmp_path):
    path = tmp_path / "rollout.safetensors"
    save_rollout(path, rollout)
    loaded = load_rollout(path)
    for field in fields(Rollout):
        stored, expected = getattr(loaded, field.name), getattr(rollout, field.name)
        if isinstance(expected, torch.Tensor):
            assert stored.dtype == expected.dtype
            assert torch.equal(stored, expected)
        else:
            assert stored == expected


def test_other_files_are_no_rollouts(tmp_path):
    save_file({"prompt_ids": torch.zeros(1, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="lacks prompt_mask"):
        load_rollout(tmp_path / "other.safetensors")


def test_gif_plays_all_frames(rollout, tokenizer, tmp_path):
    with Image.open(write_gif(tmp_path / "all.gif", rollout, tokenizer, 0, columns=40)) as image:
        assert image.n_frames == len(frames(rollout, tokenizer, 0))
        first = image.convert("RGB").tobytes()
        size = image.size
        image.seek(image.n_frames - 1)
        assert image.info["duration"] == 2000
        assert image.size == size
        assert image.convert("RGB").tobytes() != first
    with Image.open(write_gif(tmp_path / "few.gif", rollout, tokenizer, 0, max_frames=5, dark=True)) as image:
        assert image.n_frames == 5
        assert sum(image.convert("RGB").getpixel((1, 1))) < 150


@pytest.fixture(scope="module")
def chromium():
    if EXECUTABLE is None:
        pytest.skip("Chromium is not installed")
    browser = Chromium()
    yield browser
    browser.close()


def test_page_plays_in_a_browser(chromium, rollout, tokenizer, tmp_path):
    page = write_html(tmp_path / "player.html", rollout, tokenizer, title="<i>Two</i> & more")
    said = tokenizer.decode(rollout.completion_ids[0][rollout.completion_mask[0]]).replace("\n\n", f"{LINE_END}\n\n")
    count = "document.querySelectorAll('#text .hidden:not([hidden])').length"
    shots = frames(rollout, tokenizer, 0)
    hidden = [sum(token is None for token in shot.tokens[: shot.length]) for shot in shots]
    grounds = []
    for dark in (False, True):
        chromium.open(page, dark=dark)
        assert chromium.evaluate("document.title") == "<i>Two</i> & more"
        assert chromium.evaluate(count) == hidden[0] == LENGTH
        grounds.append(chromium.evaluate("getComputedStyle(document.body).backgroundColor"))
        for step in range(1, 4):
            chromium.press("ArrowRight")
            assert chromium.evaluate(count) == hidden[step]
        chromium.press("ArrowLeft")
        assert chromium.evaluate("document.getElementById('slider').value") == "2"
        chromium.press("End")
        assert chromium.evaluate(count) == 0
        assert chromium.evaluate("document.getElementById('text').textContent").replace(LINE_END, "") == said.replace(
            LINE_END, ""
        )
        chromium.press("Home")
        chromium.press(" ")
        assert chromium.evaluate("document.getElementById('play').textContent") == "Pause"
        moved = "new Promise(done => setTimeout(() => done(Number(document.getElementById('slider').value) > 0), 400))"
        assert chromium.evaluate(moved)
        chromium.evaluate("document.getElementById('row').value = 1")
        chromium.evaluate("document.getElementById('row').dispatchEvent(new Event('change'))")
        chromium.press("End")
        assert chromium.evaluate("document.getElementById('text').textContent").startswith("<answer>\n8\n</answer>")
        assert chromium.problems == []
    assert grounds[0] != grounds[1]
    for width in (360, 1280):
        chromium.open(page, width=width)
        assert chromium.evaluate("document.documentElement.scrollWidth") == width


def test_page_shows_hostile_text_as_text(chromium, tokenizer, tmp_path):
    hostile = "</script><img src=http://example.org/x onerror=alert(1)>{{script}}"
    page = write_html(tmp_path / "hostile.html", rollout_of(tokenizer, [hostile]), tokenizer)
    chromium.open(page)
    chromium.press("End")
    text = chromium.evaluate("document.getElementById('text').textContent")
    assert text.startswith(hostile[: len(text) - len(tokenizer.eos_token)])
    assert len(text) > 30
    assert chromium.evaluate("document.images.length") == 0
    assert chromium.problems == []
