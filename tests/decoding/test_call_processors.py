"""The other processors of a call: only those that are known to keep no state run ahead of the text."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    generation,
)

from transformers_kad import DualDeferral, KADLogitsProcessor
from transformers_kad.decoding import call_processors
from transformers_kad.decoding.call_processors import can_run_ahead, look_at_text, must_go_in_step

PROMPT = torch.tensor([[3, 14, 15, 9, 26]])


def of_transformers(**attributes):
    """A processor as a later release of transformers may add it, in the module of all the others."""
    return type("LaterProcessor", (LogitsProcessor,), {"__module__": LogitsProcessor.__module__, **attributes})


def test_a_processor_that_transformers_adds_tomorrow_is_called_once_for_each_emitted_token(base, proxy):
    """It may keep a state, so it must not see positions that a text never reaches."""
    lengths = []

    def note(self, input_ids, scores):
        lengths.append(input_ids.shape[1])
        return scores

    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=4)
    settings = {"do_sample": False, "max_new_tokens": 12, "assistant_model": proxy}
    base.generate(PROMPT, logits_processor=[of_transformers(__call__=note)(), kad], **settings)
    assert lengths == list(range(5, 17))
    assert kad.statistics.rounds < 12  # there were drafts


def test_which_processors_of_transformers_are_taken_for_pure_functions():
    """A new one must be read before it is put into one of the lists of call_processors.py."""
    module = generation.logits_process
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, LogitsProcessor)]
    others = {kind.__name__ for kind in kinds if kind.__module__ == module.__name__} - {
        kind.__name__ for kind in call_processors._PURE
    }
    assert others == {
        "LogitsProcessor",
        # They keep a state, or call a function of the user's.
        "PrefixConstrainedLogitsProcessor",
        "SynthIDTextWatermarkLogitsProcessor",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "WhisperNoSpeechDetection",
        "DiaEOSDelayPatternLogitsProcessor",
        # `generate` of a causal language model never makes them.
        "AlternatingCodebooksLogitsProcessor",
        "BarkEosPrioritizerLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "DiaClassifierFreeGuidanceLogitsProcessor",
        "DiaEOSChannelFilterLogitsProcessor",
        "WhisperTimeStampLogitsProcessor",
    }


@pytest.mark.parametrize(
    ("processor", "ahead", "step", "text"),
    [
        (TemperatureLogitsWarper(0.5), True, False, False),
        (NoRepeatNGramLogitsProcessor(2), True, False, True),
        (PrefixConstrainedLogitsProcessor(lambda row, ids: [1], 1), False, False, True),
        (object.__new__(SynthIDTextWatermarkLogitsProcessor), False, True, True),
        (of_transformers()(), False, True, True),
    ],
)
def test_what_is_known_of_processors(processor, ahead, step, text):
    assert can_run_ahead([processor]) is ahead
    assert must_go_in_step([processor], 2) is step
    assert not must_go_in_step([processor], 1)
    assert look_at_text([processor]) is text
