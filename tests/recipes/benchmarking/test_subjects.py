"""The models that are timed, and their prompts."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import LlamaConfig, Qwen3Config

from transformers_kad import DualDeferral, KADConfig
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.benchmarking.subjects import (
    TASKS,
    Subject,
    load_subject,
    make_inputs,
    random_model,
    threshold_that_defers,
)

PAIR = Path(__file__).resolve().parents[3] / "recipes" / "tiny_pair"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def subject():
    models = ModelArguments(base=str(PAIR / "base"), proxy=str(PAIR / "proxy"), device="cpu")
    return load_subject(models, random_weights={}, inflated={"proxy": 600_000})


def test_a_pair_is_inflated_and_stripped_of_its_settings(subject):
    assert subject.proxy.num_parameters() == pytest.approx(600_000, rel=0.02)
    assert subject.base.num_parameters() < 500_000
    for model in subject.models.values():
        assert model.generation_config.eos_token_id is None
    assert subject.vocabulary == 640


def test_a_processor_verifies_as_its_configuration_says_or_as_it_is_told(subject):
    config = KADConfig(verification="block")
    assert subject.processor(config).verification == "block"
    assert subject.processor(config, verification="token").verification == "token"


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_fresh_for_every_seed_and_padded_on_the_left(subject, task):
    one, again, other = (make_inputs(subject, task, 3, seed, 0) for seed in (1, 1, 2))
    assert torch.equal(one["input_ids"], again["input_ids"])
    assert one["input_ids"].shape != other["input_ids"].shape or not torch.equal(one["input_ids"], other["input_ids"])
    assert bool(one["attention_mask"][:, -1].all())
    assert set(one) == {"input_ids", "attention_mask"}


def test_the_copying_task_holds_what_is_to_be_copied(subject):
    text = subject.tokenizer.decode(make_inputs(subject, "copying", 1, 0, 0)["input_ids"][0])
    first, answer, second = text.split("\n<|")[0], text.split("<|assistant|>\n")[1], text.split("<|end|>\n")[1]
    assert answer.startswith("We get ")
    assert second.startswith(first)


def test_random_models_are_asked_random_tokens(base, proxy):
    inputs = make_inputs(Subject(base, proxy), "copying", 2, 5, 9)
    assert inputs["input_ids"].shape == (2, 9)
    assert int(inputs["input_ids"].max()) < 50
    assert bool(inputs["attention_mask"].all())


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_configurations_become_models_without_weights(kind, tmp_path):
    config = kind(vocab_size=64, eos_token_id=3, **SIZES)
    config.save_pretrained(tmp_path)
    paths = {"base": str(tmp_path), "proxy": str(tmp_path / "config.json")}
    models = ModelArguments(device="cpu", dtype="bfloat16")
    subject = load_subject(models, random_weights=paths, inflated={}, seed=3)
    again = load_subject(models, random_weights=paths, inflated={}, seed=3)
    assert type(subject.base) is type(again.base)
    assert subject.base.dtype == subject.proxy.dtype == torch.bfloat16
    assert torch.equal(subject.base.lm_head.weight, again.base.lm_head.weight)
    assert not torch.equal(subject.base.lm_head.weight, subject.proxy.lm_head.weight)
    assert subject.tokenizer is None
    assert subject.base.config.eos_token_id is None
    assert not subject.base.training


def test_changes_leave_the_configuration_as_it_was():
    config = LlamaConfig(vocab_size=64, max_position_embeddings=128, **SIZES)
    model = random_model(config, device="cpu", vocab_size=100, max_position_embeddings=9000)
    assert model.lm_head.weight.shape == (100, 16)
    assert model.config.max_position_embeddings == 9000
    assert (config.vocab_size, config.max_position_embeddings) == (64, 128)
    assert model.dtype == torch.float32


@pytest.mark.parametrize("mass", [0.2, 0.8, 1.0])
def test_the_threshold_defers_the_share_that_was_asked_for(mass):
    model = tiny_model(vocabulary=2000, initializer_range=0.1)
    rule = DualDeferral(threshold_that_defers(model, mass))
    ids = torch.randint(2000, (4, 50), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        probs = model(ids).logits.softmax(-1)
    deferred = (probs * rule.defer(probs)).sum(-1).mean()
    assert float(deferred) == pytest.approx(mass, abs=0.05)
