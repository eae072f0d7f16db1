"""The comparison of the two verifications: what it counts and times, and the table that it prints."""

import json
from pathlib import Path

import benchmark_verification
import pytest

SMALL = ["--device", "cpu", "--methods", "kad-dual:threshold=0.5", "--draft_lengths", "2", "--texts", "3"]
SMALL += ["--batch_size", "2", "--repetitions", "1", "--max_new_tokens", "6", "--inflate", "base=600K,proxy=500K"]
ROOT = Path(benchmark_verification.__file__).parents[1]
KEPT = ROOT / "recipes" / "results" / "verification"


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_it_prints_and_keeps_what_it_measured_and_goes_on_where_it_ended(tmp_path, capsys):
    arguments = [*SMALL, "--output", str(tmp_path)]
    assert benchmark_verification.main(arguments) == 0
    counted, timed = first = lines(tmp_path)
    for name in ("token", "block"):
        assert [tokens for tokens, _, _ in counted[name]] == [6, 6, 6]
        assert all(accepted + rounds >= tokens for tokens, rounds, accepted in counted[name])
        seconds, tokens, rounds = timed["cases"][0][name]
        assert seconds > 0
        assert tokens == 6 >= rounds
    report = json.loads((tmp_path / "verification.json").read_text())
    assert report["rows"] == benchmark_verification.make_rows(first)
    printed = capsys.readouterr().out
    assert benchmark_verification.table(report["rows"]) in printed
    assert (tmp_path / "verification.md").read_text() in printed
    arguments[arguments.index("--repetitions") + 1] = "2"
    assert benchmark_verification.main(arguments) == 0
    again = lines(tmp_path)
    assert again[:2] == first
    assert [(record["part"], record.get("repetition")) for record in again[2:]] == [("times", 1)]


def test_a_case_decodes_with_the_verification_that_it_names(subject_and_method):
    case = benchmark_verification.Case(*subject_and_method, 3)
    assert {name: kad.verification for name, kad in case.processors.items()} == {"token": "token", "block": "block"}
    assert case.key == {"method": "kad-primal budget=0.8", "draft_length": 3}
    _, statistics = case.decode("block", 1, rows=2, max_new_tokens=5)
    assert (len(statistics.sequences), statistics.tokens) == (2, 10)
    assert case.processors["block"].statistics is statistics


@pytest.fixture
def subject_and_method(base, proxy):
    models = benchmark_verification.ModelArguments(device="cpu")
    models.complete_with_pair(None, benchmark_verification.TINY_PAIR)
    subject = benchmark_verification.load_subject(models, random_weights={}, inflated={})
    return subject, benchmark_verification.parse_methods(["kad-primal:budget=0.8"])[0]


def test_figures_by_hand():
    counted = {"token": [[12, 6, 6], [12, 4, 8]], "block": [[12, 4, 8], [12, 4, 8]]}
    times = [{"token": [1.0, 10, 5], "block": [0.5, 10, 4]}, {"token": [2.0, 10, 5], "block": [1.5, 10, 5]}]
    key = {"method": "kad-dual threshold=0.5", "draft_length": 3}
    records = [
        {"part": "counts", **key, **counted},
        *({"part": "times", "repetition": at, "cases": [{**key, **time}]} for at, time in enumerate(times)),
    ]
    (row,) = benchmark_verification.make_rows(records)
    assert row["token"] == {
        "texts": 2,
        "tokens_per_round": 2.4,
        "accepted_per_round": 1.4,
        "tokens_per_second": pytest.approx(20 / 3),
        "seconds_per_round": 0.3,
    }
    assert row["block"]["tokens_per_round"] == 3
    assert row["gain"]["tokens_per_round"] == pytest.approx(1.25)
    # The rounds of a text are 5 on average, with a standard error of 1, by tokens, and 4 by blocks.
    assert row["gain"]["standard_error"] == pytest.approx(1.25 / 5)
    # The times of a round are 0.2 and 0.4 s by tokens, 0.125 and 0.3 s by blocks.
    assert row["speed"][1] == pytest.approx(1.25 * (1.6 + 4 / 3) / 2)
    assert "| dual threshold=0.5 | 3 | 1.40 | 2.00 | 2.40 | 3.00 | × 1.250 ± 0.250 | 300 | 222 |" in (
        benchmark_verification.table([row])
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": 0}, "--texts must be at least 1, got 0"),
        ({"draft_lengths": [3, 0]}, r"--draft_lengths must be at least 1, got \[3, 0\]"),
        ({"methods": ["base"]}, "need a rule, got 'base'"),
        ({"inflate": "base"}, "--inflate is written as"),
    ],
)
def test_bad_arguments_are_echoed(settings, message):
    with pytest.raises(ValueError, match=message):
        benchmark_verification.VerificationArguments(**settings)


def test_the_page_shows_the_figures_that_are_kept():
    report = json.loads((KEPT / "verification.json").read_text())
    assert len(report["rows"]) == 12
    table = benchmark_verification.table(report["rows"])
    assert table + "\n" == (KEPT / "verification.md").read_text()
    assert table in (ROOT / "docs" / "performance.md").read_text()
