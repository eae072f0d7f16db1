"""The script `fuzz.py`: it goes on where it was stopped, and leaves no process behind."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from run_command import SECONDS, run_command

SCRIPT = [sys.executable, str(Path(__file__).with_name("fuzz.py"))]


@pytest.mark.slow
def test_a_second_run_goes_on_with_the_chunks_that_are_missing(tmp_path):
    output = tmp_path / "fuzz.json"
    command = [*SCRIPT, "--examples", "3", "--output", str(output)]
    first = run_command(command)
    assert first.returncode == 0, first.stderr
    result = json.loads(output.read_text())
    assert result["chunks"] == ["full 0"] and result["counts"]["sessions: all"] == 3
    second = run_command(command)
    assert second.returncode == 0, second.stderr
    assert "sessions" in first.stdout and "sessions" not in second.stdout
    assert json.loads(output.read_text()) == result


@pytest.mark.slow
def test_workers_end_with_a_script_that_is_killed(tmp_path):
    command = [*SCRIPT, "--examples", "1000", "--workers", "2", "--output", str(tmp_path / "fuzz.json")]
    deadline = time.monotonic() + SECONDS
    children: list[psutil.Process] = []
    with open(tmp_path / "written", "w") as written:
        script = subprocess.Popen(command, stdout=written, stderr=written)
    try:
        while len(children) < 3:  # two workers, and the process with which Python tracks what they share
            assert script.poll() is None and time.monotonic() < deadline, (tmp_path / "written").read_text()
            time.sleep(0.1)
            children = psutil.Process(script.pid).children()
        script.kill()
        script.wait()
        _, left = psutil.wait_procs(children, timeout=SECONDS)
        assert not left
    finally:
        for process in [script, *children]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        script.wait()
