"""Recipes: settings, the main job, real GSM8K rows, several processes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM
from dgrpo.run.settings import parse_recipe

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "gsm8k.py"
DATA = ROOT / "tests/data"


def launch(command: list[str], timeout: int = 900) -> str:
    """Runs a command in the project's root with one thread a process; its output, or an error that shows it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def short(output_dir: Path, *more: str) -> list[str]:
    return [
        "--output_dir",
        str(output_dir),
        "--max_steps",
        "3",
        "--num_eval_problems",
        "16",
        "--evaluate_every",
        "0",
        *more,
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_yaml_of_a_trainer_parses(path):
    if path.name.startswith("gsm8k"):
        recipe, args, model_config = parse_recipe(
            str(RECIPE), argv=["--config", str(path), "--use_cpu", "--bf16", "false"]
        )
        assert recipe.reward_funcs
        # Full fine-tuning is published for SDAR, and what the tiny one's recipe does.
        assert model_config.use_peft == ("sdar" not in path.name and "block" not in path.name)
        assert args.sampler().max_completion_length == args.max_completion_length
    else:
        assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_command_line_wins_over_the_yaml():
    _, args, _ = parse_recipe(str(RECIPE), argv=["--learning_rate", "0.5", "--num_iterations=2"])
    assert (args.learning_rate, args.num_iterations) == (0.5, 2)


def test_unknown_settings_are_refused(tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("output_dir: x\nblok_length: 3\n")
    with pytest.raises(ValueError, match="blok_length"):
        parse_recipe(str(RECIPE), argv=["--config", str(config)])
    with pytest.raises(ValueError, match="--blok_length"):
        parse_recipe(str(RECIPE), argv=["--blok_length", "3"])
    with pytest.raises(ValueError, match="learning_rat"):
        parse_recipe(str(RECIPE), argv=["--learning_rat", "1"])
    with pytest.raises(ValueError, match="--resume true"):
        parse_recipe(str(RECIPE), argv=["--resume_from_checkpoint", "runs/gsm8k/checkpoint-8"])


def test_a_preset_is_laid_over_the_recipe(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("estimator: coupled\nnum_iterations: 2\n")
    _, args, _ = parse_recipe(str(RECIPE), argv=["--preset", str(preset)])
    assert (args.estimator, args.num_iterations, args.num_generations) == ("coupled", 2, 8)


@pytest.mark.slow
def test_the_main_job_writes_what_it_promises(tmp_path):
    output = launch([sys.executable, str(RECIPE), *short(tmp_path, "--num_iterations", "2")])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"task", "model", "seed", "before", "after", "steps", "wall_seconds", "cpu_seconds"} <= summary.keys()
    assert (summary["steps"], summary["num_processes"], summary["before"]["n"]) == (3, 1, 16)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0]["eval_accuracy"]
    assert rows[1]["reward"]
    for name in ("curves.png", "report.html", "adapter_model.safetensors", "samples.json", "config.yaml"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert list(tmp_path.rglob("events.out.tfevents*"))
    for word in ("reward", "reasons", "length", "before", "after", "showed its reasoning on"):
        assert word in output


@pytest.mark.slow
def test_the_embedded_block_model_trains_and_is_evaluated_as_its_recipe_says(tmp_path):
    config = ["--config", str(ROOT / "recipes/gsm8k_block.yaml"), "--max_steps", "2"]
    launch([sys.executable, str(RECIPE), *short(tmp_path), *config])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["model"], summary["estimator"]) == (2, "embedded-block", "trace")
    evaluate = [sys.executable, "recipes/evaluate.py", "--task", "gsm8k", "--num_problems", "16"]
    for model in ("embedded-block", str(tmp_path)):
        output = launch([*evaluate, "--model", model, "--output_dir", str(tmp_path / "generations")])
        assert "gsm8k_20_20" in output
    flags = {"remasking": "entropy", "entropy_sum": "0.35", "min_commit": "2", "top_k": "9", "top_p": "0.5"}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    launch([*evaluate, "--model", "embedded-block", "--output_dir", str(tmp_path / "flags"), *words])
    stored = json.loads((tmp_path / "flags/gsm8k_20_20_rows.0.jsonl").read_text().splitlines()[0])["sampler"]
    assert {name: str(stored[name]) for name in flags} == flags


@pytest.mark.slow
def test_what_stands_around_the_main_job_runs(tmp_path):
    """Fine-tune, evaluate the adapter, merge it, watch the merged model."""
    adapter, merged = str(tmp_path / "sft"), str(tmp_path / "merged")
    launch([sys.executable, "recipes/sft.py", "--output_dir", adapter, "--max_steps", "3", "--num_examples", "128"])
    evaluate = [sys.executable, "recipes/evaluate.py", "--task", "gsm8k", "--num_problems", "16"]
    output = launch([*evaluate, "--adapter", adapter, "--output_dir", str(tmp_path / "generations")])
    assert "gsm8k_16_16" in output
    stored = json.loads((tmp_path / "generations/gsm8k_16_16_0_generations.json").read_text())["generations"]
    assert len(stored) == 16
    launch([sys.executable, "recipes/merge.py", "--adapter", adapter, "--output_dir", merged])
    launch([sys.executable, "-m", "dgrpo", "watch", "--model", merged, "--html", str(tmp_path / "watch.html")])
    assert "<html" in (tmp_path / "watch.html").read_text()


@pytest.mark.slow
def test_preferences_train_the_embedded_default(tmp_path):
    output = launch(
        [
            sys.executable,
            "recipes/vrpo.py",
            "--output_dir",
            str(tmp_path),
            "--max_steps",
            "2",
            "--num_eval_problems",
            "8",
        ]
    )
    assert "before:" in output
    assert "after:" in output
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_evaluation_draws_the_same_in_batches_of_any_size():
    from dgrpo import SamplerConfig, load_model
    from dgrpo.evaluation.answers import evaluate
    from dgrpo.run.steps import CHECKPOINTS
    from dgrpo.tasks import gsm8k, load_rows

    model, tokenizer = load_model(str(CHECKPOINTS / "gsm8k"))
    rows = list(load_rows(gsm8k.TASK, "embedded", num_train=8, num_held_out=8, instruction="")[1])
    config = SamplerConfig(16, 16, 4, temperature=1.0)
    whole, parts = (
        evaluate(model, tokenizer, rows, gsm8k.TASK.grade, config, batch_size=size).completions for size in (8, 3)
    )
    assert whole == parts


def llada_folder(folder: Path, texts: list[str]) -> Path:
    """A small random LLaDA in the published layout, with a BPE tokenizer trained on `texts`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|mdm_mask|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0], mask_token=special[1])
    tokenizer.save_pretrained(folder)
    LLaDAModelLM(
        LLaDAConfig(
            d_model=32,
            n_heads=2,
            n_layers=2,
            mlp_hidden_size=64,
            vocab_size=len(tokenizer),
            mask_token_id=tokenizer.mask_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            architectures=["LLaDAModelLM"],
        )
    ).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_real_questions_of_different_lengths_train_a_llada_checkpoint(tmp_path):
    questions = [json.loads(line) for line in (DATA / "gsm8k/train.jsonl").read_text().splitlines()]
    folder = llada_folder(tmp_path / "llada", [row["question"] + row["answer"] for row in questions])
    sizes = ["--max_completion_length", "32", "--block_length", "16", "--diffusion_steps", "16"]
    batch = ["--per_device_train_batch_size", "16", "--num_generations", "4", "--num_train_problems", "200"]
    more = ["--model_name_or_path", str(folder), "--dataset", str(DATA / "gsm8k/train.jsonl"), *sizes, *batch]
    # The settings beside the recipe are the embedded model's and are not taken for this one.
    more += ["--config", str(RECIPE.with_suffix(".yaml"))]
    launch([sys.executable, str(RECIPE), *short(tmp_path / "run", *more, "--beta", "0.04")])
    files = sorted((tmp_path / "run" / "completions").glob("*.parquet"))
    completions = pd.concat([pd.read_parquet(file) for file in files])
    assert len({len(row[-1]["content"]) for row in completions["prompt"]}) > 2, "questions of different lengths"
    assert {"prompt", "completion", "advantage", "correctness_reward"} <= set(completions.columns)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("config", "kind"), [("ddp", "MULTI_CPU"), ("zero2", "DEEPSPEED")])
def test_two_processes_train(tmp_path, config, kind):
    accelerate = str(Path(sys.executable).parent / "accelerate")
    accelerated = [accelerate, "launch", "--config_file", str(ROOT / f"recipes/accelerate/{config}.yaml"), str(RECIPE)]
    launch([*accelerated, *short(tmp_path, "--per_device_train_batch_size", "16")])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["num_processes"], summary["distributed_type"], summary["steps"]) == (2, kind, 3)


def test_rewards_import_neither_torch_nor_the_toolkit():
    code = (
        "import sys, rewards.gsm8k, rewards.format, rewards.countdown, rewards.sudoku, rewards.math500\n"
        "import rewards.programs;"
        "assert not {'torch', 'dgrpo', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
