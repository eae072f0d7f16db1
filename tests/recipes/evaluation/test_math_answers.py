"""Mathematical expressions out of texts: what the extractor finds in nasty outputs."""

import pytest

from transformers_kad.recipes.evaluation.math_answers import extract_math


@pytest.mark.parametrize(
    ("text", "ended", "expression"),
    [
        (r"So $x = \boxed{\frac{1}{2}}$, which is 0.5.", True, r"\frac{1}{2}"),
        (r"\boxed{4}. The answer is 5.", True, "4"),  # the box is what the prompt asks for
        (r"The final answer is $\frac{1}{2}$. I hope it is correct.", True, r"\frac{1}{2}"),
        (r"**Answer:** \( (3, 4) \)", True, "(3, 4)"),
        ("The answer is:\n\\[ x^2 + 1 \\]\nDone in 2 steps.", True, "x^2 + 1"),
        ("The answer is 3x + 1, since 2 + 1 = 3.", True, "3x + 1"),
        ("The answer is 0.5. Then 7.", True, "0.5"),
        ("**Answer: 1/2**", True, "1/2"),
        (r"\boxed{} The answer is 5.", True, "5"),
        ("<answer>1/2</answer>", True, "1/2"),
        ("With $a = 1$ we get $b = 2$.", True, "b = 2"),
        ("So it is 12", True, "12"),
        ("No idea.", True, None),
        (r"so \boxed{12}, and", False, "12"),
        (r"so \boxed{12", False, None),
        ("The answer is $1", False, None),
        ("The answer is $12$. So", False, "12"),
        ("The answer is 12", False, None),
        ("With $a = 1$ we get", False, None),
    ],
)
def test_mathematics(text, ended, expression):
    assert extract_math(text, ended) == expression
