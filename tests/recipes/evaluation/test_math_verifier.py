"""The process that compares mathematics: threads, timeouts, interrupts, and what it needs."""

import json
import logging
import sys
import threading

import pytest
from run_command import run_command

from transformers_kad.recipes.evaluation import math_verifier
from transformers_kad.recipes.evaluation.answers import answers_match
from transformers_kad.recipes.evaluation.math_verifier import MathVerifier


def test_mathematics_is_compared_in_threads_too():
    found = {}
    together = threading.Barrier(4)

    def compare(thread):
        together.wait()
        for index in range(10):
            found[thread, index] = answers_match(rf"\frac{{{index}}}{{2}}", f"{thread / 2}", "math")

    threads = [threading.Thread(target=compare, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(thread, index): thread == index for thread in range(4) for index in range(10)}


def test_a_comparison_that_would_never_end_counts_as_wrong(caplog):
    verifier = MathVerifier(timeout=3)
    try:
        with caplog.at_level(logging.WARNING):
            assert not verifier.equal("9^{9^{9}}", "5")
        assert "'9^{9^{9}}' with '5'" in caplog.text
        assert verifier.equal("10/2", "5")  # a new process
    finally:
        verifier.close()


def test_an_interrupt_leaves_no_reply_for_the_next_question(monkeypatch):
    verifier = MathVerifier()

    def interrupted(pair):
        verifier._process.stdin.write(json.dumps(pair) + "\n")
        verifier._process.stdin.flush()
        raise KeyboardInterrupt

    try:
        assert verifier.equal("2/4", "0.5")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(verifier, "_ask", interrupted)
            verifier.equal("1", "1.0")
        assert not verifier.equal("1", "2")
    finally:
        verifier.close()


def test_a_process_that_was_ended_from_outside_is_started_again():
    verifier = MathVerifier()
    try:
        assert verifier.equal("2/4", "0.5")
        verifier._process.kill()
        verifier._process.wait()
        assert verifier.equal("2/4", "0.5")
    finally:
        verifier.close()


def test_without_math_verify_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[eval\]"'):
        MathVerifier().equal("2/4", "0.5")


def test_the_process_loads_no_models():
    loaded = "import sys, runpy; runpy.run_path(sys.argv[1]); print('torch' in sys.modules)"
    out = run_command([sys.executable, "-P", "-c", loaded, math_verifier.__file__])
    assert out.stdout == "False\n", out.stderr
