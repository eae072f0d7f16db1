"""Writes the reports of the speed benchmark into a folder: Markdown, JSON and plots."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...configuration import KADConfig
from ...utils.files import write_whole
from .plots import plot_batch_sizes, plot_draft_lengths
from .report import findings, make_rows, to_markdown

Log = Callable[[str], None]


def write_report(report: Mapping[str, Any], text: str, folder: Path, name: str, log: Log) -> None:
    """Print a report, and write it as Markdown and JSON."""
    write_whole(folder / f"{name}.json", json.dumps(report, indent=2) + "\n")
    write_whole(folder / f"{name}.md", text)
    print(text)
    log(f"Written: {folder / name}.json, {folder / name}.md")


def write_speed_report(
    records: Sequence[dict[str, Any]], config: KADConfig, settings: Mapping[str, Any], folder: Path, log: Log
) -> None:
    """Write the report of the repetitions of all batch sizes, and its plots.

    Args:
        records: the repetitions, as `measure_batch_size` stores them.
        config: the rule.
        settings: the settings of the run, with its environment.
        folder: where the files are written.
        log: called with messages about what was written.
    """
    rows = make_rows(records)
    report = {
        "rule": {"name": config.rule, "parameters": dict(config.parameters)},
        "rows": rows,
        "findings": findings(rows, records),
        **circumstances(settings, records),
    }
    write_report(report, to_markdown(report), folder, "speed", log)
    for size in dict.fromkeys(row["batch_size"] for row in rows):
        own = [row for row in rows if row["batch_size"] == size]
        for path in plot_draft_lengths(own, folder / "plots" / f"draft_length_batch_{size}", title=f"Batch {size}"):
            log(f"Written: {path}")
    for path in plot_batch_sizes(rows, folder / "plots" / "batch_size"):
        log(f"Written: {path}")


def circumstances(settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings, the environment and the load of a measurement, as JSON values."""
    loads = [record["load"] for record in records if record["load"] is not None]
    own = {name: value for name, value in settings.items() if name != "environment"}
    return {"settings": own, "environment": settings["environment"], "load": max(loads, default=None)}
