"""benchmarks/gpu.py at toy size on a CPU: every stage runs, and a stopped run goes on."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu_and_is_not_run_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", benchmark)
    spec.loader.exec_module(benchmark)
    output = tmp_path / "toy.json"
    command = ["--output", str(output), "--device", "cpu", "--size", "tiny"]
    benchmark.main([*command, "--stage", "attention"])
    benchmark.main(command)
    assert "attention: done before" in capsys.readouterr().out
    stages = json.loads(output.read_text())["stages"]
    assert set(stages) == set(benchmark.STAGES)
    assert {name: stage["error"] for name, stage in stages.items() if "error" in stage} == {}
    rows = {name: stage["rows"] for name, stage in stages.items()}
    assert all(row["finite"] for row in rows["smoke"] if "finite" in row)
    assert {row["what"] for row in rows["smoke"]} >= {
        f"two updates of recipes/{name}.py" for name in ("gsm8k", "sft", "vrpo")
    }
    assert [row["sampler"] for row in rows["rollout"][1:]] == ["textbook", "exact", "dual cache", "threshold 0.9"]
    assert all(row["canvases"] == 2 for row in rows["fit"])
    assert "## cycle" in output.with_suffix(".md").read_text()
    with pytest.raises(SystemExit):
        benchmark.main([*command, "--size", "8b"])
    assert "give another --output" in capsys.readouterr().err
