"""The benchmark of the rules: what it times, and what it prints."""

import json
from pathlib import Path

import benchmark_rules
import pytest
import torch

from transformers_kad import RULES, DualDeferral, ExactDeferral, PrimalDeferral, verify
from transformers_kad.rules.composition import compose

SMALL = ["--vocabulary", "50", "--rows", "1", "6", "12", "--repetitions", "2"]


def test_it_prints_and_writes_what_it_measured(tmp_path, capsys):
    output = tmp_path / "made" / "figures.json"
    benchmark_rules.main([*SMALL, "--output", str(output)])
    written, printed = json.loads(output.read_text()), capsys.readouterr().out
    for part in ("rule", "step"):
        assert benchmark_rules.ratio_table(written["ratios"], part) in printed
    assert benchmark_rules.exact_table(written["exact"]) in printed
    names = [benchmark_rules.label(rule) for rule in benchmark_rules.rules(50)]
    measured = {(row["rule"], row["part"], row["distribution"], row["rows"]) for row in written["ratios"]}
    assert measured == {
        (name, part, distribution, rows)
        for name in names
        for part in ("rule", "step")
        for distribution in benchmark_rules.DISTRIBUTIONS
        for rows in (1, 6, 12)
    }
    assert all(row["softmax_seconds"] > 0 and min(row["ratio"]) > 0 for row in written["ratios"])
    assert len(written["exact"]) == len(benchmark_rules.DISTRIBUTIONS) * len(benchmark_rules.EXACT_BUDGETS)
    assert written["environment"]["torch"] == torch.__version__


def test_every_rule_is_timed():
    timed = {type(rule) for rule in benchmark_rules.rules(150_000)}
    assert timed | {ExactDeferral} == set(RULES.values())


def test_the_distributions_are_what_they_are_called():
    nucleus = {}
    for distribution in benchmark_rules.DISTRIBUTIONS:
        p = benchmark_rules.random_logits(distribution, 6, 150_000).softmax(-1)
        nucleus[distribution] = (~PrimalDeferral(0.1).defer(p)).sum(-1)
    assert int(nucleus["peaked"].max()) <= 64
    assert int(nucleus["flat"].min()) > 10_000
    assert nucleus["equal"].tolist() == [135_000] * 6


@pytest.mark.parametrize(("rows", "sequences"), [(1, 1), (4, 1), (6, 1), (7, 1), (12, 2), (48, 8)])
def test_a_round_has_five_draft_tokens_a_sequence_where_the_rows_allow_it(rows, sequences):
    window = benchmark_rules.Round.of(benchmark_rules.random_logits("flat", rows, 50))
    assert window.base.shape == (sequences, rows // sequences, 50)
    assert window.draft_ids.shape == (sequences, rows // sequences - 1)


def test_a_step_is_the_rule_and_the_verification():
    window, rule = benchmark_rules.Round.of(benchmark_rules.random_logits("peaked", 12, 50)), DualDeferral(0.4)
    torch.manual_seed(0)
    accepted, following, unusable = window.step(rule)
    assert not unusable.any()
    proxy = torch.cat([window.draft, window.bonus[:, None]], dim=1)
    target = compose(rule, window.base.flatten(0, 1), proxy.flatten(0, 1)).target_probs.view(window.base.shape)
    torch.manual_seed(0)
    expected = verify(target, window.draft.softmax(-1), window.draft_ids)
    assert torch.equal(accepted, expected[0])
    assert torch.equal(following, expected[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary": 39}, "at least 40, got 39"),
        ({"repetitions": 0}, "got 0"),
        ({"rows": [6, 0]}, r"got \[6, 0\]"),
        ({"rows": []}, r"got \[\]"),
    ],
)
def test_bad_arguments_are_echoed(settings, message):
    with pytest.raises(ValueError, match=message):
        benchmark_rules.BenchmarkArguments(**settings)


def test_the_figures_that_are_kept_are_of_every_rule():
    path = Path(benchmark_rules.__file__).parent / "results" / "rules.json"
    kept = json.loads(path.read_text())
    assert {row["rule"] for row in kept["ratios"]} == {
        benchmark_rules.label(rule) for rule in benchmark_rules.rules(kept["vocabulary"])
    }
    assert benchmark_rules.summary_table(kept["ratios"]) in (path.parents[2] / "docs" / "performance.md").read_text()
