"""Padding before the texts of a batch, and holes in them where rows took back different numbers of tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..utils.transfers import send


class PaddedTexts(NamedTuple):
    """Texts of a batch in columns.

    Attributes:
        ids: the tokens, `(B, n)`.
        mask: zeros at padding and holes, `(B, n)`; None while there have been none. A mask is kept when its zeros are
            gone, since attention with a mask and without one differs by rounding.
        lengths: how many tokens each row had after the last `keep`, `(B,)` on the CPU; None if nobody counted them.
        moved: how many columns each row has been moved to the right in `take_back`, so that as many columns of padding
            came before it; None while none has been.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    moved: tuple[int, ...] | None = None

    @property
    def columns(self) -> int:
        """The number of columns n."""
        return self.ids.shape[1]

    @property
    def full_mask(self) -> torch.Tensor:
        """The mask `(B, n)`; ones if there is none."""
        return torch.ones_like(self.ids) if self.mask is None else self.mask

    def crop(self, columns: int) -> "PaddedTexts":
        """The first columns of the texts."""
        mask = None if self.mask is None else self.mask[:, :columns]
        return PaddedTexts(self.ids[:, :columns], mask, moved=self.moved)

    def last(self, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The ids of the last columns, and their mask on the CPU; None for one column, which holds tokens alone."""
        mask = None if self.mask is None or columns == 1 else self.mask[:, -columns:].cpu()
        return self.ids[:, -columns:], mask

    def without_first(self, columns: int) -> "PaddedTexts":
        """The texts without their first columns, in which there are no tokens."""
        return PaddedTexts(self.ids[:, columns:], None if self.mask is None else self.mask[:, columns:], self.lengths)

    def padded_to(self, columns: int) -> "PaddedTexts":
        """The texts in so many columns, of which the new ones are padding on the left."""
        new = columns - self.columns
        if new == 0:
            return self
        ids, mask = (torch.nn.functional.pad(values, (new, 0)) for values in (self.ids, self.full_mask))
        return PaddedTexts(ids, mask, self.lengths)

    def join(self, other: "PaddedTexts") -> "PaddedTexts":
        """The texts with the rows of others, which have as many columns, behind their own."""
        mask = None
        if self.mask is not None or other.mask is not None:
            mask = torch.cat([self.full_mask, other.full_mask])
        return PaddedTexts(torch.cat([self.ids, other.ids]), mask)

    def select_rows(self, rows: Sequence[int]) -> "PaddedTexts":
        """Some of the rows, in this order."""
        index = send(rows, self.ids.device)
        lengths = None if self.lengths is None else self.lengths[list(rows)]
        moved = None if self.moved is None else tuple(self.moved[row] for row in rows)
        return PaddedTexts(self.ids[index], None if self.mask is None else self.mask[index], lengths, moved)

    def extend(self, ids: torch.Tensor, mask: torch.Tensor | None) -> "PaddedTexts":
        """The texts continued by `ids` `(B, k)`, whose `mask` `(B, k)`, on the CPU, has zeros at what is no token."""
        longer = torch.cat([self.ids, ids], dim=-1)
        if self.mask is None and (mask is None or bool(mask.all())):
            return PaddedTexts(longer, None, self.lengths, self.moved)
        added = torch.ones_like(ids) if mask is None else send(mask, ids.device).to(ids)
        return PaddedTexts(longer, torch.cat([self.full_mask, added], dim=-1), self.lengths, self.moved)

    def keep(self, begin: int, kept: torch.Tensor) -> "PaddedTexts":
        """The first `begin` columns and the k behind them, with holes where `kept` `(B, k)`, on the CPU, is False."""
        lengths = self.full_mask[:, :begin].sum(dim=-1).cpu() if self.lengths is None else self.lengths
        columns = begin + kept.shape[1]
        mask = None if self.mask is None else self.mask[:, :columns]
        if not kept.all():
            mask = torch.cat([self.full_mask[:, :begin], send(kept, self.ids.device).to(self.ids)], dim=-1)
        return PaddedTexts(self.ids[:, :columns], mask, lengths + kept.sum(dim=-1))

    def take_back(self, counts: Sequence[int]) -> "PaddedTexts":
        """The texts without the last `counts[b]` columns of each row b, all ending in the same column.

        Rows that take back more than others move to the right. The columns that all rows have been moved by are left
        out, so that the texts grow by no more columns than the row with the most new tokens.
        """
        columns = self.columns - min(counts)
        if max(counts) == min(counts):
            return self.crop(columns)
        before = self.moved or (0,) * len(counts)
        moved = tuple(shift + count - min(counts) for shift, count in zip(before, counts, strict=True))
        ends = [self.columns - count for count in counts]
        ids, mask = (keep_ends(values, ends, columns, dim=-1) for values in (self.ids, self.full_mask))
        return PaddedTexts(ids, mask, moved=moved).without_moved()

    def without_moved(self) -> "PaddedTexts":
        """The texts without the first columns, as many as all rows have been moved by."""
        least = min(self.moved or (0,))
        if not least:
            return self
        texts = self.without_first(least)
        return texts._replace(moved=tuple(shift - least for shift in self.moved or ()))

    @property
    def has_gaps(self) -> bool:
        """Whether there are zeros in the mask between tokens; the device is waited for."""
        return self.mask is not None and bool((self.mask[:, 1:] < self.mask[:, :-1]).any())

    def without_gaps(self) -> "PaddedTexts":
        """The texts without the zeros between their tokens, padded on the left only."""
        return self.close_holes(int(self.full_mask.sum(-1).max()))[0] if self.has_gaps else self

    def close_holes(self, columns: int) -> tuple["PaddedTexts", torch.Tensor]:
        """Move every row's tokens to the end of so many columns, and the padding that fits there before them.

        Returns:
            The texts, and where their columns were before: indices `(B, columns)`.
        """
        index = self.full_mask.argsort(dim=-1, stable=True)[:, self.columns - columns :]
        mask = None if self.mask is None else self.mask.gather(1, index)
        return PaddedTexts(self.ids.gather(1, index), mask, self.lengths), index


def keep_ends(values: torch.Tensor, ends: Sequence[int], columns: int, dim: int) -> torch.Tensor:
    """Of values `(B, ...)` keep in each row b the last `columns` before `ends[b]` along a dimension, counted from -1.

    Where a row has fewer, zeros stand before them.
    """
    if min(ends) == max(ends) and ends[0] >= columns:
        return values.narrow(dim, ends[0] - columns, columns)
    shape = list(values.shape)
    shape[dim] = columns
    kept = values.new_zeros(shape)
    for row, end in enumerate(ends):
        own = min(columns, end)
        kept[row].narrow(dim, columns - own, own).copy_(values[row].narrow(dim, end - own, own))
    return kept


def match_rows(held: PaddedTexts, texts: PaddedTexts) -> tuple[int, list[int]]:
    """Find for every text the held row that shares its longest prefix.

    Returns:
        The length of the shortest of these prefixes, in columns, and the row of each text.
    """
    width, rows = min(held.columns, texts.columns), len(held.ids)
    # A token and its mask in one number, since the same ids under another mask are another text.
    known, wanted = (2 * part.ids[:, :width] + part.full_mask[:, :width] for part in (held, texts))
    distinct, row_of = wanted.unique(dim=0, return_inverse=True)
    order = torch.arange(rows, device=distinct.device)
    lengths, first_best = [], []
    for text in distinct:  # one by one, since all pairs at once would take memory quadratic in the rows
        shared = (known == text).long().cumprod(-1).sum(-1)
        # The first of equally good rows, since argmax leaves open which one it returns.
        first_best.append((shared * rows - order).argmax())
        lengths.append(shared[first_best[-1]])
    return int(torch.stack(lengths).min()), torch.stack(first_best)[row_of].tolist()
