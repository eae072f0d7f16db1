"""Repetitions: turns, fresh prompts, resuming, refusals."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from transformers_kad import KADConfig
from transformers_kad.models.by_version import CACHE
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.recipes.benchmarking import speed
from transformers_kad.recipes.benchmarking.bounds import Shape
from transformers_kad.recipes.benchmarking.forwards import IN_A_ROW
from transformers_kad.recipes.benchmarking.methods import Method, MethodRunner, expand
from transformers_kad.recipes.benchmarking.speed import Workload, measure_batch_size, run_method
from transformers_kad.recipes.benchmarking.subjects import Subject, random_model
from transformers_kad.recipes.resumable import JsonLinesStore

ARCHITECTURES = Path(__file__).resolve().parents[3] / "recipes" / "tiny_architectures"
CONFIG = KADConfig("dual", {"threshold": 0.5})
METHODS = expand(["token_by_token", "speculative"], [2])
WORKLOAD = Workload("arithmetic", max_new_tokens=12, prompt_tokens=5, seed=0)


@pytest.fixture
def measure(base, proxy, tmp_path):
    """Measures into one file; returns its records and what was said."""

    def run(repetitions, methods=METHODS, workload=WORKLOAD, rows=1):
        said = []
        with JsonLinesStore(tmp_path / "runs.jsonl", {}) as store:
            measure_batch_size(
                Subject(base, proxy),
                CONFIG,
                workload,
                methods,
                store,
                rows=rows,
                repetitions=repetitions,
                log=said.append,
            )
        return [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()], said

    return run


@pytest.mark.slow
def test_methods_take_turns_and_each_repetition_has_all(measure):
    records, _ = measure(4)
    assert [record["repetition"] for record in records] == [0, 1, 2, 3]
    firsts = [list(record["runs"]) for record in records]
    assert [first[0] for first in firsts] == ["base", "token_by_token", "speculative:2", "base"]
    assert all(sorted(first) == sorted(firsts[0]) for first in firsts)
    for record in records:
        for run in record["runs"].values():
            assert run["tokens"] == 12
            assert run["seconds"] > 0
            assert sum(run["inside"].values()) < run["seconds"]


def occurring(record, name="counts"):
    """The shapes of all forwards that the methods made."""
    return {Shape(*shape) for run in record["runs"].values() for *shape, _ in run[name]}


def test_a_repetition_measures_the_forwards_of_its_methods(measure):
    (record,), _ = measure(1, rows=3)
    times = {Shape(*shape): seconds for *shape, seconds in record["forwards"]}
    planned = {
        *(Shape("base", rows, tokens) for rows in (1, 2, 3) for tokens in (1, 3)),
        *(Shape("proxy", rows, 1) for rows in (1, 2, 3)),
        *(Shape("base", 3, 7), Shape("proxy", 3, 5)),
    }
    assert set(times) == planned | occurring(record)
    # The planned ones before each of the three methods.
    prompts = {Shape("base", 3, 5), Shape("base", 3, 7), Shape("proxy", 3, 5)}
    assert occurring(record, "prefills") == prompts
    for shape, seconds in times.items():
        assert len(seconds) % (1 if shape in prompts else IN_A_ROW) == 0
        if shape in planned:
            assert len(seconds) == (3 if shape in prompts else 3 * IN_A_ROW)


def test_widths_that_nobody_planned_are_measured_from_then_on(measure, monkeypatch):
    original = MethodRunner.generate
    calls = []

    def generate(self, method, inputs):
        """In the last run of the first repetition, the base reads 4 tokens after the text once more."""
        ids = original(self, method, inputs)
        calls.append(method)
        if len(calls) == 2 * len(METHODS):
            with torch.no_grad():
                cache = self.subject.base(ids).past_key_values
                self.subject.base(input_ids=ids[:, :4], **{CACHE: cache})
        return ids

    monkeypatch.setattr(MethodRunner, "generate", generate)
    records, _ = measure(2)
    times = [{Shape(*shape): len(seconds) for *shape, seconds in record["forwards"]} for record in records]
    assert times[0][Shape("base", 1, 4)] == IN_A_ROW
    assert times[1][Shape("base", 1, 4)] == 3 * IN_A_ROW
    assert times[1][Shape("base", 1, 17)] == 3  # the text was read once more, which is longer than the prompt


def test_rare_widths_and_those_beyond_the_text_are_not_measured(base, proxy):
    runner = MethodRunner(Subject(base, proxy), CONFIG, rows=1, max_new_tokens=12, longest_prompt=5)
    forwards = speed._Forwards(runner, METHODS)
    before = set(forwards.measure())
    counts = [["base", 1, 1, 95], ["base", 1, 2, 1], ["base", 1, 4, 3], ["base", 1, 7, 9], ["proxy", 1, 2, 1]]
    prefills = [["base", 1, 3, 1], ["base", 1, 6, 1]]
    forwards.add_shapes_of({"counts": counts + prefills, "prefills": prefills})
    forwards.add_shapes_of({"error": "RuntimeError: no"})
    forwards.add_shapes_of({"counts": [["base compiled", 1, 1, 9]], "prefills": None})
    added = forwards.measure_rest(dict.fromkeys(before))
    assert set(added) == {Shape("base", 1, 4), Shape("proxy", 1, 2), Shape("base", 1, 6)}


def test_prompts_are_the_same_for_all_methods_and_fresh_in_each_repetition(measure, base, monkeypatch):
    prompts = {}
    original = MethodRunner.generate

    def generate(self, method, inputs):
        prompts.setdefault(self.max_new_tokens, []).append(tuple(inputs["input_ids"].flatten().tolist()))
        return original(self, method, inputs)

    monkeypatch.setattr(MethodRunner, "generate", generate)
    measure(2)
    assert len(prompts[12]) == 2 * len(METHODS)
    assert len(set(prompts[12])) == 2
    assert len(set(prompts[12][:3])) == 1
    assert len(prompts[speed.WARM_UP_TOKENS]) == len(METHODS)


@pytest.mark.slow
def test_a_stopped_run_goes_on(measure, monkeypatch):
    original = MethodRunner.generate
    calls = []

    def stop(self, method, inputs):
        calls.append(method)
        if len(calls) == 8:  # after three warm-ups, in the second repetition
            raise KeyboardInterrupt
        return original(self, method, inputs)

    monkeypatch.setattr(MethodRunner, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(3)
    monkeypatch.setattr(MethodRunner, "generate", original)
    records, said = measure(3)
    assert [record["repetition"] for record in records] == [0, 1, 2]
    assert not any("repetition 1 of 3" in line for line in said)
    whole, said = measure(3)
    assert whole == records
    assert said == ["batch 1: all 3 repetitions are done"]
    more, _ = measure(4)
    assert more[:3] == records
    assert len(more) == 4


def test_other_methods_are_refused_and_another_batch_size_is_not(measure):
    measure(1)
    with pytest.raises(ValueError, match="base, speculative:2, token_by_token, not base, speculative:2"):
        measure(2, methods=expand(["speculative"], [2]))
    records, said = measure(1, methods=expand(["assisted", "speculative"], [2]), rows=2)
    assert [record["batch_size"] for record in records] == [1, 2]
    assert sorted(records[1]["runs"]) == ["base", "speculative:2"]
    assert any("without assisted decoding" in line and "not 2" in line for line in said)


def test_texts_beyond_the_context_are_refused(measure):
    long = Workload("arithmetic", max_new_tokens=508, prompt_tokens=5, seed=0)
    with pytest.raises(ValueError, match="513 tokens, and the context of the base ends at 512"):
        measure(1, workload=long)


def test_what_fails_as_a_prompt_can_is_recorded_and_what_is_a_mistake_ends_the_run(base, proxy, monkeypatch):
    runner = MethodRunner(Subject(base, proxy), CONFIG, rows=1, max_new_tokens=4, longest_prompt=2)
    inputs = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}

    def fail(message):
        def generate(self, method, inputs):
            raise RuntimeError(message)

        monkeypatch.setattr(MethodRunner, "generate", generate)
        return run_method(runner, Method("base"), inputs, 0, profile=False)

    run = fail("probability tensor contains either `inf`, `nan` or element < 0")
    assert run["error"].startswith("RuntimeError: probability tensor")
    assert "tokens" not in run
    with pytest.raises(RuntimeError, match="a mistake"):
        fail("a mistake")


@pytest.mark.parametrize(
    ("architecture", "rows"),
    [
        ("full", 1),
        ("full", 3),
        ("windowed", 1),
        ("windowed", 3),
        ("hybrid", 1),
        ("hybrid", 3),
    ],
)
def test_a_proxy_reads_its_prompt_once_in_a_call(architecture, rows):
    torch.manual_seed(0)  # of the weights
    models = (
        random_model(AutoConfig.from_pretrained(ARCHITECTURES / architecture / name), device="cpu")
        for name in ("base", "proxy")
    )
    config = KADConfig("dual", {"threshold": 0.0019})  # defers most tokens of these models, and not all
    runner = MethodRunner(Subject(*models), config, rows=rows, max_new_tokens=40, longest_prompt=64)
    inputs = Workload("arithmetic", max_new_tokens=40, prompt_tokens=64, seed=0).inputs(runner.subject, rows, 0)
    for method in expand(["token_by_token", "speculative", "auto"], [3])[1:]:
        assert runner.reason_to_skip(method) is None
        run = run_method(runner, method, inputs, 0, profile=False)
        assert [prefill for prefill in run["prefills"] if prefill[0] == "proxy"] == [["proxy", rows, 64, 1]]
        assert run["tokens"] == 40 * rows
        if "drafted" in run and method.kind != "token_by_token":
            assert 0 < run["accepted"] < run["drafted"]


def test_a_proxy_that_reads_its_prompt_again_ends_the_run(base, proxy, monkeypatch):
    runner = MethodRunner(Subject(base, proxy), CONFIG, rows=1, max_new_tokens=12, longest_prompt=5)
    method, inputs = Method("speculative", 3), WORKLOAD.inputs(runner.subject, 1, 0)
    assert runner.reason_to_skip(method) is None
    crop = CachedModel.crop

    def drop(self, length):
        """What the proxy's cache did before it could take back tokens."""
        taken = length < self.cached_length
        crop(self, length)
        if taken and self.role == "proxy":
            self._cache = None

    monkeypatch.setattr(CachedModel, "crop", drop)
    with pytest.raises(RuntimeError, match=r"In one call of speculative:3, the proxy read the text .* [2-9] times"):
        run_method(runner, method, inputs, 0, profile=False)


def test_equal_seeds_give_equal_draws(base, proxy):
    runner = MethodRunner(Subject(base, proxy), CONFIG, rows=1, max_new_tokens=12, longest_prompt=5)
    method, inputs = Method("speculative", 3), WORKLOAD.inputs(runner.subject, 1, 0)
    assert runner.reason_to_skip(method) is None
    first, second, other = (run_method(runner, method, inputs, seed, profile=False) for seed in (1, 1, 2))
    assert first["counts"] == second["counts"]
    assert first["deferral_mass"] == second["deferral_mass"] != other["deferral_mass"]
