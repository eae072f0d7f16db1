"""Preference training on the tiny pair by the recipe. What it shares with fine-tuning is tested there."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import align_dpo
import pytest
import torch
from alignment import BASE, PROXY, REFERENCE, align, logits, preferences, weights, write_lines
from run_command import run_command
from transformers import AutoTokenizer, Trainer

from transformers_kad import KADConfig
from transformers_kad.integrations.loading.models import load_model
from transformers_kad.recipes.training import AlignmentError, trainers

LEARNING = ["--learning_rate", "1e-3", "--batch_size", "8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "preferences.jsonl", preferences(120))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """One whole run on the tiny proxy, an adapter itself: output folder, trainer, what was printed."""
    out = tmp_path_factory.mktemp("run") / "proxy"
    options = [*LEARNING, "--max_steps", "12", "--eval_steps", "3", "--eval_share", "0.1"]
    return out, *align(align_dpo, data, out, *options, proxy=PROXY)


def log_probability(model, tokenizer, row, answer):
    prompt = [{"role": "user", "content": row["prompt"]}]
    chat = [*prompt, {"role": "assistant", "content": row[answer]}]
    start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
    ids = torch.tensor([tokenizer.apply_chat_template(chat)["input_ids"]])
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(-1)
    return scores.gather(-1, ids[0, 1:, None])[start - 1 :].sum()


@pytest.mark.slow
def test_the_held_out_loss_falls_from_that_of_the_reference(run):
    record = json.loads((run[0] / "training.json").read_text())
    # An untrained adapter is the reference, whatever is merged below it.
    assert record["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-4)
    assert record["eval_loss"] < 0.1  # measured: 0.0007


@pytest.mark.slow
def test_the_chosen_answers_became_likelier_than_the_rejected_ones(run):
    tokenizer = AutoTokenizer.from_pretrained(run[0])
    models = load_model(run[0]), load_model(PROXY)
    for row in preferences(5, seed=7):
        after, before = (
            log_probability(model, tokenizer, row, "chosen") - log_probability(model, tokenizer, row, "rejected")
            for model in models
        )
        assert after > before + 10


@pytest.mark.slow
def test_trl_learns_from_the_templates_tokens(run):
    trainer = run[1]
    tokenizer = trainer.processing_class
    rows = {row["prompt"]: row for row in preferences(120)}
    assert len(trainer.train_dataset) == 108
    for example in trainer.train_dataset:
        row = rows[example["prompt"][0]["content"]]
        for name in ("chosen", "rejected"):
            text = tokenizer.decode(example["prompt_ids"] + example[f"{name}_ids"])
            chat = [*example["prompt"], {"role": "assistant", "content": row[name]}]
            assert text == tokenizer.apply_chat_template(chat, tokenize=False)
            assert tokenizer.decode(example[f"{name}_ids"]) == f"{row[name]}<|end|>\n"


@pytest.mark.slow
def test_trl_renders_tools_and_template_arguments_of_a_row(tmp_path):
    rows = preferences(6)
    rows[1] |= {"tools": [{"name": "add", "unit": 1}], "id": 7}
    rows[4] |= {"tools": '[{"name": "sub", "unit": "m"}]'}
    for row in rows:
        row["chat_template_kwargs"] = {"style": len(row["prompt"])}
    template = AutoTokenizer.from_pretrained(BASE).chat_template
    own = tmp_path / "own.jinja"
    own.write_text("{{ style }}{% if tools %}{{ tools[0]['name'] }}{% endif %}" + template)
    data = write_lines(tmp_path / "rows.jsonl", rows)
    options = ["--max_steps", "1", "--eval_share", "0", "--chat_template", str(own)]
    trainer, printed = align(align_dpo, data, tmp_path / "out", *options)
    assert f"Fields of {data} that are not used: id\n" in printed
    starts = [trainer.processing_class.decode(ids).split("<")[0] for ids in trainer.train_dataset["prompt_ids"]]
    names = ["", "add", "", "", "sub", ""]
    assert starts == [f"{len(row['prompt'])}{name}" for row, name in zip(rows, names, strict=True)]


@pytest.mark.slow
def test_the_result_reloads_and_is_described(run, data):
    out, trainer, printed = run
    assert torch.equal(logits(load_model(out, merge=False)), logits(trainer.model))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == PROXY
    assert KADConfig.from_pretrained(out).base == BASE
    card = (out / "README.md").read_text()
    for shown in (
        "direct preference optimisation with beta 0.1",
        f"python {os.path.relpath(align_dpo.__file__)} --proxy {PROXY}",
        data,
    ):
        assert shown in card
    lines = printed.split("To use it:\n\n")[1].rstrip()
    assert len(lines.splitlines()) == 8
    assert lines in card


@pytest.mark.slow
def test_the_printed_lines_run(run, capsys):
    exec(run[2].split("To use it:\n\n")[1], names := {})
    assert "Why is the sky blue?" not in capsys.readouterr().out
    assert names["kad"].statistics.tokens > 0


SHORT = [*LEARNING, "--max_steps", "6", "--eval_steps", "2", "--train_embeddings", "--beta", "0.3"]


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_adapter(data, tmp_path, monkeypatch):
    align(align_dpo, data, tmp_path / "whole", *SHORT)
    steps, training_step = [], Trainer.training_step

    def killed(self, *arguments, **settings):
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return training_step(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            align(align_dpo, data, tmp_path / "killed", *SHORT)
    trainer, _ = align(align_dpo, data, tmp_path / "killed", *SHORT, "--resume_from_checkpoint")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert trainer.args.beta == 0.3
    # Embeddings that are trained as a whole are switched off for the reference, too.
    record = json.loads((tmp_path / "killed" / "training.json").read_text())
    assert record["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-4)
    assert "with beta 0.3" in (tmp_path / "killed" / "README.md").read_text()


@pytest.mark.slow
def test_a_copied_file_works_on_messages_from_the_command_line(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
        for row in preferences(20)
    ]
    command = ["--proxy", PROXY, "--base", BASE, "--data", write_lines(tmp_path / "rows.jsonl", rows)]
    script = shutil.copy(align_dpo.__file__, tmp_path)
    run = run_command(
        [sys.executable, script, *command, "--output_dir", "out", "--max_steps", "1"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    load_model(tmp_path / "out")


def test_wrong_pairs_are_found_before_weights_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "load_merged", None)
    rows = preferences(30)
    del rows[4]["rejected"]
    rows[20]["chosen"] = ""
    data = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit) as error:
        align(align_dpo, data, tmp_path / "out", "--eval_share", "0")
    assert "line 5: the fields ['rejected'] are missing; it has `prompt`, `chosen`" in str(error.value)
    assert "line 21: message 1 of `chosen` has an empty `content`" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_long_and_equal_pairs_are_skipped_and_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainers, "load_merged", None)
    rows = preferences(3)
    rows[0]["rejected"] = rows[0]["chosen"]
    rows[1]["rejected"] *= 30
    rows[2]["chosen"] *= 30
    data = write_lines(tmp_path / "rows.jsonl", rows)
    command = ["--proxy", REFERENCE, "--base", BASE, "--data", data, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="all 3 lines were skipped"):
        align_dpo.main([*command, "--eval_share", "0"])
    out = capsys.readouterr().out
    assert f"Skipped 1 of 3 lines of {data} whose two answers are the same: 1\n" in out
    assert f"Skipped 2 of 3 lines of {data} longer than 512 tokens: 2, 3\n" in out


def test_beta_is_checked():
    with pytest.raises(AlignmentError, match="--beta must be positive, got 0"):
        align_dpo.DPOArguments(proxy="p", base="b", data="d", output_dir="o", beta=0.0)


def test_help_can_be_read(capsys):
    with pytest.raises(SystemExit, match="0"):
        align_dpo.main(["--help"])
    out = capsys.readouterr().out
    assert str(align_dpo.__doc__).splitlines()[2] in out
    for name in align_dpo.DPOArguments.__dataclass_fields__:
        assert f"--{name}" in out
    assert Path(align_dpo.__file__).name in out
