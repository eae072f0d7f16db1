r"""Whether an answer has exactly the form that the instruction of its task asks for, right or wrong.

Each function takes the completion without its end-of-turn token, and whether it ended by itself. Thoughts before the
answer are ignored. An answer that was truncated is never in its form, since it does not end as the instruction asks.

>>> number_sentence("9 * 2 = 18. The answer is 18.", True), number_sentence("9 * 2 = 18. It is 18.", True)
(True, False)
"""

import re
from collections.abc import Callable

from ...integrations.loading.thoughts import without_thoughts
from .answer_text import last_box

Form = Callable[[str, bool], bool]

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?"


def _ends_with(sentence: str) -> Form:
    """The form of an answer whose last sentence matches a pattern."""
    last = re.compile(rf"(?:\A|\s){sentence}\s*\Z")

    def has_form(text: str, ended: bool) -> bool:
        answer = without_thoughts(text)
        return ended and answer is not None and last.search(answer) is not None

    return has_form


number_sentence = _ends_with(rf"The answer is {_NUMBER}\.")


def option_sentence(letters: str) -> Form:
    """The form of an answer that ends with "The answer is (X).", where X is one of the letters.

    >>> has_form = option_sentence("ABCD")
    >>> has_form("Bats fly. The answer is (B).", True), has_form("The answer is (E).", True)
    (True, False)
    """
    return _ends_with(rf"The answer is \([{letters}]\)\.")


def boxed(text: str, ended: bool) -> bool:
    r"""Whether an answer has a complete `\boxed{...}` that is not empty."""
    answer = without_thoughts(text)
    return ended and answer is not None and bool(last_box(answer))
