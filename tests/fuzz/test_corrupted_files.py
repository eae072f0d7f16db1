"""Every file that the library and the recipes read back, damaged at random.

Whatever was done to a file, the outcome is one of three: an error of the library that names the file (and the line,
if it has lines), a repair that is reported, or the result of the undamaged file where the damage is harmless. No
record is lost or doubled without a word, and a file that is refused is left as it is.
"""

import json
import random
import re
import shutil
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generate
import pytest
import quickstart
import run_eval
import train_tiny_pair
import tune
from file_corruptions import BYTES, DOCUMENT_CHANGES, HARMLESS, IN_ITS_PLACE, ONE_DRAW, change_document, change_line
from recipes_without_models import PROMPTS, Echo, EchoDecoder

from transformers_kad import KADConfig
from transformers_kad.recipes.evaluation import session
from transformers_kad.recipes.evaluation.tasks import get_task
from transformers_kad.recipes.resumable import JsonLinesStore
from transformers_kad.recipes.training import AlignmentError
from transformers_kad.recipes.training.arguments import AlignmentArguments
from transformers_kad.recipes.training.chats import as_chat, template_settings, unused_fields
from transformers_kad.recipes.training.data import make_examples
from transformers_kad.recipes.training.output import check_output, checkpoint_to_resume, settings_of, write_record
from transformers_kad.recipes.training.rows import read_rows

FIXTURES = Path(__file__).resolve().parents[1] / "recipes" / "evaluation" / "fixtures"
pytestmark = pytest.mark.slow

COUNTS: Counter[str] = Counter()
DRAWS = 4
LONGEST_MESSAGE = 4000  # characters of an error message
KINDS = 25  # of files
FILES = 2275  # damaged ones of all kinds


class Refused(Exception):
    """The library's own error, with its message."""


@dataclass
class Subject:
    """A file that is damaged, and what reads it.

    Attributes:
        file: the file.
        read: reads it and returns what was read; raises `Refused`.
        lines: whether the file consists of lines, such as JSON Lines.
        numbered: whether an error names the number of the line.
        judge: checks what was read of a file that was not refused. It gets the undamaged content, the damaged content,
            what was read and what was written to standard error.
        named: what an error must name; by default the file.
    """

    file: Any
    read: Any
    judge: Any
    lines: bool = False
    named: str | None = None
    json: bool = True
    draws: int = DRAWS
    numbered: bool = True
    binary: bool = False
    on_disk: bool = True  # whether the program itself opens the file
    harmless: frozenset[str] = HARMLESS
    moves: bool = False  # whether its lines may be in another file when they are refused


def recipe(main, capsys, *arguments):
    """Run a recipe; what it wrote to standard error. Raises `Refused` with its error message."""
    try:
        status = main([*map(str, arguments)])
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    if status == 2:
        raise Refused(captured.err.strip().splitlines()[-1])
    if isinstance(status, str):
        raise Refused(status)
    assert status in (0, 1, None), captured.err
    return captured.err


def reading(function):
    """A reader that turns the errors of a function into `Refused`."""

    def read():
        try:
            return function()
        except (ValueError, OSError, AlignmentError) as error:
            raise Refused(str(error)) from error

    return read


def damages(subject, name):
    """All damages of a file: their names, and a function that damages it."""
    content = subject.file.read_bytes()

    def write(new):
        def damage(path):
            path.write_bytes(new)

        return damage

    for kind, change in BYTES.items():
        if subject.binary and kind in ONE_DRAW - {"empty", "only blanks"}:
            continue
        for draw in range(1 if kind in ONE_DRAW else subject.draws):
            new = change(random.Random(f"{name} {kind} {draw}"), content)
            if new is not None and new != content:
                yield f"{kind} ({draw})", write(new)
    for kind in DOCUMENT_CHANGES if subject.json else ():
        for draw in range(1 if "10 MB" in kind else 2 * subject.draws):
            rng = random.Random(f"{name} {kind} {draw}")
            new = change_line(rng, content, kind) if subject.lines else change_document(rng, content.decode(), kind)
            new = new.encode("utf-8", "surrogatepass") if isinstance(new, str) else new
            if new is not None and new != content:
                yield f"{kind} ({draw})", write(new)
    if subject.on_disk:
        yield from IN_ITS_PLACE.items()


def check(name, make, tmp_path, capsys):
    """Damage a file in every way, and check the outcome. `make(folder)` writes the files and returns the subject."""
    template = tmp_path / "template"
    template.mkdir()
    listed = list(damages(make(template), name))
    failures = []
    for number, (damage_name, damage) in enumerate(listed):
        folder = tmp_path / f"case {number}"
        folder.mkdir()
        subject = make(folder)
        before = subject.file.read_bytes()
        damage(subject.file)
        COUNTS[name] += 1
        capsys.readouterr()
        try:
            judge(subject, damage_name, before)
        except Exception as error:
            where = (
                ""
                if isinstance(error, AssertionError)
                else "\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
            )
            failures.append(f"{damage_name}: {type(error).__name__}: {str(error).splitlines()[:1]}{where}")
        shutil.rmtree(folder)
    assert not failures, f"{len(failures)} of {len(listed)} fail:\n" + "\n".join(failures[:8])


def judge(subject, damage_name, before):
    damaged = subject.file.read_bytes() if subject.file.is_file() else None
    kind = damage_name.partition(" (")[0]
    try:
        result = subject.read()
    except Refused as refused:
        message = str(refused)
        assert kind not in subject.harmless, f"refused: {message}"
        assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters: {message[:200]}"
        assert (subject.named or subject.file.name) in message, f"the message names no file: {message}"
        assert "Traceback" not in message
        if damaged is not None:
            assert subject.moves or subject.file.read_bytes() == damaged, f"a refused file was changed: {message}"
            if subject.lines and subject.numbered and not any(word in message for word in WHOLE):
                assert re.search(r"\bline \d+", message, re.IGNORECASE), f"the message names no line: {message}"
        return
    if kind in subject.harmless:
        subject.judge(before, before, result, kind)
    else:
        subject.judge(before, damaged, result, kind)


# What a message says that is about the file as a whole, or about other files.
WHOLE = ("carriage return", "is empty", "No such file", "is a directory", "Too many levels", "has no", "holds results")


def parsed(content):
    """The objects in JSON Lines, as JSON itself reads them, and whether the last line is complete."""
    lines = content.split(b"\n")
    return [json.loads(line.decode("utf-8-sig")) for line in lines[:-1]], not lines[-1]


def objects_of(content):
    """All JSON values in a text, one after the other, with any blanks between them."""
    text, values = content.decode("utf-8-sig").strip(), []
    while text:
        value, end = json.JSONDecoder().raw_decode(text)
        values, text = [*values, value], text[end:].strip()
    return values


def same(found, expected):
    """Whether two values are the same JSON; NaN equals itself."""
    return json.dumps(found) == json.dumps(expected)


# --- generate.py --------------------------------------------------------------------------------------------------


@pytest.fixture
def echo(monkeypatch, capsys):
    """Runs generate.py over a folder with prompts; returns the records and what was said."""
    monkeypatch.setattr(generate, "Generator", Echo)

    def run(folder, *arguments):
        monkeypatch.chdir(folder)  # the settings have the name of the input
        files = ("--input", "prompts.txt", "--output", "answers.jsonl")
        said = recipe(generate.main, capsys, "--base", "b", "--proxy", "q", *files, *arguments)
        return parsed((folder / "answers.jsonl").read_bytes())[0], said

    return run


@pytest.fixture
def answered(echo, tmp_path_factory):
    """A folder with the files of a finished run, and its records."""
    folder = tmp_path_factory.mktemp("answered")
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return folder, echo(folder)[0]


def judge_answers(expected):
    """Every line of the input has one record. Those that the damage has not touched are as before."""

    def judge(before, damaged, result, kind):
        records, said = result
        assert [record["line"] for record in records] == sorted(record["line"] for record in expected)
        kept = [] if damaged is None else damaged.split(b"\n")[:-1]
        changed = [record for record in records if record not in expected]
        for record in changed:
            assert any(same(record, json.loads(line.decode("utf-8-sig"))) for line in kept), (record, kind)
        if damaged is not None and len(kept) != before.count(b"\n"):
            assert "already done" in said or not kept
        if damaged is not None and not damaged.endswith(b"\n") and damaged:
            assert "An incomplete last line was removed" in said

    return judge


@pytest.mark.parametrize("file", ["answers.jsonl", "answers.jsonl.part1"])
def test_answers_of_generate(file, answered, echo, tmp_path, capsys):
    template, expected = answered

    def make(folder):
        shutil.copytree(template, folder, dirs_exist_ok=True)
        if file.endswith("part1"):
            lines = (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)
            (folder / "answers.jsonl").write_bytes(lines[0] + lines[2])
            (folder / file).write_bytes(lines[1] + lines[3] + lines[4])
        return Subject(
            folder / file,
            lambda: echo(folder),
            judge_answers(expected),
            lines=True,
            named="answers.jsonl",
            moves=file != "answers.jsonl",
        )

    check(f"generate.py {file}", make, tmp_path, capsys)


def test_settings_of_generate(answered, echo, tmp_path, capsys):
    template, expected = answered

    def judge(before, damaged, result, kind):
        assert result[0] == expected

    def make(folder):
        shutil.copytree(template, folder, dirs_exist_ok=True)
        return Subject(folder / "answers.jsonl.settings.json", lambda: echo(folder), judge, named="answers.jsonl")

    check("generate.py answers.jsonl.settings.json", make, tmp_path, capsys)


def test_prompts(echo, answered, tmp_path, capsys):
    """Every line that is not blank has a record, in order: an answer, or an error that is reported with its number."""

    def judge(before, damaged, result, kind):
        records, said = result
        text = damaged.decode("utf-8", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
        lines = {at: line.removeprefix("\ufeff") for at, line in enumerate(text.split("\n"), start=1)}
        lines = {at: line for at, line in lines.items() if line.strip()}
        assert [record["line"] for record in records] == list(lines)
        for record in records:
            line = lines[record["line"]]
            if "error" in record:
                assert f"Line {record['line']} failed" in said
                assert len(record["error"]) < LONGEST_MESSAGE
                continue
            assert "\0" not in line and "\udcff" not in line
            if line.lstrip().startswith("{"):
                assert same(record["row"], json.loads(line))
            else:
                assert record["prompt"] == line
        if kind in HARMLESS:
            assert records == answered[1]

    def make(folder):
        (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
        return Subject(folder / "prompts.txt", lambda: echo(folder), judge, lines=True)

    check("generate.py prompts", make, tmp_path, capsys)


# --- run_eval.py and sweep.py --------------------------------------------------------------------------------------


def results_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Runs run_eval.py into a folder; returns the records, the report and what was said."""
    monkeypatch.setattr(session, "make_decoder", lambda *_, **__: EchoDecoder())
    monkeypatch.setattr(session, "plot_report", lambda *_: [])

    def run(folder, *arguments):
        asked = ("--method", "base", "kad-dual", "--limit", "6", "--no_speculative", "--batch_size", "2")
        said = recipe(run_eval.main, capsys, *asked, "--output", folder, *arguments)
        return results_of(folder), json.loads((folder / "summary.json").read_text()), said

    return run


@pytest.fixture
def evaluated(evaluate, tmp_path_factory):
    """A folder with the results of a finished run on two tasks, and its records and report."""
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, *evaluate(folder)[:2]


def place_of(record):
    return record["method"], record["instance"], record["sample"]


def judge_results(expected, report):
    """Every question has one answer of each method; those that the damage has not touched are as before."""

    def judge(before, damaged, result, kind):
        records, summary, said = result
        assert [place_of(record) for record in records] == [place_of(record) for record in expected]
        kept = [] if damaged is None else damaged.split(b"\n")[:-1]
        for record in records:
            if record not in expected:
                assert any(same(record, json.loads(line.decode("utf-8-sig"))) for line in kept), (record, kind)
        if records == expected:
            assert summary["rows"] == report["rows"]
        if damaged and not damaged.endswith(b"\n"):
            assert "An incomplete last line was removed" in said

    return judge


@pytest.mark.parametrize("file", ["results.jsonl", "results.0.jsonl", "results.1.jsonl"])
def test_results_of_run_eval(file, evaluated, evaluate, tmp_path, capsys):
    template, records, report = evaluated

    def make(folder):
        shutil.copytree(template, folder, dirs_exist_ok=True)
        if file != "results.jsonl":
            lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
            (folder / "results.jsonl").write_bytes(b"".join(lines[:4]))
            (folder / file).write_bytes(b"".join(lines[4:]))
        return Subject(
            folder / file,
            lambda: evaluate(folder),
            judge_results(records, report),
            lines=True,
            named="results",
            moves=file != "results.jsonl",
        )

    check(f"run_eval.py {file}", make, tmp_path, capsys)


@pytest.mark.parametrize("file", ["configs.json", "summary.json", ".lock"])
def test_other_files_of_run_eval(file, evaluated, evaluate, tmp_path, capsys):
    template, expected, report = evaluated

    def judge(before, damaged, result, kind):
        assert (result[0], result[1]["rows"]) == (expected, report["rows"])

    def make(folder):
        shutil.copytree(template, folder, dirs_exist_ok=True)
        (folder / ".lock").write_bytes(b"{}")
        return Subject(folder / file, lambda: evaluate(folder), judge, draws=2, json=file != ".lock")

    check(f"run_eval.py {file}", make, tmp_path, capsys)


# --- tune.py -------------------------------------------------------------------------------------------------------


def test_the_study_of_tune(monkeypatch, capsys, tmp_path, tmp_path_factory):
    monkeypatch.setattr(tune, "make_decoder", lambda *_, **__: EchoDecoder())
    monkeypatch.setattr(tune, "plot", lambda *_: [])
    monkeypatch.setattr(tune, "replace", lambda config, **_: config)

    def run(folder):
        asked = ("--limit", "2", "--trials", "3", "--no_speculative", "--batch_size", "2", "--goal", "accuracy")
        said = recipe(tune.main, capsys, *asked, "--output", folder)
        return json.loads((folder / "tuning.json").read_text())["trials"], said

    template = tmp_path_factory.mktemp("tuned")
    expected, _ = run(template)

    def judge(before, damaged, result, kind):
        trials, said = result
        assert len(trials) == 3
        assert damaged or [trial["method"] for trial in trials] or "no trials" in said
        if trials != expected:  # a flipped bit in a number is one of another trial; else the search began anew
            assert kind in ("a bit flipped", "control characters inserted") or "The study has no trials" in said

    def make(folder):
        shutil.copytree(template, folder, dirs_exist_ok=True)
        return Subject(folder / "study.db", lambda: run(folder), judge, json=False, binary=True, draws=3, moves=True)

    check("tune.py study.db", make, tmp_path, capsys)


# --- Benchmarks ---------------------------------------------------------------------------------------------------


def test_measurements_of_an_interrupted_benchmark(tmp_path, capsys):
    """As benchmark_speed.py, its presets and benchmark_verification.py store them."""
    settings = {"seed": 0}
    runs = {"base": {"seconds": 1.5, "counts": [["base", 1]]}}
    records = [{"batch_size": 2, "repetition": at, "load": 0.5 + at, "runs": runs} for at in range(4)]

    def read(path):
        with JsonLinesStore(path, settings, checked=True) as store:
            return store.records, store.torn

    def judge(before, damaged, result, kind):
        found, torn = result
        assert all(record in records for record in found)
        assert len(found) == len({record["repetition"] for record in found})
        lines = [] if damaged is None else damaged.split(b"\n")[:-1]
        assert len(found) == len(lines)
        if damaged and not damaged.endswith(b"\n"):
            assert torn is not None

    def make(folder):
        with JsonLinesStore(folder / "runs.jsonl", settings, checked=True) as store:
            for record in records:
                store.append(record)
        return Subject(folder / "runs.jsonl", reading(lambda: read(folder / "runs.jsonl")), judge, lines=True)

    check("runs.jsonl of benchmarks", make, tmp_path, capsys)


# --- Settings --------------------------------------------------------------------------------------------------------

CONFIG = KADConfig("primal", {"budget": 0.9}, 1.5, 3, base="owner/base", proxy="owner/proxy")


def test_kad_config(tmp_path, capsys):
    def judge(before, damaged, found, kind):
        if kind in HARMLESS:
            assert found == CONFIG
        else:
            content = json.loads(damaged.decode("utf-8-sig"))
            assert all(getattr(found, name) == value for name, value in content.items() if hasattr(found, name))
            assert found.settings.keys() == CONFIG.settings.keys()

    def make(folder):
        path = CONFIG.save_pretrained(folder)
        return Subject(path, reading(lambda: KADConfig.from_pretrained(folder)), judge, draws=8)

    check("kad_config.json", make, tmp_path, capsys)


def aligned(folder, **settings):
    return AlignmentArguments(
        proxy="p", base="b", data="d", output_dir=str(folder), resume_from_checkpoint="auto", **settings
    )


def test_the_record_of_a_training(tmp_path, capsys):
    def judge(before, damaged, found, kind):
        assert found is (damaged is not None and json.loads(damaged.decode("utf-8-sig"))["finished"])

    def make(folder):
        write_record(folder, {"finished": True, "settings": settings_of(aligned(tmp_path)), "more": [1]})
        # The output folder is a setting that may change.
        return Subject(folder / "training.json", reading(lambda: check_output(aligned(folder))), judge, named="case")

    check("training.json", make, tmp_path, capsys)


def test_the_state_of_a_checkpoint(tmp_path, capsys):
    def judge(before, damaged, found, kind):
        assert found is None or found.endswith("checkpoint-3")
        assert (found is None) == (damaged is None)

    def make(folder):
        path = folder / "checkpoints" / "checkpoint-3" / "trainer_state.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"best_model_checkpoint": str(tmp_path), "log_history": [{"loss": 1.5}]}, indent=2))
        (folder / "checkpoints" / "checkpoint-new").mkdir()
        (folder / "checkpoints" / "checkpoint-new" / "trainer_state.json").touch()
        read = reading(lambda: checkpoint_to_resume(aligned(folder)))
        return Subject(path, read, judge, named="checkpoint")

    check("trainer_state.json", make, tmp_path, capsys)


def test_the_settings_of_the_tiny_pair(tmp_path, capsys):
    settings = train_tiny_pair.Settings.smoke(0)

    def judge(before, damaged, found, kind):
        assert found is None

    def make(folder):
        train_tiny_pair.check_settings(folder / "pair", settings)
        (folder / "pair" / "base").mkdir()
        read = reading(lambda: train_tiny_pair.check_settings(folder / "pair", settings))
        return Subject(folder / "pair" / "settings.json", read, judge, named="pair")

    check("tiny_pair/settings.json", make, tmp_path, capsys)


# --- Data ------------------------------------------------------------------------------------------------------------

ROWS = [
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "weight": 1}]},
    {"prompt": "Déjà", "completion": "vu", "tools": '[{"name": "sum"}]', "chat_template_kwargs": {"brief": True}},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Wer?"}]}], "completion": "Ich."},
]


def read_training_data(path):
    rows = read_rows(str(path))
    make_examples(rows, lambda content: [(as_chat(content), template_settings(content))])
    unused_fields(rows, "{{ messages }}", preferences=False)
    return rows


def test_training_data(tmp_path, capsys):
    """Every line that is not blank is a row; those that can't be used are listed by number."""

    def judge(before, damaged, rows, kind):
        lines = {at: line for at, line in enumerate(damaged.split(b"\n"), start=1) if line.strip()}
        assert list(rows.numbers) == list(lines)
        for line, content in zip(lines.values(), rows.contents, strict=True):
            assert same(content, json.loads(line.decode("utf-8-sig")))

    def make(folder):
        path = folder / "chats.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
        return Subject(path, reading(lambda: read_training_data(path)), judge, lines=True, draws=6)

    check("training data", make, tmp_path, capsys)


def test_training_data_of_a_folder(tmp_path, capsys):
    def judge(before, damaged, rows, kind):
        assert len(rows.contents) == len(objects_of(damaged))

    def make(folder):
        path = folder / "data" / "train.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps({"prompt": f"{n}", "completion": "x"}) + "\n" for n in range(4)))
        return Subject(
            path,
            reading(lambda: read_training_data(path.parent)),
            judge,
            lines=True,
            numbered=False,
            draws=1,
            named="data",
        )

    check("training data in a folder", make, tmp_path, capsys)


@pytest.mark.parametrize("task", ["gsm8k", "commonsense_qa"])
def test_data_of_a_task(task, tmp_path, capsys):
    """As many questions as rows that the file has, none of them cut."""
    source = next((FIXTURES / get_task(task).dataset).rglob(f"{get_task(task).split}-*.jsonl"))
    if task == "gsm8k":
        source = FIXTURES / "openai" / "gsm8k" / "main" / source.name

    def judge(before, damaged, instances, kind):
        assert [one.question.partition("\n\n")[0] for one in instances] == [
            row["question"].partition("\n\n")[0] for row in objects_of(damaged)
        ]

    def make(folder):
        path = shutil.copy(source, folder / "test.jsonl")
        read = reading(lambda: get_task(task).load(data_dir=path))
        return Subject(path, read, judge, lines=True, numbered=False, draws=1, named=get_task(task).dataset)

    check(f"data of {task}", make, tmp_path, capsys)


# --- The command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe_module", "option", "text"),
    [
        (generate, "--template_arguments", '{"enable_thinking": false, "tools": [{"name": "sum"}]}'),
        (generate, "--device_map", '{"model.layers.0": "cpu", "lm_head": 0}'),
        (generate, "--max_memory", '{"0": "20GiB", "cpu": "60GiB"}'),
        (run_eval, "--template_arguments", '{"enable_thinking": false}'),
        (quickstart, "--parameters", '{"threshold": 0.5}'),
    ],
)
def test_json_on_the_command_line(recipe_module, option, text, tmp_path, capsys, monkeypatch):
    """Values that can't be used end the program with one line that names the option."""
    for name in ("run", "exit_status", "run_tiny_pair"):
        if hasattr(recipe_module, name):
            monkeypatch.setattr(recipe_module, name, lambda *_: 0)

    def make(folder):
        path = folder / "value.json"
        path.write_text(text)

        def read():
            value = path.read_text("utf-8", errors="surrogateescape")
            more = ("--device_map", "auto") if option == "--max_memory" else ()
            return recipe(recipe_module.main, capsys, option, value, *more)

        return Subject(path, read, lambda *_: None, draws=2, named="error: ", harmless=frozenset(), on_disk=False)

    check(f"{recipe_module.__name__}.py {option}", make, tmp_path, capsys)


def test_the_number_of_damaged_files(capsys, record_property):
    """The last test of the file: how many files the tests before it have damaged, by kind."""
    total = sum(COUNTS.values())
    record_property("corrupted_files", total)
    with capsys.disabled():
        print(f"\n{total:,} damaged files: {', '.join(f'{name} {count}' for name, count in COUNTS.items())}")
    if len(COUNTS) == KINDS:  # all tests of the file were run
        assert total == FILES
