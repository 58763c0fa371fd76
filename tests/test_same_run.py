"""Damaged checkpoints, changed settings, locks, signals and credentials: named in one line, and never trained on."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from trainers import lora, tiny_llada, tiny_trainer
from trl import ModelConfig

import dgrpo.cli
import dgrpo.run
from dgrpo import DiffuGRPOConfig, MaskedSFTConfig, VRPOConfig
from dgrpo.cli import one_line_errors
from dgrpo.reliability import manifest, same_run
from dgrpo.reliability.manifest import MANIFEST, resume_checkpoint, what_is_wrong
from dgrpo.run.lock import lock_file, locked
from dgrpo.run.settings import RecipeConfig, write_config
from dgrpo.run.steps import run_folder
from dgrpo.run.stopping import StopOnSignal
from dgrpo.secrets import redacted, without_secrets
from dgrpo.tasks import gsm8k

ROOT = Path(__file__).parents[1]
SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run of four updates with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("base") / "run"
    tiny_trainer(folder, lora=lora(), **SAVING).train()
    return folder


@pytest.fixture
def run(base, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(base, tmp_path / "run"))


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rollout_0.pt"]
FILES += ["trainer_state.json", "adapter_config.json", "settings.json", "training_args.bin"]
DAMAGES = {f"{name} {how.__name__}": (name, how) for name in FILES for how in (Path.unlink, flip, cut, empty, longer)}


@pytest.mark.parametrize(("name", "how"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named(run, name, how):
    assert what_is_wrong(run / "checkpoint-4") is None
    how(run / "checkpoint-4" / name)
    assert what_is_wrong(run / "checkpoint-4").startswith(f"{name} ")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {"a": 1}}', '{"files": 3}', "null"])
def test_a_damaged_manifest_is_named(run, text):
    (run / "checkpoint-4" / MANIFEST).write_text(text)
    assert what_is_wrong(run / "checkpoint-4") == "manifest.json cannot be read"


def test_what_else_is_wrong_with_a_checkpoint(run):
    shutil.copy(run / "checkpoint-4/rollout_0.pt", run / "checkpoint-4/rollout_1.pt")
    (run / "checkpoint-4/.nfs001").touch()
    assert what_is_wrong(run / "checkpoint-4") == "rollout_1.pt does not belong to it"
    for name in FILES:
        (run / "checkpoint-4" / name).unlink()
    assert what_is_wrong(run / "checkpoint-4").endswith(", and 7 more")
    (run / "checkpoint-2" / MANIFEST).unlink()
    assert "written before checkpoints had one" in what_is_wrong(run / "checkpoint-2")
    assert what_is_wrong(run / "checkpoint-6") == "there is no such folder"


def test_a_resumed_run_falls_back_to_the_last_whole_checkpoint_and_says_so(run, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(manifest.logger, "warning", told.append)
    flip(run / "checkpoint-4/optimizer.pt")
    assert resume_checkpoint(run) == str(run / "checkpoint-2")
    assert told == [
        "checkpoint-4: optimizer.pt has another content than was written (SHA-256). Set aside as damaged-...; the run "
        "resumes from checkpoint-2."
    ]
    assert (run / "damaged-checkpoint-4").is_dir()
    resumed = tiny_trainer(run, lora=lora(), **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert what_is_wrong(run / "checkpoint-4") is None


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_the_beginning(run):
    for name in ("checkpoint-2", "checkpoint-4"):
        empty(run / name / "optimizer.pt")
    with pytest.raises(ValueError, match=r"no checkpoint in output_dir=.* is whole \(checkpoint-4: optimizer.pt has"):
        resume_checkpoint(run)
    with pytest.raises(ValueError, match="cannot be resumed from: optimizer.pt has 0 bytes"):
        tiny_trainer(run, lora=lora(), **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-4"))


ROWS = {"prompt": ["a b", "c d e f", "g", "h i j", "k l m n o", "p q", "r s t", "u b"], "letter": list("abcdefgh")}


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 2e-3}, {"seed": 1}, {"temperature": 0.5}, {"beta": 0.01}, {"epsilon": 0.1},
        {"num_iterations": 1}, {"num_generations": 8}, {"max_completion_length": 3}, {"block_length": 6},
        {"diffusion_steps": 4}, {"estimator": "coupled"}, {"weight_decay": 0.1}, {"max_grad_norm": 0.5},
        {"lr_scheduler_type": "constant"}, {"warmup_steps": 1}, {"adam_beta2": 0.9}, {"optim": "sgd"},
        {"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 4}, {"scale_rewards": "batch"},
        {"loss_type": "grpo"}, {"p_mask_prompt": 0.3}, {"prompt_mask_scope": "row"}, {"max_steps": 3},
        {"remasking": "random"}, {"stop_at_eos": False}, {"reward_weights": [2.0]}, {"shuffle_dataset": False},
        {"mask_truncated_completions": True}, {"importance_sampling_level": "sequence"}, {"cfg_scale": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_changed_setting_is_refused_by_name_and_both_values(run, changed):
    ((name, value),) = changed.items()
    trainer = tiny_trainer(run, lora=lora(), **(SAVING | {"max_steps": 4} | changed))
    stored = json.loads((run / "checkpoint-2/settings.json").read_text())["trainer"]
    with pytest.raises(ValueError, match="checkpoint-2 is of another run: ") as error:
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert f"{name}={value!r}, begun with {stored[name]!r}" in str(error.value)
    assert "start a new run" in str(error.value)


def other_reward(prompts, completions, **columns):
    return [0.5 * (index % 2) for index in range(len(prompts))]


def test_other_rows_rewards_and_base_weights_are_refused(run):
    checkpoint = str(run / "checkpoint-2")
    others = {
        "training rows": {"dataset": Dataset.from_dict(ROWS)},
        "reward_funcs": {"reward": other_reward},
        "frozen weights": {"own_model": tiny_trainer(run).model},
    }
    with torch.no_grad():
        next(iter(others["frozen weights"]["own_model"].parameters())).add_(1.0)
    for name, changed in others.items():
        with pytest.raises(ValueError, match=name if name != "training rows" else "sha256="):
            tiny_trainer(run, lora=lora(), **SAVING, **changed).train(resume_from_checkpoint=checkpoint)


def test_what_may_change_does(run, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(same_run.logger, "warning", told.append)
    changed = {"max_steps": 6, "save_steps": 3, "logging_steps": 2, "views_per_pass": 2, "reward_timeout": 5.0}
    trainer = tiny_trainer(run, lora=lora(), **(SAVING | changed))
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert trainer.state.global_step == 6
    assert len(told) == 1
    assert "max_steps grows from 4 to 6: lr_scheduler_type='linear' is spread" in told[0]


def test_the_moving_reference_is_in_the_checkpoint(tmp_path):
    settings = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, **SAVING}
    straight = tiny_trainer(tmp_path / "run", **settings)
    straight.train()
    resumed = tiny_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    for one, other in ((straight.model, resumed.model), (straight.ref_model, resumed.ref_model)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_both_records_of_settings_are_kept(tmp_path):
    args = DiffuGRPOConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=6)
    for steps, resumed in ((4, False), (4, True), (6, True), (6, True), (8, True)):
        args.max_steps = steps
        write_config(tmp_path, RecipeConfig(resume=resumed), args, ModelConfig(), resumed=resumed)
    records = {path.name: yaml.safe_load(path.read_text())["max_steps"] for path in tmp_path.glob("*.yaml")}
    assert records == {"config.yaml": 4, "config.resumed-1.yaml": 6, "config.resumed-2.yaml": 8}


HOLDS = """import sys
from dgrpo.run.lock import locked
with locked(sys.argv[1]):
    print('held', flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_one_ends_however_it_ends(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    for end in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
            assert first.stdout.readline() == b"held\n"
            with (
                pytest.raises(ValueError, match=rf"is being written by another run \(process {first.pid} on "),
                locked(tmp_path / "run"),
            ):
                pass
            first.send_signal(end)
        with locked(tmp_path / "run"):
            assert lock_file(tmp_path / "run").exists()
    assert not lock_file(tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
@pytest.mark.parametrize("saves", [True, False])
def test_a_signal_ends_the_run_after_its_checkpoint_and_says_how_to_resume(tmp_path, capsys, number, name, saves):
    trainer = tiny_trainer(tmp_path / "run", **({"save_strategy": "steps", "save_steps": 100} if saves else {}))
    stop = StopOnSignal(trainer)
    trainer.add_callback(stop)
    inner = trainer._compute_loss
    trainer._compute_loss = lambda *args: (signal.raise_signal(number), inner(*args))[1]
    before = signal.getsignal(number)
    with stop:
        if saves:
            trainer.train()
        else:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
    assert signal.getsignal(number) is before
    with pytest.raises(SystemExit) as left:
        stop.leave()
    assert left.value.code == 128 + number
    shown = capsys.readouterr().err.splitlines()[-1]
    if saves:
        assert shown == (
            f"Stopped by {name} after update 1; the same command with --resume true resumes from "
            f"{tmp_path / 'run/checkpoint-1'}."
        )
        assert what_is_wrong(tmp_path / "run/checkpoint-1") is None
    else:
        assert shown == f"Stopped by {name} after update 0; it has no checkpoint to resume from (save_strategy='no')."


SECRET = "hf_" + "aB3dE5gH" * 4
SECRETS = [
    {"token": "x1"}, {"hub_token": "x1"}, {"api_key": "x1"}, {"a": {"HF_TOKEN": "x1"}}, {"password": "x1"},
    {"client_secret": "x1"}, {"headers": {"Authorization": "Bearer x1"}}, {"use_auth_token": "x1"},
    {"wandb_api_key": "x1"},
    {"plain": SECRET}, {"plain": [f"a {SECRET} b"]}, {"url": "https://me:x1pass@host/rows"}, {"x": "sk-" + "a1" * 12},
    {"x": "ghp_" + "a1" * 12}, {"x": "AKIA" + "A1" * 8}, {"x": "glpat-" + "a1" * 10}, {"x": "xoxb-" + "a1" * 8},
    {"x": "eyJhbGciOiJI.eyJzdWIiOiIx.abc"}, {"x": "Bearer abcdefgh1"}, {"access-token": "x1"},
]  # fmt: skip


@pytest.mark.parametrize("settings", SECRETS, ids=str)
def test_credentials_are_hidden_by_name_or_form(settings):
    shown = json.dumps(redacted(settings))
    assert "<hidden>" in shown
    assert not any(word in shown for word in ("x1", SECRET, "a1a1", "A1A1", "eyJ", "abcdefgh1"))


def test_what_is_no_credential_stays():
    settings = {"eos_token": "<eos>", "num_tokens": 3, "max_new_tokens": 5, "mask_token": "<mask>", "hub_token": None}
    settings |= {
        "dataset": "https://host/rows.jsonl",
        "key": "value",
        "model": "GSAI-ML/LLaDA-8B-Instruct",
        "n": [1, 2],
    }
    assert redacted(settings) == settings
    assert without_secrets("hf_ and sk-1 are too short") == "hf_ and sk-1 are too short"


@pytest.mark.parametrize("config_type", [DiffuGRPOConfig, MaskedSFTConfig, VRPOConfig])
def test_no_configuration_writes_a_credential(config_type, tmp_path):
    groups = {"per_device_train_batch_size": 6} if config_type is DiffuGRPOConfig else {}
    args = config_type(output_dir=str(tmp_path), use_cpu=True, hub_token=SECRET, run_name=f"of {SECRET}", **groups)
    torch.save(args, tmp_path / "training_args.bin")
    assert SECRET.encode() not in (tmp_path / "training_args.bin").read_bytes() + pickle.dumps(args)
    assert SECRET not in args.to_json_string()
    assert args.hub_token == SECRET, "what runs still has it"


def test_what_a_user_got_wrong_is_one_line_of_one_process(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="^dgrpo: .*nowhere.yaml'"), one_line_errors():
        dgrpo.run.parse_recipe(str(ROOT / "recipes/gsm8k.py"), argv=["--config", "nowhere.yaml"])
    # Another process speaks only where the first one has not ended the run within that time.
    waited = []
    monkeypatch.setattr(dgrpo.cli.time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="^dgrpo: .*nowhere.yaml'"), one_line_errors():
        dgrpo.run.parse_recipe(str(ROOT / "recipes/gsm8k.py"), argv=["--config", "nowhere.yaml"])
    assert waited == [dgrpo.cli.SECONDS_FOR_THE_FIRST]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import tea_pot", "dgrpo: No module named 'tea_pot': pip install the package that has 'tea_pot'."),
        ("open('nowhere.txt')", "dgrpo: [Errno 2] No such file or directory: 'nowhere.txt'"),
    ],
)
def test_missing_packages_and_files_are_one_line(code, message):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        exec(code)
    assert ended.value.code == message


def test_a_recipe_that_is_run_by_its_relative_path_has_one_line_errors(monkeypatch):
    """Code of a file that was started as `python recipes/evaluate.py` knows itself by this relative path."""
    monkeypatch.chdir(ROOT)
    code = compile("raise ValueError('device=1: wrong')", "recipes/evaluate.py", "exec")
    with pytest.raises(SystemExit, match="^dgrpo: device=1: wrong"), one_line_errors():
        exec(code)


@pytest.mark.parametrize("name", ["metrics.csv", "config.yaml"])
def test_a_full_disk_is_told_with_its_remedy(tmp_path, name):
    args = DiffuGRPOConfig(output_dir=str(tmp_path / "run"), per_device_train_batch_size=6, use_cpu=True)
    full = OSError(28, "No space left on device", name)
    message = f"output_dir=.*run' cannot be written: .*No space left.*'{name}'. Make room .*no checkpoint yet"
    with pytest.raises(OSError, match=message), run_folder(args, RecipeConfig(), ModelConfig()):
        raise full
    with pytest.raises(OSError, match=r"^\[Errno 5\]"), run_folder(args, RecipeConfig(), ModelConfig()):
        raise OSError(5, "Input/output error", "/somewhere/else")


def test_no_character_ends_a_run():
    code = "from dgrpo.cli import one_line_errors\n"
    code += "with one_line_errors(): print('\u2192 \u0416 \U0001f600'); raise OSError('\u2192')"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert done.stdout == b"\\u2192 \\u0416 \\U0001f600\n"
    assert done.stderr == b"dgrpo: \\u2192\n"


WRONG_WORDS = {
    "abc": (["--learning_rate", "abc"], "learning_rate: invalid float value: 'abc'"),
    "1.5": (["--max_steps", "1.5"], "max_steps: invalid int value: '1.5'"),
    "no value": (["--seed"], "seed: expected one argument"),
    "choice": (["--lr_scheduler_type", "tea"], "lr_scheduler_type: invalid choice: 'tea'"),
    "bool": (["--use_peft", "tea"], "use_peft: "),
    "nan": (["--learning_rate", "nan"], "learning_rate=nan: must be 0 or a positive finite number"),
    "inf": (["--weight_decay", "inf"], "weight_decay=inf"),
    "negative": (["--epsilon", "-0.2"], "epsilon=-0.2"),
    "list": ({"learning_rate": [1, 2]}, r"learning_rate=[1, 2]: must be one value"),
    "mapping": ({"max_steps": {"a": 1}}, "max_steps={'a': 1}: must be one value"),
    "truth": ({"max_steps": True}, "max_steps=True: must be a number"),
    "word in yaml": ({"learning_rate": "fast"}, "learning_rate: invalid float value: 'fast'"),
    "broken yaml": ("a: [", "cannot be read: while parsing"),
    "no mapping": ("- a", "must be a YAML mapping"),
    "not utf-8": (b"\xff\xfe\xff", "cannot be read"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG_WORDS.values(), ids=WRONG_WORDS)
def test_settings_of_the_wrong_kind_are_one_line(tmp_path, wrong, message):
    words = wrong
    if not isinstance(wrong, list):
        file = tmp_path / "x.yaml"
        text = yaml.safe_dump({"use_cpu": True} | wrong) if isinstance(wrong, dict) else wrong
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        words = ["--config", str(file), "--per_device_train_batch_size", "6"]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        dgrpo.run.parse_recipe(str(ROOT / "recipes/gsm8k.py"), argv=words)
    assert message in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("recipe", ["gsm8k", "countdown", "sudoku", "math500"])
def test_no_setting_of_the_embedded_model_reaches_another(recipe):
    words = ["--model_name_or_path", "owner/model", "--use_cpu", "--per_device_train_batch_size", "6"]
    file = str(ROOT / f"recipes/{recipe}.py")
    settings, args, model = dgrpo.run.parse_recipe(file, argv=words)
    plain = DiffuGRPOConfig(output_dir=f"runs/{recipe}", use_cpu=True, per_device_train_batch_size=6)
    assert args.to_dict() == plain.to_dict()
    assert (settings, model.use_peft) == (RecipeConfig(), False)
    embedded = dgrpo.run.parse_recipe(file, argv=[])
    assert embedded[1].max_completion_length < 256
    with pytest.raises(ValueError, match="Those of the embedded model are not taken for another"):
        dgrpo.run.steps.rewards_of(settings)


@pytest.mark.parametrize("config_type", [MaskedSFTConfig, VRPOConfig])
def test_sft_and_vrpo_take_no_toy_settings_and_turn_bf16_on_where_there_is_a_gpu(config_type, monkeypatch, tmp_path):
    recipe = "sft" if config_type is MaskedSFTConfig else "vrpo"
    words = ["--model_name_or_path", "owner/model", "--use_cpu"]
    file = str(ROOT / f"recipes/{recipe}.py")
    _, args, _ = dgrpo.run.parse_recipe(file, RecipeConfig, config_type, ModelConfig, argv=words)
    assert args.to_dict() == config_type(output_dir=f"runs/{recipe}", use_cpu=True).to_dict()
    assert args.bf16 is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fake = type("Args", (), {"bf16": None, "use_cpu": False, "fp16": False})()
    from dgrpo.reliability.checks import default_to_bf16

    default_to_bf16(fake)
    assert fake.bf16 is True


def test_a_resumed_recipe_is_compared_before_a_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(dgrpo.run.steps, "load_model", None)
    words = ["--output_dir", str(run), "--resume", "true"]
    monkeypatch.setattr(sys, "argv", ["gsm8k.py", *words])
    with pytest.raises(ValueError, match="checkpoint-4 is of another run: .*max_completion_length=16, begun with 6"):
        dgrpo.run.run_task(gsm8k.TASK, str(ROOT / "recipes/gsm8k.py"))


def test_a_prompt_longer_than_the_context_of_the_model_is_told(tmp_path):
    trainer = tiny_trainer(tmp_path, own_model=tiny_llada(max_sequence_length=8))
    with pytest.raises(ValueError, match=r"a prompt has \d tokens, .* context of 8: set max_prompt_length=2"):
        trainer.train()
