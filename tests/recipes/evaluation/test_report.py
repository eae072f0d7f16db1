"""The tables: figures worked out by hand, methods in order, differences with their p-values."""

import json

import pytest

from transformers_kad.recipes.evaluation.methods import parse_methods
from transformers_kad.recipes.evaluation.report import make_report, summarize, to_markdown, write_report
from transformers_kad.recipes.evaluation.results import ResultsFolder, batch_name, config_hash
from transformers_kad.recipes.intervals import wilson_interval


def line(instance, method="base", prediction="1", sample=0, **more):
    return {
        "task": "tiny",
        "method": method,
        "instance": str(instance),
        "sample": sample,
        "prediction": prediction,
        "answer": "1",
        "correct": prediction == "1",
        "correct_lenient": True,
        "error": None,
        "tokens": 10,
        "seconds": 0.5,
        **more,
    }


RULED = {"rounds": 4, "drafted": 8, "accepted": 6, "acceptance_histogram": [1, 0, 3], "deferral_mass": 0.25}


def test_the_figures_of_a_method_by_hand():
    other = {**RULED, "tokens": 30, "seconds": 1.5, "rounds": 10, "drafted": 12, "accepted": 4, "deferral_mass": 0.5}
    lines = [
        line(0, "kad", **RULED),
        line(0, "kad", "2", 1, **RULED),
        line(
            1,
            "kad",
            **other,
        ),
        line(1, "kad", None, 1, **{**RULED, "error": "ValueError", "correct_lenient": False}),
    ]
    found = summarize(lines)
    assert (found["instances"], found["samples"], found["accuracy"], found["failed"]) == (2, 2, 0.5, 1)
    assert (found["low"], found["high"]) == pytest.approx(wilson_interval(1, 2))
    assert found["accuracy_lenient"] == 0.75
    assert found["tokens_per_second"] == pytest.approx(60 / 3)
    assert found["deferral_mass"] == pytest.approx((3 * 10 * 0.25 + 30 * 0.5) / 60)
    assert found["acceptance_rate"] == pytest.approx(22 / 36)
    assert found["tokens_per_round"] == pytest.approx(60 / 22)
    assert found["acceptance_histogram"] == [4, 0, 12]


def test_a_method_without_a_rule_has_neither_acceptance_nor_deferral():
    found = summarize([line(0), line(1)])
    assert found["acceptance_rate"] is found["deferral_mass"] is found["tokens_per_round"] is None


def test_failed_answers_have_no_part_in_the_share_that_ended_by_itself():
    lines = [line(i, ended=i < 6, error="ValueError" if i == 9 else None) for i in range(10)]
    found = summarize(lines)
    assert (found["ended"], found["cut"]) == (6 / 9, 3)
    old = summarize([line(0), line(1)])  # records from before it was recorded
    assert old["ended"] is old["cut"] is None


SHARED = {
    "instances": 20,
    "few_shot": 2,
    "max_new_tokens": 48,
    "seed": 7,
    "base": "some/base",
    "proxy": "some/proxy",
    "dtype": "bfloat16",
    "quantization": None,
    "align_vocabularies": False,
    "speculative": True,
    "chat": None,
    "proxy_chat": "same",
    "template_arguments": {"enable_thinking": False},
    "generate": {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9},
}


def made(path, ended, **changes):
    """The report of a base and an aligned model, of which so many of 20 answers ended by themselves."""
    with ResultsFolder(path) as folder:
        folder.prepare()
        for method, count in ended.items():
            own = {"name": method, "shown_parameters": {}} | ({"aligned": "some/large"} if method == "aligned" else {})
            config = {"task": "tiny", "method": method, "shared": SHARED | changes, "own": own}
            folder.describe([config])
            place = {
                "batch": batch_name("tiny", method, 0, 0),
                "batch_number": 0,
                "batch_size": 20,
                "config": config_hash(config),
            }
            folder.append({**line(i, method, ended=i < count), **place, "row": i} for i in range(20))
        folder.merge()
    return make_report(folder)


def test_a_report_names_the_models_and_how_they_were_asked_above_the_table(tmp_path):
    report = made(tmp_path / "sampled", {"base": 20, "aligned": 20})
    assert report["settings"]["tiny"] == SHARED | {"aligned": "some/large"}
    text = to_markdown(report)
    head = text[: text.index("| method")]
    for part in (
        *(
            "base some/base",
            "proxy some/proxy",
            "aligned some/large",
            "dtype bfloat16",
            "temperature 0.7",
            "top_p 0.9",
        ),
        *("at most 48 tokens", "seed 7", "2 examples", "with drafts", '{"enable_thinking": false}'),
    ):
        assert part in head
    assert "quantization" not in head
    greedy = made(tmp_path / "greedy", {"base": 20}, generate={"do_sample": False}, speculative=False, few_shot=0)
    assert "greedy, token by token" in to_markdown(greedy)
    assert "examples" not in to_markdown(greedy)


def test_answers_that_were_cut_have_a_column_and_above_a_tenth_a_warning(tmp_path):
    text = to_markdown(made(tmp_path, {"base": 17, "proxy": 18}))
    header, _, base, proxy = [line.split(" | ") for line in text.splitlines() if line.startswith("|")][:4]
    at = header.index("ended")
    assert (base[at], proxy[at]) == ("0.85", "0.90")
    (warning,) = [line for line in text.splitlines() if line.startswith("Warning")]
    assert "3 of 20 answers of base were truncated" in warning
    assert "--max_new_tokens" in warning and "48" in warning


def test_old_records_beside_new_ones_show_a_dash(tmp_path):
    report = made(tmp_path, {"base": 17, "proxy": 18})
    report["rows"][0]["ended"] = report["rows"][0]["cut"] = None
    base = next(line for line in to_markdown(report).splitlines() if line.startswith("| base"))
    assert " | – | " in base
    del report["settings"]  # of a report that was stored before
    for row in report["rows"]:
        del row["ended"], row["cut"]
    assert "ended" not in to_markdown(report)


@pytest.fixture
def folder(tmp_path):
    methods = parse_methods(["kad-dual", "proxy", "base"])
    with ResultsFolder(tmp_path) as folder:
        folder.prepare()
        configs = [
            {
                "task": "tiny",
                "method": m.label,
                "shared": {"instances": 8},
                "own": {"name": m.name, "shown_parameters": m.parameters},
            }
            for m in methods
        ]
        folder.describe(configs)
        for method, config in zip(methods, configs, strict=True):
            right = {"kad-dual": 8, "proxy": 3, "base": 0}[method.name]
            more = RULED if method.config else {}
            seconds = {"kad-dual": 0.25, "proxy": 0.1, "base": 0.5}[method.name]
            folder.append(
                {
                    **line(i, method.label, "1" if i < right else "2", **more),
                    "seconds": seconds,
                    **{
                        "batch": batch_name("tiny", method.label, 0, 0),
                        "batch_number": 0,
                        "batch_size": 8,
                        "row": i,
                        "config": config_hash(config),
                    },
                }
                for i in range(8)
            )
        folder.merge()
    return folder


def test_methods_stand_in_a_fixed_order_with_their_speed_against_the_base(folder):
    rows = make_report(folder)["rows"]
    assert [row["method"] for row in rows] == ["base", "proxy", "kad-dual threshold=0.4"]
    assert [row["speedup"] for row in rows] == pytest.approx([1, 5, 2])
    assert [row["accuracy"] for row in rows] == [0, 3 / 8, 1]


def test_every_pair_is_compared_on_the_same_instances(folder):
    comparisons = {(c["method_a"], c["method_b"]): c for c in make_report(folder)["comparisons"]}
    assert len(comparisons) == 3
    assert comparisons["base", "kad-dual threshold=0.4"]["p_value"] == pytest.approx(2 / 2**8)
    assert comparisons["proxy", "kad-dual threshold=0.4"]["p_value"] == pytest.approx(2 / 2**5)


def test_the_report_is_written_for_people_and_for_programs(folder, tmp_path):
    report = make_report(folder, dtype="float32")
    as_json, as_markdown = write_report(report, tmp_path)
    assert json.loads(as_json.read_text()) == report
    assert as_markdown.read_text() == to_markdown(report)
    assert {"device", "torch", "transformers", "dtype", "commit"} <= report["environment"].keys()
    lines = as_markdown.read_text().splitlines()
    assert "| kad-dual threshold=0.4 | 1.000 | 0.676 to 1.000 | 1.000 | 40.0 | × 2.00 | 0.25 | 0.75 | 2.50 |" in lines
    assert "| base | 1.000 ± 0.000 | 0.0078 | 0.0234 |" in lines
    assert "| proxy | 0.625 ± 0.359 | 0.0625 | 0.1250 |" in lines
    assert "failed" not in as_markdown.read_text()


def test_a_method_that_was_stopped_is_listed_as_unfinished_and_compared_with_nothing(folder):
    with ResultsFolder(folder.path) as again:
        again.prepare()
        (nudging,) = parse_methods(["nudging"])
        own = {"name": nudging.name, "shown_parameters": nudging.parameters}
        new = {"task": "tiny", "method": nudging.label, "shared": {"instances": 8}, "own": own}
        again.describe([new])
        base = next(c for c in again.configs().values() if c["method"] == "base")
        for config, sample in ((new, 0), (base, 1)):  # a new method, and a second sample of an old one
            again.append(
                {
                    **line(i, config["method"], sample=sample),
                    **{
                        "batch": batch_name("tiny", config["method"], sample, 0),
                        "batch_number": 0,
                        "batch_size": 3,
                        "row": i,
                    },
                    "config": config_hash(config),
                }
                for i in range(3)
            )
        again.merge()
    report = make_report(again)
    assert [row["method"] for row in report["rows"]] == ["base", "proxy", "kad-dual threshold=0.4"]
    assert [(row["instances"], row["samples"]) for row in report["rows"]] == [(8, 1)] * 3
    assert len(report["comparisons"]) == 3
    assert report["unfinished"] == [
        {"task": "tiny", "method": "base", "answers": 11, "of": 16},
        {"task": "tiny", "method": nudging.label, "answers": 3, "of": 8},
    ]
    assert "Unfinished: base on tiny, 11 of 16 answers." in to_markdown(report)
