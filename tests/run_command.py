"""Running a command to its end, or to the end of its time."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO, Any

import psutil

SECONDS = 600  # after which a command has hung, on a machine that has other things to do


def run_command(
    command: Sequence[Any],
    *,
    seconds: float = SECONDS,
    standard_input: str = "",
    env: dict[str, str] | None = None,
    **settings: Any,
) -> subprocess.CompletedProcess[str]:
    """The status of a command, and what it wrote.

    Unlike `subprocess.run`, it ends the processes that the command has started as well, for which it would wait
    without end otherwise, and shows the Python stack of each.

    Raises:
        AssertionError: the command has not ended in time.
    """
    env = {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}
    with TemporaryFile() as given, TemporaryFile() as output, TemporaryFile() as errors:
        given.write(standard_input.encode())
        given.seek(0)
        process = subprocess.Popen(command, stdin=given, stdout=output, stderr=errors, env=env, **settings)
        try:
            process.wait(seconds)
        except BaseException as error:
            abort(process.pid)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            written = f"{_text(output)}\n--- standard error ---\n{_text(errors)}"
            raise AssertionError(f"{command} has not ended after {seconds} seconds:\n{written}") from None
        return subprocess.CompletedProcess(command, process.returncode, _text(output), _text(errors))


def abort(pid: int) -> None:
    """End a process and all that it has started; each writes its Python stack, if `PYTHONFAULTHANDLER` is set."""
    command = psutil.Process(pid)
    processes = [*command.children(recursive=True), command]
    for process in processes:  # so that only one of them writes at a time
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGABRT)
            process.resume()
            deadline = time.monotonic() + 10
            while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
                time.sleep(0.05)
            process.kill()
    command.wait()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace").replace("\r\n", "\n")
