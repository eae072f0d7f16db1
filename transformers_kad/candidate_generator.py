"""KADCandidateGenerator: drafts with the proxy, and keeps the distributions that the draft was drawn from."""

from collections.abc import Callable, Collection

import torch
from transformers import PreTrainedModel
from transformers.generation import CandidateGenerator

from .proxy import CachedModel, is_unusable, unusable_logits_error
from .vocabulary import VocabularyAlignment, align_vocabulary

# Maps the base's text (1, L) to the proxy's text and its attention mask (None: no padding).
ProxyText = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


class KADCandidateGenerator(CandidateGenerator):
    """Drafts tokens with the proxy, one forward each, for one sequence.

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
        proxy_text: maps the base's text to the proxy's, which differ where the proxy has a prompt of its own.
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
        proxy_text: ProxyText = lambda input_ids: (input_ids, None),
        chunk_size: int | None = None,
        vocabulary_alignment: VocabularyAlignment | None = None,
    ) -> None:
        self.proxy = proxy if isinstance(proxy, CachedModel) else CachedModel(proxy)
        self.num_assistant_tokens = num_assistant_tokens
        self.vocabulary = vocabulary
        self.do_sample = do_sample
        self.component_temperature = component_temperature
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_length = max_length
        self.proxy_text = proxy_text
        self.chunk_size = chunk_size
        self.vocabulary_alignment = vocabulary_alignment
        self._settled_length: int | None = None  # of the text that the last round ended with
        self._in_step = False  # whether the proxy's cache is known to follow the text

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft a continuation of a text.

        Args:
            input_ids: the text so far, `(1, L)`.

        Returns:
            The text with the draft, `(1, L + n)` with n <= γ, and the logits of the drafted positions,
            `(1, n, V)` float32. n is 0 where the length limit leaves no room for a draft.

        Raises:
            ValueError: more than one sequence, or logits that are NaN, +inf or all -inf.
        """
        if input_ids.shape[0] != 1:
            raise ValueError(
                f"Speculative decoding with KAD takes one sequence at a time, got {input_ids.shape[0]}. "
                "Loop over the prompts, or leave out `assistant_model` to decode a batch token by token."
            )
        self._in_step = self._settled_length == input_ids.shape[1]
        room = self.num_assistant_tokens
        if self.max_length is not None:
            room = min(room, self.max_length - input_ids.shape[1] - 1)
        if self.proxy.context_length is not None:
            room = min(room, self.proxy.context_length - self.proxy_text(input_ids)[0].shape[1])
        text, drafted = input_ids, list[torch.Tensor]()
        for _ in range(max(room, 0)):
            logits = self.next_logits(text)
            drafted.append(logits)
            token, unusable = self._draw(logits)
            if unusable:
                raise unusable_logits_error("proxy", self.proxy.model, text.shape[1])
            text = torch.cat([text, text.new_tensor([[token]])], dim=-1)
            if token in self.eos_token_ids:
                break
        empty = torch.empty(1, 0, self.vocabulary, device=self.proxy.model.device)
        return text, torch.stack(drafted, dim=1) if drafted else empty

    def next_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The proxy's logits, tempered, for the token after a text `(1, L)`: `(1, V)` float32."""
        ids, mask = self.proxy_text(input_ids)
        logits = self.proxy.logits(ids, mask, continues=self._in_step, chunk_size=self.chunk_size)[:, -1]
        self._in_step = True
        return align_vocabulary(logits, self.vocabulary, self.vocabulary_alignment) / self.component_temperature

    def settle(self, input_ids: torch.Tensor) -> None:
        """Take back what was drafted beyond a text `(1, L)`, with which the next round will begin."""
        self._settled_length = input_ids.shape[1]
        # The last token is not yet forwarded, and the proxy may spell it in several of its own.
        self.proxy.settle(self.proxy_text(input_ids[:, :-1])[0].shape[1])

    def _draw(self, logits: torch.Tensor) -> tuple[int, bool]:
        """One token from logits `(1, V)`, and whether they were unusable, with one synchronisation."""
        unusable = is_unusable(logits)
        if self.do_sample:
            probs = logits.softmax(-1).masked_fill(unusable[:, None], 1.0)
            token = torch.multinomial(probs, num_samples=1).squeeze(-1)
        else:
            token = logits.argmax(-1)
        drawn, flag = torch.cat([token, unusable.long()]).tolist()
        return drawn, bool(flag)
