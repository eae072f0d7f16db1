"""The page of a trace: the text, each token shaded by the share owed to the proxy, in one HTML file.

The template beside this module holds the layout, the styles and the few lines of script that fill the panel of
details. Here the records become what it prints: pieces of text, numbers, the outline of a chart.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from ..models.vocabulary import byte_level_text

if TYPE_CHECKING:
    from .statistics import KADStatistics, SequenceStatistics, TokenRecord

SHADES = 10  # shades of the share above 0, as many as the template has colours
LONGEST_CHARACTER = 4  # bytes of UTF-8, so no more tokens than that make up one character
UNDECODED = "\N{REPLACEMENT CHARACTER}"  # what decoders put for bytes that are no character (yet)


def render_page(
    sequences: "Sequence[Sequence[TokenRecord]]",
    statistics: "KADStatistics | None",
    tokenizer: Any,
    title: str | None,
    names: Sequence[tuple[str, str]] = (),
) -> str:
    """The page as a string.

    Args:
        sequences: the records of each sequence.
        statistics: of the call, if they are known.
        tokenizer: decodes the ids; without one the page shows ids.
        title: the heading, "KAD trace" by default.
        names: what took part and what it is called, such as ("base", "Qwen/Qwen3-8B").
    """
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["source_hash"] = _source_hash
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    template = environment.from_string(resources.files(__package__).joinpath("trace_page.html").read_text("utf-8"))
    sections = [
        _Section(records, _split_text([r.token_id for r in records], tokenizer), own)
        for records, own in zip(sequences, _own_statistics(sequences, statistics), strict=True)
    ]
    page = template.render(
        title=title or "KAD trace",
        names=names,
        sections=sections,
        tokens=sum(len(records) for records in sequences),
        totals=_totals(sequences, statistics),
        has_text=tokenizer is not None,
        has_shares=any(r.proxy_share is not None for records in sequences for r in records),
        data={
            "labels": _labels(sequences, tokenizer),
            "pieces": [piece for section in sections for piece in section.details()],
        },
    )
    return page.encode("utf-8", "backslashreplace").decode()  # a title may hold half a character


@dataclass(frozen=True)
class _Piece:
    """A part of the text that can be shown: one token, or the tokens that make up one character."""

    start: int
    stop: int
    text: str


@dataclass(frozen=True)
class _Section:
    """One sequence as the template prints it."""

    records: "Sequence[TokenRecord]"
    pieces: list[_Piece]
    statistics: "SequenceStatistics | None"

    def spans(self) -> "Iterator[tuple[int, str, list[tuple[str, str]], int]]":
        """Each piece's place from 1, its classes, its text in parts, and the id to show where it has no text."""
        for piece in self.pieces:
            records = self.records[piece.start : piece.stop]
            shares = [r.proxy_share for r in records if r.proxy_share is not None]
            share = sum(shares) / len(shares) if shares else 0.0
            shade = round(share * SHADES)
            classes = ["t", f"s{shade}"] if shade else ["t"]
            classes += ["proxy"] if share >= 0.5 else []
            classes += ["drafted"] if any(r.drafted for r in records) else []
            yield piece.start + 1, " ".join(classes), _parts(piece.text), records[0].token_id

    def details(self) -> list[list[Any]]:
        """Per piece: the place of its first token, the sequence's length, and its tokens' figures."""
        return [
            [piece.start, len(self.records), [_figures(r) for r in self.records[piece.start : piece.stop]]]
            for piece in self.pieces
        ]

    @property
    def masses(self) -> list[float]:
        """D along the text; empty for rules that are no mask."""
        return [r.deferral_mass for r in self.records if r.deferral_mass is not None]

    @property
    def outline(self) -> str:
        """The steps of D as an SVG path: a token is 1 wide, y runs from 0 (D = 1) to 1 (D = 0)."""
        steps = (f"V{_rounded(1 - mass):g}H{place}" for place, mass in enumerate(self.masses, 1))
        return f"M0 1{''.join(steps)}V1Z"


def _figures(record: "TokenRecord") -> list[Any]:
    return [
        record.token_id,
        *map(_rounded, (record.base_prob, record.proxy_prob, record.target_prob)),
        *map(_rounded, (record.deferral_mass, record.proxy_share)),
        int(record.drafted),
        *([[i, _rounded(p)] for i, p in found] for found in (record.base_alternatives, record.proxy_alternatives)),
    ]


def _rounded(number: float | None) -> float | None:
    """To four figures: more are not shown, and fewer characters make a smaller page."""
    return None if number is None else float(f"{number:.4g}")


# --- Counts ---------------------------------------------------------------------------------------------------


def _own_statistics(
    sequences: "Sequence[Sequence[TokenRecord]]", statistics: "KADStatistics | None"
) -> "list[SequenceStatistics | None]":
    if statistics is None or len(statistics.sequences) != len(sequences):
        return [None] * len(sequences)
    return [*statistics.sequences]


def _totals(
    sequences: "Sequence[Sequence[TokenRecord]]", statistics: "KADStatistics | None"
) -> list[tuple[str, int | float | None]]:
    """Names and values of what the page says at its top; None is unknown or undefined."""
    names = {
        "rounds": "rounds",
        "drafted": "drafted",
        "accepted": "accepted",
        "acceptance_rate": "acceptance rate",
        "tokens_per_round": "tokens per round",
        "deferral_mass": "mean deferral mass",
        "base_forwards": "base forwards",
        "proxy_forwards": "proxy forwards",
    }
    tokens = sum(len(records) for records in sequences)
    return [("tokens", tokens), *((label, getattr(statistics, name, None)) for name, label in names.items())]


# --- Text -----------------------------------------------------------------------------------------------------


def _split_text(ids: list[int], tokenizer: Any) -> list[_Piece]:
    """The text in pieces: a token each, but the tokens that only together make up a character are one."""
    if tokenizer is None:
        return [_Piece(at, at + 1, "") for at in range(len(ids))]
    pieces: list[_Piece] = []
    start, context = 0, 0  # decoding begins a piece before `start`: some decoders drop a space that comes first
    while start < len(ids):
        known = _decode(tokenizer, ids[context:start])
        texts: list[str] = []
        while start + len(texts) < len(ids) and len(texts) < LONGEST_CHARACTER:
            texts.append(_continuation(tokenizer, known, ids[context:start], ids[start : start + len(texts) + 1]))
            if not texts[-1].endswith(UNDECODED):
                break
        # What stays as it is with more tokens in view is settled, bytes that are no character included.
        settled = [
            count
            for count, text in enumerate(texts, 1)
            if texts[-1].startswith(text) and (count == len(texts) or texts[count] != text)
        ]
        pieces.append(_Piece(start, start + settled[0], texts[settled[0] - 1]))
        context = start if pieces[-1].text else context
        start = pieces[-1].stop
    return pieces


def _continuation(tokenizer: Any, known: str, before: list[int], ids: list[int]) -> str:
    """What `ids` add to the text `known` of the tokens before them."""
    text = _decode(tokenizer, before + ids)
    return text[len(known) :] if text.startswith(known) else _decode(tokenizer, ids)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


# Marked where they are in the text, and kept; `control` would act on the page or not be seen, and is written out.
_MARKED = re.compile(
    r"(?P<newline>\n)|(?P<tab>\t)|"
    r"(?P<control>[\x00-\x1f\x7f-\x9f\u00ad\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff])"
)
_BLANKS = re.compile(_MARKED.pattern + r"|(?P<blank>\s)")


def _parts(text: str) -> list[tuple[str, str]]:
    """The text cut into (kind, part); kind is "" for plain text. Spaces are marked where there is nothing else."""
    parts, end = [], 0
    for match in (_MARKED if text.strip() else _BLANKS).finditer(text):
        kind = str(match.lastgroup)
        parts += [("", text[end : match.start()])] if match.start() > end else []
        parts.append((kind, _code_point(match[0]) if kind == "control" else match[0]))
        end = match.end()
    return parts + ([("", text[end:])] if end < len(text) else [])


def _code_point(character: str) -> str:
    return f"U+{ord(character):04X}"


# --- Names of tokens ------------------------------------------------------------------------------------------


def _labels(sequences: "Sequence[Sequence[TokenRecord]]", tokenizer: Any) -> dict[int, str]:
    """How each id of the records is written in the panel."""
    if tokenizer is None:
        return {}
    ids = {r.token_id for records in sequences for r in records}
    ids |= {i for records in sequences for r in records for i, _ in (*r.base_alternatives, *r.proxy_alternatives)}
    return {i: label for i in sorted(ids) if (label := _label(tokenizer, i))}


def _label(tokenizer: Any, token_id: int) -> str:
    """A token in one line: its text with signs for blanks, or its bytes where they alone are no text.

    Empty where the tokenizer does not know the id.
    """
    # Twice, because some decoders drop a space that comes first.
    text = _continuation(tokenizer, _decode(tokenizer, [token_id]), [token_id], [token_id])
    name = tokenizer.convert_ids_to_tokens(token_id)
    if UNDECODED in text and isinstance(name, str):
        raw = byte_level_text(name)
        if raw is None or raw.decode("utf-8", "replace") != text:
            return name
        if raw != text.encode():
            return f"bytes {raw.hex(' ').upper()}"
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    shown = "".join(signs.get(c) or (_code_point(c) if c.isspace() or _MARKED.match(c) else c) for c in text)
    return shown or name or ""


def _source_hash(source: str) -> str:
    """How a Content-Security-Policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(source).encode()).digest()).decode()
