"""What setup.cfg admits is what CI installs."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_the_lowest_admitted_versions_are_the_installed_ones():
    """CI is then also the run on the lowest versions: a bound may not be lower than what was tested."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    pinned = dict(
        line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for line in config["options"]["install_requires"].split():
        requirement = Requirement(line)
        lowest = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        assert lowest, f"{line}: say the lowest version"
        installed = pinned[requirement.name.lower()].split(".")
        assert installed[: lowest[0].count(".") + 1] == lowest[0].split("."), line


def test_every_package_that_is_imported_is_declared():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"].values()
    lines = "\n".join([settings["options"]["install_requires"], *extras]).split()
    declared = {re.split(r"[<>=,\[]", line)[0].lower().replace("_", "-") for line in lines}
    declared |= {"dgrpo"}
    imported: dict[str, str] = {}
    for path in (path for name in ("dgrpo", "rewards", "recipes") for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            imported |= {name.partition(".")[0]: path.name for name in names}
    called = {"PIL": "pillow", "yaml": "pyyaml", "rewards": "dgrpo"}
    missing = {
        name: file
        for name, file in imported.items()
        if name not in sys.stdlib_module_names and called.get(name, name).lower().replace("_", "-") not in declared
    }
    assert not missing


@pytest.mark.slow
def test_a_source_distribution_is_complete(tmp_path):
    folders = ("benchmarks", "dgrpo", "docs", "examples", "notebooks", "recipes", "rewards", "tests", ".ci")
    files = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile", "constraints.txt")
    files += ("CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml", "ruff.toml")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")
    for name in folders:
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=ignored)
    for name in files:
        shutil.copy(ROOT / name, tmp_path / "source")
    code = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "source", check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    wanted = [path for name in folders for path in (tmp_path / "source" / name).rglob("*") if path.is_file()]
    missing = {str(path.relative_to(tmp_path / "source")) for path in wanted if "egg-info" not in str(path)} - packed
    assert not missing
    assert set(files) <= packed
