"""Extracts mathematical expressions from a model's text, and prepares them for math-verify."""

import re

from .answer_text import MARKUP, NON_ASCII, STATED, ascii_form, is_whole, last_box, read_answer
from .number_answers import STATED_NUMBER, calculation_result, find_number, with_separator

_FORMULA = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BEFORE_EXPRESSION = re.compile(f"{MARKUP}*")
_SENTENCE = re.compile(r"[^\n]{1,300}?(?=\.(?:\s|$)|,?\s(?:because|since|which|where)\b|\n|$|</answer>)")


def extract_math(text: str, ended: bool = True) -> str | None:
    r"""The expression that a text gives as its answer, verbatim (LaTeX or plain text).

    It is the first of these that the text has:

    1. The content of the last complete `\boxed{...}`: :func:`extract_boxed`.
    2. The last statement: the formula, or else the rest of the sentence, after "The answer is" or "Answer:".
    3. If the text ended by itself, its last formula ($...$, \(...\), \[...\]), or else its last number.

    Args:
        text: the completion.
        ended: whether it ended by itself; False if it was truncated at the token limit.

    >>> print(extract_math(r"Hence $x = 2$. The final answer is $\frac{3}{4}$. I hope that helps."))
    \frac{3}{4}
    """
    return read_answer(text, ended, _find_math)


def _find_math(text: str, ended: bool) -> str | None:
    boxed = last_box(text)
    if boxed:
        return boxed
    for statement in [*STATED.finditer(text)][::-1]:
        start = _BEFORE_EXPRESSION.match(text, statement.end()).end()  # type: ignore[union-attr]
        match = _FORMULA.match(text, start) or _SENTENCE.match(text, start)
        if match and is_whole(text, match.end(), ended) and (expression := _expression(match)):
            return expression
    if not ended:
        return None
    formulas = list(_FORMULA.finditer(text))
    return _expression(formulas[-1]) if formulas else find_number(text, ended)


def _expression(match: re.Match[str]) -> str:
    """The content between a formula's delimiters, or a whole sentence, without markup."""
    content = next((group for group in match.groups() if group), match[0])
    return content.strip(" \n*`$").rstrip(".")


def without_calculation(expression: str) -> str:
    """The result of a calculation (4 in "12 miles / 3 hours = 4 miles per hour"); any other expression unchanged."""
    value = calculation_result(expression, 0) if STATED_NUMBER.match(expression) else None
    unit = r"(?:\s+[A-Za-z]{2,}|\s*\\text\s*\{[^{}]*\})*\s*\.?"
    is_number = value and re.fullmatch(unit, expression[value.end() :])
    return value["number"] if value and is_number else expression


# Notations that math-verify does not parse, or parses as something else, and their replacements.
_FOR_MATH_VERIFY = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\text\s*\{\s*\\?\$\s*\}|\\textdollar\b|\\?[$€£¥]", ""),
        (r"\^\{\s*(?:°|\\degree)\s*\}|\^?(?:°|\\degree\b)", r"^{\\circ}"),
        (r"(?<![\w.,/^])(\d+)\s+(\d+)\s?/\s?(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),  # 1 1/2
        (r"–", "-"),
        (r"⁄", "/"),
        (r"·", r"\\cdot "),
        (r"∞", r"\\infty "),
        (r"√\s*(?:\(([^()]+)\)|(\d+|[A-Za-z]))", r"\\sqrt{\1\2}"),
        (r"(?<=\d)\s*\\?(?:dollars?|cents?)\b", ""),
        (r"(?<=\d)\.\s*$", ""),
    )
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")


def for_math_verify(text: str) -> str:
    r"""An expression in a notation that math-verify parses: `\$12 000` becomes 12000, `1 1/2` becomes 1\frac{1}{2}."""
    text = with_separator("", NON_ASCII.sub(ascii_form, text))
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    for pattern, replacement in _FOR_MATH_VERIFY:
        text = pattern.sub(replacement, text)
    return text
