"""Compares mathematical expressions by math-verify in a separate process.

This module is also the script that the process runs, so it imports only the standard library.
"""

import atexit
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from importlib.util import find_spec
from typing import IO

logger = logging.getLogger(__name__)


class MathVerifier:
    """Runs math-verify in a separate process, which is started at the first comparison and reused.

    math-verify parses LaTeX and simplifies it with sympy, which may never return (9^{9^9}). Its own timeout is based
    on a signal, so it works only in the main thread, and not while Python computes with huge integers. Here a timer
    ends the separate process if a comparison takes too long: the answer counts as wrong, a warning is logged, and the
    next comparison starts a new process. This works in every thread, with one comparison at a time.

    Args:
        timeout: the maximum time for one comparison, in seconds.
    """

    def __init__(self, timeout: float = 10.0) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def equal(self, prediction: str, answer: str) -> bool:
        """Whether two LaTeX expressions are equivalent.

        The order matters: `5` is a correct prediction for the answer `x = 5`.

        Raises:
            ImportError: math-verify is not installed, or does not run.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._start()
            try:
                reply = self._ask([prediction, answer])
                if reply is None:
                    self.close()
            except BaseException:  # after an interrupt the next question would read the reply to this one
                self.close()
                raise
        if reply is None:
            logger.warning(
                "Comparing %r with %r took more than %g s: counted as wrong.", prediction, answer, self.timeout
            )
        return reply is True

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        if find_spec("math_verify") is None:
            raise ImportError('Comparing mathematics needs math-verify: pip install -e ".[eval]"')
        # The process runs this file, does not import torch, and starts within a second.
        command = [sys.executable, "-P", __file__, str(self.timeout)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        if self._ask([r"\frac{1}{2}", "0.5"]) is not True:  # without its parser, math-verify finds everything unequal
            self.close()
            raise ImportError('math-verify does not run here: pip install -e ".[eval]"')

    def _ask(self, pair: list[str]) -> bool | None:
        """The process's reply; None if it ended instead."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(pair) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        reply = self._process.stdout.readline()
        return json.loads(reply) if reply else None


def _serve(questions: IO[str], replies: IO[str], timeout: float) -> None:
    """Run the process of a `MathVerifier`: read pairs of prediction and answer, write true or false."""
    from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]  # noqa: PLC0415

    def expression(text: str) -> list:
        return parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)

    with open(os.devnull, "w") as nowhere:
        for line in questions:
            prediction, answer = json.loads(line)
            faulthandler.dump_traceback_later(timeout, exit=True, file=nowhere)
            equal = verify(expression(answer), expression(prediction), timeout_seconds=None)
            faulthandler.cancel_dump_traceback_later()
            replies.write(json.dumps(bool(equal)) + "\n")
            replies.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)  # output of the libraries must not mix with the replies
        _serve(sys.stdin, channel, float(sys.argv[1]))
