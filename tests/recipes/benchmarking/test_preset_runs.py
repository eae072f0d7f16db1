"""Presets of the speed benchmark: their plan, their limits, and how they are cut and gone on with."""

import json
from types import SimpleNamespace

import benchmark_speed
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from transformers_kad.recipes.benchmarking import preset_runs
from transformers_kad.recipes.benchmarking.preset_runs import RESERVE, as_repetitions, log_plan
from transformers_kad.recipes.benchmarking.presets import PRESETS

H100 = PRESETS["h100"]
ROWS = {
    *((1, key) for key in ("base", "base_compiled", "token_by_token", "speculative:3", "speculative:5")),
    *((1, key) for key in ("speculative:8", "auto", "compiled:5")),
    *((rows, key) for rows in (4, 16) for key in ("base", "speculative:5", "auto")),
}
COMPILED_BATCHES = [(rows, key) for rows in (4, 16) for key in ("base_compiled", "compiled:5")]  # of one pair alone
ROWS_OF = {"qwen3": ROWS, "olmo2": ROWS | set(COMPILED_BATCHES)}


def run(folder, *more):
    return benchmark_speed.main(["--preset", "h100", "--shrink", "--device", "cpu", "--output", str(folder), *more])


def rows_of(folder):
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return [(record["batch_size"], record["method"]) for record in map(json.loads, lines)]


def test_both_pairs_have_all_rows_and_the_base_comes_first():
    assert [pair.name for pair in H100.pairs] == ["qwen3", "olmo2"]
    for pair in H100.pairs:
        keys = [(row.batch_size, row.key) for row in pair.rows]
        assert set(keys) == ROWS_OF[pair.name]
        assert len(keys) == len(ROWS_OF[pair.name])
        for size in (1, 4, 16):
            assert next(key for rows, key in keys if rows == size) == "base"


def test_all_but_the_last_compiled_rows_are_planned_within_nine_minutes():
    rows = [row.seconds for pair in H100.pairs for row in pair.rows]
    loading = sum(pair.loading_seconds for pair in H100.pairs)
    default = benchmark_speed.PresetArguments(preset="h100").time_limit
    assert default == 540
    assert loading + sum(rows[:-6]) <= default - RESERVE
    last = [(row.batch_size, row.key) for row in H100.pairs[1].rows[-6:]]
    assert last == [(1, "base_compiled"), (1, "compiled:5"), *COMPILED_BATCHES]


@pytest.mark.parametrize(
    ("pair", "billions"), [(H100.pairs[0], (14.77, 1.72)), (H100.pairs[1], (13.72, 1.48))], ids=lambda x: str(x)[:20]
)
def test_the_architectures_have_the_sizes_of_the_models(pair, billions):
    sizes = []
    for config in (pair.base, pair.proxy):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
        sizes.append(model.num_parameters() / 1e9)
    assert sizes == pytest.approx(billions, abs=0.01)
    assert 2 * sum(sizes) * 1e9 < 0.6 * H100.gibibytes * 2**30


def test_the_plan_says_when_each_row_ends():
    said = []
    log_plan(H100, 540, said.append)
    assert said[0] == "Plan, in seconds from the beginning, of 510 in all (and 30 for the rest):"
    assert said[1:3] == [
        "  qwen3: models 20",
        "    batch 1: base 29, token_by_token 41, speculative:3 50, speculative:5 59, speculative:8 69, auto 78, "
        "base_compiled 158, compiled:5 288",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_a_run_that_is_cut_keeps_its_rows_and_the_next_one_does_the_rest(tmp_path, monkeypatch, capsys):
    measure, begun = preset_runs.measure_method, []

    def cut(runner, workload, method, **options):
        begun.append((runner.rows, method.key))
        if len(begun) == 4:
            raise KeyboardInterrupt
        return measure(runner, workload, method, **options)

    monkeypatch.setattr(preset_runs, "measure_method", cut)
    assert run(tmp_path) == 130
    assert rows_of(tmp_path / "qwen3") == begun[:3]
    report = json.loads((tmp_path / "qwen3" / "speed.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["base", "token_by_token", "speculative:3"]
    threshold = report["rule"]["parameters"]["threshold"]

    assert run(tmp_path) == 0
    assert begun[4:] == [(row.batch_size, row.key) for row in H100.pairs[0].rows[3:]] + [
        (row.batch_size, row.key) for row in H100.pairs[1].rows
    ]
    assert "All rows are measured." in capsys.readouterr().err
    for pair in H100.pairs:
        folder = tmp_path / pair.name
        assert rows_of(folder) == [(row.batch_size, row.key) for row in pair.rows]
        report = json.loads((folder / "speed.json").read_text())
        assert {(row["batch_size"], row["method"]) for row in report["rows"]} == ROWS_OF[pair.name]
        for row in report["rows"]:
            assert (row["failed"], row["repetitions"]) == (0, 1)
            assert row["ratio"][1] > 0
            assert (row["bound"] is None) == ("compiled" in row["method"])
        assert report["settings"]["deferral_mass"] == 0.8
        assert "compiled is ×" not in (folder / "speed.md").read_text()
        assert "KAD speculative, compiled, γ = 5 is ×" in (folder / "speed.md").read_text()
        names = {path.name for path in (folder / "plots").iterdir()}
        assert {"batch_size.svg", "draft_length_batch_1.png"} <= names
    report = json.loads((tmp_path / "qwen3" / "speed.json").read_text())
    assert report["rule"]["parameters"]["threshold"] == pytest.approx(threshold, rel=1e-3)

    monkeypatch.setattr(preset_runs, "make_subject", None)  # what is measured needs no models
    assert run(tmp_path) == 0
    assert len(begun) == 4 + 3 + sum(map(len, ROWS_OF.values())) - 6


@pytest.mark.slow
def test_rows_that_are_planned_to_end_too_late_are_left_to_the_next_run(tmp_path, monkeypatch, capsys):
    now, times = [100.0], [[model, 1, 1, [0.1]] for model in ("base", "proxy")]
    monkeypatch.setattr(preset_runs, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def measure(runner, workload, method, **options):
        now[0] += 9
        run = {"seconds": 1.0, "tokens": 8, "memory": 1, "forwards": {"base": 8}, "counts": [["base", 1, 1, 8]]}
        run |= {"prefills": [], "inside": None, "prompt_tokens": 6}
        return {"batch_size": runner.rows, "method": method.key, "load": None, "forwards": times, "runs": [run]}

    monkeypatch.setattr(preset_runs, "measure_method", measure)
    assert run(tmp_path, "--time_limit", "111") == 0
    # 81 s for rows, each of which takes 9.
    assert rows_of(tmp_path / "qwen3") == [
        *((1, key) for key in ("base", "token_by_token", "speculative:3", "speculative:5", "speculative:8", "auto")),
        *((4, key) for key in ("base", "speculative:5")),
        (16, "base"),
    ]
    assert not (tmp_path / "olmo2" / "speed.json").exists()
    said = capsys.readouterr().err
    assert "qwen3, batch 1, base alone, compiled: left out, since 80 s are planned and 27 are left" in said
    assert "qwen3, batch 4, KAD speculative, γ auto: left out, since 11 s are planned and 9 are left" in said
    assert f"{sum(map(len, ROWS_OF.values())) - 9} rows are left: the same command measures them." in said


def test_rows_without_their_base_are_not_reported():
    run = {"tokens": 1}
    records = [
        {"batch_size": 1, "method": "base", "load": 1.0, "forwards": [["base", 1, 1, [0.1]]], "runs": [run, run]},
        {"batch_size": 1, "method": "auto", "load": 3.0, "forwards": [["proxy", 1, 1, [0.1]]], "runs": [run, run]},
        {"batch_size": 4, "method": "auto", "load": None, "forwards": [], "runs": [run, run]},
    ]
    repetitions = as_repetitions(records)
    assert [(one["batch_size"], one["repetition"], one["load"]) for one in repetitions] == [(1, 0, 3.0), (1, 1, 3.0)]
    assert [one["forwards"] for one in repetitions] == [[["base", 1, 1, [0.1]], ["proxy", 1, 1, [0.1]]], []]
    assert [list(one["runs"]) for one in repetitions] == [["base", "auto"]] * 2


# --- What is refused -------------------------------------------------------------------------------------------


def refused(capsys, *words):
    assert benchmark_speed.main(["--preset", "h100", *words]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_it_needs(tmp_path, capsys):
    message = refused(capsys, "--output", str(tmp_path / "out"))
    assert message.startswith(
        "error: --preset h100 needs a CUDA GPU with at least 70 GiB of memory, got the device 'cpu'"
    )
    assert "--shrink" in message
    assert not (tmp_path / "out").exists()


def test_a_small_gpu_is_named(monkeypatch, capsys):
    card = SimpleNamespace(name="Some card", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert "at least 70 GiB of memory, got Some card with 24 GiB" in refused(capsys, "--device", "cuda")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--methods", "auto"), "methods"),
        (("--base", "gpt2"), "base"),
        (("--rule", "primal"), "rule"),
        (("--batch_size", "8"), "batch_size"),
        (("--dtype", "float32"), "dtype"),
    ],
)
def test_what_the_preset_chooses_is_refused(words, option, capsys):
    message = refused(capsys, "--shrink", "--device", "cpu", *words)
    assert message == f"error: --preset h100 chooses --{option} itself: leave it out."


def test_options_of_presets_need_one():
    with pytest.raises(ValueError, match="--shrink goes with --preset"):
        benchmark_speed.PresetArguments(shrink=True)
    with pytest.raises(ValueError, match="--time_limit must be more than 30 seconds, got 30"):
        benchmark_speed.PresetArguments(preset="h100", time_limit=30)
