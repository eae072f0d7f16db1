"""Makes the plots of a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .accuracy_plots import plot_accuracy_parameter, plot_accuracy_speed
from .decoding_plots import plot_acceptance_lengths, plot_deferral_positions
from .methods import SETTINGS
from .points import Point
from .results import ResultsFolder


def points_of(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The rows of a report as points of a plot; none for a task without right answers, which has no accuracy."""
    rows = [row for row in rows if row["accuracy"] is not None]
    points = []
    for row in rows:
        numbers = [v for k, v in row["parameters"].items() if k not in SETTINGS and isinstance(v, int | float)]
        draft = row["parameters"].get("num_assistant_tokens")
        group = row["name"] if draft is None else f"{row['name']}, draft {draft}"
        points.append(
            Point(
                row["method"],
                row["accuracy"],
                row["low"],
                row["high"],
                row["tokens_per_second"],
                group,
                numbers[0] if numbers else None,
            )
        )
    return points


def masses_by_position(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """For each method, the mean deferral mass at each position of the text, and the number of texts it is over."""
    rows: dict[str, list[list[float]]] = {}
    for record in records:
        if "deferral_masses" in record:
            rows.setdefault(record["method"], []).append(record["deferral_masses"])
    means, counts = {}, {}
    for method, masses in rows.items():
        columns = [[row[at] for row in masses if len(row) > at] for at in range(max(len(row) for row in masses))]
        means[method] = [sum(column) / len(column) for column in columns]
        counts[method] = [len(column) for column in columns]
    return means, counts


def plot_report(report: Mapping[str, Any], folder: ResultsFolder) -> list[Path]:
    """Write the plots of all tasks into `plots/` in the results folder, without methods that generated nothing."""
    paths = []
    records = folder.read()
    for task in dict.fromkeys(row["task"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["task"] == task and row["tokens_per_second"] > 0]
        if not rows:
            continue
        points, stem = points_of(rows), folder.path / "plots" / task
        if points:
            paths += plot_accuracy_speed(points, f"{stem}_accuracy_speed", title=task)
        if any(point.value is not None for point in points):
            paths += plot_accuracy_parameter(points, f"{stem}_accuracy_parameter", title=task)
        best = best_of_each(rows)
        histograms = {row["method"]: row["acceptance_histogram"] for row in best if row["acceptance_histogram"]}
        if histograms:
            paths += plot_acceptance_lengths(histograms, f"{stem}_acceptance_lengths", title=task)
        names = {row["method"] for row in best}
        means, counts = masses_by_position([r for r in records if r["task"] == task and r["method"] in names])
        if means:
            paths += plot_deferral_positions(means, f"{stem}_deferral_positions", title=task, counts=counts)
    return paths


def best_of_each(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The most accurate row of each method's name, or its first one without accuracy, in the order of the rows."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["name"] not in best or (row["accuracy"] or 0) > (best[row["name"]]["accuracy"] or 0):
            best[row["name"]] = row
    return list(best.values())
