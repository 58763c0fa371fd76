"""Code in README, CONTRIBUTING and docs runs as it stands; what the commands name exists."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from dgrpo.__main__ import build_parser
from dgrpo.__main__ import main as dgrpo
from dgrpo.cli import TRAINABLE, found_file, run_recipe
from dgrpo.tasks import TASKS, load_rows

ROOT = Path(__file__).parents[1]
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "examples/reward_package/README.md", *DOCS]
# What makes the tutorial's runs short.
SHORT = {
    "train": shlex.split("--max_steps 2 --num_eval_problems 8 --per_device_train_batch_size 16 --report_to none"),
    "evaluate": shlex.split("--num_problems 8"),
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[str]:
    return [text for kind, text in parts(page) if kind == "python"]


def parts(page: str) -> list[tuple[str, str]]:
    """The page's fenced Python and its indented blocks, in order: ("python" | "indented", text)."""
    found: list[tuple[str, str]] = []
    kind, lines = "", []
    for line in [*text_of(page).splitlines(), ""]:
        if kind not in ("", "indented"):
            if line.startswith("```"):
                found.append((kind, "\n".join(lines) + "\n"))
                kind, lines = "", []
            else:
                lines.append(line)
        elif line.startswith("    "):
            kind = "indented"
            lines.append(line[4:])
        elif kind == "indented":
            found.append((kind, "\n".join(lines)))
            kind, lines = "", []
        if not kind and line.startswith("```") and len(line) > 3:
            kind = line[3:]
    return [part for part in found if part[0] in ("python", "indented")]


def commands(page: str) -> list[list[str]]:
    """Every command of a page as words; blocks of TOML and lists of files are looked at and left out."""
    found = []
    for kind, text in parts(page):
        if kind != "indented":
            continue
        if text.startswith("["):
            assert tomllib.loads(text)
            continue
        lines = text.replace("\\\n", " ").splitlines()
        if all("/" in line.split()[0] and not line.startswith(".") for line in lines):
            for line in lines:
                assert (ROOT / line.split()[0]).exists(), line
            continue
        found += [words for line in lines if (words := shlex.split(line, comments=True))]
    return found


def named_files(page: str) -> dict[str, str]:
    """Python blocks that begin with the comment of a file's name."""
    return {
        match[1]: code for kind, code in parts(page) if kind == "python" if (match := re.match(r"# (\w+\.py)\n", code))
    }


@functools.cache
def help_of(recipe: str) -> str:
    shown = io.StringIO()
    kept = mock.patch.multiple(sys, argv=[], path=[*sys.path])
    with kept, contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        run_recipe(recipe, ["--help-all" if recipe in TRAINABLE else "--help"])
    return shown.getvalue() + " --config --preset "


def check_recipe(recipe: str, words: list[str], page: str) -> None:
    """The recipe has these flags, and the files and functions that they name exist."""
    for index, word in enumerate(words):
        if not word.startswith("--"):
            continue
        assert re.search(rf"{word}\b", help_of(recipe)), f"recipes/{recipe}.py has no {word}"
        if word in ("--config", "--preset"):
            found_file(word, words[index + 1])
        if word in ("--reward_funcs", "--estimator") and ":" in words[index + 1]:
            module = words[index + 1].partition(":")[0]
            assert f"{module}.py" in named_files(page) or importlib.util.find_spec(module)


def check(words: list[str], page: str) -> None:
    """AssertionError where a command's program, file or flag is none of this project's."""
    while "=" in words[0]:
        words = words[1:]
    program, *rest = words
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), words
    elif program == "pip":
        assert rest[0] == "install"
        extra = re.fullmatch(r"(?:dgrpo|\.)\[(\w+)\]", rest[-1])
        assert settings.has_option("options.extras_require", extra[1]) if extra else (ROOT / rest[-1]).is_dir(), words
    elif program == "mkdocs":
        assert rest[0] in ("serve", "build")
    elif program in ("hf", "source"):
        assert rest[0] in ("download", ".venv/bin/activate")
    elif program == "dgrpo" and rest[0] in ("evaluate", "merge"):
        check_recipe(rest[0], rest[1:], page)
    elif program == "dgrpo" and rest[0] == "train":
        assert rest[1] in TRAINABLE
        check_recipe(rest[1], rest[2:], page)
    elif program == "dgrpo" and rest[:3] == ["validate", "--task", "grpo"]:
        check_recipe("grpo", rest[3:], page)
    elif program == "dgrpo":
        build_parser().parse_args(rest)
    elif program == "accelerate":
        assert rest.pop(0) == "launch"
        if rest[0] == "--config_file":
            assert (ROOT / rest[1]).is_file(), words
            rest = rest[2:]
        check(["python", *rest], page)
    elif program == "python" and rest[:2] == ["-m", "dgrpo"]:
        check(["dgrpo", *rest[2:]], page)
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), words
    elif program == "python" and rest[0] not in named_files(page):
        file = ROOT / rest[0]
        assert file.is_file(), words
        if file.parent.name == "recipes":
            check_recipe(file.stem, rest[1:], page)
        else:
            assert all(word in file.read_text() for word in rest if word.startswith("--")), words
    else:
        assert program == "python", f"{page}: what is {' '.join(words)!r}?"


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_name_files_and_flags_that_exist(page):
    for words in commands(page):
        check(words, page)


def test_a_wrong_command_is_noticed():
    for wrong in (
        "python recipes/gsm9k.py",
        "python recipes/gsm8k.py --blok_length 3",
        "accelerate launch --config_file recipes/accelerate/zero9.yaml recipes/gsm8k.py",
        "dgrpo train gsm8k --reward_funcs no_such_module:reward",
        "make tea",
        "pip install 'dgrpo[tea]'",
        "tea --hot",
    ):
        with pytest.raises(AssertionError):
            check(shlex.split(wrong), "README.md")
    for wrong in ("dgrpo train gsm8k --preset tea", "dgrpo watch --tea"):
        with pytest.raises((ValueError, SystemExit)):
            check(shlex.split(wrong), "README.md")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to stand in, from which modules are imported; what a run changes in `sys` is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize("page", sorted({*PAGES} - {"docs/tutorial.md"}))
def test_the_code_of_a_page_runs(page, folder):
    namespace: dict = {}
    for block in blocks(page):
        exec(block, namespace)


def paste(page: str, folder: Path, wanted: Callable[[list[str]], bool] = bool) -> list[str]:
    """Does what the page says, in its order: runs its Python, writes its files, runs the commands that are wanted.

    Returns the commands of dgrpo that ran.
    """
    namespace: dict = {}
    ran = []
    for kind, text in parts(page):
        if kind == "python":
            if match := re.match(r"# (\w+\.py)\n", text):
                (folder / match[1]).write_text(text)
            else:
                exec(text, namespace)
            continue
        for words in [shlex.split(line, comments=True) for line in text.splitlines()]:
            if words[0] == "python":
                runpy.run_path(words[1], run_name="__main__")
            elif words[0] == "dgrpo" and wanted(words):
                dgrpo([*words[1:], *SHORT.get(words[1], [])])
                ran.append(words[1])
    return ran


def check_run(run: Path) -> None:
    assert {"report.html", "curves.png", "summary.json", "metrics.csv"} <= {path.name for path in run.iterdir()}


@pytest.mark.slow
def test_the_tutorial_ends_with_a_reward_and_data_of_one_s_own(folder):
    ran = paste("docs/tutorial.md", folder, lambda words: words[1] == "train" and "shop.jsonl" in words)
    assert ran == ["train"]
    check_run(folder / "runs/shop")
    assert "checked_work" in (folder / "runs/shop/metrics.csv").read_text()
    held_out = json.loads((folder / "runs/shop/samples.json").read_text())
    divided = load_rows(TASKS["gsm8k"], str(folder / "shop.jsonl"), num_held_out=8)[1]
    assert [row["prompt"] for row in held_out] == divided["question"]


@pytest.mark.slow
def test_the_tutorial_works_from_its_first_line_to_its_last(folder):
    assert paste("docs/tutorial.md", folder) == [
        *["watch", "watch", "train", "report", "evaluate", "watch"],
        *["train", "report", "compare", "merge", "watch"],
        *["validate", "train", "evaluate", "generate"],
    ]
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 400
    for run in ("gsm8k", "shop", "lager"):
        check_run(folder / "runs" / run)
    for file in ("watch.html", "compare.png", "shop-model/config.json", "runs/evaluation/results.json"):
        assert (folder / file).stat().st_size > 0, file


def test_readme_code_samples_and_scores(capsys):
    exec(blocks("README.md")[1], {})
    text, score = capsys.readouterr().out.rsplit(maxsplit=1)
    assert "<answer>" in text
    assert float(score) < 0


@pytest.mark.parametrize(("page", "name"), [("CONTRIBUTING.md", "half_hidden"), ("docs/extending.md", "two_halves")])
def test_the_estimator_of_a_page_is_one(page, name, rollout):
    from dgrpo.views import draw_views

    namespace: dict = {}
    exec(next(block for block in blocks(page) if f"def {name}" in block), namespace)
    drawn = draw_views(namespace[name], rollout, rollout.group, ("key", 0), 2)
    hidden, weights = drawn.hidden, drawn.weights
    assert hidden.shape[:2] == (6, 2)
    assert (hidden[..., 0, -5:].sum(-1) == 2).all()
    assert torch.equal(weights != 0, hidden[..., -5:] & rollout.completion_mask[:, None, None])


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_of_files_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for path in set(
        re.findall(r"\b(?:recipes|dgrpo|docs|benchmarks|tests|notebooks)/[\w/.]+\.(?:py|yaml|md|ipynb)", text)
    ):
        assert (ROOT / path).exists(), path


def test_the_site_has_every_page_and_every_name_of_the_api():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [entry if isinstance(entry, str) else next(iter(entry.values())) for entry in site["nav"]]
    assert sorted(f"docs/{page}" for page in listed) == DOCS
    names = re.findall(r"^::: ([\w.]+)$", text_of("docs/api.md"), re.MULTILINE)
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert (
            importlib.util.find_spec(name)
            if name in sys.modules
            else hasattr(importlib.import_module(module), attribute)
        )
    import dgrpo as public

    assert {f"dgrpo.{name}" for name in public.__all__} <= set(names)
    assert {f"rewards.{path.stem}" for path in (ROOT / "rewards").glob("[!_]*.py")} - {
        "rewards.code",
        "rewards.notation",
    } <= set(names)


@pytest.mark.slow
def test_readme_reward_trains_and_an_exception_in_it_does_not_end_the_run(tmp_path):
    code = blocks("README.md")[0]
    (tmp_path / "my_rewards.py").write_text(
        code + "\n\ncalls = []\n\ndef moody(prompts, completions, **columns):\n    calls.append(1)\n"
        "    if len(calls) == 1:\n        raise RuntimeError('a bad day')\n    return [0.0] * len(prompts)\n"
    )
    command = [
        sys.executable, str(ROOT / "recipes/gsm8k.py"), "--max_steps", "3", "--num_iterations", "1",
        "--per_device_train_batch_size", "16", "--num_eval_problems", "16", "--evaluate_every", "0",
        "--output_dir", str(tmp_path / "run"),
        "--reward_funcs", "my_rewards:at_once", "my_rewards:moody", "--reward_weights", "1", "1",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "a bad day" in done.stderr + done.stdout
    assert (tmp_path / "run/summary.json").exists()
