"""Pairs: what is loaded, which ids end a text, and how models are distributed."""

from pathlib import Path

import pytest

from transformers_kad import KADConfig
from transformers_kad.recipes import pair as module
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.pair import Pair

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny_pair"


def arguments(**settings):
    return ModelArguments(base=str(TINY / "base"), proxy=str(TINY / "proxy"), device="cpu", **settings)


@pytest.fixture(scope="module")
def tiny():
    return Pair(arguments())


def test_a_text_ends_where_either_model_ends_its_turn(tiny):
    end = tiny.proxy_tokenizer.eos_token_id
    assert tiny.proxy_eos_token_ids == [end]
    assert tiny.eos_token_ids == sorted({end, tiny.tokenizer.eos_token_id})
    assert tiny.alignment is None


def test_the_base_has_no_generation_settings_of_its_own(tiny):
    assert tiny.base.generation_config.eos_token_id is None


def test_the_reference_is_the_model_below_a_merged_adapter(tiny):
    assert not hasattr(tiny.proxy, "peft_config")
    assert tiny.reference is not None
    assert Pair(arguments(), merge_proxy=False).reference is None  # its adapter can be switched off


def test_a_processor_has_a_reference_only_for_rules_that_need_one(tiny):
    assert tiny.processor(KADConfig("dual")).reference is None
    assert tiny.processor(KADConfig("implicit_reward")).reference is tiny.reference


def test_a_large_model_is_distributed_as_asked_for(tiny, monkeypatch):
    seen = {}
    monkeypatch.setattr(module, "load_model", lambda path, **settings: seen.update(settings, path=path))
    monkeypatch.setattr(module, "free_memory", lambda gpu: 1000 + gpu)
    models = arguments(device_map="auto")
    models.gpus = [2, 3]
    monkeypatch.setattr(tiny, "models", models)
    tiny.load_large("large")
    assert seen["max_memory"] == {2: 1002, 3: 1003}
    assert (seen["path"], seen["device_map"], seen["merge"]) == ("large", "auto", False)
    models.limits = {"0": "2GiB", "cpu": "4GiB"}
    tiny.load_large("large")
    assert seen["max_memory"] == {0: "2GiB", "cpu": "4GiB"}
