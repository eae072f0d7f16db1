"""A model, the base included, that reads what the base emits: in its own tokens, after its own prompt."""

from itertools import accumulate

import torch

from ..utils.transfers import send
from .cached_model import CachedModel
from .padding import PaddedTexts
from .vocabulary import VocabularyAlignment, align_vocabulary

_FAR = 100.0  # from 0: few models have logits beyond it, where float32 rounds by 4e-6 and more


class TextReader:
    """Follows texts that grow by different numbers of tokens, and answers in the base's vocabulary.

    Args:
        model: the base, the proxy or the reference, with its cache.
        vocabulary: the base's vocabulary size V.
        component_temperature: the model's logits are divided by it.
        vocabulary_alignment: which of its tokens are which of the base, where their tokenizers differ.
        chunk_size: forward a prompt at most so many tokens at a time.
    """

    def __init__(
        self,
        model: CachedModel,
        *,
        vocabulary: int,
        component_temperature: float = 1.0,
        vocabulary_alignment: VocabularyAlignment | None = None,
        chunk_size: int | None = None,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.component_temperature = component_temperature
        self.vocabulary_alignment = vocabulary_alignment
        self.chunk_size = chunk_size
        self.begin(torch.empty(1, 0, dtype=torch.long, device="cpu"))

    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        """Start from prompts `(B, L)` in the model's own tokens, padded on the left. They are forwarded by `read`."""
        self._prompt: PaddedTexts | None = PaddedTexts(input_ids, attention_mask)
        whole = [input_ids.shape[1]] * len(input_ids)
        self._lengths: list[int] = whole if attention_mask is None else attention_mask.sum(dim=-1).tolist()
        # Of every token of the base that was read since the last `accept`: in how many tokens of its own, in each row.
        self._own_counts: list[list[int]] = []
        self._lead = 0  # tokens of a round before its draft

    def read(
        self, tokens: torch.Tensor | None = None, drafted: torch.Tensor | None = None, *, logits_to_keep: int = 1
    ) -> torch.Tensor:
        """Read more of the base's tokens: the tempered logits behind the last of them.

        Args:
            tokens: `(B, n)`. A model with a tokenizer of its own reads their values, so that they should be on the
                CPU, where nobody waits for them.
            drafted: tokens that the proxy drafted behind these, `(B, m)`. With a tokenizer of its own, it has each of
                them as one token too, so that their values are not read.
            logits_to_keep: of how many tokens the logits are wanted. Behind a prompt that was not read yet, there may
                be no tokens.

        Returns:
            `(B, logits_to_keep, V)` float32. The last entry is behind all that is read, the one before it behind all
            but the last of the base's tokens, and so on, however many tokens of its own the model reads each of them
            in.
        """
        ids, mask, widths = self._spell(tokens, drafted)
        # Where, in columns, the base's tokens end: first what was read before, then each of the new ones.
        ends = [0, *accumulate(widths)][-logits_to_keep:]
        columns = ends[-1] - ends[0] + 1
        logits = self._read(ids, mask, columns)
        if columns > len(ends):
            logits = logits[:, send([end - ends[0] for end in ends], logits.device)]
        logits = align_vocabulary(logits, self.vocabulary, self.vocabulary_alignment)
        return tempered(logits, self.component_temperature)

    def _spell(
        self, tokens: torch.Tensor | None, drafted: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, list[int]]:
        """Ids and mask of the next columns, `(B, n')` both, and how many of them each of the base's tokens takes."""
        alignment, mask, device = self.vocabulary_alignment, None, self.model.device
        widths = [1] * (0 if tokens is None else tokens.shape[1])
        own_counts = [[1] * len(self._lengths) for _ in widths]
        if alignment is not None and tokens is not None and widths:
            tokens, mask, widths = alignment.spell(tokens)
            mask = mask.cpu()
            own_counts = [part.sum(-1).tolist() for part in mask.split(widths, dim=1)]
        if drafted is not None:
            drafted = drafted if alignment is None else alignment.of_shared(drafted)
            own_counts += [[1] * len(self._lengths) for _ in range(drafted.shape[1])]
            widths = widths + [1] * drafted.shape[1]
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, drafted.shape[1]), value=1)
        self._own_counts += own_counts
        parts = [send(part, device) for part in (tokens, drafted) if part is not None]
        return torch.cat(parts, dim=-1) if parts else None, mask, widths

    def _read(self, ids: torch.Tensor | None, mask: torch.Tensor | None, columns: int) -> torch.Tensor:
        """The logits at the last `columns` columns, behind the model's own tokens `ids` `(B, n)`."""
        if self._prompt is None:
            assert ids is not None
            return self.model.extend(ids, mask, logits_to_keep=columns)
        prompt, self._prompt = self._prompt, None
        alone = ids is None or ids.shape[1] == 0 or self.model.reads_prompt_alone or mask is not None
        text = prompt if alone or ids is None else prompt.extend(ids.to(prompt.ids), None)
        logits = self.model.logits(
            text.ids,
            text.mask,
            logits_to_keep=1 if alone else columns,
            chunk_size=self.chunk_size,
            prompt_length=prompt.columns,
        )
        if ids is None or text is not prompt or ids.shape[1] == 0:
            return logits
        behind = self.model.extend(ids, mask, logits_to_keep=min(columns, ids.shape[1]))
        return torch.cat([logits, behind], dim=1)[:, -columns:]

    def accept(self, accepted: list[int]) -> None:
        """The end of a round: of the draft, row b keeps `accepted[b]` tokens, the rest is taken back.

        What was read before the draft, the token that ended the round before, stays.
        """
        kept = [count + self._lead for count in accepted]
        read = [sum(counts) for counts in zip(*self._own_counts, strict=True)] or [0] * len(kept)
        own = [sum(counts[row] for counts in self._own_counts[:count]) for row, count in enumerate(kept)]
        self.model.take_back([before - after for before, after in zip(read, own, strict=True)])
        self._lengths = [before + more for before, more in zip(self._lengths, own, strict=True)]
        self._own_counts, self._lead = [], 1

    @property
    def needs_rows_in_step(self) -> bool:
        """See `CachedModel.needs_rows_in_step`."""
        return self.model.needs_rows_in_step

    def select_rows(self, rows: list[int]) -> None:
        """Between rounds: continue with some of the rows, in this order."""
        self.model.select_rows(rows)
        self._lengths = [self._lengths[row] for row in rows]

    def own_tokens_left(self, tokens: torch.Tensor | None) -> list[int | None]:
        """How many of its own tokens the model could read in each row behind the next `tokens` `(B, 1)` of the base.

        `tokens` are on the CPU.
        None without a limit. What is read at once must not go from one side of `CachedModel.longrope_switch` to
        the other.

        Raises:
            ContextLengthError: a row is longer than the model's context already.
        """
        limit, switch, lengths = self.model.context_length, self.model.longrope_switch, self._lengths
        if limit is None and switch is None:
            return [None] * len(lengths)
        if tokens is not None:
            widths = map(self._width, tokens[:, 0].tolist())
            lengths = [length + width for length, width in zip(lengths, widths, strict=True)]
        self.model.check_length(max(lengths))
        if switch is not None and max(lengths) <= switch:  # the longest row decides how all of them are read
            return [min(switch, switch if limit is None else limit) - max(lengths)] * len(lengths)
        return [None if limit is None else limit - length for length in lengths]

    def cut_to_context(self, tokens: torch.Tensor | None, drafts: list[list[int]]) -> list[list[int]]:
        """Of drafts in the base's tokens, behind the next `tokens` `(B, 1)`, what fits into the model's context."""
        cut = []
        for draft, left in zip(drafts, self.own_tokens_left(tokens), strict=True):
            ends = accumulate(map(self._width, draft))
            cut.append(draft if left is None else draft[: sum(end <= left for end in ends)])
        return cut

    def _width(self, token: int) -> int:
        """How many of its own tokens the model reads a token of the base in."""
        return 1 if self.vocabulary_alignment is None else len(self.vocabulary_alignment.spell_token(token))


def tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits `(..., V)` divided by a temperature; themselves at 1.

    The likeliest tokens of a row may lie far from 0, where other processors have banned some tokens with -inf and all
    others with -1e4 or the smallest number of the dtype. A division would lose the differences between them to
    rounding, or overflow, so such rows are shifted to 0 before, which does not change their softmax.
    """
    if temperature == 1:
        return logits
    best = logits.amax(-1, keepdim=True)
    farthest = min(_FAR, torch.finfo(logits.dtype).max * min(temperature, 1) / 2)
    is_far = best.isfinite() & (best.abs() > farthest)
    return (logits - best.where(is_far, 0)) / temperature
