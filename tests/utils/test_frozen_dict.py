"""A dictionary that can't be changed."""

import copy
import json
import pickle

import pytest

from transformers_kad.utils.frozen_dict import FrozenDict

CHANGES = {
    "set": lambda items: items.__setitem__("budget", 1),
    "add": lambda items: items.__setitem__("other", 1),
    "delete": lambda items: items.__delitem__("budget"),
    "or": lambda items: items.__ior__({"other": 1}),
    "update": lambda items: items.update(other=1),
    "setdefault": lambda items: items.setdefault("other", 1),
    "pop": lambda items: items.pop("budget"),
    "popitem": lambda items: items.popitem(),
    "clear": lambda items: items.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_way_to_change_a_dictionary_is_refused(change):
    items = FrozenDict({"budget": 0.5})
    with pytest.raises(TypeError, match=r"\{'budget': 0.5\} can't be changed"):
        CHANGES[change](items)
    assert items == {"budget": 0.5}


def test_no_method_that_changes_a_dictionary_is_left_out():
    """Of a dictionary's own methods, only these leave it as it is."""
    harmless = {"copy", "fromkeys", "get", "items", "keys", "values"}
    own = {name for name in vars(dict) if not name.startswith("_")} | {"__setitem__", "__delitem__", "__ior__"}
    assert {name for name in own if getattr(FrozenDict, name) is FrozenDict._refuse} == own - harmless


def test_equal_dictionaries_have_equal_hashes_in_whatever_order():
    one, other = FrozenDict({"a": 1, "b": "x"}), FrozenDict({"b": "x", "a": 1.0})
    assert (one, hash(one)) == (other, hash(other))
    assert one != FrozenDict({"a": 2, "b": "x"})
    assert len({one, other, FrozenDict()}) == 2


def test_what_cannot_be_hashed_makes_no_hash():
    with pytest.raises(TypeError, match="unhashable"):
        hash(FrozenDict({"a": []}))


def test_copies_and_json_are_those_of_a_dictionary():
    items = FrozenDict({"a": 1, "b": "x"})
    for again in (copy.copy(items), copy.deepcopy(items), pickle.loads(pickle.dumps(items))):
        assert (type(again), again) == (FrozenDict, items)
    assert json.loads(json.dumps(items)) == {**items} == {"a": 1, "b": "x"}


def test_it_does_not_change_with_the_dictionary_that_it_was_made_from():
    source = {"a": 1}
    items = FrozenDict(source)
    source["a"] = 2
    assert items == {"a": 1}
