"""Runs an evaluation, from the command-line arguments to the report."""

import gc
import sys
from pathlib import Path
from typing import Any

import torch

from ..arguments import ModelArguments
from ..processes import Processes
from .arguments import EvaluationArguments, EvaluationSampling, MethodArguments, make_decoder
from .decoding import Decoder
from .figures import plot_report
from .methods import Method
from .quality import QualityArguments, QualityRun, check_scorers
from .report import add_quality, complete_records, make_report, to_markdown, write_report
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
    quality: QualityArguments | None = None,
    positions: bool = False,
    retry_failed: bool = False,
) -> dict[str, Any] | None:
    """Answer and score all questions, print the report, and write it and the plots into the results folder.

    Returns:
        The report, see `make_report`; None in all processes but the main one.
    """
    processes = Processes()
    quality = quality or QualityArguments()

    def load() -> tuple[list[Method], list[Workload], Decoder]:
        methods = chosen.methods()
        quality.reference_label(methods)
        check_scorers(quality)
        return (
            methods,
            evaluation.workloads(sampling, positions=positions),
            make_decoder(
                models, evaluation, sampling, processes.state, config=chosen.config, default_pair=default_pair
            ),
        )

    methods, workloads, decoder = processes.run(load)
    with ResultsFolder(evaluation.output, processes.index) as folder:
        run_evaluation(decoder, workloads, methods, folder, processes=processes, log=log, retry_failed=retry_failed)
        device, dtype = decoder.pair.device, str(decoder.pair.base.dtype).removeprefix("torch.")
        del decoder
        release_memory()
        measured: dict[str, Any] = {}
        if quality.is_wanted(workloads):
            run = QualityRun(
                quality,
                models,
                evaluation.aligned,
                evaluation.template,
                workloads,
                quality.reference_label(methods),
                folder.path,
            )
            measured = run.measure(complete_records(folder)[0] if processes.is_main else {}, processes)
        if not processes.is_main:
            return None
        report = make_report(folder, device=device, dtype=dtype, processes=processes.number)
        add_quality(report, measured)
    print(to_markdown(report))
    for path in (*write_report(report, folder.path), *plot_report(report, folder)):
        log(f"Written: {path}")
    return report


def release_memory() -> None:
    """Free the memory of models that are no longer used, for the models that measure quality."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
