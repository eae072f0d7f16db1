"""What every recipe owes its users: a header that installs what it needs, help, and a life of its own elsewhere."""

import ast
import os
import re
import runpy
import shutil
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from run_command import run_command

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
PAIR = ROOT / "recipes" / "tiny_pair"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = {
    canonicalize_name(Requirement(line).name)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}
DISTRIBUTIONS = packages_distributions()

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def header(recipe):
    """The inline metadata of PEP 723."""
    block = re.search(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", recipe.read_text())
    return tomllib.loads("".join(line[2:] + "\n" for line in block[1].splitlines()))


def provided(requirements):
    """Names of the packages that requirements of this project and others ask for, extras followed."""
    names = set()
    for requirement in map(Requirement, requirements):
        if requirement.name != "transformers-kad":
            names.add(canonicalize_name(requirement.name))
            continue
        names.add("transformers-kad")
        names |= provided(PROJECT["dependencies"])
        for extra in requirement.extras:
            names |= provided(PROJECT["optional-dependencies"][extra])
    return names


def imported(recipe):
    """Third-party modules that a script imports anywhere."""
    modules = set()
    for node in ast.walk(ast.parse(recipe.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.partition(".")[0])
    return modules - set(sys.stdlib_module_names)


@each_recipe
def test_the_header_installs_what_the_script_imports(recipe):
    needed = header(recipe)
    assert needed["requires-python"] == PROJECT["requires-python"]
    available = provided(needed["dependencies"])
    for module in imported(recipe):
        distributions = {canonicalize_name(name) for name in DISTRIBUTIONS.get(module, [module])}
        assert distributions & available, f"{recipe.name} imports {module}, which its header does not install"


@each_recipe
def test_the_header_asks_for_nothing_that_is_not_tested(recipe):
    for name in provided(header(recipe)["dependencies"]) - {"transformers-kad"}:
        assert name in PINNED, f"{name} is not pinned in constraints.txt"


@each_recipe
def test_recipes_import_no_other_recipe(recipe):
    assert not imported(recipe) & {path.stem for path in RECIPES}


@each_recipe
def test_the_docstring_shows_how_to_call_it(recipe):
    assert f"recipes/{recipe.name}" in ast.get_docstring(ast.parse(recipe.read_text()))


def run_copy(recipe, folder, *arguments):
    """Run a copy of the script in a folder of its own, with nothing of this repository on the path."""
    copy = shutil.copy(recipe, folder / "script.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return run_command([sys.executable, str(copy), *arguments], cwd=folder, env=environment)


@pytest.mark.slow
@each_recipe
def test_help_says_what_it_does_and_explains_every_option(recipe, tmp_path):
    run = run_copy(recipe, tmp_path, "--help")
    assert (run.returncode, run.stderr) == (0, "")  # nothing of torchao's either, see tests/test_torchao.py
    first = ast.get_docstring(ast.parse(recipe.read_text())).splitlines()[0]
    assert first in run.stdout
    assert f"    python recipes/{recipe.name}" in run.stdout  # an example on a line of its own
    options = run.stdout.partition("\noptions:\n")[2]
    entries = re.split(r"\n(?=  -)", "\n" + options.strip("\n"))
    for entry in filter(str.strip, entries):
        option, _, text = re.sub(r"\s+", " ", entry).strip().partition(" ")
        words = re.sub(r"\[?\{?[A-Z_]{2,}[^ ]*|\(default: .*|\{[^}]*\}|--?[\w-]+,?", "", text)
        assert len(words.split()) >= 1, f"{recipe.name} {option} is not explained"


COPIES = {
    "quickstart": ("--pair", PAIR, "--problems", "2", "--max_new_tokens", "4"),
    "run_eval": ("--pair", PAIR, "--limit", "2", "--max_new_tokens", "4"),
    "sweep": (
        *("--pair", PAIR, "--limit", "2", "--max_new_tokens", "4", "--no_speculative"),
        *("--method", "base", "kad-dual:threshold=0.3,0.5"),
    ),
    "tune": (
        *("--pair", PAIR, "--limit", "2", "--max_new_tokens", "4", "--no_speculative"),
        *("--trials", "2", "--goal", "accuracy"),
    ),
    "benchmark_adapters": ("--sizes", "1M", "--repetitions", "2", "--steps", "2", "--context", "4"),
    "benchmark_pacing": (
        *("--pair", PAIR, "--limit", "2", "--max_new_tokens", "4"),
        *("--budgets", "0.2", "--step_sizes", "0.1", "--thresholds", "0.4"),
    ),
    "benchmark_rules": ("--vocabulary", "50", "--rows", "1", "6", "--repetitions", "2"),
    "benchmark_speed": (
        *("--pair", PAIR, "--methods", "lazy,speculative", "--draft_lengths", "2"),
        *("--max_new_tokens", "4", "--repetitions", "1"),
    ),
    "benchmark_verification": (
        *("--pair", PAIR, "--methods", "kad-dual:threshold=0.5", "--draft_lengths", "2", "--texts", "2"),
        *("--repetitions", "1", "--max_new_tokens", "4", "--inflate", "base=600K,proxy=500K"),
    ),
    "benchmark_check": (
        *("--pair", PAIR, "--prompts", "1", "--problems", "2", "--max_new_tokens", "2", "--training_steps", "1"),
    ),
    "check_pair": ("--pair", PAIR, "--limit", "1", "--max_new_tokens", "2", "--method", "nudging"),
    "generate": ("--base", PAIR / "base", "--proxy", PAIR / "proxy", "--prompt", "Ada has 1 hat."),
}
# These are run as copies by tests of their own.
ELSEWHERE = {"align_dpo", "align_sft", "serve", "train_tiny_pair"}


def test_every_recipe_is_run_as_a_copy():
    assert {recipe.stem for recipe in RECIPES} == set(COPIES) | ELSEWHERE


@pytest.mark.slow
@pytest.mark.parametrize("name", COPIES)
def test_it_runs_as_a_single_file_copied_elsewhere(name, tmp_path):
    run = run_copy(ROOT / "recipes" / f"{name}.py", tmp_path, *map(str, COPIES[name]))
    assert run.returncode == 0, run.stderr
    assert run.stdout


@pytest.mark.parametrize(
    "name",
    [
        *("quickstart", "run_eval", "sweep", "tune", "check_pair", "benchmark_check", "benchmark_pacing"),
        *("benchmark_speed", "benchmark_verification"),
    ],
)
def test_without_the_pair_a_copy_says_what_to_pass(name, tmp_path, monkeypatch, capsys):
    copy = shutil.copy(ROOT / "recipes" / f"{name}.py", tmp_path / "script.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(copy)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(copy), run_name="__main__")
    status, errors = ended.value.code, capsys.readouterr().err
    if isinstance(status, str):  # as Python does where it ends
        status, errors = 1, f"{errors}{status}\n"
    assert status != 0
    assert errors.splitlines()[-1].startswith(("error: ", "script.py: error: "))
    assert "--pair" in errors
