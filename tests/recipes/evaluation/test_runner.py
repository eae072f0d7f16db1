"""The run: what is dealt out, seeded, recorded and gone on with."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from thread_processes import launch

from transformers_kad.recipes.evaluation.decoding import Answer
from transformers_kad.recipes.evaluation.methods import Method, parse_methods
from transformers_kad.recipes.evaluation.results import ResultsFolder
from transformers_kad.recipes.evaluation.runner import Workload, answer_batch, run_evaluation
from transformers_kad.recipes.evaluation.tasks import get_task
from transformers_kad.recipes.processes import Processes
from transformers_kad.records.statistics import SequenceStatistics

TASK = get_task("tiny")
*INSTANCES, EXAMPLE = TASK.load(limit=11)
METHODS = parse_methods(["base", "kad-dual"])


class FakeDecoder:
    """Answers with the seed, and remembers what it was asked."""

    def __init__(self, fail=(), speculative=False):
        self.asked, self.fail = [], fail
        self.pair = SimpleNamespace(
            models=SimpleNamespace(
                base="b", proxy="q", reference=None, dtype="auto", quantization=None, align_vocabularies=False
            ),
            device="cpu",
        )
        self.settings, self.speculative, self.aligned = {"do_sample": True}, speculative, None
        self.chat, self.proxy_chat, self.template_arguments = None, "same", {}

    def prepare(self, method):
        pass

    def answer(self, method, prompts, seed, max_new_tokens):
        if max_new_tokens == 2:  # warming up
            return []
        self.asked.append((method.label, [prompt[-1]["content"] for prompt in prompts], seed))
        if len(self.asked) in self.fail:
            raise KeyboardInterrupt
        statistics = SequenceStatistics(
            tokens=3, rounds=2, drafted=4, accepted=1, deferral_mass=0.5, deferral_masses=(0.25, 0.5, 0.75)
        )
        return [
            Answer(
                f"The answer is {(seed + row) % 100}.", True, 3, 0.25, None if method.config is None else statistics
            )
            for row in range(len(prompts))
        ]


def workload(**settings):
    return Workload(TASK, INSTANCES, 48, **{"batch_size": 4, **settings})


def run(path, decoder, *, processes=None, methods=METHODS, report=None, **settings):
    said = []
    with ResultsFolder(path, processes.index if processes else 0) as folder:
        run_evaluation(decoder, [workload(**settings)], methods, folder, processes=processes, log=said.append)
    return said


class FirstOf(Processes):
    """The first of some processes, of which the others do nothing."""

    def __init__(self, number):
        self.index, self.number = 0, number

    def gather(self, value):
        return [value] * self.number


def records(path):
    return ResultsFolder(path).read()


def test_every_instance_is_answered_once_by_every_method_and_sample(tmp_path):
    run(tmp_path, FakeDecoder(), num_samples=3)
    found = [(r["method"], r["instance"], r["sample"]) for r in records(tmp_path)]
    expected = [(m.label, i.id, s) for m in METHODS for i in INSTANCES for s in range(3)]
    assert sorted(found) == sorted(expected)


def test_batches_have_seeds_of_their_own_that_nothing_else_decides(tmp_path):
    decoder = FakeDecoder()
    run(tmp_path, decoder, num_samples=2)
    seeds = [seed for _, _, seed in decoder.asked]
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 3
    again = FakeDecoder()
    run(tmp_path / "again", again, methods=METHODS[::-1], num_samples=2)
    assert sorted(again.asked) == sorted(decoder.asked)
    other = FakeDecoder()
    run(tmp_path / "other", other, num_samples=2, seed=1)
    assert not {seed for _, _, seed in other.asked} & set(seeds)


def test_processes_share_the_batches_and_leave_what_one_would_have(tmp_path):
    alone = FakeDecoder()
    run(tmp_path / "one", alone)
    decoders, path = (FakeDecoder(), FakeDecoder()), tmp_path / "two"
    launch(2, lambda processes: run(path, decoders[processes.index], processes=processes))
    assert len(decoders[0].asked) == len(decoders[1].asked) == 3
    assert sorted(decoders[0].asked + decoders[1].asked) == sorted(alone.asked)
    assert (path / "results.jsonl").read_text() == (tmp_path / "one" / "results.jsonl").read_text()


def test_processes_that_share_no_folder_answer_nothing(tmp_path):
    decoders = (FakeDecoder(), FakeDecoder())
    errors = launch(2, lambda p: run(tmp_path / str(p.index), decoders[p.index], processes=p))
    assert all("must write into one folder" in str(error) for error in errors)
    assert decoders[0].asked == decoders[1].asked == []


def test_processes_with_different_questions_answer_nothing(tmp_path):
    decoders = (FakeDecoder(), FakeDecoder())

    def run_with(processes):
        run(tmp_path, decoders[processes.index], processes=processes, seed=processes.index)

    errors = launch(2, run_with)
    assert all("seed of 'tiny' is 0 in process 0 and 1 in process 1" in str(error) for error in errors)
    assert decoders[0].asked == decoders[1].asked == []


def test_a_folder_that_holds_other_results_ends_all_processes(tmp_path):
    run(tmp_path, FakeDecoder())
    errors = launch(2, lambda processes: run(tmp_path, FakeDecoder(), processes=processes, seed=1))
    assert all("seed is 0 there and 1 here" in str(error) for error in errors)


def test_answers_that_are_missing_at_the_end_are_an_error_in_all_processes(tmp_path, monkeypatch):
    """As where a network file system does not show the main process the file of another one."""
    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [p for p in listed(path, pattern) if ".1." not in p.name])
    errors = launch(2, lambda processes: run(tmp_path, FakeDecoder(), processes=processes))
    assert all("3 of 6 batches are missing" in str(error) for error in errors)
    monkeypatch.undo()
    again = FakeDecoder()
    assert run(tmp_path, again) == ["6 of 6 batches are already done."]
    assert again.asked == []


@pytest.mark.parametrize("stop", [1, 2, 6])
def test_a_stopped_run_goes_on_and_repeats_nothing(tmp_path, stop):
    undisturbed = FakeDecoder()
    run(tmp_path / "whole", undisturbed)
    first, second = FakeDecoder(fail=[stop]), FakeDecoder()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", first)
    said = run(tmp_path / "stopped", second)
    assert first.asked[:-1] + second.asked == undisturbed.asked
    assert (tmp_path / "stopped" / "results.jsonl").read_text() == (tmp_path / "whole" / "results.jsonl").read_text()
    assert said == ([f"{stop - 1} of 6 batches are already done."] if stop > 1 else [])


@pytest.mark.parametrize("stop", [1, 2, 9])
@pytest.mark.parametrize("number", [1, 2])
def test_a_stop_loses_no_answer_that_is_made_alone(tmp_path, stop, number):
    """They are made one at a time, and each is on the disk before the next one is begun."""
    undisturbed = FakeDecoder(speculative=True)
    run(tmp_path / "whole", undisturbed, batch_size=1)
    assert [len(questions) for _, questions, _ in undisturbed.asked] == [1] * 20
    first, path = FakeDecoder(fail=[stop], speculative=True), tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(path, first, processes=FirstOf(number), batch_size=1)
    kept = [json.loads(line) for part in path.glob("results.0.jsonl") for line in part.read_text().splitlines()]
    assert len(kept) == stop - 1
    second = FakeDecoder(speculative=True)
    run(path, second, batch_size=1)
    assert sorted(first.asked[:-1] + second.asked) == sorted(undisturbed.asked)
    assert (path / "results.jsonl").read_text() == (tmp_path / "whole" / "results.jsonl").read_text()


def test_a_speculative_run_answers_batches_of_the_size_that_is_asked_for(tmp_path):
    decoder = FakeDecoder(speculative=True)
    run(tmp_path, decoder, batch_size=7)
    assert [len(questions) for _, questions, _ in decoder.asked] == [7, 3] * 2


def test_more_methods_and_samples_are_added_to_what_is_there(tmp_path):
    run(tmp_path, FakeDecoder(), methods=METHODS[:1])
    before = records(tmp_path)
    decoder = FakeDecoder()
    run(tmp_path, decoder, num_samples=2)
    assert len(decoder.asked) == 9
    assert [r for r in records(tmp_path) if r["method"] == "base" and r["sample"] == 0] == before


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"batch_size": 5}, "batch_size is 4 there and 5 here"),
        ({"instances": INSTANCES[::-1]}, "questions is"),
        ({"instances": [replace(INSTANCES[0], question="Else?"), *INSTANCES[1:]]}, "questions is"),
        ({"examples": [EXAMPLE]}, "few_shot is 0 there and 1 here"),
        ({"max_new_tokens": 20}, "max_new_tokens is 48 there and 20 here"),
    ],
)
def test_what_decides_the_results_is_held_against_those_that_are_there(tmp_path, changed, difference):
    run(tmp_path, FakeDecoder())
    decoder = FakeDecoder()
    with pytest.raises(ValueError, match=re.escape(difference)), ResultsFolder(tmp_path) as folder:
        asked = replace(workload(), **changed)
        run_evaluation(decoder, [asked], METHODS, folder, log=lambda line: None)
    assert decoder.asked == []


def test_another_solution_of_an_example_is_another_question(tmp_path):
    run(tmp_path, FakeDecoder(), examples=[EXAMPLE])
    with pytest.raises(ValueError, match="questions is"):
        run(tmp_path, FakeDecoder(), examples=[replace(EXAMPLE, solution="Else.")])


def test_failed_answers_are_tried_again_when_that_is_asked_for(tmp_path):
    run(tmp_path, FakeDecoder(), methods=METHODS[:1])
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text().replace('"error": null', '"error": "out of memory"', 1))
    again = FakeDecoder()
    assert run(tmp_path, again, methods=METHODS[:1]) == ["3 of 3 batches are already done."]
    with ResultsFolder(tmp_path) as folder:
        run_evaluation(again, [workload()], METHODS[:1], folder, log=lambda _: None, retry_failed=True)
    assert len(again.asked) == 1
    assert all(record["error"] is None for record in records(tmp_path))


def test_a_line_says_what_was_answered_whether_it_is_right_and_what_it_cost(tmp_path):
    batch = next(workload(positions=True).batches(METHODS[1]))
    decoder = FakeDecoder()
    line = answer_batch(decoder, batch, "abc")[1]
    assert line == {
        "task": "tiny",
        "method": "kad-dual threshold=0.4",
        "instance": INSTANCES[1].id,
        "sample": 0,
        "batch": "tiny/kad-dual threshold=0.4/0/0",
        "batch_number": 0,
        "batch_size": 4,
        "row": 1,
        "config": "abc",
        "prediction": str((batch.seed + 1) % 100),
        "answer": INSTANCES[1].answer,
        "correct": str((batch.seed + 1) % 100) == INSTANCES[1].answer,
        "correct_lenient": str((batch.seed + 1) % 100) == INSTANCES[1].answer,
        "text": f"The answer is {(batch.seed + 1) % 100}.",
        "ended": True,
        "error": None,
        "tokens": 3,
        "seconds": 0.25,
        "rounds": 2,
        "drafted": 4,
        "accepted": 1,
        "acceptance_histogram": [],
        "deferral_mass": 0.5,
        "deferral_masses": [0.25, 0.5, 0.75],
    }


def test_a_failed_answer_is_wrong_and_keeps_its_reason():
    batch = next(workload().batches(Method("base")))
    decoder = FakeDecoder()
    decoder.answer = lambda *_: [Answer(error="ValueError: too long", seconds=0.1)] * 4
    for line in answer_batch(decoder, batch, "abc"):
        assert (line["prediction"], line["correct"], line["correct_lenient"]) == (None, False, False)
        assert line["error"] == "ValueError: too long"
        assert "rounds" not in line


@pytest.mark.parametrize(("name", "value"), [("instance", "x"), ("answer", "5000")])
def test_a_line_of_another_question_than_the_one_in_its_place_is_refused(tmp_path, name, value):
    run(tmp_path, FakeDecoder())
    path = tmp_path / "results.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps(json.loads(first) | {name: value}) + "\n", *others]))
    with pytest.raises(ValueError, match=r"results\.jsonl', line 1 is of the question"):
        run(tmp_path, FakeDecoder())
