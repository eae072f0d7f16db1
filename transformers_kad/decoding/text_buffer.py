"""The texts of a speculative call: they grow on the host, and are written to the device when somebody asks for one."""

import torch

from ..utils.transfers import send

# Columns that there is room for at first. The room is doubled when it is full.
FIRST_ROOM = 256


class TextBuffer:
    """Texts that grow by different numbers of tokens, in rows of one tensor.

    The tokens that are new in all rows are written in one copy, for which the host does not wait.

    Args:
        prompts: `(B, P)`, padded on the left.
        padding: the id behind the end of a text that is shorter than others.

    Attributes:
        lengths: of each text, in columns, padding on the left included.
    """

    def __init__(self, prompts: torch.Tensor, padding: int) -> None:
        self.lengths = [prompts.shape[1]] * len(prompts)
        self._padding = padding
        self._ids = torch.nn.functional.pad(prompts, (0, FIRST_ROOM), value=padding)
        self._unwritten: list[tuple[int, int, int]] = []  # row, column and id

    def append(self, row: int, token: int) -> None:
        """Append a token to the text of a row."""
        self._unwritten.append((row, self.lengths[row], token))
        self.lengths[row] += 1

    def text(self, row: int) -> torch.Tensor:
        """The text of a row, `(1, L)`."""
        self._write()
        return self._ids[row : row + 1, : self.lengths[row]]

    def all_texts(self) -> torch.Tensor:
        """All texts, filled up on the right to the longest of them, `(B, L)`."""
        self._write()
        return self._ids[:, : max(self.lengths)].contiguous()

    def _write(self) -> None:
        missing = max(self.lengths) - self._ids.shape[1]
        if missing > 0:
            room = max(missing, self._ids.shape[1])
            self._ids = torch.nn.functional.pad(self._ids, (0, room), value=self._padding)
        if self._unwritten:
            rows, columns, tokens = send(list(zip(*self._unwritten, strict=True)), self._ids.device)
            self._ids[rows, columns] = tokens
            self._unwritten = []
