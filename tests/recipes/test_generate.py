"""The recipe that generates: prompts from everywhere, models of every kind, stops in the middle."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import generate
import pytest
from test_vocabulary import TOKENIZERS
from tiny_models import tiny_model

from transformers_kad import RULES, KADConfig
from transformers_kad.word_problems import make_problems

SCRIPT = Path(generate.__file__)
PAIR = SCRIPT.parent / "tiny_pair"
MODELS = ["--base", str(PAIR / "base"), "--proxy", str(PAIR / "proxy"), "--threshold", "0.6", "--device", "cpu"]
PROBLEMS = make_problems("test", 8, seed=9)
QUESTION = PROBLEMS[0].question
ANSWER = re.compile(r"We get (\d+ [+-] \d+ = \d+\. (Then )?)+The answer is \d+\.")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(problem.question for problem in PROBLEMS) + "\n")
    return path


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def answer(capsys, *arguments):
    assert generate.main([*MODELS, "--prompt", QUESTION, *arguments]) == 0
    return capsys.readouterr()


def test_one_prompt_is_streamed_with_a_line_of_statistics_and_a_trace(capsys, tmp_path):
    page = tmp_path / "pages" / "trace.html"
    captured = answer(capsys, "--trace", str(page))
    assert ANSWER.fullmatch(captured.out.strip())
    assert "acceptance" in captured.err
    assert "deferral mass" in captured.err
    assert "<html" in page.read_text()
    assert str(page) in captured.err


def test_both_ways_of_decoding_write_the_same_text(capsys):
    speculative = answer(capsys)
    token_by_token = answer(capsys, "--no_speculative")
    assert token_by_token.out == speculative.out
    assert "acceptance" not in token_by_token.err


def test_a_config_names_models_and_settings_and_options_win_over_it(capsys, tmp_path):
    config = KADConfig("primal", {"budget": 0.5}, 1.2, 3, base=str(PAIR / "base"), proxy=str(PAIR / "proxy"))
    config.save_pretrained(tmp_path)
    read = generate.RuleArguments(config=str(tmp_path))
    assert read.to_config() == config
    assert generate.RuleArguments(config=str(tmp_path), budget=0.9).to_config().parameters == {"budget": 0.9}
    other = generate.RuleArguments(
        config=str(tmp_path), rule="dual", threshold=0.6, num_assistant_tokens=2
    ).to_config()
    assert (other.rule, other.parameters, other.num_assistant_tokens) == ("dual", {"threshold": 0.6}, 2)
    assert other.component_temperature == 1.2
    assert generate.RuleArguments().to_config() == KADConfig()
    assert generate.main(["--config", str(tmp_path), "--prompt", QUESTION, "--max_new_tokens", "3"]) == 0


def test_every_parameter_of_every_rule_is_an_option():
    options = {field.name for field in fields(generate.RuleArguments)}
    assert {field.name for rule in RULES.values() for field in fields(rule)} <= options


def test_a_file_becomes_json_lines_one_a_line(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = {"messages": [{"role": "user", "content": PROBLEMS[1].question}]}
    path.write_text(f"{QUESTION}\n\n{json.dumps(chat)}\n" + json.dumps({"prompt": PROBLEMS[2].question}))
    assert generate.main([*MODELS, "--input", str(path)]) == 0
    got = records(capsys.readouterr().out)
    assert [record["line"] for record in got] == [1, 3, 4]
    assert [record["prompt"] for record in got] == [QUESTION, chat["messages"], PROBLEMS[2].question]
    for record in got:
        assert ANSWER.fullmatch(record["text"])
        assert record["tokens"] > 10


def test_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    assert generate.main(MODELS) == 0
    (record,) = records(capsys.readouterr().out)
    assert ANSWER.fullmatch(record["text"])


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_without_repeating_or_losing_a_line(tmp_path, prompts, capsys):
    sampling = ["--do_sample", "--seed", "3", "--max_new_tokens", "40"]
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert generate.main([*MODELS, *sampling, "--input", str(prompts), "--output", str(whole)]) == 0
    command = [*MODELS, *sampling, "--input", str(prompts), "--output", str(stopped)]
    run = subprocess.Popen(
        [sys.executable, str(SCRIPT), *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (stopped.exists() and stopped.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    survived = stopped.read_bytes()
    assert 2 <= survived.count(b"\n") < len(PROBLEMS)
    with stopped.open("ab") as file:  # as if the next line had been cut
        file.write(b'{"line": 99, "te')
    capsys.readouterr()
    assert generate.main(command) == 0
    assert "torn last line" in capsys.readouterr().err
    assert stopped.read_bytes().startswith(survived[: survived.rfind(b"\n") + 1])
    # The same texts as without the stop: every line has a seed of its own.
    assert records(stopped.read_text()) == records(whole.read_text())
    assert [record["line"] for record in records(whole.read_text())] == list(range(1, len(PROBLEMS) + 1))

    assert generate.main(command) == 0
    assert len(records(stopped.read_text())) == len(PROBLEMS)
    assert generate.main([*command, "--seed", "4"]) == 2
    assert "seed is 3 there and 4 here" in capsys.readouterr().err


def test_a_line_that_fails_is_recorded_and_the_others_go_on(capsys, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("So " * 600 + f"\n{QUESTION}\n")
    assert generate.main([*MODELS, "--input", str(path)]) == 1
    captured = capsys.readouterr()
    failed, right = records(captured.out)
    assert "512" in failed["error"]
    assert ANSWER.fullmatch(right["text"])
    assert "Line 1 failed" in captured.err


def test_implicit_reward_switches_the_adapter_off_or_takes_a_reference(capsys):
    models = [word for word in MODELS if word not in ("--threshold", "0.6")]
    texts = []
    for more in ([], ["--reference", str(PAIR / "reference")]):
        assert generate.main([*models, "--rule", "implicit_reward", "--beta", "1.5", "--prompt", QUESTION, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert ANSWER.fullmatch(texts[0].strip())


def test_the_proxy_may_see_its_chat_template_while_the_base_sees_plain_text(capsys):
    models = [*MODELS[:-4], "--threshold", "1", "--device", "cpu"]  # the proxy alone
    both = ["--prompt", QUESTION]
    assert generate.main([*models, *both, "--chat", "no", "--proxy_chat", "yes"]) == 0
    separate = capsys.readouterr().out
    assert generate.main([*models, *both, "--chat", "yes"]) == 0
    assert separate == capsys.readouterr().out
    assert generate.main([*models, *both, "--chat", "no"]) == 0
    assert separate != capsys.readouterr().out


def test_a_system_message_goes_before_the_prompt():
    assert generate.with_system("Why?", "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["auto", "explicit"])
def test_a_base_spread_over_memory_and_disk(capsys, tmp_path, spread):
    plain = answer(capsys)
    # The base has 1.9 MB of weights.
    arguments = {
        "auto": ["--device_map", "auto", "--max_memory", '{"cpu": "1MB"}'],
        "explicit": ["--device_map", json.dumps(EXPLICIT)],
    }[spread]
    generator = generate.Generator(
        *generate_arguments(*arguments, "--offload_folder", str(tmp_path / "offloaded")), trace=False
    )
    assert "disk" in generator.base.hf_device_map.values()
    assert "cpu" in generator.base.hf_device_map.values()
    ids = generator.answer(QUESTION, generate.PromptArguments(), seed=0)
    assert generator.text(ids) == plain.out.strip()
    assert generator.kad.statistics.accepted > 0


EXPLICIT = {
    **{"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"},
    **{"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"},
}


def generate_arguments(*words):
    types = (generate.ModelArguments, generate.RuleArguments, generate.SamplingArguments)
    models, rule, sampling = generate.parse_arguments(types, None, [*MODELS, *words])
    return models, rule.to_config(), sampling


@pytest.mark.slow
def test_a_quantized_base(capsys):
    plain = answer(capsys)
    generator = generate.Generator(*generate_arguments("--quantization", "torchao-int8"), trace=False)
    weight = generator.base.model.layers[0].mlp.up_proj.weight
    assert "int8" in type(weight).__name__.lower() or "AffineQuantized" in type(weight).__name__
    ids = generator.answer(QUESTION, generate.PromptArguments(), seed=0)
    assert generator.text(ids) == plain.out.strip()


def test_a_proxy_with_another_tokenizer_needs_the_flag(capsys, tmp_path):
    proxy = tiny_model(vocabulary=len(TOKENIZERS["byte-level"]), seed=3)
    proxy.save_pretrained(tmp_path)
    TOKENIZERS["byte-level"].save_pretrained(tmp_path)
    arguments = ["--base", str(PAIR / "base"), "--proxy", str(tmp_path), "--prompt", QUESTION, "--max_new_tokens", "5"]
    assert generate.main(arguments) == 2
    assert "--align_vocabularies" in capsys.readouterr().err
    assert generate.main([*arguments, "--align_vocabularies"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "tokens are shared" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--input", "b"], "'a' and 'b'"),
        (["--input", "missing.txt"], "'missing.txt' is no file"),
        (["--input", "b", "--trace", "c.html"], "got --input 'b'"),
        (["--prompt", "a", "--rule", "primal"], "'threshold'"),
        (["--prompt", "a", "--device_map", "{cpu"], "{cpu"),
        (["--prompt", "a", "--config", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_echoed(capsys, arguments, message):
    assert generate.main([*MODELS, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_models_are_needed(capsys):
    assert generate.main(["--prompt", "a"]) == 2
    assert "got None and None: pass --base and --proxy" in capsys.readouterr().err


def test_a_json_line_without_a_prompt_is_named(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "Why?"}\n')
    assert generate.main([*MODELS, "--input", str(path)]) == 2
    assert 'Line 1 needs a "prompt" or "messages", got \'{"question"' in capsys.readouterr().err


def test_sampling_is_plain_unless_asked_for():
    assert generate.SamplingArguments(do_sample=True, top_p=0.9).settings() == {
        **{"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.0},
    }
