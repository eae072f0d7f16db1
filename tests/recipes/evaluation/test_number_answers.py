"""Numbers out of texts: what the extractor finds in nasty outputs."""

import pytest

from transformers_kad.recipes.evaluation.math_answers import extract_math
from transformers_kad.recipes.evaluation.number_answers import extract_number
from transformers_kad.recipes.evaluation.option_answers import extract_option

NUMBERS = [
    # The stated form.
    ("48 / 2 = 24 and 48 + 24 = 72. The answer is 72.", "72"),
    ("The answer is 72", "72"),
    ("The answer is: 72.", "72"),
    ("**Answer: 72**", "72"),
    ("**Answer:** 72", "72"),
    ("### Final answer\n\nThe final answer is **72**.", "72"),
    ("Answer:\n72", "72"),
    ("answer = 72", "72"),
    ("ANSWER: 72", "72"),
    ("so 48 + 24 = 72\n#### 72", "72"),
    (r"The answer is \(72\).", "72"),
    (r"The answer is $72$ because 70 + 2 = 72 and 5 > 3.", "72"),
    (r"The final answer is $\boxed{72}$ clips in 2 months.", "72"),
    (r"\boxed{72}. There are 2 months.", "72"),
    (r"\boxed{x = 72 \text{ clips}} for 2 months", "72"),
    (r"\boxed{48 + 24 = 72}", "72"),
    ("The answer is approximately 72, over 2 months.", "72"),
    ("The correct answer to this question is therefore 72, over 2 months.", "72"),
    ("The answer would be 72 after 2 months.", "72"),
    ("The answer comes out to 72 after 2 months.", "72"),
    # The last statement holds, wherever it is.
    ("The answer is 12. No, I forgot the 3 pears. The answer is 15.", "15"),
    (r"\boxed{12} was wrong. The answer is 15.", "15"),
    (r"The answer is 12, or rather \boxed{15}.", "15"),
    ("The answer is 15. The answer is 15. The answer is 15.", "15"),
    # The result of a calculation that is stated.
    ("The answer is 48 + 24 = 72.", "72"),
    ("The answer is $48 + $24 = $72, spread over 2 months.", "72"),
    ("The answer is 3 apples + 4 pears = 7 fruits in 2 bowls.", "7"),
    ("The answer is 12/4 = 3 each for 4 children.", "3"),
    ("The answer is 2 x 3 = 6, for 2 days.", "6"),
    (r"The answer is 2 \times 3 = **6**, for 2 days.", "6"),
    ("The answer is 72 = 48 + 24.", "72"),
    ("The answer is 72 - see above, 48 + 24 = 72, 2 months", "72"),
    ("The answer is (16 - 3 - 4) * 2 = 18.", "18"),
    ("The answer is 12 miles / 3 hours = 4 miles per hour.", "4"),
    ("The answer is 20% of 50 = 10.", "10"),
    ("The answer is $2 * (9 - 3) = $12 for 3 days.", "12"),
    ("The answer is 3 boxes with 12 eggs each = 36 eggs in 2 rows.", "36"),
    ("The answer is 1/2 * 36 = 18, for 2 days.", "18"),
    ("The answer is 9 * 2 = 18 = 6 * 3.", "18"),
    ("The answer is 12 times 3 equals 36 in 2 days.", "36"),
    ("The answer is 12 * 3.5 ≈ 42 in 2 days.", "42"),
    ("The answer is 3 - 8 = - 5.", "-5"),
    ("The answer is 48 + 24\n= 72 clips in 2 months.", "72"),
    ("The answer is x = 5 apples, and that leaves 12 - 5 = 7.", "5"),
    ("The answer is x = 5 apples and that leaves 12 - 5 = 7.", "5"),
    ("The answer is f(2) = 5 for 3 days.", "5"),
    (r"The answer is $48 \text{ clips} + 24 \text{ clips} = 72 \text{ clips}$ in 2 months.", "72"),
    (r"The answer is \sqrt{144} = 12 in 2 days.", "12"),
    (r"\boxed{(16 - 3 - 4) \times 2 = 18}", "18"),
    (r"\boxed{72 = 48 + 24}", "72"),
    # What is said beside a number is no calculation of it.
    ("The answer is 72 = 48 in April + 24 in May.", "72"),
    ("The answer is 15 = 3x.", "15"),
    ("The answer is 1/3 ≈ 0.33.", "1/3"),
    ("The answer is 5 (x = 3).", "5"),
    ("The answer is 12 for x = 3.", "12"),
    ("The answer is 9 * 8 = 72 (48 + 24).", "72"),
    ("The answer is 18 because 9 * 2 = 18 and 16 - 7 = 9.", "18"),
    ("The answer is 18 dollars which leaves 20 - 18 = 2.", "18"),
    ("The answer is 18 and 20 - 18 = 2 remain.", "18"),
    ("The answer is 25% = 0.25.", "25"),
    ("The answer is 5; 2 + 2 = 4.", "5"),
    ("The answer is 12: 6 * 3 = 18.", "12"),
    ("The answer is 12 — 6 * 3 = 18.", "12"),
    ("The answer is 12 - not 12 + 1 = 13.", "12"),
    ("The answer is 5.\n2 + 2 = 4", "5"),
    ("**The answer is 18.** Check: 9 + 9 = 18, 3 + 3 = 6.", "18"),
    ("The answer is found by x + 3 = 8, so x = 5.", "5"),
    ("The answer is x <= 5", "5"),
    ("Answer: I = 6\nSister = 6/2 + 4 = 7\n6 + 7 = 13 letters", "13"),
    # Forms of numbers.
    ("The answer is $1,234.50 in 3 days.", "1234.50"),
    ("The answer is 1,234,567 grains.", "1234567"),
    (r"The answer is 1{,}234 grains.", "1234"),
    (r"The answer is 12\,345 grains.", "12345"),
    ("The answer is 12\u202f345 grains.", "12345"),
    ("The answer is -3 degrees at 6 o'clock.", "-3"),
    ("The answer is −3 degrees at 6 o'clock.", "-3"),
    ("The answer is -$3.", "-3"),
    (r"The answer is \$-3.", "-3"),
    ("The answer is 0.5 litres.", "0.5"),
    ("The answer is .5 litres.", ".5"),
    ("The answer is 1/2 of 8.", "1/2"),
    ("The answer is 2 1/2 hours.", "2 1/2"),
    (r"The answer is \frac{1}{2}.", "1/2"),
    (r"The answer is $-\dfrac{1}{2}$.", "-1/2"),
    (r"\boxed{2\frac12}", "2 1/2"),
    ("The answer is 50% of 8.", "50"),
    ("The answer is 5kg for 2 dogs.", "5"),
    ("The answer is 1.5e3 metres.", "1.5e3"),
    ("The answer is 007.", "007"),
    (r"The answer is \$36.", "36"),
    (r"The answer is \$18.90.", "18.90"),
    (r"\boxed{\$32,\!348}", "32348"),
    ("The answer is 90° today.", "90"),
    ("The answer is 2½ hours.", "2 1/2"),
    ("The answer is ½.", "1/2"),
    ("The area is 10²", "10"),
    ("Answer：７２", "72"),
    ("<answer>36</answer>", "36"),
    ("<answer>36 eggs</answer> in 2 days", "36"),
    ("<answer>48 + 24 = 72</answer> in 2 days", "72"),
    # A minus apart from its number: a sign where nothing can be subtracted from.
    ("The answer is - 5.", "-5"),
    ("The answer is − 5.", "-5"),
    ("The answer is - $5.", "-5"),
    (r"\boxed{- 5}", "-5"),
    ("So x = - 5", "-5"),
    ("So it is 10 - 5", "5"),
    ("The answer is 10 - 5 = 5.", "5"),
    ("The answer is – 72.", "72"),  # a dash
    ("Answer:\n- 5 apples\n- 3 pears\n\nTogether 8", "8"),  # a list
    # Spaces between thousands: groups of three digits behind one to three, and no other number beside them.
    ("The answer is 12 000 dollars.", "12000"),
    ("The answer is 1 234 567.", "1234567"),
    ("The answer is $12 000.50.", "12000.50"),
    ("The answer is 350 000 x 5/100 = 17 500.", "17500"),
    ("That makes $400 000 - $282 000 = $118 000", "118000"),
    (r"The answer is 12\ 000 dollars.", "12000"),
    ("It was in 2020 300 people", "300"),
    ("She calls 555 123 4567", "4567"),
    ("She has 4 250ml cups", "250"),
    ("She has 2 100-gram bars", "100"),
    ("The answer is 5 125/1000 hours.", "5 125/1000"),
    ("The answer is 5 12 times.", "5"),
    # What looks like a statement and is none.
    ("The answer is not 5 but 7", "7"),
    ("The answer cannot be 5. It is 7", "7"),
    ("A wrong answer is 5. I get 7", "7"),
    ("Answer: Natalia sold 48 clips, then 24, so 72", "72"),
    ("Answer:\n\n1. She sold 48.\n2. She sold 24.\n\nTogether 72", "72"),
    ("#### 1. First, 48\n#### 2. Then 24\n\nSo 72", "72"),
    (r"I write \boxed{seventy-two}, so 72", "72"),
    (r"The answer is 72. \boxed{", "72"),
    # The last number, where nothing is stated.
    ("72", "72"),
    ("72.", "72"),
    ("$1,234.50", "1234.50"),
    ("3 apples and 4 pears so 7", "7"),
    ("She needs 10-3 of them", "3"),
    ("5 - 3", "3"),
    ("It is (-3)", "-3"),
    ("1,2,3", "3"),
    ("H2O is 18 g. It is wet", "18"),
    ("So...72", "72"),
    ("The ratio is 3:4", "4"),
    ("1. Add 48 and 24\n2. That makes 72\n3. Done", "72"),
    ("1. Yes\n2. No", "2"),
    # No number.
    ("", None),
    ("seventy-two", None),
    ("The answer is unknown.", None),
    ("GPT4 cannot say", None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_numbers(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 72.", "72"),
        ("The answer is 72. There are 5", "72"),
        ("The answer is 72", None),  # 72 of 720?
        ("The answer is 1,", None),
        ("The answer is 48 + 24", None),
        ("The answer is 48 + 24 = ", None),
        ("The answer is 48 + 24 = 7", None),
        ("The answer is 48 + 24 = 72 clips", "72"),
        ("The answer is 72 = 48 + 24", "72"),
        ("The answer is 12 miles in 3-4 hours", "12"),
        ("The answer is 1/", None),
        ("The answer is 15. Let me check: the answer is 1", "15"),
        (r"so \boxed{72}", "72"),
        (r"so \boxed{72", None),
        ("48 + 24 = 72. There", None),
        ("", None),
    ],
)
def test_numbers_of_a_text_that_was_cut(text, number):
    assert extract_number(text, False) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("The answer is " + "1/" * 4000, "1/1"), ("The answer is 1" + " + 1" * 4000, "1"), ("1" * 9000, "1" * 9000)]
    + [
        ("The answer is " + part * 4000, None)
        for part in ("answer ", "= ", "$", r"\boxed{", "(", "x ", " ", "#### ", "**")
    ],
)
def test_texts_that_repeat_themselves_are_read_in_no_time(text, number):
    assert extract_number(text) == number
    assert extract_option(text, "ABCDE") is None
    assert extract_math(text, False) is None or number is not None
