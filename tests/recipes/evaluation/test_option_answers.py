"""Options out of texts: what the extractor finds in nasty outputs."""

import pytest

from transformers_kad.recipes.evaluation.option_answers import extract_option

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
