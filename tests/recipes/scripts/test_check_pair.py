"""The check on the tiny pair, on pairs that are bad on purpose, and on input that is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import check_pair
import pytest
import run_eval
import torch
from command_lines import error_of
from run_command import SECONDS

from transformers_kad import DualDeferral, KADConfig
from transformers_kad.integrations.loading import load_model, load_tokenizer
from transformers_kad.recipes.pair_check import session
from transformers_kad.recipes.pair_check.bad_pairs import save_other_family, save_random_weights
from transformers_kad.recipes.word_problems import make_problems

ROOT = Path(__file__).resolve().parents[3]
PAIR = ROOT / "recipes" / "tiny_pair"
FEW = ("--limit", "20", "--max_new_tokens", "40", "--method", "kad-primal:budget=0.8", "kad-paced:budget=0.2")
FEWER = ("--limit", "8", "--max_new_tokens", "24", "--method", "kad-primal:budget=0.8")
QUESTIONS = [problem.question for problem in make_problems("validation", 20)]


def report_of(folder):
    return json.loads((folder / "check.json").read_text())


def names_of(report, level):
    return [finding["name"] for finding in report["findings"] if finding["level"] == level]


def check(output, *arguments, base=PAIR / "base", proxy=PAIR / "proxy", settings=FEW):
    """The report on a pair, on word problems."""
    output.mkdir(exist_ok=True)
    prompts = output / "questions.txt"
    prompts.write_text("\n".join(QUESTIONS) + "\n")
    words = ["--base", str(base), "--proxy", str(proxy), "--prompts", str(prompts), "--output", str(output)]
    assert check_pair.main([*words, *settings, *arguments]) == 0
    return report_of(output)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    check(folder, "--save_config", str(folder / "start"))
    return folder


# --- The tiny pair --------------------------------------------------------------------------------------------


def test_the_tiny_pair_is_doubtful_for_the_share_of_its_proxy_alone(tiny):
    report = report_of(tiny)
    assert report["verdict"] == "doubtful"
    assert names_of(report, "doubtful") == ["takes_over"]
    (reason,) = report["reasons"]
    assert re.search(r"The proxy takes over \d\d% of the tokens .*pairs above about 20% often fail", reason)
    assert report["compatibility"]["vocabulary"]["difference"] is None
    assert report["figures"]["prompts"] == 20


def test_what_is_recommended_can_be_used(tiny):
    recommended = report_of(tiny)["recommended"]
    config = KADConfig.from_pretrained(tiny / "start")
    assert KADConfig(recommended["rule"], recommended["parameters"]).make_rule() == config.make_rule()
    assert isinstance(config.make_rule(), DualDeferral)
    assert [Path(name).name for name in (config.base, config.proxy)] == ["base", "proxy"]
    low, high = recommended["deferral_mass_interval"]
    assert 0 < low < recommended["deferral_mass"] < high < 1


def test_the_figures_of_the_rules_are_consistent(tiny):
    rules = report_of(tiny)["figures"]["rules"]
    dual = [rule for rule in rules if rule["rule"] == "dual"]
    masses = [rule["deferral_mass"] for rule in dual]
    assert masses == sorted(masses) and masses[0] < masses[-1]
    for rule in rules:
        assert rule["deferral_mass"] <= rule["acceptance"] + 1e-6  # Σ min(q, r) >= D
        assert 1 <= rule["tokens_per_round"] <= 6
        assert rule["speed_up"] > 0
    assert {rule["rule"] for rule in rules} == {"dual", "primal", "paced"}


@pytest.mark.slow
def test_the_expected_figures_are_those_of_decoding(tiny, tmp_path):
    """Acceptance and mass of the rule that wrote the texts, against speculative decoding of other samples."""
    (expected,) = (rule for rule in report_of(tiny)["figures"]["rules"] if rule["parameters"].get("threshold") == 0.5)
    arguments = ["--task", "tiny", "--split", "validation", "--limit", "60", "--method", "kad-dual:threshold=0.5"]
    assert run_eval.main([*arguments, "--output", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert expected["deferral_mass"] == pytest.approx(row["deferral_mass"], abs=0.03)
    assert expected["tokens_per_round"] == pytest.approx(row["tokens_per_round"], abs=0.3)


def test_plots_and_the_summary_are_written(tiny, capsys):
    assert (tiny / "check.png").read_bytes().startswith(b"\x89PNG")
    assert "start: kad-dual" in (tiny / "check.svg").read_text()
    assert (tiny / "check.md").read_text().startswith("Verdict: **doubtful**")


@pytest.mark.slow
def test_the_recommendation_is_as_accurate_as_the_best_setting_of_the_grid(tiny, tmp_path):
    """Confidence bet with margin 0.1 has the highest accuracy of the grid of sweep.py, on 300 validation problems.

    The test problems are others. A primal rule, which is worse there, shows that the comparison can tell.
    """
    methods = ["config", "confidence-bet:margin=0.1", "kad-primal:budget=0.8"]
    arguments = ["--task", "tiny", "--limit", "300", "--no_speculative", "--batch_size", "100"]
    arguments += ["--config", str(tiny / "start"), "--pair", str(PAIR), "--method", *methods]
    assert run_eval.main([*arguments, "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "summary.json").read_text())
    accuracy, labels = ({row["name"]: row[key] for row in report["rows"]} for key in ("accuracy", "method"))
    p_values = {frozenset((c["method_a"], c["method_b"])): c["p_value"] for c in report["comparisons"]}
    chosen, best, primal = (labels[name] for name in ("config", "confidence-bet", "kad-primal"))
    assert accuracy["config"] >= accuracy["confidence-bet"] or p_values[frozenset((chosen, best))] > 0.05
    assert accuracy["config"] > accuracy["kad-primal"]
    assert p_values[frozenset((chosen, primal))] < 0.001


# --- Bad pairs ------------------------------------------------------------------------------------------------


def test_a_proxy_of_random_weights_is_bad(tmp_path):
    proxy = save_random_weights(PAIR / "proxy", PAIR / "reference", tmp_path / "random")
    report = check(tmp_path / "out", proxy=proxy, settings=FEWER)
    assert report["verdict"] == "bad"
    assert names_of(report, "bad")[:2] == ["proxy_knows", "contradicts"]
    assert report["reasons"][0].startswith("The proxy predicts the prompts hardly better than chance")


@pytest.mark.slow
def test_a_proxy_of_another_family_is_bad(tmp_path):
    """Trained on texts of another kind, with a tokenizer of its own."""
    proxy = save_other_family(tmp_path / "other", steps=40)
    report = check(tmp_path / "out", proxy=proxy, settings=FEWER)
    assert report["verdict"] == "bad"
    assert names_of(report, "bad")[0] == "vocabulary"
    assert {"unknown_tokens", "contradicts"} <= {*names_of(report, "bad")}  # seen in the texts as well
    assert report["reasons"][0].startswith("Base and proxy have different tokenizers")


@pytest.mark.parametrize("proxy", ["base", "a copy"])
def test_the_base_as_its_own_proxy_is_bad(proxy, tmp_path):
    folder = PAIR / "base"
    if proxy == "a copy":
        folder = Path(shutil.copytree(folder, tmp_path / "copy"))
    report = check(tmp_path / "out", proxy=folder, settings=FEWER)
    assert report["verdict"] == "bad"
    assert names_of(report, "bad") == ["same_model"]
    assert report["reasons"][0].startswith("Base and proxy are the same model")


def test_tokenizers_that_share_too_little_end_the_check_before_models_are_loaded(tmp_path, monkeypatch, capsys):
    proxy = Path(shutil.copytree(PAIR / "base", tmp_path / "proxy"))
    tokenizer = json.loads((proxy / "tokenizer.json").read_text())
    kept = {token for token in tokenizer["model"]["vocab"] if len(token) == 1}
    names = [token["content"] for token in tokenizer["added_tokens"]]
    tokenizer["model"]["vocab"] = {
        name: at for at, name in enumerate([*names, *sorted(kept - {*names}, reverse=True)])
    }
    tokenizer["model"]["merges"] = []
    (proxy / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr(session, "Pair", None)
    report = check(tmp_path / "out", "--save_config", str(tmp_path / "start"), proxy=proxy)
    assert report["verdict"] == "bad"
    assert names_of(report, "bad") == ["vocabulary"]
    assert re.search(r"different tokenizers, which share only \d+% of the tokens of the prompts", report["reasons"][0])
    assert report["recommended"] is report["figures"] is None
    assert not (tmp_path / "start").exists()
    assert "there is no rule to save" in capsys.readouterr().err


def permuted_proxy(folder):
    """The tiny proxy, merged, with the ids of its tokens in another order, so that it has another tokenizer."""
    model, special = load_model(PAIR / "proxy"), 4
    size = model.config.vocab_size
    order = [*range(special), *reversed(range(special, size))]  # the new id of each old one, and vice versa
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.copy_(layer.weight[order])
    model.save_pretrained(folder)
    load_tokenizer(PAIR / "proxy").save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: order[index] for token, index in tokenizer["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.slow
def test_a_proxy_with_other_ids_for_the_same_tokens_has_the_same_figures(tiny, tmp_path):
    report, expected = check(tmp_path / "out", proxy=permuted_proxy(tmp_path / "permuted")), report_of(tiny)
    assert names_of(report, "doubtful") == ["vocabulary_aligned", "takes_over"]
    assert report["compatibility"]["vocabulary"]["shares"] == 1
    own, other = (each["figures"] for each in (report, expected))
    assert own["prompts_predicted"] == pytest.approx(other["prompts_predicted"], rel=1e-4)
    assert own["texts"]["kad"] == pytest.approx(other["texts"]["kad"], rel=1e-3)
    for rule, same in zip(own["rules"], other["rules"], strict=True):
        assert rule["deferral_mass"] == pytest.approx(same["deferral_mass"], rel=1e-3)
        assert rule["acceptance"] == pytest.approx(same["acceptance"], rel=1e-3)


# --- Prompts, folders and stops -------------------------------------------------------------------------------


def without_template(folder, model):
    copy = Path(shutil.copytree(PAIR / model, folder))
    if not (folder.parent / "reference").exists():
        shutil.copytree(PAIR / "reference", folder.parent / "reference")  # on which the adapter was trained
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    return copy


QUICK = ("--limit", "2", "--max_new_tokens", "8", "--method", "kad-primal:budget=0.8")


def test_a_proxy_without_a_template_is_told(tmp_path):
    report = check(tmp_path / "out", proxy=without_template(tmp_path / "proxy", "proxy"), settings=QUICK)
    assert "no_proxy_template" in names_of(report, "doubtful")


def test_a_base_without_a_template_reads_the_proxy_s(tmp_path):
    report = check(tmp_path / "out", base=without_template(tmp_path / "base", "base"), settings=QUICK)
    assert "base_reads_proxy_template" in names_of(report, "note")


def test_templates_that_differ_are_told_unless_the_proxy_reads_its_own(tmp_path):
    proxy = without_template(tmp_path / "proxy", "proxy")
    (proxy / "chat_template.jinja").write_text("<|user|>{{ messages[0].content }}<|assistant|>!")
    report = check(tmp_path / "same", proxy=proxy, settings=QUICK)
    assert "templates_differ" in names_of(report, "doubtful")
    report = check(tmp_path / "own", "--proxy_chat", "yes", proxy=proxy, settings=QUICK)
    assert "templates_differ" not in names_of(report, "doubtful")


def test_the_proxy_reads_a_prompt_of_its_own(tmp_path):
    """With the same template, its own prompt is the base's; with plain text for the base, the figures are others."""
    same = check(tmp_path / "same", settings=FEWER)
    own = check(tmp_path / "own", "--proxy_chat", "yes", settings=FEWER)
    assert own["figures"]["texts"] == same["figures"]["texts"]
    plain = check(tmp_path / "plain", "--chat", "no", "--proxy_chat", "yes", settings=FEWER)
    assert plain["figures"]["texts"]["kad"] != own["figures"]["texts"]["kad"]
    assert plain["figures"]["texts"]["kad"]["ended"] > 0.5  # the proxy still reads the chat on which it was aligned


def test_no_end_of_turn_is_told(tmp_path):
    folders = {}
    for model in ("base", "proxy"):
        folders[model] = without_end(tmp_path / model, model)
    report = check(tmp_path / "out", **folders, settings=QUICK)
    assert "no_end" in names_of(report, "doubtful")


def without_end(folder, model):
    load_model(PAIR / model).save_pretrained(folder)
    tokenizer = load_tokenizer(PAIR / model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, "eos_token_id": None}))
    return folder


def test_texts_of_a_single_token_have_figures(tmp_path):
    report = check(tmp_path, settings=("--limit", "2", "--max_new_tokens", "1", *QUICK[4:]))
    assert [text["tokens_per_text"] for text in report["figures"]["texts"].values()] == [1, 1, 1]
    assert {rule["tokens_per_round"] for rule in report["figures"]["rules"]} == {1}


def test_one_prompt_is_enough_for_figures_and_too_few_for_a_good_verdict(tmp_path):
    report = check(tmp_path, settings=("--limit", "1", *QUICK[2:]))
    assert "few_prompts" in names_of(report, "doubtful")
    low, high = report["recommended"]["deferral_mass_interval"]
    assert low == high


def test_a_prompt_that_is_too_long_is_left_out_and_counted(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("apples " * 5000 + "\n" + QUESTIONS[0] + "\n")
    pair = ["--base", str(PAIR / "base"), "--proxy", str(PAIR / "proxy"), "--prompts", str(prompts)]
    assert check_pair.main([*pair, "--output", str(tmp_path / "out"), *QUICK]) == 0
    report = report_of(tmp_path / "out")
    assert (report["figures"]["prompts"], report["figures"]["failed"]) == (1, 1)
    assert "Line 1 failed: " in capsys.readouterr().err
    prompts.write_text("apples " * 5000 + "\n")
    assert check_pair.main([*pair, "--output", str(tmp_path / "none"), *QUICK]) == 2
    assert "error: Every prompt failed. Line 1: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_check_is_continued_with_the_same_figures(tmp_path):
    whole = check(tmp_path / "whole", settings=FEWER)
    output = tmp_path / "out"
    command = [sys.executable, str(ROOT / "recipes" / "check_pair.py"), "--base", str(PAIR / "base")]
    command += ["--proxy", str(PAIR / "proxy"), "--prompts", str(tmp_path / "whole" / "questions.txt")]
    command += ["--output", str(output), *FEWER]
    texts = output / "texts.jsonl"
    run = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + SECONDS
        while not texts.exists() or texts.read_bytes().count(b"\n") < 3:
            assert run.poll() is None and time.monotonic() < deadline, "the check ended before it could be stopped"
            time.sleep(0.01)
    finally:
        run.kill()
        run.wait(timeout=SECONDS)
    assert not (output / "check.json").exists()
    done = texts.read_bytes()
    assert check_pair.main(command[2:]) == 0
    assert texts.read_bytes().startswith(done[: done.rindex(b"\n")])
    assert report_of(output)["figures"]["texts"] == whole["figures"]["texts"]


def test_another_pair_or_other_prompts_are_refused_in_the_same_folder(tiny, tmp_path, capsys):
    output = Path(shutil.copytree(tiny, tmp_path / "out"))
    before = (output / "check.json").read_bytes()
    words = ["--output", str(output), *FEW]
    assert check_pair.main([*words, "--base", str(PAIR / "base"), "--proxy", str(PAIR / "base")]) == 2
    assert "holds results of a run with other settings: " in capsys.readouterr().err
    assert (output / "check.json").read_bytes() == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompts", "nowhere.jsonl"], "There is no file --prompts 'nowhere.jsonl'"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--num_assistant_tokens", "0"], "--num_assistant_tokens must be at least 1"),
        (["--method", "kad-duel"], "Did you mean 'kad-dual'"),
        (["--method", "implicit-reward"], "--method takes rules that need base and proxy alone"),
        (["--method", "base"], "--method takes rules that need base and proxy alone, got 'base'"),
        (["--template_arguments", "[1]"], "must be a JSON object"),
        (["--base", "nowhere/at/all"], "Base and proxy are needed, got 'nowhere/at/all' and None"),
        (["--pair", "nowhere"], "No pair in 'nowhere'"),
        (["--chat", "yes", "--proxy", "./nowhere", "--base", "./nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = error_of(check_pair.main, words, capsys)
    assert message in error
    assert "Traceback" not in error


def test_a_file_in_place_of_the_output_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        check_pair.main(["--output", str(tmp_path / "file")])
    assert "--output must be a folder, got the file" in capsys.readouterr().err
