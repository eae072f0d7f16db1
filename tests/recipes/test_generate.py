"""The recipe that generates: prompts from everywhere, models of every kind, stops in the middle."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import generate
import pytest
import torch
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
    assert failed["line"] == 1
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
        *generate_arguments(*arguments, "--offload_folder", str(tmp_path / "offloaded")),
    )
    assert "disk" in generator.pair.base.hf_device_map.values()
    assert "cpu" in generator.pair.base.hf_device_map.values()
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
    generator = generate.Generator(*generate_arguments("--quantization", "torchao-int8"))
    weight = generator.pair.base.model.layers[0].mlp.up_proj.weight
    assert "int8" in type(weight).__name__.lower() or "AffineQuantized" in type(weight).__name__
    ids = generator.answer(QUESTION, generate.PromptArguments(), seed=0)
    assert generator.text(ids) == plain.out.strip()
    assert torch.get_float32_matmul_precision() == "highest"  # nothing was changed for other models


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
        (["--input", "missing.txt"], "'missing.txt' can't be read"),
        (["--prompt", "a", "--output", "b.jsonl"], "got --prompt 'a'"),
        (["--prompt", "a", "--trace", "."], "the folder '.'"),
        (["--input", "b", "--trace", "c.html"], "got --input 'b'"),
        (["--prompt", "a", "--rule", "primal"], "'threshold'"),
        (["--prompt", "a", "--config", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_echoed(capsys, arguments, message):
    assert generate.main([*MODELS, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device_map", "{cpu"], "{cpu"),
        (["--max_memory", "20GiB", "--device_map", "auto"], "got '20GiB'"),
        (["--max_memory", '{"cpu": "1MB"}'], "goes with --device_map auto"),
        (["--dtype", "float99"], "float99"),
        (["--temperature", "0.7"], "need --do_sample"),
        (["--do_sample", "--top_p", "3"], "got 3.0"),
        (["--max_new_tokens", "0"], "got 0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        generate.main([*MODELS, "--prompt", "a", *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_input_that_changed_is_refused_by_line(capsys, tmp_path, prompts):
    output = tmp_path / "answers.jsonl"
    short = [*MODELS, "--max_new_tokens", "3", "--input", str(prompts), "--output", str(output)]
    assert generate.main(short) == 0
    before = output.read_bytes()
    prompts.write_text("A new first line.\n" + prompts.read_text())
    assert generate.main(short) == 2
    error = capsys.readouterr().err
    assert "line 1 was" in error
    assert "A new first line." in error
    assert output.read_bytes() == before


def test_a_failure_of_an_earlier_run_is_not_forgotten(capsys, tmp_path):
    path, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    path.write_text("So " * 600 + "\nSo\n")
    command = [*MODELS, "--max_new_tokens", "3", "--input", str(path), "--output", str(output)]
    assert [generate.main(command) for _ in range(2)] == [1, 1]
    assert "2 lines are done already, 1 of them failed" in capsys.readouterr().err
    assert len(records(output.read_text())) == 2


def test_what_else_a_json_line_holds_is_kept(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "So", "id": "a7"}\r\n')
    assert generate.main([*MODELS, "--input", str(path), "--max_new_tokens", "3"]) == 0
    (record,) = records(capsys.readouterr().out)
    assert (record["id"], record["prompt"], record["line"]) == ("a7", "So", 1)


def test_every_line_and_seed_has_its_own_random_numbers():
    seeds = {generate.seed_of(seed, line) for seed in range(30) for line in range(30)}
    assert len(seeds) == 900


def test_the_bases_own_generation_config_is_not_the_commands(capsys, tmp_path):
    expected = answer(capsys).out
    shutil.copytree(PAIR / "base", tmp_path / "base")
    config = tmp_path / "base" / "generation_config.json"
    own = {"no_repeat_ngram_size": 1, "num_beams": 3, "min_new_tokens": 30, "repetition_penalty": 1.5}
    config.write_text(json.dumps({**json.loads(config.read_text()), **own}))
    models = ["--base", str(tmp_path / "base"), *MODELS[2:]]
    assert generate.main([*models, "--prompt", QUESTION]) == 0
    assert capsys.readouterr().out == expected


def test_a_config_may_lie_beside_its_models_and_move_with_them(tmp_path, monkeypatch, capsys):
    pair = shutil.copytree(PAIR, tmp_path / "moved")
    KADConfig("dual", {"threshold": 0.6}, base="../base", proxy="somewhere/else").save_pretrained(pair / "proxy")
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--config", "moved/proxy", "--prompt", QUESTION, "--device", "cpu"]) == 0
    assert ANSWER.fullmatch(capsys.readouterr().out.strip())


def test_models_are_needed(capsys):
    assert generate.main(["--prompt", "a"]) == 2
    assert "got None and None: pass --base and --proxy" in capsys.readouterr().err


def test_a_json_line_without_a_prompt_is_named(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    for line, message in (
        ('{"question": "Why?"}', 'Line 2 needs a "prompt"'),
        ('{"prompt": 5}', 'Line 2 needs a "prompt"'),
        ('{"messages": [{"role": "user"}]}', 'Line 2 needs a "prompt"'),
        ('{"prompt": "torn', "Line 2 begins like JSON, but is none"),
    ):
        path.write_text(f"So\n{line}\n")
        assert generate.main([*MODELS, "--input", str(path)]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert line[:15] in captured.err
        assert not captured.out  # found before the first answer


def test_sampling_is_plain_unless_asked_for():
    assert generate.SamplingArguments(do_sample=True, top_p=0.9).settings() == {
        **{"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.0},
        "max_new_tokens": 256,
    }


def test_a_file_is_gone_on_with_by_the_same_models_only(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("Ada has 1 hat.\n")
    files = ["--input", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "answers.jsonl")]
    short = ["--max_new_tokens", "3"]
    assert generate.main([*MODELS, *files, *short]) == 0
    other = ["--base", str(PAIR / "reference"), "--proxy", str(PAIR / "proxy")]
    assert generate.main([*other, *files, *short]) == 2
    assert "base is" in capsys.readouterr().err


def test_a_tokenizer_that_makes_more_inputs_than_the_model_takes_asks_the_same(capsys, tmp_path):
    base = shutil.copytree(PAIR / "base", tmp_path / "base")
    path = base / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
    expected = answer(capsys)
    assert answer(capsys, "--base", str(base))[0] == expected[0]
