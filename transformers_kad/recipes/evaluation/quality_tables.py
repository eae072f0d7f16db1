"""The quality of texts as Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..markdown import markdown_table, number, p_value
from .text_figures import FIGURES

SIGNIFICANT = 0.05


def quality_markdown(quality: Mapping[str, Any]) -> list[str]:
    """The tables and notes of a task: figures, differences to the reference method, and preferences."""
    rows, reference = quality["rows"], quality["reference"]
    names = [name for name in FIGURES if any(name in row["figures"] for row in rows)]
    parts = [_about(quality), _figures(rows, names), *_notes(rows)]
    if quality["comparisons"]:
        parts += [_differences(rows, names, quality["comparisons"], reference)]
        parts.append(
            f"Differences of perplexity are those of its logarithm. *: p < {SIGNIFICANT} after Holm's correction for "
            "all pairs of methods.\n"
        )
    if quality["preferences"]:
        parts.append(_preferences(rows, quality["preferences"], reference))
    return parts


def _about(quality: Mapping[str, Any]) -> str:
    judge = quality["judge"]
    parts = ["no judge, so there is no perplexity (--judge)" if judge is None else f"judge {judge}"]
    if quality["reward_model"] is not None:
        parts.append(f"reward model {quality['reward_model']}")
    lines = [f"Quality: {', '.join(parts)}. In brackets: 95 % intervals.\n"]
    if quality["judge_is"] is not None:
        lines.append(
            f"Note: the judge is the {quality['judge_is']} itself. Its perplexity measures how near texts are to its "
            "own, so it favours the methods that use it.\n"
        )
    return "\n".join(lines)


def _figures(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    lines = []
    for row in rows:
        cells = [_cell(row["figures"].get(name), FIGURES[name].digits) for name in names]
        lines.append([row["method"], *cells, number(row["distinct_2_all_texts"], 3)])
    header = ["method", *(FIGURES[name].heading for name in names), "distinct-2, all texts"]
    return markdown_table(header, lines)


def _cell(figure: Mapping[str, Any] | None, digits: int) -> str:
    if figure is None:
        return "–"
    return f"{figure['value']:.{digits}f} ({figure['low']:.{digits}f} to {figure['high']:.{digits}f})"


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each method with texts that a model did not score, or not completely."""
    reasons = {
        "without_perplexity": "have no perplexity: they are empty, failed, or do not fit into the judge's context",
        "cut_by_judge": "are longer than the judge's context, and were scored as far as they fit",
        "without_reward": "have no reward: they failed, or do not fit into the reward model's context",
    }
    return [
        f"Note: {row[name]} of {row['texts']} texts of {row['method']} {reason}.\n"
        for name, reason in reasons.items()
        for row in rows
        if row[name]
    ]


def _differences(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    comparisons: Sequence[Mapping[str, Any]],
    reference: str,
) -> str:
    cells: dict[tuple[str, str], str] = {}
    for c in comparisons:
        if reference in (c["method_a"], c["method_b"]):
            other, sign = (c["method_b"], 1) if c["method_a"] == reference else (c["method_a"], -1)
            width = "" if c["half_width"] is None else f" ± {c['half_width']:.3f}"
            mark = "*" if c["adjusted_p_value"] < SIGNIFICANT else ""
            shown = round(sign * c["difference"], 3) + 0.0  # which is 0.000 where it would be -0.000
            cells[other, c["figure"]] = f"{shown:.3f}{width}{mark}"
    lines = [
        [row["method"], *(cells.get((row["method"], name), "–") for name in names)]
        for row in rows
        if row["method"] != reference
    ]
    return markdown_table([f"{reference} minus", *(FIGURES[name].heading for name in names)], lines)


def _preferences(rows: Sequence[Mapping[str, Any]], preferences: Sequence[Mapping[str, Any]], reference: str) -> str:
    lines = []
    for row in rows:
        for p in preferences:
            if {p["method_a"], p["method_b"]} != {row["method"], reference}:
                continue
            first = p["method_a"] == row["method"]
            wins, losses = (p["wins"], p["losses"]) if first else (p["losses"], p["wins"])
            rate, low, high = (
                (p["win_rate"], p["low"], p["high"]) if first else (1 - p["win_rate"], 1 - p["high"], 1 - p["low"])
            )
            lines.append(
                [
                    row["method"],
                    *(str(count) for count in (wins, p["ties"], losses)),
                    f"{rate:.3f} ({low:.3f} to {high:.3f})",
                    p_value(p["p_value"]),
                    p_value(p["adjusted_p_value"]),
                ]
            )
    header = [f"preferred to {reference}", "wins", "ties", "losses", "win rate", "p", "p (Holm)"]
    return markdown_table(header, lines)
