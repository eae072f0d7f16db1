"""The tuning recipe on the tiny pair: as good as the grid, taken up again, and a configuration that loads."""

import json
import shutil
from pathlib import Path

import pytest
import run_eval
import tune
from command_lines import error_of

from transformers_kad import KADConfig

ROOT = Path(__file__).resolve().parents[3]
ASKED = ("--split", "validation", "--limit", "100", "--no_speculative", "--batch_size", "50", "--goal", "accuracy")
# On 300 problems the accuracy of a good setting has a standard error of 0.013, and so has the best of the grid.
MARGIN = 0.04


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    output = tmp_path_factory.mktemp("tuned")
    assert tune.main([*ASKED, "--output", str(output), "--trials", "40", "--seed", "0"]) == 0
    return output


@pytest.mark.slow
def test_forty_trials_find_what_the_full_grid_finds(tuned, tmp_path):
    """Judged on the test problems, seed 1; the search saw 100 validation problems."""
    grid = "kad-dual:threshold=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"
    arguments = ["--limit", "300", "--no_speculative", "--batch_size", "100", "--seed", "1"]
    methods = ["--method", grid, "config", "--config", str(tuned)]
    assert run_eval.main([*arguments, *methods, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    (found,) = (row["accuracy"] for row in rows if row["name"] == "config")
    measured = [row["accuracy"] for row in rows if row["name"] == "kad-dual"]
    assert len(measured) == 9
    assert min(measured) < max(measured) - 0.3  # the grid holds bad settings as well
    assert found >= max(measured) - MARGIN


@pytest.mark.slow
def test_every_trial_and_the_front_are_written_down_and_plotted(tuned):
    result = json.loads((tuned / "tuning.json").read_text())
    assert result["goal"]["speed"] is False
    assert len(result["trials"]) == 40
    states = {trial["state"] for trial in result["trials"]}
    assert states == {"complete", "pruned"}
    best = max(trial["accuracy"] for trial in result["trials"] if trial["accuracy"] is not None)
    assert {trial["accuracy"] for trial in result["front"]} == {best}
    config = KADConfig.from_pretrained(tuned)
    assert config.parameters["threshold"] == result["front"][0]["parameters"]["threshold"]
    assert config.base.endswith("base")
    assert {path.suffix for path in (tuned / "plots").iterdir()} == {".png", ".svg"}


@pytest.mark.slow
def test_a_finished_search_is_gone_on_with_under_the_same_settings_only(tuned, tmp_path, capsys):
    copy = shutil.copytree(tuned, tmp_path / "copy")
    before = json.loads((copy / "tuning.json").read_text())["trials"]
    assert tune.main([*ASKED, "--output", str(copy), "--trials", "41"]) == 0
    after = json.loads((copy / "tuning.json").read_text())["trials"]
    assert after[:40] == before
    assert len(after) == 41
    kept = (copy / "tuning.json").read_bytes()
    for changed in (["--min_speedup", "0.1"], ["--limit", "50"], ["--rules", "kad-dual", "nudging"]):
        assert tune.main([*ASKED, "--output", str(copy), "--trials", "42", *changed]) == 2
        differing = {
            "--min_speedup": "goal is",
            "--limit": "instances is 100 there and 50 here",
            "--rules": "rules is",
        }
        assert differing[changed[0]] in capsys.readouterr().err
    assert (copy / "tuning.json").read_bytes() == kept


@pytest.mark.slow
def test_a_goal_out_of_reach_is_said_and_writes_no_configuration(tmp_path, capsys):
    arguments = ["--split", "validation", "--limit", "4", "--goal", "accuracy", "--min_speedup", "1000"]
    assert tune.main([*arguments, "--output", str(tmp_path), "--trials", "2", "--draft_lengths", "2", "3"]) == 1
    assert "None of 2 settings" in capsys.readouterr().out
    assert not (tmp_path / "kad_config.json").exists()
    methods = [trial["method"] for trial in json.loads((tmp_path / "tuning.json").read_text())["trials"]]
    assert all("num_assistant_tokens=" in method for method in methods)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "0"], "--trials must be at least 1, got 0"),
        (["--draft_lengths", "3"], "takes the shortest and the longest, got [3]"),
        (["--goal", "both", "--min_speedup", "2"], "goes with the goal accuracy alone"),
        (["--task", "tiny", "gsm8k"], "needs exactly one task"),
        (["--rules", "base"], "got 'base'"),
        (["--draft_lengths", "2", "4", "--no_speculative"], "have no effect with --no_speculative"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path, capsys):
    assert message in error_of(tune.main, [*arguments, "--limit", "2", "--output", str(tmp_path)], capsys)


def row(number, method, parameters, accuracy=0.5, speedup=1.5):
    interval = None if accuracy is None else (0.25, 0.75)
    return {
        "trial": number,
        "method": f"{method} {parameters}",
        "name": method,
        "parameters": parameters,
        "accuracy": accuracy,
        "interval": interval,
        "speedup": speedup,
    }


def test_settings_of_other_draft_lengths_are_groups_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tune, "plot_accuracy_speed", lambda points, stem: (drawn.extend(points), [stem])[1])
    monkeypatch.setattr(tune, "plot_accuracy_parameter", lambda points, stem: [stem])
    trials = [
        row(0, "kad-dual", {"threshold": 0.1}),
        row(1, "kad-dual", {"threshold": 0.2, "num_assistant_tokens": 2}),
        row(2, "kad-dual", {"threshold": 0.3, "num_assistant_tokens": 2}),
        row(3, "nudging", {"threshold": 0.3}),
        row(4, "nudging", {"threshold": 0.4}, accuracy=None, speedup=None),  # given up
        row(5, "nudging", {"threshold": 0.5}, speedup=0.0),  # every answer failed
    ]
    assert len(tune.plot({"trials": trials, "base_tokens_per_second": 10.0}, tmp_path)) == 2
    assert [(point.group, point.value) for point in drawn] == [
        ("kad-dual", 0.1),
        ("kad-dual, draft 2", 0.2),
        ("kad-dual, draft 2", 0.3),
        ("nudging", 0.3),
    ]
    assert {point.tokens_per_second for point in drawn} == {15.0}
    assert tune.plot({"trials": trials[4:], "base_tokens_per_second": 10.0}, tmp_path) == []


def searched(folder, *methods):
    """A study with a finished trial of each threshold."""
    study = tune.open_study(folder, tune.Goal(speed=False), seed=0)
    for threshold in methods:
        trial = study.ask()
        trial.suggest_categorical("method", ["kad-dual"])
        trial.suggest_float("kad-dual.threshold", threshold, threshold, step=0.01)
        trial.set_user_attr("method", tune.method_of(trial.params).label)
        trial.set_user_attr("accuracy", 0.5)
        trial.set_user_attr("speedup", 1.5)
        study.tell(trial, 0.5)
    study.set_user_attr("settings", {"goal": {"accuracy": True, "speed": False}})
    return study


def test_a_study_is_opened_again(tmp_path):
    searched(tmp_path, 0.3, 0.4)
    assert len(tune.open_study(tmp_path, tune.Goal(speed=False), seed=0).trials) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b"no database"),
        lambda path: path.write_bytes(path.read_bytes().replace(b'settings{"goal"', b'setzings{"goal"')),
        lambda path: path.write_bytes(path.read_bytes().replace(b"accuracy", b"accurazy")),
        lambda path: path.write_bytes(path.read_bytes().replace(b"threshold=0.3", b"threshold=0.9")),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_study_is_named_with_what_to_do(tmp_path, damage):
    searched(tmp_path, 0.3)
    damage(tmp_path / "study.db")
    with pytest.raises(ValueError, match=r"study\.db' can't be read: .*Move the file away"):
        tune.open_study(tmp_path, tune.Goal(speed=False), seed=0)


@pytest.mark.parametrize(
    ("accuracy", "speed", "front", "said"),
    [
        (True, False, 1, "Of 4 settings on 8 questions, the most accurate:"),
        (True, False, 3, "Of 4 settings on 8 questions, 3 tie for the most accurate, the fastest of them first:"),
        (False, True, 1, "Of 4 settings on 8 questions, the fastest:"),
        (True, True, 2, "Of 4 settings on 8 questions, the Pareto front of accuracy and tokens/s, "),
    ],
)
def test_ties_are_said(accuracy, speed, front, said):
    result = {"trials": [None] * 4, "front": [None] * front, "instances": 8}
    assert tune.headline(result | {"goal": {"accuracy": accuracy, "speed": speed}}).startswith(said)
