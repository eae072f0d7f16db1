"""The report of the speed benchmark: ratios, bounds and findings from the repetitions."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from ..markdown import markdown_table, number
from .bounds import ForwardTimes, Shape, quartiles, speculative_bound
from .methods import KINDS, Method, counts_from_json

Record = Mapping[str, Any]

# Kinds whose rounds are all alike, so that `speculative_bound` applies.
STEADY = ("token_by_token", "lazy", "speculative", "in_step")


def make_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each batch size and method, as JSON values.

    `ratio` is the speed relative to the base alone in the same repetition and batch size. `bound` is the ratio that
    would result if only forward passes took time. With c the counts of a method's forward passes by shape, t the
    median times of these shapes, measured in the same run after a text of the same length, and n the number of emitted
    tokens, it is

        (sum c t / n of the base alone) / (sum c t / n of the method)

    For a batch of constant size and drafts of constant length this is `speculative_bound` with the prompts included.
    The tokens that a base with recurrent layers reads again after a refusal are columns of its forward passes, and so
    are part of the bound.
    `share` is ratio / bound in each repetition. `ratio` and `share` are a lower quartile, a median and an upper
    quartile; `bound` is a median.
    """
    rows = []
    for size in sorted({record["batch_size"] for record in records}):
        own = sorted((r for r in records if r["batch_size"] == size), key=lambda r: r["repetition"])
        times = forward_times(own)
        methods = sorted(map(Method.from_key, own[0]["runs"]), key=lambda method: method.place)
        rows += [_row(size, method, own, times) for method in methods]
    return rows


def forward_times(records: Sequence[Record]) -> ForwardTimes:
    """The times of the forward passes in the repetitions of one batch size."""
    seconds: dict[Shape, list[float]] = {}
    for record in records:
        for *shape, measured in record["forwards"]:
            seconds.setdefault(Shape(*shape), []).extend(measured)
    return ForwardTimes(seconds)


def _row(size: int, method: Method, records: Sequence[Record], times: ForwardTimes) -> dict[str, Any]:
    ratios, bounds, shares = [], [], []
    runs = [record["runs"][method.key] for record in records if "error" not in record["runs"][method.key]]
    for record in records:
        run, base = record["runs"][method.key], record["runs"]["base"]
        if "error" in run or "error" in base:
            continue
        ratios.append((run["tokens"] / run["seconds"]) / (base["tokens"] / base["seconds"]))
        counts, base_counts = counts_from_json(run["counts"]), counts_from_json(base["counts"])
        if times.covers(counts):
            bounds.append(times.total(base_counts) / base["tokens"] / (times.total(counts) / run["tokens"]))
            shares.append(ratios[-1] / bounds[-1])
    tokens = sum(run["tokens"] for run in runs)
    forwards = {name: sum(run["forwards"].get(name, 0) for run in runs) for name in ("base", "proxy")}
    rounds = sum(run["rounds"] for run in runs) if runs and "rounds" in runs[0] else None
    if rounds is None and method.kind == "assisted":
        rounds = forwards["base"]
    drafted = _total(runs, "drafted") if KINDS[method.kind].speculative else None
    accepted = _total(runs, "accepted") if KINDS[method.kind].speculative else None
    memory = [run["memory"] for run in runs if run["memory"] is not None]
    masses = [run["deferral_mass"] for run in runs if run.get("deferral_mass") is not None]
    return {
        "batch_size": size,
        "method": method.key,
        "label": method.label,
        "kind": method.kind,
        "draft_length": method.draft_length,
        "repetitions": len(runs),
        "failed": len(records) - len(runs),
        "tokens_per_second": statistics.median(run["tokens"] / run["seconds"] for run in runs) if runs else None,
        "seconds": statistics.median(run["seconds"] for run in runs) if runs else None,
        "ratio": quartiles(ratios) if ratios else None,
        "bound": statistics.median(bounds) if bounds else None,
        "share": quartiles(shares) if shares else None,
        "steady": _steady(size, method, runs, forwards, times) if method.kind in STEADY else None,
        "tokens_per_round": tokens / rounds if rounds else None,
        "drafted_per_round": drafted / rounds if drafted is not None and rounds else None,
        "acceptance_rate": accepted / drafted if accepted is not None and drafted else None,
        "base_forwards_per_token": forwards["base"] * size / tokens if tokens else None,
        "proxy_forwards_per_token": forwards["proxy"] * size / tokens if tokens else None,
        "base_columns_per_token": sum(map(_base_columns, runs)) / tokens if tokens else None,
        "proxy_prefills": max((count for run in runs if (count := _proxy_prefills(run)) is not None), default=None),
        "outside": _outside(runs),
        "inside_seconds": _seconds_inside(runs),
        "memory": max(memory, default=None),
        "deferral_mass": statistics.fmean(masses) if masses else None,
    }


def _total(runs: Sequence[Record], name: str) -> int | None:
    return sum(run[name] for run in runs) if runs and name in runs[0] else None


def _steady(
    size: int, method: Method, runs: Sequence[Record], forwards: Mapping[str, int], times: ForwardTimes
) -> dict[str, float] | None:
    """The arguments of `speculative_bound`, and the bound. The batch is assumed to stay full until the end.

    None if the base reads tokens again, since its rounds then differ in width.
    """
    width = 1 + (method.draft_length or 0)
    if not forwards["base"] or any(_reads_again(run, width) for run in runs):
        return None
    steps = sum(_draft_steps(run) for run in runs)
    parts = {
        "tokens_per_round": sum(run["tokens"] for run in runs) / size / forwards["base"],
        "drafted": steps / forwards["base"],
        "bonus_steps": (forwards["proxy"] - steps) / forwards["base"],
        "base_one": times.of(Shape("base", size, 1)),
        "base_draft": times.of(Shape("base", size, width)),
        "proxy_step": times.of(Shape("proxy", size, 1)),
    }
    return {**parts, "bound": speculative_bound(**parts)}


def _draft_steps(run: Record) -> int:
    """The number of proxy steps that drafted: the base reads the prompt or one token, and the longest draft."""
    prompt = run["prompt_tokens"]
    counts = counts_from_json(run["counts"])
    return sum(
        (shape.tokens - (prompt if shape.tokens >= prompt else 1)) * count
        for shape, count in counts.items()
        if shape.model == "base"
    )


def _reads_again(run: Record, width: int) -> bool:
    """Whether the base made a forward pass after the prompt that is wider than a draft and the token before it."""
    return any(
        shape.model == "base" and width < shape.tokens < run["prompt_tokens"]
        for shape in counts_from_json(run["counts"])
    )


def _base_columns(run: Record) -> int:
    """The number of tokens that the base read after the prompt, of all texts, with those that it read again."""
    prompt = run["prompt_tokens"]
    return sum(
        shape.rows * (shape.tokens - (prompt if shape.tokens >= prompt else 0)) * count
        for shape, count in counts_from_json(run["counts"]).items()
        if shape.model.startswith("base")
    )


def _proxy_prefills(run: Record) -> int | None:
    """How often the proxy read the text from its first token on; None if it was not counted."""
    if run.get("prefills") is None:
        return None
    return sum(count for shape, count in counts_from_json(run["prefills"]).items() if shape.model == "proxy")


def _outside(runs: Sequence[Record]) -> float | None:
    """The median share of the time outside of the models' forward passes; None if it was not measured."""
    shares = []
    for run in runs:
        seen = run.get("profile") or run
        if seen.get("inside"):
            shares.append(1 - sum(seen["inside"].values()) / seen["seconds"])
    return statistics.median(shares) if shares else None


def _seconds_inside(runs: Sequence[Record]) -> dict[str, float] | None:
    """The mean time of a forward pass of each model while the method runs, in seconds, prompts included."""
    seen = [(run.get("profile") or run, run["forwards"]) for run in runs]
    totals: dict[str, float] = {}
    for name in ("base", "proxy"):
        known = [(one["inside"][name], counts.get(name, 0)) for one, counts in seen if one.get("inside")]
        if sum(count for _, count in known):
            totals[name] = sum(seconds for seconds, _ in known) / sum(count for _, count in known)
    return totals or None


def findings(rows: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> list[str]:
    """Findings in sentences: the best draft length, how `auto` compares with it, and up to which batch drafts pay."""
    lines, paying, stopped = [], list[int](), list[int]()
    for size in sorted({row["batch_size"] for row in rows}):
        own = {row["method"]: row for row in rows if row["batch_size"] == size and row["ratio"]}
        own_records = [record for record in records if record["batch_size"] == size]
        fixed = [row for row in own.values() if row["kind"] == "speculative"]
        best = max(fixed, key=lambda row: row["ratio"][1], default=None)
        if best is not None:
            line = f"Batch {size}: the best draft length is {best['draft_length']}, × {best['ratio'][1]:.2f}"
            if "auto" in own:
                to_best = compare(own_records, "auto", best["method"])
                line += (
                    f"; γ auto reaches {_spread(to_best)} of it, drafting {own['auto']['drafted_per_round'] or 0:.1f} "
                    "tokens a round"
                )
            lines.append(line + ".")
            for row in fixed:
                key = f"in_step:{row['draft_length']}"
                if key in own:
                    lines.append(
                        f"Batch {size}: with γ = {row['draft_length']}, rows that each keep what they accepted are × "
                        f"{_spread(compare(own_records, row['method'], key))} as fast as rows in step."
                    )
            if "token_by_token" in own:
                gain = compare(own_records, best["method"], "token_by_token")
                (paying if gain[1] > 1 else stopped).append(size)
        if "lazy" in own and own["lazy"]["deferral_mass"] is not None:
            line = (
                f"Batch {size}: lazy asks the proxy {own['lazy']['proxy_forwards_per_token']:.3f} times a token, and "
                f"defers a share of {own['lazy']['deferral_mass']:.3f}"
            )
            if "token_by_token" in own:
                line += f"; it takes × {_spread(compare(own_records, 'token_by_token', 'lazy'))} of the eager time"
            lines.append(line + ".")
        for key, row in own.items():
            if row["kind"] == "compiled" and "base_compiled" in own:
                lines.append(
                    f"Batch {size}: {row['label']} is × {_spread(compare(own_records, key, 'base_compiled'))} the "
                    "base alone, compiled."
                )
            eager = f"speculative:{row['draft_length']}"
            if row["kind"] == "compiled" and eager in own:
                lines.append(
                    f"Batch {size}: {row['label']} is × {_spread(compare(own_records, key, eager))} as fast as not "
                    "compiled."
                )
    if stopped:
        until = f"pays up to batch {max(paying)}" if paying else "pays at no batch size measured"
        lines.append(f"Drafting {until}, and not at {', '.join(map(str, stopped))}, against KAD token by token.")
    elif paying:
        lines.append(f"Drafting pays at every batch size measured, up to {max(paying)}, against KAD token by token.")
    return lines


def compare(records: Sequence[Record], method: str, other: str) -> tuple[float, float, float]:
    """The quartiles of one method's speed relative to another's in the same repetition."""
    ratios = []
    for record in records:
        run, beside = record["runs"][method], record["runs"][other]
        if "error" not in run and "error" not in beside:
            ratios.append((run["tokens"] / run["seconds"]) / (beside["tokens"] / beside["seconds"]))
    return quartiles(ratios)


def to_markdown(report: Mapping[str, Any]) -> str:
    """A report as Markdown: a table for each batch size, the times of forward passes, findings, and settings."""
    parts = []
    rows = report["rows"]
    for size in dict.fromkeys(row["batch_size"] for row in rows):
        own = [row for row in rows if row["batch_size"] == size]
        parts.append(f"**Batch {size}**, repetitions: {own[0]['repetitions'] + own[0]['failed']}\n")
        parts.append(_method_table(own))
    if len({row["batch_size"] for row in rows}) > 1:
        parts.append("To base alone at the same batch size, in brackets the share of the bound\n")
        parts.append(_batch_table(rows))
    parts.append("Forwards on their own, medians in milliseconds, and the bound of a full batch without its prompt\n")
    parts.append(_steady_table(rows))
    if report["findings"]:
        parts.append("\n".join(f"- {line}" for line in report["findings"]) + "\n")
    parts.append(
        "Medians, in brackets the quartiles. Forwards a token are those of the batch per token of each text. Outside: "
        "share of the time outside the models' forwards. Peak memory: beside what was there before the call.\n"
    )
    if any(_has_columns(row) for row in rows):
        parts.append(
            "Base columns a token: the tokens that the base read after the prompt, with the refused ones and with "
            "those that it read again, per emitted token. Proxy prefills: how often the proxy read the text from its "
            "first token on, in the call with the most.\n"
        )
    parts.append(measured_with(report))
    return "\n".join(parts)


def _has_columns(row: Mapping[str, Any]) -> bool:
    """Whether a row has the counts that older reports lack."""
    return row.get("base_columns_per_token") is not None


def _method_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns: dict[str, Column] = {
        "method": lambda row: row["label"],
        "tokens/s": lambda row: number(row["tokens_per_second"], 1),
        "to base alone": lambda row: _spread(row["ratio"], "× "),
        "bound": lambda row: number(row["bound"], 2, "× "),
        "share of bound": lambda row: _spread(row["share"]),
        "tokens/round": lambda row: number(row["tokens_per_round"], 2),
        "drafted/round": lambda row: number(row["drafted_per_round"], 1),
        "accepted": lambda row: number(row["acceptance_rate"], 2),
        "base forwards/token": lambda row: number(row["base_forwards_per_token"], 2),
        "proxy forwards/token": lambda row: number(row["proxy_forwards_per_token"], 2),
        "outside": lambda row: percentage(row["outside"]),
        "peak memory": lambda row: mebibytes(row["memory"]),
        "base columns/token": lambda row: number(row["base_columns_per_token"], 2),
        "proxy prefills": lambda row: number(row["proxy_prefills"], 0),
        "failed": lambda row: str(row["failed"]),
    }
    if not any(_has_columns(row) for row in rows):
        del columns["base columns/token"], columns["proxy prefills"]
    if not any(row["failed"] for row in rows):
        del columns["failed"]
    return table(columns, rows)


def _batch_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a line for each method that was measured at several batch sizes, and a column for each size."""
    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    lines: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["label"], {})[row["batch_size"]] = row
    columns: dict[str, Column] = {"method": lambda line: line["label"]}
    columns |= {f"batch {size}": partial(_ratio_and_share, size) for size in sizes}
    return table(columns, [{"label": label, "rows": own} for label, own in lines.items() if len(own) > 1])


def _ratio_and_share(size: int, line: Mapping[str, Any]) -> str:
    row = line["rows"].get(size)
    if row is None or row["ratio"] is None:
        return "–"
    return f"× {row['ratio'][1]:.2f}" + (f" ({row['share'][1]:.2f})" if row["share"] else "")


def _steady_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns: dict[str, Column] = {
        "batch": lambda row: str(row["batch_size"]),
        "method": lambda row: row["label"],
        "t_b(1)": lambda row: f"{1000 * row['steady']['base_one']:.1f}",
        "t_b(γ + 1)": lambda row: f"{1000 * row['steady']['base_draft']:.1f}",
        "t_q": lambda row: f"{1000 * row['steady']['proxy_step']:.1f}",
        "γ": lambda row: f"{row['steady']['drafted']:.2f}",
        "a": lambda row: f"{row['steady']['bonus_steps']:.2f}",
        "E": lambda row: f"{row['steady']['tokens_per_round']:.2f}",
        "bound": lambda row: f"× {row['steady']['bound']:.2f}",
    }
    return table(columns, [row for row in rows if row["steady"] is not None])


def measured_with(report: Mapping[str, Any]) -> str:
    """The settings and the environment, as the last lines of a report."""
    given = {name: value for name, value in report["settings"].items() if value not in (None, {})}
    lines = [f"Asked for: {_listed(given)}", f"Measured with: {_listed(report['environment'])}"]
    if report["load"] is not None:
        lines.append(f"Highest load average of the machine: {report['load']:.1f}")
    return "\n\n".join(lines) + "\n"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


Column: TypeAlias = Callable[[Mapping[str, Any]], str]


def table(columns: Mapping[str, Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table whose first column is left-aligned. A column is a function of the row."""
    return markdown_table(list(columns), ([show(row) for show in columns.values()] for row in rows))


def percentage(value: float | None) -> str:
    """A share as a percentage, or a dash if it is missing."""
    return "–" if value is None else f"{value:.1%}"


def mebibytes(value: float | None) -> str:
    """A number of bytes in MiB, or a dash if it is missing."""
    return "–" if value is None else f"{value / 2**20:.1f} MiB"


def _spread(values: Sequence[float] | None, sign: str = "") -> str:
    return "–" if values is None else f"{sign}{values[1]:.2f} ({values[0]:.2f} to {values[2]:.2f})"
