"""The quickstart: what it prints, which models it loads, and the tiny pair's text in both ways of decoding."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import quickstart
from run_command import run_command
from transformers import AutoTokenizer

from transformers_kad import KADTrace, TokenRecord
from transformers_kad.recipes.word_problems import is_correct, make_problems

SCRIPT = Path(quickstart.__file__)
PAIR_DIR = SCRIPT.parent / "tiny_pair"


@pytest.fixture(scope="module")
def session():
    arguments = quickstart.QuickstartArguments()
    return quickstart.Session(arguments, str(PAIR_DIR / "base"), str(PAIR_DIR / "proxy"))


@pytest.mark.slow
def test_the_script_runs_offline_without_arguments_but_a_size():
    run = run_command(
        [sys.executable, str(SCRIPT), "--problems", "8"],
        env={"HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONIOENCODING": "utf-8"},
        cwd="/",
    )
    assert run.returncode == 0, run.stderr
    out = run.stdout
    assert "\033" not in out  # plain when not a terminal
    assert re.search(r"^ base: .*\[\d+ tokens", out, re.MULTILINE)
    assert re.search(r"^proxy: .*\[\d+ tokens", out, re.MULTILINE)
    assert re.search(r"^  KAD: .*\[\d+ tokens", out, re.MULTILINE)
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ")][1:]
    names = [row[0].strip() for row in rows]
    assert [re.sub(r" [\d.]+$", "", name) for name in names] == [
        "base alone",
        "proxy alone",
        *quickstart.TINY_PAIR_RULES,
    ]
    cells = {name: [cell.strip() for cell in row[1:]] for name, row in zip(names, rows, strict=True)}
    for name, (accuracy, interval, _, speed, mass, acceptance, per_round) in cells.items():
        low, high = (float(edge) for edge in interval.split(" to "))
        assert low <= float(accuracy) <= high
        assert float(speed) > 0
        speculative = name not in ("base alone", "proxy alone")
        assert (acceptance != "–") == (per_round != "–") == speculative
        assert (mass != "–") == name.startswith(("KAD", "nudging", "confidence"))
    assert "says nothing about larger models" in out
    assert "identical text on 8 of 8 problems" in out


@pytest.mark.slow
def test_greedy_text_is_the_same_in_both_ways_on_100_problems(session):
    problems = make_problems("test", 100, seed=5)
    assert quickstart.count_equal_texts(session, problems) == 100


def test_kad_answers_right_where_it_is_asked_greedily(session):
    kad = session.processor("dual", {"threshold": 0.6})
    problems = make_problems("test", 20, seed=3)
    right = 0
    for problem in problems:
        ids = session.answer(session.base, problem.question, logits_processor=[kad], do_sample=False, top_k=None)
        right += is_correct(session.tokenizer.decode(ids), problem)
    assert right >= 15  # 19 of 20 expected; below 15 something is broken


def test_any_pair_by_folder(tmp_path, capsys):
    for name in ("base", "reference", "proxy"):
        shutil.copytree(PAIR_DIR / name, tmp_path / name)
    arguments = ["--base", str(tmp_path / "base"), "--proxy", str(tmp_path / "proxy"), "--prompt", "Ada has 1 hat."]
    quickstart.main([*arguments, "--rule", "primal", "--parameters", '{"budget": 0.5}', "--dtype", "bfloat16"])
    out = capsys.readouterr().out
    assert "Prompt: Ada has 1 hat." in out
    assert "PrimalDeferral(budget=0.5)" in out


def test_the_script_runs_as_a_single_file_copied_elsewhere(tmp_path):
    shutil.copy(SCRIPT, tmp_path / "run.py")
    arguments = ["--base", str(PAIR_DIR / "base"), "--proxy", str(PAIR_DIR / "proxy"), "--max_new_tokens", "5"]
    run = run_command([sys.executable, str(tmp_path / "run.py"), *arguments])
    assert run.returncode == 0, run.stderr
    assert "Why is the sky blue?" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "a"}, "'a' and None"),
        ({"problems": 0}, "got 0"),
        ({"parameters": "threshold=1"}, "threshold=1"),
        ({"rule": "duel"}, "Did you mean 'dual'"),
        ({"parameters": '{"threshold": 2}'}, "got 2"),
        ({"parameters": "[0.5]"}, "a JSON object is needed"),
        ({"parameters": '{"threshold": 0.5, "threshold": 0.6}'}, "'threshold' twice"),
        ({"parameters": "[" * 5000}, "nested more than"),
    ],
)
def test_bad_arguments_are_echoed(arguments, message):
    with pytest.raises(ValueError, match=message):
        quickstart.QuickstartArguments(**arguments)


def test_tokens_are_painted_by_whom_they_are_owed_to():
    tokenizer = AutoTokenizer.from_pretrained(PAIR_DIR / "base")
    ids = tokenizer("We get 7")["input_ids"]
    shares = [1.0, 0.5, *[0.0] * (len(ids) - 2)]
    records = [TokenRecord(i, 0.5, 0.5, 0.5, 0.5, share, False) for i, share in zip(ids, shares, strict=True)]
    painted = quickstart.paint(KADTrace((tuple(records),)), tokenizer, colour=True)
    assert re.sub(r"\033\[\d+m", "", painted) == "We get 7"
    assert re.findall(r"\033\[(3\d)m", painted) == ["33", "35", *["34"] * (len(ids) - 2)]
    assert quickstart.paint(KADTrace((tuple(records),)), tokenizer, colour=False) == "We get 7"


def test_characters_of_several_tokens_are_painted_whole():
    tokenizer = AutoTokenizer.from_pretrained(PAIR_DIR / "base")
    ids = tokenizer("é")["input_ids"]
    assert len(ids) == 2
    records = [TokenRecord(i, 0.5, 0.5, 0.5, 0.5, 1.0, False) for i in ids]
    assert quickstart.paint(KADTrace((tuple(records),)), tokenizer, colour=True) == "\033[33mé\033[0m"


def test_a_tokenizer_that_makes_more_inputs_than_the_model_takes_asks_the_same(tmp_path, capsys):
    asked = ["--prompt", "Mia has 3 hats.", "--max_new_tokens", "4"]
    shutil.copytree(PAIR_DIR, tmp_path / "pair")
    for model in ("base", "proxy"):
        path = tmp_path / "pair" / model / "tokenizer_config.json"
        names = ["input_ids", "token_type_ids", "attention_mask"]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
    texts = []
    for folder in (PAIR_DIR, tmp_path / "pair"):
        quickstart.main(["--base", str(folder / "base"), "--proxy", str(folder / "proxy"), *asked])
        texts.append(re.sub(r"\d+ tokens/s", "", capsys.readouterr().out))
    assert texts[0] == texts[1]
