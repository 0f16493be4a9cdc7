"""What a release is made of tells of one version, and holds what its tests read."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_all_tell_of_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert PROJECT["version"] == str(citation["version"]) == newest
    assert citation["license"] == PROJECT["license"]


def test_every_command_is_among_the_changes():
    from adamerge_jax.cli.commands import COMMANDS

    changes = (ROOT / "CHANGELOG.md").read_text()
    assert [name for name in COMMANDS if f"`{name}`" not in changes] == []


OPTIONAL = [
    requirement
    for extra in PROJECT["optional-dependencies"].values()
    for requirement in extra
    if not requirement.startswith("adamerge_jax[")
]


@pytest.mark.parametrize("requirement", [*PROJECT["dependencies"], *OPTIONAL])
def test_dependencies_have_bounds_on_both_sides(requirement: str):
    bounds = r"[\w-]+(\[\w+\])?(>=[\d.]+,<[\d.]+|==[\d.]+)"
    assert re.fullmatch(bounds, requirement)
    assert requirement in OPTIONAL or "==" not in requirement


def test_the_versions_that_tests_passed_with_are_within_the_bounds():
    lines = (ROOT / "tests" / "constraints.txt").read_text().splitlines()
    passed = {
        canonicalize_name(name): version
        for name, equals, version in (line.partition("==") for line in lines)
        if equals
    }
    required = [Requirement(text) for text in (*PROJECT["dependencies"], *OPTIONAL)]
    measured = [one for one in required if canonicalize_name(one.name) in passed]
    assert len(measured) > len(PROJECT["dependencies"])
    for requirement in measured:
        version = passed[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version}"


def test_the_sdist_holds_what_the_tests_read():
    manifest = (ROOT / "MANIFEST.in").read_text()
    grafted = re.findall(r"^graft (\w+)$", manifest, re.MULTILINE)
    included = re.findall(r"\S+\.\w+", re.search(r"^include (.*)$", manifest, re.MULTILINE)[1])
    # What setuptools takes by itself, and what it and others make.
    taken = {"adamerge_jax", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
    here = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    made = {"build", "dist", "site", "runs", "quickstart", "PKG-INFO", "setup.cfg"}
    named = {name for name in here if not name.endswith(".egg-info")} - made
    assert named - taken == {*grafted, *included}
