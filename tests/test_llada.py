"""LLaDA's network and its loading: equal to the published equations, readable and writable in the published layout."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import llada_logits
from safetensors.torch import load_file, save_file
from trainers import MASK
from transformers import LlamaConfig

from dgrpo.models import ScoringHead, load_model
from dgrpo.models.families import FAMILIES
from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM

SHAPES = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "tied": {"weight_tying": True},
    "padded vocabulary": {"embedding_size": 32},
    "far rotary base": {"rope_theta": 500000.0, "mlp_hidden_size": None, "mlp_ratio": 2},
}
# What LLaDA-8B-Instruct's config.json says besides sizes and token ids.
PUBLISHED = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM", "AutoConfig": "configuration_llada.LLaDAConfig"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "multi_query_attention": None,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
    "use_cache": False,
    "weight_tying": False,
}
EVERY_SHAPE = pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES.keys())


def saved(model, tokenizer, folder, **settings) -> str:
    model.save_pretrained(folder, **settings)
    tokenizer.save_pretrained(folder)
    return str(folder)


def assert_close(logits, expected) -> None:
    """Equal within 1e-5 of the largest logit."""
    torch.testing.assert_close(logits, expected.to(logits.dtype), rtol=0, atol=1e-5 * expected.abs().max().item())


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@EVERY_SHAPE
def test_logits_equal_the_published_equations(tiny_llada, settings):
    model = tiny_llada(**settings)
    state = {name: weight.double() for name, weight in model.state_dict().items()}
    ids = torch.randint(0, model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([llada_logits(state, model.config, row) for row in ids])
    logits = model(ids).logits
    assert logits.shape == (3, 9, model.config.embedding_size)
    assert_close(logits, expected)


def test_attention_looks_both_ways(model):
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, -1] = 17
    assert (model(ids).logits - model(changed).logits)[0].abs().amax(-1).gt(1e-4).all()


@EVERY_SHAPE
def test_eager_equals_sdpa(tiny_llada, prompts, settings):
    ids, mask = prompts
    sdpa = tiny_llada(**settings, attn_implementation="sdpa")
    eager = tiny_llada(**settings, attn_implementation="eager")
    assert (sdpa.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    assert_close(eager(ids, mask).logits[mask], sdpa(ids, mask).logits[mask])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_rows_equal_the_same_rows_without_padding(tiny_llada, prompts, attention):
    ids, mask = prompts
    model = tiny_llada(attn_implementation=attention)
    logits = model(ids, mask).logits
    for row in range(len(ids)):
        expected = llada_logits(model.state_dict(), model.config, ids[row, mask[row]])
        assert_close(logits[row, mask[row]], expected)


def test_positions_select_rows_of_the_full_logits(model, prompts):
    ids, mask = prompts
    positions = torch.tensor([0, 5, 11, 23, 29])
    expected = model(ids, mask).logits.flatten(0, 1)[positions]
    torch.testing.assert_close(model(ids, mask, positions=positions), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_last_layer_computes_the_asked_columns_alone(tiny_llada, prompts, attention):
    ids, mask = prompts
    model, length = tiny_llada(attn_implementation=attention), ids.shape[1]
    positions = torch.tensor([2, 3, 2 * length + 3, 4 * length + 2])
    widths = []
    for block in model.model.transformer["blocks"]:
        block.ff_out.register_forward_hook(lambda _, inputs, output: widths.append(output.shape[1]))
    logits = model(ids, mask, positions=positions, columns=slice(2, 4))
    assert widths == [length, 2]
    torch.testing.assert_close(logits, model(ids, mask, positions=positions))


def test_gradient_checkpointing_gives_equal_gradients_and_runs_blocks_twice(tiny_llada, prompts):
    ids, mask = prompts
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = tiny_llada().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        count = []
        model.model.transformer["blocks"][0].q_proj.register_forward_hook(lambda *_, count=count: count.append(1))
        model(ids, mask).logits[mask].square().mean().backward()
        calls.append(len(count))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert calls == [1, 2]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_bfloat16_network_stays_within_its_rounding(tiny_llada, prompts):
    ids, mask = prompts
    low = tiny_llada(std=0.15).bfloat16()
    exact = tiny_llada()
    exact.load_state_dict(low.state_dict())
    expected = exact(ids, mask).logits[mask]
    logits = low(ids, mask).logits
    assert logits.dtype == torch.float32
    assert ((logits[mask] - expected).norm() / expected.norm()).item() < 0.02


def test_bfloat16_head_does_not_round_the_logits():
    # Logits near 12 rounded to bfloat16 would be spaced 1/16 apart.
    generator = torch.Generator().manual_seed(2)
    head = ScoringHead(64, 50, bias=False).bfloat16()
    with torch.no_grad():
        head.weight.copy_(torch.randn(50, 64, generator=generator))
    hidden = (torch.randn(7, 64, generator=generator) * 1.5).bfloat16()
    expected = hidden.double() @ head.weight.double().T
    assert expected.abs().max() > 12
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(hidden)
    torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-4)


def published_keys(config) -> dict[str, tuple[int, ...]]:
    width, mlp, keys = config.d_model, config.mlp_hidden_size, config.n_kv_heads * config.d_model // config.n_heads
    block = {"attn_norm": (width,), "ff_norm": (width,), "q_proj": (width, width), "attn_out": (width, width)}
    block |= {"k_proj": (keys, width), "v_proj": (keys, width)}
    block |= {"ff_proj": (mlp, width), "up_proj": (mlp, width), "ff_out": (width, mlp)}
    shapes = {"wte": (config.embedding_size, width), "ln_f": (width,)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(config.n_layers) for name, shape in block.items()}
    if not config.weight_tying:
        shapes["ff_out"] = (config.embedding_size, width)
    return {f"model.transformer.{name}.weight": shape for name, shape in shapes.items()}


@EVERY_SHAPE
def test_saved_names_and_shapes_are_the_published_ones(tiny_llada, tmp_path, settings):
    model = tiny_llada(**settings)
    model.save_pretrained(tmp_path)
    stored = {name: tuple(weight.shape) for name, weight in load_file(tmp_path / "model.safetensors").items()}
    assert stored == published_keys(model.config)


def test_default_configuration_has_the_8b_models_parameters():
    # 8,015,581,184 parameters, from the published shapes of LLaDA-8B.
    config = LLaDAConfig(mlp_hidden_size=12288)
    shapes = published_keys(config)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 8_015_581_184
    assert (config.mask_token_id, config.eos_token_id) == (126336, 126081)


@EVERY_SHAPE
def test_save_and_load_round_trip_is_bit_equal(tiny_llada, tokenizer, tmp_path, settings):
    model = tiny_llada(**settings)
    loaded, loaded_tokenizer = load_model(saved(model, tokenizer, tmp_path))
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    ids = torch.arange(8)[None]
    assert_close(loaded(ids).logits, model(ids).logits)
    assert not loaded.training
    assert loaded_tokenizer.mask_token_id == loaded.config.mask_token_id == model.config.mask_token_id
    assert loaded_tokenizer.padding_side == "left"
    tokens = (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id)
    assert tokens == ([tokenizer.eos_token_id], tokenizer.pad_token_id)


def test_loads_a_sharded_checkpoint_with_an_index(model, tokenizer, tmp_path):
    folder = saved(model, tokenizer, tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded, _ = load_model(folder)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_loads_in_the_asked_precision(model, tokenizer, tmp_path):
    loaded, _ = load_model(saved(model, tokenizer, tmp_path), dtype=torch.bfloat16)
    expected = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    torch.testing.assert_close(loaded.state_dict(), expected, rtol=0, atol=0)


def test_reads_the_published_config_file(model, tokenizer, tmp_path):
    folder = saved(model, tokenizer, tmp_path)
    edit_json(tmp_path / "config.json", **PUBLISHED)
    loaded, _ = load_model(folder)
    assert_close(loaded(torch.arange(5)[None]).logits, model(torch.arange(5)[None]).logits)


def test_end_of_turn_token_ends_a_completion(model, tokenizer, tmp_path):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    loaded, loaded_tokenizer = load_model(saved(model, tokenizer, tmp_path))
    ends = [loaded_tokenizer.eos_token_id, loaded_tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    assert loaded.generation_config.eos_token_id == ends


def test_every_missing_and_unexpected_weight_is_listed(model, tokenizer, tmp_path):
    folder = saved(model, tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    removed = ["model.transformer.blocks.1.up_proj.weight", "model.transformer.ff_out.weight"]
    for name in removed:
        del weights[name]
    weights["model.transformer.blocks.0.q_proj.bias"] = torch.zeros(32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not match the LLaDA network") as error:
        load_model(folder)
    for name in [*removed, "model.transformer.blocks.0.q_proj.bias"]:
        assert name in str(error.value)
    assert "blocks.0.up_proj" not in str(error.value)


OTHERS = {
    "activation_type": "gelu",
    "alibi": True,
    "attention_dropout": 0.1,
    "attention_layer_norm": True,
    "bias_for_layer_norm": True,
    "block_group_size": 4,
    "block_type": "sequential",
    "clip_qkv": 8.0,
    "embedding_dropout": 0.1,
    "include_bias": True,
    "include_qkv_bias": True,
    "input_emb_norm": True,
    "layer_norm_type": "default",
    "layer_norm_with_affine": False,
    "residual_dropout": 0.1,
    "rope": False,
    "rope_full_precision": False,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "scale_logits": True,
}


@pytest.mark.parametrize("name", OTHERS)
def test_refuses_another_network_under_the_same_name(name):
    LLaDAConfig(**PUBLISHED)
    with pytest.raises(ValueError, match=re.escape(f"LLaDA checkpoint with {name}={OTHERS[name]!r}: ")):
        LLaDAConfig(**(PUBLISHED | {name: OTHERS[name]}))


@pytest.fixture
def no_weights_are_read(monkeypatch):
    """Refusals come first: reading a large checkpoint takes minutes."""
    monkeypatch.setattr(LLaDAModelLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read first"))


@pytest.mark.usefixtures("no_weights_are_read")
def test_refuses_a_causal_checkpoint(tokenizer, tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_name_or_path=.*'llama'.*causal language model") as error:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def without_mask_token(model, tokenizer, folder, mask_token_id: int) -> str:
    saved(model, tokenizer, folder)
    stored = json.loads((folder / "tokenizer_config.json").read_text())
    del stored["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(stored))
    edit_json(folder / "config.json", mask_token_id=mask_token_id)
    return str(folder)


def test_takes_the_mask_token_from_the_config(model, tokenizer, tmp_path):
    loaded, loaded_tokenizer = load_model(without_mask_token(model, tokenizer, tmp_path, MASK))
    assert (loaded_tokenizer.mask_token, loaded.config.mask_token_id) == ("<mask>", MASK)


@pytest.mark.usefixtures("no_weights_are_read")
def test_refuses_a_mask_token_on_which_config_and_tokenizer_disagree(model, tokenizer, tmp_path):
    folder = saved(model, tokenizer, tmp_path)
    edit_json(tmp_path / "config.json", mask_token_id=3)
    with pytest.raises(ValueError, match=rf"mask_token_id=3 in config.json.*'<mask>' is {MASK}\. Correct") as error:
        load_model(folder)
    assert f"model_name_or_path={folder!r}" in str(error.value)


def test_takes_the_mask_token_from_the_tokenizer_where_the_config_has_none(model, tokenizer, tmp_path):
    folder = saved(model, tokenizer, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["mask_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert load_model(folder)[0].config.mask_token_id == MASK


@pytest.mark.usefixtures("no_weights_are_read")
def test_refuses_a_tokenizer_without_mask_token(model, tokenizer, tmp_path):
    folder = without_mask_token(model, tokenizer, tmp_path, 126336)
    with pytest.raises(ValueError, match=r"no mask token.*126336.*Set `mask_token`") as error:
        load_model(folder)
    assert f"model_name_or_path={folder!r}" in str(error.value)


def with_lora(model):
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=FAMILIES["llada"].lora_targets, r=2, init_lora_weights=False
    )
    return get_peft_model(model, lora)


@EVERY_SHAPE
def test_lora_reaches_seven_linears_of_each_block_and_never_the_head(tiny_llada, settings):
    adapted = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in with_lora(tiny_llada(**settings)).named_modules()
        if name.endswith("lora_A.default")
    }
    linears = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    assert adapted == {f"model.transformer.blocks.{index}.{name}" for index in range(2) for name in linears}


def test_adapter_loads_on_top_of_the_checkpoint_and_merges(model, tokenizer, tmp_path):
    folder = saved(model, tokenizer, tmp_path / "base")
    ids = torch.arange(8)[None]
    plain = model(ids).logits
    adapted = with_lora(model).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, _ = load_model(folder, adapter=str(tmp_path / "adapter"))
    logits = loaded.eval()(ids).logits
    assert_close(logits, adapted(ids).logits)
    assert not torch.allclose(logits, plain, atol=1e-2)
    merged, _ = load_model(saved(adapted.merge_and_unload(), tokenizer, tmp_path / "merged"))
    assert_close(merged(ids).logits, logits)


def test_forward_refuses_what_it_does_not_know(model):
    with pytest.raises(TypeError, match="labels"):
        model(torch.arange(4)[None], labels=torch.arange(4)[None])
