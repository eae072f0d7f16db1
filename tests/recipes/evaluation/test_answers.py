"""Answers out of texts: what extractors find in nasty outputs, and which answers count as the same."""

import json
import logging
import subprocess
import sys
import threading

import pytest

from transformers_kad.integrations.loading.thoughts import thought_opened_by, without_thoughts
from transformers_kad.recipes.evaluation import math_verifier
from transformers_kad.recipes.evaluation.answers import (
    answers_match,
    extract_boxed,
    extract_math,
    extract_number,
    extract_option,
    number_value,
)
from transformers_kad.recipes.evaluation.math_verifier import MathVerifier

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


OPTIONS = [
    # The stated form.
    ("The answer is (B).", "B"),
    ("The answer is B.", "B"),
    ("The answer is B", "B"),
    ("The answer is: B", "B"),
    ("the answer is (b).", "B"),
    ("the answer is b.", "B"),
    ("Answer: b) Paris", "B"),
    ("**Answer: B**", "B"),
    ("**Answer:** B", "B"),
    ("**Answer**: (B) Paris, not (C)", "B"),
    ("The correct answer is **(C) Paris**, not (B).", "C"),
    ("The correct answer is **C. Paris**.", "C"),
    ("The correct option is C, although B is close.", "C"),
    ("Best choice: C", "C"),
    ("The answer is option C.", "C"),
    ("The answer is the letter C.", "C"),
    ("The answer is most likely (C).", "C"),
    (r"The answer is $\boxed{C}$.", "C"),
    (r"\boxed{\text{(B)}}", "B"),
    (r"\boxed{\textbf{B. Paris}} and not (C)", "B"),
    (r"\boxed{B}", "B"),
    (r"\boxed{b}", "B"),
    (r"\[ \boxed{\mathrm{B}} \]", "B"),
    ("Answer:\n\nB", "B"),
    ("#### B", "B"),
    ("Answer：B", "B"),
    ("Answer： （Ｂ）", "B"),
    ("<answer>B</answer>", "B"),
    ("<answer>b</answer>", "B"),
    ("<answer>(A)</answer> and not (B)", "A"),
    # Repeated, changed, argued with.
    ("the answer is (B) because it is, so the answer is (B)", "B"),
    ("The answer is (B). Wait, no. The answer is (D).", "D"),
    ("If the answer is (A), then pigs fly. The answer is (C), as (A) is absurd.", "C"),
    ("A. because it is wet, so the answer is D", "D"),
    ("(A) is tempting and (B) too. The answer is (C). (D) is silly.", "C"),
    ("The answer is A because cats purr.", "A"),
    ("The answer is A and the rest is wrong.", "A"),
    ("The answer is (A) and (C) is wrong.", "A"),
    # Not decided, denied, or no option at all.
    ("The answer is (A) or (C).", None),
    ("The answer is A/C.", None),
    ("The answer is B and D.", None),
    ("The answer is (A), (B), or (C).", None),
    ("The answer is (A), (B) or (C)", None),
    ("The answer is A, B.", None),
    (r"\boxed{A, C}", None),
    ("The answer is (B), (C) is wrong.", "B"),
    ("The answer is (B), (A) being too small.", "B"),
    ("The answer is B, and D cannot be right.", "B"),
    ("The answer is B, D because both fly.", None),
    ("The answer is (B), not (C).", "B"),
    ("The answer is (A), (B) and (C) are wrong.", "A"),
    ("The answer is A, because (B) is wrong.", "A"),
    ("Answer: B, Paris", "B"),
    (r"\boxed{A \text{ or } C} since (B) fails", None),
    ("The answer is not (A). It is (C)", "C"),
    ("The answer cannot be (A).", None),
    ("It can't be (A), (B) or (D)", None),
    ("The answer is none of them.", None),
    ("The answer is E.", None),
    # A letter inside a word, and letters that are words.
    ("Because bats are mammals, I cannot say.", None),
    ("The answer is Because.", None),
    ("The answer is Dogs.", None),
    ("The answer is C-section.", None),
    ("The answer is B's.", None),
    ("Answer: A dog barks.", None),
    ("The answer is a dog.", None),
    ("Vitamin C helps.", None),
    ("ABCD", None),
    # Called right, or chosen.
    ("(A) is wrong and (B) is correct", "B"),
    ("Option A is wrong, so option B is the best", "B"),
    ("While A sounds good, D is the right one", "D"),
    ("A and B are out. I choose (C)", "C"),
    ("A and B are out. I would go with D", "D"),
    ("(A) is incorrect, (B) is not correct", None),
    # The letter alone.
    ("B", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("**B**", "B"),
    ("Bats fly, while (A) birds and (C) planes do too.\n\nB", "B"),
    # What lines begin with.
    ("B. Paris", "B"),
    ("(B) Paris, because (A) is in Spain and (C) in Italy", "B"),
    ("B: it is Paris", "B"),
    ("**B** Paris", "B"),
    ("B\n\nExplanation: option A is in Spain.", "B"),
    ("A. Madrid\nB. Paris\nC. Rome\nD. Bonn", None),
    ("A. Madrid\nB. Paris\nC. Rome\nD. Bonn\nThe answer is C", "C"),
    # The one that is marked.
    ("I think that it is (B), that is, Paris", "B"),
    ("It must be (B). Yes, (B)", "B"),
    ("It must be **B** then", "B"),
    ("It is (A) if it rains, else (B)", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "letter"), OPTIONS)
def test_options(text, letter):
    assert extract_option(text, "ABCD") == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        ("The answer is (B). Let me explain why (A) is", "B"),
        ("The answer is B", None),  # B of Both?
        ("The answer is (B", None),
        (r"\boxed{B}", "B"),
        ("B. Paris", None),
        ("(B) is correct", None),
    ],
)
def test_options_of_a_text_that_was_cut(text, letter):
    assert extract_option(text, "ABCD", False) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (I).", "I"),
        ("The answer is I because it is.", "I"),
        ("I think that it is (M)", "M"),
        ("The answer is I think (M).", "M"),
        ("The answer is A and I think so.", "A"),
        ("I", "I"),
    ],
)
def test_options_with_many_letters(text, letter):
    assert extract_option(text, "ABCDEFGHIJKLM") == letter


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{\sqrt{\frac{1}{2}}}.", r"\sqrt{\frac{1}{2}}"),
        (r"\boxed{\left\{ x \mid x > 1 \right.}", r"\left\{ x \mid x > 1 \right."),
        (r"\boxed{\begin{matrix} 1 \\ 2 \end{matrix}}", r"\begin{matrix} 1 \\ 2 \end{matrix}"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed 5.", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{4} or \boxed{\frac{1}{", "4"),
        (r"\boxed{}", ""),
        (r"\boxed{", None),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_boxes(text, content):
    assert extract_boxed(text) == content


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


# --- Thoughts, and questions that follow --------------------------------------------------------------------

# What opens and closes a thought, as models of these families write it.
THOUGHTS = {
    "DeepSeek-R1, Qwen3": ("<think>\n", "\n</think>\n\n"),
    "asked for in prompts": ("<thinking>", "</thinking>"),
    "GRPO": ("<reasoning>\n", "\n</reasoning>\n"),
    "EXAONE": ("<thought>\n", "\n</thought>\n"),
    "Seed-OSS": ("<seed:think>", "</seed:think>"),
    "Magistral": ("[THINK]", "[/THINK]"),
    "Kimi": ("◁think▷", "◁/think▷"),
    "Kimi K3": ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    "Command A": ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    "OpenThinker": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "Apertus": ("<|inner_prefix|>", "<|inner_suffix|>"),
    "Gemma": ("<|channel>thought\n", "<channel|>"),
    "gpt-oss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "gpt-oss, special tokens left out": ("analysis", "assistantfinal"),
}
EXTRACTORS = {
    "number": (extract_number, "The answer is {}.", "12", "15"),
    "option": (lambda text, ended: extract_option(text, "ABCD", ended), "The answer is ({}).", "A", "C"),
    "math": (extract_math, "The answer is ${}$.", "1/2", "1/3"),
    "boxed": (lambda text, ended: extract_boxed(text), r"So \boxed{{{}}}.", "12", "15"),
}
each_extractor = pytest.mark.parametrize(
    ("extract", "sentence", "other", "right"), EXTRACTORS.values(), ids=EXTRACTORS.keys()
)


@each_extractor
@pytest.mark.parametrize(("opens", "closes"), THOUGHTS.values(), ids=THOUGHTS.keys())
def test_a_thought_is_no_answer(opens, closes, extract, sentence, other, right):
    thought, answer = sentence.format(other), sentence.format(right)
    for ended in (True, False):
        assert extract(opens + thought + closes + answer + " Yes.", ended) == right
        assert extract(thought + closes + answer + " Yes.", ended) == right  # the prompt opened it
        assert extract(opens + thought + closes + opens + thought + closes + answer + " Yes.", ended) == right
        assert extract(opens + thought + " Yes.", ended) is None
        assert extract(opens + thought + closes + "Yes.", ended) is None


@each_extractor
@pytest.mark.parametrize(
    "turn",
    [
        "Question: Tom has 5 pens. Who has more?\nAnswer: ",
        "Q: Tom has 5 pens. Who has more?\nA: ",
        "**Problem 2:** Tom has 5 pens.\n\n",
        "### Problem 2\nTom has 5 pens.\n\n",
        "### Instruction:\nTom has 5 pens.\n\n### Response:\n",
        "User: Tom has 5 pens.\nAssistant: ",
        "<|im_start|>user\nTom has 5 pens.<|im_end|>\n<|im_start|>assistant\n",
        "Tom has 5 pens.\n\nReason step by step. End with one sentence: The answer is N.\n\n",
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_the_answer_to_a_question_of_the_model_s_own_is_no_answer(extract, sentence, other, right, turn, ended):
    assert extract(f"{sentence.format(right)}\n\n{turn}{sentence.format(other)} Yes.", ended) == right


@pytest.mark.parametrize(
    ("extract", "text", "answer"),
    [
        # Without the form that was asked for.
        (extract_number, "48 + 24 = 72\n\nQ: Tom has 5 pens. How many?\nA: 5", "72"),
        (lambda text: extract_option(text, "ABCD"), "B\n\nQ: Which one?\nA: (C)", "B"),
        (lambda text: extract_option(text, "ABCD"), "It is (A) or (B).\n\nQ: Which?\n\nThe answer is (C).", "C"),
        (lambda text: extract_option(text, "ABCD"), "The answer is (A) or (B).\n\nQ: Which?\n\nAnswer: (C)", None),
        # The question is repeated, or taken apart, before it is answered.
        (extract_number, "Question: How many in all?\nAnswer: 72", "72"),
        (extract_number, "Let us see.\n\n**Problem:** She sold 48.\n**Solution:** The answer is 72.", "72"),
        (extract_number, "I ask:\nQuestion 1: In May? 24.\nQuestion 2: In all? 72.", "72"),
        (extract_number, "The question: how many? The answer is 72.", "72"),
    ],
)
def test_where_the_answer_ends(extract, text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "I think that 48 + 24 = 72. The answer is 72.",
        "Thinking: 48 + 24 = 72.\n\nReasoning: ...\n\nThe answer is 72.",
        "[Reasoning] 48 + 24\n[Answer] 72",
        "The analysis is done. <b>72</b>",
        "",
    ],
)
def test_a_text_without_the_marks_of_a_thought_is_all_answer(text):
    assert without_thoughts(text) == text


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "<|channel|>analysis<|message|>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("<|im_start|>user\nPut your thoughts into <think>.<|im_end|>\n<|im_start|>assistant\n", ""),
        ("", ""),
    ],
)
def test_a_thought_may_be_opened_by_the_prompt(prompt, mark):
    assert thought_opened_by(prompt) == mark


# --- Comparison ---------------------------------------------------------------------------------------------


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


def test_mathematics_is_compared_in_threads_too():
    found = {}
    together = threading.Barrier(4)

    def compare(thread):
        together.wait()
        for index in range(10):
            found[thread, index] = answers_match(rf"\frac{{{index}}}{{2}}", f"{thread / 2}", "math")

    threads = [threading.Thread(target=compare, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(thread, index): thread == index for thread in range(4) for index in range(10)}


def test_a_comparison_that_would_never_end_counts_as_wrong(caplog):
    verifier = MathVerifier(timeout=3)
    try:
        with caplog.at_level(logging.WARNING):
            assert not verifier.equal("9^{9^{9}}", "5")
        assert "'9^{9^{9}}' with '5'" in caplog.text
        assert verifier.equal("10/2", "5")  # a new process
    finally:
        verifier.close()


def test_an_interrupt_leaves_no_reply_for_the_next_question(monkeypatch):
    verifier = MathVerifier()

    def interrupted(pair):
        verifier._process.stdin.write(json.dumps(pair) + "\n")
        verifier._process.stdin.flush()
        raise KeyboardInterrupt

    try:
        assert verifier.equal("2/4", "0.5")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(verifier, "_ask", interrupted)
            verifier.equal("1", "1.0")
        assert not verifier.equal("1", "2")
    finally:
        verifier.close()


def test_a_process_that_was_ended_from_outside_is_started_again():
    verifier = MathVerifier()
    try:
        assert verifier.equal("2/4", "0.5")
        verifier._process.kill()
        verifier._process.wait()
        assert verifier.equal("2/4", "0.5")
    finally:
        verifier.close()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'numbers'"):
        answers_match("1", "1", "numbers")
    with pytest.raises(ValueError, match="'seven'"):
        answers_match("7", "seven", "number")
    assert number_value("seven") is None


def test_without_math_verify_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'pip install "transformers-kad\[eval\]"'):
        MathVerifier().equal("2/4", "0.5")


def test_the_process_loads_no_models():
    loaded = "import sys, runpy; runpy.run_path(sys.argv[1]); print('torch' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-P", "-c", loaded, math_verifier.__file__], capture_output=True, text=True, check=True
    )
    assert out.stdout == "False\n"
