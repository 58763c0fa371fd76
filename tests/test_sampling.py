"""The reverse process: LLaDA's published loop at temperature 0, softmax draws above it, a trace that replays."""

import itertools
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import denoise_greedily, llada_logits, shares, until_eos
from trainers import EOS, MASK, VOCAB

from dgrpo.noise import uniform
from dgrpo.sampling import Rollout, SamplerConfig, generate
from dgrpo.sampling.cache import WindowCache
from dgrpo.sampling.denoise import _ORDER_STREAM
from dgrpo.sampling.draw import draw
from dgrpo.sampling.policy import may_commit
from dgrpo.vocabulary import first_argmax, inverse_cdf

BLOCKS = SamplerConfig(max_completion_length=12, block_length=6, diffusion_steps=8)
ALL_RULES = {"threshold": {"threshold": 0.4}, "factor": {"factor": 1.2}, "entropy_bound": {"entropy_bound": 1.5}}
ALL_ORDERS = ["low_confidence", "random", "entropy", "topk_margin"]
CACHES = {"exact": {}, "prefix": {"cache": "prefix"}, "dual": {"cache": "dual"}}


def plain(model):
    """The network as a plain function of one text without padding, in float64."""
    state = {name: weight.double() for name, weight in model.state_dict().items()}
    return lambda ids: llada_logits(state, model.config, ids)


def keys(count: int) -> torch.Tensor:
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(5))


def copies(prompts, count: int):
    return tuple(tensor[:1].expand(count, -1) for tensor in prompts)


def without_end(model):
    """The same model, of which no token ends a completion."""
    model.generation_config.eos_token_id = VOCAB
    return model


def common_token(completions: list[list[int]]) -> int:
    """The token found in most rows without being in all of them: as end token it ends some rows and not others."""
    rows = Counter(token for completion in completions for token in set(completion))
    return max((token for token in rows if rows[token] < len(completions)), key=lambda token: (rows[token], token))


def assert_same(rollout: Rollout, other: Rollout) -> None:
    assert torch.equal(rollout.completion_ids, other.completion_ids)
    assert torch.equal(rollout.completion_mask, other.completion_mask)
    assert torch.equal(rollout.revealed_at, other.revealed_at)
    torch.testing.assert_close(rollout.confidence, other.confidence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollout.entropy, other.entropy, rtol=1e-4, atol=1e-5)


def assert_frequencies(counts: torch.Tensor, probs: torch.Tensor) -> None:
    """Pearson's chi-square within four of its standard deviations; cells that expect under 5 are put together."""
    expected = probs.double().flatten() * counts.sum()
    counts = counts.double().flatten()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1e-9)])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)


# Temperature 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("length", "block_length", "steps", "cfg_scale"),
    [(12, 12, 12, 0), (12, 4, 6, 0), (12, 6, 8, 0), (12, 12, 5, 0), (8, 4, 16, 0), (12, 6, 8, 1.5), (8, 8, 8, 0.5)],
)
def test_greedy_sampling_equals_the_published_loop(tiny_llada, prompts, dtype, length, block_length, steps, cfg_scale):
    ids, mask = prompts
    model = tiny_llada().to(dtype)
    settings = {"block_length": block_length, "steps": steps, "cfg_scale": cfg_scale}
    expected, steps_of = zip(
        *(
            denoise_greedily(plain(model), ids[row, mask[row]], torch.full((length,), MASK), MASK, **settings)
            for row in range(len(ids))
        ),
        strict=True,
    )
    end = common_token([completion.tolist() for completion in expected])
    model.generation_config.eos_token_id = end
    rollout = generate(model, ids, mask, SamplerConfig(length, block_length, steps, cfg_scale=cfg_scale))
    for row in range(len(ids)):
        body = until_eos(expected[row].tolist(), {end})
        assert rollout.completion_ids[row].tolist() == body + [end] * (length - len(body))
        assert rollout.completion_mask[row].tolist() == [place < len(body) for place in range(length)]
        assert rollout.revealed_at[row, : len(body)].tolist() == steps_of[row][: len(body)].tolist()
    assert len(rollout.completion_mask.sum(1).unique()) > 1


def test_greedy_order_is_the_published_one_where_confidences_round_to_one(tiny_llada, prompts):
    ids, mask = prompts
    rounded = 0
    for seed in range(4):
        model = without_end(tiny_llada(seed=seed))
        with torch.no_grad():
            model.get_output_embeddings().weight *= 10
        rollout = generate(model, ids, mask, SamplerConfig(12, 12, 12))
        rounded += int((rollout.confidence == 1).sum())
        for row in range(len(ids)):
            blank = torch.full((12,), MASK)
            expected = denoise_greedily(plain(model), ids[row, mask[row]], blank, MASK, block_length=12, steps=12)
            assert torch.equal(rollout.completion_ids[row], expected[0])
            assert torch.equal(rollout.revealed_at[row], expected[1])
    assert rounded > 10


@pytest.mark.parametrize("remasking", ["entropy", "topk_margin"])
def test_other_orders_are_told_apart_where_they_round_too(tiny_llada, prompts, remasking):
    # A probability margin of float32 is 1.0 wherever the second word has less than 3e-8.
    margins = []
    for seed in range(4):
        model = without_end(tiny_llada(seed=seed))
        with torch.no_grad():
            model.get_output_embeddings().weight *= 10
        rollout = generate(model, *prompts, SamplerConfig(12, 12, 12, remasking=remasking))
        for row in range(5):
            for _, ids, committed in pictures(rollout, row):
                log_probs = plain(model)(ids)[-12:].log_softmax(-1)
                best, others = log_probs.topk(VOCAB).values.split([1, VOCAB - 1], 1)
                order = (log_probs.exp() * log_probs).sum(-1)
                if remasking == "topk_margin":
                    order = -torch.logaddexp(others.logsumexp(-1), others[:, 0])
                    margins.append((best[committed, 0].exp() - others[committed, 0].exp()).float().item())
                assert order.masked_fill(ids[-12:] != MASK, -torch.inf).argmax() == committed.int().argmax()
    assert remasking == "entropy" or margins.count(1.0) > 10


def test_given_tokens_stay_and_the_rest_is_denoised_around_them(model, prompts):
    ids, mask = prompts
    generator = torch.Generator().manual_seed(8)
    fixed = torch.randint(0, EOS, (5, 12), generator=generator)
    # One row free, one given entirely, one with a whole block given, the others in part.
    fixed[torch.rand(5, 12, generator=generator) < torch.tensor([1.1, -0.1, 0.5, 0.3, 0.8])[:, None]] = -1
    fixed[2, :6] = torch.arange(6)
    config = replace(BLOCKS, stop_at_eos=False)
    rollout = generate(model, ids, mask, config, fixed=fixed)
    for row in range(5):
        canvas = fixed[row].masked_fill(fixed[row] < 0, MASK)
        expected, steps_of = denoise_greedily(plain(model), ids[row, mask[row]], canvas, MASK, block_length=6, steps=8)
        assert EOS not in expected
        assert rollout.completion_ids[row].tolist() == expected.tolist()
        assert rollout.revealed_at[row].tolist() == steps_of.tolist()
    given = fixed >= 0
    assert given.any()
    assert (rollout.revealed_at[given] == -1).all()
    assert (rollout.confidence[given] == 1).all()
    assert (rollout.entropy[given] == 0).all()
    assert (rollout.revealed_at[~given] >= 0).all()


def test_a_given_mask_token_is_a_free_place(model, prompts):
    fixed = torch.full((5, 12), -1)
    fixed[:, 3] = 4
    free = generate(model, *prompts, BLOCKS, fixed=fixed)
    assert_same(generate(model, *prompts, BLOCKS, fixed=fixed.masked_fill(fixed < 0, MASK)), free)
    for strange in (-2, VOCAB):
        with pytest.raises(ValueError, match=rf"fixed: {strange} is not of the {VOCAB} words.*-1 where free"):
            generate(model, *prompts, BLOCKS, fixed=fixed.masked_fill(fixed == 4, strange))


@pytest.mark.parametrize("settings", CACHES.values(), ids=CACHES.keys())
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_stopping_at_the_end_token_changes_no_token_and_saves_passes(model, prompts, temperature, settings):
    config = SamplerConfig(24, 4, 24, temperature=temperature, **settings)
    free = generate(without_end(model), *prompts, config, row_keys=keys(5))
    model.generation_config.eos_token_id = free.completion_ids[:, 6].unique().tolist()
    stopped = generate(model, *prompts, config, row_keys=keys(5))
    full = generate(model, *prompts, replace(config, stop_at_eos=False), row_keys=keys(5))
    alive = stopped.completion_mask
    assert_same(stopped, full)
    for rollout in (stopped, full):
        assert torch.equal(rollout.completion_ids[alive], free.completion_ids[alive])
        assert torch.equal(rollout.revealed_at[alive], free.revealed_at[alive])
    # Every row has ended by its seventh token. Later blocks never open; the trace keeps nothing after the end.
    done = (int(alive.sum(1).max()) + 3) // 4 * 4
    assert done <= 8
    assert (stopped.num_forwards, full.num_forwards) == (done, 24)
    assert (full.revealed_at[~alive] == full.num_steps).all()
    assert (full.confidence[~alive] == 0).all()
    assert (full.entropy[~alive] == 0).all()


def test_every_end_token_ends_a_row_and_the_first_one_fills_it(model, prompts):
    free = generate(without_end(model), *prompts, BLOCKS).completion_ids.tolist()
    ends = [EOS, common_token(free), free[0][3]]
    model.generation_config.eos_token_id = ends
    completions = generate(model, *prompts, BLOCKS).completion_ids.tolist()
    bodies = [until_eos(row, set(ends)) for row in free]
    assert completions == [body + [EOS] * (12 - len(body)) for body in bodies]
    assert {body[-1] for body in bodies} >= set(ends[1:])


# Temperature above 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawn_tokens_follow_the_softmax(model, prompts, temperature):
    count = 20000
    config = SamplerConfig(2, 2, 1, temperature=temperature)
    rollout = generate(without_end(model), *copies(prompts, count), config, row_keys=keys(count))
    logits = plain(model)(torch.cat([prompts[0][0], torch.tensor([MASK, MASK])]))[-2:]
    logits[:, MASK] = -torch.inf
    probs = (logits / temperature).softmax(-1)
    counts = torch.zeros(VOCAB, VOCAB)
    counts.index_put_(tuple(rollout.completion_ids.T), torch.ones(()), accumulate=True)
    # Both tokens come from one picture, so their joint distribution is the product.
    assert_frequencies(counts, probs[0][:, None] * probs[1])
    # The confidence is the model's own, at temperature 1 and with [MASK] in its vocabulary.
    own = plain(model)(torch.cat([prompts[0][0], torch.tensor([MASK, MASK])]))[-2:].softmax(-1).float()
    torch.testing.assert_close(rollout.confidence, own[torch.arange(2), rollout.completion_ids], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_words", [5, 256, 1000])
def test_draw_by_stretches_is_that_of_one_running_sum(num_words):
    generator = torch.Generator().manual_seed(num_words)
    mass = torch.rand(400, num_words, generator=generator) * (torch.rand(400, num_words, generator=generator) < 0.3)
    mass[:, 3] += 1e-3
    noise = torch.rand(400, generator=generator, dtype=torch.double)
    noise[:100], noise[100:200] = 0, 1
    drawn = inverse_cdf(mass, noise)
    assert (mass.gather(1, drawn[:, None]) > 0).all()
    sums = mass.double().cumsum(1) / mass.double().sum(1, keepdim=True)
    low, high = ((sums - mass / mass.sum(1, keepdim=True)).gather(1, drawn[:, None]), sums.gather(1, drawn[:, None]))
    assert ((noise[:, None] >= low - 1e-6) & (noise[:, None] <= high + 1e-6)).all()


def test_first_argmax_is_the_first_of_equals():
    values = torch.randint(0, 3, (50, 1000), generator=torch.Generator().manual_seed(0)).float()
    values[:, :600] = values[:, :600].clamp(max=1)
    assert (first_argmax(values) == (values == 2).int().argmax(1)).all()


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy", "topk_margin"])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_what_a_draw_says_of_the_distribution(monkeypatch, remasking, temperature):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(60, 300, generator=generator) * 5
    logits[0] = 0
    logits[0, 7] = 60
    probs = logits.double().softmax(-1)
    noise = torch.rand(60, generator=generator, dtype=torch.double) if temperature else None
    config = SamplerConfig(temperature=temperature, remasking=remasking)
    drawn = draw(logits.clone(), noise, config, 299, 300)
    chosen = probs.gather(1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.probs.double(), chosen, rtol=1e-5, atol=1e-7)
    entropy = torch.special.entr(probs).sum(-1)
    torch.testing.assert_close(drawn.entropy.double(), entropy, rtol=1e-5, atol=2e-6)
    top = probs.topk(2).values
    order = {
        "low_confidence": (chosen / (probs.sum(-1) - chosen).clamp(min=1e-300)).log(),
        "entropy": -entropy,
        "topk_margin": -(1 - top[:, 0] + top[:, 1]).log(),
    }
    torch.testing.assert_close(drawn.order[1:].double(), order[remasking][1:], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("dgrpo.sampling.draw.MAX_DRAW_BYTES", 7 * 4 * 300)
    in_chunks = draw(logits.clone(), noise, config, 299, 300)
    assert torch.equal(in_chunks.tokens, drawn.tokens)
    # A processor may add the rows of a chunk in another order.
    torch.testing.assert_close(in_chunks[1:], drawn[1:], rtol=1e-5, atol=1e-6)


def test_two_steps_follow_the_process_enumerated(model, prompts):
    # Draw both tokens, keep the surer one, draw the other anew with noise of its own.
    count = 6000
    config = SamplerConfig(2, 2, 2, temperature=1.0)
    rollout = generate(without_end(model), *copies(prompts, count), config, row_keys=keys(count))
    counts = (rollout.completion_ids @ torch.tensor([VOCAB, 1])).bincount(minlength=VOCAB**2).view(VOCAB, VOCAB)

    def logits_after(*tokens: int) -> torch.Tensor:
        return plain(model)(torch.cat([prompts[0][0], torch.tensor(tokens)]))[-2:]

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor(MASK), -torch.inf).softmax(-1)

    own = logits_after(MASK, MASK).softmax(-1)
    both = drawn(logits_after(MASK, MASK))
    pairs = both[0][:, None] * both[1]
    first_is_surer = own[0][:, None] >= own[1]
    second_given_first = torch.stack([drawn(logits_after(token, MASK)[1]) for token in range(VOCAB)])
    first_given_second = torch.stack([drawn(logits_after(MASK, token)[0]) for token in range(VOCAB)], 1)
    probs = (pairs * first_is_surer).sum(1)[:, None] * second_given_first
    probs += (pairs * ~first_is_surer).sum(0) * first_given_second
    assert probs.sum().item() == pytest.approx(1)
    assert_frequencies(counts, probs)


def test_random_order_is_uniform(model, prompts):
    count = 3000
    config = SamplerConfig(4, 4, 4, remasking="random")
    rollout = generate(without_end(model), *copies(prompts, count), config, row_keys=keys(count))
    number = {order: index for index, order in enumerate(itertools.permutations(range(4)))}
    orders = torch.tensor([number[tuple(order)] for order in rollout.revealed_at.tolist()])
    assert_frequencies(orders.bincount(minlength=24), torch.full((24,), 1 / 24))


def test_random_order_is_independent_of_the_drawn_tokens(model, prompts):
    count = 5000
    config = SamplerConfig(2, 2, 2, temperature=1.0, remasking="random")
    rollout = generate(without_end(model), *copies(prompts, count), config, row_keys=keys(count))
    first = rollout.revealed_at.argmin(1)
    token = rollout.completion_ids[torch.arange(count), first]
    logits = plain(model)(torch.cat([prompts[0][0], torch.tensor([MASK, MASK])]))[-2:]
    logits[:, MASK] = -torch.inf
    counts = (first * VOCAB + token).bincount(minlength=2 * VOCAB)
    assert_frequencies(counts, logits.softmax(-1) / 2)


def test_noise_is_uniform_and_independent_across_rows_steps_and_positions():
    count = 20000
    noise = torch.stack(
        [
            uniform(keys(count), step, torch.tensor([[place]]).expand(count, 1))[:, 0]
            for step in (0, 1)
            for place in (0, 1)
        ]
        + [uniform(torch.arange(count), 0, torch.zeros(count, 1, dtype=torch.long))[:, 0]]
    )
    assert noise.dtype == torch.float64
    assert (noise >= 0).all()
    assert (noise < 1).all()
    # 53 bits leave no two of 20000 draws equal; 32 bits or fewer make that unlikely.
    assert all(len(row.unique()) == count for row in noise)
    for row in noise:
        assert_frequencies((row * 50).long().bincount(minlength=50), torch.full((50,), 1 / 50))
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 4 / count**0.5


@pytest.mark.parametrize("temperature", [0, 1e-300, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("remasking", ALL_ORDERS)
def test_neither_mask_nor_a_row_beyond_the_vocabulary_is_ever_drawn(tiny_llada, prompts, temperature, remasking):
    model = tiny_llada(embedding_size=30)

    def favour(head, inputs, logits):
        return logits.index_add(-1, torch.tensor([MASK, VOCAB, 29]), torch.full((*logits.shape[:-1], 3), 30.0))

    model.get_output_embeddings().register_forward_hook(favour)
    config = replace(BLOCKS, temperature=temperature, remasking=remasking)
    rollout = generate(without_end(model), *prompts, config, row_keys=keys(5))
    assert not (rollout.completion_ids == MASK).any()
    assert (rollout.completion_ids < VOCAB).all()
    assert (rollout.confidence[rollout.revealed_at < 8] < 1e-6).all()  # the model believed in [MASK]


@pytest.mark.parametrize("temperature", [1e-300, 1e30])
def test_extreme_temperatures_are_the_limits(temperature):
    logits = torch.randn(4000, 30, generator=torch.Generator().manual_seed(1)) * 5
    noise = torch.rand(4000, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    drawn = draw(logits.clone(), noise, SamplerConfig(temperature=temperature), 7, 28).tokens
    allowed = [word for word in range(28) if word != 7]
    if temperature < 1:
        assert torch.equal(drawn, torch.tensor(allowed)[logits[:, allowed].argmax(1)])
    else:
        assert_frequencies(drawn.bincount(minlength=30)[allowed], torch.full((27,), 1 / 27))
        assert torch.isin(drawn, torch.tensor(allowed)).all()


INVARIANT = {
    "low_confidence": {},
    "random": {"remasking": "random"},
    "guided": {"cfg_scale": 1.0},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual", "cache_refresh": 2},
    **ALL_RULES,
}


@pytest.mark.parametrize("settings", INVARIANT.values(), ids=INVARIANT.keys())
def test_a_row_is_a_function_of_its_prompt_and_its_key(model, prompts, settings):
    ids, mask = prompts
    config = replace(BLOCKS, temperature=0.9, **settings)
    free = generate(without_end(model), ids, mask, config, row_keys=keys(5))
    model.generation_config.eos_token_id = common_token(free.completion_ids.tolist())
    together = generate(model, ids, mask, config, row_keys=keys(5))
    assert not together.completion_mask.all()
    assert not torch.equal(together.completion_ids[0], together.completion_ids[1])  # same prompt, another key

    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = generate(model, ids[order], mask[order], config, row_keys=keys(5)[order])
    assert_same(shuffled, replace(together, **{name: getattr(together, name)[order] for name in BY_ROW}))

    for batch_size in (1, 2):
        assert_same(generate(model, ids, mask, config, row_keys=keys(5), batch_size=batch_size), together)

    wider = torch.nn.functional.pad(ids, (3, 0), value=2), torch.nn.functional.pad(mask, (3, 0))
    assert_same(generate(model, *wider, config, row_keys=keys(5)), together)

    for row in range(5):
        alone = generate(
            model, ids[row, mask[row]][None], mask[row, mask[row]][None], config, row_keys=keys(5)[row, None]
        )
        assert_same(alone, replace(together, **{name: getattr(together, name)[row, None] for name in BY_ROW}))


BY_ROW = ("completion_ids", "completion_mask", "revealed_at", "confidence", "entropy")


def test_generator_decides_everything(model, prompts):
    config = replace(BLOCKS, temperature=1.0)
    runs = [generate(model, *prompts, config, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0].completion_ids, runs[2].completion_ids)


def test_rows_of_one_prompt_share_a_group_unless_told_otherwise(model, prompts):
    group = generate(model, *prompts, BLOCKS).group
    assert group[0] == group[1]
    assert len(group.unique()) == 4
    given = torch.arange(5)
    assert torch.equal(generate(model, *prompts, BLOCKS, group=given).group, given)


# The trace


def pictures(rollout: Rollout, row: int):
    """(step, ids without padding, completion mask of what that step committed), for each step that committed."""
    prompt = rollout.prompt_ids[row, rollout.prompt_mask[row]]
    revealed_at = rollout.revealed_at[row]
    for step in revealed_at[revealed_at >= 0].unique().tolist():
        shown = rollout.completion_ids[row].masked_fill(revealed_at >= step, MASK)
        yield step, torch.cat([prompt, shown]), revealed_at == step


def order_by(remasking: str, logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    probs = logits.softmax(-1)
    if remasking == "entropy":
        return torch.special.xlogy(probs, probs).sum(-1)
    if remasking == "topk_margin":
        ranked = probs.sort(-1, descending=True).values
        return ranked[:, 0] - ranked[:, 1]
    return probs[torch.arange(len(token)), token]


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy", "topk_margin", "random"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_replaying_the_trace_gives_back_every_step(model, prompts, remasking, temperature):
    config = replace(BLOCKS, remasking=remasking, temperature=temperature, logits_eos_inf=True)
    rollout = generate(model, *prompts, config, row_keys=keys(5))
    assert rollout.completion_mask.all()
    for row in range(5):
        counts = []
        for step, ids, committed in pictures(rollout, row):
            logits = plain(model)(ids)[-12:]
            logits[:, EOS] = -torch.inf
            probs = logits.softmax(-1)
            token = rollout.completion_ids[row]
            told = probs[torch.arange(12), token].float()
            entropy = torch.special.entr(probs).sum(-1).float()
            torch.testing.assert_close(rollout.confidence[row][committed], told[committed], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(rollout.entropy[row][committed], entropy[committed], rtol=1e-4, atol=1e-5)
            counts.append(int(committed.sum()))
            block = torch.arange(12) // 6 == step // 4
            assert not (committed & ~block).any()
            if temperature == 0:
                logits[:, MASK] = -torch.inf
                assert torch.equal(logits.argmax(-1)[committed], token[committed])
                logits = plain(model)(ids)[-12:]
                logits[:, EOS] = -torch.inf
                drawable = logits.clone()
                drawable[:, MASK] = -torch.inf
                order = order_by(remasking, logits, drawable.argmax(-1))
                waiting = block & (ids[-12:] == MASK) & ~committed
                if remasking != "random" and waiting.any():
                    assert order[committed].min() > order[waiting].max()
        assert counts == shares(6, 4) * 2


@pytest.mark.parametrize(
    ("rule", "remasking"),
    [("factor", "low_confidence"), *itertools.product(("threshold", "entropy_bound"), ALL_ORDERS)],
)
def test_parallel_rules_commit_what_they_say_and_at_least_one_token(model, prompts, rule, remasking):
    config = replace(BLOCKS, logits_eos_inf=True, remasking=remasking, **ALL_RULES[rule])
    rollout = generate(model, *prompts, config, row_keys=keys(5))
    sizes = []
    for row in range(5):
        steps = []
        for step, ids, committed in pictures(rollout, row):
            logits = plain(model)(ids)[-12:]
            logits[:, EOS] = -torch.inf
            probs = logits.softmax(-1)
            best, token = probs.index_fill(1, torch.tensor(MASK), -1).max(-1)
            confidence, order = best.tolist(), order_by(remasking, logits, token)
            if remasking == "random":
                order = uniform(keys(5)[row, None], step + _ORDER_STREAM, torch.arange(12)[None])[0]
            entropy = torch.special.entr(probs).sum(-1).tolist()
            candidates = [at for at in range(12) if ids[at - 12] == MASK and at // 6 == step // 6]
            candidates.sort(key=lambda at: -order[at])
            if rule == "threshold":
                allowed = [at for at in candidates if confidence[at] >= 0.4]
            elif rule == "factor":
                fine = [(n + 1) * (1 - confidence[at]) < 1.2 for n, at in enumerate(candidates, 1)]
                allowed = candidates[: [*fine, False].index(False)]
            else:
                prefixes = [[entropy[at] for at in candidates[:n]] for n in range(1, len(candidates) + 1)]
                allowed = candidates[: sum(sum(each) - max(each) <= 1.5 for each in prefixes)]
            allowed = allowed or candidates[:1]
            assert sorted(allowed) == committed.nonzero()[:, 0].tolist()
            steps.append(step)
            sizes.append(len(allowed))
        for block in (0, 1):
            mine = [step for step in steps if step // 6 == block]
            assert mine == list(range(6 * block, 6 * block + len(mine)))  # no pass without a token
    assert max(sizes) > 1
    assert min(sizes) == 1
    passes = sum(int((rollout.revealed_at // 6 == b).mul(rollout.revealed_at % 6 + 1).max()) for b in (0, 1))
    assert rollout.num_forwards == passes


def test_threshold_takes_the_first_open_position_only_where_no_open_one_passes():
    probs = torch.tensor([[0.3, 0.9, 0.2, 0.9], [0.3, 0.2, 0.1, 0.3], [0.3, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9]])
    is_open = torch.arange(4) < torch.tensor([4, 4, 1, 0])[:, None]
    committed = may_commit(probs, torch.zeros(4, 4), is_open, SamplerConfig(threshold=0.5))
    assert committed.tolist() == [[False, True, False, True], [True] + [False] * 3, [True] + [False] * 3, [False] * 4]


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("settings", [{"threshold": 1.0}, {"factor": 1e-9}, {"entropy_bound": 0.0}], ids=str)
def test_a_rule_that_allows_nothing_commits_one_token_a_step(model, prompts, temperature, settings):
    config = SamplerConfig(12, 6, 12, temperature=temperature)
    one_by_one = generate(model, *prompts, config, row_keys=keys(5))
    assert_same(generate(model, *prompts, replace(config, **settings), row_keys=keys(5)), one_by_one)


# Caches


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_cache_refreshed_at_every_step_is_exact(model, prompts, cache, temperature):
    config = replace(BLOCKS, temperature=temperature)
    exact = generate(model, *prompts, config, row_keys=keys(5))
    cached = generate(model, *prompts, replace(config, cache=cache, cache_refresh=1), row_keys=keys(5))
    assert_same(cached, exact)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("refresh", [None, 3])
def test_cache_is_exact_where_stored_keys_cannot_go_stale(tiny_llada, prompts, cache, refresh):
    # With one layer, keys and values depend on their own token alone, and outside the block no token changes.
    model = tiny_llada(n_layers=1)
    widths = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, ids: widths.append(ids[0].shape[1]))
    config = replace(BLOCKS, stop_at_eos=False)
    exact = generate(model, *prompts, config)
    del widths[:]
    assert_same(generate(model, *prompts, replace(config, cache=cache, cache_refresh=refresh)), exact)
    window = {"prefix": [12, 6], "dual": [6, 6]}[cache]
    steps = [[18, width, width, width if refresh is None else 18] for width in window]
    assert widths == steps[0] + steps[1]


def test_window_of_an_unchanged_canvas_gets_the_logits_of_a_full_pass(model, prompts):
    ids, mask = prompts
    cache, window = WindowCache(), slice(2, 5)
    full = model(ids, mask, past_key_values=cache).logits
    cache.window = window
    part = model(ids[:, window], mask, position_ids=torch.arange(2, 5)[None], past_key_values=cache).logits
    seen = mask[:, window]
    torch.testing.assert_close(part[seen], full[:, window][seen], rtol=1e-5, atol=1e-5)


# Evaluation switches


def test_logits_eos_inf_never_draws_the_end_token(model, prompts):
    end = common_token(generate(without_end(model), *prompts, BLOCKS).completion_ids.tolist())
    model.generation_config.eos_token_id = end
    assert not generate(model, *prompts, BLOCKS).completion_mask.all()
    assert generate(model, *prompts, replace(BLOCKS, logits_eos_inf=True)).completion_mask.all()


@pytest.mark.parametrize("settings", [{}, *ALL_RULES.values()], ids=["fixed schedule", *ALL_RULES])
def test_confidence_eos_eot_inf_commits_end_tokens_last(model, prompts, settings):
    config = SamplerConfig(6, 6, 6, **settings)
    ends = generate(without_end(model), *prompts, config).completion_ids.flatten().bincount().topk(3).indices
    model.generation_config.eos_token_id = ends.tolist()
    canvases = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, ids: canvases.append(ids[0][:, -6:].clone()))
    generate(model, *copies(prompts, 1), replace(config, confidence_eos_eot_inf=True))
    postponed = 0
    for before, after in itertools.pairwise(torch.cat(canvases)):
        logits = plain(model)(torch.cat([prompts[0][0], before]))[-6:]
        best, token = logits.softmax(-1).index_fill(1, torch.tensor(MASK), -1).max(-1)
        is_end, is_open = torch.isin(token, ends), before == MASK
        if (is_open & ~is_end).any():
            assert not torch.isin(after[before != after], ends).any()
            postponed += int(is_end[best.masked_fill(~is_open, -1).argmax()])
    assert postponed


def test_an_end_token_waits_for_open_places_alone(model, prompts):
    # One open place of the first row beside six of the others: the five that are given keep it from nothing.
    fixed = torch.full((5, 6), -1)
    fixed[0, :5] = torch.arange(10, 15)
    config = SamplerConfig(6, 6, 6, threshold=1.0, confidence_eos_eot_inf=True)
    end = generate(without_end(model), *prompts, config, fixed=fixed).completion_ids[0, 5].item()
    assert end not in range(10, 15)
    model.generation_config.eos_token_id = end
    assert generate(model, *prompts, config, fixed=fixed).revealed_at[0].tolist() == [-1] * 5 + [0]


# What sampling leaves alone


@pytest.mark.parametrize("fails", [False, True])
def test_runs_in_eval_mode_without_gradients_and_restores_every_modules_mode(tiny_llada, prompts, fails):
    model = tiny_llada().train()
    model.model.transformer["blocks"][1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []

    def watch(block, *_):
        seen.append((block.training, torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("interrupted")

    model.model.transformer["blocks"][0].register_forward_hook(watch)
    if fails:
        with pytest.raises(RuntimeError, match="interrupted"):
            generate(model, *prompts, BLOCKS)
    else:
        rollout = generate(model, *prompts, BLOCKS)
        assert not rollout.confidence.requires_grad
    assert set(seen) == {(False, False)}
    assert {name: module.training for name, module in model.named_modules()} == before
    assert True in before.values()
    assert False in before.values()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_global_random_states_are_neither_read_nor_changed(model, prompts, remasking):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    config = replace(BLOCKS, temperature=1.0, remasking=remasking)
    before = states()
    first = generate(model, *prompts, config, generator=torch.Generator().manual_seed(1))
    assert states() == before
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        second = generate(model, *prompts, config, generator=torch.Generator().manual_seed(1))
    assert_same(first, second)


def test_inputs_are_not_changed(model, prompts):
    ids, mask = prompts
    fixed = torch.full((5, 12), -1)
    fixed[:, 3] = 4
    kept = ids.clone(), mask.clone(), fixed.clone()
    rollout = generate(model, ids, mask, replace(BLOCKS, cfg_scale=1.0), fixed=fixed)
    assert all(torch.equal(now, then) for now, then in zip((ids, mask, fixed), kept, strict=True))
    assert torch.equal(rollout.prompt_ids, ids)


# Several processes


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.3}], ids=["fixed schedule", "threshold"])
def test_ranks_agree_on_the_number_of_passes(tiny_llada, prompts, settings):
    ids, mask = prompts
    config = replace(BLOCKS, max_completion_length=24, diffusion_steps=16, **settings)
    models, rows = [tiny_llada(), tiny_llada()], [slice(0, 2), slice(2, 5)]
    free = generate(without_end(models[1]), ids, mask, config)
    models[0].generation_config.eos_token_id = free.completion_ids[:2, 6].tolist()
    alone = [generate(model, ids[part], mask[part], config) for model, part in zip(models, rows, strict=True)]
    assert alone[0].num_forwards < alone[1].num_forwards

    barrier, flags = threading.Barrier(2, timeout=600), [False, False]

    def job(rank: int) -> Rollout:
        def any_rank(flag: bool) -> bool:
            flags[rank] = bool(flag)
            barrier.wait()
            answer = any(flags)
            barrier.wait()
            return answer

        return generate(models[rank], ids[rows[rank]], mask[rows[rank]], config, any_rank=any_rank)

    with ThreadPoolExecutor(2) as pool:
        together = [future.result() for future in [pool.submit(job, rank) for rank in (0, 1)]]
    assert together[0].num_forwards == together[1].num_forwards
    for mine, theirs in zip(together, alone, strict=True):
        assert_same(mine, theirs)


def test_rows_of_one_prompt_share_the_first_pass(model, prompts):
    rows = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, ids: rows.append(len(ids[0])))
    generate(model, *prompts, replace(BLOCKS, temperature=1.0, stop_at_eos=False), row_keys=keys(5))
    assert rows == [4] + [5] * 7


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_completion_length": 0}, r"max_completion_length=0: must be at least 1"),
        ({"block_length": 0}, r"block_length=0: must be at least 1"),
        ({"diffusion_steps": 0}, r"diffusion_steps=0: must be at least 1"),
        ({"block_length": 5}, r"block_length=5: must divide max_completion_length=12"),
        ({"diffusion_steps": 1}, r"diffusion_steps=1: .*raise it to 2"),
        ({"diffusion_steps": 7}, r"diffusion_steps=7: must be a multiple of the number of blocks, 2"),
        ({"temperature": -0.5}, r"temperature=-0.5: must be 0 \(greedy\) or positive"),
        ({"cfg_scale": -1.0}, r"cfg_scale=-1.0: must be 0 \(off\) or positive"),
        ({"remasking": "confidence"}, r"remasking='confidence': choose low_confidence"),
        ({"cache": "full"}, r"cache='full': choose prefix or dual"),
        ({"cache_refresh": 2}, r"cache_refresh=2: needs cache=prefix or cache=dual"),
        ({"cache": "dual", "cache_refresh": 0}, r"cache_refresh=0: .*at least 1 step"),
        ({"cache": "dual", "cfg_scale": 1.0}, r"cache='dual': does not go with cfg_scale"),
        ({"threshold": 0.9, "factor": 1.0}, r"threshold=0.9: set only one of threshold, factor, ent"),
        ({"factor": 1.0, "remasking": "random"}, r"factor=1.0: .*remasking='random' sorts otherwise. Take low_conf"),
        ({"temperature": float("nan")}, r"temperature=nan: must be a finite number"),
        ({"temperature": float("inf")}, r"temperature=inf: must be a finite number"),
        ({"cfg_scale": float("inf")}, r"cfg_scale=inf: must be a finite number"),
        ({"threshold": float("nan")}, r"threshold=nan: must be a finite number"),
        ({"factor": float("inf")}, r"factor=inf: must be a finite number"),
        ({"entropy_bound": float("inf")}, r"entropy_bound=inf: must be a finite number"),
        ({"min_commit": 2}, r"min_commit=2: needs one of threshold"),
        ({"entropy_sum": 0.0}, r"entropy_sum=0.0: must be positive"),
        ({"top_k": 1}, r"top_k=1: .*set temperature=0"),
        ({"top_p": 0.0}, r"top_p=0.0: must be a share"),
        ({"factor": 1.0, "entropy_bound": 0.1}, r"factor=1.0: set only one of threshold, factor, entropy_bound"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_config_errors_name_field_value_and_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(BLOCKS, **settings)


def test_generate_refuses_what_it_cannot_sample(model, prompts):
    ids, mask = prompts
    with pytest.raises(ValueError, match=r"prompt_ids \[5, 6\] and prompt_mask \[5, 5\]"):
        generate(model, ids, mask[:, 1:], BLOCKS)
    with pytest.raises(ValueError, match="padded on the left"):
        generate(model, ids, mask.flip(1), BLOCKS)
    with pytest.raises(ValueError, match=r"temperature=1.0.*pass a torch.Generator"):
        generate(model, ids, mask, replace(BLOCKS, temperature=1.0))
    with pytest.raises(ValueError, match=r"remasking='random'.*pass a torch.Generator"):
        generate(model, ids, mask, replace(BLOCKS, remasking="random"))
    with pytest.raises(ValueError, match=r"fixed \[5, 3\] must be \[B, C\] = \[5, 12\]"):
        generate(model, ids, mask, BLOCKS, fixed=ids[:, :3])
    for name in ("fixed", "group"):
        with pytest.raises(ValueError, match=f"{name} is on meta, prompt_ids on cpu: move one to the other"):
            generate(model, ids, mask, BLOCKS, **{name: torch.full((5, 12), -1, device="meta")})
