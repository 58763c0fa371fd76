"""Networks that attend block by block: stored keys and the clean past against one plain pass for each question.

Texts have a prompt of 8 columns and a completion of 12, in blocks of 4; the padded ones lack one or both blocks of the
prompt. The first block of the completion holds the prompt's last token or two, which no copy hides.
"""

import published
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dgrpo.models import ScoringPass, attention, load_model
from dgrpo.models.blocks import BlockPast

B, P, C, N, MASK = 4, 8, 12, 3, published.NUM_WORDS - 1
KINDS = {"sdar": {}, "llada2": {}, "sdar_moe": {}, "fast_dllm": {}, "a2d-qwen3": {"block_length": B, "logit_shift": 1}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    return {kind: published.write_checkpoint(folder / kind, kind, **changes) for kind, changes in KINDS.items()}


@pytest.fixture(params=KINDS)
def model(request, folders):
    return load_model(folders[request.param])[0]


def texts(padded: bool, num_given: int = 0) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Clean texts [6, 20], their mask, copies [6, 3, 12] and which of their positions are asked.

    Rows 0 to 2 share a prompt, as do 3 and 4.
    """
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, published.NUM_WORDS - 8, (6, P + C), generator=generator)
    ids[1:3, :P], ids[4, :P] = ids[0, :P], ids[3, :P]
    mask = None
    if padded:
        mask = torch.arange(P + C) >= torch.tensor([4, 4, 4, 8, 8, 0])[:, None]
        ids = ids.masked_fill(~mask, published.NUM_WORDS - 7)
    hidden = torch.rand(6, N, C, generator=generator) < 0.5
    hidden[..., :num_given] = False
    # A text's very first token is given: no prompt is empty.
    hidden[3:5, :, 0] = False
    # A block that one copy shows whole, and a row that asks less than the others.
    hidden[:, 1, 4:8] = False
    hidden[2, 2] = False
    asked = hidden & (torch.rand(6, N, C, generator=generator) < 0.8)
    return ids, mask, ids[:, None, P:].masked_fill(hidden, MASK), asked


def scoring_pass(ids, mask, copies, asked, **settings) -> ScoringPass:
    positions = asked.flatten().nonzero()[:, 0]
    targets = ids[:, None, P:].expand(-1, N, -1).flatten()[positions]
    return ScoringPass(ids, mask, positions, torch.arange(len(positions)), targets, copies=copies, **settings)


def one_at_a_time(model, ids, mask, copies, asked) -> Tensor:
    """log p of what is asked: for each copy and each of its blocks one pass over [clean past, that block]."""
    logps = torch.zeros(copies.shape)
    for copy in range(N):
        for start in range(0, C, B):
            stop = P + start + B
            row = torch.cat([ids[:, : P + start], copies[:, copy, start : start + B]], 1)
            logits = model(row, None if mask is None else mask[:, :stop]).logits[:, -B:]
            words = ids[:, P + start : stop, None]
            logps[:, copy, start : start + B] = logits.log_softmax(-1).gather(-1, words)[..., 0]
    return logps[asked]


def packed(model, ids, mask, copies, asked) -> Tensor:
    """The same from one row [clean text without its last block | all copies], as it is trained by others."""
    clean = P + C - B
    row = torch.cat([ids[:, :clean], copies.flatten(1)], 1)
    columns = torch.cat([torch.arange(clean), P + torch.arange(C).repeat(N)])[None]
    copy = torch.cat([torch.zeros(clean), torch.arange(1, N + 1).repeat_interleave(C)])[None]
    visible = attention.see(columns // B, columns // B, copy, copy)
    position_ids, padding = columns, None
    if mask is not None:
        position_ids = attention.positions_of(mask)[:, columns[0]]
        padding = torch.cat([mask[:, :clean], mask.new_ones(6, N * C)], 1)
    hidden = model.hidden_states(row, padding, position_ids, None, visible)
    states = hidden[:, clean:].unflatten(1, (N, C))
    if model.logit_shift:
        states = torch.cat([states[:, :, :1], states[:, :, :-1]], 2)
        states[:, :, ::B] = hidden[:, None, P - 1 : clean : B]
    logps = model.get_output_embeddings()(states).log_softmax(-1)
    return logps.gather(-1, ids[:, None, P:, None].expand(-1, N, -1, 1))[..., 0][asked]


def gradients(loss: Tensor, model) -> dict[str, Tensor]:
    weights = dict(model.named_parameters())
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * largest.item(), msg=name)


@pytest.mark.parametrize("num_given", [0, 2])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_copies_on_the_clean_past_equal_one_pass_for_each_block_and_the_packed_row(model, padded, num_given):
    case = texts(padded, num_given)
    expected = one_at_a_time(model, *case)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(6))
    right = gradients((weights * expected).sum(), model)
    row = packed(model, *case)
    torch.testing.assert_close(row, expected, rtol=0, atol=2e-5)
    assert_equal_gradients(gradients((weights * row).sum(), model), right)
    for chunk in (1, 8, 32):
        [scores] = model(passes=[scoring_pass(*case, chunk=chunk)])
        torch.testing.assert_close(scores.logps, expected, rtol=0, atol=2e-5)
        assert_equal_gradients(gradients((weights * scores.logps).sum(), model), right)


@pytest.mark.parametrize("layers_too", [False, True], ids=["chunks", "chunks and layers"])
def test_recomputing_changes_neither_scores_nor_gradients(model, layers_too):
    case = texts(True)
    [expected] = model(passes=[scoring_pass(*case)])
    right = gradients(expected.logps.sum(), model)
    if layers_too:
        model.activation_checkpointing_enable()
        model.train()
    lengths = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda _, __, x: lengths.append(x.shape[1]))
    [scores] = model(passes=[scoring_pass(*case, chunk=8, recompute=True)])
    torch.testing.assert_close(scores.logps, expected.logps, rtol=0, atol=1e-5)
    num_forward = len(lengths)
    assert num_forward == 2 + 2
    assert_equal_gradients(gradients(scores.logps.sum(), model), right)
    # Each chunk once more; with checkpointed layers everything once more, and chunks inside chunks.
    assert len(lengths) == (2 + 2 + 2 + 2 + 2 if layers_too else 2 + 2 + 2)


def test_a_prompt_goes_through_the_network_once_and_blocks_that_nobody_asks_about_not_at_all(model):
    ids, mask, copies, asked = texts(False)
    asked = asked & (torch.arange(C) >= 4) & (torch.arange(N)[:, None] != 1)
    seen = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda _, __, x: seen.append(tuple(x.shape[:2])))
    model(passes=[scoring_pass(ids, mask, copies, asked)])
    # Three distinct prompts, six completions without their last block, and two copies of two blocks.
    assert seen == [(3, P), (6, C - B), (6, 2 * 2 * B)]
    # Nor do clean blocks behind the last one that is asked about; one always goes, so that ranks agree on the passes.
    for num_columns, num_clean in ((8, B), (4, B)):
        early, seen[:] = asked | (torch.arange(C) == 1), []
        early = early & (torch.arange(C) < num_columns)
        [scores] = model(passes=[scoring_pass(ids, mask, copies, early, chunk=4)])
        assert seen[:2] == [(3, P), (6, num_clean)]
        assert len(seen) == 2 + C // 4
        torch.testing.assert_close(scores.logps, one_at_a_time(model, ids, mask, copies, early), rtol=0, atol=2e-5)


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged commits"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_stored_blocks_answer_like_a_pass_over_everything(model, padded, merged):
    """As a sampler asks: prompts once, a step on each block, its final tokens stored alone or with the next step."""
    ids, mask, copies, _ = texts(padded)
    firsts, copy_of = [0, 3, 5], torch.tensor([0, 0, 0, 1, 1, 2])
    past = BlockPast(P + C + B)
    model(ids[firsts, :P], None if mask is None else mask[firsts, :P], past_key_values=past, columns=slice(0, 1))
    past.commit(P)
    past.select(copy_of)

    def ask(tokens: Tensor) -> Tensor:
        seen = None if mask is None else mask.new_ones(6, past.length + tokens.shape[1])
        if seen is not None:
            seen[:, :P] = mask[:, :P]
        return model(tokens, seen, past_key_values=past).logits

    for start in range(0, C, B):
        stop = P + start + B
        noisy = copies[:, 0, start : start + B]
        everything = torch.cat([ids[:, : stop - B], noisy], 1)
        expected = model(everything, None if mask is None else mask[:, :stop]).logits[:, -B:]
        if merged and start:
            logits = ask(torch.cat([ids[:, stop - 2 * B : stop - B], noisy], 1))[:, B:]
            past.commit(B)
        else:
            logits = ask(noisy)
        # A shifted family reads a block's first token in the pass that stores what comes before it.
        shift = model.logit_shift
        known = slice(0 if merged and start else shift, B)
        torch.testing.assert_close(logits[:, known], expected[:, known], rtol=0, atol=2e-5)
        torch.testing.assert_close(ask(noisy)[:, shift:], expected[:, shift:], rtol=0, atol=2e-5)
        if not merged:
            ask(ids[:, stop - B : stop])
            past.commit(B)
    past.select(torch.tensor([4, 1]))
    assert past.keys[0].shape[0] == 2
    with pytest.raises(ValueError, match="capacity=24"):
        model(ids, past_key_values=past)


def test_sdar_is_qwen3_under_a_mask_of_blocks(folders):
    model, _ = load_model(folders["sdar"])
    config = Qwen3Config(**{key: value for key, value in published.CONFIGS["sdar"].items() if key != "model_type"})
    qwen = Qwen3ForCausalLM(config).eval()
    qwen.load_state_dict(model.state_dict())
    ids = texts(False)[0]
    block = torch.arange(P + C) // B
    blocks = (block <= block[:, None])[None, None].expand(len(ids), -1, -1, -1)
    torch.testing.assert_close(model(ids).logits, qwen(ids, attention_mask=blocks).logits, rtol=0, atol=1e-5)
    causal = qwen(ids).logits
    assert (model(ids).logits - causal).abs().max() > 1e-2


def test_llada2_is_glm4_moe_under_other_names_also_where_the_bias_changes_the_choice(folders):
    """transformers' network of the same arithmetic, its router in float32, its experts stacked."""
    model, _ = load_model(folders["llada2"])
    told = published.CONFIGS["llada2"]
    shared = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
    )
    shared += ("moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace")
    shared += ("num_hidden_layers", "routed_scaling_factor", "rms_norm_eps", "norm_topk_prob")
    names = {"n_routed_experts": told["num_experts"], "n_shared_experts": 1, "use_qk_norm": True}
    rope = {"rope_type": "default", "rope_theta": told["rope_theta"], "partial_rotary_factor": 0.5}
    config = Glm4MoeConfig(
        **{key: told[key] for key in shared}, **names, rope_parameters=rope, num_nextn_predict_layers=0
    )
    glm = Glm4MoeForCausalLM(config).eval()
    weights = published.in_llama_s_names(published.random_weights(told), told)
    for layer in range(1, told["num_hidden_layers"]):
        stem = f"model.layers.{layer}.mlp"
        gate, up, down = (
            torch.stack([weights.pop(f"{stem}.experts.{e}.{name}_proj.weight") for e in range(told["num_experts"])])
            for name in ("gate", "up", "down")
        )
        weights[f"{stem}.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        weights[f"{stem}.experts.down_proj"] = down
        weights[f"{stem}.gate.e_score_correction_bias"] = weights.pop(f"{stem}.gate.expert_bias")
    glm.load_state_dict(weights)
    ids = texts(False)[0]
    block = torch.arange(P + C) // B
    blocks = (block <= block[:, None])[None, None].expand(len(ids), -1, -1, -1)
    expected = glm(ids, attention_mask=blocks).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    router = model.model.layers[1].mlp.gate
    tokens = torch.randn(50, 32, generator=torch.Generator().manual_seed(7))
    with_bias = router(tokens)[0].sort(1).values
    router.expert_bias.zero_()
    assert (router(tokens)[0].sort(1).values != with_bias).any(1).float().mean() > 0.2


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_blocks_of_one_token_are_the_causal_model_and_a_block_of_all_is_full_attention(tmp_path, kind):
    folder = published.write_checkpoint(tmp_path, kind)
    ids, mask, copies, asked = texts(False)
    causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, tokenizer = load_model(folder, convert="block", block_length=1)
    # The mask's row of the head has become the mean word, and weighs in the softmax.
    causal.lm_head.weight.data = model.get_output_embeddings().weight.data
    expected = causal(ids).logits[:, P - 1 : -1].log_softmax(-1).gather(-1, ids[:, P:, None])[..., 0]
    assert (tokenizer.mask_token_id, model.block_length, model.logit_shift) == (MASK, 1, 1)
    # Hidden or not, a block's only token is predicted from the clean text before it.
    copies = torch.full_like(copies, MASK)
    [scores] = model(passes=[scoring_pass(ids, mask, copies, torch.ones_like(asked))])
    torch.testing.assert_close(scores.logps.view(6, N, C), expected[:, None].expand(-1, N, -1), rtol=0, atol=1e-5)
    whole, _ = load_model(folder, convert="block", block_length=32)
    both, _ = load_model(folder, convert="bidirectional")
    torch.testing.assert_close(whole(ids).logits, both(ids).logits, rtol=0, atol=1e-6)
    assert (model(ids).logits - both(ids).logits).abs().max() > 1e-2


def test_rows_that_are_no_whole_blocks_are_refused(model):
    asked = scoring_pass(*texts(False))
    for wrong in (asked._replace(chunk=0), asked._replace(input_ids=asked.input_ids[:, 1:])):
        with pytest.raises(ValueError, match="must be whole blocks of block_length=4"):
            model(passes=[wrong])
