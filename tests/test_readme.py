"""The README's code runs and prints what the page says; its module tree is the package's."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import transformers_kad
from transformers_kad import DeferralRule, DualDeferral, KADLogitsProcessor

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]


@pytest.fixture
def names(monkeypatch):
    """What the snippets take for granted: imports, a tokenizer and a question."""
    monkeypatch.chdir(ROOT)
    tokenizer = AutoTokenizer.from_pretrained("recipes/tiny_pair/base")
    messages = [
        {"role": "user", "content": "Mia has 34 apples. Jon brings 28 more. How many apples does Mia have now?"}
    ]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return {
        "tokenizer": tokenizer,
        "inputs": inputs,
        "dataclass": dataclass,
        **{
            item.__name__: item
            for item in (AutoModelForCausalLM, PeftModel, DeferralRule, DualDeferral, KADLogitsProcessor)
        },
    }


def test_the_first_snippet_prints_what_the_page_says(names, capsys):
    exec(PYTHON[0], names)
    printed = next(text for language, text in BLOCKS if language == "")
    assert capsys.readouterr().out.strip() == printed.strip()


def test_the_rule_of_the_page_is_a_rule(names):
    names["proxy"] = AutoModelForCausalLM.from_pretrained("recipes/tiny_pair/reference")
    exec(PYTHON[1], names)
    probs = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    assert names["kad"].rule.defer(probs).tolist() == [[True, False, False, True]]


def test_every_module_is_in_the_tree_and_no_other():
    tree = next(text for language, text in BLOCKS if language == "" and "transformers_kad/" in text)
    package = tree.partition("transformers_kad/")[2].partition("recipes/")[0]
    listed = set(re.findall(r"(\w+\.py)", package))
    present = {path.name for path in Path(transformers_kad.__file__).parent.glob("*.py")}
    assert listed == present - {"__init__.py", "_version.py"}


def test_every_rule_is_in_the_table():
    for rule in transformers_kad.RULES.values():
        assert f"| `{rule.__name__}` |" in README
