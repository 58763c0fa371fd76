"""A recipe's steps: what is written, by whom, and that it can be run again."""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerState

from dgrpo import run
from dgrpo.evaluation.answers import Evaluation
from dgrpo.run import callbacks, summary
from dgrpo.run import evaluation as run_evaluation
from dgrpo.run.callbacks import HeldOutEvaluation, MetricsFile
from dgrpo.tasks import TASKS, gsm8k

RECIPE = str(Path(__file__).parents[1] / "recipes" / "gsm8k.py")
SHORT = ["--max_steps", "1", "--num_eval_problems", "8", "--evaluate_every", "0", "--per_device_train_batch_size", "8"]
QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--sample_every", "0", "--log_completions", "false"]


@pytest.fixture
def main(monkeypatch, tmp_path):
    """A function (*words) that runs the recipe with one update and returns its folder."""

    def start(*words: str) -> Path:
        folder = tmp_path / "run"
        monkeypatch.setattr(sys, "argv", ["gsm8k.py", "--output_dir", str(folder), *SHORT, *QUIET, *words])
        run.run_task(gsm8k.TASK, RECIPE)
        return folder

    return start


def test_the_stored_settings_are_all_and_can_be_run_again(main, tmp_path):
    words = ["--lora_r", "4", "--diffusion_steps", "8", "--preset", str(Path(RECIPE).parent / "presets/tracerl.yaml")]
    folder = main(*words)
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert (stored["lora_r"], stored["use_peft"], stored["diffusion_steps"]) == (4, True, 8)
    assert stored["model_name_or_path"] == "embedded"
    asked = run.parse_recipe(RECIPE, argv=["--output_dir", str(folder), *SHORT, *QUIET, *words])
    again = run.parse_recipe(RECIPE, argv=["--config", str(folder / "config.yaml")])
    assert [asdict(each) for each in (again[0], again[2])] == [asdict(each) for each in (asked[0], asked[2])]
    assert again[1].to_dict() == asked[1].to_dict()


@pytest.mark.parametrize("words", [["--threshold", "none"], ["--threshold=none"]])
def test_a_recipes_setting_can_be_taken_back(words):
    assert run.parse_recipe(RECIPE, argv=[])[1].threshold == 0.9
    args = run.parse_recipe(RECIPE, argv=[*words, "--report_to", "none"])[1]
    assert (args.threshold, args.cache, args.report_to) == (None, "dual", [])
    with pytest.raises(ValueError, match="temperature"):
        run.parse_recipe(RECIPE, argv=["--temperature", "none"])


def test_only_the_main_process_writes_the_run_s_files(main, monkeypatch):
    """Eight processes that write one metrics.csv break each other's."""
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda self: False)
    folder = main()
    written = {path.name for path in folder.iterdir()}
    assert not written & {"metrics.csv", "summary.json", "samples.json", "config.yaml", "evaluation_before.json"}


def evaluation(tmp_path, num_rows: int) -> HeldOutEvaluation:
    rows = Dataset.from_list([{"prompt": "a"}] * num_rows)
    return HeldOutEvaluation(None, gsm8k.TASK, rows, 0, MetricsFile(tmp_path / "metrics.csv"))


def test_a_resumed_run_began_with_what_its_first_part_measured(tmp_path, monkeypatch):
    before = Evaluation(["a"] * 3, [True, False, True], [False] * 3, [1] * 3, 1.0, 3)
    (tmp_path / "evaluation_before.json").write_text(json.dumps(asdict(before)))
    state = TrainerState(global_step=2, is_world_process_zero=True)
    resumed = evaluation(tmp_path, 3)
    resumed.on_train_begin(None, state, None)
    assert resumed.before == before
    with pytest.raises(ValueError, match="num_eval_problems=4: the run that is resumed began with 3"):
        evaluation(tmp_path, 4).on_train_begin(None, state, None)
    # Another machine has no such file: the main process tells it.
    monkeypatch.setattr(
        "dgrpo.run.callbacks.broadcast_object_list", lambda found: found.__setitem__(0, asdict(before))
    )
    elsewhere = evaluation(tmp_path / "elsewhere", 3)
    elsewhere.on_train_begin(None, TrainerState(global_step=2, is_world_process_zero=False), None)
    assert elsewhere.before == before


def test_brackets_in_a_question_are_shown_as_they_are(capsys, tmp_path):
    side = Evaluation(["x"], [True], [False], [1], 1.0, 1).summary()
    came_to = {"task": "t", "before": side, "after": side, "steps": 1, "wall_seconds": 1.0, "cpu_seconds": 1.0}
    came_to["eval_sampler"] = "exact"
    sample = {"prompt": "What is list[int] in [/INST]?", "gold": "[a, b]", "before": "[x]", "after": "[/y]"}
    summary.show_summary(came_to, [sample], tmp_path)
    shown = capsys.readouterr().out
    for text in ("list[int] in [/INST]?", "(answer [a, b])", "[x]", "[/y]"):
        assert text in shown


@pytest.mark.parametrize(
    ("name", "value"), [("bnb_4bit_quant_type", "fp4"), ("use_bnb_nested_quant", "true")], ids=lambda value: value
)
def test_four_bit_settings_that_are_not_read_are_refused(main, name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is not read: load_in_4bit takes NF4"):
        main(f"--{name}", value)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A function (*words) -> the rows that recipes/evaluate.py asks for, as (dataset, eval_dataset, settings)."""
    spec = importlib.util.spec_from_file_location("evaluate_recipe", Path(RECIPE).with_name("evaluate.py"))
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    seen = []

    def load_rows(task, dataset, eval_dataset, **settings):
        seen.append((dataset, eval_dataset, settings["num_held_out"], settings["instruction"]))
        return [], [{}]

    def evaluate_checkpoint(checkpoint, task, rows, configs, *given, **settings):
        seen.append([config.max_completion_length for config in configs])
        return []

    for name, stub in (("load_rows", load_rows), ("evaluate_checkpoint", evaluate_checkpoint)):
        monkeypatch.setattr(run_evaluation, name, stub)
    # Models that are nowhere: no configuration says that they attend block by block.
    monkeypatch.setattr(run_evaluation, "load_config", lambda name: None)
    for name in ("write_results", "show_results", "default_to_one_thread"):
        monkeypatch.setattr(run_evaluation, name, lambda *given: None)

    def start(*words: str) -> list:
        seen.clear()
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", "--output_dir", str(tmp_path), *words])
        recipe.main()
        return list(seen)

    return start


def test_evaluation_asks_as_the_run_that_wrote_the_checkpoint_did(asked, tmp_path):
    assert asked("--task", "gsm8k") == [("embedded", None, 512, ""), [16]]
    assert asked("--task", "gsm8k", "--model", "owner/m") == [(None, None, 10**6, None), [128, 256, 512]]
    stored = {"model_name_or_path": "owner/m", "dataset": "mine.jsonl", "eval_dataset": None, "instruction": "Do."}
    for name, changed in (
        ("mine", {}),
        ("other", {"eval_dataset": "other.jsonl", "instruction": None}),
        ("embedded", {"model_name_or_path": "embedded", "dataset": "embedded", "instruction": ""}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(stored | changed))
    mine, other, embedded = (str(tmp_path / name) for name in ("mine", "other", "embedded"))
    model = ["--task", "gsm8k", "--model"]
    assert asked(*model, mine)[0] == ("mine.jsonl", None, 10**6, "Do.")
    for below in ("best", "checkpoint-40"):
        assert asked(*model, f"{mine}/{below}")[0] == ("mine.jsonl", None, 10**6, "Do.")
    assert asked(*model, other)[0] == ("other.jsonl", "other.jsonl", 10**6, None)
    assert asked(*model, embedded) == [("embedded", None, 512, ""), [16]]
    assert asked(*model, mine, "--instruction", "", "--eval_dataset", "all.csv")[0] == (
        "all.csv",
        "all.csv",
        10**6,
        "",
    )
    assert asked(*model, other, "--dataset", "new.csv", "--num_problems", "9")[0] == ("new.csv", None, 9, None)
    # Divided sources hold out a fifth, which may be far more than anybody waits for.
    assert TASKS["countdown"].held_out_split is None
    assert asked("--task", "countdown", "--model", "owner/m")[0] == (None, None, 512, None)


def test_a_line_of_metrics_fits_eighty_columns_and_begins_with_what_matters_most():
    logs = {
        "reward": 0.2578,
        "rewards/format_reward/mean": 1.0,
        "completions/mean_length": 128.25,
        "frac_reward_zero_std": 1.0,
        "kl": 0.01234,
        "clip_ratio/region_mean": 0.123,
        "entropy": 0.94,
        "tokens_per_second": 12345.0,
    }
    line = callbacks.metrics_line(1, 24, logs)
    assert line == "step  1/24  reward 0.258  reasons 100%  length 128.2  equal 100%  kl 0.012"
    assert len(callbacks.metrics_line(12345, 12345, logs)) <= 80
    assert callbacks.metrics_line(1, 2, {"entropy": 0.5, "kl": None}) == "step 1/2  entropy 0.50"


class Tracker(TrainerCallback):
    """A tracker of a kind that nobody here has heard of."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(logs)


def test_a_run_without_a_terminal_draws_no_bars_stores_completions_once_and_tells_every_tracker(
    main, monkeypatch, capfd
):
    tracker = Tracker()
    monkeypatch.setitem(callbacks.INTEGRATION_TO_CALLBACK, "own", Tracker)
    attach = run.steps.attach
    monkeypatch.setattr(run.steps, "attach", lambda trainer, more: attach(trainer, [tracker, *more]))
    words = ["--max_steps", "4", "--num_iterations", "2", "--log_completions", "true", "--disable_tqdm", "false"]
    folder = main(*words)
    assert sum("eval_accuracy" in logs for logs in tracker.logged) == 2
    stored = sorted(path.name for path in (folder / "completions").iterdir())
    assert stored == ["completions_00001.parquet", "completions_00003.parquet"]
    shown = capfd.readouterr()
    assert "it/s]" not in shown.out + shown.err
    assert "\r" not in shown.err
    assert max(map(len, re.findall(r"^step .*", shown.out, re.MULTILINE))) <= 80


def test_bars_are_for_terminals(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert not callbacks.shows_bars()
    monkeypatch.setattr(sys, "stdout", type("Terminal", (), {"isatty": lambda self: True})())
    assert callbacks.shows_bars()


ALLOCATOR = """
import resource
from dgrpo.run.allocator import keep_freed_memory
told = keep_freed_memory()
import torch
torch.set_num_threads(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    before = faults()
    for _ in range(20):
        torch.zeros(2**23)
print(told, faults() - before < 2000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
@pytest.mark.parametrize(("environment", "told"), [({}, True), ({"DGRPO_KEEP_MEMORY": "0"}, False)])
def test_freed_memory_is_kept_unless_the_environment_says_no(environment, told):
    """Twenty tensors of 32 MiB, one after the other: 163,840 page faults where each is fetched anew."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", ALLOCATOR]
    found = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(told), str(told)]
