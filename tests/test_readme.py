"""The README's code runs and prints what the page says; its module tree is the package's."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import transformers_kad

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
EXAMPLE, BEFORE, RULE = (text for language, text in BLOCKS if language == "python")
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


def test_every_rule_is_in_the_table():
    for rule in transformers_kad.RULES.values():
        assert f"| `{rule.__name__}` |" in README
