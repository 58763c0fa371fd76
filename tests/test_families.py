"""The networks of every family: equal to the published equations, in both directions, shifted where they should be."""

import re

import published
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from reference import denoise_greedily

from dgrpo.logprobs import log_likelihood, per_token_logps
from dgrpo.models import ScoringHead, load_model
from dgrpo.models.adapters import merged_adapters
from dgrpo.models.dream import DreamConfig
from dgrpo.models.experts import _one_by_one, can_group, grouped
from dgrpo.models.families import FAMILIES
from dgrpo.models.llada_moe import LLaDAMoEConfig
from dgrpo.sampling import SamplerConfig, generate
from dgrpo.sampling.cache import WindowCache
from dgrpo.views import MaskedViews

# How far the logits are shifted, and how many linear layers LoRA adapts in two layers of the network.
FULL = {"dream": (1, 14), "llada_moe": (0, 8), "a2d-qwen2": (0, 14), "a2d-qwen3": (0, 14), "a2d-llama": (0, 14)}
BLOCKS = {"sdar": (0, 14), "llada2": (0, 15), "sdar_moe": (0, 8), "fast_dllm": (1, 14)}
KINDS = FULL | BLOCKS
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
# Every token sees every token.
EVERY_FULL_KIND = pytest.mark.parametrize("kind", FULL)
MASK = published.NUM_WORDS - 1
BIAS = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return {kind: published.write_checkpoint(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def networks(folders):
    """Each kind's network, float32; not to be changed."""
    return {kind: load_model(folder)[0] for kind, folder in folders.items()}


@pytest.fixture
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Four texts of lengths 9, 9, 4 and 6, padded on the left."""
    ids = torch.randint(0, published.NUM_WORDS - 8, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(9) >= 9 - torch.tensor([9, 9, 4, 6])[:, None]
    return ids.masked_fill(~mask, published.NUM_WORDS - 7), mask


def equations(kind: str, **changes):
    """The published network as a function of one text, from the stored tensors."""
    config = published.CONFIGS[kind] | changes
    weights = published.random_weights(config)
    return lambda ids: published.logits(weights, config, ids, KINDS[kind][0])


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within 1e-5 of the largest logit."""
    torch.testing.assert_close(logits, expected.to(logits.dtype), rtol=0, atol=1e-5 * expected.abs().max().item())


@EVERY_KIND
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_rows_equal_the_published_equations(folders, texts, kind, attention):
    ids, mask = texts
    model, _ = load_model(folders[kind], attn_implementation=attention)
    assert model.config._attn_implementation == attention
    logits, logits_of = model(ids, mask).logits, equations(kind)
    for row in range(len(ids)):
        assert_close(logits[row, mask[row]][1:], logits_of(ids[row, mask[row]])[1:])
    assert_close(model(ids[:1]).logits[0], logits_of(ids[0]))


@EVERY_KIND
@pytest.mark.parametrize("columns", [slice(0, 3), slice(4, 9)])
def test_logits_at_some_columns_are_those_of_the_whole(networks, texts, kind, columns):
    ids, mask = texts
    length = ids.shape[1]
    positions = torch.cat([torch.arange(length)[columns], 3 * length + torch.arange(length)[columns]])
    whole = networks[kind](ids, mask).logits.flatten(0, 1)[positions]
    seen = mask.flatten()[positions]
    logits = networks[kind](ids, mask, positions=positions, columns=columns)
    assert_close(logits[seen], whole[seen])


@EVERY_KIND
def test_bfloat16_stays_within_its_rounding(tmp_path, texts, kind):
    ids, mask = texts
    config = published.CONFIGS[kind]
    weights = published.random_weights(config, dtype=torch.bfloat16)
    model, _ = load_model(published.write_checkpoint(tmp_path, kind, weights), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in model.named_buffers() if "expert_bias" in name} <= {torch.float32}
    logits = model(ids, mask).logits
    expected = published.logits(weights, config, ids[0], KINDS[kind][0])
    # A token whose experts are near a tie may choose others; the others' logits are within rounding.
    error = (logits[0] - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.sort().values[: len(ids[0]) if kind != "llada2" else 6].max().item() < 0.03


@EVERY_FULL_KIND
def test_attention_looks_both_ways(networks, kind):
    model = networks[kind]
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, -1] = 17
    assert (model(ids).logits - model(changed).logits)[0].abs().amax(-1).gt(1e-4).all()


@EVERY_KIND
def test_checkpointing_gives_equal_gradients_and_runs_layers_twice(folders, texts, kind):
    ids, mask = texts
    gradients, calls = [], []
    for checkpointing in (False, True):
        model, _ = load_model(folders[kind])
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        count = []
        model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, count=count: count.append(1))
        model(ids, mask).logits[mask].square().mean().backward()
        calls.append(len(count))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert calls == [1, 2]
    # An expert that no token chose has a gradient of zero, but it has one.
    assert all(gradient is not None for gradient in gradients[0].values())
    assert all(gradient.any() for name, gradient in gradients[0].items() if "experts" not in name)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@EVERY_KIND
def test_lora_reaches_the_intended_linears_and_never_the_head(folders, texts, kind):
    ids, mask = texts
    model, _ = load_model(folders[kind])
    targets = FAMILIES[model.config.model_type].lora_targets
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=2, init_lora_weights=False)
    plain = model(ids, mask).logits
    adapted = get_peft_model(model, lora)
    names = [name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)]
    assert len(names) == KINDS[kind][1]
    linears = r"self_attn\.[qkvo]_proj|attention\.(query_key_value|dense)|mlp\.(shared_experts\.)?(gate|up|down)_proj"
    assert all(re.search(rf"layers\.[012]\.({linears})$", name) for name in names)
    assert type(adapted.get_output_embeddings()) is ScoringHead
    assert (adapted(ids, mask).logits - plain).abs().max() > 0.1
    with adapted.disable_adapter():
        assert_close(adapted(ids, mask).logits, plain)


def test_folding_in_puts_back_the_biases_that_lora_trains(folders, texts):
    model, _ = load_model(folders["dream"])
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, lora_bias=True)
    adapted = get_peft_model(model, lora).eval()
    for name, bias in adapted.named_parameters():
        if name.endswith("lora_B.default.bias"):
            bias.data += 0.3
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    expected = adapted(*texts).logits
    with merged_adapters(adapted):
        assert not torch.equal(adapted.state_dict()[BIAS], before[BIAS])
        assert_close(adapted(*texts).logits, expected)
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.state_dict().items())


def test_an_adapter_that_is_merged_already_is_not_folded_in_twice(folders, texts):
    model, _ = load_model(folders["dream"])
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)).eval()
    adapted.merge_adapter()
    expected = adapted(*texts).logits
    with (
        pytest.raises(ValueError, match=r"merge_adapter_for_rollouts=True.*unmerge_adapter"),
        merged_adapters(adapted),
    ):
        pass
    assert_close(adapted(*texts).logits, expected)


@EVERY_KIND
def test_what_trl_peft_and_transformers_look_for(networks, kind):
    model = networks[kind]
    assert type(model.get_output_embeddings()) is ScoringHead
    assert model.config.auto_map == published.CONFIGS[kind].get("auto_map", {})
    assert not model.can_generate()
    assert model.generation_config.pad_token_id == published.NUM_WORDS - 7
    # TRL would ask for a load-balancing loss.
    assert not hasattr(model.config, "output_router_logits")
    with pytest.raises(TypeError, match=r"dgrpo\.generate"):
        model.prepare_inputs_for_generation(torch.zeros(1, 1, dtype=torch.long))
    assert DreamConfig().auto_map == LLaDAMoEConfig().auto_map == {}


@EVERY_FULL_KIND
def test_scores_are_those_of_the_predicted_token(networks, texts, kind):
    """Scoring, and with it SFT, RL and likelihood, reads the row that predicts the token, wherever it is."""
    ids, mask = texts
    prompt_ids, completion_ids, prompt_mask = ids[:, :6], ids[:, 6:], mask[:, :6]
    hidden = torch.zeros(4, 2, 9, dtype=torch.bool)
    hidden[:, 0, 6:], hidden[:, 1, 7:] = True, True
    # The prompt's last token is hidden in one picture of one row: it then answers for the first completion token.
    hidden[1, 0, 5] = True
    views = MaskedViews(hidden, hidden[..., 6:].float())
    model = networks[kind]
    logps = per_token_logps(model, prompt_ids, prompt_mask, completion_ids, views, reduce=None)
    logits_of = equations(kind)
    for row in range(4):
        for view in range(2):
            picture = ids[row].masked_fill(hidden[row, view], MASK)[mask[row]]
            expected = logits_of(picture).log_softmax(-1)[-3:].gather(1, completion_ids[row][:, None])[:, 0]
            scored = views.weights[row, view] != 0
            torch.testing.assert_close(logps[row, view][scored], expected[scored].float(), rtol=0, atol=3e-5)


@EVERY_FULL_KIND
def test_sampler_equals_the_published_loop_on_the_published_equations(networks, texts, kind):
    ids, mask = texts
    config = SamplerConfig(max_completion_length=6, block_length=3, diffusion_steps=4, stop_at_eos=False)
    rollout = generate(networks[kind], ids, mask, config)
    for row in range(1, len(ids)):
        canvas = torch.full((6,), MASK)
        expected, when = denoise_greedily(equations(kind), ids[row, mask[row]], canvas, MASK, block_length=3, steps=4)
        length = int(rollout.completion_mask[row].sum())
        assert torch.equal(rollout.completion_ids[row, :length], expected[:length])
        assert torch.equal(rollout.revealed_at[row], when)


@EVERY_FULL_KIND
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_window_of_an_unchanged_canvas_answers_like_a_full_pass(networks, texts, kind, cache):
    """Block by block: stored and fresh keys agree as long as no token changes, so a cached step is the exact one."""
    ids, mask = texts
    canvas = torch.cat([ids, torch.full((4, 8), MASK)], 1)
    keys = torch.cat([mask, torch.ones(4, 8, dtype=torch.bool)], 1)
    model = networks[kind]
    expected = model(canvas, keys).logits
    for begin in (9, 13):
        store = WindowCache()
        assert_close(model(canvas, keys, past_key_values=store).logits, expected)
        start, stop = begin - model.logit_shift, begin + 4 if cache == "dual" else 17
        store.window = slice(start, stop)
        positions = torch.arange(start, stop)[None]
        window = model(canvas[:, start:stop], keys, position_ids=positions, past_key_values=store).logits
        assert_close(window[:, begin - start :], expected[:, begin:stop])


@EVERY_FULL_KIND
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cached_sampling_is_exact_when_refreshed_and_asks_the_right_rows_when_not(
    networks, texts, kind, cache, monkeypatch
):
    ids, mask = texts
    model, forward, asked = networks[kind], networks[kind].forward, []
    settings = {"max_completion_length": 8, "block_length": 4, "diffusion_steps": 8, "stop_at_eos": False}
    expected = generate(model, ids, mask, SamplerConfig(**settings))
    refreshed = generate(model, ids, mask, SamplerConfig(**settings, cache=cache, cache_refresh=1))
    assert torch.equal(refreshed.completion_ids, expected.completion_ids)
    torch.testing.assert_close(refreshed.confidence, expected.confidence, rtol=1e-4, atol=1e-5)

    def noting(input_ids, attention_mask, *, position_ids, positions, **settings):
        if position_ids is not None:
            asked.append((input_ids.shape[1], position_ids[0].tolist(), positions))
        return forward(input_ids, attention_mask, position_ids=position_ids, positions=positions, **settings)

    monkeypatch.setattr(model, "forward", noting)
    stale = generate(model, ids, mask, SamplerConfig(**settings, cache=cache))
    first = expected.revealed_at == 0
    assert torch.equal(stale.revealed_at == 0, first)
    assert torch.equal(stale.completion_ids[first], expected.completion_ids[first])
    # Three steps of each block see a window that holds the block and, for its first token, what comes before it.
    assert len(asked) == 6
    for step, (width, places, positions) in enumerate(asked):
        begin = 9 + 4 * (step // 3)
        stop = begin + 4 if cache == "dual" else 17
        assert places == list(range(begin - model.logit_shift, stop))
        assert width == len(places)
        predicted = positions % width + places[0]
        assert predicted.min() >= begin
        assert predicted.max() < begin + 4


def test_likelihood_of_a_shifted_family_is_the_chain_over_its_predictions(networks):
    """With one token to score, the likelihood bound is exact: log p of that token, read one position earlier."""
    model = networks["dream"]
    prompt, completion = torch.tensor([[5, 6, 7]]), torch.tensor([[9]])
    estimate = log_likelihood(model, prompt, completion, 1, generator=torch.Generator())
    expected = equations("dream")(torch.tensor([5, 6, 7, MASK]))[3].log_softmax(-1)[9]
    torch.testing.assert_close(estimate[0], expected.float(), rtol=0, atol=3e-5)


def test_every_expert_is_called_and_only_the_chosen_ones_answer(folders):
    model, _ = load_model(folders["llada_moe"])
    block = model.model.layers[0].mlp
    sizes = []
    for expert in block.experts:
        expert.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(4))
    block(x)
    assert len(sizes) == 6
    assert sorted(sizes) == [0, 0, 0, 0, 1, 1]
    together = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(5))
    alone = torch.stack([torch.cat([block(token[None, None]) for token in row], 1)[0] for row in together])
    torch.testing.assert_close(block(together), alone, rtol=0, atol=1e-6)


def test_experts_in_one_product_equal_experts_one_by_one(folders):
    model, _ = load_model(folders["llada_moe"], torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    counts = torch.tensor([3, 0, 5, 1, 0, 2])
    generator = torch.Generator().manual_seed(4)
    answers = []
    for compute in (grouped, _one_by_one):
        x = torch.randn(11, 32, generator=generator.manual_seed(4)).bfloat16().requires_grad_()
        answer = compute(experts, x, counts)
        weights = torch.randn(answer.shape, generator=generator).bfloat16()
        parameters = [x, *experts.parameters()]
        answers.append([answer, *torch.autograd.grad((answer * weights).sum(), parameters)])
    for one, other in zip(*answers, strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()
    # A CPU has nothing to wait for, and 4-bit or adapted weights cannot be put side by side.
    assert not can_group(experts, x)


def test_no_head_matches_a_lora_target_and_no_two_families_share_a_checkpoint():
    heads = ("lm_head", "model.transformer.ff_out", "tied_head", "model.embed_tokens", "model.transformer.wte")
    for family in FAMILIES.values():
        for name in [*heads, *(f"base_model.model.{head}" for head in heads)]:
            assert re.fullmatch(family.lora_targets, name) is None
    keys = [(model_type, family.marked_by) for family in FAMILIES.values() for model_type in family.model_types]
    assert len(set(keys)) == len(keys)
    assert [key for key, family in FAMILIES.items() if family.config_class.model_type != key] == []
    shifted = {"Dream", "Fast_dLLM_Qwen"}
    assert {key for key, family in FAMILIES.items() if getattr(family.config_class, "logit_shift", 0)} == shifted


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_dropout": 0.1},
        {"clip_qkv": 8.0},
        {"moe_layer_freq": [1, 0]},
        {"moe_router_enable_expert_bias": True},
        {"shared_expert_intermediate_size": 16},
        {"tie_word_embeddings": True},
        {"hidden_act": "gelu"},
        {"partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_refuses_another_network_under_llada_moe_s_name(changes):
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        LLaDAMoEConfig(**(published.CONFIGS["llada_moe"] | changes))


def test_refuses_block_causal_dreams_and_sliding_windows(tmp_path):
    with pytest.raises(ValueError, match="block_size=32"):
        load_model(published.write_checkpoint(tmp_path / "blocks", "dream", block_size=32))
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    with pytest.raises(ValueError, match="sliding_attention.*use_sliding_window"):
        load_model(published.write_checkpoint(tmp_path / "windows", "dream", **sliding))
