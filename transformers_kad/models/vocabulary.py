"""The vocabularies of base and proxy: padding rows, ids that mean other strings, different tokenizers.

A rule works on one vocabulary, the base's. There are three cases:

- Both models have one tokenizer, and their vocabularies differ at most by padding rows: `align_vocabulary`.
- Both models are said to have one tokenizer: `check_tokenizers` raises if ids mean different strings.
- The models have different tokenizers: `align_vocabularies` finds the tokens that both have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, groupby
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .token_bytes import TokenBytes

SAMPLE_TEXT = """\
The committee met on 14 March 2023 to discuss three questions: who pays, who decides, and what happens if nobody does.
"I don't think," said Dr. Okafor, "that we'll agree today." She was right; the vote (7 to 5) settled nothing.

def area(radius: float) -> float:
    return 3.14159 * radius ** 2  # in square metres

1. Preheat the oven to 180 °C and butter a 24 cm tin.
2. Whisk two eggs with 150 g of sugar until pale, then fold in the flour.
Question: A train covers 240 km in 2.5 hours. How fast does it go? Answer: 240 / 2.5 = 96 km/h.
"""


def align_vocabulary(
    logits: torch.Tensor, vocabulary: int, alignment: "VocabularyAlignment | None" = None
) -> torch.Tensor:
    """Bring the proxy's logits `(..., V_proxy)` to the base's vocabulary, `(..., vocabulary)` float32.

    Ids that only the base has get -inf; ids that only the proxy has are dropped, so that a softmax
    renormalises over the rest. Without `alignment` equal ids are the same token.
    """
    if alignment is not None:
        return alignment.to_base(logits, vocabulary)
    missing = vocabulary - logits.shape[-1]
    if missing > 0:
        return torch.nn.functional.pad(logits.float(), (0, missing), value=-torch.inf)
    return logits[..., :vocabulary].float()


def check_tokenizers(base_tokenizer: Any, proxy_tokenizer: Any) -> None:
    """Raise unless the ids that two tokenizers share mean the same strings.

    Raises:
        ValueError: names the first ids that differ.
    """
    difference = describe_different_ids(base_tokenizer, proxy_tokenizer)
    if difference is not None:
        raise ValueError(
            f"{difference} Take a proxy of the same model family, or pass "
            "`vocabulary_alignment=align_vocabularies(base_tokenizer, proxy_tokenizer)`."
        )


def describe_different_ids(base_tokenizer: Any, proxy_tokenizer: Any) -> str | None:
    """A sentence on the ids that two tokenizers share and that mean different strings; None if there are none."""
    base = {index: token for token, index in base_tokenizer.get_vocab().items()}
    proxy = {index: token for token, index in proxy_tokenizer.get_vocab().items()}
    different = [index for index in sorted(base.keys() & proxy.keys()) if base[index] != proxy[index]]
    if not different:
        return None
    shown = ", ".join(f"{i}: {base[i]!r} and {proxy[i]!r}" for i in different[:5])
    return (
        f"Base and proxy must share one vocabulary, but {len(different)} token ids mean different strings "
        f"(base and proxy): {shown}."
    )


@dataclass(frozen=True)
class VocabularyReport:
    """How much two tokenizers share.

    Attributes:
        shared: number of tokens that both have.
        base_size: number of the base's tokens.
        proxy_size: number of the proxy's tokens.
        base_text_tokens: tokens of the sample text in the base's tokenization.
        proxy_text_tokens: tokens of the sample text in the proxy's tokenization.
        base_text_shared: how many of the first kind the proxy has as well: what it reads as the base wrote it.
        proxy_text_shared: how many of the second kind the base has as well: what it can say.
        unspellable: number of the base's tokens that no sequence of the proxy's tokens spells.
    """

    shared: int
    base_size: int
    proxy_size: int
    base_text_tokens: int
    proxy_text_tokens: int
    base_text_shared: int
    proxy_text_shared: int
    unspellable: int

    @property
    def text_share(self) -> float:
        """The smaller of the two shares of the sample text's tokens, in [0, 1]."""
        return min(
            self.base_text_shared / max(self.base_text_tokens, 1),
            self.proxy_text_shared / max(self.proxy_text_tokens, 1),
        )

    def __str__(self) -> str:
        return (
            f"{self.shared} tokens are shared: {self.shared / self.base_size:.1%} of the base's {self.base_size}, "
            f"{self.shared / self.proxy_size:.1%} of the proxy's {self.proxy_size}. Of the sample text, "
            f"{self.base_text_shared} of the base's {self.base_text_tokens} tokens and {self.proxy_text_shared} of "
            f"the proxy's {self.proxy_text_tokens} are shared. The proxy can't spell {self.unspellable} of the "
            "base's tokens."
        )


class VocabularyAlignment:
    """Which token of a proxy is which token of a base with another tokenizer. Made by `align_vocabularies`.

    What the proxy says: its distribution is restricted to the shared tokens and renormalised; q is 0 elsewhere.
    What it reads: prompts are tokenized anew from their text. Of the generated text, a shared token is read as
    the proxy's own. One that the proxy does not have is spelled in several tokens, as its tokenizer spells the
    token's text alone, or failing that by the longest pieces that fit: the same text, but perhaps not the tokens
    that the proxy would have cut it into. Special tokens without a counterpart are left out of prompts; generated
    ones, and tokens that can't be spelled, are read as padding or end of sequence.

    Attributes:
        report: a `VocabularyReport`.
        base_ids: the base's ids of the shared tokens, `(n,)`, rising.
        proxy_ids: the proxy's ids of the same tokens, `(n,)`.
    """

    def __init__(
        self,
        base_tokenizer: PreTrainedTokenizerBase,
        proxy_tokenizer: PreTrainedTokenizerBase,
        sample_text: str = SAMPLE_TEXT,
        same: Mapping[str, str] | None = None,
    ) -> None:
        self._base, self._proxy = TokenBytes(base_tokenizer), TokenBytes(proxy_tokenizer)
        self._proxy_of = _match_tokens(self._base, self._proxy, same or {})
        self._base_of = {proxy_id: base_id for base_id, proxy_id in self._proxy_of.items()}
        self.base_ids = torch.tensor(list(self._proxy_of), dtype=torch.long, device="cpu")
        self.proxy_ids = torch.tensor(list(self._proxy_of.values()), dtype=torch.long, device="cpu")
        candidates = (proxy_tokenizer.pad_token_id, proxy_tokenizer.eos_token_id, 0)
        self._stand_in: int = next(i for i in candidates if i is not None)
        self._spelled: dict[int, tuple[int, ...]] = {}
        self._shared_rows: dict[tuple[torch.device, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._tables: dict[torch.device, torch.Tensor] = {}  # the proxy's ids by the base's, on each device
        self.report = self._make_report(sample_text)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.report})"

    def base_id(self, proxy_id: int) -> int | None:
        """The base's id of a proxy's token, None if it has none."""
        return self._base_of.get(proxy_id)

    def to_base(self, logits: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """The proxy's logits `(..., V_proxy)` in the base's vocabulary, `(..., vocabulary)` float32.

        Raises:
            ValueError: a model has fewer tokens than its tokenizer (added ones apart, which may be without a row).
        """
        key = (logits.device, vocabulary, logits.shape[-1])
        if key not in self._shared_rows:
            self._shared_rows[key] = self._find_shared_rows(*key)
        base_ids, proxy_ids = self._shared_rows[key]
        result = logits.new_full((*logits.shape[:-1], vocabulary), -torch.inf, dtype=torch.float32)
        result[..., base_ids] = logits[..., proxy_ids].float()
        return result

    def _find_shared_rows(
        self, device: torch.device, base_size: int, proxy_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The shared ids of base and proxy for which both models have a row, on a device."""
        base, proxy = (
            ("base", self._base, self.base_ids, base_size),
            ("proxy", self._proxy, self.proxy_ids, proxy_size),
        )
        for role, tokens, ids, size in (base, proxy):
            beyond = [index for index in ids[ids >= size].tolist() if index not in tokens.added]
            if beyond:
                raise ValueError(
                    f"The {role}'s tokenizer has the token id {beyond[-1]}, but the model's vocabulary ends at "
                    f"{size}: align the tokenizers that belong to the models."
                )
        kept = (self.base_ids < base_size) & (self.proxy_ids < proxy_size)
        return self.base_ids[kept].to(device), self.proxy_ids[kept].to(device)

    def retokenize(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts `(B, L)` of the base in the proxy's tokens, padded on the left, and their mask: `(B, L')` both."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [list(compress(*row)) for row in zip(input_ids.tolist(), mask.tolist(), strict=True)]
        ids, mask, _ = _stack([[self._retokenize(prompt)] for prompt in prompts], input_ids)
        return ids, mask

    def spell(self, generated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Generated tokens `(rows, T)` of the base as the proxy reads them.

        Returns:
            Its ids and their mask, `(rows, T')` both, and how many columns each of the T tokens takes.

        Each token becomes as many columns as the longest spelling among its rows; shorter ones have holes before
        them, zeros in the mask. So the columns of a text's beginning never change, and the last column is never a
        hole.
        """
        return _stack([[self.spell_token(token) for token in row] for row in generated.tolist()], generated)

    def of_shared(self, tokens: torch.Tensor) -> torch.Tensor:
        """The proxy's ids of shared tokens of the base, of any shape. No value is read from the device.

        What the proxy drafts are shared tokens, since q is 0 elsewhere. Other ids give ids that mean nothing.
        """
        if tokens.device not in self._tables:
            table = torch.full((max(self._proxy_of, default=0) + 1,), self._stand_in, dtype=torch.long, device="cpu")
            table[self.base_ids] = self.proxy_ids
            self._tables[tokens.device] = table.to(tokens.device)
        table = self._tables[tokens.device]
        return table[tokens.clamp(max=len(table) - 1)]

    def spell_token(self, base_id: int) -> tuple[int, ...]:
        """The proxy's tokens for one generated token of the base; never empty."""
        if base_id in self._proxy_of:
            return (self._proxy_of[base_id],)
        if base_id not in self._spelled:
            self._spelled[base_id] = self._spell_text(self._base.text.get(base_id, b"")) or (self._stand_in,)
        return self._spelled[base_id]

    def _spell_text(self, text: bytes) -> tuple[int, ...]:
        """Some bytes in the proxy's tokens; empty if they can't be spelled."""
        try:
            ids = self._proxy.tokenize(text.decode())
        except UnicodeDecodeError:
            return self._proxy.longest_pieces(text)
        spelled = self._proxy.bytes_of(ids)
        if spelled == b" " + text:  # the tokenizer's own space, which is not in the text
            return (*self._proxy.longest_pieces(self._proxy.text[ids[0]][1:]), *ids[1:])
        return tuple(ids) if spelled == text else self._proxy.longest_pieces(text)

    def _retokenize(self, ids: list[int]) -> list[int]:
        """One prompt in the proxy's tokens; never empty."""
        prefix, result = self._proxy.prefix, list[int]()
        for is_special, run in groupby(ids, self._base.special.__contains__):
            if is_special:
                result += [self._proxy_of[index] for index in run if index in self._proxy_of]
            else:
                result += self._retokenize_text(list(run), at_start=result in ([], prefix))
        if result[: len(prefix)] != prefix:
            result = prefix + result
        return result or [self._stand_in]

    def _retokenize_text(self, ids: list[int], at_start: bool) -> Sequence[int]:
        """Text between special tokens. Where a tokenizer puts a space before all text, it is not taken for text."""
        text = self._base.bytes_of(ids)
        if text.startswith(b" ") and (self._base.space_at_start if at_start else self._base.space_after_special):
            text = text[1:]
        if at_start:  # as the proxy's tokenizer begins a text
            try:
                return self._proxy.tokenize(text.decode())
            except UnicodeDecodeError:
                pass
        return self._spell_text(text) or [piece for index in ids for piece in self.spell_token(index)]

    def _make_report(self, sample_text: str) -> VocabularyReport:
        base_text, proxy_text = (
            side.tokenizer(sample_text, add_special_tokens=False)["input_ids"] for side in (self._base, self._proxy)
        )
        others = [] if self._proxy.has_every_byte else [i for i in self._base.text if i not in self._proxy_of]
        return VocabularyReport(
            shared=len(self._proxy_of),
            base_size=len(self._base.vocabulary),
            proxy_size=len(self._proxy.vocabulary),
            base_text_tokens=len(base_text),
            proxy_text_tokens=len(proxy_text),
            base_text_shared=sum(i in self._proxy_of for i in base_text),
            proxy_text_shared=sum(i in self._base_of for i in proxy_text),
            unspellable=sum(not self._spell_text(self._base.text[i]) for i in others),
        )


def _match_tokens(base: TokenBytes, proxy: TokenBytes, same: Mapping[str, str]) -> dict[int, int]:
    """The proxy's id of each shared token, by the base's id, in its order."""
    proxy_of = {index: proxy.by_text[text] for text, index in base.by_text.items() if text in proxy.by_text}
    matched, proxy_added = set(proxy_of.values()), {name: index for index, name in proxy.added.items()}
    for index, name in base.added.items():
        match = proxy_added.get(name)
        if match is not None and match not in matched:
            proxy_of[index] = match
            matched.add(match)
    # Tokens of the same role, if the proxy's has no other counterpart. The proxy must be able to end a text.
    for role in ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id"):
        base_id, proxy_id = getattr(base.tokenizer, role), getattr(proxy.tokenizer, role)
        if base_id is None or proxy_id is None or proxy_id in proxy_of.values():
            continue
        if base_id not in proxy_of or role == "eos_token_id":
            proxy_of[base_id] = proxy_id
    for names in same.items():
        for role, tokens, name in zip(("proxy", "base"), (proxy, base), names, strict=True):
            if name not in tokens.vocabulary:
                raise ValueError(f"`same` names {name!r}, which is no token of the {role}.")
        proxy_id, base_id = proxy.vocabulary[names[0]], base.vocabulary[names[1]]
        proxy_of = {other: index for other, index in proxy_of.items() if index != proxy_id} | {base_id: proxy_id}
    return dict(sorted(proxy_of.items()))


def _stack(
    rows: Sequence[Sequence[Sequence[int]]], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Rows of pieces as ids and mask, `(rows, T')` both, and how many columns each piece takes.

    Pieces stand under each other, the shorter ones filled up in front.
    """
    widths = [max(map(len, pieces)) for pieces in zip(*rows, strict=True)]
    ids, mask = [], []
    for row in rows:
        filled = [(width - len(piece), piece) for width, piece in zip(widths, row, strict=True)]
        ids.append([token for holes, piece in filled for token in [*[0] * holes, *piece]])
        mask.append([kept for holes, piece in filled for kept in [0] * holes + [1] * len(piece)])
    return like.new_tensor(ids), like.new_tensor(mask), widths


def align_vocabularies(
    base_tokenizer: PreTrainedTokenizerBase,
    proxy_tokenizer: PreTrainedTokenizerBase,
    *,
    sample_text: str = SAMPLE_TEXT,
    minimum_share: float = 0.8,
    same: Mapping[str, str] | None = None,
) -> VocabularyAlignment:
    """Find the tokens that a base and a proxy with different tokenizers share.

    For `KADLogitsProcessor(proxy, rule, vocabulary_alignment=align_vocabularies(base_tokenizer, proxy_tokenizer))`.
    Tokens are the same where they stand for the same bytes, special tokens where they have the same name or, if
    they have no other counterpart, the same role (end of sequence, beginning, padding, unknown).

    Args:
        base_tokenizer: the base's tokenizer.
        proxy_tokenizer: the proxy's.
        sample_text: text of the kind that is to be generated.
        minimum_share: refuse below this share of the sample text's tokens, in [0, 1].
        same: tokens that are to count as one, the proxy's name for it and the base's, such as
            `{"<end_of_turn>": "<|im_end|>"}`.

    Returns:
        The alignment; `alignment.report` says how much is shared.

    Raises:
        ValueError: less is shared than `minimum_share`, with the report; a `minimum_share` out of range; an empty
            `sample_text`; a tokenizer whose tokens can't be read as text (WordPiece, say).
        TypeError: what is given is no tokenizer.
    """
    for name, tokenizer in (("base_tokenizer", base_tokenizer), ("proxy_tokenizer", proxy_tokenizer)):
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"`{name}` must be a tokenizer of transformers, got {type(tokenizer).__name__}.")
    if not sample_text.strip():
        raise ValueError(f"`sample_text` must hold text, got {sample_text!r}.")
    if not 0 <= minimum_share <= 1:
        raise ValueError(f"`minimum_share` must lie in [0, 1], got {minimum_share!r}.")
    alignment = VocabularyAlignment(base_tokenizer, proxy_tokenizer, sample_text, same)
    report = alignment.report
    if report.text_share < minimum_share:
        raise ValueError(
            f"The proxy shares too little with the base: {report.text_share:.1%} of the sample text's tokens, "
            f"`minimum_share` is {minimum_share:.1%}. {report} Take a proxy with a tokenizer nearer to the base's, or "
            "lower `minimum_share` if your own `sample_text` shows that it serves."
        )
    return alignment
