"""What the tables of the docs say of settings, defaults, sizes and rewards is what the code says."""

import importlib
import inspect
import re
from dataclasses import MISSING, fields

import torch
from test_docs import ROOT, blocks, text_of

# The keys of d1's slurm_scripts/train.yaml (commit 837888f).
D1_KEYS = """
use_peft torch_dtype load_in_4bit model_path attn_implementation lora_r lora_alpha lora_dropout peft_task_type dataset
seed bf16 sync_ref_model ref_model_sync_steps adam_beta1 adam_beta2 weight_decay max_grad_norm use_vllm vllm_device
vllm_gpu_memory_utilization warmup_ratio logging_steps learning_rate lr_scheduler_type num_generations num_train_epochs
per_device_eval_batch_size per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing
gradient_checkpointing_kwargs resume_from_checkpoint run_name output_dir save_steps save_strategy save_total_limit
max_completion_length max_prompt_length block_length diffusion_steps generation_batch_size remasking random_masking
p_mask_prompt beta epsilon num_iterations
"""


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first column is called `heading`."""
    lines = iter(text_of(page).splitlines())
    for line in lines:
        if line.startswith(f"| {heading} |"):
            next(lines)
            break
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    assert found, heading
    return found


def defaults(config: type) -> dict:
    return {each.name: each.default for each in fields(config) if each.default is not MISSING}


def names_in(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_the_settings_have_the_defaults_that_the_page_says():
    from dgrpo import DiffuGRPOConfig

    known = defaults(DiffuGRPOConfig)
    for name, default, _ in table("docs/settings.md", "setting"):
        assert str(known[name.strip("`")]) == default.strip("`"), name


def test_every_flag_of_d1_has_an_answer_that_exists():
    from trl import ModelConfig

    from dgrpo import DiffuGRPOConfig
    from dgrpo.run.settings import RecipeConfig

    known = {each.name for config in (DiffuGRPOConfig, ModelConfig, RecipeConfig) for each in fields(config)}
    rows = table("docs/migration.md", "d1's train.yaml")
    for theirs, ours, _ in rows:
        assert ours == "-" or set(names_in(ours)) <= known, theirs
        if ours == "-" and "vllm" not in theirs:
            (name,) = names_in(theirs)
            assert name not in known or name.startswith(("sync_ref", "ref_model")), f"{name} exists here"
    assert {name for theirs, *_ in rows for name in names_in(theirs)} == set(D1_KEYS.split())


def test_the_settings_of_block_models_scripts_have_an_answer_that_exists():
    from dgrpo import DiffuGRPOConfig, SamplerConfig

    known = {each.name for each in fields(DiffuGRPOConfig)}
    known |= {f"SamplerConfig.{each.name}" for each in fields(SamplerConfig)}
    rows = table("docs/migration.md", "theirs")
    assert {name for _, ours, _ in rows for name in re.findall(r"`([\w.]+)`", ours)} <= known
    assert len(rows) == 16


def test_what_differs_from_trl_is_what_the_page_says():
    from trl import GRPOConfig

    from dgrpo import DiffuGRPOConfig
    from dgrpo.trainers.config import _REFUSED

    theirs, ours = defaults(GRPOConfig), defaults(DiffuGRPOConfig)
    differing = {name: [f"`{theirs[name]}`", f"`{ours[name]}`"] for name in theirs if theirs[name] != ours[name]}
    told = {name.strip("`"): values for name, *values in table("docs/migration.md", "field")}
    assert told == differing
    second = text_of("docs/migration.md").rpartition("\n| field |")[2]
    refused = {name for line in second.splitlines() if line.startswith("| `") for name in names_in(line.split("|")[1])}
    assert refused == set(_REFUSED)


def test_the_gigabytes_of_the_page_are_those_of_its_arithmetic():
    space: dict = {}
    exec(blocks("docs/memory.md")[0], space)
    for model, parameters, weights, one, eight in table("docs/memory.md", "model"):
        assert parameters == f"{space['MODELS'][model][0] / 1e9:.2f} billion"
        expected = (space["weights"](model), space["adapter"](model), space["adapter"](model, 8))
        assert [weights, one, eight] == [f"{value:.1f} GB" for value in expected], (model, expected)
    page = text_of("docs/memory.md")
    rows = re.findall(r"^\| ([\w.-]+) \| (\d+) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for model, pictures, cells in rows:
        for length, cell in zip((128, 256, 512, 1024), cells.split(" | "), strict=True):
            sizes = [space["update"](model, int(pictures), 200 + length, on) for on in (True, False)]
            assert cell == " / ".join(f"{size:.1f}" for size in sizes), (model, pictures, length)
    cached = re.findall(r"^\| ([\w.-]+) \| ([\d.]+) GB \| ([\d.]+) GB \|$", page, re.MULTILINE)
    assert len(cached) == 3
    for model, *cells in cached:
        assert cells == [f"{space['cache'](model, rows, 456):.1f}" for rows in (6, 48)], model


def test_the_sizes_that_the_memory_page_starts_from_are_those_of_the_networks():
    from dgrpo.models.dream import DreamConfig, DreamModel
    from dgrpo.models.families import FAMILIES
    from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM
    from dgrpo.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM

    space: dict = {}
    exec(blocks("docs/memory.md")[0], space)
    # Dream-7B's sizes are Qwen2.5-7B's.
    qwen = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}
    with torch.device("meta"):
        networks = {
            ("LLaDA-8B", "llada"): LLaDAModelLM(LLaDAConfig(mlp_hidden_size=12288)),
            ("LLaDA-MoE-7B-A1B", "llada_moe"): LLaDAMoEModelLM(LLaDAMoEConfig()),
            ("Dream-7B", "Dream"): DreamModel(DreamConfig(**qwen, **heads)),
        }
    for (name, family), network in networks.items():
        targets = re.compile(FAMILIES[family].lora_targets)
        linears = [
            module
            for path, module in network.named_modules()
            if isinstance(module, torch.nn.Linear) and targets.fullmatch(path)
        ]
        trained = sum(128 * (module.in_features + module.out_features) for module in linears)
        assert space["MODELS"][name][:2] == (sum(p.numel() for p in network.parameters()), trained)


def test_the_table_of_rewards_is_whole_and_names_their_columns():
    from dgrpo.reliability.columns import required_columns

    written = re.findall(
        r"^\| `(rewards\.\w+:\w+)` \| [^|]+ \| ([^|]*)\|", (ROOT / "docs/rewards.md").read_text(), re.M
    )
    found = {}
    for path in (ROOT / "rewards").glob("[!_]*.py"):
        module = importlib.import_module(f"rewards.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.endswith("_reward") and function.__module__ == module.__name__:
                found[f"rewards.{path.stem}:{name}"] = required_columns(function)
    assert {name: re.findall(r"`(\w+)`", columns) for name, columns in written} == found
