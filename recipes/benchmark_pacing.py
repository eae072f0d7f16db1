# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers-kad[eval]"]
# ///
r"""Compare `PacedDeferral` with fixed thresholds of the dual rule at the same mean deferral mass.

    python recipes/benchmark_pacing.py --batch_size 50 --output pacing     # the tiny pair

Each budget and step size of `kad-paced` is compared, on the same questions, with the most accurate threshold of
`kad-dual` whose mean deferral mass differs by at most 0.02, or with the nearest one if all differ by more. The choice
favours the dual rule a little, since it is made by the accuracies that are compared. The table shows for both the mean
deferral mass over all tokens, the standard deviation of the texts' own means (spread), the accuracy with an exact
paired test, and the share of drafted tokens that were accepted.

A second run shows what the rules do on texts on which base and proxy agree: there the proxy is its own base.

The output folder gets `pair/` and `agreeing/`, which are results folders as those of run_eval.py, and pacing.json,
pacing.md and a plot as PNG and SVG. The same command continues an interrupted run.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers_kad import PacedDeferral
from transformers_kad.integrations.loading.messages import silence_libraries
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.command_line import exit_status, parse_arguments
from transformers_kad.recipes.evaluation.arguments import EvaluationArguments, EvaluationSampling, MethodArguments
from transformers_kad.recipes.evaluation.comparison import compare_methods, holm_adjusted
from transformers_kad.recipes.evaluation.results import ResultsFolder
from transformers_kad.recipes.evaluation.session import evaluate, log
from transformers_kad.recipes.markdown import markdown_table, number, p_value
from transformers_kad.recipes.plot_style import group_style, matplotlib_style, new_figure, percent_axis, save_figure
from transformers_kad.utils.files import write_whole

TINY_PAIR = Path(__file__).resolve().parent / "tiny_pair"
DUAL, PACED = "kad-dual", "kad-paced"
EQUAL_MASS = 0.02  # mean deferral masses that differ by no more count as the same

Row = dict[str, Any]


@dataclass
class PacingArguments:
    """The parameters to compare."""

    budgets: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5], metadata={"help": "Budgets of the paced rule."}
    )
    step_sizes: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 1.0], metadata={"help": "Step sizes of the paced rule."}
    )
    thresholds: list[float] = field(
        default_factory=lambda: [round(0.05 * at, 2) for at in range(1, 20)],
        metadata={"help": "Fixed thresholds of the dual rule to choose from."},
    )

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if not values:
                raise ValueError(f"--{name} needs at least one value.")

    def chosen(self) -> MethodArguments:
        """The base, the dual rule at all thresholds, and the paced rule with all budgets and step sizes."""
        dual = f"{DUAL}:threshold={','.join(map(str, self.thresholds))}"
        paced = f"{PACED}:budget={','.join(map(str, self.budgets))}:step_size={','.join(map(str, self.step_sizes))}"
        return MethodArguments(method=["base", dual, paced])


@dataclass
class PacingEvaluation(EvaluationArguments):
    """The questions, and how they are asked."""

    output: str = field(
        default="kad_pacing", metadata={"help": "Folder for the results, and to continue an interrupted run."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.task) > 1:
            raise ValueError(f"--task must name one task, got {self.task}.")


def spreads(folder: ResultsFolder) -> dict[str, float]:
    """For each method with a deferral mass, the standard deviation over texts of a text's mean deferral mass."""
    masses: dict[str, list[float]] = {}
    for record in folder.read():
        if record.get("deferral_mass") is not None and record["tokens"]:
            masses.setdefault(record["method"], []).append(record["deferral_mass"])
    return {method: statistics.stdev(values) for method, values in masses.items() if len(values) > 1}


def scores(folder: ResultsFolder) -> dict[str, dict[str, list[bool]]]:
    """For each method and instance, whether each of its samples is correct."""
    found: dict[str, dict[str, list[bool]]] = {}
    for record in sorted(folder.read(), key=lambda record: record["sample"]):
        found.setdefault(record["method"], {}).setdefault(record["instance"], []).append(record["correct"])
    return found


def best_at_the_same_mass(duals: Sequence[Row], mass: float) -> Row:
    """The most accurate row with this mean deferral mass, or the one with the nearest mass if there is none."""
    near = [row for row in duals if abs(row["deferral_mass"] - mass) <= EQUAL_MASS]
    if near:
        return max(near, key=lambda row: row["accuracy"])
    return min(duals, key=lambda row: abs(row["deferral_mass"] - mass))


def compare_with_dual(report: Mapping[str, Any], folder: ResultsFolder) -> list[Row]:
    """Each setting of the paced rule beside the best fixed threshold at the same mean deferral mass.

    Returns:
        One row for each setting, with `paced` and `dual`, the rows of the report with their `spread`; the
        `difference` of the accuracies (paced minus dual) with its `half_width`, and the `p_value` of the exact test,
        after Holm's correction for all rows.
    """
    spread, correct = spreads(folder), scores(folder)
    of = {
        name: [row | {"spread": spread.get(row["method"])} for row in report["rows"] if row["name"] == name]
        for name in (DUAL, PACED)
    }
    rows: list[Row] = []
    for paced in of[PACED]:
        dual = best_at_the_same_mass(of[DUAL], paced["deferral_mass"])
        (test,) = compare_methods({row["method"]: correct[row["method"]] for row in (paced, dual)})
        rows.append(
            {
                "paced": paced,
                "dual": dual,
                "difference": test.difference,
                "half_width": test.half_width,
                "p_value": test.p_value,
            }
        )
    for row, adjusted in zip(rows, holm_adjusted([row["p_value"] for row in rows]), strict=True):
        row["p_value"] = adjusted
    return rows


def step_size_of(row: Row) -> float:
    """The step size of a row of the paced rule, which parameters hold only where it is not the default."""
    return float(row["parameters"].get("step_size", PacedDeferral.step_size))


def figures_of(row: Row) -> list[str]:
    """Mean deferral mass, spread, accuracy and acceptance of a row, as cells of a table."""
    shares = [number(row[key], 3) for key in ("deferral_mass", "spread", "accuracy")]
    return [*shares, number(row["acceptance_rate"], 2)]


def pair_table(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table."""
    figures = ("mass", "spread", "accuracy", "acceptance")
    header = ["budget", "step size", *figures, "dual threshold", *figures, "difference", "p (Holm)"]
    lines = []
    for row in rows:
        paced, dual = row["paced"], row["dual"]
        width = "" if row["half_width"] is None else f" ± {row['half_width']:.3f}"
        lines.append(
            [
                *(f"{paced['parameters']['budget']:g}", f"{step_size_of(paced):g}", *figures_of(paced)),
                *(f"{dual['parameters']['threshold']:g}", *figures_of(dual)),
                *(f"{row['difference']:+.3f}{width}", p_value(row["p_value"])),
            ]
        )
    return markdown_table(header, lines)


def agreeing_table(rows: Sequence[Row]) -> str:
    """What the rules do where base and proxy agree, as a Markdown table."""
    lines = []
    for row in rows:
        *figures, acceptance = figures_of(row)
        lines.append([row["method"], *figures, f"{row['low']:.3f} to {row['high']:.3f}", acceptance])
    return markdown_table(["method", "mass", "spread", "accuracy", "95 % interval", "acceptance"], lines)


def plot(report: Mapping[str, Any], folder: ResultsFolder, path_stem: Path) -> list[Path]:
    """Plot accuracy and spread against the mean deferral mass, with one marker for each rule and step size."""
    spread = spreads(folder)
    lines: dict[str, list[Row]] = {}
    for row in report["rows"]:
        if row["name"] in (DUAL, PACED):
            label = "dual, fixed threshold" if row["name"] == DUAL else f"paced, step size {step_size_of(row):g}"
            lines.setdefault(label, []).append(row)
    with matplotlib_style():
        figure = new_figure(7, 3.2, layout="constrained")
        panels = figure.subplots(1, 2)
        for at, (label, rows) in enumerate(lines.items()):
            style, masses = group_style(at), [row["deferral_mass"] for row in rows]
            look: dict[str, Any] = {"marker": style.marker, "color": style.color, "linestyle": "none"}
            panels[0].plot(masses, [row["accuracy"] for row in rows], label=label, **look)
            panels[1].plot(masses, [spread[row["method"]] for row in rows], **look)
        panels[0].set(xlabel="mean deferral mass", ylabel="accuracy")
        panels[1].set(xlabel="mean deferral mass", ylabel="standard deviation over texts")
        percent_axis(panels[0])
        figure.legend(loc="outside upper center", ncols=len(lines))
        return save_figure(figure, path_stem)


def compare(
    models: ModelArguments, evaluation: PacingEvaluation, pacing: PacingArguments, sampling: EvaluationSampling
) -> None:
    """Run both evaluations, print the tables, and write them with the plot."""
    output = Path(evaluation.output)
    folders = [ResultsFolder(output / name) for name in ("pair", "agreeing")]

    def run(on: ModelArguments, folder: ResultsFolder) -> Mapping[str, Any] | None:
        questions = replace(evaluation, output=str(folder.path))
        return evaluate(on, questions, pacing.chosen(), sampling, default_pair=TINY_PAIR)

    report = run(models, folders[0])
    agreeing = run(replace(models, base=models.proxy), folders[1])
    if report is None or agreeing is None:
        return  # not the main process
    rows, spread = compare_with_dual(report, folders[0]), spreads(folders[1])
    shown = {row["dual"]["method"] for row in rows}
    agreeing_rows = [
        row | {"spread": spread.get(row["method"])}
        for row in agreeing["rows"]
        if row["name"] != DUAL or row["method"] in shown
    ]
    kept = {"comparisons": rows, "agreeing": agreeing_rows, "environment": report["environment"]}
    tables = (
        pair_table(rows),
        "Where base and proxy agree (the proxy is its own base):\n",
        agreeing_table(agreeing_rows),
    )
    text = "\n".join(tables)
    print(text)
    write_whole(output / "pacing.json", json.dumps(kept, indent=2) + "\n")
    write_whole(output / "pacing.md", text)
    for path in (output / "pacing.json", output / "pacing.md", *plot(report, folders[0], output / "pacing")):
        log(f"Written: {path}")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    types = (ModelArguments, PacingEvaluation, PacingArguments, EvaluationSampling)
    models, evaluation, pacing, sampling = parse_arguments(types, __doc__, argv)
    silence_libraries()
    return exit_status(lambda: compare(models, evaluation, pacing, sampling))


if __name__ == "__main__":
    sys.exit(main())
