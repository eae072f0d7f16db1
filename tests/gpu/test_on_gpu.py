"""Every way of decoding on a GPU: `python -m pytest tests/gpu`. Skipped without CUDA.

Greedy texts are compared in float32 with those of the CPU. A p-value below THRESHOLD fails a test. Six are computed,
so that correct code fails with a probability of at most 1e-6 over the choice of the seeds, which are fixed.
"""

import warnings

import gpu_checks
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

THRESHOLD = 1e-6 / 6


@pytest.fixture(autouse=True)
def full_precision():
    with gpu_checks.full_precision():
        yield


@pytest.mark.parametrize("name", gpu_checks.WAYS)
def test_greedy_texts_are_those_of_the_cpu(name):
    gpu_checks.check_greedy(name, "cuda")


def test_greedy_texts_with_another_tokenizer_are_those_of_the_cpu():
    gpu_checks.check_other_tokenizer("cuda")


@pytest.mark.parametrize(("base", "proxy"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("name", ["token by token, 4 rows", "speculative", "speculative, 4 rows", "prompt lookup"])
def test_base_and_proxy_on_two_devices(name, base, proxy):
    gpu_checks.check_greedy(name, base, proxy)


@pytest.mark.parametrize("rule", gpu_checks.LAWS)
@pytest.mark.parametrize(
    "way", [{"speculative": False}, {"speculative": True}, {"speculative": False, "lazy": True}], ids=str
)
def test_texts_have_their_exact_law(rule, way):
    assert gpu_checks.law_p_value(rule, "cuda", **way) >= THRESHOLD


@pytest.mark.parametrize("name", gpu_checks.ONE_WAIT)
def test_a_round_waits_for_the_device_once(name):
    gpu_checks.check_waits(name, "cuda", torch.cuda.set_sync_debug_mode)


def count_waits(function):
    """How often PyTorch waits for the device while a function runs."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in seen)


def test_waits_are_counted():
    assert count_waits(lambda: torch.zeros(2, device="cuda").tolist()) == 1
    assert count_waits(lambda: torch.zeros(2, device="cuda") + 1) == 0


@pytest.mark.parametrize("name", gpu_checks.FURTHER_WAITS)
def test_a_round_waits_as_often_as_promised(name):
    gpu_checks.check_waits_per_round(name, "cuda", count_waits)


def test_a_step_waits_once_more_than_without_kad():
    gpu_checks.check_waits_per_token("cuda", count_waits)


@pytest.mark.slow
@pytest.mark.parametrize("models", [gpu_checks.llamas, gpu_checks.windows])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_compiled_rounds_give_the_same_texts(rows, models):
    gpu_checks.check_compiled("cuda", rows, models)


@pytest.mark.slow
def test_compiled_prompt_lookup_gives_the_same_texts():
    gpu_checks.check_compiled("cuda", 1, drafter="prompt_lookup")


def test_calls_of_several_threads():
    gpu_checks.check_threads("cuda")


@pytest.mark.slow
def test_compiled_calls_of_several_threads():
    gpu_checks.check_threads("cuda", compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("kad", [{}, {"num_assistant_tokens": "auto"}], ids=str)
def test_memory_stays_the_same_over_200_calls(kad):
    before, after = gpu_checks.memory_of_calls("cuda", 200, 20, **kad)
    assert after <= before


def test_a_base_that_is_spread_over_the_gpu_and_the_cpu():
    base = gpu_checks.spread_base(0)
    assert {str(place) for place in base.hf_device_map.values()} == {"0", "cpu"}
    gpu_checks.check_spread(base, "cuda")
