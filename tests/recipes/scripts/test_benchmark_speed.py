"""The speed benchmark: what it measures, writes and refuses."""

import json
import re
from pathlib import Path

import benchmark_speed
import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from transformers_kad.recipes.benchmarking.growth import growth_to_markdown
from transformers_kad.recipes.benchmarking.report import to_markdown

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "recipes" / "results" / "speed"
PAGE = ROOT / "docs" / "performance.md"
PAIR = Path(benchmark_speed.__file__).parent / "tiny_pair"
SMALL = ("--device", "cpu", "--max_new_tokens", "8", "--repetitions", "2")
FIELDS = {
    *("batch_size", "method", "label", "kind", "draft_length", "repetitions", "failed", "tokens_per_second"),
    *("seconds", "ratio", "bound", "share", "steady", "tokens_per_round", "drafted_per_round", "acceptance_rate"),
    *("base_forwards_per_token", "proxy_forwards_per_token", "outside", "inside_seconds", "memory", "deferral_mass"),
    *("base_columns_per_token", "proxy_prefills"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two batch sizes of all methods that need no compiling, one after the other into one folder."""
    output = tmp_path_factory.mktemp("speed")
    methods = "proxy,assisted,token_by_token,lazy,speculative,auto,prompt_lookup"
    asked = [*SMALL, "--methods", methods, "--draft_lengths", "2,3", "--threshold", "0.5", "--output", str(output)]
    for size in ("1", "2"):
        assert benchmark_speed.main([*asked, "--batch_size", size]) == 0
    return output, asked


def result_of(output):
    return json.loads((output / "speed.json").read_text())


@pytest.mark.slow
def test_the_result_has_a_row_for_each_method_and_batch_size(measured):
    result = result_of(measured[0])
    assert [(row["batch_size"], row["method"]) for row in result["rows"]] == [
        *((1, key) for key in ("base", "proxy", "assisted:2", "assisted:3", "token_by_token", "lazy")),
        *((1, key) for key in ("speculative:2", "speculative:3", "auto", "prompt_lookup:2", "prompt_lookup:3")),
        *((2, key) for key in ("base", "proxy", "token_by_token", "lazy")),
        *((2, key) for key in ("speculative:2", "speculative:3", "auto", "prompt_lookup:2", "prompt_lookup:3")),
    ]
    for row in result["rows"]:
        assert set(row) == FIELDS
        assert row["repetitions"] == 2
        assert row["failed"] == 0
        assert len(row["ratio"]) == len(row["share"]) == 3
        assert min(row["bound"], row["tokens_per_second"], *row["ratio"]) > 0
    assert result["environment"]["torch"] == torch.__version__
    assert result["settings"]["parameters"] == {"threshold": 0.5}
    assert result["settings"]["max_new_tokens"] == 8


@pytest.mark.slow
def test_rows_are_consistent(measured):
    rows = {(row["batch_size"], row["method"]): row for row in result_of(measured[0])["rows"]}
    for size in (1, 2):
        assert rows[size, "base"]["ratio"] == [1, 1, 1]
        assert rows[size, "base"]["bound"] == 1
        assert rows[size, "token_by_token"]["base_forwards_per_token"] == 1
        assert rows[size, "token_by_token"]["proxy_forwards_per_token"] == 1
        assert rows[size, "lazy"]["proxy_forwards_per_token"] <= 1
        assert rows[size, "speculative:3"]["drafted_per_round"] <= 3
        assert rows[size, "speculative:3"]["tokens_per_round"] <= 4
        assert rows[size, "prompt_lookup:2"]["proxy_forwards_per_token"] <= 1
        assert rows[size, "token_by_token"]["base_columns_per_token"] == pytest.approx(
            7 / 8
        )  # the first is the prompt's
        assert rows[size, "token_by_token"]["proxy_prefills"] == rows[size, "speculative:3"]["proxy_prefills"] == 1
        assert rows[size, "base"]["proxy_prefills"] == 0
    drafted = rows[1, "speculative:3"]
    assert drafted["base_forwards_per_token"] == pytest.approx(1 / drafted["tokens_per_round"])
    steady = drafted["steady"]
    assert steady["drafted"] + steady["bonus_steps"] == pytest.approx(
        drafted["proxy_forwards_per_token"] / drafted["base_forwards_per_token"]
    )


@pytest.mark.slow
def test_a_finished_run_is_reported_again_without_measuring(measured, capsys):
    output, asked = measured
    before = (output / "runs.jsonl").read_text()
    assert benchmark_speed.main([*asked, "--batch_size", "1,2"]) == 0
    printed = capsys.readouterr()
    assert (output / "runs.jsonl").read_text() == before
    assert printed.out.strip() == to_markdown(result_of(output)).strip() == (output / "speed.md").read_text().strip()
    assert "batch 2: all 2 repetitions are done" in printed.err


@pytest.mark.slow
def test_plots_are_written(measured):
    names = {path.name for path in (measured[0] / "plots").iterdir()}
    stems = ("draft_length_batch_1", "draft_length_batch_2", "batch_size")
    assert names == {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")}


@pytest.mark.slow
def test_other_settings_and_other_methods_are_refused_with_the_difference(measured, capsys):
    _, asked = measured
    assert benchmark_speed.main([*asked, "--threshold", "0.7"]) == 2
    assert "parameters is {'threshold': 0.5} there and {'threshold': 0.7} here" in capsys.readouterr().err
    assert benchmark_speed.main([*asked, "--inflate", "base=2M"]) == 2
    assert "inflate is {} there and {'base': 2000000} here" in capsys.readouterr().err
    assert benchmark_speed.main([*asked, "--draft_lengths", "4"]) == 2
    assert "speculative:3" in capsys.readouterr().err


@pytest.mark.slow
def test_inflated_models_decode_what_they_decoded(tmp_path):
    asked = [*SMALL, "--methods", "speculative", "--draft_lengths", "3", "--threshold", "0.5"]
    counted = []
    for name, more in (("plain", ()), ("inflated", ("--inflate", "base=3M,proxy=1M"))):
        assert benchmark_speed.main([*asked, *more, "--output", str(tmp_path / name)]) == 0
        records = [json.loads(line) for line in (tmp_path / name / "runs.jsonl").read_text().splitlines()]
        counted.append([record["runs"]["speculative:3"]["counts"] for record in records])
    assert counted[0] == counted[1]


@pytest.mark.slow
def test_architectures_without_weights(tmp_path, capsys):
    sizes = {"vocab_size": 300, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, width in (("base", 32), ("proxy", 16)):
        LlamaConfig(hidden_size=width, **sizes).save_pretrained(tmp_path / name)
    configs = f"base={tmp_path / 'base' / 'config.json'},proxy={tmp_path / 'proxy'}"
    asked = [*SMALL, "--random_weights", configs, "--methods", "speculative", "--draft_lengths", "3"]
    assert benchmark_speed.main([*asked, "--deferral_mass", "0.6", "--output", str(tmp_path / "out")]) == 0
    result = result_of(tmp_path / "out")
    assert result["rows"][1]["deferral_mass"] == pytest.approx(0.6, abs=0.15)
    assert 0 < result["rule"]["parameters"]["threshold"] < 1
    assert result["settings"]["base"] == "base/config.json"
    assert "deferral mass of 0.6 needs dual with threshold" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tiny_architectures(tmp_path):
    asked = [*SMALL, "--methods", "token_by_token,speculative,in_step", "--draft_lengths", "3", "--repetitions", "1"]
    windowed = [*asked, "--random_weights", "windowed", "--output", str(tmp_path)]
    assert benchmark_speed.main(windowed) == 0
    assert benchmark_speed.main([*asked, "--random_weights", "full", "--output", str(tmp_path)]) == 2
    result = result_of(tmp_path)
    assert [row["method"] for row in result["rows"]] == ["base", "token_by_token", "speculative:3"]
    assert result["settings"]["base"] == "windowed/base"
    assert result["settings"]["deferral_mass"] == 0.8
    assert result["rows"][2]["proxy_prefills"] == 1


@pytest.mark.parametrize("name", ["full", "windowed", "hybrid"])
def test_tiny_architectures_differ_in_their_layers_alone(name):
    configs = benchmark_speed.SpeedArguments(random_weights=name).configs
    for role, width in (("base", 96), ("proxy", 64)):
        config = AutoConfig.from_pretrained(configs[role])
        assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (width, 3 * width, 640)
        kind = {"full": "full", "windowed": "sliding", "hybrid": "linear"}[name]
        assert config.layer_types == [*[f"{kind}_attention"] * 3, "full_attention"]
        if name == "windowed":
            prompt = benchmark_speed.SpeedArguments().prompt_tokens
            assert config.sliding_window < prompt


@pytest.mark.slow
def test_growth_is_measured_written_and_gone_on_with(tmp_path, capsys):
    asked = ["--device", "cpu", "--max_new_tokens", "8", "--repetitions", "1", "--output", str(tmp_path)]
    assert benchmark_speed.main([*asked, "--growth", "batch", "--sizes", "2,1"]) == 0
    assert benchmark_speed.main([*asked, "--growth", "vocabulary", "--sizes", "100,200"]) == 0
    result = json.loads((tmp_path / "growth.json").read_text())
    assert [(row["axis"], row["size"], row["method"]) for row in result["rows"]] == [
        (axis, size, method)
        for axis, sizes in (("vocabulary", (100, 200)), ("batch", (1, 2)))
        for size in sizes
        for method in ("base", "token_by_token", "speculative:5")
    ]
    assert {fit["axis"] for fit in result["exponents"]} == {"vocabulary", "batch"}
    assert all(isinstance(fit["time"], float) for fit in result["exponents"])
    assert result["settings"]["weights"] == "random"
    assert (tmp_path / "plots" / "growth_batch.svg").is_file()
    assert "Exponents over the upper half of the sizes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["fast"]}, "got 'fast'"),
        ({"batch_size": ["1,0"]}, "--batch_size takes whole numbers of at least 1, got 1,0"),
        ({"draft_lengths": ["auto"]}, "--draft_lengths takes whole numbers of at least 1, got auto"),
        ({"growth": ["width"]}, "got 'width'"),
        ({"growth": ["length", "batch"], "sizes": ["3"]}, "one axis"),
        ({"sizes": ["3"]}, "one axis"),
        ({"growth": ["length"], "methods": ["compiled"]}, "compiled"),
        ({"repetitions": 0}, "--repetitions must be at least 1, got 0"),
        ({"inflate": "300M"}, "--inflate is written as"),
        ({"inflate": "base=big"}, "got 'big'"),
        ({"random_weights": "base=gpt2"}, "--random_weights needs both"),
        ({"deferral_mass": 0.5}, "has no meaning for a real pair"),
        ({"deferral_mass": 1.5, "growth": ["length"]}, r"must lie in \(0, 1\], got 1.5"),
    ],
)
def test_bad_arguments_are_echoed(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark_speed.SpeedArguments(**arguments)


def test_words_and_commas_separate():
    arguments = benchmark_speed.SpeedArguments(batch_size=["1,2", "4"], methods=["auto", "lazy,proxy"])
    assert arguments.batch_sizes == [1, 2, 4]
    assert [method.key for method in arguments.chosen] == ["base", "auto", "lazy", "proxy"]
    assert arguments.max_new_tokens == 96
    assert benchmark_speed.SpeedArguments(task="copying").max_new_tokens == 24
    assert benchmark_speed.SpeedArguments(growth=["batch"]).grown["length"][-1] == 8192
    assert benchmark_speed.SpeedArguments(growth=["batch"], sizes=["4,2"]).grown["batch"] == [2, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num_assistant_tokens", "3"), "--draft_lengths, got --num_assistant_tokens 3"),
        (("--growth", "batch", "--deferral_mass", "0.5", "--rule", "primal"), "leave it out, or the rule"),
        (("--pair", "no/such/folder"), "No pair in 'no/such/folder'"),
        (("--base", "only/this"), "Base and proxy are needed"),
    ],
)
def test_mistakes_end_in_one_line(words, message, tmp_path, capsys):
    assert benchmark_speed.main([*words, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def kept(name, file="speed.json"):
    """A committed report, and its figures by batch size and method."""
    report = json.loads((RESULTS / name / file).read_text())
    return report, {(row["batch_size"], row["method"]): row for row in report["rows"] if "batch_size" in row}


def page():
    """The page with all white space alike, for its line ends."""
    return " ".join(PAGE.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("folder", sorted(path.name for path in RESULTS.iterdir()))
def test_the_tables_that_are_kept_are_those_of_their_figures(folder):
    name, write = ("growth", growth_to_markdown) if folder == "growth" else ("speed", to_markdown)
    report, _ = kept(folder, f"{name}.json")
    assert write(report) == (RESULTS / folder / f"{name}.md").read_text()


def test_the_page_shows_what_is_kept():
    report, _ = kept("tiny_pair")
    tables = re.findall(r"(?:^\|.*\n)+", to_markdown(report), re.MULTILINE)
    by_batch = [table for table in tables if table.startswith("| method | batch 1 |")]
    for table in [tables[0], *by_batch]:
        assert table in PAGE.read_text(encoding="utf-8")
    assert len(by_batch) == 1
    for name in ("tiny_pair", "costly_proxy", "primal", "compiled", "compiled_batches", "copying"):
        lines = [line for line in kept(name)[0]["findings"] if quoted(name, line)]
        assert lines
        for line in lines:
            assert line.removeprefix("Batch 1: ").rstrip(".") in page()


def quoted(name, finding):
    """What the page quotes of a report: what is said of batch 1, and where drafting pays."""
    return finding.startswith("Batch 1: ") or (name == "tiny_pair" and finding.startswith("Drafting pays"))


def test_what_is_kept_is_what_is_promised():
    """Figures of one run each, of which nothing is measured again here."""
    _, rows = kept("tiny_pair")
    five = rows[1, "speculative:5"]
    assert five["ratio"][1] >= 1.9
    assert five["share"][1] >= 0.95
    assert five["outside"] <= 0.04
    for size in (2, 4, 8, 16):
        assert rows[size, "speculative:5"]["share"][1] >= 0.9
    for name in ("tiny_pair", "costly_proxy", "primal"):
        (line,) = (line for line in kept(name)[0]["findings"] if line.startswith("Batch 1: the best draft length"))
        assert float(re.search(r"auto reaches ([\d.]+)", line)[1]) >= 0.95
    lazy = rows[1, "lazy"]
    assert lazy["proxy_forwards_per_token"] == pytest.approx(lazy["deferral_mass"], rel=0.1)
    assert lazy["ratio"][1] >= rows[1, "token_by_token"]["ratio"][1]


@pytest.mark.parametrize("name", ["windowed", "hybrid"])
def test_windows_and_recurrent_layers_come_as_near_to_their_bounds(name):
    """Figures of one run each, of which nothing is measured again here."""
    report, rows = kept(name)
    for size in (1, 4):
        assert rows[size, "speculative:5"]["share"][1] >= 0.93
    assert {row["proxy_prefills"] for row in rows.values() if row["method"] != "base"} == {1}
    tables = re.findall(r"(?:^\|.*\n)+", to_markdown(report), re.MULTILINE)
    (by_batch,) = (table for table in tables if table.startswith("| method | batch 1 |"))
    assert by_batch in PAGE.read_text(encoding="utf-8")
    in_step = [line for line in report["findings"] if "rows in step" in line]
    assert len(in_step) == (1 if name == "windowed" else 0)
    for line in in_step:
        assert line.rstrip(".") in page()


def test_long_texts_cost_what_their_forwards_cost():
    report, _ = kept("growth", "growth.json")
    rows = [row for row in report["rows"] if row["axis"] == "length"]
    speculative = {row["size"]: row for row in rows if row["method"] == "speculative:5"}
    assert speculative[8192]["outside"] <= speculative[256]["outside"]
    assert max(row["cache_over_ideal"] for row in rows if row["size"] == 8192) <= 1.15
