r"""Extracts numbers from a model's text.

>>> extract_number("48 / 2 = 24, so the answer is 24? No: 24 + 48 = 72. **Answer: $1,072.00**")
'1072.00'
"""

import re
from fractions import Fraction

from .answer_text import MARKUP, NON_ASCII, OPENING, STATED, ascii_form, find_boxes, is_whole, read_answer

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?"
# Sign and currency in either order, a whole number before a fraction, digits, a denominator: -$1,234.50, 2 1/2.
_NUMBER = rf"[-−–]?(?:\\?[$€£¥]\s?)?[-−–]?(?:\d+ (?=\d+/\d))?{_DIGITS}(?:\s?[/⁄]\s?\d+(?:\.\d+)?)?"
# A space may separate the minus from its number if it can't be a subtraction: "The answer is - 5", "x = - 5".
_SIGNED_NUMBER = rf"(?:[-−]\s(?=[$€£¥\\.\d]))?{_NUMBER}"
# A number outside of words. The minus of 10-3 is not a sign.
_ANY_NUMBER = re.compile(rf"(?<![^\W_])(?<!\d\.)(?P<number>(?:(?<==\s)[-−]\s(?=[$€£¥\\.\d]))?{_NUMBER})")
_VALUE = re.compile(rf"(?P<sign>-?)(?:(?P<whole>\d+) )?(?P<digits>{_DIGITS})(?:/(?P<denominator>[\d.]+))?")
_BEFORE_NUMBER = (
    rf"(?:{MARKUP}|{OPENING}|\b(?:approximately|about|around|roughly|exactly|only|just|simply|now|then|therefore|thus"
    r"|equal to|a total of)\b)*+"
)
STATED_NUMBER = re.compile(rf"{_BEFORE_NUMBER}(?P<number>{_SIGNED_NUMBER})")
_EQUALS = re.compile(r"(?<![<>!:=])=(?![=>])|≈|\\approx\b|\bequals\b")
# "x = 5", "f(2) = 5", but not the first line of a working: "x = 5\ny = 3".
_NAMED = r"[A-Za-z](?:\([^()]{0,9}\))?\s*=(?!.{0,200}[^.\s][ \t]*\n.{0,200}=)"
# A calculation begins with a number, possibly in brackets, with a LaTeX command, or with a name.
_CALCULATION = re.compile(rf"{_BEFORE_NUMBER}(?=(?:[-−]\s?)?(?:{OPENING}|\s)*{_NUMBER}|\\[A-Za-z]|√|{_NAMED})")
_LONGEST_CALCULATION = 400  # characters
# It ends with its line (unless the next line begins with an equals sign), its sentence, or before a remark.
_CALCULATION_ENDS = re.compile(
    r"\n(?!\s*&?\s*=)|[;—]|:\s|\s[-–]\s(?=[a-z])|(?<!\\),\s|[.!?][*_\"”’')\]}$]*(?=\s(?!\s*=)|$)|\banswer\b|####|\\(?:boxed|fbox)\b"
    r"|\b(?:because|since|as|where|which|when|if|so|or|leaving)\b"
    rf"|\band\s+(?:(?:that|this|it|he|she|they|we|the)\b|{_NUMBER}\s*[-−+*/×÷·])",
    re.IGNORECASE,
)
_OPERATOR = r"(?:[-−–+*/×÷·^]|\\times\b|\\cdot\b|\\div\b)"
# A number followed by this is not the value but begins another calculation: "3x", "9*2", "48 in all + 24".
_CALCULATION_GOES_ON = re.compile(rf"[xyzn]\b|{_OPERATOR}\s?[$(\d]|[^(]*?\s(?:{_OPERATOR}|x)\s+(?:{OPENING}|\s)*\d")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)(\d))")
# Groups of three digits after one to three digits: 12 000, 12\,000, 12{,}000, also repeated. Not in "2020 300 people",
# "555 123 4567", "4 250ml cups", "2 100-gram bars" or 5 125/1000.
_SEPARATOR = r"(?:\{,\}|,?\\[,!]|\\ |[ ~\u00a0\u2009\u202f])"
_THOUSANDS = re.compile(
    rf"(?<![\w.,/^])(?<!\d[ ~])[1-9]\d{{0,2}}(?:{_SEPARATOR}\d{{3}})+(?!\w|-\w|,\d|[ ~]\d|\s?/\s?\d{{3}})"
)


def _plain(text: str) -> str:
    r"""Replace LaTeX fractions and separators of thousands by plain ones: `2\frac{1}{2}` is "2 1/2", 12 000 12,000."""

    def fraction(match: re.Match[str]) -> str:
        gap = " " if text[: match.start()][-1:].isdigit() else ""
        return f"{gap}{match[1] or match[3]}/{match[2] or match[4]}"

    return with_separator(",", _LATEX_FRACTION.sub(fraction, text))


def with_separator(separator: str, text: str) -> str:
    """Replace the separators of thousands other than commas."""
    return _THOUSANDS.sub(lambda match: re.sub(_SEPARATOR, separator, match[0]), text)


def _cleaned(number: str) -> str:
    """A match of `_NUMBER` without currency and commas, with an ASCII minus."""
    bare = re.sub(r"[$€£¥\\,]", "", re.sub(r"[−–]", "-", number)).strip()
    return re.sub(r"\s*[/⁄]\s*", "/", re.sub(r"^-\s*", "-", bare))


def number_value(text: str) -> Fraction | None:
    r"""The value of a text that is a number and nothing else; None for any other text.

    Separators of thousands, a currency, a final period, and a percent or degree sign are ignored: 50% has the value
    50, since data sets that ask for percentages give them as plain numbers. Fractions and mixed numbers have their
    exact value.

    >>> number_value("-$1,234.50"), number_value(r"2\frac{1}{2}"), number_value("50%"), number_value("seven")
    (Fraction(-2469, 2), Fraction(5, 2), Fraction(50, 1), None)
    """
    plain = _plain(NON_ASCII.sub(ascii_form, text.strip())).rstrip(".")
    number = re.sub(r"\s*(?:\\?%|°|\^\{?\\circ\}?)$", "", plain)
    match = _VALUE.fullmatch(_cleaned(number)) if re.fullmatch(_SIGNED_NUMBER, number) else None
    if match is None:
        return None
    try:
        value = Fraction(match["digits"]) / Fraction(match["denominator"] or 1) + Fraction(match["whole"] or 0)
    except (ValueError, ZeroDivisionError):  # more digits than Python parses, or 1/0
        return None
    return -value if match["sign"] else value


def _is_list_marker(text: str, start: int, end: int) -> bool:
    """Whether a number is a list marker such as "2." at the beginning of a line."""
    line = text[:start].rpartition("\n")[2]
    return not line.strip(" \t#*>_-") and bool(re.match(r"[.)][*_]*[ \t]+\S", text[end:]))


def extract_number(text: str, ended: bool = True) -> str | None:
    r"""The number that a text gives as its answer, without currency, commas and unit: "-3", "1234.50", "1/2".

    It is the first of these that the text has:

    1. The last stated number: "The answer is 72", "Answer: 72", "#### 72", "<answer>72</answer>", `\boxed{72}`. If a
       calculation is stated, its result counts: "The answer is 20% of 360 = 72". Only markup, a currency or a word
       like "about" may stand between the statement and the number.
    2. If the text ended by itself, its last number that is not a list marker.

    Args:
        text: the completion.
        ended: whether it ended by itself; False if it was truncated at the token limit.

    >>> extract_number("3 apples and 4 pears, so 7")
    '7'
    >>> extract_number("The answer is $1,234.50 (about 12 a day).")
    '1234.50'
    """
    return read_answer(text, ended, find_number)


def find_number(text: str, ended: bool) -> str | None:
    text = _plain(text)
    stated = []
    for statement in STATED.finditer(text):
        match = _stated_number(text, statement.end(), ended)
        if match and is_whole(text, match.end(), ended) and not _is_list_marker(text, *match.span("number")):
            stated.append((match.start("number"), match["number"]))
    for start, content in find_boxes(text):
        match = calculation_result(content, 0) or STATED_NUMBER.match(content) or _ANY_NUMBER.search(content)
        if match:
            stated.append((start, match["number"]))
    if stated:
        return _cleaned(max(stated)[1])
    if not ended:
        return None
    found = list(_ANY_NUMBER.finditer(text))
    found = [match for match in found if not _is_list_marker(text, *match.span())] or found
    return _cleaned(found[-1]["number"]) if found else None


def _stated_number(text: str, start: int, ended: bool) -> re.Match[str] | None:
    """The number that is stated at `start`, or the result of a calculation there; None if that is truncated."""
    first = STATED_NUMBER.match(text, start)
    if first and re.match(r"[-−]\s", first["number"]) and "\n" in text[start : first.start("number")]:
        return None  # a list
    calculation = _CALCULATION.match(text, start)
    result = calculation_result(text, calculation.end()) if calculation else None
    if first and not result and not ended:
        end = _calculation_end(text, first.end())
        equals = _EQUALS.search(text, first.end(), end)
        if end == len(text) and _CALCULATION_GOES_ON.match(text, first.end(), equals.start() if equals else end):
            return None
    return result or first


def _calculation_end(text: str, start: int) -> int:
    limit = min(len(text), start + _LONGEST_CALCULATION)
    stop = _CALCULATION_ENDS.search(text, start, limit)
    return stop.start() if stop else limit


def calculation_result(text: str, start: int) -> re.Match[str] | None:
    """The value after the last equals sign of a calculation that begins at `start`: 18 in "9 * 2 = 18 eggs".

    It is None if the last value is another calculation, as 48 + 24 in "72 = 48 + 24", or if the equation is a remark:
    "12 (x = 3)", "12 for x = 3", "25% = 0.25", "1/3 ≈ 0.33".
    """
    end = _calculation_end(text, start)
    for sign in [*_EQUALS.finditer(text, start, end)][::-1]:
        before, behind = text[start : sign.start()], end
        value = STATED_NUMBER.match(text, sign.end(), behind)
        end = sign.start()
        remarked = (
            sum(map(before.count, "([")) > sum(map(before.count, ")]"))
            or re.search(r"[A-Za-z]{2,}\s+[A-Za-z]\s*$", before)
            or re.fullmatch(rf"{_DIGITS if sign[0] == '=' else _NUMBER}\s*\\?%?[\s$\\)]*", before)
        )
        if value and not remarked and not _CALCULATION_GOES_ON.match(text, value.end(), behind):
            return value
    return None
