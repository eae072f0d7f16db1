"""Tables of speed, from repetitions made by hand."""

import pytest

from transformers_kad.recipes.benchmarking.plots import plot_batch_sizes, plot_draft_lengths, plot_growth
from transformers_kad.recipes.benchmarking.report import compare, findings, make_rows, to_markdown

FORWARDS = [
    ["base", 1, 1, [0.08, 0.08, 9.0]],
    ["base", 1, 6, [0.1]],
    ["base", 1, 10, [0.12]],
    ["base", 1, 15, [0.2]],
    ["proxy", 1, 1, [0.01]],
    ["proxy", 1, 10, [0.05]],
]


def run(seconds, counts, inside=None, **extra):
    forwards = {}
    for model, _, _, count in counts:
        forwards[model] = forwards.get(model, 0) + count
    return {
        "seconds": seconds,
        "tokens": 100,
        "prompt_tokens": 10,
        "memory": 2**20,
        "forwards": forwards,
        "counts": counts,
        "inside": inside,
        **extra,
    }


def base_run(seconds=8.04):
    counts = [["base", 1, 1, 99], ["base", 1, 10, 1]]
    return run(seconds, counts, {"base": seconds - 0.04, "proxy": 0.0})


def speculative_run(seconds):
    """25 rounds of 4 tokens; 5 drafted in each, and the bonus step in 10 of them."""
    counts = [["base", 1, 6, 24], ["base", 1, 15, 1], ["proxy", 1, 1, 134], ["proxy", 1, 10, 1]]
    told = {"rounds": 25, "drafted": 125, "accepted": 75, "deferral_mass": 0.4}
    return run(seconds, counts, {"base": 0.7 * seconds, "proxy": 0.2 * seconds}, **told)


def record(repetition, runs, size=1):
    forwards = [[model, size if rows == 1 else rows, *rest] for model, rows, *rest in FORWARDS]
    return {"batch_size": size, "repetition": repetition, "load": 1.5, "forwards": forwards, "runs": runs}


RECORDS = [
    record(0, {"speculative:5": speculative_run(4.0), "base": base_run(8.0)}),
    record(1, {"base": base_run(9.0), "speculative:5": speculative_run(6.0)}),
    record(2, {"base": base_run(8.0), "speculative:5": speculative_run(5.0)}),
]


def test_ratios_bounds_and_shares():
    base, row = make_rows(RECORDS)
    assert (base["method"], row["method"]) == ("base", "speculative:5")
    assert base["ratio"] == (1, 1, 1)
    assert row["ratio"] == (pytest.approx(1.55), pytest.approx(1.6), pytest.approx(1.8))  # of 2, 1.5 and 1.6
    alone = 99 * 0.08 + 0.12
    drafted = 24 * 0.1 + 0.2 + 134 * 0.01 + 0.05
    assert row["bound"] == pytest.approx(alone / drafted)
    assert row["share"][1] == pytest.approx(1.6 * drafted / alone)
    assert row["tokens_per_second"] == 20
    assert row["seconds"] == 5


def test_the_bound_of_section_two():
    steady = make_rows(RECORDS)[1]["steady"]
    assert steady.pop("bound") == pytest.approx(4 * 0.08 / (5.4 * 0.01 + 0.1))
    assert steady == {
        "tokens_per_round": 4,
        "drafted": 5,
        "bonus_steps": pytest.approx(0.4),
        "base_one": 0.08,
        "base_draft": 0.1,
        "proxy_step": 0.01,
    }


def test_counts_and_shares_of_time():
    base, row = make_rows(RECORDS)
    assert row["outside"] == pytest.approx(0.1)
    assert base["outside"] == pytest.approx(0.04 / 8)
    assert row["inside_seconds"]["base"] == pytest.approx(0.7 * 15 / 75)
    assert (row["tokens_per_round"], row["drafted_per_round"], row["acceptance_rate"]) == (4, 5, 0.6)
    assert (row["base_forwards_per_token"], row["proxy_forwards_per_token"]) == (0.25, 1.35)
    assert (base["base_forwards_per_token"], base["proxy_forwards_per_token"]) == (1, 0)
    assert base["tokens_per_round"] is None
    assert row["memory"] == 2**20
    assert (row["repetitions"], row["failed"]) == (3, 0)


def test_a_bound_needs_forwards_that_were_measured():
    compiled = run(2.0, [["base compiled", 1, 1, 100]])
    row = make_rows([record(0, {"base": base_run(), "base_compiled": compiled})])[1]
    assert row["ratio"][1] == pytest.approx(4.02)
    assert row["bound"] is row["share"] is None


def test_a_batch_counts_forwards_by_the_tokens_of_each_text():
    counts = [["base", 4, 1, 25]]
    row = make_rows([record(0, {"base": run(1.0, counts)}, size=4)])[0]
    assert row["base_forwards_per_token"] == 1
    assert row["outside"] is None  # nothing was timed


def test_a_profile_replaces_what_would_disturb():
    profiled = base_run(8.0) | {"inside": None, "profile": {"seconds": 10.0, "inside": {"base": 6.0, "proxy": 0.0}}}
    row = make_rows([record(0, {"base": profiled}), record(1, {"base": base_run(8.0) | {"inside": None}})])[0]
    assert row["outside"] == pytest.approx(0.4)
    assert row["seconds"] == 8


def failing():
    return {"seconds": 1.0, "error": "RuntimeError: no"}


def test_failures_are_left_out_and_counted():
    records = [*RECORDS[:2], record(2, {"base": base_run(), "speculative:5": failing()})]
    row = make_rows(records)[1]
    assert (row["repetitions"], row["failed"]) == (2, 1)
    assert row["ratio"][1] == pytest.approx(1.75)
    text = to_markdown(report(records))
    assert "| failed |" in text
    nothing = make_rows([record(0, {"base": base_run(), "speculative:5": failing()})])[1]
    assert nothing["ratio"] is nothing["bound"] is nothing["steady"] is nothing["tokens_per_round"] is None


def report(records):
    rows = make_rows(records)
    return {
        "rows": rows,
        "findings": findings(rows, records),
        "settings": {"base": "b", "inflate": {}},
        "environment": {"torch": "2"},
        "load": 1.5,
    }


def test_the_table_shows_the_rows():
    text = to_markdown(report(RECORDS))
    share = make_rows(RECORDS)[1]["share"][1]
    assert "| KAD speculative, γ = 5 | 20.0 | × 1.60 (1.55 to 1.80) | × 2.02 |" in text
    assert f"| {share:.2f} (" in text
    assert "| 4.00 | 5.0 | 0.60 | 0.25 | 1.35 | 10.0% | 1.0 MiB |" in text
    assert "| 1 | KAD speculative, γ = 5 | 80.0 | 100.0 | 10.0 | 5.00 | 0.40 | 4.00 | × 2.08 |" in text
    assert "**Batch 1**, repetitions: 3" in text
    assert "failed" not in text
    assert "Asked for: base b\n" in text


def test_methods_are_compared_within_repetitions():
    assert compare(RECORDS, "speculative:5", "base") == make_rows(RECORDS)[1]["ratio"]


def hybrid_run(seconds):
    """20 rounds of 5 tokens after a prompt read alone; in 8 of them the base reads 3 accepted tokens again."""
    counts = [["base", 1, 6, 12], ["base", 1, 9, 8], ["base", 1, 10, 1], ["proxy", 1, 1, 110], ["proxy", 1, 10, 1]]
    prefills = [["base", 1, 10, 1], ["proxy", 1, 10, 1]]
    return run(seconds, counts, rounds=20, drafted=100, accepted=80, deferral_mass=0.4, prefills=prefills)


def test_tokens_that_are_read_again_are_part_of_the_bound():
    hybrid = record(0, {"base": base_run(8.0), "speculative:5": hybrid_run(4.0)})
    hybrid["forwards"].append(["base", 1, 9, [0.115]])
    base, row = make_rows([hybrid])
    assert row["bound"] == pytest.approx((99 * 0.08 + 0.12) / (12 * 0.1 + 8 * 0.115 + 0.12 + 110 * 0.01 + 0.05))
    assert row["share"][1] == pytest.approx(2 / row["bound"])
    assert row["base_columns_per_token"] == pytest.approx((12 * 6 + 8 * 9) / 100)
    assert base["base_columns_per_token"] == pytest.approx(0.99)
    assert row["steady"] is None  # its rounds are not alike
    assert base["proxy_prefills"] is None  # not counted
    assert row["proxy_prefills"] == 1


def test_the_prefills_are_those_of_the_worst_call():
    twice = hybrid_run(4.0) | {"prefills": [["base", 1, 10, 1], ["proxy", 1, 10, 1], ["proxy", 1, 30, 1]]}
    records = [
        record(at, {"base": base_run(), "speculative:5": each}) for at, each in enumerate((twice, hybrid_run(4.0)))
    ]
    assert make_rows(records)[1]["proxy_prefills"] == 2
    text = to_markdown(report(records))
    assert "| base columns/token | proxy prefills |\n" in text
    assert "| 1.0 MiB | 1.44 | 2 |\n" in text
    assert "Base columns a token: " in text


def test_reports_without_these_counts_are_written_as_before():
    older = report(RECORDS)
    for row in older["rows"]:
        del row["base_columns_per_token"], row["proxy_prefills"]
    text = to_markdown(older)
    assert "| peak memory |\n" in text
    assert "columns" not in text
    assert "prefills" not in text


def test_rows_in_step_are_compared_with_rows_on_their_own():
    records = [
        record(at, {"base": base_run(), "speculative:5": speculative_run(own), "in_step:5": speculative_run(6.0)}, 4)
        for at, own in enumerate((4.0, 5.0, 3.0))
    ]
    (line,) = (line for line in findings(make_rows(records), records) if "in step" in line)
    assert line == (
        "Batch 4: with γ = 5, rows that each keep what they accepted are × 1.50 (1.35 to 1.75) as fast as rows in "
        "step."
    )
    assert not any("in step" in line for line in findings(make_rows(RECORDS), RECORDS))


def batches():
    """Drafting pays at batch 1 and 2 and not at 4, where auto stops."""
    records = []
    for size, speed in ((1, 4.0), (2, 6.0), (4, 12.0)):
        runs = {"base": base_run(8.0), "token_by_token": speculative_run(10.0), "speculative:3": speculative_run(20.0)}
        auto = speculative_run(min(speed, 10.0)) | {"drafted": 125 if size < 4 else 0}
        lazy = speculative_run(8.0)
        runs |= {"speculative:5": speculative_run(speed), "auto": auto, "lazy": lazy}
        runs |= {"base_compiled": base_run(2.0), "compiled:5": base_run(1.0) | {"inside": None}}
        records.append(record(0, runs, size))
    return records


def test_findings():
    records = batches()
    lines = findings(make_rows(records), records)
    assert (
        "Batch 4: the best draft length is 5, × 0.67; γ auto reaches 1.20 (1.20 to 1.20) of it, drafting 0.0 tokens a "
        "round." in lines
    )
    assert any(line.startswith("Batch 1: the best draft length is 5, × 2.00; γ auto reaches 1.00") for line in lines)
    assert (
        "Batch 1: lazy asks the proxy 1.350 times a token, and defers a share of 0.400; it takes × 0.80 (0.80 to "
        "0.80) of the eager time." in lines
    )
    assert "Batch 2: KAD speculative, compiled, γ = 5 is × 2.00 (2.00 to 2.00) the base alone, compiled." in lines
    assert "Batch 2: KAD speculative, compiled, γ = 5 is × 6.00 (6.00 to 6.00) as fast as not compiled." in lines
    assert lines[-1] == "Drafting pays up to batch 2, and not at 4, against KAD token by token."
    assert findings(make_rows(records[:2]), records[:2])[-1] == (
        "Drafting pays at every batch size measured, up to 2, against KAD token by token."
    )
    assert findings(make_rows(records[2:]), records[2:])[-1] == (
        "Drafting pays at no batch size measured, and not at 4, against KAD token by token."
    )


def test_batch_sizes_stand_side_by_side():
    rows = make_rows(batches())
    shares = [row["share"][1] for row in rows if row["method"] == "speculative:5"]
    text = to_markdown(report(batches()))
    assert "| method | batch 1 | batch 2 | batch 4 |\n" in text
    cells = [f"× {ratio} ({share:.2f})" for ratio, share in zip(("2.00", "1.33", "0.67"), shares, strict=True)]
    assert f"| KAD speculative, γ = 5 | {' | '.join(cells)} |\n" in text
    missing = [each for each in batches() if each["batch_size"] > 1]
    missing += [record(0, {"base": base_run(8.0), "auto": failing()})]
    assert "| KAD speculative, γ auto | – | × 1.33" in to_markdown(report(missing))
    assert "| method | batch 1 |" not in to_markdown(report(RECORDS))


def svg_of(paths):
    png, svg = paths
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return svg.read_text()


def test_plots_say_what_they_show(tmp_path):
    rows = make_rows(batches())
    first = [row for row in rows if row["batch_size"] == 1]
    svg = svg_of(plot_draft_lengths(first, tmp_path / "a", title="Batch 1"))
    for text in (
        "Batch 1",
        "draft length γ",
        "KAD speculative",
        "KAD token by token",
        "dashed: the bound",
        "base alone",
    ):
        assert text in svg
    svg = svg_of(plot_batch_sizes(rows, tmp_path / "b"))
    for text in ("batch size", "KAD speculative, γ = 5", "KAD speculative, γ = 3", "KAD speculative, γ auto"):
        assert text in svg
    svg = svg_of(plot_growth([512, 4096], {"base": [1.0, 20.0]}, tmp_path / "c", xlabel="tokens"))
    for text in ("512", "4,096", "tokens", "base", "seconds"):
        assert text in svg


def test_nothing_is_plotted_where_there_is_nothing(tmp_path):
    rows = make_rows(RECORDS)
    assert plot_batch_sizes(rows, tmp_path / "a") == []
    assert plot_draft_lengths(rows[:1], tmp_path / "a") == []
    assert list(tmp_path.iterdir()) == []
