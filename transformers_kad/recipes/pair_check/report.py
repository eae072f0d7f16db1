"""The report of a check: figures over all texts, the recommended rule, and a summary in words."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.methods import Method
from ..intervals import Z
from .measures import BINS, SURE
from .recommendation import choose_threshold, split_confidence
from .speed import Costs, expected_speed_up
from .texts import WRITERS

Record = Mapping[str, Any]


def summarize(
    records: Sequence[Record],
    methods: Sequence[Method],
    costs: Costs,
    draft_length: int,
    *,
    vocabulary_nats: float,
    on_cpu: bool,
    failed: int,
) -> dict[str, Any]:
    """The figures over all texts, as JSON values.

    Args:
        records: the records of `TextMeter.measure`, at least one.
        methods: the methods whose rules were applied, in the order of the records.
        costs: the times of forwards.
        draft_length: γ.
        vocabulary_nats: the logarithm of the vocabulary's size, which chance needs for a token.
        on_cpu: see `expected_speed_up`.
        failed: the number of prompts that failed.
    """
    histogram = [sum(record["kad"]["histogram"][at] for record in records) for at in range(BINS)]
    tokens = _total(records, "kad", "tokens")
    return {
        "prompts": len(records),
        "failed": failed,
        "texts": {name: _text_figures(records, name) for name in WRITERS},
        "prompts_predicted": _prediction(records, vocabulary_nats),
        "confidence_histogram": [mass / tokens for mass in histogram],
        "confidence_split": split_confidence(histogram),
        "forward_seconds": costs._asdict(),
        "rules": [
            _rule_figures(records, at, method, costs, draft_length, on_cpu=on_cpu) for at, method in enumerate(methods)
        ],
    }


def _total(records: Sequence[Record], writer: str, name: str) -> float:
    return float(sum(record[writer].get(name, 0.0) for record in records))


def _text_figures(records: Sequence[Record], writer: str) -> dict[str, Any]:
    """Means over the tokens of the texts of one writer; `agreement_where_sure` is None if the base is never sure."""
    tokens, sure = _total(records, writer, "tokens"), _total(records, writer, "sure")
    contradicted = _total(records, writer, "sure_disagreements")
    return {
        "tokens_per_text": tokens / len(records),
        "ended": _total(records, writer, "ended") / len(records),
        "total_variation": _total(records, writer, "total_variation") / tokens,
        "agreement": _total(records, writer, "agreements") / tokens,
        "sure": sure / tokens,
        "sure_and_contradicted": contradicted / tokens,
        "agreement_where_sure": 1 - contradicted / sure if sure else None,
        "unknown_mass": _total(records, writer, "unknown_mass") / tokens,
    }


def _prediction(records: Sequence[Record], vocabulary_nats: float) -> dict[str, Any]:
    """Nats per token of the prompts, and the share of the base's knowledge beyond chance that the proxy has."""
    tokens = _total(records, "prompt", "tokens")
    if not tokens:
        return {"base_nats": None, "proxy_nats": None, "chance_nats": vocabulary_nats, "proxy_knows": None}
    base, proxy = (_total(records, "prompt", f"{name}_nats") / tokens for name in ("base", "proxy"))
    known = (vocabulary_nats - proxy) / (vocabulary_nats - base) if base < vocabulary_nats else None
    return {"base_nats": base, "proxy_nats": proxy, "chance_nats": vocabulary_nats, "proxy_knows": known}


def _rule_figures(
    records: Sequence[Record], at: int, method: Method, costs: Costs, draft_length: int, *, on_cpu: bool
) -> dict[str, Any]:
    assert method.config is not None
    own = [record["kad"]["rules"][at] for record in records]
    tokens, rounds = _total(records, "kad", "tokens"), sum(text["rounds"] for text in own)
    bonus_steps = sum(text["bonus_steps"] for text in own) / rounds
    has_mass = own[0]["deferral_mass"] is not None
    figures: dict[str, Any] = {
        "method": method.label,
        "rule": method.config.rule,
        "parameters": dict(method.config.parameters),
        "deferral_mass": sum(text["deferral_mass"] for text in own) / tokens if has_mass else None,
        "acceptance": sum(text["acceptance"] for text in own) / tokens,
        "kept_of_base": sum(text["kept_of_base"] for text in own) / tokens,
        "tokens_per_round": tokens / rounds,
    }
    figures["speed_up"] = expected_speed_up(
        costs, draft_length, tokens_per_round=figures["tokens_per_round"], bonus_steps=bonus_steps, on_cpu=on_cpu
    )
    return figures


def recommend(figures: Mapping[str, Any], records: Sequence[Record], draft_length: int) -> dict[str, Any]:
    """The figures of the recommended rule, with a 95 % interval of its deferral mass over the texts."""
    dual = {rule["parameters"]["threshold"]: at for at, rule in enumerate(figures["rules"]) if rule["rule"] == "dual"}
    acceptance = {threshold: figures["rules"][at]["acceptance"] for threshold, at in dual.items()}
    split, length = figures["confidence_split"], figures["texts"]["kad"]["tokens_per_text"]
    at = dual[choose_threshold(acceptance, split, length)]
    own = figures["rules"][at]
    # The interval of a ratio, by the deviations of the texts from it.
    deviations = [
        record["kad"]["rules"][at]["deferral_mass"] - own["deferral_mass"] * record["kad"]["tokens"]
        for record in records
    ]
    spread = 0.0
    if len(records) > 1:
        spread = Z * statistics.stdev(deviations) / length / len(records) ** 0.5
    interval = [max(own["deferral_mass"] - spread, 0.0), min(own["deferral_mass"] + spread, 1.0)]
    return {**own, "num_assistant_tokens": draft_length, "deferral_mass_interval": interval}


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report in words and two tables."""
    lines = [f"Verdict: **{report['verdict']}**", ""]
    lines += [f"- {reason}" for reason in report["reasons"]] or ["- Nothing was found that speaks against the pair."]
    if report["notes"]:
        lines += ["", "Notes:", "", *(f"- {note}" for note in report["notes"])]
    figures, recommended = report["figures"], report["recommended"]
    if figures is None or recommended is None:
        return "\n".join(lines) + "\n"
    start = "To try the pair all the same, start" if report["verdict"] == "bad" else "Start"
    lines += ["", f"{start} with {recommended['method']}. Rules at about the same deferral mass, for comparison:", ""]
    lines += ["| rule | deferral mass | acceptance | tokens/round | expected speed |", "|---|---:|---:|---:|---:|"]
    for rule in [recommended, *_alternatives(figures["rules"], recommended)]:
        mass = "–" if rule["deferral_mass"] is None else f"{rule['deferral_mass']:.2f}"
        lines.append(
            f"| {rule['method']} | {mass} | {rule['acceptance']:.2f} | {rule['tokens_per_round']:.2f} "
            f"| × {rule['speed_up']:.2f} |"
        )
    lines += ["", f"The base is sure of a token where it gives it {SURE} or more.", ""]
    lines += ["| text of | tokens | ended | total variation | agreement | base sure | sure and contradicted |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for name, text in figures["texts"].items():
        lines.append(
            f"| {name} | {text['tokens_per_text']:.1f} | {text['ended']:.0%} | {text['total_variation']:.3f} "
            f"| {text['agreement']:.1%} | {text['sure']:.1%} | {text['sure_and_contradicted']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def _alternatives(rules: Sequence[Mapping[str, Any]], recommended: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of each other method with a deferral mass, the parameter whose mass is nearest to the recommended one's."""
    nearest: dict[str, Mapping[str, Any]] = {}
    for rule in rules:
        name = rule["method"].split()[0]
        if rule["deferral_mass"] is None or name == recommended["method"].split()[0]:
            continue
        away = abs(rule["deferral_mass"] - recommended["deferral_mass"])
        if name not in nearest or away < abs(nearest[name]["deferral_mass"] - recommended["deferral_mass"]):
            nearest[name] = rule
    return list(nearest.values())
