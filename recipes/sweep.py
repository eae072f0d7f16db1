# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[eval]"]
# ///
r"""Evaluate a grid of rule parameters and draft lengths, and plot the results.

The tiny pair, token by token in batches, some minutes on 2 CPU cores:

    python recipes/sweep.py --task tiny --split validation --limit 300 --no_speculative --batch_size 100

A grid of your own. Every combination of the values is a method, each with every draft length:

    python recipes/sweep.py --base BASE --proxy PROXY --task gsm8k --limit 200 --output sweep \
        --method base proxy kad-dual:threshold=0.2,0.4,0.6 nudging:threshold=0.4,0.7 --draft_lengths 3 5 7

The results folder is the same as that of run_eval.py. The same command continues an interrupted sweep, and for a finer
grid only the new methods are measured. The plots, each as PNG and SVG, show accuracy against tokens/s with the Pareto
front, accuracy against the parameter, acceptance lengths, and the deferral mass at each position.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.command_line import exit_status, parse_arguments
from transformers_kad.recipes.evaluation.arguments import EvaluationArguments, EvaluationSampling, MethodArguments
from transformers_kad.recipes.evaluation.methods import PARAMETER_GRID
from transformers_kad.recipes.evaluation.session import evaluate

TINY_PAIR = Path(__file__).resolve().parent / "tiny_pair"
GRID = ("base", "proxy", *PARAMETER_GRID)


@dataclass
class GridArguments(MethodArguments):
    """The grid."""

    method: list[str] = field(
        default_factory=lambda: list(GRID), metadata={"help": "Methods with the values to try, as in run_eval.py."}
    )
    draft_lengths: list[int] = field(
        default_factory=list,
        metadata={"help": "Draft lengths to try with every rule. Default: --num_assistant_tokens."},
    )

    def __post_init__(self) -> None:
        for length in self.draft_lengths:
            if length < 1:
                raise ValueError(f"--draft_lengths must be at least 1, got {length}.")
        if self.draft_lengths:
            lengths = ",".join(map(str, self.draft_lengths))
            self.method = [
                word
                if word in ("base", "proxy", "aligned") or "num_assistant_tokens=" in word
                else f"{word}:num_assistant_tokens={lengths}"
                for word in self.method
            ]


@dataclass
class SweepArguments(EvaluationArguments):
    """The questions, and how they are asked."""

    output: str = field(
        default="kad_sweep", metadata={"help": "Folder for the results, and to continue an interrupted sweep."}
    )


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    types = (ModelArguments, SweepArguments, GridArguments, EvaluationSampling)
    models, evaluation, grid, sampling = parse_arguments(types, __doc__, argv)
    silence_libraries()

    def run() -> None:
        if grid.draft_lengths and not sampling.speculative:
            raise ValueError(f"--draft_lengths {grid.draft_lengths} have no effect with --no_speculative.")
        evaluate(models, evaluation, grid, sampling, positions=True, default_pair=TINY_PAIR)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
