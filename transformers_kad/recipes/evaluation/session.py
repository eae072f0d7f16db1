"""An evaluation from the command line's arguments to the report."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ...integrations.loading.arguments import ModelArguments
from .arguments import EvaluationArguments, EvaluationSampling, MethodArguments, make_decoder
from .figures import plot_report
from .report import make_report, to_markdown, write_report
from .results import ResultsFolder
from .runner import run_evaluation


def start_processes() -> PartialState:
    """Join the other processes of the run, if there are any.

    They wait for each other at the end only, and one may have far more left to do than another.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))


def say(line: str) -> None:
    """Tell a person at the terminal, beside what the recipe prints as its result."""
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
    """Answer, score, print the tables, and write them and the plots beside the results.

    Returns:
        The report, see `make_report`; None in all processes but the first.
    """
    state = start_processes()
    methods = chosen.methods()
    workloads = evaluation.workloads(sampling, positions=positions)
    decoder = make_decoder(models, evaluation, sampling, state, config=chosen.config, default_pair=default_pair)
    with ResultsFolder(evaluation.output, state.process_index) as folder:
        run_evaluation(decoder, workloads, methods, folder, state=state, report=say, retry_failed=retry_failed)
        if not state.is_main_process:
            return None
        dtype = str(decoder.pair.base.dtype).removeprefix("torch.")
        report = make_report(folder, device=decoder.pair.device, dtype=dtype, processes=state.num_processes)
    print(to_markdown(report))
    for path in (*write_report(report, folder.path), *plot_report(report, folder)):
        say(f"Written: {path}")
    return report
