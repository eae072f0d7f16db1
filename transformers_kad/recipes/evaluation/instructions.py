"""Constraints on an answer that a program can check: "at least 40 words", "three bullets", "no commas".

A constraint is an object with the `name` of a function of :data:`CONSTRAINTS` and its arguments:

>>> follows("One. Two.", {"name": "sentences", "exactly": 2}), follows("No.", {"name": "words", "at_least": 5})
(True, False)
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

from ...rules.registry import unknown_name_message
from ...utils.strict_json import parse_json_object

Constraint = Mapping[str, Any]

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"”')\]*_]*(?=\s|\Z)")


def _in_range(count: int, at_least: int | None, at_most: int | None, exactly: int | None) -> bool:
    if exactly is not None and count != exactly:
        return False
    return (at_least is None or count >= at_least) and (at_most is None or count <= at_most)


def _counted(count: Callable[[str], int]) -> Callable[..., bool]:
    """A constraint on the number of something in a text."""

    def holds(
        text: str, *, at_least: int | None = None, at_most: int | None = None, exactly: int | None = None
    ) -> bool:
        return _in_range(count(text), at_least, at_most, exactly)

    return holds


def _matching_lines(pattern: str) -> Callable[..., bool]:
    return _counted(lambda text: len(re.findall(pattern, text, re.MULTILINE)))


def _count_sentences(text: str) -> int:
    """The number of sentence ends, and one more if the text does not end with one."""
    ends = list(_SENTENCE_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return len(ends) + bool(_WORD.search(rest))


def _occurrences(text: str, phrase: str) -> int:
    """How often a phrase occurs as whole words, in upper or lower case."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def contains(text: str, *, phrases: list[str]) -> bool:
    """Whether the text has every phrase."""
    return all(_occurrences(text, phrase) for phrase in phrases)


def avoids(text: str, *, phrases: list[str]) -> bool:
    """Whether the text has none of the phrases."""
    return not any(_occurrences(text, phrase) for phrase in phrases)


def repeats(
    text: str,
    *,
    phrase: str,
    at_least: int | None = None,
    at_most: int | None = None,
    exactly: int | None = None,
) -> bool:
    """Whether the text has a phrase so often."""
    return _in_range(_occurrences(text, phrase), at_least, at_most, exactly)


def avoids_characters(text: str, *, characters: str) -> bool:
    """Whether the text has none of the characters."""
    return not set(characters) & set(text)


def starts_with(text: str, *, phrase: str) -> bool:
    """Whether the text starts with exactly this phrase."""
    return text.startswith(phrase)


def ends_with(text: str, *, phrase: str) -> bool:
    """Whether the text ends with exactly this phrase."""
    return text.endswith(phrase)


def one_of(text: str, *, phrases: list[str]) -> bool:
    """Whether the text is one of the phrases and nothing else."""
    return text in phrases


def lowercase(text: str) -> bool:
    """Whether the text has letters, and no capital ones."""
    return text.islower()


def uppercase(text: str) -> bool:
    """Whether the text has letters, and only capital ones."""
    return text.isupper()


def quoted(text: str) -> bool:
    """Whether the whole text stands in double quotation marks."""
    return len(text) > 2 and text[0] == text[-1] == '"'


def json_object(text: str, *, keys: list[str]) -> bool:
    """Whether the text is a JSON object with exactly these keys, and nothing else."""
    try:
        return set(parse_json_object(text)) == set(keys)
    except ValueError:
        return False


def initials(text: str, *, letters: str) -> bool:
    """Whether the first letters of the lines, except empty ones, are these letters in this order."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "".join(line[0] for line in lines).casefold() == letters.casefold()


CONSTRAINTS: Mapping[str, Callable[..., bool]] = {
    "words": _counted(lambda text: len(_WORD.findall(text))),
    "sentences": _counted(_count_sentences),
    "paragraphs": _counted(lambda text: len([part for part in re.split(r"\n\s*\n", text) if part.strip()])),
    "lines": _matching_lines(r"\S.*$"),
    "bullets": _matching_lines(r"^[ \t]*[-*•][ \t]+\S"),
    "numbered_items": _matching_lines(r"^[ \t]*\d+[.)][ \t]+\S"),
    "headings": _matching_lines(r"^#+[ \t]+\S"),
    "contains": contains,
    "avoids": avoids,
    "repeats": repeats,
    "avoids_characters": avoids_characters,
    "starts_with": starts_with,
    "ends_with": ends_with,
    "one_of": one_of,
    "lowercase": lowercase,
    "uppercase": uppercase,
    "quoted": quoted,
    "json_object": json_object,
    "initials": initials,
}


def check_constraint(constraint: object) -> None:
    """Raise a `ValueError` unless a constraint has a known name and the arguments that it takes."""
    if not isinstance(constraint, Mapping) or not isinstance(constraint.get("name"), str):
        raise ValueError(f'a constraint must be an object with a "name", got {constraint!r:.80}')
    name, arguments = constraint["name"], _arguments(constraint)
    if name not in CONSTRAINTS:
        raise ValueError(unknown_name_message("constraint", name, CONSTRAINTS))
    function = CONSTRAINTS[name]
    try:
        inspect.signature(function).bind("", **arguments)
    except TypeError as error:
        raise ValueError(f"the constraint {name!r} can't be used with {arguments!r}: {error}") from error
    hints = get_type_hints(function)
    for argument, value in arguments.items():
        kind = hints[argument]
        if kind == list[str]:
            fits = isinstance(value, list) and bool(value) and all(isinstance(one, str) and one for one in value)
        elif kind is str:
            fits = isinstance(value, str) and bool(value)
        else:
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not fits:
            wanted = "a list of texts" if kind == list[str] else "a text" if kind is str else "a whole number"
            raise ValueError(f"{argument!r} of the constraint {name!r} must be {wanted}, got {value!r:.80}")
    counts = {"at_least", "at_most", "exactly"} & hints.keys()
    if counts and not counts & arguments.keys():
        raise ValueError(f"the constraint {name!r} needs one of {', '.join(sorted(counts))}, got {arguments!r}")


def _arguments(constraint: Constraint) -> dict[str, Any]:
    return {key: value for key, value in constraint.items() if key != "name"}


def constraint_name(constraint: Constraint) -> str:
    """A constraint in one line.

    >>> constraint_name({"name": "words", "at_least": 40})
    'words at_least=40'
    """
    arguments = (f"{key}={json.dumps(value)}" for key, value in _arguments(constraint).items())
    return " ".join([constraint["name"], *arguments])


def follows(text: str, constraint: Constraint) -> bool:
    """Whether a text follows a constraint. Space around the text does not count, and an empty text follows none."""
    text = text.strip()
    return bool(text) and CONSTRAINTS[constraint["name"]](text, **_arguments(constraint))


def strict_and_loose(constraints: Sequence[Constraint], text: str) -> tuple[list[bool], list[bool]]:
    """For each constraint, whether a text follows it, and whether it does after what models often add was removed.

    As in IFEval (arXiv 2311.07911, section 2.2) that is the first line ("Sure, here it is:"), the last line, both, or
    the asterisks of Markdown; a constraint is followed loosely if any of these texts follows it.
    """
    lines = text.strip().split("\n")
    shorter = [text, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1])]
    variants = [*shorter, *(variant.replace("*", "") for variant in shorter)]
    strict = [follows(text, constraint) for constraint in constraints]
    return strict, [any(follows(variant, constraint) for variant in variants) for constraint in constraints]
