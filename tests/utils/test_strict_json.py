"""JSON that people write: it is read, or refused with a `ValueError` that says what is wrong."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_kad.utils.strict_json import DEEPEST, parse_json, parse_json_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_what_json_writes_is_read_from_text_and_from_bytes(value):
    text = json.dumps(value)
    assert parse_json(text) == value
    assert parse_json(text.encode()) == parse_json(b"\xef\xbb\xbf" + text.encode()) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ("{'a': 1}", "double quotes"),
        (b"caf\xe9", "0xe9"),
        ('{"a": 1, "a": 1}', "an object has the key 'a' twice"),
        ('[{"b": {"c": 1, "d": 2, "c": 3}}]', "an object has the key 'c' twice"),
        ("1" * 5000, "digits"),
        ("[" * 100_000, f"nested more than {DEEPEST} levels deep"),
    ],
)
@pytest.mark.parametrize("parse", [parse_json, parse_json_object])
def test_what_is_wrong_is_a_value_error_that_says_so(parse, text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_values_are_read_to_the_documented_depth_and_refused_beyond_it(opening, closing):
    def nested(levels):
        return opening * levels + "1" + closing * levels

    assert parse_json(nested(DEEPEST)) is not None
    with pytest.raises(ValueError, match=f"nested more than {DEEPEST} levels"):
        parse_json(nested(DEEPEST + 1))


def test_the_same_key_in_two_objects_is_read():
    assert parse_json('[{"a": 1}, {"a": {"a": 2}}]') == [{"a": 1}, {"a": {"a": 2}}]


@pytest.mark.parametrize("text", ["[]", "null", "3", '"a"', "[{}]"])
def test_an_object_is_needed_where_one_is_asked_for(text):
    with pytest.raises(ValueError, match="a JSON object is needed, got "):
        parse_json_object(text)
    assert parse_json_object("{}") == {}
