"""The README's code runs and prints what the page says; its module tree is the package's."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import test_proxy_kinds
import torch
from transformers import AutoModelForCausalLM

import transformers_kad
from transformers_kad.recipes.evaluation.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
EXAMPLE, BEFORE, OTHER_TOKENIZER, HUB, RULE = (text for language, text in BLOCKS if language == "python")
_, TABLE, ALIGN, MEASURE, PAPER, HARNESS, SPEED = (text for language, text in BLOCKS if language == "bash")
PRINTED, TREE = (text for language, text in BLOCKS if language == "")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_example_prints_what_the_page_says(capsys):
    names = {}
    exec(BEFORE, names)
    exec(EXAMPLE, names)
    assert capsys.readouterr().out.strip() == PRINTED.strip()
    assert len(EXAMPLE.strip().splitlines()) == 6


def test_a_proxy_with_another_tokenizer(capsys):
    names = dict.fromkeys(("base_path", "proxy_path"), "recipes/tiny_pair/base")
    exec(OTHER_TOKENIZER, names)
    assert "640 tokens are shared" in capsys.readouterr().out


def test_the_repo_for_the_hub():
    names = {}
    exec(BEFORE, names)
    exec(EXAMPLE, names)
    exec(HUB, names)
    assert names["ids"].shape[1] > names["inputs"]["input_ids"].shape[1]


@pytest.mark.slow
def test_align_generate_and_look(tmp_path, monkeypatch):
    """The commands of the page from an empty folder, but for the installation and the browser."""
    commands = ALIGN.replace("\\\n", " ").strip().splitlines()
    assert [command.split()[1:4] for command in commands][::3] == [
        ["-m", "pip", "install"],
        ["-m", "webbrowser", "trace.html"],
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    outputs = []
    for command in commands[1:3]:
        python, *words = shlex.split(command)
        assert python == "python"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, env=environment, check=False, timeout=600
        )
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert re.search(r"We get 34 \+ 28 = 62\. The answer is 62\.", outputs[1])
    assert "<html" in (tmp_path / "trace.html").read_text()


def commands(block):
    """The words of each recipe's call in a block."""
    for line in block.replace("\\\n", " ").strip().splitlines():
        python, script, *words = shlex.split(line)
        if script.startswith("recipes/"):
            assert python == "python"
            yield Path(script).stem, words


@pytest.mark.parametrize("block", [TABLE, MEASURE, PAPER, SPEED], ids=["table", "tiny", "paper", "speed"])
def test_the_commands_that_measure_are_understood(block, monkeypatch):
    understood = []
    for name, words in commands(block):
        recipe = importlib.import_module(name)
        worker = "evaluate" if name in ("run_eval", "sweep") else "run"
        monkeypatch.setattr(recipe, worker, lambda *given, **_: understood.append(given) or 0)
        assert recipe.main(words) == 0
    assert len(understood) == {TABLE: 1, MEASURE: 4, PAPER: 2, SPEED: 1}[block]
    if block == PAPER:
        for _, evaluation, chosen, _ in understood:
            assert {*evaluation.task} == {*TASKS} - {"tiny"}
            assert {"kad-dual", "kad-primal", "nudging", "aligned"} <= {method.name for method in chosen.methods()}


def test_the_pictures_of_the_page_are_there():
    paths = re.findall(r"!\[[^]]+\]\((\S+)\)", README)
    assert len(paths) == 7
    for path in paths:
        assert (ROOT / path).read_bytes().startswith((b"\x89PNG", b"<?xml"))


def test_the_table_of_what_was_tried_is_that_of_the_tests():
    header, _, *rows = re.search(r"\| proxy \| equal.*?(?=\n\n)", README, re.DOTALL)[0].splitlines()
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert names == list(test_proxy_kinds.KINDS)
    columns = header.strip("| ").split(" | ")[1:]
    assert columns == [name.replace("equal", "equal vocabularies") for name in test_proxy_kinds.VOCABULARIES]
    assert {cell for row in rows for cell in row.strip("| ").split(" | ")[1:]} == {"exact"}


def test_the_rule_of_the_page_is_a_rule():
    names = {"proxy": AutoModelForCausalLM.from_pretrained("recipes/tiny_pair/reference")}
    exec(RULE, names)
    probs = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    assert names["kad"].rule.defer(probs).tolist() == [[True, False, False, True]]


def test_every_module_is_in_the_tree_and_no_other():
    package = TREE.partition("transformers_kad/")[2].partition("recipes/")[0]
    listed = set(re.findall(r"(\w+\.py)", package))
    present = {path.name for path in Path(transformers_kad.__file__).parent.glob("*.py")}
    assert listed == present - {"__init__.py", "_version.py"}
    recipes = set(re.findall(r"(\w+\.py)", TREE.partition("recipes/")[2].partition("tests/")[0]))
    assert recipes == {path.name for path in (ROOT / "recipes").glob("*.py")}


def test_every_rule_is_in_the_table():
    for rule in transformers_kad.RULES.values():
        assert f"| `{rule.__name__}` |" in README
