"""`run_eval.py` beyond accuracy: a finished run gets its figures without decoding again, and open tasks run."""

import json
import math
import shutil
from pathlib import Path

import pytest
import run_eval
import torch
import tune
from command_lines import error_of
from test_ifeval import punkt  # noqa: F401
from test_run_eval import PAIR, ROOT, run
from transformers import LlamaConfig, LlamaForSequenceClassification

from transformers_kad.integrations.loading.models import load_tokenizer
from transformers_kad.recipes.evaluation.decoding import Decoder
from transformers_kad.recipes.evaluation.judge import Judge
from transformers_kad.recipes.evaluation.kept_scores import PromptedText
from transformers_kad.recipes.evaluation.report import to_markdown
from transformers_kad.recipes.evaluation.tasks import get_task

FIXTURES = ROOT / "tests" / "recipes" / "evaluation" / "fixtures"
JUDGE = str(PAIR / "aligned")
ASKED = ["--limit", "12", "--no_speculative", "--method", "base", "proxy", "kad-dual:threshold=0.7"]


def report_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run without quality."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_eval.main([*ASKED, "--output", str(folder)]) == 0
    assert "quality" not in report_of(folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path, monkeypatch):
    """A copy of it, in which nothing may be decoded."""
    monkeypatch.setattr(Decoder, "answer", lambda *_, **__: pytest.fail("an answer was decoded again"))
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A reward model with random weights."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = load_tokenizer(PAIR / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, initializer_range=0.5, **sizes
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_finished_run_gets_the_quality_of_its_texts_without_decoding_again(copy, capsys):
    before = (copy / "results.jsonl").read_bytes()
    assert run_eval.main([*ASKED, "--output", str(copy), "--quality", "--judge", JUDGE]) == 0
    assert (copy / "results.jsonl").read_bytes() == before
    report = report_of(copy)
    quality = report["quality"]["tiny"]
    figures = {row["method"]: row["figures"] for row in quality["rows"]}
    dual, proxy = figures["kad-dual threshold=0.7"], figures["proxy"]
    assert 1 < dual["perplexity"]["value"] < proxy["perplexity"]["value"] < figures["base"]["perplexity"]["value"]
    assert proxy["in_form"]["value"] == 1 and figures["base"]["ended"]["value"] == 0
    assert figures["base"]["tokens"]["value"] == 48
    assert quality["judge"] == JUDGE
    (found,) = (
        c
        for c in quality["comparisons"]
        if c["figure"] == "in_form" and (c["method_a"], c["method_b"]) == ("base", "proxy")
    )
    assert (found["difference"], found["p_value"]) == (-1, 2 / 2**12)
    tables = to_markdown(report)
    assert tables in capsys.readouterr().out
    assert (copy / "summary.md").read_text() == tables


def test_the_perplexity_is_that_of_the_kept_scores_and_no_text_is_scored_twice(copy, monkeypatch):
    asked = [*ASKED, "--output", str(copy), "--judge", JUDGE]  # which implies --quality
    assert run_eval.main(asked) == 0
    first = report_of(copy)
    (file,) = (copy / "quality").glob("judge-*.jsonl")
    scores = [json.loads(line) for line in file.read_text().splitlines()]
    texts = {json.loads(line)["text"] for line in (copy / "results.jsonl").read_text().splitlines()}
    assert len({score["key"] for score in scores}) == len(scores) >= len(texts)
    monkeypatch.setattr(Judge, "load", lambda *_: pytest.fail("the judge was loaded again"))
    assert run_eval.main(asked) == 0
    assert report_of(copy)["quality"] == first["quality"]
    rows = [json.loads(line) for line in (copy / "results.jsonl").read_text().splitlines()]
    only = [row for row in rows if row["method"] == "proxy"]
    nll = {score["key"]: score for score in scores}
    own = [nll[key] for key in keys_of(only)]
    (row,) = (row for row in first["quality"]["tiny"]["rows"] if row["method"] == "proxy")
    expected = math.exp(sum(score["nll"] for score in own) / sum(score["tokens"] for score in own))
    assert row["figures"]["perplexity"]["value"] == pytest.approx(expected)


def keys_of(rows):
    """The keys under which the scores of some records are kept."""
    task = get_task("tiny")
    prompts = {one.id: task.messages(one) for one in task.load(limit=12)}
    return [PromptedText(prompts[row["instance"]], row["text"]).key for row in rows]


def test_without_a_judge_the_other_figures_are_shown_and_it_is_said(copy, capsys):
    assert run_eval.main([*ASKED, "--output", str(copy), "--quality"]) == 0
    out = capsys.readouterr().out
    assert "no judge, so there is no perplexity (--judge)" in out
    assert "| method | in form | ended | tokens | distinct-1 |" in out
    assert not (copy / "quality").exists()


def test_the_aligned_model_is_the_judge_unless_another_is_named(copy, capsys):
    assert run_eval.main([*ASKED, "--output", str(copy), "--quality", "--aligned", JUDGE]) == 0
    assert report_of(copy)["quality"]["tiny"]["judge"] == JUDGE
    base = str(PAIR / "base")
    assert run_eval.main([*ASKED, "--output", str(copy), "--judge", base, "--aligned", JUDGE]) == 0
    assert report_of(copy)["quality"]["tiny"]["judge"] == base
    assert "Note: the judge is the base itself." in capsys.readouterr().out
    assert len(list((copy / "quality").glob("judge-*.jsonl"))) == 2


def test_a_reference_method_is_what_the_others_are_compared_with(copy, reward_model, capsys):
    asked = [*ASKED, "--output", str(copy), "--reward_model", reward_model]
    assert run_eval.main([*asked, "--reference_method", "proxy"]) == 0
    quality = report_of(copy)["quality"]["tiny"]
    assert [(p["method_a"], p["method_b"]) for p in quality["preferences"]] == [
        ("base", "proxy"),
        ("kad-dual threshold=0.7", "proxy"),
    ]
    out = capsys.readouterr().out
    assert "| preferred to proxy | wins | ties | losses | win rate | p | p (Holm) |" in out
    assert "| proxy minus | reward |" in out
    assert run_eval.main(asked) == 0
    assert len(report_of(copy)["quality"]["tiny"]["preferences"]) == 3
    # Another orientation of a pair: the table shows the wins of its row.
    out = capsys.readouterr().out
    (pair,) = (
        p
        for p in report_of(copy)["quality"]["tiny"]["preferences"]
        if (p["method_a"], p["method_b"]) == ("base", "proxy")
    )
    assert run_eval.main([*asked, "--reference_method", "base"]) == 0
    out = capsys.readouterr().out
    assert f"| proxy | {pair['losses']} | {pair['ties']} | {pair['wins']} | {1 - pair['win_rate']:.3f} (" in out


def test_prompts_of_one_s_own_with_preferences(tmp_path, reward_model, capsys):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Mia has {n} apples. Jon brings 5 more. How many apples are there?"} for n in range(10, 18)]
    rows[0]["reference"] = "We get 10 + 5 = 15. The answer is 15."
    prompts.write_text("\n".join(map(json.dumps, rows)))
    asked = ["--task", "chat", "--prompts", str(prompts), "--max_new_tokens", "24", "--no_speculative"]
    asked += ["--method", "base", "kad-dual", "--output", str(tmp_path / "out"), "--reward_model", reward_model]
    assert run_eval.main([*asked, "--judge", JUDGE]) == 0
    out = capsys.readouterr().out
    assert "accuracy" not in out
    report = report_of(tmp_path / "out")
    assert [row["accuracy"] for row in report["rows"]] == [None, None]
    assert report["comparisons"] == []
    quality = report["quality"]["chat"]
    (preference,) = quality["preferences"]
    assert preference["wins"] + preference["ties"] + preference["losses"] == 8
    assert quality["rows"][0]["figures"]["rouge1"]["instances"] == 1
    rewards = {row["method"]: row["figures"]["reward"]["value"] for row in quality["rows"]}
    assert quality["reference"] == max(rewards, key=rewards.get)
    assert not list((tmp_path / "out").glob("plots/*accuracy*"))


def test_instructions_have_accuracy_by_prompt_and_by_instruction(tmp_path, capsys):
    asked = ["--task", "instructions", "--limit", "5", "--max_new_tokens", "8", "--no_speculative", "--quality"]
    assert run_eval.main([*asked, "--method", "base", "--output", str(tmp_path)]) == 0
    report = report_of(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    (row,) = report["rows"]
    assert row["accuracy"] == sum(all(line["followed"]) for line in lines) / 5
    (quality,) = report["quality"]["instructions"]["rows"]
    followed = [one for line in lines for one in line["followed"]]
    assert quality["figures"]["instructions"]["value"] == pytest.approx(sum(followed) / len(followed))


@pytest.mark.usefixtures("punkt")
@pytest.mark.parametrize("task", ["ifeval", "cnn_dailymail"])
def test_a_public_task_runs_end_to_end_on_local_files(task, tmp_path, capsys):
    asked = ["--task", task, "--data_dir", str(FIXTURES), "--limit", "4", "--max_new_tokens", "8", "--quality"]
    asked += ["--method", "base", "kad-dual", "--no_speculative", "--output", str(tmp_path)]
    assert run_eval.main(asked) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert f"**{task}**, 4 instances" in out
    assert ("ROUGE-L" if task == "cnn_dailymail" else "instructions") in out


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(finished, tmp_path):
    asked = [*ASKED, "--judge", JUDGE]
    for name in ("one", "two"):
        shutil.copytree(finished, tmp_path / name)
    assert run_eval.main([*asked, "--output", str(tmp_path / "one")]) == 0
    run(tmp_path / "two", *asked, processes=2)
    one, two = (report_of(tmp_path / name)["quality"]["tiny"] for name in ("one", "two"))
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["figures"]["perplexity"]["value"] == pytest.approx(b["figures"]["perplexity"]["value"], rel=1e-4)
    files = [next((tmp_path / name / "quality").glob("judge-*.jsonl")) for name in ("one", "two")]
    keys = [[json.loads(line)["key"] for line in file.read_text().splitlines()] for file in files]
    assert keys[0] == keys[1]
    assert not list((tmp_path / "two" / "quality").glob("*.part*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chat"], "The task 'chat' needs --prompts"),
        (["--prompts", "x.jsonl"], "--prompts 'x.jsonl' is for the tasks instructions or chat, got --task tiny"),
        (["--judge", "./nowhere"], "Folder not found: './nowhere'"),
        (["--reward_model", str(PAIR / "base")], "has 2 labels, but a reward is a single number"),
        (
            ["--quality", "--reference_method", "nudging"],
            "--reference_method must be one of 'base', 'proxy', 'kad-dual",
        ),
        (["--judge_batch_size", "0"], "--judge_batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path, capsys):
    error = error_of(run_eval.main, ["--limit", "2", "--output", str(tmp_path / "out"), *arguments], capsys)
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_task_without_right_answers_can_t_be_tuned(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\n")
    asked = ["--task", "chat", "--prompts", str(prompts), "--trials", "1", "--output", str(tmp_path / "out")]
    assert tune.main(asked) == 2
    assert "The task 'chat' has no right answers, so accuracy can't be tuned" in capsys.readouterr().err


def test_the_page_has_the_quality_of_every_method_of_its_command():
    """That its tables are those of the report is tested with the other tables of the page."""
    report = report_of(ROOT / "recipes" / "results" / "tiny_pair")
    quality = report["quality"]["tiny"]
    assert quality["judge"] == "recipes/tiny_pair/aligned"
    assert [row["method"] for row in quality["rows"]] == [row["method"] for row in report["rows"]]
    figures = {row["method"].split()[0]: row["figures"] for row in quality["rows"]}
    perplexity = {name: one["perplexity"]["value"] for name, one in figures.items()}
    assert 1 <= perplexity["kad-dual"] < perplexity["nudging"] < perplexity["proxy"] < perplexity["base"]
    assert figures["base"]["in_form"]["value"] == 0
    assert all(row["figures"]["perplexity"]["instances"] == 500 for row in quality["rows"])
