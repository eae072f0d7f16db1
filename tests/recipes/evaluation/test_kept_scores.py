"""Scores that are kept: nothing is computed twice, and nothing of another model is mixed in."""

import json
from dataclasses import replace

import pytest

from transformers_kad.recipes.evaluation.kept_scores import KeptScores, PromptedText
from transformers_kad.recipes.processes import Processes

TEXTS = [PromptedText([{"role": "user", "content": "q"}], text) for text in ("a", "bbb", "cc", "a")]


class Counter:
    """Gives a text its length, and fails after some batches."""

    def __init__(self, batches=99):
        self.batches, self.seen = batches, []

    def score(self, texts):
        if len(self.seen) == self.batches:
            raise OSError("the power went off")
        self.seen.append([text.text for text in texts])
        return [{"length": len(text.text)} for text in texts]


def kept(folder, scorer, **settings):
    return KeptScores(folder, "judge", {"judge": "one", **settings}, lambda: scorer, batch_size=2)


def lengths(scores):
    return {text.text: scores[text.key]["length"] for text in TEXTS}


def test_texts_are_scored_once_the_longest_first_and_read_later(tmp_path):
    scorer = Counter()
    found = kept(tmp_path, scorer).score(TEXTS, Processes())
    assert lengths(found) == {"a": 1, "bbb": 3, "cc": 2}
    assert scorer.seen == [["bbb", "cc"], ["a"]]
    again = Counter(0)
    assert lengths(kept(tmp_path, again).score(TEXTS, Processes())) == lengths(found)

    def refuse():
        raise AssertionError("the model was loaded, although all texts have scores")

    settings = {"judge": "one"}
    assert KeptScores(tmp_path, "judge", settings, refuse, batch_size=2).score(TEXTS[:2], Processes()) == found


def test_an_interrupted_run_goes_on_with_what_is_left(tmp_path):
    with pytest.raises(OSError, match="the power went off"):
        kept(tmp_path, Counter(1)).score(TEXTS, Processes())
    (file,) = tmp_path.glob("judge-*.jsonl")
    with file.open("a") as lines:
        lines.write('{"key": "torn')
    scorer = Counter()
    assert lengths(kept(tmp_path, scorer).score(TEXTS, Processes())) == {"a": 1, "bbb": 3, "cc": 2}
    assert scorer.seen == [["a"]]
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 3


def test_another_judge_or_other_settings_have_scores_of_their_own(tmp_path):
    kept(tmp_path, Counter()).score(TEXTS, Processes())
    for settings in ({"judge": "two"}, {"dtype": "bfloat16"}):
        scorer = Counter()
        kept(tmp_path, scorer, **settings).score(TEXTS, Processes())
        assert sum(map(len, scorer.seen)) == 3
    assert len(list(tmp_path.glob("judge-*.jsonl"))) == 3


def test_the_same_text_after_another_prompt_is_another_text():
    other = PromptedText([{"role": "user", "content": "r"}], "a")
    assert TEXTS[0].key == TEXTS[3].key != other.key


def test_a_score_that_was_changed_is_named_with_its_line(tmp_path):
    scores = replace(kept(tmp_path, Counter()), fields={"length": (int,)})
    scores.score(TEXTS, Processes())
    scores.path.write_text(scores.path.read_text().replace('"length": 3', '"length": "3"'))
    with pytest.raises(ValueError, match=r"judge-.*, line \d: 'length' is '3', not of type int"):
        scores.score(TEXTS, Processes())
