"""The text of a trace in pieces that can be shown: what each token adds, and the characters that are marked."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..models.token_bytes import byte_level_text
from .statistics import TokenRecord

SHADES = 10  # shades of the share above 0, as many as the styles have colours
LONGEST_CHARACTER = 4  # bytes of UTF-8, so no more tokens than that make up one character
UNDECODED = "\N{REPLACEMENT CHARACTER}"  # what decoders put for bytes that are no character (yet)

# Line breaks and tabs are marked where they are in the text, and kept. `control` characters would act on the page or
# be invisible, and are written out.
_MARKED = re.compile(
    r"(?P<newline>\n)|(?P<tab>\t)|"
    r"(?P<control>[\x00-\x1f\x7f-\x9f\u00ad\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff])"
)
_BLANKS = re.compile(_MARKED.pattern + r"|(?P<blank>\s)")


@dataclass(frozen=True)
class Piece:
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
        """The text of the piece, cut by `cut_marks`."""
        return cut_marks(self.text)


def split_text(records: Sequence[TokenRecord], tokenizer: Any) -> list[Piece]:
    """The text in pieces: one for each token, but one for the tokens that only together make up a character."""
    ids = [record.token_id for record in records]
    if tokenizer is None:
        return [Piece(at, [record], "") for at, record in enumerate(records)]
    pieces: list[Piece] = []
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
        pieces.append(Piece(start, records[start:stop], text))
        start, context = stop, start if text else context
    return pieces


def _continuation(tokenizer: Any, known: str, before: list[int], ids: list[int]) -> str:
    """What `ids` add to the text `known` of the tokens before them."""
    text = _decode(tokenizer, before + ids)
    return text[len(known) :] if text.startswith(known) else _decode(tokenizer, ids)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def cut_marks(text: str) -> list[tuple[str, str]]:
    """A text cut into (kind, part); kind is "" for plain text. Spaces are marked in a text of spaces alone."""
    parts, end = [], 0
    for match in (_MARKED if text.strip() else _BLANKS).finditer(text):
        kind = str(match.lastgroup)
        parts += [("", text[end : match.start()])] if match.start() > end else []
        parts.append((kind, _code_point(match[0]) if kind == "control" else match[0]))
        end = match.end()
    return parts + ([("", text[end:])] if end < len(text) else [])


def _code_point(character: str) -> str:
    return f"U+{ord(character):04X}"


def label_of(tokenizer: Any, token_id: int) -> str:
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
