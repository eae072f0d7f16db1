"""Compares the answer that was extracted from a model's text with the right one.

>>> answers_match("1072.00", "1072", "number")
True
"""

from typing import Literal, get_args

from .math_answers import for_math_verify, without_calculation
from .math_verifier import MathVerifier
from .number_answers import number_value

Comparison = Literal["text", "number", "math"]
_verifier = MathVerifier()


def answers_match(prediction: str | None, answer: str, comparison: str) -> bool:
    r"""Whether a prediction is the same as the right answer.

    Args:
        prediction: the answer that an extractor found; None is wrong.
        answer: the right answer.
        comparison: "text" compares strings (the letter of an option), "number" compares exact values
            (:func:`number_value`), and "math" compares expressions by math-verify: 1/2 = 0.5,
            (x + 1)^2 = x^2 + 2x + 1, \sqrt{117} = 3\sqrt{13}. It works in every thread and always returns
            (:class:`MathVerifier`).

    Raises:
        ValueError: the comparison is unknown, or numbers are compared and the right answer is not a number.
        ImportError: math-verify is not installed.

    >>> answers_match("18.0", "18", "number"), answers_match("0.33", "1/3", "number")
    (True, False)
    """
    if comparison not in get_args(Comparison):
        raise ValueError(f"`comparison` must be one of {get_args(Comparison)}, got {comparison!r}.")
    right = number_value(answer) if comparison == "number" else None
    if comparison == "number" and right is None:
        raise ValueError(f"Numbers are compared, but the right answer {answer!r} is not a number.")
    if prediction is None or comparison == "text":
        return prediction == answer
    if comparison == "number":
        return number_value(prediction) == right
    if "=" not in answer:
        prediction = without_calculation(prediction)
    if prediction.strip() == answer.strip():
        return True
    return _verifier.equal(for_math_verify(prediction), for_math_verify(answer))
