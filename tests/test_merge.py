"""Adapters folded into their base: the base's own files, bit for bit, but for the adapted weights."""

import json
from pathlib import Path

import published
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_loading import IDS, KINDS, with_adapter

from dgrpo.models import load_model
from dgrpo.models.families import FAMILIES
from dgrpo.run.merge import copy_companions, merge_adapters

NUM_ADAPTED = dict.fromkeys(KINDS, 14) | {"llada_moe": 8, "llada2": 15, "sdar_moe": 8}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


def write_adapter(base: Path, folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random adapter saved beside the base; what it adds to each weight, by the weight's stored name."""
    with_adapter(load_model(base)[0], seed).save_pretrained(folder)
    return deltas(folder)


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """LoRA's B A alpha / r, from the adapter's file."""
    weights, settings = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    return {
        name.removeprefix("base_model.model.").replace("lora_A.", ""): weights[name.replace("lora_A", "lora_B")]
        @ weight
        * (settings["lora_alpha"] / settings["r"])
        for name, weight in weights.items()
        if "lora_A" in name
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_without_an_adapter_every_file_comes_back_bit_for_bit(tmp_path, kind, dtype):
    weights = published.random_weights(published.CONFIGS[kind], dtype=dtype)
    base = published.write_checkpoint(tmp_path / "base", kind, weights)
    output = merge_adapters([], tmp_path / "merged", base=base)
    names = sorted(path.name for path in base.iterdir())
    assert sorted(path.name for path in output.iterdir()) == names
    assert any(name.endswith(".py") for name in names) or "auto_map" not in published.CONFIGS[kind]
    for name in names:
        assert (output / name).read_bytes() == (base / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_the_adapted_one_in_the_base_s_layout(tmp_path, kind):
    base = published.write_checkpoint(tmp_path / "base", kind)
    added = write_adapter(base, tmp_path / "adapter")
    assert len(added) == NUM_ADAPTED[kind]
    output = merge_adapters(tmp_path / "adapter", tmp_path / "merged")
    before, after = stored(base), stored(output)
    assert set(after) == set(before)
    for name, weight in before.items():
        if name in added:
            assert not torch.equal(after[name], weight)
            torch.testing.assert_close(after[name], weight + added[name], rtol=0, atol=1e-6)
        else:
            assert torch.equal(after[name], weight)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (output / path.name).read_bytes() == path.read_bytes()
    adapted, _ = load_model(base, adapter=str(tmp_path / "adapter"))
    merged, _ = load_model(output)
    torch.testing.assert_close(merged(IDS).logits, adapted.eval()(IDS).logits, rtol=0, atol=1e-4)


def test_a_bfloat16_base_stays_bfloat16_within_its_rounding(tmp_path):
    weights = published.random_weights(published.CONFIGS["dream"], dtype=torch.bfloat16)
    base = published.write_checkpoint(tmp_path / "base", "dream", weights)
    added = write_adapter(base, tmp_path / "adapter")
    after = stored(merge_adapters(tmp_path / "adapter", tmp_path / "merged"))
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    for name, delta in added.items():
        exact = weights[name].float() + delta
        # One rounding of the sum, one of what is added: 2^-9 of each.
        bound = (exact.abs() + delta.abs()) * 2**-8 + 1e-6
        assert ((after[name].float() - exact).abs() <= bound).all()


def test_weights_of_mixed_precision_keep_theirs(tmp_path):
    weights = published.random_weights(published.CONFIGS["dream"], dtype=torch.bfloat16)
    names = [name for name in weights if "norm" in name] + ["model.layers.0.self_attn.q_proj.weight"]
    for name in names:
        weights[name] = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(1))
    base = published.write_checkpoint(tmp_path / "base", "dream", weights)
    added = write_adapter(base, tmp_path / "adapter")
    after = stored(merge_adapters(tmp_path / "adapter", tmp_path / "merged"))
    assert all(after[name].dtype == weights[name].dtype for name in weights)
    assert all(torch.equal(after[name], weights[name]) for name in set(weights) - set(added))
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(after[name], weights[name] + added[name], rtol=0, atol=1e-6)


def test_adapters_are_folded_in_their_order(tmp_path):
    """SFT's adapter, then one that RL trained on the merged model, in one call."""
    base = published.write_checkpoint(tmp_path / "base", "llada")
    sft = write_adapter(base, tmp_path / "sft", seed=1)
    between = merge_adapters(tmp_path / "sft", tmp_path / "between")
    rl = write_adapter(between, tmp_path / "rl", seed=2)
    output = merge_adapters([tmp_path / "sft", tmp_path / "rl"], tmp_path / "merged")
    before, after = stored(base), stored(output)
    for name, delta in sft.items():
        torch.testing.assert_close(after[name], before[name] + delta + rl[name], rtol=0, atol=2e-6)
    again = merge_adapters(tmp_path / "rl", tmp_path / "again", base=between)
    assert all(torch.equal(weight, after[name]) for name, weight in stored(again).items())


def test_an_adapter_that_went_on_from_another_is_not_folded_on_top_of_it(tmp_path):
    base = published.write_checkpoint(tmp_path / "base", "llada")
    write_adapter(base, tmp_path / "sft")
    model, _ = load_model(base, adapter=str(tmp_path / "sft"))
    model.save_pretrained(tmp_path / "rl")
    with pytest.raises(ValueError, match="it holds it already: fold it alone"):
        merge_adapters([tmp_path / "sft", tmp_path / "rl"], tmp_path / "merged")
    merged = stored(merge_adapters(tmp_path / "rl", tmp_path / "merged"))
    expected = stored(merge_adapters(tmp_path / "sft", tmp_path / "expected"))
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.items())


def test_a_tied_head_follows_the_embedding(tmp_path):
    base = published.write_checkpoint(tmp_path / "base", "a2d-qwen3", tie_word_embeddings=True)
    write_adapter(base, tmp_path / "adapter")
    output = merge_adapters(tmp_path / "adapter", tmp_path / "merged")
    assert "lm_head.weight" not in stored(output)
    merged, _ = load_model(output)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("kind", "trained", "stored_head"),
    [
        ("a2d-qwen3", "lm_head", False),
        ("a2d-qwen3", "embed_tokens", False),
        ("a2d-qwen3", "lm_head", True),
        ("llada", "tied_head", False),
        ("llada", "wte", False),
    ],
)
def test_a_tied_base_refuses_an_adapter_that_unties_it(tmp_path, kind, trained, stored_head):
    tied = {"weight_tying": True} if kind == "llada" else {"tie_word_embeddings": True}
    weights = published.random_weights(published.CONFIGS[kind] | tied)
    weights.pop("model.transformer.ff_out.weight", None)
    if stored_head:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    base = published.write_checkpoint(tmp_path / "base", kind, weights, **tied)
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=FAMILIES[kind].lora_targets, r=2, modules_to_save=[trained]
    )
    adapted = get_peft_model(load_model(base)[0], lora)
    adapted.save_pretrained(tmp_path / "untrained")
    assert set(stored(merge_adapters(tmp_path / "untrained", tmp_path / "merged", base=base))) == set(weights)
    [parameter] = [weight for name, weight in adapted.named_parameters() if "modules_to_save" in name]
    parameter.data += 1
    adapted.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="base=.*tie_word_embeddings=True.*ensure_weight_tying=True"):
        merge_adapters(tmp_path / "trained", tmp_path / "refused", base=base)
    assert not (tmp_path / "refused").exists()


def test_a_single_file_without_index_is_written_as_one(tmp_path):
    base = published.write_checkpoint(tmp_path / "base", "dream", num_shards=1)
    (base / "model-00001-of-00001.safetensors").rename(base / "model.safetensors")
    (base / "model.safetensors.index.json").unlink()
    write_adapter(base, tmp_path / "adapter")
    output = merge_adapters(tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in output.glob("*.safetensors*")] == ["model.safetensors"]


def test_an_adapter_trained_on_four_bit_weights_is_folded_into_the_full_ones(tmp_path):
    pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    weights = published.random_weights(published.CONFIGS["dream"], dtype=torch.bfloat16)
    base = published.write_checkpoint(tmp_path / "base", "dream", weights)
    model, _ = load_model(base, torch.bfloat16, load_in_4bit=True)
    with_adapter(model).save_pretrained(tmp_path / "adapter")
    added = deltas(tmp_path / "adapter")
    after = stored(merge_adapters(tmp_path / "adapter", tmp_path / "merged"))
    assert set(after) == set(weights)
    for name, weight in weights.items():
        exact = weight.float() + added.get(name, 0)
        assert ((after[name].float() - exact).abs() <= exact.abs() * 2**-7 + 1e-3).all()


def test_nothing_is_overwritten_and_nothing_is_guessed(tmp_path):
    base = published.write_checkpoint(tmp_path / "base", "dream")
    write_adapter(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match="is not an empty folder"):
        merge_adapters(tmp_path / "adapter", base)
    with pytest.raises(ValueError, match="base=None"):
        merge_adapters([], tmp_path / "merged")
    other = published.write_checkpoint(tmp_path / "other", "dream", num_hidden_layers=1)
    with pytest.raises(ValueError, match="does not fit DreamModel.*unexpected"):
        merge_adapters(tmp_path / "adapter", tmp_path / "merged", base=other)
    packed = published.write_checkpoint(tmp_path / "packed", "dream")
    shard = packed / "model-00001-of-00003.safetensors"
    save_file({name: weight.to(torch.uint8) for name, weight in load_file(shard).items()}, shard)
    with pytest.raises(ValueError, match="stored as U8: name the full-precision weights"):
        merge_adapters(tmp_path / "adapter", tmp_path / "merged", base=packed)
    assert not (tmp_path / "merged").exists()


def test_companions_are_what_others_need_beside_the_weights(tmp_path):
    """For weights trained in full and saved elsewhere: everything but weights, nothing that is there already."""
    base = published.write_checkpoint(tmp_path / "base", "dream")
    for name in ("optimizer.pt", "training_args.bin", "adapter_config.json", ".gitattributes"):
        (base / name).write_text("not this")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool.jinja").write_text("{{ 1 }}")
    (base / "checkpoint-10").mkdir()
    output = tmp_path / "trained"
    output.mkdir()
    (output / "config.json").write_text("{}")
    copy_companions(base, output)
    assert sorted(path.name for path in output.iterdir()) == [
        "added_tokens.json",
        "additional_chat_templates",
        "config.json",
        "configuration_dream.py",
        "merges.txt",
        "modeling_dream.py",
        "special_tokens_map.json",
        "tokenization_dream.py",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert (output / "config.json").read_text() == "{}"


def test_an_adapter_that_is_not_there_is_named_before_a_model_is_loaded(tmp_path):
    absent = str(tmp_path / "none")
    for act in (lambda: merge_adapters(absent, tmp_path / "out"), lambda: load_model("nowhere", adapter=absent)):
        with pytest.raises(ValueError, match="none': no adapter_config.json"):
            act()


def test_links_are_followed_into_the_cache_of_the_hub_and_nowhere_else(tmp_path, caplog):
    base = published.write_checkpoint(tmp_path / "models--x--y/snapshots/abc", "dream")
    blobs = tmp_path / "models--x--y/blobs"
    blobs.mkdir()
    for name in ("config.json", "vocab.json", "model-00001-of-00003.safetensors"):
        (base / name).rename(blobs / name)
        (base / name).symlink_to(f"../../blobs/{name}")
    (base / "second.json").symlink_to("merges.txt")
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key.jinja").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "private/key.jinja")
    (base / "additional_chat_templates").symlink_to(tmp_path / "private")
    merged = merge_adapters([], tmp_path / "merged", base=base)
    assert {path.name for path in base.iterdir()} - {path.name for path in merged.iterdir()} == {
        "notes.txt",
        "additional_chat_templates",
    }
    assert (merged / "config.json").read_bytes() == (blobs / "config.json").read_bytes()
    assert not any(path.is_symlink() or b"secret" in path.read_bytes() for path in merged.iterdir())
    assert "additional_chat_templates, key.jinja, notes.txt point outside the folder" in caplog.text
    # Named through a link of its own, the folder is the same one; weights are read wherever they lie.
    (tmp_path / "link").symlink_to(base)
    assert (merge_adapters([], tmp_path / "again", base=tmp_path / "link") / "second.json").is_file()
