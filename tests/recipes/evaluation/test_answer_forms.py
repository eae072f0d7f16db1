"""The form that an instruction asks for, to the letter."""

import pytest

from transformers_kad.recipes.evaluation.answer_forms import boxed, number_sentence, option_sentence
from transformers_kad.recipes.evaluation.tasks import TASKS, get_task


@pytest.mark.parametrize(
    ("text", "has_form"),
    [
        ("48 / 2 = 24. The answer is 24.", True),
        ("The answer is -1,234.50.\n", True),
        ("So\nThe answer is 1/2.", True),
        ("<think>The answer is four.</think>The answer is 4.", True),
        ("The answer is 24", False),
        ("The answer is 24 eggs.", False),
        ("The answer is $24.", False),
        ("**The answer is 24.**", False),
        ("The answer is 24. I hope that helps.", False),
        ("#### 24", False),
        ("<think>The answer is 4.", False),
        ("", False),
    ],
)
def test_the_sentence_with_the_number(text, has_form):
    assert number_sentence(text, True) is has_form
    assert not number_sentence(text, False)


@pytest.mark.parametrize(
    ("text", "has_form"),
    [
        ("Bats fly. The answer is (B).", True),
        ("The answer is (E).", False),
        ("The answer is B.", False),
        ("The answer is (B). (A) is wrong.", False),
        ("The answer is (b).", False),
    ],
)
def test_the_sentence_with_the_letter(text, has_form):
    assert option_sentence("ABCD")(text, True) is has_form


@pytest.mark.parametrize(
    ("text", "has_form"),
    [(r"Hence \boxed{\frac{1}{2}}.", True), (r"\boxed{}", False), (r"\boxed{5", False), ("5", False)],
)
def test_the_box(text, has_form):
    assert boxed(text, True) is has_form
    assert not boxed(text, False)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.form is not None])
def test_an_ideal_answer_has_the_form_and_a_bare_number_or_letter_has_not(name, request):
    task = get_task(name)
    fixtures = request.path.parent / "fixtures"
    for instance in task.load(data_dir=fixtures, limit=5):
        wrong = instance.answer
        assert not task.form(wrong, True)
        if name != "math500":  # whose solutions explain more than the box
            assert task.form(instance.solution, True)
            assert not task.form(instance.solution, False)


def test_every_task_with_an_instruction_for_its_answer_has_a_form():
    asked = {name for name, task in TASKS.items() if task.extract is not None}
    assert asked == {name for name, task in TASKS.items() if task.form is not None}
