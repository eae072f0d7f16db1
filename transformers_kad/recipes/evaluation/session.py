"""Runs an evaluation, from the command-line arguments to the report."""

import sys
from pathlib import Path
from typing import Any

from ..arguments import ModelArguments
from ..processes import Processes
from .arguments import EvaluationArguments, EvaluationSampling, MethodArguments, make_decoder
from .decoding import Decoder
from .figures import plot_report
from .methods import Method
from .report import make_report, to_markdown, write_report
from .results import ResultsFolder
from .runner import Workload, run_evaluation


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
    processes = Processes()

    def load() -> tuple[list[Method], list[Workload], Decoder]:
        return (
            chosen.methods(),
            evaluation.workloads(sampling, positions=positions),
            make_decoder(
                models, evaluation, sampling, processes.state, config=chosen.config, default_pair=default_pair
            ),
        )

    methods, workloads, decoder = processes.run(load)
    with ResultsFolder(evaluation.output, processes.index) as folder:
        run_evaluation(decoder, workloads, methods, folder, processes=processes, log=log, retry_failed=retry_failed)
        if not processes.is_main:
            return None
        dtype = str(decoder.pair.base.dtype).removeprefix("torch.")
        report = make_report(folder, device=decoder.pair.device, dtype=dtype, processes=processes.number)
    print(to_markdown(report))
    for path in (*write_report(report, folder.path), *plot_report(report, folder)):
        log(f"Written: {path}")
    return report
