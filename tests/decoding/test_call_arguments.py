"""The arguments of a call have the precedence that `generate` gives them."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import EosTokenCriteria, GenerationConfig, StoppingCriteriaList, StopStringCriteria

from transformers_kad.decoding.call_arguments import CallArguments, as_id_list
from transformers_kad.integrations.loading import load_tokenizer

IDS = torch.tensor([[0, 3, 4], [1, 2, 3]])


@pytest.fixture
def model():
    model = tiny_model()
    model.generation_config.eos_token_id = 7
    return model


def test_an_argument_comes_before_the_config_passed_and_that_before_the_models_own(model):
    assert CallArguments(model, {}).eos_token_ids == {7}
    config = GenerationConfig(eos_token_id=[8, 9])
    assert CallArguments(model, {"generation_config": config}).eos_token_ids == {8, 9}
    assert CallArguments(model, {"generation_config": config, "eos_token_id": 5}).eos_token_ids == {5}
    assert CallArguments(model, {"eos_token_id": None}).eos_token_ids == set()


def test_a_criterion_of_the_users_takes_the_place_of_the_ids(model):
    criteria = StoppingCriteriaList([EosTokenCriteria(4)])
    given = CallArguments(model, {"stopping_criteria": criteria})
    assert (given.ending_ids, given.eos_token_ids) == ({4}, {7})


def test_the_padding_id_is_the_first_end_where_there_is_none(model):
    assert CallArguments(model, {}).pad_token_id == 0
    model.generation_config.pad_token_id = None
    assert CallArguments(model, {}).pad_token_id == 7
    assert CallArguments(model, {"eos_token_id": None}).pad_token_id is None


def test_the_mask_is_what_is_passed_or_what_the_padding_says(model):
    assert CallArguments(model, {"inputs": IDS}).attention_mask().tolist() == [[0, 1, 1], [1, 1, 1]]
    assert CallArguments(model, {"input_ids": IDS, "attention_mask": torch.ones(2, 3)}).attention_mask() is None
    assert CallArguments(model, {"inputs": IDS, "pad_token_id": 7}).attention_mask() is None  # an end of sequence
    assert CallArguments(model, {"inputs": IDS[1:]}).attention_mask() is None


def test_stop_strings_become_a_criterion(model):
    with pytest.raises(ValueError, match=r"stop_strings=\['x'\].*tokenizer"):
        CallArguments(model, {"stop_strings": ["x"]}).with_stop_strings_as_criterion()
    tokenizer = load_tokenizer("recipes/tiny_pair/base")
    config = GenerationConfig(stop_strings=["is"])
    given = CallArguments(model, {"generation_config": config, "tokenizer": tokenizer})
    arguments = given.with_stop_strings_as_criterion()
    assert [type(criterion) for criterion in arguments["stopping_criteria"]] == [StopStringCriteria]
    assert arguments["generation_config"].stop_strings is None
    assert config.stop_strings == ["is"]  # the caller's own is left alone


@pytest.mark.parametrize(
    ("value", "ids"), [(None, []), (3, [3]), ([3, 4], [3, 4]), ((3,), [3]), (torch.tensor([3, 4]), [3, 4])]
)
def test_ids_in_every_form(value, ids):
    assert as_id_list(value) == ids
