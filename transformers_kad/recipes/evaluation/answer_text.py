r"""Finds the part of a model's text that gives its answer: stated answers and boxes.

A prompt asks for a *stated* answer: "The answer is 72.", "The answer is (B)." or `\boxed{72}`. Every extractor takes
the last stated answer of a text. Fallbacks, which the docstring of each extractor lists, are used only for a text that
ended by itself (`ended=True`): a text that was truncated at the token limit has no final sentence to take an answer
from, and a number or letter at its end may be incomplete. If no rule finds an answer, the prediction is None, which is
wrong.

Extractors only read the text after the thoughts (:func:`without_thoughts`) and before a question that the model asks
after its answer. Full-width characters are read as ASCII characters.
"""

import re
import unicodedata
from collections.abc import Callable

from ...integrations.loading.thoughts import without_thoughts

# The beginning of every task's instruction.
REASON = "Reason step by step."
# A line that begins a new question: "Question:", "**Problem 2:**", "### Problem 2", the turn of a user.
_NEW_QUESTION = re.compile(
    r"^[ \t#>*_]*(?:(?i:(?:question|problem|exercise)[ \t]*#?\d*)|Q[ \t]*\d*|User|Human|(?i:instruction))[*_ \t]*:"
    r"|^#+[ \t]*(?i:question|problem|exercise)[ \t]*#?\d*[ \t]*$"
    rf"|^{re.escape(REASON)}"
    r"|(?:<\|im_start\|>|<\|start_header_id\|>|<\|start\|>|<start_of_turn>|<\|turn>)user\b|<\|user\|>|\[INST\]",
    re.MULTILINE,
)
NON_ASCII = re.compile(r"[^\x00-\x7f]")


def ascii_form(match: re.Match[str]) -> str:
    """A full-width, half-width, small or styled character as its usual form, and a fraction such as ½ as "1/2".

    Other compatibility forms are kept: in 10² the 2 is an exponent, and ℝ does not mean R.
    """
    form, usual = unicodedata.decomposition(match[0]).partition(" ")[0], unicodedata.normalize("NFKC", match[0])
    if form == "<fraction>":
        gap = " " if match.string[: match.start()][-1:].isdigit() else ""
        return gap + usual.replace("⁄", "/")
    is_styled = form == "<font>" and match[0] >= "\U0001d400"
    return usual if is_styled or form in ("<wide>", "<narrow>", "<small>") else match[0]


def read_answer(text: str, ended: bool, find: Callable[[str, bool], str | None]) -> str | None:
    """Apply `find(text, ended)` to the part of a text that answers the question. Every extractor uses this function.

    Thoughts are removed. After an answer, a base model often continues with a question of its own and answers that.
    If something is found before the first new question, it is the answer, and it is complete. Otherwise the model
    repeats or analyses the question before it answers, and the whole text is searched.
    """
    answer = without_thoughts(NON_ASCII.sub(ascii_form, text))
    if answer is None:
        return None
    question = _NEW_QUESTION.search(answer)
    first = find(answer[: question.start()], True) if question else None
    return find(answer, ended) if first is None else first


MARKUP = r"[\s*_`\"“”'‘’~≈]"
OPENING = r"(?:[(\[{$€£¥]|\\[(\[$]|\\(?:boxed|text|math)[a-z]*\s*\{)"  # what may enclose an answer
_DENIAL = r"(?:not|never|cannot|neither|nor)\b"
# "The answer is", "**Answer**: ", "the correct answer to the question would be", "Final answer =", "####".
STATED = re.compile(
    r"(?<!wrong )(?<!incorrect )\b(?:answer|(?:correct|right|best) (?:option|choice))\b"
    rf"(?:\s+(?!is\b|{_DENIAL})\w+){{0,5}}?{MARKUP}*"
    r"(?:\b(?:is|was|be|equals|becomes|comes to|comes out to)\b(?:\s*:)?|[:=])|####|<answer>",
    re.IGNORECASE,
)


def is_whole(text: str, end: int, ended: bool) -> bool:
    """Whether an answer that ends at `end` is known to be complete. A truncated text must continue after it."""
    return ended or bool(text[end:].lstrip(",/"))


# An opening box, a box without braces, an escaped character, a brace.
_BOX_OR_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*)(?:\{|(?P<bare>[^\s{}$\\.,]+))|\\.|[{}]", re.DOTALL)


def find_boxes(text: str) -> list[tuple[int, str]]:
    """Start and content of every complete box, in the order of their starts."""
    boxes = []
    open_braces: list[re.Match[str]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        if match["bare"]:
            boxes.append((match.start(), match["bare"]))
        elif match[0].endswith("{") and match[0] != r"\{":
            open_braces.append(match)
        elif match[0] == "}" and open_braces:
            opening = open_braces.pop()
            if opening["box"]:
                boxes.append((opening.start(), text[opening.end() : match.start()].strip()))
    return sorted(boxes)


def extract_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}` (or `\fbox{...}`, `\boxed 5`), nested braces included.

    >>> print(extract_boxed(r"so $\boxed{\frac{1}{2}}$, which is not \boxed{\frac{1}{"))
    \frac{1}{2}
    """
    return read_answer(text, True, last_box)


def last_box(text: str, ended: bool = True) -> str | None:
    boxes = find_boxes(text)  # a closed box is complete even in a truncated text
    return boxes[-1][1] if boxes else None
