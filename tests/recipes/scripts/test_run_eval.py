"""The evaluation recipe: one process or two, killed and taken up again, the same results; public tasks end to end."""

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import run_eval
import sweep
import tune
from command_lines import error_of
from run_command import SECONDS, run_command

from transformers_kad import KADConfig
from transformers_kad.integrations.loading.models import load_tokenizer
from transformers_kad.integrations.loading.prompts import encode
from transformers_kad.recipes.evaluation.methods import FROM_CONFIG, PLAIN_METHODS, RULE_METHODS
from transformers_kad.recipes.evaluation.report import to_markdown
from transformers_kad.recipes.evaluation.tasks import TASKS
from transformers_kad.recipes.word_problems import make_problems

ROOT = Path(__file__).resolve().parents[3]
PAIR = ROOT / "recipes" / "tiny_pair"
RESULTS = ROOT / "recipes" / "results" / "tiny_pair"
FIXTURES = ROOT / "tests" / "recipes" / "evaluation" / "fixtures"
METHODS = ("--method", "base", "proxy", "kad-dual:threshold=0.4", "nudging:threshold=0.7")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def results(folder):
    """The lines of a run, but for what a clock decides."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def command(output, *arguments, processes=1):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*start, str(ROOT / "recipes" / "run_eval.py"), "--output", str(output), *arguments]


def run(output, *arguments, processes=1):
    finished = run_command(command(output, *arguments, processes=processes), env=ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run in one process: 40 problems, two samples each, batches of 8."""
    output = tmp_path_factory.mktemp("undisturbed")
    run(output, *ASKED)
    return output


ASKED = (*METHODS, "--limit", "40", "--num_samples", "2", "--batch_size", "8", "--no_speculative", "--positions")


@pytest.mark.slow
def test_the_lines_are_complete_and_the_rules_stand_in_the_order_that_the_pair_is_made_for(undisturbed):
    lines = results(undisturbed)
    assert len(lines) == 4 * 40 * 2
    assert len({(line["method"], line["instance"], line["sample"]) for line in lines}) == len(lines)
    report = json.loads((undisturbed / "summary.json").read_text())
    accuracy = {row["name"]: row["accuracy"] for row in report["rows"]}
    assert accuracy["base"] < 0.05 < accuracy["proxy"] < accuracy["nudging"] < accuracy["kad-dual"]
    assert report["environment"]["processes"] == 1
    masses = [line["deferral_masses"] for line in lines if line["method"].startswith("kad-dual")]
    assert all(len(row) == line["tokens"] for row, line in zip(masses, lines[80:160], strict=True))


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(undisturbed, tmp_path):
    run(tmp_path, *ASKED, processes=2)
    assert json.loads((tmp_path / "summary.json").read_text())["environment"]["processes"] == 2
    assert results(tmp_path) == results(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "later"), [(1, 1), (2, 1), (1, 2)])
def test_killed_in_the_middle_it_goes_on_and_leaves_the_same_file(undisturbed, tmp_path, processes, later):
    with subprocess.Popen(
        command(tmp_path, *ASKED, processes=processes),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as started:
        deadline = time.monotonic() + SECONDS
        while sum(len(path.read_bytes().splitlines()) for path in tmp_path.glob("results.*.jsonl")) < 100:
            assert started.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        kill(started)
    parts = sorted(tmp_path.glob("results.*.jsonl"))
    assert len(parts) == processes
    with parts[0].open("ab") as file:  # torn in the middle of a line
        file.write(parts[0].read_bytes().splitlines()[-1][:50])
    finished = run(tmp_path, *ASKED, processes=later)
    assert "batches are already done" in finished.stderr
    assert "An incomplete last line was removed" in finished.stderr
    assert results(tmp_path) == results(undisturbed)


def start_nodes(port, *outputs, arguments):
    """A launcher with one process for each node, all of them on this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(outputs)), "--nproc_per_node", "1"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [
        subprocess.Popen(
            [*launch, "--node_rank", str(rank), *command(output, *arguments)[1:]],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, output in enumerate(outputs)
    ]


def finish(nodes):
    """What the nodes wrote to standard error, and their exit statuses."""
    try:
        errors = [node.communicate(timeout=SECONDS)[1] for node in nodes]
    finally:
        for node in nodes:
            kill(node)
    return errors, [node.returncode for node in nodes]


def kill(process):
    """Kill a process with its children, unless it has ended."""
    if process.poll() is None:
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_a_killed_node_ends_the_run_which_the_same_command_goes_on_with(tmp_path):
    """Two nodes, with drafts in batches; the results are those of one process."""
    arguments = ("--method", "kad-dual", "--limit", "80", "--num_samples", "2", "--batch_size", "8")
    output = tmp_path / "nodes"
    nodes = start_nodes(free_port(), output, output, arguments=arguments)
    deadline = time.monotonic() + SECONDS
    while not (output / "results.1.jsonl").exists():
        assert all(node.poll() is None for node in nodes), "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill(nodes[1])
    errors, statuses = finish(nodes)
    assert statuses[0] != 0
    assert "error: Another process of this run has ended before the run was complete" in errors[0]
    left = sum(len(path.read_bytes().splitlines()) for path in output.glob("results*.jsonl"))
    assert 0 < left < 160

    errors, statuses = finish(start_nodes(free_port(), output, output, arguments=arguments))
    assert statuses == [0, 0], errors
    assert "batches are already done" in errors[0]
    assert json.loads((output / "summary.json").read_text())["environment"]["processes"] == 2
    assert run_eval.main([*arguments, "--output", str(tmp_path / "one")]) == 0
    assert results(output) == results(tmp_path / "one")


@pytest.mark.slow
def test_nodes_that_share_no_folder_end_at_the_start(tmp_path):
    outputs = (tmp_path / "a", tmp_path / "b")
    errors, statuses = finish(start_nodes(free_port(), *outputs, arguments=("--method", "base", "--limit", "8")))
    assert 0 not in statuses
    for error in errors:
        before, found, _ = error.partition("error: The processes of a run must write into one folder.")
        assert found
        assert "Traceback" not in before  # behind it, the launcher shows one of its own
    assert not list(tmp_path.glob("*/results*.jsonl"))


@pytest.mark.slow
def test_other_settings_are_refused_with_the_difference(undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path / "copy")
    before = (tmp_path / "copy" / "results.jsonl").read_bytes()
    assert run_eval.main(["--output", str(tmp_path / "copy"), *ASKED, "--seed", "5"]) == 2
    assert "seed is 0 there and 5 here" in capsys.readouterr().err
    assert (tmp_path / "copy" / "results.jsonl").read_bytes() == before


@pytest.mark.slow
def test_an_instance_that_fails_is_wrong_and_the_run_goes_on(tmp_path, capsys):
    pair = tmp_path / "pair"
    shutil.copytree(PAIR, pair)
    questions = [problem.question for problem in make_problems("test", 30)]
    tokenizer = load_tokenizer(pair / "base")
    limit = int(statistics.median(encode(tokenizer, [question])["input_ids"].shape[1] for question in questions))
    config = json.loads((pair / "base" / "config.json").read_text())
    (pair / "base" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": limit}))
    arguments = ["--pair", str(pair), "--limit", "30", "--method", "base", "kad-dual", "--no_speculative"]
    assert run_eval.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "failed" in capsys.readouterr().out
    lines = results(tmp_path / "out")
    failed = [line for line in lines if line["error"] is not None]
    assert 0 < len(failed) < len(lines) == 60
    assert not any(line["correct"] for line in failed)
    assert all(f"ends at {limit}" in line["error"] for line in failed)
    report = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["failed"] for row in report["rows"]] == [len(failed) // 2] * 2


@pytest.mark.slow
@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.dataset and task.extract])
def test_a_public_task_runs_end_to_end_on_local_files(task, tmp_path, capsys):
    arguments = ["--task", task, "--data_dir", str(FIXTURES), "--limit", "5", "--max_new_tokens", "8"]
    methods = ["--method", "base", "kad-dual", "--no_speculative", "--few_shot", "0"]
    assert run_eval.main([*arguments, *methods, "--output", str(tmp_path)]) == 0, capsys.readouterr().err
    assert f"**{task}**, 5 instances" in capsys.readouterr().out
    lines = results(tmp_path)
    assert len(lines) == 10
    # The tiny tokenizer makes long prompts of real questions: some may not fit, and say so.
    assert all(line["error"] is None or "ends at" in line["error"] for line in lines)


def test_the_help_names_every_task_and_method():
    words = set(re.findall(r"[\w-]+", run_eval.__doc__))
    assert {*TASKS, *PLAIN_METHODS, *RULE_METHODS, FROM_CONFIG} <= words


def test_the_figures_of_the_page_are_those_of_its_command():
    """The committed table of the tiny pair: 500 problems, and what the pair is made to show."""
    report = json.loads((RESULTS / "summary.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert {*rows} == {*PLAIN_METHODS, *RULE_METHODS} - {"aligned"}
    assert all(row["instances"] == 500 and row["failed"] == 0 for row in report["rows"])
    assert rows["kad-dual"]["accuracy"] >= 0.8
    assert rows["kad-dual"]["accuracy"] >= rows["proxy"]["accuracy"] + 0.4
    assert rows["kad-dual"]["accuracy"] >= rows["base"]["accuracy_lenient"] + 0.4
    dual, nudging = rows["kad-dual"]["method"], rows["nudging"]["method"]
    (difference,) = (c for c in report["comparisons"] if {c["method_a"], c["method_b"]} == {dual, nudging})
    assert difference["adjusted_p_value"] < 0.001
    page = (ROOT / "docs" / "results.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", to_markdown(report), re.MULTILINE):
        assert table in page


@pytest.mark.parametrize("template", [["--chat", "no"], ["--proxy_chat", "no"]])
def test_questions_may_be_asked_as_plain_text(template, tmp_path):
    arguments = ["--limit", "4", "--method", "base", "kad-dual", "--no_speculative", *template]
    assert run_eval.main([*arguments, "--output", str(tmp_path)]) == 0
    assert all(line["error"] is None and line["text"] for line in results(tmp_path))


def pair_with_tokenizers(folder, **changes):
    """The tiny pair with other tokenizer settings of both models; None: without that one."""
    shutil.copytree(PAIR, folder)
    for model in ("base", "proxy"):
        path = folder / model / "tokenizer_config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return str(folder)


@pytest.mark.parametrize("recipe", [run_eval, sweep, tune])
def test_what_a_tokenizer_s_configuration_lacks_or_lists_changes_no_answer(recipe, tmp_path, capsys):
    """No padding token, and inputs that the model's forward does not take: every command that asks in batches."""
    asked = ["--limit", "6", "--no_speculative", "--batch_size", "3"]
    asked += ["--trials", "1"] if recipe is tune else ["--method", "base", "proxy", "kad-dual", "--proxy_chat", "yes"]
    names = ["input_ids", "token_type_ids", "attention_mask"]
    pair = pair_with_tokenizers(tmp_path / "pair", pad_token=None, model_input_names=names)
    for folder, chosen in (("expected", []), ("found", ["--pair", pair])):
        recipe.main([*asked, *chosen, "--output", str(tmp_path / folder)])
    found, expected = (
        [{**line, "config": None} for line in results(tmp_path / folder)] for folder in ("found", "expected")
    )
    assert found == expected, capsys.readouterr().err


def test_a_tokenizer_with_nothing_to_pad_with_is_refused_in_batches_with_advice_that_works(tmp_path, capsys):
    pair = pair_with_tokenizers(tmp_path / "pair", pad_token=None, eos_token=None)
    asked = ["--pair", pair, "--limit", "2", "--method", "base", "--no_speculative"]
    assert run_eval.main([*asked, "--output", str(tmp_path / "batch")]) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: The tokenizer .*/base' has neither a padding .*--batch_size 1 works without one", error)
    assert "Traceback" not in error
    assert run_eval.main([*asked, "--output", str(tmp_path / "single"), "--batch_size", "1"]) == 0
    assert [line["error"] for line in results(tmp_path / "single")] == [None] * 2


@pytest.mark.parametrize("recipe", [run_eval, sweep, tune])
def test_a_log_file_shows_how_far_the_run_is(recipe, tmp_path, capsys):
    """Standard error is no terminal here: plain lines, no bar."""
    asked = ["--trials", "1"] if recipe is tune else ["--method", "base", "kad-dual"]
    recipe.main([*asked, "--limit", "3", "--output", str(tmp_path)])
    error = capsys.readouterr().err
    lines = re.findall(
        r"^(\d of 6) answers \(\d+%\), \d:\d\d:\d\d passed.*; .*accuracy [01]\.\d+", error, re.MULTILINE
    )
    assert lines[0] == "1 of 6"
    assert lines[-1] == "6 of 6"
    assert "\r" not in error


def test_methods_of_other_settings_are_not_put_beside_each_other(tmp_path, capsys):
    output = ["--output", str(tmp_path), "--no_speculative"]
    assert run_eval.main([*output, "--method", "base", "--limit", "2"]) == 0
    assert run_eval.main([*output, "--method", "kad-dual", "--limit", "3"]) == 2
    assert "instances is 2 there and 3 here" in capsys.readouterr().err
    assert run_eval.main([*output, "--method", "kad-dual", "--limit", "2"]) == 0


def test_a_pair_that_is_named_by_half_is_not_replaced_by_the_tiny_one(tmp_path, capsys):
    KADConfig(proxy="nowhere").save_pretrained(tmp_path / "config")
    assert run_eval.main(["--config", str(tmp_path / "config"), "--output", str(tmp_path / "out")]) == 2
    assert "Base and proxy are needed, got None and 'nowhere'" in capsys.readouterr().err


def test_a_run_in_which_nothing_could_be_answered_is_reported_all_the_same(tmp_path, capsys):
    pair = tmp_path / "pair"
    shutil.copytree(PAIR, pair)
    config = json.loads((pair / "base" / "config.json").read_text())
    (pair / "base" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4}))
    arguments = ["--pair", str(pair), "--limit", "2", "--method", "base", "kad-dual", "--no_speculative"]
    assert run_eval.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert [(row["failed"], row["accuracy"]) for row in rows] == [(2, 0), (2, 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "gsm8q"], "Did you mean 'gsm8k'"),
        (["--method", "kad-duel"], "Did you mean 'kad-dual'"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--num_samples", "2", "--no_do_sample"], "--num_samples 2 needs --do_sample"),
        (["--template_arguments", "[1]"], "must be a JSON object"),
        (["--threshold", "0.4", "--method", "base"], "has the parameter 'threshold'"),
        (["--task", "gsm8k", "--data_dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path, capsys):
    error = error_of(run_eval.main, ["--output", str(tmp_path / "out"), *arguments], capsys)
    assert message in error
    assert "Traceback" not in error
