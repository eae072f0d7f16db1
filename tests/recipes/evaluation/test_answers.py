"""Which answers count as the same."""

import pytest

from transformers_kad.recipes.evaluation.answers import answers_match
from transformers_kad.recipes.evaluation.number_answers import number_value


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        ("18", "18", True),
        ("18.0", "18", True),
        ("18.00", "18.0", True),
        ("018", "18", True),
        ("1,234", "1234", True),
        ("$1,234.50", "1234.5", True),
        ("1{,}234", "1234", True),
        ("-3", "−3", True),
        ("-3", "3", False),
        ("-$3", "-3", True),
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        ("2 1/2", "2.5", True),
        ("-2 1/2", "-2.5", True),
        ("1/3", "0.33", False),
        ("50%", "50", True),
        (r"50\%", "50", True),
        ("50%", "0.5", False),
        ("1.5e3", "1500", True),
        ("72.", "72", True),
        ("123456789012345678901", "123456789012345678902", False),  # floats would be equal
        ("1/0", "1", False),
        ("9" * 5000, "9", False),
        ("12 clips", "12", False),
        (r"\$32,\!348", "32348", True),
        ("12 000", "12000", True),
        ("2020 300", "2020300", False),
        ("- 5", "-5", True),
        ("- 5", "5", False),
        ("90°", "90", True),
        (r"90^\circ", "90", True),
        ("１２", "12", True),
        ("1½", "1.5", True),
        ("", "12", False),
        (None, "12", False),
    ],
)
def test_numbers_are_compared_by_value(prediction, answer, same):
    assert answers_match(prediction, answer, "number") is same


def test_options_are_compared_as_they_are():
    assert answers_match("B", "B", "text")
    assert not answers_match("b", "B", "text")
    assert not answers_match(None, "B", "text")


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        ("1/2", r"\dfrac{2}{4}", True),
        (r"3\sqrt{13}", r"\sqrt{117}", True),
        ("(x+1)^2", "x^2 + 2x + 1", True),
        ("(x+1)^2", "x^2 + x + 1", False),
        ("-q+p", "p - q", True),
        ("q-p", "p - q", False),
        (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"(\pi/2,3)", r"\left( 3, \frac{\pi}{2} \right)", False),
        ("1,-2", "-2,1", True),  # solutions, in any order
        ("(1,-2)", "(-2,1)", False),  # a point
        ("5", "x = 5", True),
        ("x = 5", "5", True),
        (r"(-\infty, 5)", "x < 5", True),
        ("x < 5", r"(-\infty, 5)", False),  # as the answer is an interval, the prediction has to be one
        ("Evelyn", r"\text{Evelyn}", True),
        ("Robert", r"\text{Evelyn}", False),
        ("C", r"\text{(C)}", True),
        ("90", r"90^\circ", True),
        ("10080", "10{,}080", True),
        (r"\$32,348", r"\$32,\!348", True),
        (r"\$36", "36", True),
        ("36", r"\$36", True),
        (r"36 \text{ dollars}", r"\$36", True),
        (r"\$36", "37", False),
        ("18.90", r"\$18.90", True),
        (r"\$18.90", "18.9", True),
        ("32348", r"\$32,\!348", True),
        ("€36", "36", True),
        ("12 000", "12000", True),
        (r"12\,000", "12{,}000", True),
        ("1 2", "12", False),
        ("90°", r"90^\circ", True),
        ("90", "90°", True),
        (r"90\degree", r"90^{\circ}", True),
        (r"\frac{90°}{2}", "45", True),
        ("12 000/5", "2400", True),
        ("ℝ", "R", False),
        ("90 degrees", r"90^\circ", True),
        ("9°", r"90^\circ", False),
        ("1 1/2", r"\frac{3}{2}", True),
        ("-1 1/2", r"-\frac{3}{2}", True),
        (r"\frac{3}{2}", r"1\frac{1}{2}", True),
        (r"1\frac{1}{2}", r"\frac{1}{2}", False),
        ("1 1/2", r"\frac{11}{2}", False),
        ("1½", r"\frac{3}{2}", True),
        ("1⁄2", r"\frac{1}{2}", True),
        ("8", "８", True),
        ("x²", "x^2", True),
        ("10²", "102", False),
        ("2√3", r"2\sqrt{3}", True),
        ("3·4", "12", True),
        ("∞", r"\infty", True),
        ("5.", "5", True),
        ("–5", "-5", True),
        ("(16 - 3 - 4) * 2 = 18", "18", True),
        ("12 miles / 3 hours = 4 miles per hour", "4", True),
        (r"12 \text{ miles} / 3 \text{ hours} = 4 \text{ mph}", "4", True),
        ("20% of 50 = 10", "10", True),
        ("20% of 50 = 10", "20", False),
        ("2 * 3 = 6a", "6", False),
        ("5.4", r"5.4 \text{ cents}", True),
        (r"\begin{pmatrix} 1/5 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ 2 \end{pmatrix}", True),
        (r"\begin{pmatrix} 1/5 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 0.2 \end{pmatrix}", False),
        ("[2,12) \\cup (12,102]", "[2,12)\\cup(12,102]", True),
        ("(2,12) \\cup (12,102]", "[2,12)\\cup(12,102]", False),
        ("6", "5", False),
        ("0.333", r"\frac{1}{3}", False),
        ("", "5", False),
        (r"\frac{1}{", "5", False),
        ("no\nanswer \ud800", "5", False),
        (None, "5", False),
    ],
)
def test_mathematics_is_compared_by_meaning(prediction, answer, same):
    assert answers_match(prediction, answer, "math") is same


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'numbers'"):
        answers_match("1", "1", "numbers")
    with pytest.raises(ValueError, match="'seven'"):
        answers_match("7", "seven", "number")
    assert number_value("seven") is None
