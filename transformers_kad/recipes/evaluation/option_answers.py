"""Extracts the letter of an option from a model's text."""

import re

from .answer_text import MARKUP, OPENING, STATED, find_boxes, is_whole, read_answer

_BEFORE_OPTION = re.compile(
    rf"(?:{MARKUP}|{OPENING}|\b(?:the|option|choice|letter|answer|most|likely|probably|clearly|definitely|therefore"
    r"|thus|then|indeed)\b)*",
    re.IGNORECASE,
)
_AFTER_OPTION = re.compile(r"[)\]}*_`\"”'’$.]*")
# "A" and "I" are words too: "the answer is A because" names an option, "Answer: A dog" does not.
_WORD_FOLLOWS = re.compile(r"\s+(?!(?:because|since|as|is|and|or|for|which|with|by|due|but|so|not)\b)[a-z]")
_OTHER_OPTION = re.compile(
    r"\s*(?P<comma>,)?\s*(?:\\text\s*\{\s*)?(?(comma)(?:\b(?:or|and)\b)?|(?:\bor\b|\band\b|/|&))\s*\}?"
)
_ABOUT_THE_OTHER = re.compile(r"[)\]}*]*\s+(?:is|are|was|has|does|being)\b")


def _option_at(text: str, position: int, letters: str) -> tuple[str, int] | None:
    """The letter of an option at `position`, after markup and words like "option", and the position where it ends.

    A lower-case letter needs a bracket, as in "(b)" or "b)", or has to end its line.
    """
    start = _BEFORE_OPTION.match(text, position).end()  # type: ignore[union-attr]
    letter, after = text[start : start + 1], text[start + 1 :]
    if not letter or letter.upper() not in letters or re.match(r"\w|[-'’]\w", after):
        return None
    if letter.islower() and not re.match(r"[)\]}]|\.?\s*(?:\n|$|</)", after):
        return None
    if letter in "AI" and _WORD_FOLLOWS.match(after):
        return None
    return letter.upper(), start + 1


def _is_undecided(text: str, end: int, letters: str) -> bool:
    """Whether an option that ends at `end` is one of a list: "(A), (B), or (C)", but not "(A), (C) is wrong"."""
    first, listed = end, False
    while joint := _OTHER_OPTION.match(text, _AFTER_OPTION.match(text, end).end()):  # type: ignore[union-attr]
        option = _option_at(text, joint.end(), letters)
        if option is None:
            break
        end, listed = option[1], listed or joint["comma"] is not None
    if _ABOUT_THE_OTHER.match(text, end):
        return False
    if listed and _WORD_FOLLOWS.match(text, _AFTER_OPTION.match(text, end).end()):  # type: ignore[union-attr]
        return False
    return end > first


def _only(found: list[tuple[str, ...]]) -> str | None:
    """The letter that all matches agree on; None if they differ."""
    letters = {letter for groups in found for letter in groups if letter}
    return letters.pop() if len(letters) == 1 else None


def extract_option(text: str, letters: str, ended: bool = True) -> str | None:
    r"""The letter of the option that a text gives as its answer.

    It is the first of these that the text has:

    1. The last stated option: "The answer is (B)", "**Answer: B**", "correct answer: **(C) Paris**",
       "<answer>B</answer>", `\boxed{\text{(B)}}`. An undecided statement, "The answer is (A), (B), or (C)", is
       no answer, and the search ends there.

    If the text ended by itself (denied options such as "not (A)" are left out):

    2. The last option that is called correct or chosen: "option B is the best", "(B) is correct", "I choose (B)".
    3. A last line that consists of a letter.
    4. The one letter that lines begin with: "B", "B. Paris", "(B) Paris, because".
    5. The one letter that is marked anywhere: "(B)", "**B**", "option B".

    If 4 or 5 finds several letters, there is no answer: the text discusses the options without choosing one.

    Args:
        text: the completion.
        letters: the options' letters, capital: "ABCD".
        ended: whether it ended by itself; False if it was truncated at the token limit.

    >>> extract_option("A. because the sun is a star, so the answer is D", "ABCD")
    'D'
    >>> print(extract_option("Because bats are mammals, (A) and (C) are alike.", "ABCD"))
    None
    """
    return read_answer(text, ended, lambda answer, whole: _find_option(answer, letters, whole)) or None


def _find_option(text: str, letters: str, ended: bool) -> str | None:
    """The letter; "" if the answer is undecided, None if there is no answer."""
    stated: list[tuple[int, str]] = []
    for statement in STATED.finditer(text):
        option = _option_at(text, statement.end(), letters)
        if option and is_whole(text, option[1], ended):
            stated.append((option[1], "" if _is_undecided(text, option[1], letters) else option[0]))
    for start, content in find_boxes(text):
        if option := _option_at(content, 0, letters):
            stated.append((start, "" if _is_undecided(content, option[1], letters) else option[0]))
    if stated:
        return max(stated, key=lambda item: item[0])[1]
    if not ended:
        return None
    marked = rf"\(([{letters}])\)|\b(?i:option|choice)\s+[(*]*([{letters}])\b|\*\*([{letters}])\b[^*\n]*\*\*"
    text = re.sub(rf"\b(?:not|cannot be|can['’]t be|isn['’]t|rather than|instead of)\s+(?:{marked})", "", text)
    named = rf"(?:{marked}|\b([{re.sub('[AI]', '', letters)}])\b)"
    chosen = re.findall(
        rf"{named}[)*]*\s+(?:is|must be|would be|should be|seems)\s+(?:(?:the|most|clearly|therefore|probably)\s+)*"
        rf"(?:correct|right|true|best|answer)\b|\b(?i:choose|pick|select|go with|going with)\s+(?:the\s+)?{named}",
        text,
    )
    if chosen:
        return _only(chosen[-1:])
    last = re.fullmatch(rf"[\W_]*([{letters}])[\W_]*", text.strip().rpartition("\n")[2], re.IGNORECASE)
    if last:
        return last[1].upper()
    lines = re.findall(
        rf"^[ \t#*>_-]*(?:\(([{letters}])\)|([{letters}])(?:[).:]|\*\*|[ \t]*$))(?!\W*is (?:not|in|wrong|false))",
        text,
        re.MULTILINE,
    )
    return _only(lines) if lines else _only(re.findall(marked, text))
