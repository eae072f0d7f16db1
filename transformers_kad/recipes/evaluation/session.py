"""Runs an evaluation, from the command-line arguments to the report."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..arguments import ModelArguments
from .arguments import EvaluationArguments, EvaluationSampling, MethodArguments, make_decoder
from .figures import plot_report
from .report import make_report, to_markdown, write_report
from .results import ResultsFolder
from .runner import run_evaluation


def distributed_state() -> PartialState:
    """The state of this process and of the other processes of the run.

    The timeout is long, since processes wait for each other only at the end, and one may have much more to do.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))


def log(line: str) -> None:
    """Print a message to standard error, apart from the results on standard output."""
    print(line, file=sys.stderr, flush=True)


def evaluate(
    models: ModelArguments,
    evaluation: EvaluationArguments,
    chosen: MethodArguments,
    sampling: EvaluationSampling,
    *,
    default_pair: Path,
    positions: bool = False,
    retry_failed: bool = False,
) -> dict[str, Any] | None:
    """Answer and score all questions, print the report, and write it and the plots into the results folder.

    Returns:
        The report, see `make_report`; None in all processes but the main one.
    """
    state = distributed_state()
    methods = chosen.methods()
    workloads = evaluation.workloads(sampling, positions=positions)
    decoder = make_decoder(models, evaluation, sampling, state, config=chosen.config, default_pair=default_pair)
    with ResultsFolder(evaluation.output, state.process_index) as folder:
        run_evaluation(decoder, workloads, methods, folder, state=state, log=log, retry_failed=retry_failed)
        if not state.is_main_process:
            return None
        dtype = str(decoder.pair.base.dtype).removeprefix("torch.")
        report = make_report(folder, device=decoder.pair.device, dtype=dtype, processes=state.num_processes)
    print(to_markdown(report))
    for path in (*write_report(report, folder.path), *plot_report(report, folder)):
        log(f"Written: {path}")
    return report
