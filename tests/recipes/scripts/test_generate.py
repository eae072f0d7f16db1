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
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import generate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_command import SECONDS, run_command
from test_vocabulary import TOKENIZERS
from tiny_models import tiny_model
from transformers import AutoTokenizer

from transformers_kad import RULES, KADConfig, KADStatistics
from transformers_kad.recipes.resumable import JsonLinesStore
from transformers_kad.recipes.word_problems import make_problems

SCRIPT = Path(generate.__file__)
PAIR = SCRIPT.parent / "tiny_pair"
MODELS = ["--base", str(PAIR / "base"), "--proxy", str(PAIR / "proxy"), "--threshold", "0.6", "--device", "cpu"]
PROBLEMS = make_problems("test", 8, seed=9)
QUESTION = PROBLEMS[0].question
ANSWERED = {"line": 1, "prompt": "So", "text": "x", "tokens": 1}
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
    for name in ("base", "proxy", "DualDeferral(threshold=0.6)"):
        assert f"<code>{name}</code>" in page.read_text()
    assert str(PAIR) not in page.read_text()  # a page that is passed on does not tell where folders lay
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
    deadline = time.monotonic() + SECONDS
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
    assert "incomplete last line" in capsys.readouterr().err
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
    pytest.importorskip("torchao.quantization")
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
    assert "2 lines are already done, 1 of them failed" in capsys.readouterr().err
    assert len(records(output.read_text())) == 2


def test_what_else_a_json_line_holds_is_kept(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "So", "id": "a7"}\r\n')
    assert generate.main([*MODELS, "--input", str(path), "--max_new_tokens", "3"]) == 0
    (record,) = records(capsys.readouterr().out)
    assert (record["row"]["id"], record["prompt"], record["line"]) == ("a7", "So", 1)


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


# --- Rows of every kind -----------------------------------------------------------------------------------------

HALF = "caf\ud83d"


def run_rows(capsys, tmp_path, *rows, options=()):
    """The status, the records and standard error of a file with these rows; text is written as it is."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    status = generate.main([*MODELS, "--max_new_tokens", "3", "--input", str(path), *options])
    captured = capsys.readouterr()
    return status, records(captured.out), captured.err


def test_content_in_parts_is_the_text_that_they_make_up(capsys, tmp_path):
    parts = [{"type": "text", "text": QUESTION[:9]}, {"type": "text", "text": QUESTION[9:]}]
    rows = [{"messages": [{"role": "user", "content": content}]} for content in (parts, QUESTION)]
    status, (joined, plain), _ = run_rows(capsys, tmp_path, *rows, options=["--max_new_tokens", "30"])
    assert status == 0
    assert joined["text"] == plain["text"] != ""
    assert joined["row"] == rows[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": HALF}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "hat.png"}]}]}, "hat.png"),
        ({"messages": [{"role": "user", "content": None}]}, "got None"),
        ({"messages": [{"role": HALF, "content": "So"}]}, "lone surrogate"),
        ({"messages": [{"role": "user"}]}, 'needs a "role"'),
        ({"messages": []}, "at least one message"),
        ({"prompt": 5}, '"prompt"'),
        ({"question": "Why?"}, '"prompt"'),
        ('{"prompt": "torn', "not a JSON object"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
        ('{"prompt": ' + "1" * 5000 + "}", "digits"),
        ('{"a": ' * 2000 + "1" + "}" * 2000, "nested"),
        ({"messages": [{"role": "user", "content": "So"}], "tools": "none"}, '"tools"'),
        ({"messages": [{"role": "user", "content": "So"}], "chat_template_kwargs": 5}, '"chat_template_kwargs"'),
        ({"prompt": "So", "chat_template_kwargs": {"padding": 5}}, "'padding'"),
    ],
)
def test_what_cannot_be_used_is_recorded_with_its_line_and_the_run_goes_on(capsys, tmp_path, row, reason):
    output = tmp_path / "answers.jsonl"
    for _ in range(2):  # a stopped run, started again, gets no further trouble from it
        status, _, err = run_rows(capsys, tmp_path, row, "So", options=["--output", str(output)])
        assert status == 1
        failed, right = records(output.read_text())
        assert failed["line"] == 1
        assert failed["row"] == row
        assert reason in failed["error"]
        assert "text" not in failed
        assert (right["line"], right["prompt"], right["tokens"]) == (2, "So", 3)
    assert "2 lines are already done, 1 of them failed" in err


def test_half_a_character_in_any_other_field_harms_nothing(capsys, tmp_path):
    row = {"prompt": "So", "id": HALF, HALF: [HALF]}
    status, (record,), _ = run_rows(capsys, tmp_path, row)
    assert (status, record["row"]) == (0, row)
    output = tmp_path / "answers.jsonl"
    for _ in range(2):
        assert run_rows(capsys, tmp_path, row, options=["--output", str(output)])[0] == 0
    (record,) = records(output.read_text())
    assert record["row"] == row


def test_no_field_of_a_row_meets_one_of_the_records(capsys, tmp_path):
    """Whatever a record holds beside the row, a row may hold too."""
    output = tmp_path / "answers.jsonl"
    names = {*run_rows(capsys, tmp_path, {"prompt": "So"})[1][0], "error", "line", "text", "tokens"}
    row = {**dict.fromkeys(sorted(names), "the row's own"), "prompt": "So"}
    for _ in range(2):
        status, _, err = run_rows(capsys, tmp_path, row, options=["--output", str(output)])
        assert status == 0
    assert "1 lines are already done, 0 of them failed" in err
    (record,) = records(output.read_text())
    assert record["row"] == row
    assert (record["line"], record["tokens"]) == (1, 3)
    assert record["text"] != "the row's own"


def test_a_row_with_a_number_that_is_none_is_gone_on_with(capsys, tmp_path):
    """NaN, which equals nothing, is no change of the input."""
    output = tmp_path / "answers.jsonl"
    row = '{"prompt": "So", "score": NaN}'
    assert [run_rows(capsys, tmp_path, row, options=["--output", str(output)])[0] for _ in range(2)] == [0, 0]


def test_a_field_that_changed_is_a_changed_input(capsys, tmp_path):
    output = tmp_path / "answers.jsonl"
    runs = [
        run_rows(capsys, tmp_path, {"prompt": "So", "id": name}, options=["--output", str(output)]) for name in "ab"
    ]
    assert [status for status, *_ in runs] == [0, 2]
    assert "line 1 was" in runs[1][2]


def test_a_prompt_may_be_a_chat_as_in_a_file_to_train_on(capsys, tmp_path):
    chat = [{"role": "user", "content": QUESTION}]
    status, (one, other), _ = run_rows(capsys, tmp_path, {"prompt": chat, "completion": "12"}, {"messages": chat})
    assert status == 0
    assert one["text"] == other["text"]


def test_a_file_without_one_row_that_can_be_used_is_refused_before_anything_is_loaded(capsys, tmp_path):
    status, got, err = run_rows(capsys, tmp_path, {"question": "Why?"}, {"question": "How?"})
    assert (status, got) == (2, [])
    assert "Line 1" in err
    assert "question" in err


def test_a_record_says_whether_the_text_ended_by_itself(capsys, tmp_path):
    _, (cut,), _ = run_rows(capsys, tmp_path, {"prompt": QUESTION})
    _, (whole,), _ = run_rows(capsys, tmp_path, {"prompt": QUESTION}, options=["--max_new_tokens", "60"])
    assert (cut["ended"], whole["ended"]) == (False, True)
    exact = ["--max_new_tokens", str(whole["tokens"])]  # the last token that fits is the end
    assert run_rows(capsys, tmp_path, {"prompt": QUESTION}, options=exact)[1][0]["ended"] is True


TEMPLATE = (
    "{{ 'Briefly: ' if brief }}{% for tool in tools or [] %}[{{ tool['name'] }}]{% endfor %}"
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt }}"
)


@pytest.fixture
def templated():
    """A generator whose chat template shows what it was given, and the prompts that the base got."""
    generator = generate.Generator(*generate_arguments("--max_new_tokens", "1"))
    generator.pair.tokenizer.chat_template = TEMPLATE
    seen, generated = [], generator.pair.base.generate

    def note(**settings):
        seen.append(generator.pair.tokenizer.decode(settings["input_ids"][0]))
        return generated(**settings)

    generator.pair.base.generate = note
    yield generator, seen
    del generator.pair.base.generate


def test_template_arguments_reach_the_chat_template(capsys, tmp_path, templated):
    generator, seen = templated
    arguments = generate.PromptArguments(template_arguments='{"brief": true}')
    rows = [
        {"prompt": "So"},
        {"prompt": "So", "tools": [{"name": "sum"}]},
        {"prompt": "So", "chat_template_kwargs": {"brief": False}},
    ]
    lines = generate.read_prompts(map(json.dumps, rows))
    assert generate.run_lines(generator, arguments, lines, None) == 0
    turn = "<|user|>\nSo\n<|assistant|>\n"
    assert seen == [f"Briefly: {turn}", f"Briefly: [sum]{turn}", turn]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--template_arguments", "{brief"], "--template_arguments"),
        (["--template_arguments", "[1]"], "--template_arguments"),
        (["--template_arguments", '{"a": 1, "a": 2}'], "'a' twice"),
        (["--template_arguments", '{"tokenize": false}'], "'tokenize'"),
        (["--template_arguments", '{"device": "cuda"}'], "'device'"),
        (["--template_arguments", '{"tools": 5}'], '"tools"'),
    ],
)
def test_template_arguments_that_are_no_object_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        generate.main([*MODELS, "--prompt", "a", *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_template_arguments_without_a_template_are_refused(capsys):
    arguments = ["--prompt", "a", "--chat", "no", "--template_arguments", '{"enable_thinking": false}']
    assert generate.main([*MODELS, *arguments]) == 2
    assert "enable_thinking" in capsys.readouterr().err


WORDS = st.sampled_from(["So", "user", "", HALF, "é😀", "\u2028", "text", "assistant"]) | st.text(max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
CONTENT = WORDS | JSON | st.lists(WORDS | st.fixed_dictionaries({"type": st.just("text"), "text": WORDS}), max_size=3)
MESSAGE = st.fixed_dictionaries({}, optional={"role": WORDS, "content": CONTENT, "name": JSON}) | JSON
ROWS = st.fixed_dictionaries(
    {},
    optional={"prompt": WORDS | JSON, "messages": st.lists(MESSAGE, max_size=3) | JSON, "error": JSON, "line": JSON}
    | {"text": JSON, "row": JSON, "tools": JSON, "chat_template_kwargs": JSON, HALF: JSON},
)
LINES = ROWS.map(json.dumps) | st.text(st.characters(exclude_characters="\n\r"), max_size=8) | st.just('{"a":' * 2000)


class NoModels(generate.Generator):
    """Encodes prompts as a generator does, and answers each by repeating its last token."""

    def __init__(self, answer=lambda input_ids, **_: torch.cat([input_ids, input_ids[:, -1:]], 1)):
        self.pair = SimpleNamespace(
            tokenizer=AutoTokenizer.from_pretrained(PAIR / "base", padding_side="left"),
            device="cpu",
            eos_token_ids=None,
            base=SimpleNamespace(generate=answer),
        )
        statistics = KADStatistics(tokens=1)
        self.kad = SimpleNamespace(reset=lambda: None, statistics=statistics)
        self.settings, self.sampling = {}, generate.SamplingArguments()


@pytest.fixture(scope="module")
def no_models():
    return NoModels()


@given(lines=st.lists(LINES, max_size=4))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_any_lines_become_a_record_each_and_a_second_run_finds_them_done(no_models, lines):
    """A record each, in order, with the row as it was, that is either an answer or a failure with its reason."""
    with TemporaryDirectory() as folder:
        for _ in range(2):
            with JsonLinesStore(Path(folder) / "answers.jsonl", {}) as store:
                generate.run_lines(no_models, generate.PromptArguments(), generate.read_prompts(lines), store)
        with JsonLinesStore(Path(folder) / "answers.jsonl", {}) as store:
            got = store.records
    numbered = [(at, line) for at, line in enumerate(lines, start=1) if line.removeprefix("\ufeff").strip()]
    assert [record["line"] for record in got] == [at for at, _ in numbered]
    for record, (_, line) in zip(got, numbered, strict=True):
        assert ("text" in record) != ("error" in record)
        assert record.get("error") != ""
        if isinstance(record.get("row"), dict):
            assert json.dumps(record["row"]) == line


def test_a_line_that_needs_too_much_memory_does_not_end_the_run(tmp_path):
    def answer(input_ids, **_):
        if input_ids.shape[1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return input_ids

    lines = generate.read_prompts(["So " * 60, "So"])
    with JsonLinesStore(tmp_path / "answers.jsonl", {}) as store:
        assert generate.run_lines(NoModels(answer), generate.PromptArguments(), lines, store) == 1
    failed, right = records((tmp_path / "answers.jsonl").read_text())
    assert "2 GiB" in failed["error"]
    assert right["text"] == ""


@pytest.mark.parametrize("place", ["file", "standard input"])
def test_bytes_that_are_no_text_are_the_fault_of_their_line_alone(capsys, tmp_path, monkeypatch, place):
    content, name = "So\nÉ\ncaf".encode() + b"\xe9\n", "-"
    if place == "file":
        name = str(tmp_path / "prompts.txt")
        Path(name).write_bytes(content)
    else:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
    assert generate.main([*MODELS, "--max_new_tokens", "3", "--input", name]) == 1
    first, second, failed = records(capsys.readouterr().out)
    assert (first["prompt"], second["prompt"]) == ("So", "É")
    assert "not UTF-8 from character 3" in failed["error"]
    assert failed["line"] == 3


def test_answers_can_be_written_to_an_output_that_is_no_utf_8(tmp_path, monkeypatch, no_models):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    assert generate.run_lines(no_models, generate.PromptArguments(), generate.read_prompts(["é", "😀"]), None) == 0
    assert [record["prompt"] for record in records(written.getvalue().decode("cp1252"))] == ["é", "😀"]


def test_a_file_from_before_rows_were_kept_is_gone_on_with(capsys, tmp_path):
    """Other fields of a row stood beside the record's own, and there were no template arguments."""
    output = tmp_path / "answers.jsonl"
    rows = [{"prompt": "So", "id": 1}, {"prompt": "So", "id": 2}]
    assert run_rows(capsys, tmp_path, *rows, options=["--output", str(output)])[0] == 0
    settings = Path(f"{output}.settings.json")
    before = json.loads(settings.read_text())
    del before["template_arguments"]
    settings.write_text(json.dumps(before))
    output.write_text('{"id": 1, "line": 1, "prompt": "So", "text": "x", "tokens": 3}\n')
    status, _, err = run_rows(capsys, tmp_path, *rows, options=["--output", str(output)])
    assert status == 0
    assert "1 lines are already done, 0 of them failed" in err
    assert [record["line"] for record in records(output.read_text())] == [1, 2]


def test_records_that_are_of_no_line_are_refused(tmp_path, no_models):
    with JsonLinesStore(tmp_path / "answers.jsonl", {}) as store:
        store.append({"line": [1]})
    with (
        JsonLinesStore(tmp_path / "answers.jsonl", {}) as store,
        pytest.raises(ValueError, match=r"answers\.jsonl.*\[1\]"),
    ):
        generate.run_lines(no_models, generate.PromptArguments(), generate.read_prompts(["So"]), store)


# --- Several processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [[], ["--input", "-"], ["--input", "a"], ["--input", "a", "--output", os.devnull]])
def test_several_processes_need_a_file_to_divide_and_one_for_the_answers(place):
    (arguments,) = generate.parse_arguments((generate.PromptArguments,), None, place)
    generate.refuse_several(1, arguments)
    with pytest.raises(ValueError, match=r"^2 processes divide the lines of a file") as error:
        generate.refuse_several(2, arguments)
    assert f"got {arguments.input!r} and {arguments.output!r}" in str(error.value)


@pytest.mark.slow
def test_two_processes_divide_the_lines_and_leave_the_file_of_one(tmp_path, prompts):
    """The run goes on with what two other processes have left, one of which was stopped in a line."""
    prompts.write_text(prompts.read_text() + '{"prompt": 5}\n')
    sampling = ["--do_sample", "--seed", "3", "--max_new_tokens", "30", "--input", str(prompts)]
    whole, divided = tmp_path / "whole.jsonl", tmp_path / "divided.jsonl"
    assert generate.main([*MODELS, *sampling, "--output", str(whole)]) == 1  # since the last line can't be used
    expected = whole.read_text().splitlines(keepends=True)
    shutil.copy(f"{whole}.settings.json", f"{divided}.settings.json")
    divided.write_text(expected[0])
    Path(f"{divided}.part1").write_text(expected[3] + expected[5][:20])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = run_command(
        [*launcher, str(SCRIPT), *MODELS, *sampling, "--output", str(divided)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 1, run.stderr
    assert divided.read_text() == whole.read_text()
    assert run.stderr.count("2 lines are already done, 0 of them failed.") == 1
    assert run.stderr.count("An incomplete last line was removed") == 1
    assert sorted(re.findall(r"^(\d) prompts;", run.stderr, re.MULTILINE)) == ["3", "3"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("divided")) == [
        "divided.jsonl",
        "divided.jsonl.settings.json",
    ]


# --- Damaged files ------------------------------------------------------------------------------------------------


def stored(tmp_path, *rows):
    with JsonLinesStore(tmp_path / "answers.jsonl", {}) as store:
        for row in rows:
            store.append(row)
    return JsonLinesStore(tmp_path / "answers.jsonl", {})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ANSWERED, ANSWERED], "line 2 is the second record of line 1 of the input"),
        ([ANSWERED | {"line": 7}], r"answers\.jsonl' was: line 7, which has an answer, is not there any more"),
        ([{"line": 1, "prompt": "So"}], "line 1 has no 'text'"),
        ([ANSWERED | {"line": True}], "line 1: 'line' is True"),
        ([{"line": 1, "prompt": "So", "error": None}], "line 1: 'error' is None"),
    ],
)
def test_records_that_are_no_answers_to_the_lines_of_the_input_are_refused(tmp_path, no_models, rows, message):
    with stored(tmp_path, *rows) as store, pytest.raises(ValueError, match=message):
        generate.run_lines(no_models, generate.PromptArguments(), list(generate.read_prompts(["So"])), store)
    with stored(tmp_path) as store:
        assert len(store.records) == len(rows)  # nothing was answered


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_file_of_another_encoding_is_no_prompt(tmp_path, encoding):
    (tmp_path / "prompts.txt").write_bytes("So\nWhy?\n".encode(encoding))
    lines = list(generate.read_prompts(generate.read_file(str(tmp_path / "prompts.txt"))))
    assert lines
    assert all("NUL" in line.error for line in lines)


def test_a_changed_line_of_ten_megabytes_is_not_shown_as_a_whole(tmp_path, no_models):
    with (
        stored(tmp_path, ANSWERED) as store,
        pytest.raises(ValueError, match="line 1 was 'So' and is 'xxx") as error,
    ):
        generate.run_lines(no_models, generate.PromptArguments(), list(generate.read_prompts(["x" * 10**7])), store)
    assert len(str(error.value)) < 1000
