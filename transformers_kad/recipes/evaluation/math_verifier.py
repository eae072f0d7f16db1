"""Compares mathematical expressions by math-verify, in a process of its own.

This module imports nothing but the standard library: it is also the script that the process runs.
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
    """math-verify in a process of its own, started at the first comparison and kept.

    math-verify parses LaTeX and lets sympy simplify it, which can take for ever (9^{9^9}). Its own timeout is a
    signal: it works in the main thread only, and not while Python computes with huge integers. In a process of its own
    each comparison is watched by a timer that ends the process; the answer then counts as wrong, a warning says so,
    and the next comparison starts a new process. Hence it works in every thread, one comparison at a time.

    Args:
        timeout: seconds for one comparison.
    """

    def __init__(self, timeout: float = 10.0) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def equal(self, prediction: str, answer: str) -> bool:
        """Whether two expressions in LaTeX mean the same.

        The order matters: for the answer `x = 5` the prediction may be `5`.

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
            except BaseException:  # an interrupt would leave a reply behind, which the next question would read
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
            raise ImportError('Comparing mathematics needs math-verify: pip install "transformers-kad[eval]"')
        # This file, which imports nothing but the standard library: the process has no torch and starts in a second.
        command = [sys.executable, "-P", __file__, str(self.timeout)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        if self._ask([r"\frac{1}{2}", "0.5"]) is not True:  # without a parser everything would be unequal
            self.close()
            raise ImportError('math-verify does not run here: pip install "transformers-kad[eval]"')

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
    """The process of a `MathVerifier`: reads pairs of prediction and answer, writes true or false, a line each."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)  # what the libraries print goes to stderr, not among the replies
        _serve(sys.stdin, channel, float(sys.argv[1]))
