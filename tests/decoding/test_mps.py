"""Decoding on a device without float64 (MPS): texts are those of the CPU, and draws have the exact law."""

import copy
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_mps import PretendedMPS, on_mps
from scipy.stats import chisquare
from tiny_models import tiny_model

from transformers_kad import CascadeDeferral, DualDeferral, ExactDeferral, KADLogitsProcessor, PrimalDeferral, verify
from transformers_kad.decoding import verification

THRESHOLD = 1e-7
PROMPTS = torch.tensor([[3, 4, 5, 6], [0, 0, 9, 1]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def generate(base, proxy, arguments, *, speculative, mps):
    """The texts, the statistics and the trace of a call, on the CPU or on MPS."""
    if mps:
        base, proxy = on_mps(copy.deepcopy(base)), on_mps(copy.deepcopy(proxy))
    call = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False} | arguments
    rule = call.pop("rule", PrimalDeferral(0.6))
    inputs = {"input_ids": call.pop("input_ids", PROMPTS), "attention_mask": call.pop("attention_mask", MASK)}
    kad = KADLogitsProcessor(proxy, rule, **call.pop("kad", {}))
    if speculative:
        call["assistant_model"] = proxy
    if mps:
        inputs = {name: value.to("mps") for name, value in inputs.items()}
    texts = base.generate(**inputs, logits_processor=[kad], **call)
    assert texts.device.type == ("mps" if mps else "cpu")
    return texts.cpu(), kad.statistics, kad.trace


def assert_same_texts(base, proxy, arguments, *, speculative):
    expected, statistics, trace = generate(base, proxy, arguments, speculative=speculative, mps=False)
    with PretendedMPS():
        texts, on_device, traced = generate(base, proxy, arguments, speculative=speculative, mps=True)
    assert torch.equal(texts, expected)
    for own, other in zip(on_device.sequences, statistics.sequences, strict=True):
        assert own.tokens == other.tokens
        # Which drafts "auto" chooses depends on times, so that other numbers of tokens may be accepted.
        if arguments.get("kad", {}).get("num_assistant_tokens") != "auto":
            assert own.accepted == other.accepted
        assert own.deferral_mass == pytest.approx(other.deferral_mass, rel=1e-5)
    assert ids_of(traced) == ids_of(trace)


def ids_of(trace):
    """The ids in a trace: of each token, and of the likeliest tokens of both models."""
    return trace and [
        [(one.token_id, *(token for token, _ in (*one.base_alternatives, *one.proxy_alternatives))) for one in row]
        for row in trace.sequences
    ]


CALLS = {
    "primal": {},
    "dual": {"rule": DualDeferral(0.3)},
    "exact": {"rule": ExactDeferral(0.6, tolerance=0.02)},
    "cascade": {"rule": CascadeDeferral("opt", 0.2)},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "trace": {"kad": {"trace": True}},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("speculative", [False, True])
def test_greedy_texts_are_those_of_the_cpu(base, proxy, name, speculative):
    assert_same_texts(base, proxy, CALLS[name], speculative=speculative)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("architecture", ["mistral", "gpt2"])
def test_greedy_texts_of_windows_and_learned_positions_are_those_of_the_cpu(architecture, speculative):
    base, proxy = tiny_model(architecture, hidden=32, seed=1), tiny_model(architecture, seed=2)
    assert_same_texts(base, proxy, {}, speculative=speculative)


@pytest.mark.parametrize("kad", [{"num_assistant_tokens": "auto"}, {"drafter": "prompt_lookup"}], ids=str)
def test_greedy_texts_of_other_drafts_are_those_of_the_cpu(base, proxy, kad):
    assert_same_texts(base, proxy, {"kad": kad}, speculative=True)


def test_beams_are_those_of_the_cpu(base, proxy):
    assert_same_texts(base, proxy, {"num_beams": 3}, speculative=False)


def test_a_text_ends_at_its_end_though_transformers_notices_it_one_step_later(base, proxy):
    one = {"input_ids": PROMPTS[:1], "attention_mask": MASK[:1]}
    texts, _, _ = generate(base, proxy, one, speculative=False, mps=False)
    ends = one | {"eos_token_id": int(texts[0, 10])}
    assert_same_texts(base, proxy, ends, speculative=False)
    with PretendedMPS():
        _, statistics, _ = generate(base, proxy, ends, speculative=False, mps=True)
    assert statistics.base_forwards == statistics.tokens + 1


def test_lazy_decoding_draws_on_the_device(base, proxy):
    drawn = {"kad": {"lazy": True}, "do_sample": True, "top_k": 0, "rule": DualDeferral(0.3)}
    with PretendedMPS():
        texts, statistics, _ = generate(base, proxy, drawn, speculative=False, mps=True)
    assert texts.shape == (2, 24)
    assert 0 < statistics.proxy_forwards < statistics.base_forwards


# --- Draws -----------------------------------------------------------------------------------------------------


@given(
    numbers=st.lists(st.floats(0, 0.5, width=32, allow_subnormal=False), min_size=1, max_size=4),
    random=st.tuples(st.integers(0, 2**30 - 1), st.integers(0, 2**30 - 1)),
)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_a_token_is_drawn_by_inversion_with_60_random_bits(numbers, random):
    units = [int(number * 2**60) for number in numbers]
    share = sum(units) * (random[0] * 2**30 + random[1]) // 2**60
    inverse = next((id for id in range(len(units)) if sum(units[: id + 1]) > share), len(units) - 1)
    halves = torch.tensor(random).view(2, 1, 1)
    with PretendedMPS(), patch.object(torch, "randint", lambda *args, **kwargs: halves.to("mps")):
        assert verification.draw(torch.tensor([numbers]).to("mps")).tolist() == [inverse]


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1.7])
def test_tokens_are_drawn_with_their_probabilities_whatever_they_sum_to(scale):
    probs = torch.tensor([0.0, 0.4, 1e-3, 0.25, 0.0, 0.349])
    with PretendedMPS():
        torch.manual_seed(0)
        drawn = verification.draw((scale * probs).expand(200_000, -1).to("mps")).cpu()
    counts = torch.bincount(drawn, minlength=6)
    assert counts[[0, 4]].tolist() == [0, 0]
    possible = [1, 2, 3, 5]
    assert chisquare(counts[possible], 200_000 * probs[possible].double() / probs.double().sum()).pvalue > THRESHOLD


def test_tokens_of_a_large_vocabulary_are_drawn_with_their_probabilities():
    probs = torch.full((150_000,), 0.5 / 149_998)
    probs[[7, 149_999]] = torch.tensor([0.3, 0.2])
    with PretendedMPS():
        torch.manual_seed(0)
        drawn = torch.cat([verification.draw(probs.expand(100, -1).to("mps")).cpu() for _ in range(40)])
    lower, upper = (drawn < 75_000).sum(), (drawn >= 75_000).sum()
    first, last = (drawn == 7).sum(), (drawn == 149_999).sum()
    counts = torch.stack([first, last, lower - first, upper - last])
    assert chisquare(counts, [1200, 800, 1000, 1000]).pvalue > THRESHOLD


def test_what_is_no_distribution_gives_some_id():
    rows = torch.stack([torch.full((5,), value) for value in (0.0, float("nan"), float("inf"))])
    with PretendedMPS():
        drawn = verification.draw(rows.to("mps")).cpu()
    assert drawn.shape == (3,)
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < 5


def test_verified_tokens_have_the_law_of_the_target():
    rows = 100_000
    r, q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.2, 0.5, 0.05, 0.25])
    with PretendedMPS():
        torch.manual_seed(0)
        drafted = verification.draw(q.expand(rows, -1).to("mps"))
        accepted, following = verify(
            r.expand(rows, 2, -1).to("mps"), q.expand(rows, 1, -1).to("mps"), drafted[:, None]
        )
        first = torch.where(accepted > 0, drafted, following).cpu()
        bonus = following[accepted > 0].cpu()
    for drawn in (first, bonus):
        counts = torch.bincount(drawn, minlength=4)
        assert chisquare(counts, len(drawn) * r.double() / r.double().sum()).pvalue > THRESHOLD
