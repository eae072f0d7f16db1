"""The benchmark of the paced rule: what it compares with what, and the figures that are kept."""

import json
from pathlib import Path

import benchmark_pacing
import pytest

ROOT = Path(__file__).resolve().parents[3]
KEPT = ROOT / "recipes" / "results" / "pacing"
SMALL = [
    *("--limit", "8", "--max_new_tokens", "8", "--batch_size", "8"),
    *("--budgets", "0.2", "--step_sizes", "0.1", "1", "--thresholds", "0.3", "0.6"),
]


def dual(threshold, mass, accuracy):
    return {"method": f"kad-dual threshold={threshold}", "deferral_mass": mass, "accuracy": accuracy}


@pytest.mark.parametrize(
    "mass, threshold",
    [
        (0.30, 0.6),  # the most accurate of those that are near, not the nearest
        (0.345, 0.9),  # none is near
        (0.11, 0.1),
    ],
)
def test_the_best_threshold_at_the_same_mass_is_chosen(mass, threshold):
    duals = [dual(0.1, 0.1, 0.1), dual(0.4, 0.3, 0.5), dual(0.6, 0.31, 0.8), dual(0.9, 0.37, 0.9)]
    assert benchmark_pacing.best_at_the_same_mass(duals, mass)["method"] == f"kad-dual threshold={threshold}"


@pytest.mark.slow
def test_it_compares_and_writes_and_goes_on(tmp_path, capsys):
    arguments = [*SMALL, "--output", str(tmp_path)]
    assert benchmark_pacing.main(arguments) == 0
    written = json.loads((tmp_path / "pacing.json").read_text())
    printed = capsys.readouterr().out
    for table in (
        benchmark_pacing.pair_table(written["comparisons"]),
        benchmark_pacing.agreeing_table(written["agreeing"]),
    ):
        assert table in printed
        assert table in (tmp_path / "pacing.md").read_text()
    assert [row["paced"]["method"] for row in written["comparisons"]] == [
        "kad-paced budget=0.2",
        "kad-paced budget=0.2 step_size=1",
    ]
    results = [json.loads(line) for line in (tmp_path / "pair" / "results.jsonl").read_text().splitlines()]
    for row in written["comparisons"]:
        for one in (row["paced"], row["dual"]):
            masses = [line["deferral_mass"] for line in results if line["method"] == one["method"]]
            mean = sum(masses) / len(masses)
            assert one["spread"] == pytest.approx((sum((m - mean) ** 2 for m in masses) / (len(masses) - 1)) ** 0.5)
        assert row["difference"] == pytest.approx(row["paced"]["accuracy"] - row["dual"]["accuracy"])
    assert (tmp_path / "pacing.svg").exists()
    assert (tmp_path / "pacing.png").exists()
    # Where base and proxy agree, both are the proxy.
    shared = json.loads((tmp_path / "agreeing" / "configs.json").read_text())
    assert {config["shared"]["base"] for config in shared.values()} == {
        config["shared"]["proxy"] for config in shared.values()
    }
    assert benchmark_pacing.main(arguments) == 0
    assert "5 of 5 batches are already done." in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--budgets"], ["--task", "tiny", "gsm8k"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        benchmark_pacing.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_the_tables_of_the_page_are_those_that_are_kept():
    kept, page = json.loads((KEPT / "pacing.json").read_text()), (ROOT / "docs" / "results.md").read_text()
    assert benchmark_pacing.pair_table(kept["comparisons"]) in page
    assert benchmark_pacing.agreeing_table(kept["agreeing"]) in page
