"""The bytes that the tokens of a tokenizer stand for."""

import json
import re
from collections.abc import Iterable
from functools import cached_property

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE_OF: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}


class TokenBytes:
    """A tokenizer's tokens as the bytes that they stand for.

    Attributes:
        text: bytes of each token that stands for text, by id.
        by_text: the id that stands for some bytes; of several the lowest, byte-fallback tokens last.
        added: name of each added token, special or not, by id.
        special: ids of the special tokens, which stand for no text.
        vocabulary: id of every token, by its name.

    Raises:
        ValueError: the tokens can't be read as text (those of WordPiece, for instance).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        self.special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
        self.added = {index: str(token) for index, token in added.items()}
        self.added |= {index: token for token, index in self.vocabulary.items() if index in self.special}

        kind = _kind_of(tokenizer, self.vocabulary)
        self.text: dict[int, bytes] = {}
        fallback = set()
        for token, index in self.vocabulary.items():
            if index in self.special:
                continue
            text = None
            if index not in self.added and kind == "byte-level":
                text = byte_level_text(token)
            elif index not in self.added and kind == "sentencepiece":
                byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
                text = bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
                fallback |= {index} if byte else set()
            self.text[index] = text or token.encode()
        worst_first = sorted(self.text, key=lambda index: (index in fallback, index), reverse=True)
        self.by_text = {self.text[index]: index for index in worst_first}
        self.has_every_byte = all(bytes([byte]) in self.by_text for byte in range(256))
        self._longest = max(map(len, self.by_text), default=0)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, in which the names of special tokens are text like other text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The text of some tokens."""
        return b"".join(self.text.get(index, b"") for index in ids)

    @cached_property
    def space_at_start(self) -> bool:
        """Whether the tokenizer puts a space before a text."""
        return self.bytes_of(self.tokenize("a")).startswith(b" ")

    @cached_property
    def space_after_special(self) -> bool:
        """Whether the tokenizer puts a space before text that follows a special token."""
        if not self.special:
            return False
        name = self.tokenizer.convert_ids_to_tokens(min(self.special))
        return self.bytes_of(self.tokenizer(f"{name}a", add_special_tokens=False)["input_ids"]).startswith(b" ")

    @cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer puts before every text, such as a beginning-of-sequence token."""
        plain: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole: list[int] = self.tokenizer("a")["input_ids"]
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0) if plain else 0
        return whole[:at]

    def longest_pieces(self, text: bytes) -> tuple[int, ...]:
        """Bytes cut from the left into the longest tokens that fit; empty if some byte has none."""
        ids, at = [], 0
        while at < len(text):
            ends = range(min(at + self._longest, len(text)), at, -1)
            end = next((end for end in ends if text[at:end] in self.by_text), None)
            if end is None:
                return ()
            ids.append(self.by_text[text[at:end]])
            at = end
        return tuple(ids)


def byte_level_text(token: str) -> bytes | None:
    """The bytes that a token of a byte-level tokenizer stands for; None if it can't be one of its tokens."""
    return bytes(BYTE_OF[character] for character in token) if BYTE_OF.keys() >= set(token) else None


def _kind_of(tokenizer: PreTrainedTokenizerBase, vocabulary: Iterable[str]) -> str:
    """How a tokenizer writes the bytes of its tokens: "byte-level", "sentencepiece" or "plain"."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        marks = {token[:1] for token in vocabulary}
        return "sentencepiece" if "▁" in marks else "byte-level" if "Ġ" in marks else "plain"
    state = json.loads('{"type": "no decoder"}' if backend.decoder is None else backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return "byte-level"
    if "Metaspace" in kinds or any(step.get("pattern") == {"String": "▁"} for step in steps):
        return "sentencepiece"
    if kinds <= {"Fuse", "ByteFallback", "Strip"}:
        return "plain"
    raise ValueError(
        f"The tokenizer {tokenizer.name_or_path!r} writes its tokens in a way that can't be read as text: "
        f"{sorted(kinds)}. Byte-level and SentencePiece tokenizers can be aligned."
    )
