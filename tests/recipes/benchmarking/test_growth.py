"""How cost grows: sizes, records, exponents."""

import json

import pytest
from transformers import LlamaConfig

from transformers_kad import KADConfig
from transformers_kad.recipes.benchmarking import growth
from transformers_kad.recipes.benchmarking.growth import (
    AXES,
    PROMPT_TOKENS,
    GrowthSettings,
    growth_to_markdown,
    make_growth_report,
    measure_growth,
    plot_axes,
)
from transformers_kad.recipes.benchmarking.methods import expand
from transformers_kad.recipes.resumable import JsonLinesStore

METHODS = expand(["speculative"], [3])
SIZES = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}


def settings(**changes):
    configs = {
        name: LlamaConfig(vocab_size=60, hidden_size=width, **SIZES) for name, width in (("base", 32), ("proxy", 16))
    }
    defaults = {
        "configs": configs,
        "inflated": {},
        "device": "cpu",
        "dtype": "auto",
        "rule": None,
        "deferral_mass": 0.8,
        "rows": 1,
        "max_new_tokens": 10,
        "seed": 0,
    }
    return GrowthSettings(**(defaults | changes))


@pytest.fixture
def measure(tmp_path):
    def run(axis, sizes, changed=None, repetitions=1, methods=METHODS):
        said = []
        with JsonLinesStore(tmp_path / "growth.jsonl", {}) as store:
            measure_growth(
                changed or settings(), axis, sizes, methods, store, repetitions=repetitions, log=said.append
            )
        return [json.loads(line) for line in (tmp_path / "growth.jsonl").read_text().splitlines()], said

    return run


def test_a_text_grows_beyond_the_context_of_the_configuration(measure):
    records, _ = measure("length", [40, 80])
    assert [record["size"] for record in records] == [40, 80]
    for record in records:
        for run in record["runs"].values():
            assert run["prompt_tokens"] == PROMPT_TOKENS
            assert run["tokens"] == record["size"] - PROMPT_TOKENS
            assert run["cache_over_ideal"] in (None, 1)
    # 2 layers of 32 numbers, keys and values, float32: what a token takes in the base's cache.
    assert records[1]["runs"]["base"]["cache_bytes"] in [512 * tokens for tokens in range(64, 80)]


def test_a_vocabulary_grows_in_both_models(measure):
    (small, large), _ = measure("vocabulary", [50, 2000], repetitions=1)
    for record in (small, large):
        assert {run["tokens"] for run in record["runs"].values()} == {10}
        assert record["runs"]["speculative:3"]["deferral_mass"] == pytest.approx(0.8, abs=0.1)


def test_a_batch_grows(measure):
    records, _ = measure("batch", [1, 3], changed=settings(rule=KADConfig("primal", {"budget": 0.5})))
    assert [record["runs"]["speculative:3"]["tokens"] for record in records] == [10, 30]
    assert records[1]["runs"]["speculative:3"]["deferral_mass"] == pytest.approx(0.5, abs=0.1)


def test_models_are_as_large_as_was_asked_for(measure, monkeypatch):
    seen = []
    original = growth.run_method

    def run_method(runner, method, inputs, seed, *, profile):
        seen.append((runner.rows, runner.subject.base.num_parameters(), runner.subject.base.config.vocab_size))
        return original(runner, method, inputs, seed, profile=profile)

    monkeypatch.setattr(growth, "run_method", run_method)
    measure("vocabulary", [50, 70], changed=settings(inflated={"base": 10**6}, rows=2), methods=METHODS[:1])
    assert seen == [(2, pytest.approx(10**6, rel=0.02), vocabulary) for vocabulary in (50, 70)]


@pytest.mark.slow
def test_what_is_there_is_not_measured_again(measure):
    records, said = measure("batch", [1, 2])
    assert len(said) == 2
    again, said = measure("batch", [1, 2])
    assert again == records
    assert said == []
    more, said = measure("batch", [1, 2, 3], repetitions=2)
    assert more[:2] == records
    assert [(record["size"], record["repetition"]) for record in more[2:]] == [(1, 1), (2, 1), (3, 0), (3, 1)]
    with pytest.raises(ValueError, match="batch 1 with the methods base, speculative:3, not base"):
        measure("batch", [1], methods=METHODS[:1])


def test_what_cannot_be_measured_is_refused(measure):
    with pytest.raises(ValueError, match="without KAD, γ = 3 can't be measured at batch 2: takes one text at a time"):
        measure("batch", [2], methods=expand(["assisted"], [3]))


def record(axis, size, seconds, outside=0.25, **extra):
    inside = {"base": seconds * (1 - outside), "proxy": 0.0}
    run = {"seconds": seconds, "tokens": size, "inside": inside, "memory": 2**20 * size, "cache_bytes": 3 * size}
    return {
        "axis": axis,
        "size": size,
        "repetition": 0,
        "load": 1.0,
        "runs": {"base": run | {"cache_over_ideal": 1.1} | extra},
    }


def test_exponents_and_tables(tmp_path):
    records = [record("length", size, 0.001 * size**2) for size in (10, 20, 40, 80)]
    records += [record("batch", 1, 1.0), record("batch", 1, 3.0), record("batch", 2, 2.0, outside=0.5)]
    report = make_growth_report(records)
    length, batch = report["exponents"]
    assert (length["axis"], batch["axis"]) == ("length", "batch")
    assert length["time"] == pytest.approx(2)
    assert length["time outside"] == pytest.approx(2)
    assert length["peak memory"] == pytest.approx(1)
    assert length["caches"] == pytest.approx(1)
    assert batch["time"] == pytest.approx(0)  # medians: 2 and 2 seconds
    assert batch["time outside"] == pytest.approx(1)
    row = report["rows"][0]
    assert (row["size"], row["outside"], row["cache_over_ideal"]) == (10, pytest.approx(0.25), 1.1)
    report |= {"settings": {"base": "b"}, "environment": {"torch": "2"}, "load": 1.0}
    text = growth_to_markdown(report)
    assert "| 80 | base alone | 6.40 | 80.00 | 25.0% | 80.0 MiB | 0.0 MiB | 1.10 | – |" in text
    assert "| base alone | 2.00 | 2.00 | 1.00 | 1.00 |" in text
    assert all(AXES[axis] in text for axis in ("length", "batch"))
    paths = plot_axes(report, tmp_path)
    assert sorted(path.name for path in paths) == [
        *("growth_batch.png", "growth_batch.svg", "growth_length.png", "growth_length.svg")
    ]
    assert "exponent 2.00" in (tmp_path / "growth_length.svg").read_text()


def test_one_size_makes_no_plot_and_no_exponent(tmp_path):
    report = make_growth_report([record("length", 10, 1.0) | {"load": 1.0}])
    assert report["exponents"][0]["time"] is None
    assert plot_axes(report, tmp_path) == []


def test_failures_leave_no_row():
    failed = record("length", 20, 1.0, error="RuntimeError: no")
    assert [row["size"] for row in make_growth_report([record("length", 10, 1.0), failed])["rows"]] == [10]
