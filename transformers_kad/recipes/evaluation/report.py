"""The report of an evaluation, as Markdown and JSON: a row for each task and method, and all pairs compared."""

import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import evaluate

from ...utils.files import write_whole
from ..environment import describe_environment
from ..markdown import markdown_table, number, p_value
from ..metrics import metric_path
from .comparison import Comparison, compare_methods
from .methods import FROM_CONFIG, PLAIN_METHODS, RULE_METHODS
from .quality_tables import quality_markdown
from .results import ResultsFolder
from .tasks import get_task

Record = Mapping[str, Any]

LEAST_ENDED = 0.9  # the report warns if a smaller share of the answers ended by themselves


@cache
def _metric(name: str) -> Any:
    return evaluate.load(metric_path(name))


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """The results of one method on one task.

    Args:
        records: all its lines of `results.jsonl`, with the same number of samples for every instance.

    Returns:
        Accuracy with its 95 % interval over instances; of the answers that did not fail, the share that ended by
        themselves and the number that were truncated; speed, acceptance and deferral. A value is None if the method
        has none or its records don't have it, and accuracy is None on a task without right answers.
    """
    records = sorted(records, key=lambda r: (r["instance"], r["sample"]))
    instances = len({record["instance"] for record in records})
    task = get_task(records[0]["task"])
    accuracy: dict[str, Any] = {}
    if task.has_right_answers:
        accuracy = _metric("answer_accuracy").compute(
            predictions=[r["prediction"] for r in records],
            references=[r["answer"] for r in records],
            comparison=task.comparison,
            samples=len(records) // instances,
        )
    statistics = _metric("decoding_statistics")
    lenient = [r["correct_lenient"] for r in records if "correct_lenient" in r]
    tokens, seconds = [r["tokens"] for r in records], [max(r["seconds"], 1e-6) for r in records]
    ended = [r["ended"] for r in records if r["error"] is None and "ended" in r]
    ruled = [r for r in records if "rounds" in r]
    summary: dict[str, Any] = {
        "task": records[0]["task"],
        "method": records[0]["method"],
        "instances": instances,
        "samples": len(records) // instances,
        "accuracy": accuracy.get("accuracy"),
        "low": accuracy.get("low"),
        "high": accuracy.get("high"),
        "accuracy_lenient": sum(lenient) / len(lenient) if lenient else None,
        "failed": sum(r["error"] is not None for r in records),
        "ended": sum(ended) / len(ended) if ended else None,
        "cut": len(ended) - sum(ended) if ended else None,
        "mean_tokens": sum(tokens) / len(tokens),
        "tokens_per_second": _metric("decoding_statistics").compute(tokens=tokens, seconds=seconds)[
            "tokens_per_second"
        ],
        "deferral_mass": None,
        "acceptance_rate": None,
        "acceptance_length": None,
        "tokens_per_round": None,
        "acceptance_histogram": None,
    }
    if ruled:
        deferral = statistics.compute(masses=[r["deferral_mass"] for r in ruled], tokens=[r["tokens"] for r in ruled])
        summary["deferral_mass"] = deferral["deferral_mass"]
    if any(r["drafted"] for r in ruled):
        acceptance = statistics.compute(
            drafted=[r["drafted"] for r in ruled],
            accepted=[r["accepted"] for r in ruled],
            histograms=[r["acceptance_histogram"] for r in ruled],
        )
        summary |= {
            "acceptance_rate": acceptance["acceptance_rate"],
            "acceptance_length": acceptance["acceptance_length"],
            "acceptance_histogram": acceptance["histogram"],
            "tokens_per_round": sum(r["tokens"] for r in ruled) / max(sum(r["rounds"] for r in ruled), 1),
        }
    return summary


def make_report(
    folder: ResultsFolder, *, device: str = "cpu", dtype: str = "auto", processes: int = 1
) -> dict[str, Any]:
    """The results of all methods in a folder, with their settings and the environment.

    Only complete samples count, and a method without one has no row. `unfinished` lists how far such methods are.
    """
    configs = folder.configs()
    rows, comparisons = [], []
    settings: dict[str, dict[str, Any]] = {}
    records, unfinished = complete_records(folder)
    for task, complete in records.items():
        summaries = [summarize(own) for own in complete.values()]
        base = next((s["tokens_per_second"] for s in summaries if s["method"] == "base"), None)
        for of_method, summary in zip(complete.values(), summaries, strict=True):
            shared, own = (configs[of_method[0]["config"]][part] for part in ("shared", "own"))
            named = {name: own[name] for name in ("aligned", "reference") if name in own}
            settings.setdefault(task, dict(shared)).update(named)
            for name in ("base", "proxy", *named):
                if settings[task].get(name) is not None:
                    settings[task][name] = _from_here(settings[task][name])
            summary["speedup"] = summary["tokens_per_second"] / base if base else None
            summary["parameters"], summary["name"] = own["shown_parameters"], own["name"]
        rows += summaries
        if get_task(task).has_right_answers:
            comparisons += [{"task": task, **vars(comparison)} for comparison in compare(complete)]
    environment = {**describe_environment(device), "dtype": dtype, "processes": processes, "commit": current_commit()}
    return {
        "settings": settings,
        "rows": rows,
        "comparisons": comparisons,
        "unfinished": unfinished,
        "environment": environment,
    }


def _from_here(name: str) -> str:
    """A model's folder relative to the working directory, if it is below it; any other name unchanged."""
    folder = Path(name)
    below = folder.is_absolute() and folder.is_relative_to(Path.cwd())
    return str(folder.relative_to(Path.cwd())) if below else name


def complete_records(folder: ResultsFolder) -> tuple[dict[str, dict[str, list[Record]]], list[dict[str, Any]]]:
    """The records of all complete samples of each task and method, in the order of the report.

    Returns:
        The records, and for each method with other samples how far it is.
    """
    configs = folder.configs()
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in folder.read():
        groups.setdefault((record["task"], record["method"]), []).append(record)
    unfinished = []
    complete: dict[str, dict[str, list[Record]]] = {task: {} for task, _ in groups}
    for task, method in sorted(groups, key=lambda key: _order(configs[groups[key][0]["config"]]["own"])):
        records = groups[task, method]
        instances = configs[records[0]["config"]]["shared"]["instances"]
        counts = Counter(record["sample"] for record in records)
        whole = {sample for sample, count in counts.items() if count == instances}
        if whole != counts.keys():
            unfinished.append({"task": task, "method": method, "answers": len(records), "of": len(counts) * instances})
        if whole:
            complete[task][method] = [record for record in records if record["sample"] in whole]
    return complete, sorted(unfinished, key=lambda one: [*complete].index(one["task"]))


def add_quality(report: dict[str, Any], quality: Mapping[str, dict[str, Any]]) -> None:
    """Put the quality of each task into a report, and name the method that tables compare the others with.

    Without a reference method, it is the most accurate one; on a task without right answers, the one with the highest
    reward, or else ROUGE-L, or else the first one.
    """
    if not quality:
        return
    report["quality"] = {}
    for task, found in quality.items():
        reference = found["reference"] or best_method([row for row in report["rows"] if row["task"] == task], found)
        report["quality"][task] = {**found, "reference": reference}


def best_method(rows: Sequence[Mapping[str, Any]], quality: Mapping[str, Any]) -> str:
    """The label of the best method of a task, see `add_quality`."""
    if rows[0]["accuracy"] is not None:
        return max(rows, key=lambda row: row["accuracy"])["method"]
    for name in ("reward", "rougeL"):
        figures = {row["method"]: row["figures"][name]["value"] for row in quality["rows"] if name in row["figures"]}
        if figures:
            return max(figures, key=lambda method: figures[method])
    return rows[0]["method"]


def _order(settings: Mapping[str, Any]) -> tuple[int, list[tuple[str, float, str]]]:
    names = [*PLAIN_METHODS, *RULE_METHODS, FROM_CONFIG]
    return names.index(settings["name"]), [
        (key, value if isinstance(value, int | float) else 0.0, str(value))
        for key, value in settings["shown_parameters"].items()
    ]


def compare(records: Mapping[str, Sequence[Record]]) -> list[Comparison]:
    """Compare every pair of methods of one task, on the samples that all of them have.

    Args:
        records: the records of each method: all instances of the task, each with the same number of samples.
    """
    if len(records) < 2:
        return []
    common = set.intersection(*({record["sample"] for record in own} for own in records.values()))
    scores: dict[str, dict[str, list[bool]]] = {}
    for method, own in records.items():
        scores[method] = {}
        for record in sorted(own, key=lambda r: (r["instance"], r["sample"])):
            if record["sample"] in common:
                scores[method].setdefault(record["instance"], []).append(record["correct"])
    return compare_methods(scores) if common else []


@cache
def current_commit() -> str | None:
    """The commit of the repository that contains the package; None if it is installed without one."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def to_markdown(report: Mapping[str, Any]) -> str:
    """A report as Markdown: for each task models, settings, results, and the differences to its best method.

    Reports that were stored by earlier versions may lack settings and the share of answers that ended.
    """
    parts = []
    for task in dict.fromkeys(row["task"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["task"] == task]
        parts.append(f"**{task}**, {rows[0]['instances']} instances, {rows[0]['samples']} samples each\n")
        settings = report.get("settings", {}).get(task, {})
        if settings:
            parts += [_describe_models(settings), _describe_questions(settings)]
        parts.append(_table(rows))
        parts += _warnings(rows, settings)
        comparisons = [c for c in report["comparisons"] if c["task"] == task]
        if comparisons:
            parts.append(_differences(rows, comparisons))
        if task in report.get("quality", {}):
            parts += quality_markdown(report["quality"][task])
    for one in report["unfinished"]:
        parts.append(f"Unfinished: {one['method']} on {one['task']}, {one['answers']} of {one['of']} answers.\n")
    environment = ", ".join(f"{key} {value}" for key, value in report["environment"].items() if value is not None)
    return "\n".join([*parts, f"Measured with: {environment}", ""])


def _describe_models(settings: Mapping[str, Any]) -> str:
    names = ("base", "proxy", "aligned", "reference", "dtype", "quantization")
    named = [f"{name} {settings[name]}" for name in names if settings.get(name) is not None]
    if settings.get("align_vocabularies"):
        named.append("vocabularies aligned")
    return f"Models: {', '.join(named)}.\n"


def _describe_questions(settings: Mapping[str, Any]) -> str:
    sampling = dict(settings.get("generate", {}))
    parts = ["sampled" if sampling.pop("do_sample", False) else "greedy"]
    parts.append("with drafts" if settings.get("speculative") else "token by token")
    parts += [f"{name} {value}" for name, value in sampling.items()]
    if "seed" in settings:
        parts.append(f"seed {settings['seed']}")
    if "max_new_tokens" in settings:
        parts.append(f"at most {settings['max_new_tokens']} tokens")
    if settings.get("few_shot"):
        parts.append(f"{settings['few_shot']} examples before each question")
    shown = {None: "auto", True: "yes", False: "no"}
    for name in ("chat", "proxy_chat"):
        if name in settings:
            parts.append(f"{name} {shown.get(settings[name], settings[name])}")
    if settings.get("template_arguments"):
        parts.append(f"template_arguments {json.dumps(settings['template_arguments'])}")
    return f"Answers: {', '.join(parts)}.\n"


def _warnings(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
    """A line for each method with more than a tenth of its answers truncated."""
    limit = settings.get("max_new_tokens")
    where = "" if limit is None else f", at {limit} tokens or where a context ends"
    return [
        f"Warning: {row['cut']} of {row['instances'] * row['samples'] - row['failed']} answers of {row['method']} "
        f"were truncated{where}. A larger --max_new_tokens may change the results.\n"
        for row in rows
        if row.get("ended") is not None and row["ended"] < LEAST_ENDED
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "method": lambda row: row["method"],
        "accuracy": lambda row: number(row["accuracy"], 3),
        "95 % interval": lambda row: f"{row['low']:.3f} to {row['high']:.3f}",
        "lenient": lambda row: number(row["accuracy_lenient"], 3),
        "ended": lambda row: number(row.get("ended"), 2),
        "tokens/s": lambda row: number(row["tokens_per_second"], 1),
        "speed": lambda row: "–" if row["speedup"] is None else f"× {row['speedup']:.2f}",
        "deferral mass": lambda row: number(row["deferral_mass"], 2),
        "acceptance": lambda row: number(row["acceptance_rate"], 2),
        "tokens/round": lambda row: number(row["tokens_per_round"], 2),
        "failed": lambda row: str(row["failed"]),
    }
    if not any(row["failed"] for row in rows):
        del columns["failed"]
    if all(row["accuracy_lenient"] is None for row in rows):
        del columns["lenient"]
    if all(row.get("ended") is None for row in rows):
        del columns["ended"]
    if all(row["accuracy"] is None for row in rows):
        del columns["accuracy"], columns["95 % interval"]
    return markdown_table(list(columns), [[show(row) for show in columns.values()] for row in rows])


def _differences(rows: Sequence[Mapping[str, Any]], comparisons: Iterable[Mapping[str, Any]]) -> str:
    best = max(rows, key=lambda row: row["accuracy"])["method"]
    lines = []
    for c in comparisons:
        if best in (c["method_a"], c["method_b"]):
            other, sign = (c["method_b"], 1) if c["method_a"] == best else (c["method_a"], -1)
            width = "" if c["half_width"] is None else f" ± {c['half_width']:.3f}"
            lines.append(
                [
                    other,
                    f"{sign * c['difference']:.3f}{width}",
                    p_value(c["p_value"]),
                    p_value(c["adjusted_p_value"]),
                ]
            )
    header = [f"{best} minus", "difference", "p", "p, all pairs (Holm)"]
    return markdown_table(header, lines)


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `summary.json` and `summary.md` into a folder."""
    paths = [folder / "summary.json", folder / "summary.md"]
    write_whole(paths[0], json.dumps(report, indent=2) + "\n")
    write_whole(paths[1], to_markdown(report))
    return paths
