"""The page of a trace: the text, each token shaded by the share owed to the proxy, in one HTML file.

`trace_page.html` holds the layout, the styles and the script of the panel; this module computes what it prints. To
change what the page shows:

- one more figure of each token, in the panel: a field of `TokenRecord`, its value in `recorders._make_record`, and a
  line in `FIGURES` below;
- one more total of the call, at the top: a field or property of `KADStatistics` and a line in `fragments.TOTALS`.
"""

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

from .fragments import make_environment, totals_of
from .statistics import KADStatistics, SequenceStatistics, TokenRecord
from .text_pieces import label_of, split_text

FIGURES = (  # name in the panel, attribute of `TokenRecord`, class of its bar in the styles
    ("base p", "base_prob", "of-base"),
    ("proxy q", "proxy_prob", "of-proxy"),
    ("target r", "target_prob", ""),
    ("deferral mass D", "deferral_mass", ""),
    ("owed to the proxy", "proxy_share", ""),
)


def render_page(
    sequences: Sequence[Sequence[TokenRecord]],
    statistics: KADStatistics | None,
    tokenizer: Any,
    title: str | None,
    names: Sequence[tuple[str, str]] = (),
) -> str:
    """The page as a string.

    Args:
        sequences: the records of each sequence.
        statistics: the statistics of the call; None where they are unknown.
        tokenizer: decodes the ids; without one the page shows ids.
        title: the heading, "KAD trace" by default.
        names: what took part in the call and its name, such as ("base", "Qwen/Qwen3-8B").
    """
    environment = make_environment()
    environment.filters["source_hash"] = _source_hash
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    template = environment.get_template("trace_page.html")
    per_sequence: Sequence[SequenceStatistics | None] = () if statistics is None else statistics.sequences
    if len(per_sequence) != len(sequences):
        per_sequence = [None] * len(sequences)
    pieces = [split_text(records, tokenizer) for records in sequences]
    tokens = sum(map(len, sequences))
    page = template.render(
        title=title or "KAD trace",
        names=names,
        sections=[*zip(sequences, pieces, per_sequence, strict=True)],
        tokens=tokens,
        totals=totals_of(tokens, statistics),
        has_text=tokenizer is not None,
        has_shares=any(record.proxy_share is not None for records in sequences for record in records),
        data={
            "labels": _labels(sequences, tokenizer),
            "figures": [(label, bar) for label, _, bar in FIGURES],
            "pieces": [
                (piece.start, len(records), [_figures(record) for record in piece.records])
                for records, own in zip(sequences, pieces, strict=True)
                for piece in own
            ],
        },
    )
    return page.encode("utf-8", "backslashreplace").decode()  # a title may hold half a character


def _figures(record: TokenRecord) -> list[Any]:
    """What the panel shows of a token: its id, `FIGURES`, whether it was drafted, the alternatives of both models."""
    figures = [_rounded(getattr(record, name)) for _, name, _ in FIGURES]
    alternatives = (record.base_alternatives, record.proxy_alternatives)
    likeliest = [[(token, _rounded(prob)) for token, prob in model] for model in alternatives]
    return [record.token_id, *figures, int(record.drafted), *likeliest]


def _rounded(number: float | None) -> float | None:
    """To four figures: more are not shown, and fewer characters make a smaller page."""
    return None if number is None else float(f"{number:.4g}")


def _labels(sequences: Sequence[Sequence[TokenRecord]], tokenizer: Any) -> dict[int, str]:
    """How the panel writes each id of the records."""
    if tokenizer is None:
        return {}
    all_records = [record for records in sequences for record in records]
    ids = {record.token_id for record in all_records}
    ids |= {i for record in all_records for i, _ in record.base_alternatives + record.proxy_alternatives}
    return {i: label for i in sorted(ids) if (label := label_of(tokenizer, i))}


def _source_hash(source: str) -> str:
    """How a Content-Security-Policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(source).encode()).digest()).decode()
