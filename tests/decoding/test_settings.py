"""Settings are checked when they are made, and never change."""

import dataclasses

import pytest

from transformers_kad import CascadeDeferral, ConfidenceBetDeferral, DualDeferral, Ensemble
from transformers_kad.decoding.settings import DecodingSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"component_temperature": 0.0}, "component_temperature.*got 0.0"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens.*got 0"),
        ({"drafter": "prompt-lookup"}, "Did you mean 'prompt_lookup'"),
        ({"verification": "blocks"}, "verification 'blocks'. Did you mean 'block'"),
        ({"verification": None}, "verification None.*Known: token, block"),
        ({"drafter": "prompt_lookup", "num_assistant_tokens": "auto"}, "pass a number"),
        ({"compile": True, "num_assistant_tokens": "auto"}, "one draft length"),
        ({"lazy": True, "trace": True}, "can't be combined"),
        ({"lazy": True, "rule": Ensemble(0.5)}, "does not depend on q"),
        ({"lazy": True, "rule": CascadeDeferral()}, "does not depend on q"),
        ({"lazy": True, "rule": ConfidenceBetDeferral()}, r"dual, primal, exact, nudging"),
    ],
)
def test_values_out_of_range_and_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DecodingSettings(**{"rule": DualDeferral(0.4), **settings})


def test_settings_are_frozen():
    settings = DecodingSettings(DualDeferral(0.4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.rule = DualDeferral(0.5)


def test_the_repr_shows_what_is_not_at_its_default():
    plain = "rule=DualDeferral(threshold=0.4), component_temperature=1.0, num_assistant_tokens=5"
    assert repr(DecodingSettings(DualDeferral(0.4), trace=True)) == plain
    settings = DecodingSettings(
        DualDeferral(0.4), drafter="prompt_lookup", compile=True, lazy=True, verification="block"
    )
    assert repr(settings) == f"{plain}, drafter='prompt_lookup', compile=True, lazy=True, verification='block'"
