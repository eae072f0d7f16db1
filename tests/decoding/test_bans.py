"""A token that something before KAD bans is never emitted, however it was banned and however the text is decoded."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import LogitsProcessor

from transformers_kad import DualDeferral, Ensemble, ImplicitReward, KADLogitsProcessor
from transformers_kad.rules.composition import BANNED_BELOW, compose, with_bans

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])
BANNED = [7, 11, 23]

# Everything is deferred, and the proxy says nothing but banned tokens, if it may.
KINDS = {
    "minus infinity": lambda scores: scores.index_fill(-1, torch.tensor(BANNED), -torch.inf),
    "float32's smallest": lambda scores: scores.index_fill(-1, torch.tensor(BANNED), torch.finfo(torch.float32).min),
    "bfloat16's smallest": lambda scores: scores.index_fill(-1, torch.tensor(BANNED), torch.finfo(torch.bfloat16).min),
    "float16's smallest": lambda scores: scores.index_fill(-1, torch.tensor(BANNED), torch.finfo(torch.float16).min),
    "-1e9": lambda scores: scores.index_fill(-1, torch.tensor(BANNED), -1e9),
    "-1e4": lambda scores: scores.index_fill(-1, torch.tensor(BANNED), -1e4),
    "-1e3": lambda scores: scores.index_fill(-1, torch.tensor(BANNED), -1e3),
    "1e4 taken away": lambda scores: scores.index_add(-1, torch.tensor(BANNED), torch.full((len(scores), 3), -1e4)),
    "1e4 more for the rest": lambda scores: scores + 1e4 * ~torch.isin(torch.arange(50), torch.tensor(BANNED)),
}
PATHS = ["token by token", "speculative", "prompt lookup", "lazy", "batch", "speculative batch"]


class Ban(LogitsProcessor):
    def __init__(self, kind):
        self.kind = kind

    def __call__(self, input_ids, scores):
        return KINDS[self.kind](scores)


@pytest.fixture(scope="module")
def eager():
    """A proxy that all but always says a banned token."""
    model = tiny_model(hidden=16, seed=2)
    favoured = torch.isin(torch.arange(50), torch.tensor(BANNED))
    model.lm_head.register_forward_hook(lambda module, args, out: out + 40.0 * favoured)
    return model


def generate(base, proxy, path, before=(), **settings):
    lookup = {"drafter": "prompt_lookup"} if path == "prompt lookup" else {}
    temperature = settings.pop("component_temperature", 1.0)
    kad = KADLogitsProcessor(
        proxy, DualDeferral(1.0), lazy=path == "lazy", component_temperature=temperature, **lookup
    )
    if path in ("speculative", "prompt lookup", "speculative batch"):
        settings["assistant_model"] = proxy
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, **settings}
    prompt = PROMPT.repeat(3, 1) if "batch" in path else PROMPT
    torch.manual_seed(0)
    return base.generate(prompt, logits_processor=[*before, kad], **settings)[:, PROMPT.shape[1] :]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_banned_token_is_emitted(base, eager, kind, path):
    assert torch.isin(generate(base, eager, path), torch.tensor(BANNED)).float().mean() > 0.8
    assert not torch.isin(generate(base, eager, path, [Ban(kind)]), torch.tensor(BANNED)).any()
    tempered = generate(base, eager, path, [Ban(kind)], component_temperature=30.0)
    assert not torch.isin(tempered, torch.tensor(BANNED)).any()


class BanLast(LogitsProcessor):
    """Bans the token that is forced at the end, behind the processors of the configuration."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(-1, torch.tensor(BANNED), -torch.inf)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
def test_a_forced_token_that_is_banned_leaves_the_others_alike(base, eager, path, temperature):
    """All other tokens are at the smallest float then, where a temperature must not take them out of the numbers."""
    forced = {"forced_eos_token_id": BANNED[0], "remove_invalid_values": True, "eos_token_id": BANNED[0]}
    text = generate(base, eager, path, [BanLast()], component_temperature=temperature, **forced)
    assert text.shape[1] == 12
    assert not torch.isin(text, torch.tensor(BANNED)).any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "ban",
    [
        {"bad_words_ids": [[token] for token in BANNED]},
        {"min_new_tokens": 9, "eos_token_id": BANNED},
        {"prefix_allowed_tokens_fn": lambda row, text: [at for at in range(50) if at not in BANNED]},
    ],
    ids=lambda ban: next(iter(ban)),
)
def test_removing_invalid_values_lifts_no_ban(base, eager, path, ban):
    """Behind generate's own bans `remove_invalid_values` puts the smallest float32 in the place of -inf."""
    ids = generate(base, eager, path, remove_invalid_values=True, **ban)
    assert not torch.isin(ids[:, : ban.get("min_new_tokens", 12)], torch.tensor(BANNED)).any()
    assert ids.shape[1] >= 9


@pytest.mark.parametrize("path", PATHS)
def test_an_unlikely_token_is_no_ban(base, eager, path):
    """The proxy may say what the base gives a probability that underflows."""

    class Unlikely(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(-1, torch.tensor(BANNED), -200.0)

    ids = generate(base, eager, path, [Unlikely()])
    assert torch.isin(ids, torch.tensor(BANNED)).float().mean() > 0.8


def test_where_the_line_is():
    scores = torch.tensor([[3.0, 3.0 - BANNED_BELOW - 1, 3.0 - BANNED_BELOW + 1, -120.0, -1e3, -torch.inf]])
    before = scores.clone()
    assert torch.isneginf(with_bans(scores)).tolist() == [[False, True, False, False, True, True]]
    assert torch.equal(scores, before)
    assert torch.equal(with_bans(scores).softmax(-1), scores.softmax(-1))
    assert with_bans(scores.double()).double().softmax(-1)[0, 2] > 0  # what float64 holds is kept


def test_rows_have_lines_of_their_own_and_one_banned_as_a_whole_stays_as_it_is():
    lowest = torch.finfo(torch.float32).min
    scores = torch.tensor([[0.0, -800.0], [-900.0, -800.0], [lowest, lowest], [torch.nan, 0.0], [-torch.inf] * 2])
    expected = torch.tensor(
        [[0.0, -torch.inf], [-900.0, -800.0], [lowest, lowest], [torch.nan, 0.0], [-torch.inf] * 2]
    )
    torch.testing.assert_close(with_bans(scores), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", [DualDeferral(1.0), Ensemble(0.0), ImplicitReward(1.0)])
def test_a_finite_ban_is_what_minus_infinity_is(rule):
    generator = torch.Generator().manual_seed(3)
    base, proxy, reference = (torch.randn(4, 9, generator=generator) for _ in range(3))
    finite, infinite = base.clone(), base.clone()
    finite[:, 2], infinite[:, 2] = -1e4, -torch.inf
    composed = [compose(rule, with_bans(scores), proxy, reference).target_probs for scores in (finite, infinite)]
    assert torch.equal(*composed)
    assert composed[0][:, 2].tolist() == [0.0] * 4
