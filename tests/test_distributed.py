"""Several processes: the losses of one, whatever the strategy; a NaN on one of them; several machines."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from warm import Warm

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# In four blocks, so that rows end at different times; averaged over the tokens of all processes.
SETTINGS = {
    "max_steps": 4,
    # Under ZeRO-3 the base weights are in pieces.
    "merge_adapter_for_rollouts": "false",
    "num_iterations": 2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "block_length": 4,
    "loss_type": "dapo",
    "learning_rate": 1e-2,
    "num_train_problems": 32,
    "num_eval_problems": 8,
    "evaluate_every": 0,
    "log_kl": "false",
}
# With LoRA; the block model's layers are checkpointed besides, and its views are scored one at a time.
MODELS: dict[str, dict[str, str]] = {
    "full attention": {},
    "blocks": {
        "config": str(ROOT / "recipes/gsm8k_block.yaml"),
        "block_length": "none",
        "use_peft": "true",
        "activation_checkpointing": "true",
        "views_per_pass": "1",
    },
}
STRATEGIES = {
    "ddp": "MULTI_CPU",
    "zero2": "DEEPSPEED",
    "zero2_offload": "DEEPSPEED",
    "zero3": "DEEPSPEED",
}


def arguments(folder: Path, **settings) -> list[str]:
    words = [word for name, value in (SETTINGS | settings).items() for word in (f"--{name}", str(value))]
    return [*words, "--output_dir", str(folder)]


def metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


@pytest.fixture(scope="module")
def warm():
    process = Warm()
    yield process
    process.close()


@pytest.fixture(scope="module", params=MODELS)
def one_process(request, warm, tmp_path_factory) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Settings, and metrics of one process, which takes both processes' micro-batches one after the other."""
    folder, settings = tmp_path_factory.mktemp("one"), MODELS[request.param]
    done = warm.run(folder / "log", arguments(folder / "run", gradient_accumulation_steps=2, **settings))
    assert done.codes == [0], done.output[-3000:]
    return settings, metrics(folder / "run")


@pytest.mark.parametrize("config", STRATEGIES)
def test_two_processes_have_the_losses_of_one(warm, one_process, tmp_path, config):
    # Weights that stay partitioned: no process may stop before the others.
    settings, one_process = one_process
    # Its backward pass fails where layers are checkpointed and a block model's views take several passes.
    zero3 = {"ds3_gather_for_generation": "false", "activation_checkpointing": "false"}
    more = settings | (zero3 if config == "zero3" else {})
    done = warm.run(tmp_path / "log", arguments(tmp_path / "run", **more), config=config)
    assert done.codes == [0, 0], done.output[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["num_processes"], summary["distributed_type"]) == (2, STRATEGIES[config])
    rows = metrics(tmp_path / "run")
    assert len(rows) == len(one_process) == 4
    for mine, theirs in zip(rows, one_process, strict=True):
        for name in ("loss", "grad_norm", "reward", "completions/mean_length"):
            if mine[name] or theirs[name]:
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=2e-3, abs=2e-5), name
    assert any(float(row["loss"]) for row in rows)
    assert len({row["completions/min_length"] for row in rows} | {row["completions/max_length"] for row in rows}) > 1


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_a_loss_that_is_nan_on_one_process_skips_the_update_on_all(warm, tmp_path, config):
    fault = {"call": "dgrpo.trainers.grpo:DiffuGRPOTrainer._compute_loss", "nth": 2, "factor": "nan", "rank": 1}
    done = warm.run(tmp_path / "log", arguments(tmp_path / "run"), config=config, faults=[fault])
    assert done.codes == [0, 0], done.output[-3000:]
    assert [float(row["skipped_updates"]) for row in metrics(tmp_path / "run")] == [0, 1, 0, 0]
    assert [path.name for path in (tmp_path / "run/bad_batches").glob("*.json")] == ["update_2_process_1.json"]
    assert "Update 2 is skipped" in done.output


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_the_reference_of_a_fully_trained_policy_is_its_copy(warm, tmp_path, config):
    """Under ZeRO-3 each process holds only a part of the weights that are copied."""
    full = {"use_peft": "false", "beta": 0.04, "learning_rate": 1e-4}
    done = warm.run(tmp_path / "log", arguments(tmp_path / "run", **full), config=config)
    assert done.codes == [0, 0], done.output[-3000:]
    kl = [float(row["kl"]) for row in metrics(tmp_path / "run")]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert max(kl) > 1e-6


def test_two_machines_meet(tmp_path):
    """The configuration for several machines, as two launchers with a rendezvous of their own on this one."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    # Without GPUs here: that is all that differs.
    config = yaml.safe_load((ROOT / "recipes/accelerate/zero2_nodes.yaml").read_text())
    on_cpu = tmp_path / "zero2_nodes.yaml"
    on_cpu.write_text(yaml.safe_dump(config | {"use_cpu": True, "mixed_precision": "no"}))
    launchers = []
    for rank in range(2):
        command = [str(Path(sys.executable).parent / "accelerate"), "launch"]
        command += ["--config_file", str(on_cpu), "--num_machines", "2"]
        command += ["--num_processes", "2", "--machine_rank", str(rank)]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        command += ["recipes/gsm8k.py", *arguments(tmp_path / "run")]
        with open(tmp_path / f"{rank}.log", "w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            launchers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        codes = [launcher.wait(timeout=300) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert codes == [0, 0], (tmp_path / "0.log").read_text()[-3000:] + (tmp_path / "1.log").read_text()[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["num_processes"], summary["distributed_type"], summary["steps"]) == (2, "DEEPSPEED", 4)
