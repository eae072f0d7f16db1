"""IFEval: rows in the layout of the set, and the checks of lm-evaluation-harness."""

import importlib
import sys
from pathlib import Path

import nltk
import pytest

from transformers_kad.recipes.evaluation import ifeval
from transformers_kad.recipes.evaluation.tasks import get_task

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """A folder in place of the data that nltk would download, which only counts of sentences read."""
    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    ifeval.checks.cache_clear()
    yield
    ifeval.checks.cache_clear()


@pytest.mark.parametrize(
    ("key", "text", "followed", "loosely"),
    [
        ("1", "It has two towers and many cars cross it daily.", [True, True], [True, True]),
        ("1", "Sure, here:\nIt has two towers and many cars cross it daily.", [False, True], [True, True]),
        ("1", "It is long, and high.", [False, False], [False, False]),
        ("2", "The wind moves the boat.", [True], [True]),
        ("2", "The wind.", [False], [False]),
        ("3", "* apples\n* pears", [True], [True]),
        ("4", "Rome. That is all.", [True], [True]),
        ("5", '"A watched pot never boils."', [True], [True]),
        ("5", "", [False], [False]),
    ],
)
def test_constraints_of_the_set(punkt, key, text, followed, loosely):
    task = get_task("ifeval")
    (instance,) = (one for one in task.load(data_dir=FIXTURES) if one.id == key)
    score = task.score(instance, text, True)
    assert (score["followed"], score["followed_lenient"]) == (followed, loosely)
    assert (score["correct"], score["correct_lenient"]) == (all(followed), all(loosely))
    assert (score["prediction"] == score["answer"]) == score["correct"]


def test_constraints_have_readable_names(punkt):
    first, second, *_ = get_task("ifeval").load(data_dir=FIXTURES)
    assert first.answer == ("punctuation:no_comma\nlength_constraints:number_words relation='at least' num_words=8")
    assert second.answer == "keywords:existence keywords=['boat', 'wind']"


def test_a_file_of_the_set_may_be_passed_itself(punkt):
    file = FIXTURES / "google" / "IFEval" / "ifeval_input_data.jsonl"
    assert get_task("ifeval").load(data_dir=file) == get_task("ifeval").load(data_dir=FIXTURES)


def test_an_unknown_instruction_is_named_with_its_row(punkt, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"key": 7, "prompt": "x", "instruction_id_list": ["colour:red"], "kwargs": [{"a": 1}]}\n')
    with pytest.raises(ValueError, match=r"Row 1 .*the instruction 'colour:red' is unknown"):
        get_task("ifeval").load(data_dir=file)


@pytest.mark.parametrize("missing", ["langdetect", "punkt"])
def test_without_the_checks_the_error_says_what_to_install(missing, tmp_path, monkeypatch):
    (tmp_path / "tokenizers").mkdir()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    if missing == "langdetect":
        (tmp_path / "tokenizers" / "punkt_tab").mkdir()
        for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "langdetect", None)
    ifeval.checks.cache_clear()
    with pytest.raises(ImportError, match=r'pip install -e "\.\[ifeval\]".*NLTK_DATA') as raised:
        get_task("ifeval").load(data_dir=FIXTURES)
    assert missing in str(raised.value)
    ifeval.checks.cache_clear()


def test_the_language_of_a_text_is_detected_without_chance(punkt):
    ifeval.checks()
    assert importlib.import_module("langdetect").DetectorFactory.seed == 0
