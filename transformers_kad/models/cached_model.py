"""A model that follows texts, with a cache of its own.

`CachedModel` answers one question, "what are your logits at the last positions of these texts?", and forwards
only what its cache does not hold yet. It follows texts that grow token by token, drafts that are partly
refused, beams that are reordered, and chats that continue in a later call.
"""

import torch

from ..utils.transfers import send
from .activated_lora import first_difference, tokens_before_activation
from .cache_rollback import FROM_COPIES, Rollback, gather_columns, has_columns, join_rows
from .cached_forwards import CachedForwards, in_mode_of_cache
from .fingerprint import fingerprint
from .model_errors import describe
from .padding import PaddedTexts, match_rows
from .reading_round import Round
from .recurrent_states import StateCopy

# A cache of rows that took back different numbers of tokens is rebuilt without the holes when it could be shorter by
# more than this share.
LARGEST_SHARE_OF_HOLES = 0.05
# A model that reads one token in each forward reads at most so many new tokens behind its cache; for more, the whole
# text in one forward is faster.
MOST_ONE_BY_ONE = 16


class CachedModel(CachedForwards):
    """A causal LM that follows texts, whose cache is rolled back or filled anew as the texts demand.

    Args and attributes: see `CachedForwards`.
    """

    def reset(self) -> None:
        """See `CachedForwards.reset`."""
        super().reset()
        self._begin_round()

    def _begin_round(self) -> None:
        self._round = Round()
        self._waiting: torch.Tensor | None = None  # (B, w): tokens that were accepted, and must be read again

    @in_mode_of_cache
    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        logits_to_keep: int = 1,
        continues: bool = False,
        chunk_size: int | None = None,
        prompt_length: int | None = None,
        ended: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The model's logits at the last n = `logits_to_keep` positions of each text, `(B, n, V)`, on its device.

        Args:
            input_ids: texts, `(B, L)`, padded on the left.
            attention_mask: `(B, L)`, zeros at padding; no padding by default.
            logits_to_keep: how many positions.
            continues: promise that the texts continue those of the last call, row by row, apart from tokens
                at their end that were taken back. Then nothing is compared.
            chunk_size: forward at most so many tokens at a time.
            prompt_length: of the L columns, how many are the prompt, in which an activated LoRA (aLoRA) looks for its
                invocation tokens; all by default.
            ended: which rows may be longer than the context, `(B,)` boolean, since nobody reads their logits.

        Raises:
            ValueError: the text is longer than the model's context.
        """
        length = input_ids.shape[1]
        self.check_prompt(length)
        if self.context_length is not None and length > self.context_length:
            tokens = torch.ones_like(input_ids) if attention_mask is None else attention_mask != 0
            lengths = tokens.sum(dim=-1)
            if ended is not None:
                lengths = lengths.masked_fill(ended.to(lengths.device), 0)
            self.check_length(int(lengths.max()))
        # Copies: the tensors may be the caller's own, to be written to later.
        ids = self._readable(input_ids.to(self.device).clone())
        texts = PaddedTexts(ids, None if attention_mask is None else (attention_mask != 0).to(ids))
        self._begin_round()
        behind_prompt = 0 if prompt_length is None else length - prompt_length
        try:
            if self._needs_closed_gaps:
                with_gaps, texts = texts, self._without_gaps(texts)
                ids, length = texts.ids, texts.columns
                continues = continues and texts is with_gaps  # what was closed may have moved since the last call
            self._align(texts, prompt_length, upto=length - logits_to_keep, continues=continues)
            if self._texts is not None and self._texts.mask is not None:
                texts = PaddedTexts(ids, texts.full_mask)
            elif texts.mask is not None and bool(texts.mask.all()):
                texts = PaddedTexts(ids)
            gaps_were_open = not self._needs_closed_gaps
            logits = self._forward(texts, logits_to_keep, chunk_size)
            if gaps_were_open and self._needs_closed_gaps and texts.has_gaps:  # which the first forward has shown
                self.reset()
                logits = self._forward(self._without_gaps(texts), logits_to_keep, chunk_size)
            if behind_prompt > 0:
                # What continues a text has grown by tokens alone. Otherwise the mask tells, for which the host waits.
                ids, mask = (ids[:, -behind_prompt:], None) if continues else texts.last(behind_prompt)
                self._round.add(ids, mask, None)
            return logits
        except BaseException:
            self.reset()  # some layers of the cache may be ahead of others
            raise

    @property
    def _needs_closed_gaps(self) -> bool:
        """Whether zeros in a mask between tokens would push tokens out of a window, or change states."""
        return not self.has_cache or self._rollback not in (None, Rollback.BEHIND_MASK)

    def _without_gaps(self, texts: PaddedTexts) -> PaddedTexts:
        if texts.has_gaps and self._inputs.has_prompt_inputs:
            raise ValueError(
                f"The {self.role} {describe(self.model)} has layers that count the columns of a text, and the "
                "`attention_mask` has zeros between tokens, for which `position_ids` or `token_type_ids` were passed. "
                "Leave out the columns without tokens."
            )
        return texts.without_gaps()

    def _align(self, texts: PaddedTexts, prompt_length: int | None, *, upto: int, continues: bool) -> None:
        """Make the cache hold the longest prefix of every text that it can, at most `upto` columns long."""
        activation = None
        if self._switch is None:
            prompt_mask = texts.full_mask[:, :prompt_length]
            activation = tokens_before_activation(self.model, texts.ids[:, :prompt_length], prompt_mask)
        common = 0
        if self._cache is not None and upto > 0:
            common = min(self.cached_length if continues else self._match_rows(texts), upto)
        if common > 0 and activation is not None and self._tokens_before_activation is not None:
            # What was read with the adapter active must not be continued where it is not, and vice versa.
            common = min(common, first_difference(activation, self._tokens_before_activation, texts.full_mask))
        self._tokens_before_activation = activation
        if self._rollback is not None and self._must_read_anew(texts.columns - common, texts.columns - upto):
            common = 0
        if common < self.cached_length:
            self.crop(common)
        if common <= 0 or self._cache is None:
            self.reset()
            self._filled_by = fingerprint(self.model) if self.state is None else self.state

    def _must_read_anew(self, new: int, logits_to_keep: int) -> bool:
        """Whether a text is read as a whole, because the model can't read so many new tokens behind its cache."""
        return self._reads_one_by_one and (new > MOST_ONE_BY_ONE or logits_to_keep > 1)

    def _match_rows(self, texts: PaddedTexts) -> int:
        """Give every text the cached row that shares its longest prefix; return the shortest of these."""
        assert self._cache is not None and self._texts is not None
        common, rows = match_rows(self._texts, texts)
        if common > 0 and rows != list(range(len(self._texts.ids))):
            self._select_cached_rows(rows)
        return common

    @property
    def needs_rows_in_step(self) -> bool:
        """Whether all rows of a batch have to take back the same number of the tokens of this round.

        It is so where a forward of several tokens changed recurrent states, of which there is a copy only from before
        it, and where a layer or the model itself tells tokens apart by their columns.
        """
        if self._texts is None or len(self._texts.ids) == 1:
            return False
        if self._cache is None:
            return self._inputs.has_prompt_inputs
        if self._rollback is Rollback.BY_STATE and self._round.has_longer_steps:
            return True
        return self._rollback in (Rollback.IN_STEP, Rollback.BY_COPY) or self.longrope_switch is not None

    @in_mode_of_cache
    def take_back(self, tokens: list[int]) -> None:
        """The end of a round: of row b, take back the last `tokens[b]` tokens that were read since the last round.

        Where `needs_rows_in_step`, all rows have to keep the same number, unless the call ends with this round: then
        the cache is cut to what all rows can keep, and a later call of `generate` reads the rest again.
        """
        assert self._texts is not None
        ended, self._round = self._round, Round()
        if self._cache is not None and self._rollback is Rollback.BEHIND_MASK:
            self._hide(ended.kept_columns(tokens))
        elif self._cache is not None and self._rollback in FROM_COPIES:
            if max(tokens) == 0:
                self.crop(self._texts.columns)
            else:
                self._restore(ended, tokens)
        elif self._cache is not None and self._rollback is Rollback.IN_STEP:
            self.crop(self._texts.columns - max(tokens))
        elif max(tokens) == min(tokens):
            self.crop(self._texts.columns - tokens[0])
        else:
            if self._cache is not None and not has_columns(self._cache, max(tokens)):
                self._cache = None
            self._take_back_columns(tokens)

    def _take_back_columns(self, counts: list[int]) -> None:
        """Take back so many columns of each row, of its text and in the cache; see `PaddedTexts.take_back`."""
        assert self._texts is not None
        if max(counts) > min(counts):
            self._inputs.forget_prompt_columns()
        self._keep_texts(self._texts.take_back(counts), counts)

    def _restore(self, ended: Round, tokens: list[int]) -> None:
        """Restore the last states from before the tokens that are taken back; what was kept behind them waits."""
        assert self._texts is not None and self._cache is not None and self._rollback is not None
        restored_whole = self._rollback is Rollback.BY_COPY
        places = ended.copies_before(tokens)
        ends = [place for place in places if place is not None]
        if restored_whole and ends:
            ends = [min(ends)] * len(ends)
        dropped = [ended.tokens_behind(row, end) for row, end in enumerate(ends)]
        if None in places or not (restored_whole or has_columns(self._cache, max(dropped))):
            self._cache = None  # the text is read again
            self._take_back_columns(tokens)
            return
        waiting = [count - back for count, back in zip(dropped, tokens, strict=True)]
        if max(waiting) == min(waiting) > 0:
            end = self._texts.columns
            rows = [
                ids[end - count : end - back]
                for ids, count, back in zip(self._texts.ids, dropped, tokens, strict=True)
            ]
            self._waiting = torch.stack(rows)
        if restored_whole:
            self._cache = ended.copies[ends[0]].cache if ends[0] < len(ended.copies) else self._cache
            self._texts = self._texts.take_back(dropped)
        else:
            copies = [*ended.copies, StateCopy(self._cache, self._rollback)]
            self._take_back_columns(dropped)
            StateCopy.restore_rows(self._cache, [copies[end] for end in ends])

    def _hide(self, kept: torch.Tensor) -> None:
        """Of the last k columns keep those that are marked, `(B, k)` boolean, on the CPU; each row its own.

        The columns at the end that no row keeps are cropped. Other holes stay behind the attention mask, until they
        are so many that the cache is rebuilt without them.
        """
        assert self._texts is not None
        texts, begin = self._texts, self._texts.columns - kept.shape[1]
        kept = kept[:, : int(kept.any(dim=0).nonzero().max()) + 1] if bool(kept.any()) else kept[:, :0]
        self.crop(begin + kept.shape[1])
        if len(kept) == 1 and texts.mask is None:
            return
        self._texts = texts.keep(begin, kept)
        assert self._texts.lengths is not None
        longest, columns = int(self._texts.lengths.max()), self._texts.columns
        if self._cache is None or columns - longest > LARGEST_SHARE_OF_HOLES * columns:
            self._close_holes(longest)

    @in_mode_of_cache
    def extend(self, ids: torch.Tensor, mask: torch.Tensor | None = None, *, logits_to_keep: int = 1) -> torch.Tensor:
        """`logits` of the texts held, continued by `ids` `(B, n)`.

        `mask` `(B, n)`, on the CPU, has zeros at what is no token, but none in the last column.
        """
        assert self._texts is not None
        ids = self._readable(send(ids, self._texts.ids.device))
        try:
            if self._cache is None and self.has_cache and self._rollback is not Rollback.BEHIND_MASK:
                self._forward(self._texts, 1)  # by itself, so that its states can be copied
            if self._waiting is not None:
                ids, mask = self._behind_waiting(ids, mask)
            by_column = mask is not None and self._rollback is not Rollback.BEHIND_MASK and not bool(mask.all())
            if not by_column and not self._reads_one_by_one:
                return self._read(ids, mask, logits_to_keep)
            columns = [self._read_column(ids, mask, at) for at in range(ids.shape[1])]
            return torch.cat(columns[-logits_to_keep:], dim=1)
        except BaseException:
            self.reset()
            raise

    def _behind_waiting(
        self, ids: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens that wait to be read again, with `ids` and their `mask` behind them."""
        assert self._waiting is not None
        waiting, self._waiting = self._waiting, None
        if waiting.shape[1] > ids.shape[1]:  # a forward of their own keeps them from piling up
            self._read(waiting, None, 1)
            return ids, mask
        if mask is not None:
            mask = torch.cat([torch.ones(waiting.shape, dtype=mask.dtype, device="cpu"), mask], dim=-1)
        return torch.cat([waiting, ids], dim=-1), mask

    def _read(self, ids: torch.Tensor, mask: torch.Tensor | None, logits_to_keep: int) -> torch.Tensor:
        """One forward over more columns, of which the round is told."""
        assert self._texts is not None
        copied = None
        if self._cache is not None and self._rollback in FROM_COPIES:
            copied = StateCopy(self._cache, self._rollback)
        logits = self._forward(self._texts.extend(ids, mask), logits_to_keep)
        self._round.add(ids, mask, copied)
        return logits

    def _read_column(self, ids: torch.Tensor, mask: torch.Tensor | None, at: int) -> torch.Tensor:
        """Read one column of the next, which the rows that have no token there take back at once."""
        logits = self._read(ids[:, at : at + 1], None, 1)
        missing = [0] * len(ids) if mask is None else (mask[:, at] == 0).long().tolist()
        if any(missing):
            if self._rollback in (Rollback.IN_STEP, Rollback.BY_COPY):
                raise ValueError(
                    f"The {self.role} {describe(self.model)} spells the base's tokens in different numbers of its own "
                    "in the rows of a batch, and its cache can't take back tokens of some rows only. Generate one "
                    "sequence at a time."
                )
            so_far = self._round
            self.take_back(missing)
            self._round = so_far
            so_far.without_last_column(missing)
        return logits

    @in_mode_of_cache
    def join(self, other: "CachedModel") -> bool:
        """Continue with the rows of another reader of the same model as well, behind the own rows.

        Afterwards each row can still take back its last token, and what it has read in this round.

        Returns:
            Whether the rows were joined, which takes caches of full attention. Otherwise nothing has changed.
        """
        if self._cache is None or other._cache is None or self._rollback is not Rollback.BEHIND_MASK:
            return False
        if self._tokens_before_activation is not None:
            return False
        assert self._texts is not None and other._texts is not None
        columns = max(self._texts.columns, other._texts.columns)
        width = max(self._round.width, other._round.width, 1)
        join_rows(self._cache, other._cache, columns)
        self._texts = self._texts.padded_to(columns).join(other._texts.padded_to(columns))
        self._begin_round()
        self._round.add(*self._texts.last(width), None)
        return True

    def _close_holes(self, length: int) -> None:
        """Rebuild the cache with so many columns, as many as its longest text has tokens."""
        assert self._texts is not None
        self._texts, columns = self._texts.close_holes(length)
        if self._cache is not None:
            gather_columns(self._cache, columns)
        self._inputs.forget_prompt_columns()

    def _select_cached_rows(self, rows: list[int]) -> None:
        super()._select_cached_rows(rows)
        if self._waiting is not None:
            self._waiting = self._waiting[send(rows, self._waiting.device)]
