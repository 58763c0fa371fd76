"""Evaluation of checkpoints: the same whatever the batches, processes and interruptions; what it writes and shows."""

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model

from dgrpo import SamplerConfig, load_model
from dgrpo.evaluation.answers import Answer, Evaluation, answer_rows, as_in_training, encode_prompts, evaluate
from dgrpo.evaluation.checkpoints import checkpoints, evaluate_checkpoint, labels
from dgrpo.evaluation.disagreement import disagreement_lines, disagreements
from dgrpo.evaluation.files import FinishedRows, d1_items, fingerprint
from dgrpo.evaluation.interval import wilson_interval
from dgrpo.evaluation.results import Result, results_table, write_results
from dgrpo.evaluation.samples import (
    best,
    check_selection,
    coverage,
    majority,
    pass_at_k,
    pass_scores,
    selection_scores,
)
from dgrpo.evaluation.stored import grade, grade_files
from dgrpo.run.steps import CHECKPOINTS
from dgrpo.tasks import TASKS, load_rows

ROOT = Path(__file__).parents[1]
EMBEDDED = CHECKPOINTS / "gsm8k"
TASK = TASKS["gsm8k"]
STORED = sorted((ROOT / "tests/data/d1").glob("*_generations.json"))
# Noise in every token, so that a row that is answered with another's noise is seen.
NOISY = SamplerConfig(16, 16, 4, temperature=1.0)


@pytest.fixture(scope="module")
def tiny():
    return load_model(str(EMBEDDED))


@pytest.fixture(scope="module")
def rows():
    return list(load_rows(TASK, "embedded", num_train=8, num_held_out=13, instruction="")[1])


def without_time(answers):
    return [replace(answer, seconds=0.0) for answer in answers]


def interrupted_after(num_batches):
    """A callback that dies when so many batches are done."""
    done = Counter()

    def on_batch(num_rows):
        done["batches"] += 1
        if done["batches"] == num_batches:
            raise KeyboardInterrupt

    return on_batch


@pytest.mark.parametrize("batch_size", [3, 5, 100])
def test_batches_of_any_size_give_the_same(tiny, rows, batch_size):
    settings = {"rows": rows, "grade": TASK.grade, "config": NOISY}
    whole = without_time(answer_rows(*tiny, **settings, batch_size=13))
    assert len({answer.text for answer in whole}) > 5
    assert without_time(answer_rows(*tiny, **settings, batch_size=batch_size)) == whole
    assert without_time(answer_rows(*tiny, **settings, seed=1)) != whole


def test_the_processes_together_answer_every_row_once(tiny, rows, monkeypatch):
    import dgrpo.evaluation.answers

    gathered: list[list[Answer]] = []
    monkeypatch.setattr(dgrpo.evaluation.answers, "gather_object", lambda mine: gathered.append(mine) or mine)
    counts = []
    for process_index in range(3):
        # Alone, a process lacks the other processes' rows.
        with pytest.raises(KeyError):
            answer_rows(
                *tiny, rows, TASK.grade, NOISY,
                batch_size=2, process_index=process_index, num_processes=3, on_batch=counts.append,
            )  # fmt: skip
    answers = sorted((answer for mine in gathered for answer in mine), key=lambda answer: answer.row)
    assert without_time(answers) == without_time(answer_rows(*tiny, rows, TASK.grade, NOISY, batch_size=2))
    assert [len(mine) for mine in gathered] == [5, 4, 4]
    assert counts == [6, 6, 1] * 3, "every process makes the same turns, and is told of all rows"


@pytest.mark.parametrize("cut", [0, 7], ids=["between lines", "within a line"])
def test_interrupted_and_resumed_is_uninterrupted(tiny, rows, tmp_path, cut):
    state, settings = PartialState(cpu=True), {"seed": 0}
    whole = without_time(answer_rows(*tiny, rows, TASK.grade, NOISY, batch_size=4))
    first = FinishedRows(tmp_path / "set", settings, state)
    with pytest.raises(KeyboardInterrupt):
        answer_rows(
            *tiny, rows, TASK.grade, NOISY, batch_size=4, finished=first, on_batch=interrupted_after(2)
        )  # fmt: skip
    [file] = tmp_path.glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 1 + 8
    if cut:
        file.write_text(file.read_text()[:-cut])
    resumed = FinishedRows(tmp_path / "set", settings, state, resume=True)
    assert sorted(resumed.answers) == list(range(7 if cut else 8))
    done: list[int] = []
    answers = answer_rows(
        *tiny, rows, TASK.grade, NOISY, batch_size=4, finished=resumed, on_batch=done.append
    )  # fmt: skip
    assert without_time(answers) == whole
    assert sum(done) == (9 if cut else 5), "finished batches are not answered again"
    third = FinishedRows(tmp_path / "set", settings, state, resume=True)
    assert without_time(third.answers[number] for number in range(13)) == whole
    assert not FinishedRows(tmp_path / "set", settings, state).answers, "without resume, anew"


def test_answers_of_several_processes_are_taken_over_and_of_other_settings_refused(tmp_path):
    def answer(number):
        return Answer(number, f"text {number} \u2028\ud800", None, True, 3, False, 0.5)

    state = PartialState(cpu=True)
    for process_index, number in ((0, 4), (1, 2)):
        store = FinishedRows(tmp_path / "set", {"model": "a", "seed": 0}, state, resume=True)
        store._path = store._file(process_index)
        store.add([answer(number)])
    assert len(list(tmp_path.iterdir())) == 2
    found = FinishedRows(tmp_path / "set", {"model": "a", "seed": 0}, state, resume=True).answers
    assert found == {2: answer(2), 4: answer(4)}
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="which differs in model, weights"):
        FinishedRows(tmp_path / "set", {"model": "b", "seed": 0, "weights": 1}, state, resume=True)


def test_weights_that_changed_have_another_fingerprint(tmp_path):
    assert fingerprint("owner/name") == "owner/name"
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"1")
    before = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == before
    os.utime(weights, ns=(1, 1))
    assert fingerprint(str(tmp_path)) != before


def test_settings_of_the_chat_template_reach_the_prompt(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if short %} 7{% endif %}"
    prompts = [[{"role": "user", "content": "3"}]]
    plain, asked = (
        encode_prompts(tokenizer, prompts, torch.device("cpu"), settings)[0].shape[1]
        for settings in (None, {"short": True})
    )
    assert asked > plain


def test_the_figures_of_an_evaluation():
    answers = [Answer(0, "a", 1.0, True, 3, True, 0.5), Answer(1, "b", 0.5, True, 5, False, 1.5)]
    answers += [Answer(2, "c", None, False, 16, False, 2.0)]
    found = Evaluation.of(answers, num_processes=2)
    assert (found.correct, found.n, found.num_tokens, found.seconds) == ([True, False, False], 3, 24, 2.0)
    assert (found.mean_length, found.tokens_per_second, found.accuracy_where_it_reasons) == (8.0, 12.0, 0.5)
    assert found.interval == wilson_interval(1 / 3, 3)


def test_a_grade_is_right_only_at_one(tiny, rows):
    def half(prompts, completions, answer, **columns):
        return [0.999] * len(completions)

    found = evaluate(*tiny, rows[:2], half, replace(NOISY, temperature=0.0))
    assert found.accuracy == 0.0
    assert found.num_tokens == sum(found.lengths) > 0


def test_what_is_stored_is_graded_as_it_was(tiny, rows, tmp_path):
    """The file in d1's format gives the accuracy that the evaluation found, and so do ended and cut texts."""
    config = SamplerConfig(16, 16, 16)
    shown: list[tuple[str, int, int]] = []
    results = evaluate_checkpoint(
        checkpoints([], [], EMBEDDED)[0],
        TASK,
        rows,
        [config, SamplerConfig(4, 4, 2)],
        tmp_path,
        PartialState(cpu=True),
        dtype="float32",
        batch_size=8,
        on_start=lambda *about: shown.append(about) or (lambda num_rows: None),
    )
    assert shown == [("gsm8k_16_16", 13, 0), ("gsm8k_4_2", 13, 0)]
    assert [(r.name, r.length, r.protocol, r.n) for r in results] == [
        (name, length, protocol, 13)
        for name, length in (("gsm8k_16_16", 16), ("gsm8k_4_2", 4))
        for protocol in ("strict", "d1")
    ]
    assert 0 < results[0].accuracy < 1
    assert (results[0].ended, results[2].ended < 0.5) == (1.0, True)
    for result in results:
        file = tmp_path / f"{result.name}_0_generations.json"
        assert grade_files([file], protocol=result.protocol).accuracy == result.accuracy
        stored = json.loads(file.read_text())
        assert (stored["gen_length"], stored["metrics"]["total_processed"]) == (result.length, 13)
        ends = [text["generations"].endswith("<|endoftext|>") for text in stored["generations"]]
        assert sum(ends) / 13 == result.ended


@pytest.mark.parametrize("name", ["gsm8k", "math500", "countdown", "sudoku"])
def test_right_texts_on_every_task_are_right_once_stored_by_both_protocols(name):
    task = TASKS[name]
    rows = list(load_rows(task, "embedded", num_train=8, num_held_out=6, instruction="")[1])
    solved = [source.get("expression") for source in task.embedded("held_out", 6, 0)]
    for row, expression in zip(rows, solved, strict=True):
        solution = expression or row.get("solution") or row["answer"]
        inside = solution if name == "sudoku" else f"\\boxed{{{solution}}}"
        text = f"<reasoning>\n...\n</reasoning>\n<answer>\n{inside}\n</answer>"
        columns = {column: [value] for column, value in row.items() if column != "prompt"}
        assert task.grade(prompts=[row["prompt"]], completions=[text], **columns) == [1.0]
        items = d1_items(task, [row], [Answer(0, text, 1.0, True, 9, True, 0.1)], "<|endoftext|>")
        assert [grade(items, name, protocol).accuracy for protocol in ("strict", "d1")] == [1.0, 1.0]


def test_rows_as_d1_stores_them():
    gsm8k, sudoku, code = (TASKS[name] for name in ("gsm8k", "sudoku", "programs"))
    assert gsm8k.to_stored({"question": "q", "answer": "1,080"}) == {"question": "q", "ground_truth": 1080.0}
    assert gsm8k.to_stored({"question": "q", "answer": "none"})["ground_truth"] is None
    nine = {"question": "0" * 81, "puzzle": "0" * 81, "solution": "1" * 81}
    assert sudoku.from_stored(sudoku.to_stored(nine)) == {"puzzle": "0" * 81, "solution": "1" * 81}
    assert code.to_stored({"question": "q", "tests": ["assert f()"]})["ground_truth"] == ["assert f()"]
    other = d1_items(
        TASKS["math500"], [{"question": "q", "answer": "1"}], [Answer(0, "t", 1.0, True, 1, True, 0.1)], "</s>"
    )
    assert other[0]["generations"] == "t", "an end that no grader knows is left out"


def test_which_checkpoints_are_meant(tmp_path):
    assert labels(["runs/a/checkpoint-10", "runs/b/checkpoint-10"]) == ["a-checkpoint-10", "b-checkpoint-10"]
    assert labels(["owner/model", "/data/other"]) == ["model", "other"]
    with pytest.raises(ValueError, match="same checkpoint twice"):
        labels(["runs/a", "runs/a"])
    for folder, base in (("own", "/elsewhere/dgrpo/tiny/checkpoint/gsm8k"), ("large", "owner/model")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": base})
        )
    own, large = str(tmp_path / "own"), str(tmp_path / "large")
    meant = checkpoints([], ["none", own, large], EMBEDDED)
    assert [(c.label, c.model, c.adapter) for c in meant] == [
        ("base", str(EMBEDDED), None), ("own", str(EMBEDDED), own), ("large", "owner/model", large),
    ]  # fmt: skip
    assert [c.model for c in checkpoints(["m"], [own, "none"], EMBEDDED)] == ["m", "m"]
    assert [c.model for c in checkpoints(["m", "n"], [], EMBEDDED)] == ["m", "n"]
    with pytest.raises(ValueError, match="adapters go on one model"):
        checkpoints(["m", "n"], [own], EMBEDDED)


def test_several_checkpoints_make_a_table_and_a_plot(tmp_path):
    results = [
        Result(name, f"gsm8k_{length}", length, protocol, 64, right / 64, wilson_interval(right / 64, 64), 9.0, 50.0)
        for name, right in (("before", 0), ("after", 64))
        for length in (128, 256, 512)
        for protocol in ("strict", "d1")
    ]
    table = results_table(results)
    assert [column.header for column in table.columns][:2] == ["checkpoint", "set"]
    assert table.row_count == 12
    assert "ended" not in [column.header for column in table.columns]
    write_results(tmp_path, results)
    assert len(json.loads((tmp_path / "results.json").read_text())) == 12
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_every_disagreement_on_the_published_texts_has_a_class():
    """Counted apart from the classes: texts right by one protocol alone."""
    found = disagreements(path for path in STORED if not path.name.startswith("math500"))
    for name, alone in {"gsm8k": (24, 1), "countdown": (7, 1)}.items():
        classes = found[f"{name}_instruct_128_64"]
        assert not any(reason == "other" for _, reason in classes)
        counts = [sum(len(cases) for (more, _), cases in classes.items() if more == who) for who in ("d1", "strict")]
        assert tuple(counts) == alone
    gsm8k = {reason: len(cases) for (_, reason), cases in found["gsm8k_instruct_128_64"].items()}
    assert gsm8k["<answer> without </answer>"] == 13
    assert gsm8k["a thousands separator, at which d1's number ends"] == 1
    sudoku = found["sudoku_instruct_128_64"]
    assert sum(case.points * case.d1.possible for cases in sudoku.values() for case in cases) == pytest.approx(
        59 - sum(item.possible for item in _solved_sudoku())
    )
    lines = disagreement_lines(found)
    assert any("13  d1 gives more" in line for line in lines)
    assert any("43,500" in line for line in lines)


def _solved_sudoku():
    """What d1 says of the grids that `strict` finds solved."""
    files = [path for path in STORED if path.name.startswith("sudoku")]
    strict, d1 = (grade_files(files, protocol=protocol).items for protocol in ("strict", "d1"))
    return [item for item, solved in zip(d1, strict, strict=True) if solved.right]


@pytest.mark.parametrize(
    ("task", "text", "gold", "question", "why"),
    [
        ("gsm8k", "<answer>7</answer>\n<answer>7</answer>", 7.0, "", "tags repeated or out of order"),
        ("gsm8k", "\\boxed{7} <answer>\\boxed{7} \\boxed{8}</answer>", 7.0, "", "several boxes that differ"),
        ("gsm8k", "\\boxed{7} <answer>7 or 8</answer>", 7.0, "", "other"),
        ("gsm8k", f"<answer>{'.' * 501}7</answer>", 7.0, "", "an answer of more than 500 characters"),
        ("math500", "<answer>5</answer>", "5", "", "no box: d1 compares the whole text"),
        ("countdown", "<answer>\\boxed{5-2*1 = 3}</answer>", [[1, 5, 2], 3], "", "an equation, `= number` at its end"),
        ("sudoku", "<answer>1234</answer>", "1234341221434321", "0000341221434321", "too few cells: d1 fills up"),
        (
            "sudoku", "<answer>1234341221434312</answer>", "1234341221434321", "0000341221434321",
            "a clue changed: d1 does not look at clues",
        ),
        (
            "sudoku", "<answer>1243341221434321</answer>", "1234341221434321", "0000341221434321",
            "clues kept, not solved: d1 pays by the cell",
        ),
    ],
)  # fmt: skip
def test_classes_of_disagreement(tmp_path, task, text, gold, question, why):
    file = tmp_path / f"{task}_0_generations.json"
    item = {"question": question, "generations": text, "ground_truth": gold}
    file.write_text(json.dumps({"generations": [item]}))
    assert [reason for _, reason in disagreements([file])[task]] == [why]


def recipe(*more: str, config: str | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "recipes/evaluate.py"), *more]
    if config is not None:
        file = str(ROOT / f"recipes/accelerate/{config}.yaml")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, *command[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def generations(folder: Path) -> list:
    return json.loads((folder / "gsm8k_16_16_0_generations.json").read_text())["generations"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_numbers_of_one_and_a_killed_run_goes_on(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    asked = ["--task", "gsm8k", "--num_problems", "40", "--batch_size", "8", "--temperature", "1"]
    done = recipe(*asked, "--output_dir", str(one))
    assert done.returncode == 0, done.stderr[-4000:]
    # What a killed run leaves: one process's rows, the last line cut off.
    lines = (one / "gsm8k_16_16_rows.0.jsonl").read_text()
    done = recipe(*asked, "--output_dir", str(two), config="ddp")
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(file.name for file in two.glob("*.jsonl")) == [f"gsm8k_16_16_rows.{i}.jsonl" for i in (0, 1)]
    assert generations(one) == generations(two)
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    timeless = [[{k: v for k, v in result.items() if k != "tokens_per_second"} for result in each] for each in results]
    assert timeless[0] == timeless[1]
    assert 0 < results[0][0]["accuracy"] < 1
    for file in two.iterdir():
        file.unlink()
    (two / "gsm8k_16_16_rows.0.jsonl").write_text(lines[: len(lines) // 2])
    done = recipe(*asked, "--output_dir", str(two), "--resume", config="ddp")
    assert done.returncode == 0, done.stderr[-4000:]
    assert generations(one) == generations(two)


@pytest.mark.slow
def test_stored_generations_are_graded_and_compared_by_one_command(tmp_path):
    item = {"question": "q", "generations": "\\boxed{18}", "ground_truth": 18.0}
    (tmp_path / "gsm8k_0_generations.json").write_text(json.dumps({"generations": [item]}))
    code = item | {"generations": "```\ndef f(): return 1\n```", "ground_truth": ["assert f() == 1"]}
    (tmp_path / "code_0_generations.json").write_text(json.dumps({"generations": [code]}))
    done = recipe("--generations", *map(str, sorted(tmp_path.iterdir())), "--disagreements")
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.replace("│", " ").split()[:4] for line in done.stdout.splitlines() if "│" in line]
    assert lines == [
        ["code", "strict", "1", "100.00%"], ["gsm8k", "strict", "1", "0.00%"], ["gsm8k", "d1", "1", "100.00%"],
    ]  # fmt: skip
    assert "neither <answer> nor </answer>" in done.stdout
    done = recipe("--generations", str(tmp_path / "code_0_generations.json"), "--protocol", "d1")
    assert "'programs' has no protocol 'd1'" in done.stderr


def test_the_global_random_state_is_untouched(tiny, rows):
    before = torch.random.get_rng_state()
    answer_rows(*tiny, rows[:2], TASK.grade, NOISY)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("n", "c", "k", "value"), [(4, 0, 2, 0.0), (4, 4, 1, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5)])
def test_pass_at_k(n, c, k, value):
    assert pass_at_k(n, c, k) == pytest.approx(value)
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws)), "of all draws without replacement"


def test_intervals_are_wilsons_for_one_sample_and_bootstrapped_for_several():
    right = [[k % 2 == 0, False, False, k % 4 == 0] for k in range(64)]
    [one] = pass_scores([row[:1] for row in right], [1])
    assert one.interval == wilson_interval(0.5, 64)
    first, fourth = pass_scores(right, [1, 4])
    assert (first.name, first.value, fourth.name, fourth.value) == ("pass@1", 0.1875, "pass@4", 0.5)
    assert first.interval[0] < first.value < first.interval[1]
    # Samples of one problem are not independent: 64 problems, not 256 trials.
    low, high = wilson_interval(0.1875, 256)
    assert first.interval != (low, high)
    assert pass_scores(right, [1, 4]) == [first, fourth]


def test_majority_and_best_take_the_earliest_of_equals():
    assert majority(["a", "b", "b", "a"]) == 0
    assert majority([None, None, "b"]) == 2
    assert majority([None, None]) == 0
    assert best([0.0, None, 1.0, 1.0]) == 2
    assert best([None, None]) == 0


def text_of_answer(answer):
    return f"<answer>\n{answer}\n</answer>"


def test_a_majority_is_of_answers_as_the_grader_reads_them():
    gsm8k, texts = TASKS["gsm8k"], [text_of_answer(answer) for answer in ("7", "1,080", "1080", "$1080")]
    row = {"prompt": "p", "answer": "1080"}
    right = [[False, True, True, True]]
    [score] = selection_scores(gsm8k, [row], [texts], right, ["majority"])
    assert (score.name, score.value) == ("majority of 4", 1.0)
    with pytest.raises(ValueError, match="select=best: the rewards of gsm8k read the reference"):
        selection_scores(gsm8k, [row], [texts], right, ["best"])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_verifier_reads_no_reference(name):
    """What `best` chooses by gives the same reward whatever the reference says."""
    task = TASKS[name]
    if task.verifier is None:
        with pytest.raises(ValueError, match="select=best"):
            check_selection(task, ["best"])
        return
    rows = list(load_rows(task, "embedded", num_train=8, num_held_out=4)[1])
    texts = [task.reference_completion(row) or text_of_answer("1+2") for row in rows]
    columns = {column: [row[column] for row in rows] for column in rows[0] if column != "prompt"}
    rewards = task.verifier(prompts=rows, completions=texts, **columns)
    blind = columns | {column: [None] * 4 for column in ("answer", "solution", "expression") if column in columns}
    assert task.verifier(prompts=rows, completions=texts, **blind) == rewards


def test_several_samples_give_coverage_and_sets_that_can_be_graded_again(rows, tmp_path):
    few, folder = rows[:6], tmp_path / "out"
    [checkpoint] = checkpoints([str(EMBEDDED)], [], EMBEDDED)
    results = evaluate_checkpoint(
        checkpoint, TASK, few, [NOISY], folder, PartialState(cpu=True), dtype="float32", batch_size=8,
        num_samples=3, select=["majority"], on_start=lambda *_: lambda number: None,
    )  # fmt: skip
    assert [result.metric for result in results] == ["pass@1", "pass@2", "pass@3", "majority of 3"]
    values = [result.accuracy for result in results[:3]]
    assert values == sorted(values)
    assert {result.n for result in results} == {6}
    files = sorted(folder.glob("*_generations.json"))
    graded = [grade_files([file]).accuracy for file in files]
    assert len(files) == 3
    assert sum(graded) / 3 == pytest.approx(values[0])
    write_results(folder, results)
    assert (folder / "coverage.png").stat().st_size > 1000
    # The first round of samples is what a single sample would have been.
    single = answer_rows(*load_model(str(EMBEDDED)), few, TASK.grade, NOISY, batch_size=8)
    assert [item["generations"].split("<|")[0] for item in json.loads(files[0].read_text())["generations"]] == [
        answer.text for answer in single
    ]


def test_coverage_tells_each_sampler(tiny, rows):
    found = coverage(*tiny, rows[:4], TASK.grade, {"exact": NOISY}, num_samples=4, ks=(1, 4), batch_size=8)
    assert (found["n"], found["samples"]) == (4, 4)
    assert list(found["exact"]) == ["pass@1", "pass@4"]
    (first, low, high), (fourth, *_) = found["exact"].values()
    assert low <= first <= high
    assert first <= fourth


def test_an_adapter_that_is_not_there_is_one_sentence():
    with pytest.raises(ValueError, match="adapter='nowhere': no adapter_config.json that can be read"):
        checkpoints([], ["nowhere"], EMBEDDED)


def test_adapters_are_added_to_float32_weights_and_16_bit_runs_under_autocast():
    model, _ = load_model(str(EMBEDDED))
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids = torch.arange(1, 9)[None]
    before = {name: value.clone() for name, value in peft.state_dict().items()}
    plain = peft(ids).logits
    with as_in_training(peft):
        assert any(getattr(module, "merged", False) for module in peft.modules())
        torch.testing.assert_close(peft(ids).logits, plain, rtol=0, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in peft.state_dict().items())
    half, _ = load_model(str(EMBEDDED), "bfloat16")
    assert not torch.is_autocast_enabled("cpu")
    with as_in_training(half):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
