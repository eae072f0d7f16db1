"""The checks of `tests/gpu` on the CPU: that they run, and that they find what they look for."""

import contextlib

import gpu_checks
import pytest

from transformers_kad import DualDeferral
from transformers_kad.decoding import token_by_token
from transformers_kad.decoding.speculative_round import SpeculativeRound
from transformers_kad.integrations.loading.models import load_model


@pytest.mark.parametrize("name", gpu_checks.WAYS)
def test_every_way_of_decoding_runs(name):
    texts = gpu_checks.greedy_texts(gpu_checks.WAYS[name], "cpu")
    assert texts.shape[0] == gpu_checks.WAYS[name].rows
    assert 12 < texts.shape[1] <= 12 + gpu_checks.NEW_TOKENS


def test_other_texts_are_found(monkeypatch):
    texts = gpu_checks.greedy_texts
    monkeypatch.setattr(gpu_checks, "greedy_texts", lambda way, device, proxy=None: texts(way, "cpu") + (proxy == "x"))
    gpu_checks.check_greedy("speculative", "cpu", "cpu")
    with pytest.raises(AssertionError):
        gpu_checks.check_greedy("speculative", "cpu", "x")


def test_another_tokenizer():
    gpu_checks.check_other_tokenizer("cpu")


@pytest.mark.parametrize("way", [{"speculative": True}, {"speculative": False, "lazy": True}], ids=str)
def test_a_law_and_another_one(way, monkeypatch):
    assert gpu_checks.law_p_value("dual", "cpu", samples=2000, **way) > 1e-6
    monkeypatch.setitem(gpu_checks.LAWS, "dual", (DualDeferral(0.2), gpu_checks.LAWS["dual"][1]))
    assert gpu_checks.law_p_value("dual", "cpu", samples=2000, **way) < 1e-6


@pytest.mark.parametrize("name", gpu_checks.ONE_WAIT)
def test_waits_are_allowed_in_the_reads_of_rounds_alone(name):
    modes, verify = [], SpeculativeRound._verify_positions
    gpu_checks.check_waits(name, "cpu", modes.append)
    assert SpeculativeRound._verify_positions is verify
    reads = modes.count("error")
    # A read, what is between reads, ..., the end of the call, and the end of the context.
    assert modes == ["default", "error"] * reads + ["default"] * 3


def test_a_wait_elsewhere_is_found(monkeypatch):
    mode = ["default"]
    verify = SpeculativeRound._verify_positions

    def waiting(self, begin, end):
        if mode[0] == "error":
            raise RuntimeError("called a synchronizing operation")
        return verify(self, begin, end)

    monkeypatch.setattr(SpeculativeRound, "_verify_positions", waiting)
    with pytest.raises(RuntimeError, match="synchronizing"):
        gpu_checks.check_waits("speculative", "cpu", lambda new: mode.__setitem__(0, new))
    assert mode == ["default"]


def waits_at_reads(monkeypatch, further=0):
    """Counts a wait for every read of a round, and further ones."""

    def count_waits(function):
        waits = []
        owner, name = gpu_checks.READ
        read = getattr(owner, name)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, lambda *args: waits.append(1 + further) or read(*args))
            function()
        return sum(waits)

    return count_waits


@pytest.mark.parametrize("name", gpu_checks.FURTHER_WAITS)
def test_further_waits_of_rounds_are_found(name, monkeypatch):
    allowed = gpu_checks.FURTHER_WAITS[name]
    gpu_checks.check_waits_per_round(name, "cpu", waits_at_reads(monkeypatch, further=allowed - 1))
    with pytest.raises(AssertionError):
        gpu_checks.check_waits_per_round(name, "cpu", waits_at_reads(monkeypatch, further=allowed))


@pytest.mark.parametrize(("a_step", "is_allowed"), [(1, True), (2, False)])
def test_further_waits_of_steps_are_found(a_step, is_allowed, monkeypatch):
    steps, compose = [], token_by_token.compose
    monkeypatch.setattr(token_by_token, "compose", lambda *a, **k: steps.append(a_step) or compose(*a, **k))

    def count_waits(function):
        steps.clear()
        function()
        return sum(steps)

    with contextlib.nullcontext() if is_allowed else pytest.raises(AssertionError):
        gpu_checks.check_waits_per_token("cpu", count_waits)


@pytest.mark.usefixtures("uncompiled")
def test_compiled_rounds():
    gpu_checks.check_compiled("cpu", 1)
    gpu_checks.check_compiled("cpu", 1, drafter="prompt_lookup")


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("rows", "models"), [(4, gpu_checks.llamas), (1, gpu_checks.windows)])
def test_compiled_batches_and_windows(rows, models):
    gpu_checks.check_compiled("cpu", rows, models)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kad", [{}, {"compile": True}], ids=str)
def test_threads(kad):
    gpu_checks.check_threads("cpu", **kad)


def test_memory_of_calls_and_of_what_is_kept(monkeypatch):
    before, after = gpu_checks.memory_of_calls("cpu", 6, 4)
    assert after <= before
    prompts, kept = gpu_checks.prompts, []
    monkeypatch.setattr(gpu_checks, "prompts", lambda rows: kept.append(prompts(rows)) or kept[-1])
    before, after = gpu_checks.memory_of_calls("cpu", 6, 4)
    assert after > before


def test_a_base_with_a_device_map():
    gpu_checks.check_spread(load_model(gpu_checks.PAIR / "base", device_map={"": "cpu"}), "cpu")
