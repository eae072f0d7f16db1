"""KADCandidateGenerator: drafts with the proxy, and keeps the distributions that the draft was drawn from."""

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.generation import CandidateGenerator

from ..models.cached_model import CachedModel
from ..models.text_reader import TextReader
from ..models.vocabulary import VocabularyAlignment
from ..utils.transfers import is_synchronous, send
from .draft_length import Stopwatch
from .parallel import sharing_group
from .proxy_text import TextMap
from .verification import draw


@dataclass(frozen=True)
class Draft:
    """What was drafted behind each row of a batch.

    Attributes:
        ids: `(B, n)`. What stands behind a row's length is to be ignored.
        probs: the distributions that they were drawn from, `(B, n, V)` float32.
        lengths: how many tokens each row drafted, at most n, `(B,)`.
        proxy_logits: the proxy's logits, tempered, at the drafted positions, `(B, n, V)`, or at the bonus position
            behind them as well, `(B, n + 1, V)`.
        from_proxy: whether `probs` is the softmax of `proxy_logits`, so that it need not be taken again.
        known_ids: the same as `ids`, on the CPU, where the host knows them already.
    """

    ids: torch.Tensor
    probs: torch.Tensor
    lengths: torch.Tensor
    proxy_logits: torch.Tensor
    from_proxy: bool = False
    known_ids: torch.Tensor | None = None

    def behind(self, tokens: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The draft behind `tokens` `(B, 1)` of the host, as the arguments of `TextReader.read`."""
        if self.known_ids is None:
            return tokens, self.ids
        return (self.known_ids if tokens is None else torch.cat([tokens, self.known_ids], dim=-1)), None


class KADCandidateGenerator(CandidateGenerator):
    """Drafts tokens with the proxy, one forward each, all rows of a batch at once.

    A draft ends at `num_assistant_tokens`, one token before `max_length`, at the end of the proxy's context, or with
    an end-of-sequence token.
    The logits handed out are exactly those drawn from, already divided by the component temperature, so
    `logits.softmax(-1)` is q: the caller needs no second forward to know it.

    Args:
        proxy: the proxy, with its cache if it is to be kept.
        num_assistant_tokens: γ, the draft length.
        vocabulary: the base's vocabulary size V.
        do_sample: draw from q, or take argmax q.
        component_temperature: the proxy's logits are divided by it.
        eos_token_ids: ids that end a text.
        max_length: the longest text allowed, in tokens; None for no limit.
        proxy_text: maps the base's texts to the proxy's, which differ where the proxy has a prompt of its own.
        chunk_size: forward a prompt at most so many tokens at a time.
        vocabulary_alignment: which tokens of the proxy are which of the base, where their tokenizers differ.
    """

    def __init__(
        self,
        proxy: CachedModel | PreTrainedModel,
        *,
        num_assistant_tokens: int,
        vocabulary: int,
        do_sample: bool = True,
        component_temperature: float = 1.0,
        eos_token_ids: Collection[int] = (),
        max_length: int | None = None,
        proxy_text: TextMap = lambda input_ids: (input_ids, None),
        chunk_size: int | None = None,
        vocabulary_alignment: VocabularyAlignment | None = None,
    ) -> None:
        self.num_assistant_tokens = num_assistant_tokens
        self.do_sample = do_sample
        self.max_length = max_length
        self.proxy_text = proxy_text
        self.reader = TextReader(
            proxy if isinstance(proxy, CachedModel) else CachedModel(proxy),
            vocabulary=vocabulary,
            component_temperature=component_temperature,
            vocabulary_alignment=vocabulary_alignment,
            chunk_size=chunk_size,
        )
        self._device = self.reader.model.device
        self.stopwatch: Stopwatch | None = None
        self._bonus: torch.Tensor | None = None  # what `next_logits` returns, if it is known already
        self.eos_token_ids = frozenset(eos_token_ids)
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=self._device)

    @property
    def needs_rows_in_step(self) -> bool:
        """See `CachedModel.needs_rows_in_step`."""
        return self.reader.needs_rows_in_step

    @property
    def is_synchronous(self) -> bool:
        """Whether values can be read without waiting for the device, as on the CPU."""
        return is_synchronous(self._device)

    @property
    def bonus_at_once(self) -> bool:
        """Whether every draft ends with the proxy's step for the bonus position, be it needed or not.

        Processes that share the proxy could not run the step if one of them failed while it emits what is before it.
        """
        return not self.is_synchronous or sharing_group(self.reader.model.model) is not None

    def time_steps(self) -> Stopwatch:
        """From now on, measure how long the proxy's steps take."""
        self.stopwatch = Stopwatch(self._device)
        return self.stopwatch

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft a continuation of each text.

        Args:
            input_ids: the texts so far, `(B, L)`.

        Returns:
            The texts with their drafts, `(B, L + n)` with n <= γ, and the logits of the drafted positions,
            `(B, n, V)` float32. n is 0 where the length limit leaves no room for a draft. In a batch, what stands
            behind an end of sequence is to be ignored.

        Raises:
            ValueError: the proxy is in training mode, or a text is longer than its context.
        """
        self.reader.model.refresh()
        self.begin(input_ids)
        draft = self.draft(None, [input_ids.shape[1]] * len(input_ids))
        longest = int(draft.lengths.max())
        ids = draft.ids[:, :longest].to(input_ids)
        return torch.cat([input_ids, ids], dim=-1), draft.proxy_logits[:, :longest]

    def begin(self, input_ids: torch.Tensor) -> None:
        """Start from the base's texts `(B, L)`."""
        self.reader.begin(*self.proxy_text(input_ids))

    def draft(
        self, tokens: torch.Tensor | None, lengths: list[int], base_limits: Sequence[int | None] | None = None
    ) -> Draft:
        """Draft behind the texts read so far and one more token of each, `(B, 1)`; None at first.

        Args:
            tokens: the token that each row ended its last round with, on the CPU.
            lengths: of the base's texts, in tokens, with that token.
            base_limits: the longest draft of each row that the base can read, None without a limit.

        Raises:
            ContextLengthError: a text is longer than the proxy's context.
        """
        draft_limits = self._draft_limits(tokens, lengths, base_limits)
        limits = send(draft_limits, self._device)  # now, so that nobody waits for it behind the proxy's steps
        self._next: tuple[torch.Tensor | None, torch.Tensor | None] = tokens, None
        self._bonus = None
        ids, probs, logits = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
        ended = [False] * len(lengths)
        for _ in range(max(draft_limits)):
            logits.append(self.next_logits())
            # Greedy drafts are compared with argmax r, so that q itself plays no part.
            probs.append(logits[-1].softmax(-1) if self.do_sample else logits[-1])
            ids.append(self._draw(probs[-1]))
            self._next = None, ids[-1][:, None]
            if self.is_synchronous:
                ended = [
                    before or token in self.eos_token_ids
                    for before, token in zip(ended, ids[-1].tolist(), strict=True)
                ]
                if all(ended):
                    break
        if not self.is_synchronous:
            logits.append(self.next_logits())
        elif self.bonus_at_once:
            self._bonus = self.next_logits()
        none = torch.empty(len(lengths), 0, dtype=torch.long, device=self._device)
        drafted = torch.stack(ids, dim=1) if ids else none
        nothing = none.new_empty(*none.shape, self.reader.vocabulary, dtype=torch.float32)
        return Draft(
            drafted,
            torch.stack(probs, dim=1) if ids else nothing,
            self._lengths(drafted, limits),
            torch.stack(logits, dim=1) if logits else nothing,
            from_proxy=self.do_sample,
        )

    def next_logits(self) -> torch.Tensor:
        """The proxy's logits, tempered, behind all that was read and drafted: `(B, V)` float32."""
        if self._bonus is not None:
            return self._bonus
        with nullcontext() if self.stopwatch is None else self.stopwatch.running():
            return self.reader.read(*self._next)[:, -1]

    def accept(self, accepted: list[int]) -> None:
        """Of the draft, row b keeps the first `accepted[b]` tokens; the rest is taken back."""
        self.reader.accept(accepted)

    def select_rows(self, rows: list[int]) -> None:
        """Between rounds: go on with some of the rows, in this order."""
        self.reader.select_rows(rows)

    def _draft_limits(
        self, tokens: torch.Tensor | None, lengths: list[int], base_limits: Sequence[int | None] | None
    ) -> list[int]:
        """The largest number of tokens that each row may draft."""
        draft_limits = []
        own_limits = self.reader.own_tokens_left(tokens)
        for length, *read in zip(lengths, own_limits, base_limits or own_limits, strict=True):
            limits = [self.num_assistant_tokens, *(limit for limit in read if limit is not None)]
            if self.max_length is not None:
                limits.append(self.max_length - length - 1)
            draft_limits.append(max(min(limits), 0))
        return draft_limits

    def _lengths(self, ids: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        """How many of the tokens `(B, n)` count: up to the `limits` `(B,)`, and to a row's first end of sequence."""
        ends = torch.isin(ids, self._eos).long()
        within = torch.arange(ids.shape[1], device=ids.device) < limits[:, None]
        return (within & (ends.cumsum(-1) == ends)).sum(-1)

    def _draw(self, probs: torch.Tensor) -> torch.Tensor:
        """One token from each row of `(B, V)`, `(B,)`."""
        return draw(probs) if self.do_sample else probs.argmax(-1)
