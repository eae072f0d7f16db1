"""Runs of generate.py and run_eval.py that are killed, that find the disk full, and that meet on one output.

Whatever happens, the same command started again leaves the results of an undisturbed run: no record is lost, none is
there twice, and every random number is the same, since each line and each batch has its own seed.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import generate
import pytest
import run_eval
import tune
from recipes_without_models import Echo, EchoDecoder
from run_command import SECONDS

from transformers_kad.recipes import resumable
from transformers_kad.recipes.evaluation import session

ROOT = Path(__file__).resolve().parents[2]
LINES = "".join(f'{{"prompt": "Question {number}?", "id": {number}}}\n' for number in range(40))
LONG = "A long answer, so that it ends at any place of a block. " * 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes and limits the size of their files"),
]


class SlowEcho(Echo):
    """Answers with the seed after 2 ms."""

    def answer(self, *arguments, **more):
        time.sleep(0.002)
        return super().answer(*arguments, **more)

    def text(self, ids):
        return f"{ids[0]} {LONG}"


class SlowDecoder(EchoDecoder):
    """Answers with the seed after 2 ms."""

    def answer(self, *arguments, **more):
        time.sleep(0.002)
        return super().answer(*arguments, **more)


class Recipe:
    """A recipe without models, and the records that it leaves in a folder."""

    def __init__(self, module, arguments, output):
        self.module, self.arguments, self.output = module, arguments, output

    def run(self, folder):
        """Run in this process; the exit status."""
        os.chdir(folder)
        return self.module.main(list(self.arguments))

    def records(self, folder):
        text = (folder / self.output).read_text(encoding="utf-8")
        assert text.endswith("\n")
        return [json.loads(line) for line in text.splitlines()]

    def written(self, folder):
        """The bytes of records that are on the disk so far."""
        stem = Path(self.output).name.partition(".")[0]
        parent = (folder / self.output).parent
        return sum(path.stat().st_size for path in parent.glob(f"{stem}*.jsonl")) if parent.is_dir() else 0


GENERATE = Recipe(
    generate, ("--base", "b", "--proxy", "q", "--input", "prompts.jsonl", "--output", "answers.jsonl"), "answers.jsonl"
)
EVALUATE = Recipe(
    run_eval,
    ("--method", "base", "kad-dual", "--limit", "30", "--no_speculative", "--batch_size", "3", "--output", "results"),
    "results/results.jsonl",
)


@pytest.fixture(params=[GENERATE, EVALUATE], ids=["generate", "run_eval"])
def recipe(request, monkeypatch):
    monkeypatch.setattr(generate, "Generator", SlowEcho)
    monkeypatch.setattr(session, "make_decoder", lambda *_, **__: SlowDecoder())
    monkeypatch.setattr(session, "plot_report", lambda *_: [])
    monkeypatch.chdir(os.getcwd())  # restores the working directory
    return request.param


def prepare(folder):
    folder.mkdir(exist_ok=True)
    (folder / "prompts.jsonl").write_text(LINES)
    return folder


@pytest.fixture
def expected(recipe, tmp_path):
    """The records of an undisturbed run."""
    folder = prepare(tmp_path / "undisturbed")
    assert recipe.run(folder) == 0
    return recipe.records(folder)


def start(recipe, folder):
    """Run the recipe in a process of its own, forked so that nothing has to be imported."""

    def main():
        os.setsid()
        with open(os.devnull, "w") as nowhere, open(folder / "stderr.txt", "a") as errors:
            sys.stdout, sys.stderr = nowhere, errors
            status = recipe.run(folder)
            errors.flush()
        os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=main, daemon=True)
    process.start()
    return process


def wait(process):
    process.join(timeout=SECONDS)
    if process.is_alive():
        process.kill()
        pytest.fail("The run has hung.")
    return process.exitcode


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM], ids=lambda stop: stop.name)
def test_killed_at_any_moment_a_run_goes_on(recipe, expected, stop, tmp_path, capsys):
    """Each run is killed up to 6 times, at moments that are drawn at random, before it may finish."""
    drawn = random.Random(f"{recipe.output} {stop}")
    kills = 0
    for number in range(5):
        folder = prepare(tmp_path / f"run {number}")
        for _ in range(6):
            process = start(recipe, folder)
            time.sleep(drawn.uniform(0.0, 0.12))
            if process.is_alive():
                os.kill(process.pid, stop)
                kills += 1
            wait(process)
        assert recipe.run(folder) == 0, capsys.readouterr().err
        assert recipe.records(folder) == expected
        assert recipe.run(folder) == 0
        assert recipe.records(folder) == expected
    assert kills > 10
    assert "already done" in capsys.readouterr().err


def test_two_runs_on_one_output_never_mix(recipe, expected, tmp_path):
    """Of runs that are started at the same time, one writes; the others say so, or find everything done."""
    refused = 0
    for number in range(6):
        folder = prepare(tmp_path / f"run {number}")
        processes = [start(recipe, folder) for _ in range(3)]
        statuses = [wait(process) for process in processes]
        said = (folder / "stderr.txt").read_text()
        assert set(statuses) <= {0, 2}
        assert 0 in statuses
        assert said.count("Another run is writing to") == statuses.count(2)
        refused += statuses.count(2)
        assert recipe.records(folder) == expected
    assert refused > 0


# --- A full disk -----------------------------------------------------------------------------------------------------


@contextmanager
def files_up_to(size):
    """Within it, no file can grow beyond so many bytes: a write ends there, as on a full disk, but at any byte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_grow_at_any_byte(recipe, expected, tmp_path, capsys):
    """The run ends with an error, and goes on from there once there is room."""
    drawn = random.Random(f"{recipe.output} full")
    whole = recipe.written(tmp_path / "undisturbed")
    for number in range(25):
        folder = prepare(tmp_path / f"run {number}")
        for size in sorted(drawn.randrange(whole) for _ in range(drawn.choice([1, 2, 3]))):
            capsys.readouterr()
            with files_up_to(size):
                assert recipe.run(folder) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("error: ")
            assert "File too large" in error
        assert recipe.run(folder) == 0, capsys.readouterr().err
        assert recipe.records(folder) == expected
        assert not list(folder.rglob("*.new"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a file system needs the rights of root")
    yield disk
    os.chdir(tmp_path)
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(recipe, expected, small_disk, tmp_path, capsys):
    """The disk is full from the start, or gets full after some blocks; then there is room again."""
    for blocks in (0, 1, 2, 3, 5, 8, 12):
        folder = prepare(small_disk / "run")
        ballast = small_disk / "ballast"
        free = os.statvfs(small_disk).f_bavail - blocks
        ballast.write_bytes(bytes(free * os.statvfs(small_disk).f_frsize))
        capsys.readouterr()
        status = recipe.run(folder)
        error = capsys.readouterr().err
        assert status in (0, 2)
        if status == 2:
            assert "error: [Errno 28] No space left on device" in error
        else:
            assert blocks > 8
        ballast.unlink()
        assert recipe.run(folder) == 0
        assert recipe.records(folder) == expected
        shutil.rmtree(folder)


def test_a_file_that_is_replaced_between_opening_and_locking_is_opened_again(tmp_path, monkeypatch):
    """What is appended to a file that another run has replaced would be lost."""
    path = tmp_path / "answers.jsonl"
    path.write_text('{"line": 1}\n')
    locked = []

    def lock(file, shown):
        if not locked:
            (tmp_path / "new").write_text('{"line": 1}\n')
            (tmp_path / "new").replace(path)
        locked.append(shown)

    monkeypatch.setattr(resumable, "lock", lock)
    with resumable.open_locked(path) as file:
        resumable.append_json_lines(file, [{"line": 2}])
    assert path.read_text() == '{"line": 1}\n{"line": 2}\n'
    assert len(locked) == 2


# --- With models -----------------------------------------------------------------------------------------------------

SCRIPTS = {
    "generate": ("--base", "{pair}/base", "--proxy", "{pair}/proxy", "--do_sample", "--max_new_tokens", "30"),
    "run_eval": ("--method", "base", "kad-dual", "--limit", "40", "--batch_size", "2", "--max_new_tokens", "30"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_terminated_process_that_was_not_disturbed_by_another(name, tmp_path, capsys):
    """While it runs, a second run on its output is refused; after SIGTERM, the same command goes on."""
    (tmp_path / "prompts.jsonl").write_text(LINES)
    arguments = [argument.format(pair=ROOT / "recipes" / "tiny_pair") for argument in SCRIPTS[name]]
    if name == "generate":
        arguments += ["--input", str(tmp_path / "prompts.jsonl")]
    main = {"generate": generate.main, "run_eval": run_eval.main}[name]
    output = {"generate": "answers.jsonl", "run_eval": "results"}[name]
    inside = {"generate": "answers.jsonl", "run_eval": "results/results.jsonl"}[name]
    recipe = Recipe(None, (), inside)

    def own(folder):
        return [{**record, "seconds": None} for record in recipe.records(folder)]

    (tmp_path / "undisturbed").mkdir()
    assert main([*arguments, "--output", str(tmp_path / "undisturbed" / output)]) == 0
    (tmp_path / "stopped").mkdir()
    command = [*arguments, "--output", str(tmp_path / "stopped" / output)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while recipe.written(tmp_path / "stopped") == 0:
            assert process.poll() is None, "the run ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGSTOP)  # so that it does not end meanwhile
        capsys.readouterr()
        assert main(command) == 2
        assert "Another run is writing to" in capsys.readouterr().err
        process.terminate()
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(timeout=SECONDS) == -signal.SIGTERM
    finally:
        process.kill()
    assert main(command) == 0
    assert "already done" in capsys.readouterr().err
    assert own(tmp_path / "stopped") == own(tmp_path / "undisturbed")


def test_a_study_that_cannot_grow(tmp_path, monkeypatch, capsys):
    """tune.py ends with an error, and goes on from there once there is room."""
    monkeypatch.setattr(tune, "make_decoder", lambda *_, **__: EchoDecoder())
    monkeypatch.setattr(tune, "plot", lambda *_: [])
    monkeypatch.setattr(tune, "replace", lambda config, **_: config)
    asked = ["--limit", "2", "--trials", "3", "--no_speculative", "--batch_size", "2", "--goal", "accuracy"]
    assert tune.main([*asked, "--output", str(tmp_path / "undisturbed")]) == 0
    whole = (tmp_path / "undisturbed" / "study.db").stat().st_size
    drawn = random.Random("study")
    for number in range(10):
        command = [*asked, "--output", str(tmp_path / str(number))]
        capsys.readouterr()
        with files_up_to(drawn.randrange(whole)):
            assert tune.main(command) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
        assert tune.main(command) == 0
        trials = json.loads((tmp_path / str(number) / "tuning.json").read_text())["trials"]
        assert [trial["state"] for trial in trials] == ["complete"] * 3
