"""What the tests of pages read: Markdown files of the repository, and the tables in them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def text_of(page: str) -> str:
    """The text of a page, by its path in the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def tables_in(text: str) -> list[list[dict[str, str]]]:
    """The tables in a text: for each row, a mapping of the heading of a column to the cell."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.splitlines(True))
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found
