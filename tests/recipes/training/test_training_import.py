"""What needs TRL says so, and nothing else needs it."""

import importlib.util
import runpy
import sys

import pytest
from run_command import run_command

import transformers_kad.recipes.training


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else found(name))
    with pytest.raises(ImportError, match=r'needs trl: pip install -e "\.\[train\]"'):
        runpy.run_path(transformers_kad.recipes.training.__file__)


@pytest.mark.slow
def test_the_rest_of_the_package_does_without():
    hidden = "sys.modules['trl'] = sys.modules['datasets'] = None"
    loading = "transformers_kad.integrations.loading"
    modules = f"transformers_kad, {loading}.models, {loading}.prompts, transformers_kad.recipes.word_problems"
    code = f"import sys\n{hidden}\nimport {modules}\nprint(transformers_kad.DualDeferral())"
    run = run_command([sys.executable, "-c", code])
    assert run.stdout == "DualDeferral(threshold=0.4)\n", run.stderr
