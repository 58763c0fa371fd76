"""Sampling models that attend block by block: against the published loop on transformers' own Qwen3.

The grid counts from a text's first token: prompts of all lengths modulo the block length b = 4, padded together.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise

import pytest
import torch
from torch import Tensor
from trainers import EOS, MASK, PAD, VOCAB, tiny_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from dgrpo.models.converted import A2DQwen3LMHeadModel, ConvertedQwen3Config
from dgrpo.models.sdar import SDARConfig, SDARForCausalLM
from dgrpo.player.export import load_rollout, save_rollout
from dgrpo.player.frames import frames, prompt_text, token_texts
from dgrpo.sampling import Rollout, SamplerConfig, generate

B, C, END = 4, 16, 16
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
}
RULES = {
    "static": {"diffusion_steps": 16},
    "static, 2 steps": {"diffusion_steps": 8},
    "static, 3 steps": {"diffusion_steps": 12},
    "threshold": {"threshold": 0.5},
    "threshold, at least 2": {"threshold": 0.5, "min_commit": 2},
    "threshold, at least 3": {"threshold": 0.5, "min_commit": 3},
    "sequential": {"remasking": "sequential", "diffusion_steps": 8},
    "entropy": {"remasking": "entropy", "entropy_sum": 2.0},
    "top k": {"threshold": 0.7, "top_k": 3},
    "top p": {"threshold": 0.7, "top_p": 0.6},
    "both": {"remasking": "entropy", "entropy_sum": 1.0, "top_k": 4, "top_p": 0.8},
}


def weights(model, seed: int = 2):
    """Every parameter random, the norms' too; a word ends some completions, and none of the rest does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1))
    model.generation_config.eos_token_id = [EOS, END]
    return model.eval()


def sdar(**settings) -> SDARForCausalLM:
    return weights(SDARForCausalLM(SDARConfig(**SIZES | settings, mask_token_id=MASK, block_size=B)))


def converted() -> A2DQwen3LMHeadModel:
    """A causal checkpoint made to attend block by block: position i predicts token i + 1."""
    config = ConvertedQwen3Config(**SIZES, mask_token_id=MASK, block_length=B, logit_shift=1)
    return weights(A2DQwen3LMHeadModel(config))


@pytest.fixture(scope="module")
def model():
    return sdar()


def texts(lengths=(5, 8, 3, 10, 12, 1, 7, 5)) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths, padded on the left; two of 5 tokens are equal, and an end stands in one's tail."""
    width = max(lengths)
    ids = torch.randint(0, END, (len(lengths), width), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    if len(lengths) == 8:
        ids[7] = ids[0]
        ids[6, -1] = END
    return ids.masked_fill(~mask, PAD), mask


def sample(model, prompts=None, keys=None, **settings) -> Rollout:
    ids, mask = texts() if prompts is None else prompts
    config = SamplerConfig(**{"max_completion_length": C, "diffusion_steps": C} | settings)
    keys = torch.arange(len(ids)) * 7919 + 5 if keys is None else keys
    return generate(model, ids, mask, config, row_keys=keys)


def chosen(confidence: Tensor, entropy: Tensor, is_open: Tensor, step: int, settings: dict) -> list[int]:
    """Positions of a block that one step commits: section 3 of what SDAR, TraDo and JetEngine do."""
    places = is_open.nonzero()[:, 0].tolist()
    if "threshold" in settings:
        places.sort(key=lambda place: -confidence[place])
        fine = [place for place in places if confidence[place] >= settings["threshold"]]
        least = settings.get("min_commit", 1)
        return fine if len(fine) >= least else places[:least]
    if "entropy_sum" in settings:
        places.sort(key=lambda place: entropy[place])
        total = torch.stack([entropy[place] for place in places]).cumsum(0)
        return places[: max(1, int((total < settings["entropy_sum"]).sum()))]
    if settings.get("remasking") != "sequential":
        places.sort(key=lambda place: -confidence[place])
    steps = settings["diffusion_steps"] * B // C
    return places[: B // steps + (step < B % steps)]


def plainly(qwen, prompt: list[int], **settings) -> tuple[list[int], list[int], list[float]]:
    """The published loop at temperature 0 on a network that sees [L, L] as told: canvas, steps, probabilities."""
    rest, text = len(prompt) % B, list(prompt)
    steps_of, recorded = [-1] * rest, [1.0] * rest
    per_block = settings["diffusion_steps"] * B // C if {"threshold", "entropy_sum"}.isdisjoint(settings) else B
    for block in range(C // B):
        start = len(prompt) - rest + block * B
        x = torch.tensor(text[start:] + [MASK] * (B - len(text[start:])))
        at, probs = torch.full((B,), -1), torch.ones(B)
        for step in count():
            is_open = x == MASK
            if not is_open.any():
                break
            number = torch.arange(start + B) // B
            visible = (number <= number[:, None])[None, None]
            row = torch.cat([torch.tensor(text[:start], dtype=torch.long), x])[None]
            with torch.no_grad():
                logits = qwen(row, attention_mask=visible).logits[0, -B:].double()
            whole = logits.softmax(-1)
            logits[:, MASK] = -torch.inf
            x0 = logits.argmax(-1)
            p = whole
            if settings.get("top_k") or settings.get("top_p"):
                p = filtered(logits, settings.get("top_k", VOCAB), settings.get("top_p", 1.0)).softmax(-1)
            c = p.gather(1, x0[:, None])[:, 0]
            entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
            places = chosen(c, entropy, is_open, step, settings)
            x[places], at[places] = x0[places], block * per_block + step
            probs[places] = whole.gather(1, x0[:, None])[places, 0].float()
        text = text[:start] + x.tolist()
        taken = len(prompt) - start if block == 0 else 0
        steps_of += at[taken:].tolist()
        recorded += probs[taken:].tolist()
        if {EOS, END} & set(text[len(prompt) :]):
            break
    return text[len(prompt) - rest :], steps_of, recorded


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    ranked, words = logits.sort(descending=True)
    ranked[:, top_k:] = -torch.inf
    before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
    return torch.full_like(logits, -torch.inf).scatter(1, words, ranked.masked_fill(before >= top_p, -torch.inf))


@pytest.mark.parametrize("rule", RULES)
def test_greedy_sampling_equals_the_published_loop_on_transformers_own_network(model, rule):
    qwen = Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    qwen.load_state_dict(model.state_dict())
    ids, mask = texts()
    rollout = sample(model, **RULES[rule])
    lengths = []
    for row in range(len(ids)):
        canvas, steps, probs = plainly(qwen, ids[row, mask[row]].tolist(), **{"diffusion_steps": C} | RULES[rule])
        tail = int(mask[row].sum()) % B
        assert rollout.prompt_tail[row] == tail
        ends = [place for place, word in enumerate(canvas) if word in (EOS, END) and place >= tail]
        length = ends[0] + 1 if ends else C
        lengths.append(length)
        assert rollout.completion_ids[row].tolist() == canvas[:length] + [EOS] * (C - length)
        assert rollout.revealed_at[row, :length].tolist() == steps[:length]
        assert rollout.completion_mask[row].tolist() == [tail <= place < length for place in range(C)]
        torch.testing.assert_close(rollout.confidence[row, :length], torch.tensor(probs[:length]), rtol=0, atol=1e-5)
        # What was drawn behind the end, in its block, is in the history.
        assert rollout.trace_ids()[row, : len(canvas)].tolist() == canvas
        assert rollout.written_at()[row, : len(steps)].tolist() == steps
    assert len(set(lengths)) > 2


def assert_same(rollout: Rollout, other: Rollout) -> None:
    for name in ("completion_ids", "completion_mask", "revealed_at", "prompt_tail", "history"):
        assert torch.equal(getattr(rollout, name), getattr(other, name)), name
    for name in ("confidence", "entropy"):
        torch.testing.assert_close(getattr(rollout, name), getattr(other, name), rtol=0, atol=1e-5)


def widths(model) -> list[tuple[int, int]]:
    """(rows, tokens) of each pass from now on."""
    shapes: list[tuple[int, int]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, ids: shapes.append(tuple(ids[0].shape)))
    return shapes


EVERY_KIND = {"sdar": sdar, "shifted": converted}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_cache_changes_nothing(kind, temperature):
    model = EVERY_KIND[kind]()
    for rule in RULES.values():
        stored = sample(model, temperature=temperature, **rule)
        assert_same(stored, sample(model, temperature=temperature, cache="recompute", **rule))
        assert len(stored.completion_mask.sum(1).unique()) > 2
    random = {"remasking": "random", "temperature": temperature}
    assert_same(sample(model, **random), sample(model, cache="recompute", **random))


def test_a_pass_takes_one_block_and_a_block_s_first_pass_also_what_was_finished_before_it(model):
    shapes = widths(model)
    whole = texts((8, 8, 4, 8))
    whole[0][1] = whole[0][0]
    settings = {"temperature": 0.9, "diffusion_steps": C // 2, "stop_at_eos": False}
    rollout = sample(model, whole, **settings)
    # Three distinct prompts of two blocks; then four rows, two steps a block.
    assert shapes == [(3, 8 + B), (4, B)] + [(4, 2 * B), (4, B)] * 3
    assert rollout.num_forwards == 8
    shapes.clear()
    # Of two and one open positions in the first block, two a step, one step is left.
    sample(model, texts((3, 2)), **settings)
    assert shapes == [(2, B), (2, 2 * B), (2, B), (2, 2 * B), (2, B), (2, 2 * B), (2, B)]


def test_rows_leave_when_they_are_done_with_a_block_and_at_their_end(model):
    shapes = widths(model)
    rollout = sample(model, **RULES["threshold"])
    inside = [(before, after) for (before, _), (after, tokens) in pairwise(shapes) if tokens == B]
    assert any(after < before for before, after in inside)
    # All rows that go on take part in a block's first pass, even where some had left the last one.
    is_end = torch.isin(rollout.completion_ids, torch.tensor([EOS, END])) & rollout.completion_mask
    alive = [int((~is_end[:, : block * B].any(1)).sum()) for block in range(1, C // B)]
    assert [rows for rows, tokens in shapes[1:] if tokens == 2 * B] == alive
    assert len(rollout.completion_ids) > alive[0] > alive[-1] > 0


@pytest.mark.parametrize("rule", ["static", "threshold"])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_row_does_not_depend_on_the_others(kind, rule):
    model, settings = EVERY_KIND[kind](), RULES[rule] | {"temperature": 0.9}
    ids, mask = texts()
    keys = torch.arange(len(ids)) * 7919 + 5
    together = sample(model, **settings)
    parts = generate(
        model, ids, mask, SamplerConfig(C, **{"diffusion_steps": C} | settings), row_keys=keys, batch_size=3
    )
    assert_same(together, parts)
    for row in range(len(ids)):
        one = ids[row : row + 1, mask[row]], mask[row : row + 1, mask[row]]
        alone = sample(model, one, keys[row : row + 1], **settings)
        for name in ("completion_ids", "revealed_at", "completion_mask"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row])


def test_what_is_prompt_and_what_is_completion(model):
    ids, mask = texts()
    rollout = sample(model, **RULES["threshold"])
    assert rollout.block_length == B
    assert rollout.prompt_ids.shape[1] == 12
    for row in range(len(ids)):
        tail, whole = int(rollout.prompt_tail[row]), ids[row, mask[row]].tolist()
        assert tail == len(whole) % B
        given = (
            rollout.prompt_ids[row, rollout.prompt_mask[row]].tolist() + rollout.completion_ids[row, :tail].tolist()
        )
        assert given == whole
        assert int(rollout.prompt_mask[row].sum()) % B == 0
        assert (rollout.revealed_at[row, :tail] == -1).all()
        assert not rollout.completion_mask[row, :tail].any()
        assert (rollout.revealed_at[row, tail:] != -1).all()
    blocks = rollout.blocks()
    assert torch.equal(blocks.ids.view(-1, C), rollout.trace_ids())
    assert torch.equal(blocks.open.view(-1, C), rollout.completion_mask)
    step = torch.where(blocks.written, blocks.step + torch.arange(C // B).repeat(len(ids))[:, None] * B, -1)
    assert torch.equal(step.view(-1, C), rollout.written_at().where(rollout.written_at() < C, -1))
    assert (blocks.written & ~blocks.open).any()
    assert blocks.num_steps == B


def test_words_given_in_advance_stay_and_later_blocks_do_not_see_back(model):
    prompts = texts((5, 8, 3))
    fixed = torch.full((3, C), -1)
    fixed[0, 1:3], fixed[1, 9], fixed[2, :4] = torch.tensor([4, 5]), 7, torch.tensor([1, 2, 3, 4])
    config = SamplerConfig(C, diffusion_steps=C, stop_at_eos=False)
    rollout = generate(model, *prompts, config, fixed=fixed)
    for cache in ("recompute", None):
        for threshold in (None, 0.5):
            settings = {"stop_at_eos": False, "threshold": threshold, "diffusion_steps": C}
            found = [
                generate(model, *prompts, SamplerConfig(C, cache=how, **settings), fixed=fixed)
                for how in (cache, None)
            ]
            assert_same(*found)
            for row, tail in enumerate((1, 0, 3)):
                given = fixed[row].roll(tail)
                seen = (given >= 0) & (found[0].completion_mask[row])
                assert torch.equal(found[0].completion_ids[row][seen], given[seen])
                assert (found[0].revealed_at[row][seen] == -1).all()
    free = generate(model, *prompts, config)
    assert torch.equal(rollout.trace_ids()[1, :8], free.trace_ids()[1, :8])
    fixed[2, -1] = 3
    with pytest.raises(ValueError, match="fixed: its last 3 columns do not fit"):
        generate(model, *prompts, config, fixed=fixed)


def test_processes_make_equally_many_passes():
    ids, mask = texts()
    rows = [slice(0, 3), slice(3, 8)]
    settings = {"temperature": 0.9, **RULES["threshold"]}
    keys = torch.arange(8) + 11
    models = [sdar(), sdar()]
    prompts = [(ids[part], mask[part]) for part in rows]
    alone = [sample(models[rank], prompts[rank], keys[rows[rank]], **settings) for rank in (0, 1)]
    assert alone[0].num_forwards != alone[1].num_forwards
    barrier, flags = threading.Barrier(2, timeout=600), [False, False]

    def job(rank: int) -> Rollout:
        def any_rank(flag: bool) -> bool:
            flags[rank] = bool(flag)
            barrier.wait()
            answer = any(flags)
            barrier.wait()
            return answer

        config = SamplerConfig(C, diffusion_steps=C, **settings)
        return generate(models[rank], *prompts[rank], config, row_keys=keys[rows[rank]], any_rank=any_rank)

    with ThreadPoolExecutor(2) as pool:
        together = [future.result() for future in [pool.submit(job, rank) for rank in (0, 1)]]
    assert together[0].num_forwards == together[1].num_forwards
    for mine, theirs in zip(together, alone, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_length": 8}, "block_length=8: the model attends in blocks of 4 tokens: leave it out"),
        ({"max_completion_length": 18}, "max_completion_length=18: must be a multiple of the model's block_length=4"),
        ({"cache": "dual"}, "cache='dual': is for full attention; block by block the exact cache is on"),
        ({"cfg_scale": 1.0}, "cfg_scale=1.0: a model that attends block by block never sees"),
        ({"diffusion_steps": 3}, "diffusion_steps=3: each of the 4 blocks needs a step"),
    ],
)
def test_what_cannot_be_sampled_is_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(model, **settings)


def test_the_player_shows_the_whole_prompt_and_the_completion_alone(model, tmp_path):
    rollout = sample(model, **RULES["static"])
    row, tokenizer = 6, tiny_tokenizer()
    prompt = texts()[0][row, texts()[1][row]].tolist()
    assert prompt_text(rollout, tokenizer, row) == tokenizer.decode(prompt, skip_special_tokens=True).strip()
    shots = frames(rollout, tokenizer, row)
    assert shots[0].block_length == B
    assert [token is not None and token.text == "" for token in shots[0].tokens] == [True] * 3 + [False] * (C - 3)
    written = "".join(token.text for token in shots[-1].tokens[: shots[-1].length] if token)
    shown = rollout.completion_ids[row][rollout.completion_mask[row]]
    assert written == "".join(token_texts(tokenizer, shown.tolist()))
    save_rollout(tmp_path / "rollout.safetensors", rollout)
    assert_same(load_rollout(tmp_path / "rollout.safetensors"), rollout)
    full = Rollout(**{name: value for name, value in vars(rollout).items() if name != "block_length"})
    save_rollout(tmp_path / "full.safetensors", full)
    assert load_rollout(tmp_path / "full.safetensors").block_length is None
