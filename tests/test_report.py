"""The report of a run: what it reads from the folder, and what it makes of it."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from fabricated_run import INSTRUCTIONS, fabricate_run
from PIL import Image

from dgrpo.report.curves import with_summary_accuracy
from dgrpo.report.data import (
    MAX_TEXT_BYTES,
    charts,
    common_beginning,
    completion_table,
    constants,
    cut_texts,
    flips_in_words,
    other_charts,
    report_data,
    samples,
    thin,
    tiles,
    time_split,
    write_curves,
    write_report,
)
from dgrpo.report.metrics import METRICS, metric_of, metrics_reference, warnings
from dgrpo.report.run_folder import Completion, message_text, read_completions, read_metrics, read_summary
from dgrpo.report.selections import best, evenly_spaced, groups, most_changed, paid_without_format, worst
from dgrpo.text import duration


def completion(step=1, prompt="p", text="t", correct=0.0, form=0.0, **rewards) -> Completion:
    rewards = {"correctness_reward": correct, "format_reward": form} | rewards
    return Completion(step, prompt, text, rewards, sum(rewards.values()), None)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return fabricate_run(tmp_path_factory.mktemp("runs") / "run")


def test_metrics_of_a_file_that_is_being_written(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,reward,kl\n1,0.5,\n2,nan,0.1\n1,0.75,0\n3,1.0,0.2\n4,1.")
    assert read_metrics(tmp_path) == {"reward": [(1, 0.75), (3, 1.0), (4, 1.0)], "kl": [(1, 0.0), (2, 0.1), (3, 0.2)]}
    assert read_metrics(tmp_path / "missing") == {}


def test_completions_are_read_as_logged(run_dir):
    completions, unreadable = read_completions(run_dir)
    assert unreadable == []
    assert len(completions) == 40 * 16
    assert [c.step for c in completions] == sorted(c.step for c in completions)
    table = pd.read_parquet(run_dir / "completions" / "completions_00007.parquet")
    seventh = [c for c in completions if c.step == 7]
    assert [c.total for c in seventh] == (table["correctness_reward"] + table["format_reward"]).tolist()
    assert seventh[0].prompt == table["prompt"][0][0]["content"]
    assert seventh[0].rewards.keys() == {"correctness_reward", "format_reward"}


def test_rewards_without_metrics_with_weights_and_none(tmp_path):
    (tmp_path / "completions").mkdir()
    (tmp_path / "config.yaml").write_text("reward_weights: [2.0, 0.5]\n")
    columns = {"step": [3], "prompt": ["2 + 2?"], "completion": ["4"], "a": [1.0], "b": [None], "note": ["x"]}
    frame = pd.DataFrame(columns | {"advantage": [0.1]}).astype({"b": float})
    frame.to_parquet(tmp_path / "completions" / "completions_00003.parquet")
    assert read_completions(tmp_path)[0] == [Completion(3, "2 + 2?", "4", {"a": 1.0, "b": None}, 2.0, 0.1)]


def test_completions_logged_again_by_inner_updates_count_once(tmp_path):
    (tmp_path / "completions").mkdir()
    for step, text in enumerate(["a", "a", "b", "a"], start=1):
        frame = pd.DataFrame({"step": [step], "prompt": ["p"], "completion": [text], "r": [1.0]})
        frame.to_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
    assert [(c.step, c.text) for c in read_completions(tmp_path)[0]] == [(1, "a"), (3, "b"), (4, "a")]


def test_half_written_files_are_left_out_and_named(tmp_path):
    run = fabricate_run(tmp_path / "run", steps=8)
    for name in ("completions/completions_00008.parquet", "summary.json", "config.yaml"):
        path = run / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (run / "completions" / "completions_00007.parquet").write_bytes(b"")
    (run / "samples.json").unlink()
    data = report_data(run)
    assert [note.split()[0] for note in data["notes"][:2]] == [
        "completions_00007.parquet",
        "completions_00008.parquet",
    ]
    assert data["completions"]["logged"] == 6 * 16
    assert data["samples"] == []
    assert read_summary(run) == {}


def test_empty_and_missing_folders(tmp_path):
    data = report_data(tmp_path)
    assert data["charts"] == data["more"] == data["tiles"] == data["time"]["phases"] == []
    assert data["completions"]["views"] == []
    assert write_report(tmp_path).read_text().startswith("<!doctype html>")
    assert write_curves(tmp_path).stat().st_size > 1000
    with pytest.raises(ValueError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_best_and_worst_are_distinct_and_latest_first():
    logged = [
        completion(1, correct=1.0),
        completion(2, correct=1.0),
        completion(1, text="u", form=0.5),
        completion(3, text="v"),
    ]
    assert [row[0].step for row in best(logged, 9)] == [2, 1, 3]
    assert [row[0].text for row in worst(logged, 9)] == ["v", "u", "t"]
    assert [row[0].text for row in best(logged, 1)] == ["t"]


def test_most_changed_compares_the_first_and_the_last_group_of_a_prompt():
    logged = [
        completion(1, "a", "a1", correct=0.0),
        completion(1, "a", "a2", correct=0.4),
        completion(5, "a", "between", correct=9.0),
        completion(9, "a", "a3", correct=1.0),
        completion(1, "b", "b1", correct=1.0),
        completion(9, "b", "b2", correct=0.0),
        completion(9, "c", "once", correct=1.0),
    ]
    rows = most_changed(logged, 9)
    assert [(now.text, then.text, round(change, 6)) for now, then, change in rows] == [
        ("b2", "b1", -1.0),
        ("a3", "a1", 0.8),
    ]


def test_paid_without_format_finds_rewarded_completions_in_the_wrong_format():
    logged = [
        completion(1, text="right", correct=1.0, form=1.0),
        completion(1, text="hack", correct=1.0, form=0.0),
        completion(2, text="half", correct=0.5, form=0.25),
        completion(2, text="wrong", correct=0.0, form=0.25),
    ]
    assert [row[0].text for row in paid_without_format(logged, 9)] == ["hack", "half"]


def test_paid_without_format_without_a_format_reward():
    good = "<reasoning>\n1+1=2\n</reasoning>\n<answer>\n2\n</answer>\n"
    logged = [
        Completion(1, "p", text, {"correctness_reward": 1.0}, 1.0, None) for text in (good, "<answer>\n2\n</answer>")
    ]
    assert [row[0].text for row in paid_without_format(logged, 9)] == ["<answer>\n2\n</answer>"]
    # Nothing in this format at all: the task asks for another one, and nothing can be said.
    assert paid_without_format(logged[1:], 9) == []


def test_evenly_spaced_keeps_the_ends():
    logged = [completion(step) for step in range(1000)]
    steps = [row[0].step for row in evenly_spaced(logged, 5)]
    assert steps == [0, 250, 500, 749, 999]


def test_curves_are_thinned_by_averaging():
    points = [(step, float(step % 2)) for step in range(1, 1001)]
    assert thin(points, 500) == [[step, 0.5] for step in range(2, 1001, 2)]
    assert thin(points[:3], 500) == [[1, 1.0], [2, 0.0], [3, 1.0]]
    assert thin([]) == []


def test_time_is_averaged_over_stretches_and_rollouts_count_where_they_are():
    metrics = {"time/rollout": [(1, 8.0), (5, 8.0)], "time/update": [(step, 2.0) for step in range(1, 9)]}
    split = time_split(metrics, max_bars=2)
    assert split["from"] == [1, 5]
    assert split["to"] == [4, 8]
    assert split["phases"] == [{"name": "rollout", "values": [2.0, 2.0]}, {"name": "update", "values": [2.0, 2.0]}]


def test_an_update_that_is_not_timed_is_the_rest_of_the_step():
    metrics = {"time/rollout": [(1, 8.0)], "time/scoring": [(1, 1.0)], "step_time": [(1, 11.0), (2, 3.0)]}
    phases = {phase["name"]: phase["values"] for phase in time_split(metrics)["phases"]}
    assert phases == {"rollout": [8.0, 0.0], "scoring": [1.0, 0.0], "update": [2.0, 3.0]}


def test_every_metric_is_shown_once(run_dir):
    metrics = read_metrics(run_dir)
    drawn = charts(metrics)
    assert [chart["title"] for chart in drawn][:3] == ["Reward and held-out accuracy", "Reward", "Reward by function"]
    assert [(one["name"], one["right"]) for one in drawn[0]["series"]] == [
        ("reward", False),
        ("held-out accuracy", True),
    ]
    assert [one["name"] for one in drawn[2]["series"]] == ["correctness_reward", "format_reward"]
    assert [chart["title"] for chart in other_charts(metrics)] == ["grad_norm", "learning_rate", "loss"]
    assert constants(metrics) == "reward_std 0.4"


def test_what_is_zero_throughout_is_not_drawn():
    metrics = {"reward": [(1, 0.0), (2, 1.0)], "clip_ratio/region_mean": [(1, 0.0), (2, 0.0)], "kl": [(1, 0.1)]}
    assert [chart["title"] for chart in charts(metrics)] == ["Reward", "KL to the reference"]
    assert other_charts(metrics) == []
    assert constants(metrics) == "clip_ratio/region_mean 0"


def test_warnings_say_what_went_wrong(run_dir):
    healthy = report_data(run_dir)
    assert healthy["warnings"] == healthy["notes"] == []
    assert healthy["subtitle"].startswith(
        "method one_step + grpo, rate 0.0001, data embedded, model tiny-llada, seed 0"
    )
    assert warnings({}, {"steps": 0}, {}) == ["Nothing was trained: the run made no update."]
    assert warnings({}, {"steps": 3}, {"max_steps": 9}) == ["The run ended after 3 of 9 updates."]
    [none] = warnings({"grad_norm": [(1, 0.0), (2, 0.0)]}, {}, {})
    assert none.startswith("Nothing was learned")
    [still] = warnings({"learning_rate": [(1, 0.0), (2, 0.0)], "grad_norm": [(1, 0.5)]}, {}, {})
    assert still == "Nothing was learned: the learning rate was 0 at every update."
    worse = {"before": {"accuracy": 0.5, "interval": [0.4, 0.6]}, "after": {"accuracy": 0.25, "interval": [0.2, 0.39]}}
    assert warnings({}, worse, {}) == [
        "The held-out accuracy fell from 50.0 % to 25.0 %, by more than chance: lower the learning rate."
    ]
    assert warnings({}, worse | {"after": {"accuracy": 0.3, "interval": [0.2, 0.4]}}, {}) == []
    [flat] = warnings({"frac_reward_zero_std": [(step, float(step > 5)) for step in range(8)]}, {}, {})
    assert "frac_reward_zero_std is 1 (healthy: well below 1)" in flat
    assert warnings({"frac_reward_zero_std": [(step, float(step < 5)) for step in range(8)]}, {}, {}) == []
    [broken] = warnings({"rewards/mine/errors": [(1, 2.0), *((step, 0.0) for step in range(2, 40))]}, {}, {})
    assert broken.startswith("rewards/mine/errors is 2")
    coverage = {"exact": {"pass@1": [0.4, 0.3, 0.5], "pass@8": [0.8, 0.7, 0.9]}, "n": 64, "samples": 8}
    lower = coverage | {"exact": {"pass@1": [0.6, 0.5, 0.7], "pass@8": [0.5, 0.4, 0.6]}}
    summary = {"before": {"coverage": coverage}, "after": {"coverage": lower}}
    assert warnings({}, summary, {}) == ["Coverage fell: pass@8 (exact sampler) was 80.0% and is 50.0%."]
    assert [tile["value"] for tile in tiles(summary, {})] == ["40 \u2192 60 %", "80 \u2192 50 %"]
    # A fall that was made good later is told too.
    rewards = [1.0] * 12 + [0.1] * 12 + [1.0] * 12
    [fell] = warnings({"reward": list(enumerate(rewards))}, {}, {"collapse_window": 4})
    assert fell.startswith("Collapse: the reward fell from 1 to")


def test_every_logged_column_is_in_the_list_of_metrics(run_dir):
    assert [name for name in read_metrics(run_dir) if metric_of(name) is None] == []
    assert metric_of("rewards/mine/mean").meaning.startswith("mean of one reward function")
    assert metric_of("never_logged") is None
    table = metrics_reference().splitlines()
    assert len(table) == 2 + len(METRICS)
    assert {line.count("|") for line in table} == {4}


def test_report_needs_neither_torch_nor_transformers():
    code = "import sys, dgrpo.report; print({'torch', 'transformers', 'matplotlib'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_groups_are_whole_and_have_spread():
    logged = [
        completion(step, prompt, f"{k}", correct=float(k == step))
        for step in (1, 2)
        for prompt in "ab"
        for k in range(3)
    ]
    logged += [completion(3, "flat", f"{k}") for k in range(3)]
    rows = [row[0] for row in groups(logged, 6)]
    assert [(c.step, c.prompt) for c in rows] == [(1, "a")] * 3 + [(2, "b")] * 3
    assert [c.total for c in rows[:3]] == [1.0, 0.0, 0.0]
    assert {c.prompt for c, *_ in groups(logged[-3:], 6)} == {"flat"}
    assert groups([completion(1, "alone")], 6) == []


def test_changed_problems_come_first(run_dir):
    marked = [{"prompt": str(k), "before_right": False, "after_right": k == 2} for k in range(3)]
    assert [item["prompt"] for item in samples(marked)] == ["2", "0", "1"]
    assert samples(marked)[0]["after_right"] is True
    assert flips_in_words({"flips": {"gained": 5, "lost": 2}}).startswith("5 problems")
    assert flips_in_words({}) == ""


def test_accuracy_before_and_after_are_ends_of_the_curve():
    summary = {"before": {"accuracy": 0.25}, "after": {"accuracy": 0.75}, "steps": 30}
    assert with_summary_accuracy({}, summary)["eval_accuracy"] == [(0, 0.25), (30, 0.75)]
    measured = {"eval_accuracy": [(0, 0.3), (10, 0.5)]}
    assert with_summary_accuracy(measured, summary)["eval_accuracy"] == [(0, 0.3), (10, 0.5), (30, 0.75)]
    assert with_summary_accuracy({"kl": [(1, 0.0)]}, {}) == {"kl": [(1, 0.0)]}


def test_tiles(run_dir):
    shown = {
        tile["label"]: (tile["value"], tile["remark"]) for tile in tiles(read_summary(run_dir), read_metrics(run_dir))
    }
    assert shown["Accuracy before"] == ("45.0 %", "40.7 to 49.3 %, 512 problems")
    assert shown["Gain"] == ("+44.0", "percentage points")
    assert shown["Time"] == ("2 min 27 s", "4 min 12 s of CPU")
    assert "Processes" not in shown
    assert tiles({}, {}) == []
    assert [duration(seconds) for seconds in (59.4, 61, 3599.7, 18_420)] == [
        "59 s",
        "1 min 01 s",
        "1 h 00 min",
        "5 h 07 min",
    ]


def test_instructions_that_all_prompts_share_are_cut_by_whole_lines():
    assert common_beginning({INSTRUCTIONS + "Problem 1", INSTRUCTIONS + "Problem 2"}) == INSTRUCTIONS
    assert common_beginning({"Problem 1: and on", "Problem 2: and on"}) == ""
    assert common_beginning({INSTRUCTIONS + "Problem 1"}) == ""


def test_texts_of_messages():
    assert message_text([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "u"
    assert message_text("plain \x1b") == "plain \ufffd"
    assert [message_text(nothing) for nothing in (None, [], [{"role": "assistant", "content": None}])] == ["", "", ""]


def test_samples_are_read_whatever_they_hold():
    stored = [{"prompt": [{"role": "user", "content": "q"}], "gold": 7, "before": None, "after": "a"}, "no dict"]
    assert samples(stored) == [{"prompt": "q", "gold": "7", "before": "", "after": "a"}]
    assert samples(None) == samples({"a": 1}) == []


def test_texts_are_cut_until_they_fit():
    texts = ["x" * 3000] * 10
    assert cut_texts(texts, 40_000) == texts
    cut = cut_texts(texts, 21_000)
    assert cut[0] == "x" * 2000 + " [cut: 3,000 characters]"
    assert sum(len(text.encode()) for text in cut_texts(["\u20ac" * 3000] * 10, 21_000)) <= 21_000


def test_page_of_a_long_run_stays_small():
    logged = [
        completion(k // 64, f"{k % 4000} " + "p" * 2000, f"{k} " + "\u20ac" * 2000, correct=float(k % 2))
        for k in range(300 * 64)
    ]
    table = completion_table(logged)
    assert sum(len(text.encode()) for text in table["texts"]) <= MAX_TEXT_BYTES
    assert len(json.dumps(table, ensure_ascii=False).encode()) < 4_000_000
    assert table["logged"] == 19_200


def test_curves_are_an_image(run_dir):
    with Image.open(write_curves(run_dir)) as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").resize((300, 200)).getcolors(60_000)) > 50
