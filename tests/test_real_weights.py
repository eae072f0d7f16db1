"""What tests/real_weights.py computes without any weights: parts of the set, verdicts, close calls, the report."""

import re
import sys
from pathlib import Path

import pytest
import real_weights
import torch
import yaml
from real_weights import (
    CheckFailed,
    Outcome,
    RealWeightsArguments,
    distance_of_choice,
    harness_task,
    judged_alike,
    report,
    run_steps,
    split_rows,
    stated_number,
)
from run_command import run_command

from transformers_kad import DualDeferral
from transformers_kad.recipes.resumable import JsonLinesStore
from transformers_kad.rules.composition import compose

ROOT = Path(__file__).resolve().parents[1]


def test_the_parts_of_the_set_have_no_row_in_common():
    assert split_rows(range(10), 3, 2, 5) == (range(3), range(3, 5), range(5, 10))
    with pytest.raises(ValueError, match=r"3 \+ 2 \+ 6 rows are needed, and the set has 10"):
        split_rows(range(10), 3, 2, 6)


def test_weights_and_questions_stay_outside_the_repository(tmp_path):
    assert RealWeightsArguments(output=str(tmp_path)).threads == 1
    for inside in (ROOT, ROOT / "results", ROOT / "docs" / ".." / "x"):
        with pytest.raises(ValueError, match="must lie outside"):
            RealWeightsArguments(output=str(inside))


@pytest.mark.parametrize(
    "text, number",
    [
        ("7 + 5 = 12. The answer is 12.", "12"),
        ("The answer is 3. No: The answer is $1,072.50.", "1,072.50"),
        ("The answer is -4", "-4"),
        ("It is 12.", None),
        ("The answer is twelve.", None),
        ("The answer is 20/2 = 10.", None),
        ("The answer is 16 - 3.", None),
        ("The answer is 18.\n- that is all", "18"),
    ],
)
def test_the_number_that_is_stated(text, number):
    assert stated_number(text) == number


@pytest.mark.parametrize(
    "filtered, right, prediction, correct, alike",
    [
        ("1,072.00", 1.0, "1072", True, True),
        ("12", 0.0, "12", False, True),
        ("12", 0.0, "15", False, False),  # both wrong, but not for the same number
        ("12", 1.0, "12", False, False),
        ("[invalid]", 0.0, None, False, False),
    ],
)
def test_verdicts_are_compared_with_the_numbers_they_are_about(filtered, right, prediction, correct, alike):
    sample = {"filtered_resps": [filtered], "exact_match": right}
    assert judged_alike(sample, {"prediction": prediction, "correct": correct}) is alike


def test_the_harness_reads_the_task_as_it_is_meant(tmp_path):
    data = tmp_path / 'a "name": x.jsonl'
    task = yaml.safe_load(harness_task(data))
    assert task["dataset_kwargs"]["data_files"]["test"] == str(data)
    assert task["doc_to_text"].startswith("{{question}}\n\nReason step by step.")
    assert task["doc_to_target"] == "{{answer.split('####')[-1].strip()}}"
    assert task["filter_list"][0]["filter"][0]["regex_pattern"] == real_weights.STATED.pattern
    assert task["metric_list"][0]["regexes_to_ignore"] == [",", "\\.0+$"]


def logs(*probabilities):
    return torch.tensor([probabilities]).log()


def test_a_close_call_is_one_of_two_tokens_or_of_the_threshold():
    r = torch.tensor([0.5, 0.25, 0.25])
    assert distance_of_choice(r, 0, 1) == pytest.approx(torch.tensor(2.0).log().item())
    assert distance_of_choice(r, 1, 2) == 0
    # At p = 0.61 the base's token is kept, at 0.59 all is deferred to a proxy that would say something else.
    proxy = logs(0.01, 0.98, 0.01)
    for most, likeliest in ((0.61, 0), (0.59, 1)):
        composed = compose(DualDeferral(0.6), logs(most, 0.3, 0.7 - most), proxy)
        target, base = composed.target_probs[0], composed.base_probs[0]
        assert int(target.argmax()) == likeliest
        assert distance_of_choice(target, 0, 1) > 0.4
        assert distance_of_choice(target, 0, 1, base=base, threshold=0.6) < 0.02
    far = compose(DualDeferral(0.6), logs(0.9, 0.05, 0.05), proxy)
    assert distance_of_choice(far.target_probs[0], 0, 1, base=far.base_probs[0], threshold=0.6) > 0.4


SETTINGS = {
    "arguments": {"limit": 3, "prompts": 2, "chats": 5, "max_new_tokens": 7, "equality_tokens": 4},
    "environment": {"device": "CPU (2 cores)", "torch": "2"},
}


def test_steps_that_are_done_are_not_done_again_and_a_failed_one_is(tmp_path, capsys):
    called = []

    def step(name, error=None):
        def run(given):
            called.append((name, given))
            if error:
                raise CheckFailed(error)
            return Outcome(f"{name} done", "| a |\n|---|" if name == "one" else "")

        return run

    path = tmp_path / "steps.jsonl"
    with (
        JsonLinesStore(path, SETTINGS) as store,
        pytest.raises(CheckFailed, match=r"two failed after 0 s\. 3 is not 4"),
    ):
        run_steps("RUN", store, {"one": step("one"), "two": step("two", "3 is not 4"), "three": step("three")})
    assert called == [("one", "RUN"), ("two", "RUN")]
    with JsonLinesStore(path, SETTINGS) as store:
        records = run_steps("RUN", store, {name: step(name) for name in ("one", "two", "three")})
    assert [name for name, _ in called] == ["one", "two", "two", "three"]
    assert "one: done already, one done" in capsys.readouterr().out

    page = report(SETTINGS, records)
    assert "CPU (2 cores); torch 2; commit" in page
    assert "| step | outcome | seconds |\n|---|---|---:|\n| one | one done | 0 |\n| two | two done | 0 |" in page
    assert "the first 3 are evaluated, the next 2 are prompts, the last 5 were learned from" in page
    assert page.endswith("## one\n\n| a |\n|---|\n")


def test_the_page_of_the_documentation_is_such_a_report():
    """Its sentences, the heading of every step and the table's rows; the figures are those of its own run."""
    page = (ROOT / "docs" / "real_weights.md").read_text(encoding="utf-8")
    settings = {
        "arguments": {"limit": 16, "prompts": 12, "chats": 48, "max_new_tokens": 128, "equality_tokens": 64},
        "environment": {"device": "CPU (x86_64, 2 cores, 1 threads)", "python": "3.11.7"},
    }
    record = {"summary": "", "details": "", "seconds": 0, "commit": ""}
    written = report(settings, [{"step": step, **record} for step in real_weights.STEPS])
    head, _, table = written.partition("- CPU (x86_64")
    assert page.startswith(head + "- CPU (x86_64")
    assert all(line in page.splitlines() for line in table.splitlines() if line.startswith("- "))
    steps = re.findall(r"^\| ([^|]+) \| .* \| \d+ \|$", page, re.MULTILINE)
    assert [step for step in steps if step in real_weights.STEPS] == list(real_weights.STEPS)


def test_a_command_that_fails_fails_its_step(tmp_path):
    rows = '{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "2 + 1?", "answer": "#### 3"}\n'
    (tmp_path / "set.jsonl").write_text(rows * 2)
    run = real_weights.Run(
        RealWeightsArguments(
            output=str(tmp_path / "out"), data=str(tmp_path / "set.jsonl"), limit=1, prompts=1, chats=2
        )
    )
    assert [len(part) for part in (run.evaluated, run.prompts, run.learned)] == [1, 1, 2]
    assert run.call("-c", "print('here')", log="good")[0] == "here\n"
    with pytest.raises(CheckFailed, match="bad: status 3: oh no"):
        run.call("-c", "import sys; sys.exit(sys.stderr.write('oh no') and 3)", log="bad")
    with pytest.raises(CheckFailed, match="bad: a traceback"):
        run.call("-c", "import sys; sys.stderr.write('Traceback (most recent call last)')", log="bad")
    assert "oh no" not in (tmp_path / "out" / "bad.log").read_text()


@pytest.mark.slow
def test_help_explains_the_command():
    run = run_command([sys.executable, ROOT / "tests" / "real_weights.py", "--help"])
    assert (run.returncode, run.stderr) == (0, "")
    assert "    python tests/real_weights.py --output FOLDER" in run.stdout
