"""What a model has read in one round of speculative decoding, so that each row can take back its own part of it."""

from collections.abc import Sequence

import torch

from .recurrent_states import StateCopy


class Round:
    """The columns that were read since the last round ended, and copies of states from before some of the forwards.

    A place is the number of a copy, in the order of the forwards. The number behind the last one stands for the states
    as they are now.

    Attributes:
        copies: one from before each forward; empty for a cache that needs none.
        has_longer_steps: whether a forward read several columns.
    """

    def __init__(self) -> None:
        self.copies: list[StateCopy] = []
        self.has_longer_steps = False
        self._columns: list[torch.Tensor] = []  # of each forward which columns are tokens, (B, w) boolean, on the CPU
        self._copied_at: list[int] = []  # the number of forwards before each copy

    def add(self, ids: torch.Tensor, mask: torch.Tensor | None, copied: StateCopy | None) -> None:
        """Note a forward over `ids` `(B, w)`, of which `mask` `(B, w)`, on the CPU, has zeros at what is no token."""
        if copied is not None:
            self.copies.append(copied)
            self._copied_at.append(len(self._columns))
        tokens = torch.ones(ids.shape, dtype=torch.bool, device="cpu") if mask is None else mask != 0
        self._columns.append(tokens)
        self.has_longer_steps |= ids.shape[1] > 1

    @property
    def width(self) -> int:
        """How many columns were read."""
        return sum(columns.shape[1] for columns in self._columns)

    def without_last_column(self, missing: Sequence[int]) -> None:
        """Note that the rows b with `missing[b]` took back the last column."""
        self._columns[-1][:, -1] &= torch.tensor(missing, device="cpu") == 0

    def kept_columns(self, tokens: Sequence[int]) -> torch.Tensor:
        """Which columns stay if each row b takes back its last `tokens[b]` tokens: `(B, k)` boolean, on the CPU."""
        none = torch.ones(len(tokens), 0, dtype=torch.bool, device="cpu")
        columns = torch.cat([none, *self._columns], dim=1)
        from_end = columns.flip(-1).cumsum(-1).flip(-1)
        return columns & (from_end > torch.tensor(tokens, device="cpu")[:, None])

    def tokens_behind(self, row: int, place: int) -> int:
        """How many tokens a row has read since a copy."""
        if place == len(self.copies):
            return 0
        return sum(int(columns[row].sum()) for columns in self._columns[self._copied_at[place] :])

    def copies_before(self, tokens: Sequence[int]) -> list[int | None]:
        """For each row b, the last place that is not behind what it takes back; None if nothing was copied there."""
        places = range(len(self.copies), -1, -1)
        return [
            next((place for place in places if self.tokens_behind(row, place) >= back), None)
            for row, back in enumerate(tokens)
        ]
