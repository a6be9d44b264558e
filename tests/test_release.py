"""What a release says of itself: its version, its changes, the versions that it asks for."""

import re
import tomllib
from pathlib import Path

import yaml
from lowest import lowest
from packaging.requirements import Requirement

from tune_topkd import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [r for part in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()) for r in part]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().splitlines() if "==" in line)


def test_the_changelog_has_the_version_or_what_comes_after_it():
    sections = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    released = [section.partition(" ")[0] for section in sections if section != "Unreleased"]
    assert sections[0] == "Unreleased" or released[0] == __version__
    assert released == sorted(released, key=lambda v: tuple(map(int, v.split("."))), reverse=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_every_requirement_is_pinned_for_the_tests_to_a_version_that_it_allows():
    for text in ASKED:
        requirement = Requirement(text)
        pinned = PINNED[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(pinned), f"{text}, but {pinned} is tested"


def test_of_every_bound_the_lowest_version_is_known():
    bounded = {Requirement(text).name for text in ASKED if ">=" in text}
    assert {line.partition("==")[0] for line in lowest(ASKED)} == bounded
    assert list(lowest(["ray[tune]>=2.55", "pyyaml>=6.0.2", "pandas-stubs"])) == ["ray==2.55.*", "pyyaml==6.0.2"]
