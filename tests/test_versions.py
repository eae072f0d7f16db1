"""The supported versions: pyproject.toml, the constraints and the table of docs/index.md say the same of them."""

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from pages import tables_in, text_of
from versions import pins

PACKAGES = ("transformers", "torch", "peft")


def table() -> dict[str, tuple[Version, Version]]:
    """The lowest and the highest version of each package in the table of the page."""
    rows = [row for rows in tables_in(text_of("docs/index.md")) for row in rows if "lowest" in row]
    return {row["package"]: (Version(row["lowest"]), Version(row["highest"])) for row in rows}


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
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
