"""Which pairs visitors may use, and that each is loaded once and few are kept."""

from pathlib import Path

import pytest

from transformers_kad.recipes.pair import Pair
from transformers_kad.recipes.playground import pairs
from transformers_kad.recipes.playground.pairs import LoadedPairs, PairNames, pairs_from_environment

PAIR = Path(__file__).resolve().parents[3] / "recipes" / "tiny_pair"
BASE, PROXY = str(PAIR / "base"), str(PAIR / "proxy")


@pytest.fixture
def loads(monkeypatch):
    """The names of the pairs that are loaded, in order; no model is."""
    loaded = []
    monkeypatch.setattr(pairs, "Pair", lambda models: loaded.append((models.base, models.proxy, models.reference)))
    return loaded


def test_a_pair_is_loaded_once():
    loaded = LoadedPairs(PairNames(BASE, PROXY))
    pair = loaded.get(BASE, PROXY)
    assert isinstance(pair, Pair)
    assert loaded.get(f" {BASE} ", PROXY) is pair


def test_the_pairs_that_were_used_last_are_kept(loads):
    loaded = LoadedPairs(PairNames("a/base", "a/proxy", "a/reference"), kept=2)
    for base in ("a", "b", "a", "c", "a", "b"):
        loaded.get(f"{base}/base", f"{base}/proxy")
        assert len(loaded) <= 2
    assert loads == [
        ("a/base", "a/proxy", "a/reference"),
        *((f"{name}/base", f"{name}/proxy", None) for name in "bcb"),
    ]


@pytest.mark.parametrize("base, proxy, role", [("", PROXY, "base"), (BASE, "  ", "proxy")])
def test_both_names_are_needed(base, proxy, role):
    with pytest.raises(ValueError, match=f"Name the {role}: a Hub id"):
        LoadedPairs(PairNames()).get(base, proxy)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"Folder not found: '\./nothing'"):
        LoadedPairs(PairNames()).get(BASE, "./nothing")


def test_a_fixed_page_has_its_pair_alone(loads):
    fixed = LoadedPairs(PairNames("a/base", "a/proxy"), is_fixed=True)
    fixed.get("a/base", "a/proxy")
    with pytest.raises(ValueError, match="has the base 'a/base' and the proxy 'a/proxy' alone, got 'a/base' and 'b'"):
        fixed.get("a/base", "b")
    assert len(loads) == 1


@pytest.mark.parametrize("folder", [BASE, "/etc", "../x", "tests"])
def test_visitors_may_name_folders_only_where_that_is_allowed(folder, loads, monkeypatch):
    monkeypatch.chdir(PAIR.parents[1])
    closed = LoadedPairs(PairNames("here/base", PROXY), allow_folders=False)
    with pytest.raises(ValueError, match="The base must be a Hub id"):
        closed.get(folder, PROXY)
    closed.get("here/base", PROXY)  # the host's own folder
    closed.get("other/base", PROXY)
    LoadedPairs(PairNames()).get(folder, PROXY)
    assert len(loads) == 3


@pytest.mark.parametrize(
    "environment, offered, is_fixed, allow_folders",
    [
        ({}, PairNames(BASE, PROXY), False, True),
        ({"SPACE_ID": "me/kad"}, PairNames(BASE, PROXY), False, False),
        ({"KAD_BASE": "b", "KAD_PROXY": "p"}, PairNames("b", "p"), True, True),
        ({"KAD_BASE": "b", "KAD_PROXY": "p", "KAD_REFERENCE": "r"}, PairNames("b", "p", "r"), True, True),
        ({"KAD_BASE": "b", "KAD_PROXY": "p", "KAD_OTHER_MODELS": "1"}, PairNames("b", "p"), False, True),
    ],
)
def test_the_environment_names_the_pair(environment, offered, is_fixed, allow_folders):
    found = pairs_from_environment(environment, PAIR)
    assert (found.offered, found.is_fixed, found.allow_folders) == (offered, is_fixed, allow_folders)


def test_a_page_that_was_copied_alone_names_no_pair(tmp_path):
    assert pairs_from_environment({}, tmp_path / "tiny_pair").offered == PairNames()


@pytest.mark.parametrize("variable", ["KAD_BASE", "KAD_PROXY"])
def test_half_a_pair_in_the_environment_is_refused(variable, tmp_path):
    with pytest.raises(ValueError, match="Set KAD_BASE and KAD_PROXY together"):
        pairs_from_environment({variable: "x"}, tmp_path)
