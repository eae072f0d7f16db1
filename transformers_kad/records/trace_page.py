"""The page of a trace: the text, each token shaded by the share owed to the proxy, in one HTML file.

`trace_page.html` holds the layout, the styles and the script of the panel; this module computes what it prints. To
change what the page shows:

- one more figure of each token, in the panel: a field of `TokenRecord`, its value in `recorders._make_record`, and a
  line in `FIGURES` below;
- one more total of the call, at the top: a field or property of `KADStatistics` and a line in `TOTALS` below.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..models.token_bytes import byte_level_text
from .statistics import KADStatistics, SequenceStatistics, TokenRecord

FIGURES = (  # name in the panel, attribute of `TokenRecord`, class of its bar in the styles
    ("base p", "base_prob", "of-base"),
    ("proxy q", "proxy_prob", "of-proxy"),
    ("target r", "target_prob", ""),
    ("deferral mass D", "deferral_mass", ""),
    ("owed to the proxy", "proxy_share", ""),
)
TOTALS = (  # name at the top of the page, attribute of `KADStatistics`
    ("rounds", "rounds"),
    ("drafted", "drafted"),
    ("accepted", "accepted"),
    ("acceptance rate", "acceptance_rate"),
    ("tokens per round", "tokens_per_round"),
    ("mean deferral mass", "deferral_mass"),
    ("base forwards", "base_forwards"),
    ("proxy forwards", "proxy_forwards"),
)
SHADES = 10  # shades of the share above 0, as many as the template has colours
LONGEST_CHARACTER = 4  # bytes of UTF-8, so no more tokens than that make up one character
UNDECODED = "\N{REPLACEMENT CHARACTER}"  # what decoders put for bytes that are no character (yet)


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
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["source_hash"] = _source_hash
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    template = environment.from_string(resources.files(__package__).joinpath("trace_page.html").read_text("utf-8"))
    per_sequence: Sequence[SequenceStatistics | None] = () if statistics is None else statistics.sequences
    if len(per_sequence) != len(sequences):
        per_sequence = [None] * len(sequences)
    pieces = [_split_text(records, tokenizer) for records in sequences]
    tokens = sum(map(len, sequences))
    page = template.render(
        title=title or "KAD trace",
        names=names,
        sections=[*zip(sequences, pieces, per_sequence, strict=True)],
        tokens=tokens,
        totals=[("tokens", tokens), *((label, getattr(statistics, name, None)) for label, name in TOTALS)],
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


@dataclass(frozen=True)
class _Piece:
    """A part of the text that can be shown: one token, or the tokens that make up one character."""

    start: int  # the place of the first token in its sequence, from 0
    records: Sequence[TokenRecord]
    text: str

    @property
    def classes(self) -> str:
        """The classes of its element in the page."""
        shares = [record.proxy_share for record in self.records if record.proxy_share is not None]
        share = sum(shares) / len(shares) if shares else 0.0
        shade = round(share * SHADES)
        marks = {f"s{shade}": shade, "proxy": share >= 0.5, "drafted": any(record.drafted for record in self.records)}
        return " ".join(["t", *(mark for mark, is_set in marks.items() if is_set)])

    @property
    def parts(self) -> list[tuple[str, str]]:
        """The text cut into (kind, part); kind is "" for plain text. Spaces are marked in a piece of spaces alone."""
        parts, end = [], 0
        for match in (_MARKED if self.text.strip() else _BLANKS).finditer(self.text):
            kind = str(match.lastgroup)
            parts += [("", self.text[end : match.start()])] if match.start() > end else []
            parts.append((kind, _code_point(match[0]) if kind == "control" else match[0]))
            end = match.end()
        return parts + ([("", self.text[end:])] if end < len(self.text) else [])


def _figures(record: TokenRecord) -> list[Any]:
    """What the panel shows of a token: its id, `FIGURES`, whether it was drafted, the alternatives of both models."""
    figures = [_rounded(getattr(record, name)) for _, name, _ in FIGURES]
    alternatives = (record.base_alternatives, record.proxy_alternatives)
    likeliest = [[(token, _rounded(prob)) for token, prob in model] for model in alternatives]
    return [record.token_id, *figures, int(record.drafted), *likeliest]


def _rounded(number: float | None) -> float | None:
    """To four figures: more are not shown, and fewer characters make a smaller page."""
    return None if number is None else float(f"{number:.4g}")


# --- Text -----------------------------------------------------------------------------------------------------


def _split_text(records: Sequence[TokenRecord], tokenizer: Any) -> list[_Piece]:
    """The text in pieces: one for each token, but one for the tokens that only together make up a character."""
    ids = [record.token_id for record in records]
    if tokenizer is None:
        return [_Piece(at, [record], "") for at, record in enumerate(records)]
    pieces: list[_Piece] = []
    start, context = 0, 0  # decoding begins a piece before `start`: some decoders drop a space that comes first
    while start < len(ids):
        known = _decode(tokenizer, ids[context:start])
        texts: list[str] = []
        while start + len(texts) < len(ids) and len(texts) < LONGEST_CHARACTER:
            texts.append(_continuation(tokenizer, known, ids[context:start], ids[start : start + len(texts) + 1]))
            if not texts[-1].endswith(UNDECODED):
                break
        # The piece is the first text that more tokens do not change; it may be bytes that are no character.
        stop, text = next(
            (start + count, text)
            for count, text in enumerate(texts, 1)
            if texts[-1].startswith(text) and (count == len(texts) or texts[count] != text)
        )
        pieces.append(_Piece(start, records[start:stop], text))
        start, context = stop, start if text else context
    return pieces


def _continuation(tokenizer: Any, known: str, before: list[int], ids: list[int]) -> str:
    """What `ids` add to the text `known` of the tokens before them."""
    text = _decode(tokenizer, before + ids)
    return text[len(known) :] if text.startswith(known) else _decode(tokenizer, ids)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


# Line breaks and tabs are marked where they are in the text, and kept. `control` characters would act on the page or
# be invisible, and are written out.
_MARKED = re.compile(
    r"(?P<newline>\n)|(?P<tab>\t)|"
    r"(?P<control>[\x00-\x1f\x7f-\x9f\u00ad\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff])"
)
_BLANKS = re.compile(_MARKED.pattern + r"|(?P<blank>\s)")


def _code_point(character: str) -> str:
    return f"U+{ord(character):04X}"


def _labels(sequences: Sequence[Sequence[TokenRecord]], tokenizer: Any) -> dict[int, str]:
    """How the panel writes each id of the records."""
    if tokenizer is None:
        return {}
    all_records = [record for records in sequences for record in records]
    ids = {record.token_id for record in all_records}
    ids |= {i for record in all_records for i, _ in record.base_alternatives + record.proxy_alternatives}
    return {i: label for i in sorted(ids) if (label := _label(tokenizer, i))}


def _label(tokenizer: Any, token_id: int) -> str:
    """A token in one line: its text with signs for blanks, or its bytes where they alone are no text.

    Empty where the tokenizer does not know the id.
    """
    # Decoded behind itself, because some decoders drop a space that comes first.
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
