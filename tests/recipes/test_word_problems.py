"""The tiny pair's task: splits, problems and scorers."""

import re
from collections import Counter
from itertools import pairwise

import pytest

from transformers_kad.recipes import word_problems as task


@pytest.mark.parametrize("triple", [(12, "+", 7), (50, "+", 49), (3, "+", 3), (1, "+", 98)])
def test_a_fact_family_shares_one_split(triple):
    a, _, b = triple
    family = [(a, "+", b), (b, "+", a), (a + b, "-", a), (a + b, "-", b)]
    assert len({task.split_of(member) for member in family}) == 1


def test_the_hash_holds_out_a_twentieth_and_no_pattern():
    triples = [(a, "+", b) for a in range(1, 99) for b in range(1, 100 - a)]
    held_out = [t for t in triples if task.split_of(t) != "train"]
    assert 0.07 < len(held_out) / len(triples) < 0.13
    # A linear hash would hold out all sums with one last digit, and teach nothing about them.
    last_digits = Counter(((a % 10), (b % 10)) for a, _, b in triples)
    lost = Counter(((a % 10), (b % 10)) for a, _, b in held_out)
    assert max(lost[pair] / count for pair, count in last_digits.items()) < 0.5


def test_splits_share_no_triple_and_no_fact():
    facts = {}
    for split in task.SPLITS:
        triples = {t for problem in task.make_problems(split, 400) for t in problem.triples}
        assert {task.split_of(t) for t in triples} == {split}
        facts[split] = {frozenset((a, b) if op == "+" else (a - b, b)) for a, op, b in triples}
    assert not facts["train"] & facts["test"]
    assert not facts["train"] & facts["validation"]
    assert not facts["validation"] & facts["test"]


def test_problems_are_deterministic_distinct_and_depend_on_the_seed():
    problems = task.make_problems("test", 600, seed=3)
    assert problems == task.make_problems("test", 600, seed=3)
    assert len({problem.question for problem in problems}) == 600
    assert problems[:50] == task.make_problems("test", 50, seed=3)
    assert problems != task.make_problems("test", 600, seed=4)
    assert {len(problem.triples) for problem in problems} == {1, 2}


def test_problems_are_frozen():
    (problem,) = task.make_problems("test", 1)
    with pytest.raises(AttributeError):
        problem.answer = 3


@pytest.mark.parametrize(
    ("split", "count", "named"), [("tset", 3, "'tset'"), ("test", -4, "-4"), ("test", 2.5, "2.5")]
)
def test_bad_arguments_are_named(split, count, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        task.make_problems(split, count)


PROBLEM = task.Problem("Mia has 12 cups. Mia buys 7 more. How many?", "", 19, ((12, "+", 7),))


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("We get 12 + 7 = 19. The answer is 19.<|end|>", True, True),
        ("We get 12 + 7 = 19. The answer is 19<|end|>", True, True),
        ("We get 12 + 7 = 19. The answer is 19.<|end|><|pad|><|pad|>", True, True),
        ("The answer is 19.<|end|>", True, True),
        ("We get 12 + 7 = 20. The answer is 19.<|end|>", True, False),
        ("We get 12 + 7 = 19. The answer is 19.", False, True),  # no end of sequence
        ("We get 12 + 7 = 19. The answer is 19.\n<|end|>", False, True),
        ("We get 12 + 7 = 19. The answer is 19. Ada<|end|>", False, True),
        ("We get 12 + 7 = 18. The answer is 18.<|end|>", False, False),
        ("The answer is 19. The answer is 19.<|end|>", False, True),
        ("The answer is 18. The answer is 19.<|end|>", False, True),
        ("The answer is 19. The answer is 18.<|end|>", False, False),
        ("The answer is 19.<|end|>The answer is 19.<|end|>", False, True),
        ("We stop.<|end|>The answer is 19.<|end|>", False, False),
        ("The answer is 190.<|end|>", False, False),
        ("The answer is -19.<|end|>", False, True),
        ("The answer is 019.<|end|>", False, True),
        ("The answer is .<|end|>", False, False),
        ("12 + 7 = 19\nBen has 3 cups.", False, True),
        ("\n\nSo 12 + 7 = 19, and 5 + 6 =", False, True),
        ("12 + 7 = 19, 19 - 3 = 16", False, False),
        ("Ben has 3 cups.\n12 + 7 = 19", False, False),
        ("12 + 7 = and 19", False, False),
        ("The cat sees the door.", False, False),
        ("", False, False),
        ("<|end|>", False, False),
    ],
)
def test_scores(text, strict, lenient):
    assert task.is_correct(text, PROBLEM) is strict
    assert task.is_correct_lenient(text, PROBLEM) is lenient


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("12 + 7 = 19. The answer is 18.<|end|>", "18", "19"),
        ("12 + 7 = 019. The answer is 018.<|end|>", "018", "19"),
        ("The answer is 0.<|end|>", "0", "0"),
        ("The answer is 19.", None, "19"),
        ("The cat sees the door.<|end|>", None, None),
        ("<think>\n12 + 7 = 18. The answer is 18.\n</think>\n\n12 + 7 = 19. The answer is 19.<|end|>", "19", "19"),
        ("12 + 7 = 18. The answer is 18.\n</think>\n\n12 + 7 = 19. The answer is 19.<|end|>", "19", "19"),
        ("<think>12 + 7 = 19. The answer is 19.<|end|>", None, None),
    ],
)
def test_extraction(text, strict, lenient):
    assert task.extract_answer(text) == strict
    assert task.extract_answer_lenient(text) == lenient


def test_the_ideal_answer_is_correct_and_another_problem_s_is_not():
    problems = task.make_problems("validation", 100)
    for problem, other in pairwise(problems):
        assert task.is_correct(problem.solution + task.EOS, problem)
        assert task.is_correct_lenient(problem.solution, problem)
        assert task.is_correct(other.solution + task.EOS, problem) == (other.answer == problem.answer)
