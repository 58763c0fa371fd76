"""Any dataset by its column names: sources, prompts, splits and what is refused; and a run as a user starts it."""

import json
import re
import sys

import pytest

from dgrpo.__main__ import main
from dgrpo.evaluation.interval import mean_interval, wilson_interval
from dgrpo.run.own_data import OwnDataRecipeConfig, weighted_rewards
from dgrpo.tasks import load_rows, read_rows
from dgrpo.tasks.columns import OwnData, PromptColumns, own_data_task

CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


def pays(prompts, completions, answer, **columns):
    return [0.5 * (len(text[0]["content"]) == int(gold)) for text, gold in zip(completions, answer, strict=True)]


@pytest.fixture
def shop(tmp_path):
    """A CSV with odd column names, in which each of 40 questions stands twice."""
    path = tmp_path / "shop.csv"
    lines = [f'{number},"What, is {number % 40}+1?",0{number % 40 + 1}' for number in range(80)]
    path.write_text("\n".join(["id,Aufgabe (Text),Loesung", *lines]))
    return str(path)


def rows_of(source, **settings):
    settings = {"prompt_column": "Aufgabe (Text)", "answer_column": "Loesung"} | settings
    return load_rows(own_data_task(OwnData(**settings), pays), source)


def test_columns_of_any_name_ask_and_answer_and_equal_prompts_stay_on_one_side(shop):
    train, held_out = rows_of(shop, system_prompt="Be brief.")
    assert (len(train), len(held_out)) == (64, 16)
    assert not {str(row) for row in train["prompt"]} & {str(row) for row in held_out["prompt"]}
    row = train[0]
    assert row["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": row["Aufgabe (Text)"]},
    ]
    # As text: the zero in front is kept.
    assert row["answer"] == row["Loesung"] == f"0{int(row['id']) % 40 + 1}"
    plain = rows_of(shop, prompt_format="plain")[0]
    assert plain["prompt"] == plain["Aufgabe (Text)"]
    assert len(rows_of(shop, held_out_share=0.5)[1]) == 40


def test_examples_go_in_front_and_are_neither_trained_nor_evaluated_on(shop):
    train, held_out = rows_of(shop, few_shot=f"{shop}@train[:2]")
    assert len(train) + len(held_out) == 76
    prompt = train[0]["prompt"]
    assert [turn["content"] for turn in prompt[:4]] == ["What, is 0+1?", "01", "What, is 1+1?", "02"]
    assert [turn["role"] for turn in prompt] == ["user", "assistant"] * 2 + ["user"]
    assert all("is 0+1" not in row["question"] and "is 1+1" not in row["question"] for row in [*train, *held_out])


def test_conversations_of_several_turns_end_with_the_question(tmp_path):
    path = tmp_path / "chats.jsonl"
    others = [{"from": "human", "value": "And 2+2?"}, {"from": "gpt", "value": "4"}]
    path.write_text("".join(json.dumps({"messages": [*CHAT, *others[:1]], "n": n}) + "\n" for n in range(3)))
    with pytest.raises(ValueError, match=r"no rows are left for training \(0 to train on, 3 held out, equal prompts"):
        rows_of(str(path), prompt_column=None, answer_column=None)
    rows = [{"conversations": [{"from": "human", "value": f"{n}?"}, *others]} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, _ = rows_of(str(path), prompt_column=None, answer_column=None)
    assert [turn["role"] for turn in train[0]["prompt"]] == ["user", "user"]
    assert set(train["answer"]) == {"4"}


@pytest.mark.parametrize("divider", [";", "\t"])
def test_fields_divided_by_semicolons_or_tabs_are_read(tmp_path, divider):
    path = tmp_path / "rows.csv"
    lines = [divider.join(fields) for fields in [("id", "Aufgabe (Text)", "Loesung"), ("1", '"What, 1+1?"', "2,5")]]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    assert read_rows(str(path), "train") == [{"id": "1", "Aufgabe (Text)": "What, 1+1?", "Loesung": "2,5"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], None),
        ([{"role": "user", "content": [{"type": "image", "url": "a"}]}], "a part of type 'image'; only texts"),
        ([{"role": "bot", "content": "a"}], "role 'bot' is none of system, developer, user"),
        ([{"role": "system", "content": "a"}], "nothing is asked, there is no message of the user"),
        ([{"role": "assistant", "content": "a"}], "nothing is asked, there is no message of the user"),
        (0, "prompt_column='prompt' is 0; give a text, or messages"),
        ([], "it is empty. Fill it in, or leave such rows out with --skip_empty true"),
    ],
    ids=str,
)
def test_messages_of_other_forms_are_read_or_refused(content, message):
    if message is None:
        assert OwnData().prompt_of({"prompt": content}) == [{"role": "user", "content": "ab"}]
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            OwnData().prompt_of({"prompt": content})


def test_files_in_other_encodings_and_lines_too_long_are_named(tmp_path):
    for name, content, message in (
        ("a.csv", "q,a\nZo\u00eb?,1\n".encode("latin-1"), "the file is not in UTF-8 (.*); save it in that encoding"),
        ("b.csv", b"q,a\n1,2\n1,2,3\n", "cannot be read: Expected 2 fields in line 3, saw 3"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_rows(str(tmp_path / name), "train")


def test_parts_and_mixtures_of_datasets(shop):
    assert len(read_rows(f"{shop}@train[10:20]+train[:5%]", "train")) == 14
    assert len(read_rows(shop, "train", first=7)) == 7
    mixed = read_rows(f"{shop} + {shop}@train[:10]", "train")
    assert (len(mixed), mixed[80]["id"]) == (90, "0")
    weighted = read_rows(f"{shop} + {shop}@train[:10]", "train", weights=[1, 1])
    assert weighted == read_rows(f"{shop} + {shop}@train[:10]", "train", weights=[2, 2])
    assert 15 <= len(weighted) <= 30
    with pytest.raises(ValueError, match=r"none of the file's 80 rows"):
        read_rows(f"{shop}@train[:0]", "train")
    with pytest.raises(ValueError, match=r"one split, called train"):
        read_rows(f"{shop}@test", "train")
    with pytest.raises(ValueError, match=r"dataset_weights=\[1\]: give a positive number for each of the 2 sources"):
        read_rows(f"{shop} + {shop}", "train", weights=[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt_column": "Frage"},
            r"row 1: .*'Frage': there is no column 'Frage' among \['id', 'Aufgabe",
        ),
        ({"answer_column": "gold"}, r"answer_column='gold': there is no such column among \['id', 'Aufgabe"),
        ({"answer_column": "leer"}, r"answer_column='leer': it is empty. Fill it in, or .* --skip_empty true"),
        ({"answer_column": "leer", "skip_empty": True}, "in every row one of .* is empty"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(tmp_path, settings, message):
    path = tmp_path / "rows.csv"
    path.write_text("id,Aufgabe (Text),Loesung,leer\n1,What?,2,\n2,Why?,3,\n")
    with pytest.raises(ValueError, match=message):
        rows_of(str(path), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "embedded"}, "dataset='embedded': name the rows"),
        ({"held_out_share": 1.0}, "held_out_share=1.0: must be above 0"),
        ({"dataset_weights": [1.0]}, "is no mixture"),
        ({"prompt_format": "plain", "system_prompt": "x"}, "plain text has no system message"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OwnDataRecipeConfig(**({"dataset": "rows.csv"} | settings))


def test_the_held_out_score_is_the_weighted_sum_of_the_rewards():
    async def later(prompts, completions, **columns):
        return [None, 1.0]

    def raises(prompts, completions):
        raise RuntimeError

    score = weighted_rewards([pays, later, raises], [2.0, 3.0, 1.0], None)
    texts = [[{"role": "assistant", "content": "ab"}]] * 2
    assert score(["?"] * 2, texts, answer=["2", "3"]) == [1.0, 3.0]
    assert mean_interval([0.0, 1.0, 1.0]) == wilson_interval(2 / 3, 3)
    low, high = mean_interval([0.0, 2.0, 4.0] * 20)
    assert 1 < low < 2 < high < 3


def test_references_are_checked_by_the_columns_of_the_dataset(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "exact_rewards.py").write_text(
        "def exact(prompts, completions, answer, **columns):\n"
        "    return [float(c[0]['content'] == a != '05') for c, a in zip(completions, answer)]\n"
    )
    words = ["validate", "--task", "grpo", "--dataset", shop, "--reward_funcs", "exact_rewards:exact"]
    main([*words, "--prompt_column", "Aufgabe (Text)", "--answer_column", "Loesung"])
    assert re.match(r"64 rows: 6[24] references pass, [02] fail", capsys.readouterr().out)
    with pytest.raises(SystemExit, match=r"prompt_column=None: there is no column 'prompt'"):
        main(words)


def test_completions_to_learn_come_from_columns_of_any_name():
    rows = [{"Frage": "1+1?", "gut": "2", "schlecht": "3"}]
    columns = {"chosen": "gut", "rejected": "schlecht"}
    plain = PromptColumns(prompt_column="Frage", prompt_format="plain").pairs(rows, columns)
    assert plain == [{"prompt": "1+1?", "chosen": "2", "rejected": "3"}]
    [row] = PromptColumns(prompt_column="Frage", system_prompt="s").pairs(rows, columns)
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    assert row["chosen"] == [{"role": "assistant", "content": "2"}]
    assert PromptColumns().pairs([{"messages": CHAT}], {"completion": None}) == [
        {"prompt": CHAT[:1], "completion": CHAT[1:]}
    ]
    own = [{"prompt": CHAT[:1], "completion": CHAT[1:]}]
    assert PromptColumns(prompt_format="plain").pairs(own, {"completion": None}) is own
    with pytest.raises(ValueError, match=r"row 1: chosen_column=None: there is no column 'chosen' among \['Frage'"):
        PromptColumns(prompt_column="Frage").pairs(rows, {"chosen": None})


@pytest.mark.slow
def test_a_csv_with_odd_names_trains_and_is_reported(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dgrpo"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "odd_rewards.py").write_text(
        "def half(prompts, completions, answer, **columns):\n    return [0.5 * (len(c) == 1) for c in completions]\n"
    )
    main(
        [
            *["train", "grpo", "--dataset", shop, "--prompt_column", "Aufgabe (Text)", "--answer_column", "Loesung"],
            *["--reward_funcs", "odd_rewards:half", "--max_steps", "2", "--num_eval_problems", "8"],
            *["--per_device_train_batch_size", "16", "--report_to", "none", "--output_dir", "run"],
        ]
    )
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["before"]["score"] == summary["after"]["score"] == 0.5
    assert "eval_score" in (tmp_path / "run/metrics.csv").read_text()
    assert "Score before" in (tmp_path / "run/report.html").read_text()
    main(["evaluate", "--task", "grpo", "--adapter", "none", "run", "--num_problems", "8"])
    results = json.loads((tmp_path / "runs/evaluation/results.json").read_text())
    assert [(each["metric"], each["accuracy"], each["n"]) for each in results] == [("score", 0.5, 8)] * 2
