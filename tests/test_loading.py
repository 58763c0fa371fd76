"""From published folders to networks and tokenizers: nothing lost, nothing run, nothing misread; and back."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import published
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from trl.trainer.utils import create_model_from_path

from dgrpo.models import ScoringHead, ScoringPass, load_model
from dgrpo.models.families import FAMILIES
from dgrpo.models.loading import family_of, quantization

NUM_WORDS, V = published.NUM_WORDS, published.V
KINDS = [
    "llada",
    "dream",
    "llada_moe",
    "sdar",
    "llada2",
    "sdar_moe",
    "fast_dllm",
    "a2d-qwen2",
    "a2d-qwen3",
    "a2d-llama",
]
CAUSAL = ["qwen2", "qwen3", "llama"]
IDS = torch.arange(20, 29)[None]


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_adapter(model, seed: int = 0):
    """The model with a random LoRA adapter on its family's linear layers."""
    targets = FAMILIES[model.config.model_type].lora_targets
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=2, lora_alpha=6))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def assert_same_network(one, other, ids=IDS) -> None:
    """Equal weights; nearly equal logits, since a product rounds differently where weights are aligned differently."""
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_folder_loads_whole(tmp_path, kind):
    state = torch.get_rng_state()
    model, tokenizer = load_model(published.write_checkpoint(tmp_path, kind))
    assert torch.equal(torch.get_rng_state(), state)
    stored = published.random_weights(published.CONFIGS[kind])
    assert set(model.state_dict()) == set(stored)
    assert all(torch.equal(weight, stored[name]) for name, weight in model.state_dict().items())
    assert not model.training
    assert tokenizer.mask_token_id == model.config.mask_token_id == NUM_WORDS - 1
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == NUM_WORDS - 7
    assert tokenizer.padding_side == "left"
    assert tokenizer.decode(tokenizer.encode("The answer is 42.")) == "The answer is 42."


@pytest.mark.parametrize(
    ("kind", "ends", "prompt"),
    [
        ("llada", [293, 296], "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant"),
        ("dream", [293, 295], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ("llada_moe", [293, 297], "<role>HUMAN</role>hi<|role_end|><role>ASSISTANT</role>"),
        ("a2d-qwen3", [293, 295], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ("sdar", [293, 295], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (
            "llada2",
            [293, 297],
            "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>hi<|role_end|><role>ASSISTANT",
        ),
    ],
)
def test_end_tokens_and_chat_template_where_the_tokenizer_lacks_one(tmp_path, kind, ends, prompt):
    model, tokenizer = load_model(published.write_checkpoint(tmp_path, kind))
    assert model.generation_config.eos_token_id == ends
    message = [{"role": "user", "content": "hi"}]
    assert prompt in tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def test_the_tokenizer_s_own_template_and_tokens_come_first(tmp_path):
    """DiffuCoder pads with a token of its own, which its config.json does not know."""
    folder = published.write_checkpoint(tmp_path, "dream")
    edit_json(tmp_path / "tokenizer_config.json", chat_template="{{ 'own' }}", pad_token="<|eot_id|>")
    model, tokenizer = load_model(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "own"
    assert (tokenizer.pad_token_id, model.generation_config.pad_token_id) == (296, 296)


def test_dream_s_tokenizer_is_read_from_its_files_without_its_code(tmp_path):
    """Qwen2's rules, as in the published tokenization_dream.py: NFC, its splitting expression, byte-level BPE."""
    _, tokenizer = load_model(published.write_checkpoint(tmp_path, "dream"))
    backend = Tokenizer(models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    backend.normalizer = normalizers.NFC()
    expression = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    for text in [*published.TEXTS, "It's 1234\n\n  tabs\tand  e\u0301clat \u4f60\u597d 'LL"]:
        assert tokenizer.encode(text) == backend.encode(text).ids
    assert tokenizer.encode("a<|mask|><|im_end|>")[1:] == [NUM_WORDS - 1, NUM_WORDS - 5]
    assert tokenizer.bos_token == "<|beginoftext|>"


def test_the_two_networks_published_as_llada_are_told_apart(tmp_path):
    dense = published.write_checkpoint(tmp_path / "dense", "llada")
    routed = published.write_checkpoint(tmp_path / "routed", "llada_moe")
    assert [json.loads((folder / "config.json").read_text())["model_type"] for folder in (dense, routed)] == [
        "llada",
        "llada",
    ]
    assert (family_of(dense).name, family_of(routed).name) == ("LLaDA", "LLaDA-MoE")


@pytest.mark.parametrize("kind", KINDS)
def test_trl_s_reference_model_is_the_same_network(tmp_path, kind):
    """TRL loads it by itself, through transformers' auto classes, from the model's own folder."""
    folder = published.write_checkpoint(tmp_path, kind)
    model, _ = load_model(folder)
    reference = create_model_from_path(model.config.name_or_path)
    assert type(reference) is type(model)
    assert_same_network(reference, model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads_again_with_equal_weights(tmp_path, kind):
    model, tokenizer = load_model(published.write_checkpoint(tmp_path / "base", kind))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, tokenizer_again = load_model(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved/model.safetensors")) == set(published.shapes(published.CONFIGS[kind]))
    assert_same_network(again, model)
    assert (again.logit_shift, again.config.mask_token_id) == (model.logit_shift, model.config.mask_token_id)
    assert tokenizer_again.encode(published.TEXTS[0]) == tokenizer.encode(published.TEXTS[0])


@pytest.mark.parametrize("kind", [*KINDS, "tied llada", "tied a2d-qwen3"])
def test_a_resized_model_scores_saves_and_loads_again(tmp_path, kind):
    tied = kind.startswith("tied")
    kind = kind.removeprefix("tied ")
    changes = {"weight_tying" if kind == "llada" else "tie_word_embeddings": tied}
    weights = published.random_weights(published.CONFIGS[kind] | changes)
    if tied:
        weights.pop("model.transformer.ff_out.weight", None)
    model, tokenizer = load_model(
        published.write_checkpoint(tmp_path / "base", kind, weights, **changes), torch.bfloat16
    )
    before = model(IDS).logits
    model.resize_token_embeddings(V + 8, mean_resizing=False)
    logits = model(IDS).logits
    assert type(model.get_output_embeddings()) is ScoringHead
    assert (logits.dtype, logits.shape) == (torch.float32, (1, 9, V + 8))
    torch.testing.assert_close(logits[..., :V], before, rtol=1e-5, atol=1e-5)
    asked = ScoringPass(IDS, None, torch.tensor([4]), torch.tensor([0, 0]), torch.tensor([7, V + 7]))
    [scores] = model(passes=[asked])
    torch.testing.assert_close(scores.logps, logits[0, 4].log_softmax(-1)[[7, V + 7]], rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert_same_network(load_model(tmp_path / "saved", torch.bfloat16)[0], model)


def test_a_saved_dream_keeps_the_keys_that_its_published_code_reads(tmp_path):
    model, _ = load_model(published.write_checkpoint(tmp_path / "base", "dream"))
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    reads = set(published.CONFIGS["dream"]) - {"torch_dtype", "transformers_version"}
    assert {key: saved.get(key, "missing") for key in reads} == {key: published.CONFIGS["dream"][key] for key in reads}


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_and_unexpected_weight_is_listed(tmp_path, kind):
    weights = published.random_weights(published.CONFIGS[kind])
    removed = [name for name in weights if "1" in name and ("q_proj.weight" in name or "up_proj" in name)]
    for name in removed:
        del weights[name]
    weights["model.layers.0.self_attn.extra.weight"] = torch.zeros(32)
    folder = published.write_checkpoint(tmp_path, kind, weights)
    with pytest.raises(ValueError, match="do not match the .* network") as error:
        load_model(folder)
    for name in [*removed, "model.layers.0.self_attn.extra.weight"]:
        assert name in str(error.value)
    assert "layers.0.mlp.gate" not in str(error.value)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_checkpoint_is_refused_with_the_way_to_convert_it(tmp_path, kind):
    folder = published.write_checkpoint(tmp_path, kind)
    with pytest.raises(ValueError, match=f"model_type '{kind}'.*causal.*convert='bidirectional'"):
        load_model(folder)


def test_what_cannot_be_loaded_says_what_to_do(tmp_path):
    folder = published.write_checkpoint(tmp_path / "other", "llama", model_type="gpt2")
    with pytest.raises(ValueError, match=r"model_type 'gpt2'.*Supported: LLaDA-MoE, LLaDA, Dream"):
        load_model(folder)
    newer = published.write_checkpoint(tmp_path / "LLaDA2.2-flash", "llada2")
    with pytest.raises(ValueError, match="LLaDA2.2 admits experts for a whole block.*Use LLaDA2.0 or 2.1"):
        load_model(newer)
    coder = published.write_checkpoint(tmp_path / "Stable-DiffCoder-8B-Instruct", "llama")
    with pytest.raises(ValueError, match="Stable-DiffCoder's config.json names no mask token.*Use SDAR"):
        load_model(coder)
    gemma = published.write_checkpoint(tmp_path / "gemma", "llama", model_type="diffusion_gemma")
    with pytest.raises(ValueError, match="DiffusionGemma has no mask token"):
        load_model(gemma)
    with pytest.raises(ValueError, match="takes causal checkpoints of qwen2, qwen3, llama"):
        load_model(folder, convert="bidirectional")
    with pytest.raises(ValueError, match="choose 'bidirectional' or 'block'"):
        load_model(folder, convert="causal")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter without its base model"):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["flex_attention", "paged|eager"])
def test_attention_whose_masks_take_another_form_is_refused(tmp_path, kind, attention):
    folder = published.write_checkpoint(tmp_path, kind)
    with pytest.raises(ValueError, match=re.escape(f"attn_implementation={attention!r}: choose 'sdpa', 'eager'")):
        load_model(folder, attn_implementation=attention)


def test_a_tokenizer_without_a_mask_token_is_refused_before_weights_are_read(tmp_path):
    folder = published.write_checkpoint(tmp_path, "llada_moe")
    backend = (tmp_path / "tokenizer.json").read_text().replace("<|mask|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(backend)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"no mask token.*156895.*'<\|mask\|>'.*Set `mask_token`"):
        load_model(folder)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vocab_size", [V, NUM_WORDS - 1], ids=["room", "full"])
def test_a_converted_checkpoint_predicts_in_both_directions_and_loads_again(tmp_path, kind, tied, vocab_size):
    changes = {"tie_word_embeddings": tied, "vocab_size": vocab_size}
    weights = published.random_weights(published.CONFIGS[kind] | changes)
    folder = published.write_checkpoint(tmp_path / "causal", kind, weights, **changes)
    tokenizer_file = tmp_path / "causal/tokenizer.json"
    stored = json.loads(tokenizer_file.read_text())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] != "<|mask|>"]
    tokenizer_file.write_text(json.dumps(stored))
    model, tokenizer = load_model(folder, convert="bidirectional")
    mask_id = NUM_WORDS - 1
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mask|>", mask_id)
    assert (model.config.mask_token_id, model.logit_shift) == (mask_id, 1)
    assert model.config.vocab_size == len(model.get_output_embeddings().weight) == max(vocab_size, NUM_WORDS)
    # The same network, bar the mask's own row: the mean of the words.
    expected = dict(weights)
    for name in ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied):
        words = weights[name]
        rows = torch.cat([words[:mask_id], words[:mask_id].mean(0, keepdim=True), words[mask_id + 1 :]])
        expected[name] = rows
    ids = torch.cat([IDS[0], torch.tensor([mask_id])])
    logits = published.logits(expected, published.CONFIGS[kind] | changes, ids, shift=1)
    torch.testing.assert_close(model(ids[None]).logits[0], logits.float(), rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    again, tokenizer_again = load_model(tmp_path / "converted")
    assert_same_network(again, model, ids[None])
    assert (again.logit_shift, tokenizer_again.mask_token_id) == (1, mask_id)
    assert json.loads((tmp_path / "converted/config.json").read_text())["model_type"] == f"a2d-{kind}"
    with pytest.raises(ValueError, match="takes causal checkpoints"):
        load_model(tmp_path / "converted", convert="bidirectional")


def test_the_block_length_comes_from_the_caller_the_config_the_name_or_the_family(tmp_path, caplog):
    told = published.write_checkpoint(tmp_path / "told-b64", "sdar", block_size=8)
    silent = {key: value for key, value in published.CONFIGS["sdar"].items() if key != "block_size"}
    lengths = {}
    for name in ("SDAR-b16", "SDAR", "TraDo-4B"):
        folder = published.write_checkpoint(tmp_path / name, "sdar")
        (folder / "config.json").write_text(json.dumps(silent))
        lengths[name] = load_model(folder)[0].block_length
    assert lengths == {"SDAR-b16": 16, "SDAR": 4, "TraDo-4B": 4}
    assert load_model(told)[0].block_length == 8
    assert "told-b64 attends in blocks of block_length=8 tokens" in caplog.text
    model, tokenizer = load_model(told, block_length=2)
    assert model.block_length == 2
    model.save_pretrained(tmp_path / "saved-b64")
    tokenizer.save_pretrained(tmp_path / "saved-b64")
    assert load_model(tmp_path / "saved-b64")[0].block_length == 2
    with pytest.raises(ValueError, match="block_length=0: must be a whole number of at least 1"):
        load_model(told, block_length=0)
    dream = published.write_checkpoint(tmp_path / "dream", "dream")
    with pytest.raises(ValueError, match="block_length=4: in Dream every token sees every other one"):
        load_model(dream, block_length=4)
    assert load_model(dream)[0].block_length is None
    with pytest.raises(ValueError, match="convert='block' needs a block_length"):
        load_model(published.write_checkpoint(tmp_path / "qwen3", "qwen3"), convert="block")


def test_a_converted_block_model_loads_again_with_its_block_length(tmp_path):
    folder = published.write_checkpoint(tmp_path / "causal", "qwen3")
    model, tokenizer = load_model(folder, convert="block", block_length=4)
    model.save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    again, _ = load_model(tmp_path / "converted")
    assert (again.block_length, again.logit_shift) == (4, 1)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    longer, _ = load_model(tmp_path / "converted", block_length=8)
    assert (longer(IDS).logits - model(IDS).logits).abs().max() > 1e-2


def test_a_tied_head_that_is_stored_as_well_is_accepted(tmp_path):
    changes = {"tie_word_embeddings": True}
    weights = published.random_weights(published.CONFIGS["a2d-qwen3"] | changes)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model, _ = load_model(published.write_checkpoint(tmp_path, "a2d-qwen3", weights, **changes))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_on_top_and_stays_trainable(tmp_path, kind):
    folder = published.write_checkpoint(tmp_path / "base", kind)
    adapted = with_adapter(load_model(folder)[0])
    adapted.save_pretrained(tmp_path / "adapter")
    model, _ = load_model(folder, adapter=str(tmp_path / "adapter"))
    model.eval()
    assert_same_network(model, adapted)
    assert not torch.allclose(model(IDS).logits, load_model(folder)[0](IDS).logits, atol=1e-2)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_an_adapter_whose_weights_do_not_fit_is_refused(tmp_path):
    folder = published.write_checkpoint(tmp_path / "base", "dream")
    with_adapter(load_model(folder)[0]).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    weights[name.replace("q_proj", "query")] = weights.pop(name)
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"missing \['base_model.*q_proj.*unexpected \['base_model.*query"):
        load_model(folder, adapter=str(tmp_path / "adapter"))


def test_quantized_loading_asks_for_bitsandbytes_and_for_one_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    folder = published.write_checkpoint(tmp_path, "dream")
    for settings in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        with pytest.raises(ImportError, match=r"pip install 'dgrpo\[quantization\]'"):
            load_model(folder, **settings)
    with pytest.raises(ValueError, match="set only one"):
        load_model(folder, load_in_4bit=True, load_in_8bit=True)
    assert quantization(False, False, None, torch.float32) is None


@pytest.mark.parametrize("kind", KINDS)
def test_four_and_eight_bit_weights_by_bitsandbytes(tmp_path, kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    folder = published.write_checkpoint(tmp_path / "base", kind)
    for settings, layer in (
        ({"load_in_4bit": True}, bitsandbytes.nn.Linear4bit),
        ({"load_in_8bit": True}, bitsandbytes.nn.Linear8bitLt),
    ):
        model, _ = load_model(folder, torch.bfloat16, **settings)
        assert any(isinstance(module, layer) for module in model.modules())
        assert model.get_output_embeddings().weight.dtype == torch.bfloat16
        assert with_adapter(model)(IDS.cuda()).logits.isfinite().all()


_MEASURE = """
import sys, threading, time, torch
from dgrpo.models import load_model
def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(fields["RssAnon"].split()[0]) * 1024
before, peak, done = resident(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, resident())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model, _ = load_model(sys.argv[1], torch.bfloat16)
done.set()
thread.join()
print(sum(p.nbytes for p in model.parameters()), max(peak, resident()) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", ["dream", "llada_moe"])
def test_peak_memory_stays_under_the_weights_and_one_shard(tmp_path, kind):
    """Read straight to bfloat16. Counted is memory of the process's own: pages of the mapped files can be dropped."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 8}
    sizes |= {"intermediate_size": 4096} if kind == "dream" else {"expert_intermediate_size": 512, "num_experts": 8}
    config = published.CONFIGS[kind] | sizes | {"moe_layer_freq": [1] * 8}
    weights = {name: torch.zeros(shape) for name, shape in published.shapes(config).items()}
    folder = published.write_checkpoint(tmp_path, kind, weights, num_shards=4, **sizes, moe_layer_freq=[1] * 8)
    shard = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    del weights
    run = subprocess.run([sys.executable, "-c", _MEASURE, folder], capture_output=True, text=True, check=True)
    size, peak = map(int, run.stdout.split()[-2:])
    assert size > 200e6
    assert 0.9 * size < peak < size + shard / 2


_FROM_HUB = """
import json, sys
from dgrpo.models import load_model
from dgrpo.run.merge import merge_adapters
for revision in ("main", "older"):
    model, tokenizer = load_model("tiny/dream", revision=revision)
    print(json.dumps([model.lm_head.weight.float().sum().item(), model.config.auto_map, tokenizer.mask_token_id]))
merge_adapters([], sys.argv[1], base="tiny/dream", revision="older")
"""


@pytest.mark.slow
def test_hub_names_and_revisions(tmp_path):
    """A hub's cache, offline: two revisions of one repository."""
    cache, repo = tmp_path / "cache", tmp_path / "cache/models--tiny--dream"
    sums = []
    for seed, (revision, commit) in enumerate([("main", "1" * 40), ("older", "2" * 40)]):
        weights = published.random_weights(published.CONFIGS["dream"], seed)
        published.write_checkpoint(repo / "snapshots" / commit, "dream", weights)
        sums.append(weights["lm_head.weight"].sum().item())
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    run = subprocess.run(
        [sys.executable, "-c", _FROM_HUB, str(tmp_path / "merged")],
        env={"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    seen = [json.loads(line) for line in run.stdout.splitlines() if "AutoModel" in line]
    for (total, auto_map, mask_id), expected in zip(seen, sums, strict=True):
        assert total == pytest.approx(expected, rel=1e-4)
        assert auto_map["AutoModel"] == "tiny/dream--modeling_dream.DreamModel"
        assert mask_id == NUM_WORDS - 1
    for file in ("config.json", "modeling_dream.py", "vocab.json", "model-00002-of-00003.safetensors"):
        assert (tmp_path / "merged" / file).read_bytes() == (repo / "snapshots" / ("2" * 40) / file).read_bytes()


_ZERO3 = """
import sys
import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig
from dgrpo.models import load_model
settings = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
deepspeed.init_distributed("gloo")
rank = torch.distributed.get_rank()
assert torch.distributed.get_world_size() == 2
active = HfDeepSpeedConfig(settings)
for folder in sys.argv[1:]:
    model, _ = load_model(folder)
    parts = list(model.parameters())
    assert all(part.numel() == 0 and part.ds_tensor.numel() <= -(-part.ds_numel // 2) for part in parts)
    optimizer = torch.optim.SGD(parts, lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=optimizer)
    logits = engine(torch.arange(20, 29)[None] + 30 * rank).logits
    if rank == 0:
        torch.save(logits.detach(), folder + "/logits.pt")
    engine.backward(logits.square().mean())
    engine.step()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_zero_3_loads_parts_and_trains_every_family(tmp_path):
    """Two processes with different texts: no process holds a whole weight, and experts do not come apart."""
    folders = [published.write_checkpoint(tmp_path / kind, kind) for kind in KINDS]
    folders.append(published.write_checkpoint(tmp_path / "tied", "a2d-qwen3", tie_word_embeddings=True))
    (tmp_path / "zero3.py").write_text(_ZERO3)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    run = subprocess.run(
        [*command, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", tmp_path / "zero3.py", *folders],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for folder in folders:
        expected = load_model(folder)[0](IDS).logits
        torch.testing.assert_close(torch.load(folder / "logits.pt"), expected, rtol=0, atol=1e-5)
