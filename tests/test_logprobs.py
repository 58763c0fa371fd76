"""Scoring under masked views: equal to the plain definition, in value and in gradient, however the work is cut up."""

import contextlib
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import llada_logits, naive_scores
from trainers import EOS, MASK, VOCAB

from dgrpo.estimators import one_step
from dgrpo.logprobs import mean_entropy, per_token_logps, score_views
from dgrpo.models import ScoringHead, head
from dgrpo.models.families import FAMILIES
from dgrpo.views import MaskedViews
from dgrpo.vocabulary import row_products

COMPLETION = 5
ROW_BYTES = 4 * VOCAB


def inputs(rollout):
    return rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids


def random_views(rollout, num_views: int, seed: int = 0) -> MaskedViews:
    """Prompt and completion partly hidden, some hidden tokens not scored, uneven weights."""
    generator = torch.Generator().manual_seed(seed)
    (num_rows, num_prompt), num_completion = rollout.prompt_mask.shape, rollout.completion_ids.shape[1]
    hidden = torch.rand(num_rows, num_views, num_prompt + num_completion, generator=generator) < 0.6
    hidden[..., :num_prompt] &= rollout.prompt_mask[:, None]
    weights = torch.rand(num_rows, num_views, num_completion, generator=generator) + 0.5
    scored = hidden[..., num_prompt:] & (torch.rand(weights.shape, generator=generator) < 0.8)
    return MaskedViews(hidden, weights * scored * rollout.completion_mask[:, None]).check()


def shared_views(rollout, num_views: int = 1) -> MaskedViews:
    """One-step views that all rollouts of a prompt share."""
    draws = [
        one_step(rollout, generator=torch.Generator().manual_seed(i), p_mask_prompt=0.4) for i in range(num_views)
    ]
    return MaskedViews(torch.cat([d.hidden for d in draws], 1), torch.cat([d.weights for d in draws], 1))


def plain(model, dtype=torch.float64):
    state = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    return lambda ids: llada_logits(state, model.config, ids)


def expected_scores(model, rollout, views, **settings):
    with torch.no_grad():
        return naive_scores(plain(model), *inputs(rollout), views.hidden, views.weights, MASK, **settings)


def freeze_head(model):
    return model.get_output_embeddings().requires_grad_(False)


@pytest.fixture(params=[False, True], ids=["trained head", "frozen head"])
def frozen(request) -> bool:
    return request.param


# Values


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("views_per_pass", [None, 1, 2])
@pytest.mark.parametrize("chunked", [False, True], ids=["one chunk", "chunked"])
def test_scores_equal_the_naive_loop(model, rollout, monkeypatch, frozen, chunked, views_per_pass, temperature):
    if frozen:
        freeze_head(model)
    if chunked:
        monkeypatch.setattr(head, "MAX_LOGITS_BYTES", 3 * ROW_BYTES)
    views = random_views(rollout, 3)
    logps, entropies, _ = score_views(
        model, *inputs(rollout), views, views_per_pass=views_per_pass, temperature=temperature
    )
    expected = expected_scores(model, rollout, views, temperature=temperature)
    assert logps.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logps, expected[0].float(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropies, expected[1].float(), rtol=1e-5, atol=2e-5)
    assert (logps[views.weights == 0] == 0).all()
    assert (entropies[views.weights == 0] == 0).all()
    assert (logps[views.weights != 0] < 0).all()


@pytest.mark.parametrize("settings", [{"weight_tying": True}, {"embedding_size": 32}, {"n_kv_heads": 1}], ids=str)
def test_scores_of_other_shapes_equal_the_naive_loop(tiny_llada, rollout, settings):
    model, views = tiny_llada(**settings), random_views(rollout, 2)
    logps, entropies, _ = score_views(model, *inputs(rollout), views)
    expected = expected_scores(model, rollout, views)
    torch.testing.assert_close(logps, expected[0].float(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropies, expected[1].float(), rtol=1e-5, atol=2e-5)


def test_per_token_logps_is_the_weighted_sum_over_views(model, rollout):
    views = random_views(rollout, 3)
    every = per_token_logps(model, *inputs(rollout), views, reduce=None)
    assert every.shape == (6, 3, COMPLETION)
    torch.testing.assert_close(every, expected_scores(model, rollout, views)[0].float(), rtol=1e-5, atol=2e-5)
    total = per_token_logps(model, *inputs(rollout), views)
    torch.testing.assert_close(total, (views.weights * every).sum(1))
    with pytest.raises(ValueError, match=r"reduce='mean': choose 'sum'"):
        per_token_logps(model, *inputs(rollout), views, reduce="mean")


def test_mask_token_is_the_given_one(model, rollout):
    views = random_views(rollout, 1)
    other = score_views(model, *inputs(rollout), views, mask_token_id=3)[0]
    logits_of = plain(model)
    expected, _ = naive_scores(logits_of, *inputs(rollout), views.hidden, views.weights, 3)
    torch.testing.assert_close(other, expected.detach().float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_padding_row_order_and_company_change_nothing(model, rollout, kind):
    views = shared_views(rollout) if kind == "shared" else random_views(rollout, 2)
    prompt_ids, prompt_mask, completion_ids = inputs(rollout)
    together = torch.stack(score_views(model, prompt_ids, prompt_mask, completion_ids, views)[:2])

    order = torch.tensor([4, 2, 0, 5, 3, 1])
    shuffled = [tensor[order] for tensor in (prompt_ids, prompt_mask, completion_ids)]
    scores = score_views(model, *shuffled, MaskedViews(views.hidden[order], views.weights[order]))
    torch.testing.assert_close(torch.stack(scores[:2]), together[:, order], rtol=1e-5, atol=1e-5)

    pad = torch.nn.functional.pad
    wider = MaskedViews(pad(views.hidden, (3, 0)), views.weights)
    scores = score_views(model, pad(prompt_ids, (3, 0), value=2), pad(prompt_mask, (3, 0)), completion_ids, wider)
    torch.testing.assert_close(torch.stack(scores[:2]), together, rtol=1e-5, atol=1e-5)

    for row in range(6):
        start = int((~prompt_mask[row]).sum())
        alone = [tensor[row, None] for tensor in (prompt_ids[:, start:], prompt_mask[:, start:], completion_ids)]
        scores = score_views(model, *alone, MaskedViews(views.hidden[row, None, :, start:], views.weights[row, None]))
        torch.testing.assert_close(torch.stack(scores[:2]), together[:, row, None], rtol=1e-5, atol=1e-5)


def test_integer_prompt_mask_means_the_same(model, rollout):
    views = random_views(rollout, 1)
    prompt_ids, prompt_mask, completion_ids = inputs(rollout)
    expected = per_token_logps(model, prompt_ids, prompt_mask, completion_ids, views)
    assert torch.equal(per_token_logps(model, prompt_ids, prompt_mask.long(), completion_ids, views), expected)


def test_prompts_that_would_be_misread_are_refused(model, rollout):
    views = random_views(rollout, 1)
    prompt_ids, prompt_mask, completion_ids = inputs(rollout)
    with pytest.raises(ValueError, match="prompt_mask: prompts must be padded on the left"):
        per_token_logps(model, prompt_ids, prompt_mask.flip(1), completion_ids, views)
    empty = prompt_mask & (torch.arange(6) > 0)[:, None]
    per_token_logps(model, prompt_ids, empty, completion_ids, views)
    model.logit_shift = 1
    per_token_logps(model, prompt_ids, prompt_mask, completion_ids, views)
    with pytest.raises(ValueError, match="prompt_mask: a prompt is empty; give each at least one token"):
        per_token_logps(model, prompt_ids, empty, completion_ids, views)


@pytest.mark.parametrize("rows", [[0], [2], [0, 1, 2, 3, 4], [5]], ids=str)
def test_rows_without_any_scored_token_do_not_disturb_the_others(model, rollout, rows):
    views = random_views(rollout, 2)
    weights = views.weights.clone()
    weights[rows] = 0
    weights[3, 1] = 0
    fewer = MaskedViews(views.hidden, weights)
    logps, entropies, _ = score_views(model, *inputs(rollout), fewer, views_per_pass=1)
    expected = expected_scores(model, rollout, fewer)
    torch.testing.assert_close(logps, expected[0].float(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropies, expected[1].float(), rtol=1e-5, atol=2e-5)


def test_mean_entropy_averages_the_views_that_score_the_token(model, rollout):
    views = random_views(rollout, 3)
    _, entropies, _ = score_views(model, *inputs(rollout), views)
    averaged = mean_entropy(entropies, views)
    several = 0
    for row in range(6):
        for k in range(COMPLETION):
            told = [entropies[row, n, k].item() for n in range(3) if views.weights[row, n, k] != 0]
            assert averaged[row, k].item() == pytest.approx(sum(told) / len(told) if told else 0.0, abs=1e-6)
            several += len(told) > 1
    assert several


def test_bfloat16_weights_are_scored_in_float32(tiny_llada, rollout):
    low = tiny_llada(std=0.15).bfloat16()
    exact = tiny_llada()
    exact.load_state_dict(low.state_dict())
    views = random_views(rollout, 2)
    logps = per_token_logps(low, *inputs(rollout), views, reduce=None)
    expected = expected_scores(exact, rollout, views)[0]
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected.float(), rtol=0, atol=0.05)


# Gradients


def gradients_of(objective, model) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    objective.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def naive_gradients(model, rollout, views, coefficients, entropy_coefficients, temperature):
    """Plain autograd through the plain network, in float64."""
    leaves = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    logps, entropies = naive_scores(
        lambda ids: llada_logits(leaves, model.config, ids),
        *inputs(rollout),
        views.hidden,
        views.weights,
        MASK,
        temperature=temperature,
    )
    objective = (coefficients * views.weights * logps).sum() + (entropy_coefficients * entropies).sum()
    objective.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


@pytest.mark.parametrize("entropy_grad", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("chunked", [False, True], ids=["one chunk", "chunked"])
@pytest.mark.parametrize("kind", ["shared", "own"])
def test_gradients_equal_plain_autograd(model, rollout, monkeypatch, frozen, chunked, kind, entropy_grad):
    if frozen:
        freeze_head(model)
    if chunked:
        monkeypatch.setattr(head, "MAX_LOGITS_BYTES", 3 * ROW_BYTES)
    views = shared_views(rollout, 2) if kind == "shared" else random_views(rollout, 2)
    generator = torch.Generator().manual_seed(4)
    coefficients = torch.randn(6, 1, COMPLETION, generator=generator)
    entropy_coefficients = torch.randn(6, 2, COMPLETION, generator=generator) * entropy_grad
    expected = naive_gradients(model, rollout, views, coefficients, entropy_coefficients, temperature=0.8)
    for views_per_pass in (None, 1):
        logps, entropies, _ = score_views(
            model,
            *inputs(rollout),
            views,
            temperature=0.8,
            views_per_pass=views_per_pass,
            entropy_grad=entropy_grad,
        )
        assert entropies.requires_grad == entropy_grad
        objective = (coefficients * views.weights * logps).sum() + (entropy_coefficients * entropies).sum()
        gradients = gradients_of(objective, model)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 1e-5, (name, error)


def test_gradient_reaches_the_network_through_scored_positions_alone(model, rollout):
    views = random_views(rollout, 1)
    hidden_states = []

    def keep(norm, inputs, output):
        output.retain_grad()
        hidden_states.append(output)

    model.model.transformer["ln_f"].register_forward_hook(keep)
    per_token_logps(model, *inputs(rollout), views).sum().backward()
    [states] = hidden_states
    touched = states.grad.abs().sum(-1) > 0
    assert states.shape[1] == rollout.completion_ids.shape[1]
    scored = (views.weights[:, 0] != 0).sum(1)
    assert sorted(touched.sum(1).tolist()) == sorted(scored[scored > 0].tolist())


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_frozen_heads_gradient_is_right_where_the_model_is_sure(autocast):
    # The gradient W[t] - E_p[W] is then far smaller than its two terms, and must not drown in their rounding.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 64, generator=generator).bfloat16()
    hidden = (weight.float() * 0.22)[:30].bfloat16()  # likes the token of its own number
    targets = torch.arange(30)
    leaf = hidden.double().requires_grad_()
    log_probs = (leaf @ weight.double().T).log_softmax(-1)[targets, targets]
    assert log_probs.mean() > -0.01
    (expected,) = torch.autograd.grad(log_probs.sum(), leaf)

    dtype = torch.float32 if autocast else torch.bfloat16
    head = ScoringHead(64, 40, bias=False).to(dtype).requires_grad_(False)
    head.weight.copy_(weight)
    leaf = hidden.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logps = head(leaf, targets, targets).logps
    (gradient,) = torch.autograd.grad(logps.sum(), leaf)
    error = (gradient.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < (1e-4 if autocast else 0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_trained_bfloat16_head_has_the_right_gradients_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(rows, 64, generator=generator).bfloat16().cuda() for rows in (40, 30))
    targets = torch.arange(30, device="cuda")
    head = ScoringHead(64, 40, bias=False).to("cuda", torch.bfloat16)
    with torch.no_grad():
        head.weight.copy_(weight)
    leaf = hidden.clone().requires_grad_()
    gradients = torch.autograd.grad(head(leaf, targets, targets).logps.sum(), (leaf, head.weight))
    exact = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_probs = (exact[0] @ exact[1].T).log_softmax(-1)[targets, targets]
    for gradient, expected in zip(gradients, torch.autograd.grad(log_probs.sum(), exact), strict=True):
        assert (gradient.double() - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_nothing_scored_gives_zeros_that_still_have_a_graph(model, rollout, frozen, lora):
    # A rank whose rows are all skipped must make the same backward pass as the others.
    if frozen:
        freeze_head(model)
    if lora:
        model = with_lora(model)
    views = random_views(rollout, 2)
    views = MaskedViews(views.hidden, torch.zeros_like(views.weights))
    logps, entropies, _ = score_views(model, *inputs(rollout), views, views_per_pass=1)
    assert (logps == 0).all()
    assert (entropies == 0).all()
    gradients = gradients_of(logps.sum(), model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained
    assert all((gradient == 0).all() for gradient in gradients.values())


# Work


def rows_through_the_network(model) -> list[int]:
    rows = []
    wte = model.get_input_embeddings()
    wte.register_forward_pre_hook(lambda module, ids: rows.append(len(ids[0])))
    return rows


def test_equal_pictures_go_through_the_network_once(model, rollout):
    rows = rows_through_the_network(model)
    per_token_logps(model, *inputs(rollout), shared_views(rollout))
    assert rows == [2]  # two prompts
    own = one_step(rollout, generator=torch.Generator().manual_seed(1), p_mask_prompt=0.5, prompt_mask_scope="row")
    distinct = len({(tuple(rollout.prompt_ids[i].tolist()), tuple(own.hidden[i, 0].tolist())) for i in range(6)})
    assert distinct > 2
    per_token_logps(model, *inputs(rollout), own)
    assert rows[1:] == [distinct]


def test_equal_text_behind_another_padding_is_another_picture(model):
    # The padding itself does not count, its place does; and a real token that equals the pad is a token.
    prompt_ids = torch.tensor([[23, 5], [7, 5], [23, 5]])
    prompt_mask = torch.tensor([[False, True], [False, True], [True, True]])
    completion_ids = torch.tensor([[1, 2], [3, 4], [1, 2]])
    views = MaskedViews(torch.tensor([[[False, False, True, True]]]).expand(3, -1, -1), torch.ones(3, 1, 2))
    rows = rows_through_the_network(model)
    logps = per_token_logps(model, prompt_ids, prompt_mask, completion_ids, views)
    assert rows == [2]
    expected, _ = naive_scores(
        plain(model), prompt_ids, prompt_mask, completion_ids, views.hidden, views.weights, MASK
    )
    torch.testing.assert_close(logps, expected[:, 0].detach().float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("views_per_pass", [1, 2, 4])
def test_number_of_passes_depends_on_the_number_of_views_alone(model, rollout, views_per_pass):
    rows = rows_through_the_network(model)
    views = shared_views(rollout, 3)
    empty = MaskedViews(views.hidden, torch.zeros_like(views.weights))
    for each in (views, random_views(rollout, 3), empty):
        del rows[:]
        logps, *_ = score_views(model, *inputs(rollout), each, views_per_pass=views_per_pass)
        forward = {1: 3, 2: 2, 4: 1}[views_per_pass]
        assert len(rows) == forward
        logps.sum().backward()
        # Several passes are checkpointed: each runs once more for its gradient.
        assert len(rows) == (forward if forward == 1 else 2 * forward)


def test_head_is_asked_at_scored_positions_alone_and_in_chunks(model, rollout, monkeypatch):
    monkeypatch.setattr(head, "MAX_LOGITS_BYTES", 4 * ROW_BYTES)
    asked, sizes = [], []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    float_logits = head.float_logits

    def measured(hidden, weight):
        sizes.append(len(hidden))
        return float_logits(hidden, weight)

    monkeypatch.setattr(head, "float_logits", measured)
    views = random_views(rollout, 1)
    with torch.no_grad():
        per_token_logps(model, *inputs(rollout), views)
    assert asked == [int((views.weights != 0).sum())]
    assert sum(sizes) == asked[0] > 8
    assert max(sizes) == 4


# Adapters


def with_lora(model):
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=FAMILIES["llada"].lora_targets, r=2, init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return get_peft_model(model, lora).eval()


def test_scores_inside_peft_equal_those_of_the_merged_model(tiny_llada, rollout):
    views = random_views(rollout, 2)
    base = per_token_logps(tiny_llada(), *inputs(rollout), views)
    model = with_lora(tiny_llada())
    adapted = per_token_logps(model, *inputs(rollout), views, views_per_pass=1)
    assert (adapted - base).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(per_token_logps(model, *inputs(rollout), views), base)
    gradients = gradients_of(adapted.sum(), model)
    assert len(gradients) == 2 * 7 * 2
    assert all("lora_" in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())
    merged = per_token_logps(model.merge_and_unload(), *inputs(rollout), views)
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunked", [False, True], ids=["one chunk", "chunked"])
@pytest.mark.parametrize("views_per_pass", [None, 1])
def test_exact_kl_and_its_gradient_equal_plain_autograd(tiny_llada, rollout, monkeypatch, chunked, views_per_pass):
    model, views = with_lora(tiny_llada()), random_views(rollout, 2)
    coefficients = torch.randn(6, 2, COMPLETION, generator=torch.Generator().manual_seed(4))
    if chunked:
        monkeypatch.setattr(head, "MAX_LOGITS_BYTES", 3 * ROW_BYTES)
    scores = score_views(
        model,
        *inputs(rollout),
        views,
        mask_token_id=MASK,
        temperature=0.8,
        views_per_pass=views_per_pass,
        entropy_grad=True,
        as_reference=model.disable_adapter,
    )
    plainly = score_views(
        model, *inputs(rollout), views, mask_token_id=MASK, temperature=0.8, views_per_pass=views_per_pass
    )
    assert torch.equal(scores.logps, plainly.logps)
    assert plainly.divergences is None
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    canvases = views.canvases(ids, MASK).flatten(0, 1)
    mask = torch.cat([rollout.prompt_mask, torch.ones(6, COMPLETION, dtype=torch.bool)], 1).repeat_interleave(2, 0)

    def log_probs() -> torch.Tensor:
        logits = model(canvases, mask).logits[:, -COMPLETION:].unflatten(0, (6, 2))
        return (logits / 0.8).log_softmax(-1)

    with model.disable_adapter(), torch.no_grad():
        reference = log_probs()
    ours = log_probs()
    scored = views.weights != 0
    expected = (ours.exp() * (ours - reference)).sum(-1) * scored
    assert expected[scored].min() > 1e-3
    torch.testing.assert_close(scores.divergences, expected, rtol=1e-4, atol=1e-5)
    entropies = torch.special.entr(ours.exp()).sum(-1) * scored
    mixed = [
        (coefficients * (a + 0.5 * b + c * scored)).sum()
        for a, b, c in (
            (scores.divergences, scores.entropies, scores.logps),
            (
                expected,
                entropies,
                ours.gather(-1, rollout.completion_ids[:, None].expand(-1, 2, -1)[..., None])[..., 0],
            ),
        )
    ]
    found, wanted = (gradients_of(each, model) for each in mixed)
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() / wanted[name].norm() < 1e-4, name


def test_exact_kl_is_refused_for_a_head_that_is_trained(model, rollout):
    with pytest.raises(ValueError, match="exact KL needs a head that is not trained"):
        score_views(model, *inputs(rollout), random_views(rollout, 1), as_reference=contextlib.nullcontext)


# What scoring leaves alone


def test_global_random_states_and_inputs_stay_as_they_are(model, rollout):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    views = random_views(rollout, 2)
    kept = [tensor.clone() for tensor in (*inputs(rollout), views.hidden, views.weights)]
    before = states()
    logps, *_ = score_views(model, *inputs(rollout), views, views_per_pass=1, entropy_grad=True)
    logps.sum().backward()
    assert states() == before
    after = (*inputs(rollout), views.hidden, views.weights)
    assert all(torch.equal(now, then) for now, then in zip(after, kept, strict=True))


def test_tokens_after_the_end_do_not_leak_into_a_fully_hidden_completion(model, rollout):
    longer = replace(rollout, completion_ids=rollout.completion_ids.masked_fill(~rollout.completion_mask, EOS - 1))
    views = shared_views(rollout)
    expected = per_token_logps(model, *inputs(rollout), views)
    assert torch.equal(per_token_logps(model, *inputs(longer), views), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entropies_are_float32_under_autocast(model, rollout, dtype):
    generator = torch.Generator().manual_seed(0)
    views = one_step(rollout, generator=generator, p_mask_prompt=0.0)
    inputs = rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, views
    a, b = torch.rand(2, 3, 50, generator=generator)
    with torch.autocast("cpu", dtype), torch.no_grad():
        torch.testing.assert_close(row_products(a, b), (a * b).sum(1))
        scores = score_views(model, *inputs)
    assert (scores.logps.dtype, scores.entropies.dtype) == (torch.float32, torch.float32)
