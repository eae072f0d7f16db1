"""Fuzz `generate`: many random sessions of one processor each, and what was seen of them.

    python tests/fuzz/fuzz.py --examples 100000 --seed 0 --workers 2 --output fuzz.json

The sessions are run in chunks, each with a seed of its own, so that the same arguments run the same sessions. What is
done is in the output file, and a run with the same file goes on with the chunks that are missing. A failure ends its
chunk, which is run again by the next run; its smallest session is in the file, as an expression that
`fuzz_checks.check` takes.
"""

import argparse
import json
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from fuzz_checks import Account, check
from fuzz_models import FAMILIES
from fuzz_sessions import Session, sessions
from hypothesis import HealthCheck, Phase, given, seed, settings
from transformers.utils import logging

CHUNK = 250  # sessions


def fuzz(kind: str, examples: int, number: int, phases: Sequence[Phase] = tuple(Phase)) -> Account:
    """Check so many random sessions whose base has a cache of a kind; equal numbers give equal sessions.

    Raises:
        Exception: something does not hold. The account that is its attribute `account` has the smallest session.
    """
    account = Account()

    @seed(number)
    @settings(
        max_examples=examples,
        phases=phases,
        database=None,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(sessions(kind))
    def run(session: Session) -> None:
        check(session, account)

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            run()
    except Exception as error:
        error.account = account  # type: ignore[attr-defined]
        raise
    finally:
        logging.set_verbosity(verbosity)
    return account


def end_with_the_script() -> None:
    """End this worker as soon as the script has ended, which may have been killed."""

    def wait() -> None:
        parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def run_chunk(kind: str, examples: int, number: int) -> dict[str, Any]:
    """What was seen in a chunk, as JSON has it."""
    torch.set_num_threads(1)
    failure = None
    try:
        account = fuzz(kind, examples, number)
    except Exception as error:
        account = error.account  # type: ignore[attr-defined]
        failure = {"session": repr(account.session), "error": "".join(traceback.format_exception_only(error))}
    return {"counts": dict(account.counts), "refusals": dict(account.refusals), "failure": failure}


def add_chunk(result: dict[str, Any], name: str, chunk: dict[str, Any]) -> None:
    """Add what was seen in a chunk to what was seen in others."""
    if chunk["failure"]:
        result["failures"][name] = chunk["failure"]
        return
    result["chunks"].append(name)
    for part in ("counts", "refusals"):
        result[part] = dict(sorted((Counter(result[part]) + Counter(chunk[part])).items()))


def main() -> int:
    """Run the chunks that are missing in the output file; the status is 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100_000, help="number of sessions")
    parser.add_argument("--seed", type=int, default=0, help="of the first chunk; the next has the next number")
    parser.add_argument("--workers", type=int, default=1, help="number of processes")
    parser.add_argument("--output", type=Path, default=Path("fuzz.json"), help="file of the counts and failures")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"chunks": [], "counts": {}, "refusals": {}}
    if arguments.output.exists():
        result = json.loads(arguments.output.read_text())
    result["failures"] = {}
    kinds, missing = list(FAMILIES), {}
    for number in range(-(-arguments.examples // CHUNK)):
        kind, chosen = kinds[number % len(kinds)], arguments.seed + number
        name = f"{kind} {chosen}"
        if name not in result["chunks"]:
            missing[name] = kind, min(CHUNK, arguments.examples - CHUNK * number), chosen
    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), end_with_the_script) as pool:
        running = {pool.submit(run_chunk, *chunk): name for name, chunk in missing.items()}
        for future in as_completed(running):
            add_chunk(result, running[future], future.result())
            partial = arguments.output.with_suffix(".partial")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.replace(arguments.output)
            done = result["counts"].get("sessions: all", 0)
            print(f"{done} sessions, {len(result['failures'])} failures", flush=True)
    for failure in result["failures"].values():
        print(failure["session"], failure["error"], sep="\n", flush=True)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
