"""Parts of pages that show generated text: the shaded text, the chart of the deferral mass, the legend, the totals.

`fragments.html` holds their colours, styles and elements. The page of a trace is made of them, and so are pages of
other programs, which put `styles` into their head once. What a model wrote is escaped.
"""

import functools
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from .statistics import KADStatistics, TokenRecord
from .text_pieces import cut_marks, split_text

TOTALS = (  # name at the top of the page, attribute of `KADStatistics`
    ("rounds", "rounds"),
    ("drafted", "drafted"),
    ("accepted", "accepted"),
    ("acceptance rate", "acceptance_rate"),
    ("tokens per round", "tokens_per_round"),
    ("mean deferral mass", "deferral_mass"),
    ("base forwards", "base_forwards"),
    ("proxy forwards", "proxy_forwards"),
)


def make_environment() -> Environment:
    """The environment of the templates of this package, which escapes what is printed."""
    return Environment(
        loader=FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def styles(scope: str, dark_scope: str) -> str:
    """The styles of the fragments for elements inside `scope`.

    Args:
        scope: a selector of the elements that hold fragments, such as ".kad".
        dark_scope: a selector of the same elements where the page is dark, such as ".dark .kad".
    """
    own: Any = _fragments()
    return (
        f"{scope} {{ color: var(--ink); background: var(--paper); {own.light} {own.style} }}\n"
        f"{dark_scope} {{ {own.dark} }}"
    )


def text_fragment(records: Sequence[TokenRecord], tokenizer: Any) -> str:
    """The text of some tokens, each shaded by the share owed to the proxy. The tokenizer decodes their ids."""
    return _render("text", split_text(records, tokenizer), has_text=True, number=1, has_details=False)


def plain_text_fragment(text: str) -> str:
    """A text without shades. Characters are marked as they are in `text_fragment`."""
    return _render("plain", cut_marks(text))


def message_fragment(words: str, *, is_error: bool = False) -> str:
    """A sentence in the place of a text: where it stands, or why there is none."""
    return _render("message", words, is_error)


def chart_fragment(records: Sequence[TokenRecord], number: int) -> str:
    """The chart of the deferral mass along some tokens; empty for rules that have none.

    `number` tells the charts of a page apart.
    """
    masses = [record.deferral_mass for record in records if record.deferral_mass is not None]
    return _render("chart", masses, number) if masses else ""


def legend_fragment(*, has_shares: bool) -> str:
    """What shade and marks mean."""
    return _render("legend", has_shares)


def totals_fragment(tokens: int, statistics: KADStatistics | None) -> str:
    """The totals of a call."""
    return _render("totals", totals_of(tokens, statistics))


def totals_of(tokens: int, statistics: KADStatistics | None) -> list[tuple[str, int | float | None]]:
    """The totals of a call with their names; None where they are unknown."""
    return [("tokens", tokens), *((label, getattr(statistics, name, None)) for label, name in TOTALS)]


@functools.cache
def _fragments() -> Any:
    return make_environment().get_template("fragments.html").module


def _render(name: str, *values: Any, **named: Any) -> str:
    return str(getattr(_fragments(), name)(*values, **named))
