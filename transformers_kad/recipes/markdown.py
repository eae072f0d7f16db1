"""Tables and numbers in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text, aligned to the left, and whose other columns are numbers."""
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def number(value: float | None, digits: int, sign: str = "") -> str:
    """A number with so many digits after the point, behind a sign such as "× ", or a dash if it is missing."""
    return "–" if value is None else f"{sign}{value:.{digits}f}"


def p_value(value: float) -> str:
    """A p-value with four digits."""
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
