"""The command line: what each command runs, how it explains itself, and that it works from a wheel."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path
from typing import get_args

import pytest

from dgrpo import cli
from dgrpo.__main__ import main
from dgrpo.cli import REMASKING, STUDIED
from dgrpo.sampling.config import Remasking
from dgrpo.tasks import TASKS

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dgrpo"])
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def ran(monkeypatch):
    """What would have been run: file, words, name under which it runs."""
    found = []
    monkeypatch.setattr(
        cli.runpy, "run_path", lambda file, run_name: found.append((Path(file), sys.argv[1:], run_name))
    )
    return found


@pytest.mark.parametrize("task", [*TASKS, "sft", "vrpo"])
def test_train_runs_the_recipe_of_the_task_with_the_words_that_follow(ran, task):
    main(["train", task, "--max_steps", "1"])
    ((file, words, name),) = ran
    assert file == ROOT / "recipes" / f"{task}.py"
    assert file.is_file()
    assert (words, name) == (["--max_steps", "1"], "__main__")


@pytest.mark.parametrize("command", ["evaluate", "merge"])
def test_evaluate_and_merge_run_their_recipes(ran, command):
    main([command, "--help"])
    assert ran == [(ROOT / "recipes" / f"{command}.py", ["--help"], "__main__")]


def test_the_names_that_help_offers_without_importing_are_those_of_the_code():
    assert sorted(STUDIED) == sorted([*TASKS, "grpo"])
    assert get_args(Remasking) == REMASKING


def test_files_of_the_recipes_are_found_by_name_and_own_files_first(ran, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes = ROOT / "recipes"
    main(["train", "gsm8k", "--preset=spg", "--config", "gsm8k_llada_8b", "--seed", "1"])
    assert ran[-1][1] == [
        f"--preset={recipes / 'presets/spg.yaml'}",
        *["--config", str(recipes / "gsm8k_llada_8b.yaml"), "--seed", "1"],
    ]
    Path("spg.yaml").write_text("beta: 0.0\n")
    main(["train", "gsm8k", "--preset", "spg.yaml"])
    assert ran[-1][1] == ["--preset", "spg.yaml"]
    assert str(tmp_path) == sys.path[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "gsm8k", "--preset", "tea"], r"^dgrpo: preset='tea': there is no such file .*coupled_grpo"),
        (["train", "gsm8k", "--config", "tea"], r"^dgrpo: config='tea': .*gsm8k_llada_8b"),
        (["train", "gsm8k", "--blok_length", "3"], r"^dgrpo: unknown arguments \['--blok_length', '3'\]"),
        (["train", "gsm8k", "--top_p", "0.9"], r"^dgrpo: top_p=0.9 cannot be honoured"),
        (["merge", "--output_dir", "x"], r"^dgrpo: "),
        (["report", "no_such_folder"], r"^dgrpo: run_dir='no_such_folder'"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_one_line(words, message):
    with pytest.raises(SystemExit, match=message):
        main(words)


def test_an_error_of_another_library_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli.runpy, "run_path", lambda *args, **kwargs: int("tea"))
    with pytest.raises(ValueError, match="tea"):
        main(["train", "gsm8k"])


def test_help_names_every_command_task_and_way_in(capsys):
    shown = {}
    for words in ([], ["train"]):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--help"])
        assert stopped.value.code == 0
        shown[" ".join(words)] = capsys.readouterr().out
    for command in ("train", "evaluate", "watch", "compare", "report", "merge", "recipes"):
        assert f"    {command} " in shown[""]
    for word in (*TASKS, "--dataset", "--reward_funcs", "--preset", "--resume", "--help-all"):
        assert word in shown["train"]
    assert all(len(line) <= 119 for text in shown.values() for line in text.splitlines())
    with pytest.raises(SystemExit):
        main(["train", "tea"])
    assert "gsm8k" in capsys.readouterr().err


def shown(capsys, *words: str) -> str:
    main(list(words))
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["gsm8k", "grpo", "sft", "vrpo"])
def test_the_help_of_training_is_short_and_the_rest_is_in_help_all(capsys, recipe):
    from dgrpo.trainers.config import _REFUSED

    short, long = shown(capsys, "train", recipe, "--help"), shown(capsys, "train", recipe, "--seed", "1", "--help-all")
    assert len(short.splitlines()) <= 60
    assert max(map(len, (short + long).splitlines())) <= 119
    for word in ("--config", "--preset", "--output_dir", "--resume", "--dataset", "--learning_rate"):
        assert f"{word} " in short
    named = re.findall(r"^  --(\w+)", short, re.MULTILINE)
    listed = re.findall(r"^  --(\w+)", long, re.MULTILINE)
    assert set(named) <= set(listed) | {"preset"}
    assert len(listed) > 100
    assert not {
        name for name in listed if name.startswith("vllm") or (recipe in ("gsm8k", "grpo") and name in _REFUSED)
    }


def test_a_recipe_that_is_run_as_a_file_has_the_same_help(capsys):
    from dgrpo.run import parse_recipe

    with pytest.raises(SystemExit) as ended:
        parse_recipe(str(ROOT / "recipes/gsm8k.py"), argv=["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == shown(capsys, "train", "gsm8k", "--help")


def test_version(capsys):
    import dgrpo

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"dgrpo {dgrpo.__version__}\n"


def test_help_and_reference_pages_are_those_of_the_code():
    from dgrpo.run.reference import generated

    stale = [str(path.relative_to(ROOT)) for path, text in generated().items() if path.read_text() != text]
    assert not stale, "python -m dgrpo.run.reference"


def test_the_files_that_the_help_names_are_found():
    from dgrpo.__main__ import TRAIN_HELP

    for option, value in re.findall(r"(--config|--preset) (\w+)", TRAIN_HELP):
        assert Path(cli.found_file(option, value)).is_file()


def test_recipes_prints_where_they_are(capsys):
    main(["recipes"])
    assert Path(capsys.readouterr().out.strip()) == ROOT / "recipes"


def packaged() -> set[str]:
    """Files of the project that a wheel must hold, by their path in it."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    files = {path.relative_to(ROOT) for name in ("dgrpo", "rewards") for path in (ROOT / name).rglob("*")}
    files |= {Path("dgrpo") / path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*")}
    return {
        path.as_posix()
        for path in files
        if "__pycache__" not in path.parts and not (ROOT / path).is_dir() and path.suffix and path.suffix != ".pyc"
    }


def test_every_package_is_listed():
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    listed = set(settings["options"]["packages"].split())
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in ("dgrpo", "rewards")
        for path in (ROOT / name).rglob("*.py")
    }
    assert listed == found | {"dgrpo.recipes"}


@pytest.mark.slow
def test_it_trains_from_a_wheel_in_another_folder(tmp_path):
    source, target, elsewhere = tmp_path / "source", tmp_path / "target", tmp_path / "elsewhere"
    for name in ("dgrpo", "rewards", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    missing = packaged() - set(zipfile.ZipFile(wheel).namelist())
    assert not missing
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    assert os.access(target / "bin/dgrpo", os.X_OK)

    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    short = ["--max_steps", "1", "--num_eval_problems", "8", "--per_device_train_batch_size", "16"]
    command = [sys.executable, "-m", "dgrpo", "train", "gsm8k", "--preset", "spg", "--block_length", "4", *short]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (elsewhere / "runs/gsm8k/summary.json").exists()
    where = [str(target / "bin/dgrpo"), "recipes"]
    printed = subprocess.run(where, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=600)
    assert printed.stdout.strip() == str(target / "dgrpo/recipes"), printed.stderr


@pytest.mark.parametrize(
    "words",
    [
        *(["--help"], ["--version"], ["train", "--help"], ["train", "gsm8k", "--help"], ["report", "RUN"]),
        *([command, "--help"] for command in ("evaluate", "merge", "generate", "chat", "study", "plan")),
    ],
    ids=" ".join,
)
def test_what_answers_at_once_imports_nothing_heavy(tmp_path, words):
    words = [str(tmp_path) if word == "RUN" else word for word in words]
    code = (
        "import sys, contextlib, io\n"
        "from dgrpo.__main__ import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        f"    main({words})\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_every_public_name_is_there_when_asked_for():
    import dgrpo

    assert all(getattr(dgrpo, name) is not None for name in dgrpo.__all__)
    assert set(dgrpo.__all__) <= set(dir(dgrpo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dgrpo.nothing  # noqa: B018
