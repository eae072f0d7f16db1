"""drafter="prompt_lookup": drafts from the text itself, verified by both models."""

import exact_law
import pytest
import torch
from test_batches import padded
from test_distribution import COMMON, PLAIN, PROMPT, SPECULATIVE, Setting, models, new_tokens
from test_speculative import CountForwards
from tiny_models import tiny_model
from transformers import LogitsProcessor

from transformers_kad import DualDeferral, ImplicitReward, KADLogitsProcessor
from transformers_kad.rules.registry import make_rule

GREEDY = {"do_sample": False, "max_new_tokens": 40}


def lookup(proxy, rule="dual", **settings):
    settings |= {"threshold": 0.6} if rule == "dual" else {}
    return KADLogitsProcessor(proxy, rule, drafter="prompt_lookup", **settings)


def repeating(rows=1):
    """Prompts that repeat themselves."""
    return torch.tensor([[3, 14, 15, 9, 26, 5] * 3]).repeat(rows, 1) + torch.arange(rows)[:, None]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rule", [DualDeferral(0.6), ImplicitReward(1.0)])
def test_greedy_text_is_that_of_token_by_token_decoding(base, proxy, rows, rule):
    reference = tiny_model(seed=9) if rule.needs_reference else None
    kad = lookup(proxy, rule, reference=reference)
    settings = {"logits_processor": [kad], **GREEDY}
    drafted = base.generate(repeating(rows), assistant_model=proxy, **settings)
    statistics = kad.statistics
    kad.reset()
    assert torch.equal(drafted, base.generate(repeating(rows), **settings))
    assert statistics.drafted > 0


def test_left_padding(base, proxy):
    kad = lookup(proxy)
    settings = {"logits_processor": [kad], **GREEDY}
    drafted = base.generate(**padded(4), assistant_model=proxy, **settings)
    kad.reset()
    assert torch.equal(drafted, base.generate(**padded(4), **settings))


def test_a_round_costs_one_forward_of_each_model(base, proxy):
    kad = lookup(proxy)
    with CountForwards(base) as of_base, CountForwards(proxy) as of_proxy:
        base.generate(repeating(), logits_processor=[kad], assistant_model=proxy, **GREEDY)
    assert len(of_base.lengths) == len(of_proxy.lengths) == kad.statistics.rounds
    assert of_base.lengths == of_proxy.lengths
    assert kad.statistics.proxy_forwards == kad.statistics.rounds


class Circle(LogitsProcessor):
    """Makes the base go round in a circle of six tokens."""

    def __call__(self, input_ids, scores):
        return scores + 50.0 * torch.nn.functional.one_hot(input_ids[:, -6], 50)


def test_a_text_that_copies_is_drafted_from_itself(base, proxy):
    kad = lookup(proxy, DualDeferral(0.5), num_assistant_tokens=5)
    settings = {"logits_processor": [Circle(), kad], "do_sample": True, "max_new_tokens": 60}
    ids = base.generate(repeating(), assistant_model=proxy, **settings)
    assert ids[0].tolist() == [3, 14, 15, 9, 26, 5] * 13
    assert kad.statistics.acceptance_rate == 1
    assert kad.statistics.rounds == 10


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "rule"), [(1, "dual"), (1000, "dual"), (1000, "primal")])
def test_the_distribution(rows, rule):
    """Chi-square over the first two tokens and over the last three of five; family-wise false alarm 1e-6."""
    setting, chosen = Setting(), models()
    kad = KADLogitsProcessor(
        chosen.proxy, make_rule(rule, **SPECULATIVE[rule]), drafter="prompt_lookup", num_assistant_tokens=3
    )
    torch.manual_seed(5)
    texts, drafted, accepted = [], 0, 0
    for _ in range(800 if rows == 1 else 20):
        sequences = chosen.base.generate(
            torch.tensor([PROMPT]),
            assistant_model=kad.proxy,
            max_new_tokens=5,
            num_return_sequences=rows,
            **(setting.arguments(kad) | COMMON),
        )
        texts += new_tokens(sequences, len(PROMPT), None)
        drafted, accepted = drafted + kad.statistics.drafted, accepted + kad.statistics.accepted
    assert 0.05 * drafted < accepted < 0.95 * drafted
    law = setting.law(PLAIN[rule], chosen, 5)
    for at in (range(2), range(2, 5)):
        part = [tuple(text[i] for i in at) for text in texts]
        assert exact_law.chi_square_p_value(part, exact_law.marginal_law(law, at)) > 1e-6 / 6


def test_drafts_end_with_an_end_of_sequence(base, proxy):
    kad = lookup(proxy)
    settings = {"logits_processor": [kad], "do_sample": False, "max_new_tokens": 30, "eos_token_id": 5}
    drafted = base.generate(repeating(), assistant_model=proxy, **settings)
    kad.reset()
    assert torch.equal(drafted, base.generate(repeating(), **settings))


def test_unknown_drafters_and_auto_are_refused(proxy):
    with pytest.raises(ValueError, match=r"Unknown drafter 'prompt-lookup'. Did you mean 'prompt_lookup'"):
        KADLogitsProcessor(proxy, drafter="prompt-lookup")
    with pytest.raises(ValueError, match=r"prompt_lookup.* has none: pass a number"):
        lookup(proxy, num_assistant_tokens="auto")
    assert "drafter='prompt_lookup'" in repr(lookup(proxy))
