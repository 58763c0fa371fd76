"""What setup.cfg admits is what CI installs."""

import configparser
from pathlib import Path

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
