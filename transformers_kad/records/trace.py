"""KADTrace: the records of every token of a finished call, and the page that shows them."""

import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from ..utils.files import write_whole
from .statistics import KADStatistics, TokenRecord
from .trace_page import render_page


@dataclass(frozen=True)
class KADTrace(Sequence[TokenRecord]):
    """The records of a finished call. Indexing and iterating run through the first sequence.

    Attributes:
        sequences: the records of each returned sequence.
        statistics: the statistics of the call, for the page.
        tokenizer: the processor's `tokenizer`, for the page; None if it was given none.
        base: the class of the base and where it was loaded from, for the page; None if that is not known.
        proxy: the same of the proxy.
        rule: the processor's rule, for the page.

    A notebook shows a trace as the page that `to_html` writes.
    """

    sequences: tuple[tuple[TokenRecord, ...], ...] = ()
    statistics: KADStatistics | None = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    base: str | None = field(default=None, repr=False, compare=False)
    proxy: str | None = field(default=None, repr=False, compare=False)
    rule: str | None = field(default=None, repr=False, compare=False)

    @property
    def _first(self) -> tuple[TokenRecord, ...]:
        return self.sequences[0] if self.sequences else ()

    @overload
    def __getitem__(self, index: int) -> TokenRecord: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[TokenRecord, ...]: ...

    def __getitem__(self, index: int | slice) -> TokenRecord | tuple[TokenRecord, ...]:
        """One or several records of the first sequence."""
        return self._first[index]

    def __len__(self) -> int:
        return len(self._first)

    def __iter__(self) -> Iterator[TokenRecord]:
        return iter(self._first)

    def to_html(self, path: str | os.PathLike[str], tokenizer: Any = None, *, title: str | None = None) -> Path:
        """Write one page that shows the text, each token shaded by the share owed to the proxy.

        The page stands alone: it loads nothing, and what a model wrote is shown as text and never run.

        Args:
            path: the file to write. Missing folders are made; an existing file is replaced, through a link too. A
                device or a pipe, such as `/dev/stdout`, is written into.
            tokenizer: decodes the ids; by default the tokenizer that the processor was built with.
            title: the heading of the page, in plain text.

        Returns:
            `path`.

        Raises:
            ValueError: no tokenizer is known.
            TypeError: `tokenizer` can't decode ids.
            OSError: `path` is a folder, or can't be written.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError(
                f"`to_html({str(path)!r})` needs a tokenizer to show text, got None: pass `tokenizer=`, or build the "
                "processor with one, `KADLogitsProcessor(proxy, tokenizer=tokenizer)`."
            )
        if not hasattr(tokenizer, "decode") or not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise TypeError(f"`tokenizer` must be a transformers tokenizer, got {tokenizer!r}.")
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"`path` must be a file, got the folder {str(path)!r}.")
        page = self._page(tokenizer, title)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)
        return path

    def _page(self, tokenizer: Any, title: str | None) -> str:
        named = {"base": self.base, "proxy": self.proxy, "rule": self.rule}
        names = [(role, name) for role, name in named.items() if name is not None]
        return render_page(self.sequences, self.statistics, tokenizer, title, names)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that neither styles nor scripts reach the notebook."""
        page = self._page(self.tokenizer, None)
        return (
            '<iframe title="KAD trace" sandbox="allow-scripts" width="100%" height="600" '
            f'style="border: 0" srcdoc="{html.escape(page)}"></iframe>'
        )
