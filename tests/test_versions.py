"""The supported versions: pyproject.toml, the constraints and the table of docs/index.md say the same of them."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGES = ("transformers", "torch", "peft")


def pins(name: str) -> dict[str, Version]:
    """The versions that a file of constraints pins, by package."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {key: Version(pin) for key, _, pin in (line.partition("==") for line in lines if "==" in line)}


def table() -> dict[str, tuple[Version, Version]]:
    """The lowest and the highest version of each package in the table of the page."""
    page = (ROOT / "docs/index.md").read_text(encoding="utf-8").partition("## Supported versions")[2]
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    return {package: (Version(lowest), Version(highest)) for package, lowest, highest in rows}


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {found.name: found for found in map(Requirement, project["dependencies"])}


def test_the_table_names_the_packages_that_have_a_range():
    assert tuple(table()) == PACKAGES
    assert set(pins("constraints_oldest.txt")) == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_lowest_version_is_the_one_that_was_run(package):
    lowest, highest = table()[package]
    bounds = {bound.operator: Version(bound.version) for bound in requirements()[package].specifier}
    assert bounds[">="] == pins("constraints_oldest.txt")[package] == lowest
    assert lowest <= pins("constraints.txt")[package] <= highest


def test_the_next_minor_version_of_transformers_is_not_allowed():
    _, highest = table()["transformers"]
    bounds = {bound.operator: Version(bound.version) for bound in requirements()["transformers"].specifier}
    assert bounds["<"] == Version(f"{highest.major}.{highest.minor + 1}")
