"""Constraints that a program checks, the package's own prompts, and files with instructions."""

import json

import pytest

from transformers_kad.recipes.evaluation.instructions import CONSTRAINTS, follows, strict_and_loose
from transformers_kad.recipes.evaluation.prompt_files import read_instructions
from transformers_kad.recipes.evaluation.tasks import get_task

CASES = [
    ({"name": "words", "exactly": 4}, "It's a well-known fact.", "It is a well known fact."),
    ({"name": "sentences", "exactly": 2}, 'He said "no." Why', "One. Two. Three."),
    ({"name": "sentences", "at_most": 1}, "Costs are 3.50 euros.", "No. Yes."),
    ({"name": "paragraphs", "exactly": 2}, "a\nb\n\n\nc", "a\n\nb\n\nc"),
    ({"name": "lines", "exactly": 2}, "a\n\nb", "a b"),
    ({"name": "bullets", "at_least": 2}, "- a\n* b", "- a\n-b"),
    ({"name": "numbered_items", "exactly": 2}, "1. a\n2) b", "1. a"),
    ({"name": "headings", "exactly": 1}, "# a\n#b", "a # b"),
    ({"name": "contains", "phrases": ["grey", "old cat"]}, "An Old cat, Grey.", "a greyish old cat"),
    ({"name": "avoids", "phrases": ["honey"]}, "Honeycombs", "sweet HONEY"),
    ({"name": "repeats", "phrase": "light", "exactly": 2}, "light, Light, lighter", "light"),
    ({"name": "avoids_characters", "characters": ",;"}, "a.b", "a;b"),
    ({"name": "starts_with", "phrase": "Good"}, "Good day", "good day"),
    ({"name": "ends_with", "phrase": "day."}, "A day.", "A day"),
    ({"name": "one_of", "phrases": ["Yes", "No"]}, " No\n", "No."),
    ({"name": "lowercase"}, "abc 1", "Abc"),
    ({"name": "uppercase"}, "ABC 1", "123"),
    ({"name": "quoted"}, '"a"', '"a" he said'),
    ({"name": "json_object", "keys": ["a", "b"]}, '{"b": 1, "a": 2}', '{"a": 1, "b": 2, "c": 3}'),
    ({"name": "json_object", "keys": ["a"]}, '{"a": 1}', '```\n{"a": 1}\n```'),
    ({"name": "initials", "letters": "SUN"}, "See\n\nunder\nnets", "See\nunder"),
]


@pytest.mark.parametrize(("constraint", "right", "wrong"), CASES, ids=lambda value: str(value)[:40])
def test_a_constraint(constraint, right, wrong):
    assert follows(right, constraint)
    assert not follows(wrong, constraint)
    assert not follows(" \n", constraint)


def test_every_constraint_has_a_case():
    assert {constraint["name"] for constraint, *_ in CASES} == {*CONSTRAINTS}


def test_a_loose_check_forgives_a_first_line_a_last_line_and_asterisks():
    constraints = [{"name": "starts_with", "phrase": "A"}, {"name": "one_of", "phrases": ["A"]}]
    assert strict_and_loose(constraints, "Sure:\nA\nBye!") == ([False, False], [True, True])
    assert strict_and_loose(constraints, "**A**") == ([False, False], [True, True])
    assert strict_and_loose(constraints, "Sure:\n\nno\nA") == ([False, False], [False, False])


def test_the_own_prompts_can_be_followed_and_are_not_followed_by_any_text():
    task = get_task("instructions")
    instances = task.load()
    assert len({instance.question for instance in instances}) == 30
    assert {constraint["name"] for row in read_instructions(None) for constraint in row["constraints"]} == {
        *CONSTRAINTS
    }
    for instance in instances:
        ideal = task.score(instance, instance.solution, True)
        assert ideal["correct"] and all(ideal["followed"]), instance
        assert ideal["prediction"] == instance.answer
        others = [other.solution for other in instances if other.id != instance.id]
        assert not all(task.score(instance, other, True)["correct"] for other in others), instance


def test_the_score_of_an_answer_that_follows_some_constraints():
    task = get_task("instructions")
    instance = next(one for one in task.load() if "without using" in one.question)
    score = task.score(instance, "<think>honey?</think>Bees fly.", True)
    assert (score["followed"], score["correct"], score["correct_lenient"]) == ([True, False], False, False)
    assert score["prediction"] == 'avoids phrases=["honey", "flower", "flowers"]'
    assert score["answer"] == f"{score['prediction']}\nwords at_least=25"
    for text in (None, "<think>Bees"):  # failed, and a thought that is still open
        nothing = task.score(instance, text, True)
        assert (nothing["prediction"], nothing["correct"], nothing["followed"]) == (None, False, [False, False])


def test_instructions_of_ones_own(tmp_path):
    file = tmp_path / "own.jsonl"
    rows = [{"prompt": "Say a.", "constraints": [{"name": "one_of", "phrases": ["a"]}]}, {"prompt": "b"}]
    file.write_text("\n".join(map(json.dumps, rows[:1])))
    (instance,) = get_task("instructions").load(prompts=str(file))
    assert get_task("instructions").score(instance, "a", True)["correct"]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"own.jsonl', line 3: \"constraints\" must be a list of at least one"):
        get_task("instructions").load(prompts=str(file))


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"name": "wordz", "at_least": 3}, "Unknown constraint 'wordz'. Did you mean 'words'"),
        ({"at_least": 3}, 'a constraint must be an object with a "name"'),
        ("words", 'a constraint must be an object with a "name"'),
        ({"name": "words", "minimum": 3}, "'words' can't be used with {'minimum': 3}"),
        ({"name": "words"}, "'words' needs one of at_least, at_most, exactly"),
        ({"name": "words", "at_least": "3"}, "'at_least' of the constraint 'words' must be a whole number, got '3'"),
        ({"name": "contains", "phrases": "cat"}, "must be a list of texts, got 'cat'"),
        ({"name": "contains"}, "missing a required"),
        ({"name": "starts_with", "phrase": ""}, "must be a text, got ''"),
    ],
)
def test_a_wrong_constraint_is_named_with_its_line(constraint, message, tmp_path):
    file = tmp_path / "own.jsonl"
    fine = {"prompt": "Say a.", "constraints": [{"name": "quoted"}]}
    file.write_text(f"{json.dumps(fine)}\n{json.dumps({'prompt': 'x', 'constraints': [constraint]})}\n")
    with pytest.raises(ValueError) as raised:
        read_instructions(str(file))
    assert f"{str(file)!r}, line 2: " in str(raised.value)
    assert message in str(raised.value)


def test_a_prompt_of_several_turns_is_refused(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}], "constraints": [{"name": "quoted"}]}))
    with pytest.raises(ValueError, match='line 1: instructions are given as "prompt"'):
        read_instructions(str(file))
