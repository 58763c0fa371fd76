"""Checkpoint folders in the layouts that are published, at small sizes, and what their networks compute.

Names, shapes and equations are written out here; nothing imports dgrpo. Shapes: L tokens, V vocabulary.
"""

import json
from pathlib import Path

import torch
from reference import rms_norm, rotary
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

V = 320
TEXTS = ["The answer is 12 + 30 = 42.", "Is 7 the answer? No, the answer is 8.", "def add(a, b): return a + b"] * 4
WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|role_end|>", "<|beginoftext|>", "<|mask|>")
NUM_WORDS = 300

# What every small config below has in common, under the names of transformers.
_SIZES = {
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "vocab_size": V,
}
_QWEN = {
    "attention_dropout": 0.0,
    "bos_token_id": NUM_WORDS - 7,
    "eos_token_id": NUM_WORDS - 7,
    "max_window_layers": 28,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_sliding_window": False,
}
# config.json of each kind of checkpoint; the keys are those on the hub, the sizes and token ids small.
CONFIGS: dict[str, dict] = {
    "dream": _SIZES
    | _QWEN
    | {
        "architectures": ["DreamModel"],
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "mask_token_id": NUM_WORDS - 1,
        "model_type": "Dream",
        "pad_token_id": NUM_WORDS - 7,
    },
    "llada_moe": {key: value for key, value in _SIZES.items() if key != "intermediate_size"}
    | {
        "architectures": ["LLaDAMoEModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_lladamoe.LLaDAConfig",
            "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
        "clip_qkv": None,
        "dense_intermediate_size": 64,
        "eos_token_id": NUM_WORDS - 7,
        "expert_intermediate_size": 16,
        "model_type": "llada",
        "moe_layer_freq": [1, 1],
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "pad_token_id": NUM_WORDS - 7,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000,
        "routed_scaling_factor": 1,
        "router_aux_loss_coef": 0.01,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
        "torch_dtype": "bfloat16",
        "use_cache": False,
    },
    "a2d-qwen3": _SIZES
    | _QWEN
    | {
        "architectures": ["A2DQwen3LMHeadModel"],
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "modeling_qwen3.A2DQwen3Config",
            "AutoModelForMaskedLM": "modeling_qwen3.A2DQwen3LMHeadModel",
        },
        "head_dim": 16,
        "model_type": "a2d-qwen3",
    },
    "qwen2": _SIZES | _QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": _SIZES
    | _QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,
        "model_type": "qwen3",
    },
    "llama": _SIZES
    | {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": NUM_WORDS - 7,
        "eos_token_id": NUM_WORDS - 4,
        "head_dim": 8,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    },
    "llada": {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 32,
        "embedding_size": V,
        "eos_token_id": NUM_WORDS - 7,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_device": "meta",
        "layer_norm_type": "rms",
        "mask_token_id": NUM_WORDS - 1,
        "max_sequence_length": 512,
        "mlp_hidden_size": 48,
        "model_type": "llada",
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 2,
        "pad_token_id": NUM_WORDS - 7,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": V,
        "weight_tying": False,
    },
}
# A copy as toolkits make it: the hub's own config.json names neither the mask nor the block length.
CONFIGS["sdar"] = CONFIGS["qwen3"] | {
    "architectures": ["SDARForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "block_size": 4,
    "fuse_cross_entropy": True,
    "mask_token_id": NUM_WORDS - 1,
    "model_type": "sdar",
}
CONFIGS["sdar_moe"] = CONFIGS["sdar"] | {
    "architectures": ["SDARMoeForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
        "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
    },
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "sdar_moe",
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
CONFIGS["fast_dllm"] = CONFIGS["qwen2"] | {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
        "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
    },
    "bd_size": 4,
    "mask_token_id": NUM_WORDS - 1,
    "model_type": "Fast_dLLM_Qwen",
}
CONFIGS["llada2"] = {key: _SIZES[key] for key in _SIZES if key != "tie_word_embeddings"} | {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "block_size": 4,
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "max_window_layers": 28,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 16,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_topk_prob": True,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": NUM_WORDS - 7,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "rope_theta": 600000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": 4096,
    "topk_group": 2,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
}
CONFIGS["a2d-qwen2"] = CONFIGS["qwen2"] | {"architectures": ["A2DQwen2LMHeadModel"], "model_type": "a2d-qwen2"}
CONFIGS["a2d-llama"] = CONFIGS["llama"] | {"architectures": ["A2DLlamaLMHeadModel"], "model_type": "a2d-llama"}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every stored tensor's name and shape."""
    if "d_model" in config:
        return _llada_shapes(config)
    if config["model_type"] == "llada2_moe":
        return _llada2_shapes(config)
    d, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    size = config.get("head_dim", d // heads)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, rows in (("q", heads * size), ("k", kv_heads * size), ("v", kv_heads * size)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = (rows, d)
            if config["model_type"] in ("Dream", "qwen2", "a2d-qwen2", "Fast_dLLM_Qwen"):
                found[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        found[f"{layer}.self_attn.o_proj.weight"] = (d, heads * size)
        if "qwen3" in config["model_type"] or config["model_type"].startswith("sdar") or config.get("qk_layernorm"):
            found |= {f"{layer}.self_attn.{name}_norm.weight": (size,) for name in "qk"}
        found |= {f"{layer}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
        width, parts = config.get("intermediate_size"), [f"{layer}.mlp"]
        if "num_experts" in config:
            width = config.get("expert_intermediate_size") or config["moe_intermediate_size"]
            parts = [f"{layer}.mlp.experts.{expert}" for expert in range(config["num_experts"])]
            found[f"{layer}.mlp.gate.weight"] = (config["num_experts"], d)
        for part in parts:
            found |= {f"{part}.{name}_proj.weight": (width, d) for name in ("gate", "up")}
            found[f"{part}.down_proj.weight"] = (d, width)
    found["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], d)
    return found


def _llada_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    d, width, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    found: dict[str, tuple[int, ...]] = {"model.transformer.wte.weight": (rows, d)}
    for index in range(config["n_layers"]):
        block = f"model.transformer.blocks.{index}"
        found |= {f"{block}.{name}.weight": (d, d) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        found |= {f"{block}.{name}.weight": (d,) for name in ("attn_norm", "ff_norm")}
        found |= {f"{block}.{name}.weight": (width, d) for name in ("ff_proj", "up_proj")}
        found[f"{block}.ff_out.weight"] = (d, width)
    return found | {"model.transformer.ln_f.weight": (d,), "model.transformer.ff_out.weight": (rows, d)}


def _llada2_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    d, size, rows = config["hidden_size"], config["head_dim"], config["vocab_size"]
    heads, kv_heads, inner = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "moe_intermediate_size")
    )
    found: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (rows, d)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        found[f"{layer}.attention.query_key_value.weight"] = ((heads + 2 * kv_heads) * size, d)
        found |= {f"{layer}.attention.{name}_layernorm.weight": (size,) for name in ("query", "key")}
        found[f"{layer}.attention.dense.weight"] = (d, heads * size)
        found |= {f"{layer}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
        parts = {"mlp": config["intermediate_size"]}
        if index >= config["first_k_dense_replace"]:
            found[f"{layer}.mlp.gate.weight"] = (config["num_experts"], d)
            found[f"{layer}.mlp.gate.expert_bias"] = (config["num_experts"],)
            parts = {f"mlp.experts.{expert}": inner for expert in range(config["num_experts"])}
            parts["mlp.shared_experts"] = inner * config["num_shared_experts"]
        for part, width in parts.items():
            found |= {f"{layer}.{part}.{name}_proj.weight": (width, d) for name in ("gate", "up")}
            found[f"{layer}.{part}.down_proj.weight"] = (d, width)
    return found | {"model.norm.weight": (d,), "lm_head.weight": (rows, d)}


def in_llama_s_names(weights: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """LLaDA2's tensors under the names of Llama-like networks, its one projection cut into three."""
    found = {}
    size, kv_heads = config["head_dim"], config["num_key_value_heads"]
    rows = [config["num_attention_heads"] * size, kv_heads * size, kv_heads * size]
    for name, weight in weights.items():
        if name.endswith("query_key_value.weight"):
            stem = name.replace("attention.query_key_value.weight", "self_attn")
            found |= {f"{stem}.{part}_proj.weight": each for part, each in zip("qkv", weight.split(rows), strict=True)}
            continue
        for theirs, ours in (
            ("word_embeddings", "embed_tokens"),
            ("attention.dense", "self_attn.o_proj"),
            ("attention.query_layernorm", "self_attn.q_norm"),
            ("attention.key_layernorm", "self_attn.k_norm"),
        ):
            name = name.replace(theirs, ours)
        found[name] = weight
    return found


def random_weights(config: dict, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor random, norms around one, so that a forgotten or misplaced one changes the answer.

    A router's bias is stored in float32, as LLaDA2.1 does.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.2 + float("norm" in name or "ln_f" in name)).to(
            torch.float32 if name.endswith("expert_bias") else dtype
        )
        for name, shape in shapes(config).items()
    }


def write_tokenizer(folder: Path, kind: str) -> None:
    """A small byte-level BPE: Dream's as vocab.json and merges.txt with remote code, the others' as tokenizer.json."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = NUM_WORDS - len(WORDS)
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    assert backend.get_vocab_size() == size
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    if kind == "dream":
        learned = json.loads(backend.to_str())["model"]
        (folder / "vocab.json").write_text(json.dumps(learned["vocab"], ensure_ascii=False))
        merges = [" ".join(pair) for pair in learned["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        added = {str(size + index): _added(word) for index, word in enumerate(WORDS)}
        (folder / "added_tokens.json").write_text(json.dumps({word: size + i for i, word in enumerate(WORDS)}))
        (folder / "tokenization_dream.py").write_text("raise RuntimeError('remote code ran')\n")
        special |= {"bos_token": "<|beginoftext|>", "mask_token": "<|mask|>", "unk_token": "<|endoftext|>"}
        settings = {
            "added_tokens_decoder": added,
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "tokenizer_class": "DreamTokenizer",
            "model_max_length": 131072,
        }
    else:
        backend.add_special_tokens(list(WORDS))
        backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "Qwen2Tokenizer" if "qwen" in kind else "PreTrainedTokenizerFast"}
        if kind.startswith("a2d"):
            special["mask_token"] = "<|mask|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special, indent=2))


def _added(word: str) -> dict:
    return {
        "content": word,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def write_checkpoint(
    folder: Path, kind: str, weights: dict[str, Tensor] | None = None, num_shards: int = 3, **changes
) -> Path:
    """A folder as on the hub: config.json, shards with their index, tokenizer, and remote code that must not run."""
    config = CONFIGS[kind] | changes
    weights = random_weights(config) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for reference in config.get("auto_map", {}).values():
        (folder / f"{reference.split('.')[0]}.py").write_text("raise RuntimeError('remote code ran')\n")
    write_tokenizer(folder, kind)
    names = list(weights)
    files = [f"model-{shard + 1:05}-of-{num_shards:05}.safetensors" for shard in range(num_shards)]
    index = {name: files[place * num_shards // len(names)] for place, name in enumerate(names)}
    for file in files:
        save_file({name: weights[name] for name in names if index[name] == file}, folder / file, {"format": "pt"})
    size = sum(weight.nbytes for weight in weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
    )
    return folder


def logits(weights: dict[str, Tensor], config: dict, ids: Tensor, shift: int) -> Tensor:
    """Logits [L, V] for token i at row i of one text without padding, from the stored tensors, in float64.

    A transformer in which every token sees every token, or all of its block and of those before it: RMSNorm, rotary
    positions, grouped keys and values, SwiGLU or a sum over the most probable experts. `shift` 1: the prediction for
    token i is read at position i - 1.
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    if config["model_type"] == "llada2_moe":
        weights = in_llama_s_names(weights, config)
    heads, eps, theta = config["num_attention_heads"], config["rms_norm_eps"], config["rope_theta"]
    shared = torch.arange(heads) * config["num_key_value_heads"] // heads
    x = weights["model.embed_tokens.weight"][ids]
    for index in range(config["num_hidden_layers"]):
        layer = {
            name.removeprefix(f"model.layers.{index}."): weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }
        h = rms_norm(x, layer["input_layernorm.weight"], eps)
        query, key, value = (_heads(layer, name, h, config) for name in "qkv")
        if "self_attn.q_norm.weight" in layer:
            query, key = (
                rms_norm(states, layer[f"self_attn.{name}_norm.weight"], eps)
                for name, states in (("q", query), ("k", key))
            )
        turned = int(query.shape[-1] * config.get("partial_rotary_factor", 1))
        query, key = (
            torch.cat([rotary(states[..., :turned], theta), states[..., turned:]], -1) for states in (query, key)
        )
        scores = query @ key[shared].mT / query.shape[-1] ** 0.5
        if size := config.get("block_size") or config.get("bd_size"):
            block = torch.arange(len(ids)) // size
            scores = scores.masked_fill(block > block[:, None], -torch.inf)
        attended = (scores.softmax(-1) @ value[shared]).transpose(0, 1).flatten(1)
        x = x + attended @ layer["self_attn.o_proj.weight"].T
        h = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        x = x + (_routed(layer, h, config) if "mlp.gate.weight" in layer else _swiglu(layer, "mlp", h))
    x = rms_norm(x, weights["model.norm.weight"], eps)
    if shift:
        x = torch.stack([x[max(place - 1, 0)] for place in range(len(ids))])
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def _heads(layer: dict[str, Tensor], name: str, h: Tensor, config: dict) -> Tensor:
    states = h @ layer[f"self_attn.{name}_proj.weight"].T + layer.get(f"self_attn.{name}_proj.bias", 0)
    size = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return states.view(len(h), -1, size).transpose(0, 1)


def _swiglu(layer: dict[str, Tensor], part: str, h: Tensor) -> Tensor:
    gate = h @ layer[f"{part}.gate_proj.weight"].T
    return (gate * gate.sigmoid() * (h @ layer[f"{part}.up_proj.weight"].T)) @ layer[f"{part}.down_proj.weight"].T


def _routed(layer: dict[str, Tensor], h: Tensor, config: dict) -> Tensor:
    """One token, one expert at a time; probabilities over all experts, renormalised if `norm_topk_prob` says so.

    LLaDA2: sigmoid scores, chosen by score and bias from the groups whose two best sum highest, renormalised over the
    chosen ones; and a shared expert.
    """
    if "n_group" in config:
        return _shared_and_routed(layer, h, config)
    rows = []
    for token in h:
        probs = (layer["mlp.gate.weight"] @ token).softmax(0)
        chosen = probs.argsort(descending=True)[: config["num_experts_per_tok"]].tolist()
        total = probs[chosen].sum() if config.get("norm_topk_prob") else 1
        rows.append(sum(probs[e] / total * _swiglu(layer, f"mlp.experts.{e}", token[None])[0] for e in chosen))
    return torch.stack(rows)


def _shared_and_routed(layer: dict[str, Tensor], h: Tensor, config: dict) -> Tensor:
    rows, size = [], config["num_experts"] // config["n_group"]
    for token in h:
        scores = (layer["mlp.gate.weight"] @ token).sigmoid()
        biased = (scores + layer["mlp.gate.expert_bias"]).tolist()
        groups = [range(group * size, (group + 1) * size) for group in range(config["n_group"])]
        groups.sort(key=lambda group: sum(sorted(biased[e] for e in group)[-2:]), reverse=True)
        admitted = [e for group in groups[: config["topk_group"]] for e in group]
        chosen = sorted(admitted, key=lambda e: biased[e], reverse=True)[: config["num_experts_per_tok"]]
        total = scores[chosen].sum()
        answers = [scores[e] / total * _swiglu(layer, f"mlp.experts.{e}", token[None])[0] for e in chosen]
        rows.append(sum(answers) * config["routed_scaling_factor"])
    return torch.stack(rows) + _swiglu(layer, "mlp.shared_experts", h)
