"""Runs side by side: which are of one kind, what the table says, and what the bands span."""

import io

import numpy as np
import pytest
from fabricated_run import fabricate_run
from PIL import Image
from rich.console import Console

from dgrpo.report.compare import along, compare, kinds_of, read_run
from dgrpo.report.curves import COLOURS, band, draw_curves, moving_mean


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        fabricate_run(folder / f"{beta}-{seed}", seed=seed, steps=12, beta=beta)
        for beta in (0.0, 0.04)
        for seed in (1, 2)
    ]


def printed(run_dirs, png=None, width=120) -> str:
    console = Console(file=io.StringIO(), width=width)
    compare(run_dirs, png, console=console)
    return console.file.getvalue()


def test_runs_that_differ_in_their_seed_only_are_one_kind(runs):
    kinds = kinds_of([read_run(run) for run in runs])
    assert {kind: [run.name for run in group] for kind, group in kinds.items()} == {
        "beta=0.0, 2 seeds": ["0.0-1", "0.0-2"],
        "beta=0.04, 2 seeds": ["0.04-1", "0.04-2"],
    }
    assert list(kinds_of([read_run(runs[0])])) == ["gsm8k"]


def test_table_tells_each_run_and_the_mean_of_a_kind(runs):
    lines = [" ".join(line.split()) for line in printed(runs).splitlines() if line.strip()]
    assert lines[0] == "run method task model seed n before after gain steps wall"
    row = "gsm8k tiny-llada 1 512 46.0 % (40.7 - 49.3) 88.0 % (86.0 - 91.4) +42.0 12 2 min 28 s"
    assert lines[2] == f"0.0-1 one_step + grpo {row}"
    assert lines[4] == "mean of 2 - 46.5 % \u00b1 0.7 87.5 % \u00b1 0.7 +41.0 12 2 min 29 s"
    assert len(lines) == 8


def test_runs_without_a_summary_are_listed(runs, tmp_path):
    running = fabricate_run(tmp_path / "running", steps=12)
    (running / "summary.json").unlink()
    lines = printed([runs[0], running]).splitlines()
    assert next(line.split() for line in lines if "running" in line) == [
        *("running", "one_step", "+", "grpo", "tiny-llada"),
        *"------",
    ]


def test_what_makes_runs_no_comparison_is_said(runs, tmp_path):
    assert "different" not in printed(runs)
    other = fabricate_run(tmp_path / "other", steps=12)
    text = (other / "summary.json").read_text().replace('"n": 512', '"n": 64')
    (other / "summary.json").write_text(text)
    config = (other / "config.yaml").read_text().replace("[correctness_reward, format_reward]", "[mine]")
    (other / "config.yaml").write_text(config)
    said = " ".join(printed([runs[0], other]).split())
    assert "These runs have different rewards" in said
    assert "These runs have different numbers of held-out problems (512; 64)" in said


def test_curves_over_rollouts_tokens_and_seconds():
    metrics = {
        "reward": [(1, 0.5), (5, 0.7)],
        "eval_accuracy": [(0, 0.1), (4, 0.2), (8, 0.3)],
        "num_tokens": [(1, 100.0), (5, 250.0)],
        "step_time": [(step, 2.0) for step in range(1, 9)],
    }
    assert along(metrics, "updates") is metrics
    assert along(metrics, "rollouts")["eval_accuracy"] == [(0, 0.1), (1, 0.2), (2, 0.3)]
    assert along(metrics, "tokens")["eval_accuracy"] == [(0, 0.1), (100, 0.2), (250, 0.3)]
    assert along(metrics, "seconds")["eval_accuracy"] == [(0, 0.1), (8, 0.2), (16, 0.3)]
    assert along(metrics, "seconds")["reward"] == [(2, 0.5), (10, 0.7)]
    with pytest.raises(ValueError, match="x='hours'"):
        along(metrics, "hours")
    with pytest.raises(ValueError, match="no column num_tokens"):
        along({"reward": [(1, 0.5)]}, "tokens")


def test_curves_of_seeds_that_share_no_second_are_read_between_their_points():
    runs = [{"reward": [(0.0, 0.0), (2.0, 2.0), (4.0, 4.0)]}, {"reward": [(0.0, 1.0), (3.0, 4.0), (6.0, 7.0)]}]
    steps, values = band(runs, "reward")
    assert steps.tolist() == [0.0, 2.0, 4.0]
    assert values.tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no run here"):
        printed([tmp_path])
    with pytest.raises(ValueError, match="at least one run"):
        printed([])


def test_band_spans_the_seeds_over_the_steps_they_share():
    runs = [{"reward": [(1, 0.0), (2, 1.0), (3, 5.0)]}, {"reward": [(1, 1.0), (2, 3.0)]}, {"kl": [(1, 9.0)]}]
    steps, values = band(runs, "reward")
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [[0.0, 1.0], [1.0, 3.0]]
    assert len(band(runs, "entropy")[0]) == 0


def test_moving_mean_averages_what_there_is():
    assert moving_mean(np.array([0.0, 3.0, 6.0, 9.0]), 3).tolist() == [1.5, 3.0, 6.0, 7.5]


def test_image_draws_every_kind(runs, tmp_path):
    path = tmp_path / "plots" / "compare.png"
    kinds = compare(runs, path, console=Console(file=io.StringIO()))
    assert len(kinds) == 2
    with Image.open(path) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height)}
    for colour in COLOURS[:2]:
        assert tuple(bytes.fromhex(colour[1:])) in colours
    assert tuple(bytes.fromhex(COLOURS[2][1:])) not in colours


def test_image_of_runs_without_metrics(tmp_path):
    assert draw_curves(tmp_path / "empty.png", {"a": [{}]}).exists()
