"""Whether a record has the fields that a program reads."""

import re

import pytest

from transformers_kad.recipes.record_fields import check_fields

FIELDS = {
    "count": (int,),
    "name": (str, type(None)),
    "right": (bool,),
    "masses": [(int, float)],
    "times": {str: {"seconds": (int, float)}},
    "inner": {"size": (int,)},
}
RECORD = {
    "count": 1,
    "name": None,
    "right": True,
    "masses": [0, 0.5],
    "times": {"a": {"seconds": 1.5}, "b": {"seconds": 2}},
    "inner": {"size": 3, "more": "x"},
    "more": float("nan"),
}


def test_a_record_may_have_more_fields():
    check_fields(RECORD, FIELDS, "line 1")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": True}, "line 1: 'count' is True, not of type int"),
        ({"count": -1}, "line 1: 'count' is -1, not a finite number from 0 on"),
        ({"count": 1.0}, "line 1: 'count' is 1.0, not of type int"),
        ({"name": 5}, "line 1: 'name' is 5, not of type str or null"),
        ({"right": 1}, "line 1: 'right' is 1, not of type bool"),
        ({"masses": 0.5}, "line 1: 'masses' is 0.5, not a list"),
        ({"masses": [0.5, float("inf")]}, "line 1: 'masses'[1] is inf, not a finite number"),
        ({"masses": [float("nan")]}, "line 1: 'masses'[0] is nan"),
        ({"times": {"a": {}}}, "line 1, 'times', 'a' has no 'seconds'"),
        ({"times": {"a": 5}}, "line 1, 'times', 'a' must be an object, got 5"),
        ({"times": []}, "line 1, 'times' must be an object, got []"),
        ({"inner": {"size": "3"}}, "line 1, 'inner': 'size' is '3'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_fields(RECORD | changed, FIELDS, "line 1")


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_missing_is_named(name):
    with pytest.raises(ValueError, match=f"^line 1 has no '{name}'"):
        check_fields({key: value for key, value in RECORD.items() if key != name}, FIELDS, "line 1")


@pytest.mark.parametrize("found", [None, [], "x", 5])
def test_a_record_is_an_object(found):
    with pytest.raises(ValueError, match="must be an object"):
        check_fields(found, FIELDS, "line 1")


def test_a_huge_value_is_shortened():
    with pytest.raises(ValueError, match="'count' is 'xxx") as error:
        check_fields(RECORD | {"count": "x" * 10_000}, FIELDS, "line 1")
    assert len(str(error.value)) < 500
