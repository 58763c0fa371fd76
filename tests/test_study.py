"""`dgrpo study`: when its runs are measured, what its table says, and that it resumes."""

import json
from types import SimpleNamespace

import pytest

import dgrpo.run.study
from dgrpo.__main__ import main
from dgrpo.report.study import study_plot, study_table
from dgrpo.run.study import Budget, Measure, Run


def result(*figures: tuple[list[str], float], measure="accuracy") -> dict:
    """A run that was measured after these budgets, 10 seconds and 2 rollouts apart."""
    points = [
        {"after": after, "rollouts": 2 * k, "updates": 8 * k, "seconds": 10.0 * k, measure: figure}
        for k, (after, figure) in enumerate(figures)
    ]
    return {"measure": measure, "n": 64, "points": points}


def test_the_table_has_the_best_first_and_the_range_over_seeds(tmp_path):
    found = {
        "falls": [result(([], 0.5), (["9 s"], 0.4), (["12 s"], 0.25))],
        "rises": [
            result(([], 0.5), (["9 s"], 0.5), (["12 s", "4 rollouts"], 0.75)),
            result(([], 0.5), (["9 s"], 0.75), (["12 s", "4 rollouts"], 1.0)),
        ],
    }
    lines = study_table(
        "gsm8k", found, {"falls": {1e-3: 0.3, 1e-4: 0.2}, "rises": {1e-3: 0.5, 1e-4: 0.6}}
    ).splitlines()
    assert lines[0] == "gsm8k: held-out accuracy 50.0 % before, n=64; mean [least, most]."
    assert lines[2].startswith(
        "| variant | sweep 0.001 | sweep 0.0001 | rate | seeds | after 9 s | after 12 s | after 4 "
    )
    assert lines[4] == (
        "| rises | 50.0 | 60.0 | 0.0001 | 2 | 62.5 [50.0, 75.0] | 87.5 [75.0, 100.0] "
        "| 87.5 [75.0, 100.0] | 4, 16, 20 | 0 |"
    )
    assert lines[5] == "| falls | 30.0 | 20.0 | 0.001 | 1 | 40.0 | 25.0 | - | 4, 16, 20 | 1 |"
    study_plot(tmp_path / "plot.png", "gsm8k", found)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("budget", "ends_at", "points"),
    [
        (Budget(rollouts=(1, 3)), 6, {2: ["1 rollouts"], 6: ["3 rollouts"]}),
        (Budget(seconds=(25.0, 41.0)), 5, {3: ["25 s"], 5: ["41 s"]}),
        (Budget(seconds=(15.0,), rollouts=(2,)), 4, {2: ["15 s"], 4: ["2 rollouts"]}),
        (Budget(rollouts=(9,), at_most=25.0), 3, {3: []}),
    ],
    ids=str,
)
def test_a_run_is_measured_at_its_budgets_and_ends_with_the_last(budget, ends_at, points, monkeypatch):
    # Each update takes ten seconds, an evaluation a thousand; a rollout is two updates.
    now = [0.0]
    trainer = SimpleNamespace(
        num_iterations=2,
        args=SimpleNamespace(
            device=SimpleNamespace(type="cpu"), per_device_eval_batch_size=8, chat_template_kwargs=None
        ),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        model=None,
        processing_class=None,
    )

    def evaluate(*args, **kwargs):
        now[0] += 1000.0
        return SimpleNamespace(measure="accuracy", figure=0.5, reasons=[True], n=1)

    monkeypatch.setattr(dgrpo.run.study, "evaluate", evaluate)
    monkeypatch.setattr(dgrpo.run.study, "as_in_training", lambda model: pytest.MonkeyPatch.context())
    measure = Measure(
        Run("gsm8k", "a", 0, budget), trainer, SimpleNamespace(measure="accuracy", grade=None), [{}], None
    )
    measure.clock = lambda: now[0]
    control, state = SimpleNamespace(should_training_stop=False), SimpleNamespace(global_step=0, max_steps=99)
    measure.on_train_begin(None, state, control)
    while not control.should_training_stop:
        state.global_step += 1
        now[0] += 10.0
        measure.on_step_end(None, state, control)
    assert state.global_step == ends_at
    assert {point["updates"]: point["after"] for point in measure.points} == {0: [], **points}
    assert measure.points[-1]["seconds"] == 10.0 * ends_at


def test_a_budget_is_halved_and_must_have_an_end():
    assert Budget((10.0, 40.0), (3, 12), 60.0).half() == Budget((20.0,), (6,), 30.0)
    assert Budget(rollouts=(1,)).half() == Budget(rollouts=(1,))
    with pytest.raises(ValueError, match="give at least one"):
        Budget()


@pytest.mark.slow
def test_presets_are_swept_compared_and_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("num_iterations: 1\n")
    command = ["study", "--task", "gsm8k", "--presets", "none", "mine.yaml", "--seeds", "1", "--rollouts", "1"]
    command += ["--num_eval_problems", "8", "--per_device_train_batch_size", "16", "--output_dir", "s"]
    main([*command, "--learning_rates", "1e-3", "1e-4"])
    first = capsys.readouterr().out
    files = sorted(file.name for file in (tmp_path / "s").glob("**/*.json"))
    assert len(files) == 2 + 4
    assert [name.split("-")[1] for name in files].count("mine") == 3
    updates = {
        name: json.loads(next((tmp_path / "s").glob(f"gsm8k-{name}-*.json")).read_text())["points"][-1]["updates"]
        for name in ("recipe", "mine")
    }
    assert updates == {"recipe": 4, "mine": 1}
    assert (tmp_path / "s" / "gsm8k.png").is_file()
    monkeypatch.setattr(dgrpo.run.study, "train", None)  # nothing is trained again
    main([*command, "--learning_rates", "1e-3", "1e-4"])
    assert capsys.readouterr().out.partition("\n\n")[2] in first
    assert (tmp_path / "s" / "gsm8k.md").read_text() in first
    with pytest.raises(SystemExit, match="is of other settings; choose another folder"):
        main([*command, "--learning_rates", "1e-3", "1e-4", "--temperature", "0.5"])


def test_what_a_run_refuses_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SystemExit, match=r"^dgrpo: gsm8k-recipe-0: dataset='none.csv': there is no such file.*log.txt"
    ):
        main(["study", "--task", "gsm8k", "--rollouts", "1", "--dataset", "none.csv"])
