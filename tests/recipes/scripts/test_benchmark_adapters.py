"""The benchmark of unmerged adapters: what it times, and what it prints."""

import json
from pathlib import Path

import benchmark_adapters
import pytest
import torch

SMALL = ["--sizes", "1M", "--repetitions", "2", "--steps", "2", "--context", "4"]


def test_it_prints_and_writes_what_it_measured(tmp_path, capsys):
    output = tmp_path / "made" / "figures.json"
    benchmark_adapters.main([*SMALL, "--output", str(output)])
    written = json.loads(output.read_text())
    assert benchmark_adapters.table(written["rows"]) in capsys.readouterr().out
    (row,) = written["rows"]
    assert row["merged"]["ratio"] == [1, 1, 1]
    assert all(row[name]["seconds"] > 0 for name in benchmark_adapters.VARIANTS)
    assert written["environment"]["torch"] == torch.__version__


def test_the_variants_are_what_they_are_called():
    arguments = benchmark_adapters.BenchmarkArguments(sizes=["1M"])
    models, _ = benchmark_adapters.build(arguments, "1M")
    ids = torch.arange(6)[None]
    merged, unmerged, off = (models[name].logits(ids) for name in benchmark_adapters.VARIANTS)
    torch.testing.assert_close(merged, unmerged, atol=1e-3, rtol=1e-3)
    assert (unmerged - off).abs().max() > 0.1


def test_every_step_forwards_one_token():
    arguments = benchmark_adapters.BenchmarkArguments(sizes=["1M"])
    cached = benchmark_adapters.build(arguments, "1M")[0]["unmerged"]
    seconds = benchmark_adapters.time_steps(cached, context=4, steps=3, synchronize=lambda: None)
    assert seconds > 0
    assert (cached.forwards, cached.cached_length) == (4, 7)


@pytest.mark.parametrize(
    ("settings", "message"), [({"sizes": ["2M"]}, "got '2M'"), ({"steps": 0}, "got 0"), ({"lora_rank": 0}, "got 0")]
)
def test_bad_arguments_are_echoed(settings, message):
    with pytest.raises(ValueError, match=message):
        benchmark_adapters.BenchmarkArguments(**settings)


def test_the_page_shows_the_figures_that_are_kept():
    root = Path(benchmark_adapters.__file__).parents[1]
    rows = json.loads((root / "recipes" / "results" / "adapters.json").read_text())["rows"]
    assert benchmark_adapters.table(rows) in (root / "docs" / "performance.md").read_text()
