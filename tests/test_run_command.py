"""`run_command`: what a command wrote, and the end of one that hangs."""

import sys

import psutil
import pytest
from run_command import run_command

HANGS = "import time\n\ndef the_line_that_hangs():\n    time.sleep(600)\n\nthe_line_that_hangs()\n"
STARTS_ANOTHER = """
import subprocess, sys
print("started", flush=True)
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""


def test_the_status_and_what_was_written():
    code = "import sys; print(input()); sys.exit('no')"
    done = run_command([sys.executable, "-c", code], standard_input="yes\n")
    assert (done.returncode, done.stdout, done.stderr) == (1, "yes\n", "no\n")


@pytest.mark.slow
def test_a_command_that_hangs_is_ended_with_the_processes_that_it_started_and_shows_where_they_were():
    with pytest.raises(AssertionError, match="has not ended after 8 seconds") as caught:
        run_command([sys.executable, "-c", STARTS_ANOTHER, HANGS], seconds=8)
    assert "started" in str(caught.value)
    assert "in the_line_that_hangs" in str(caught.value)
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in running if HANGS in words]
