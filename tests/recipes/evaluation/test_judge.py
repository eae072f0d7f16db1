"""Perplexity against a computation token by token, with another library's loss, and at the edges."""

import math
from pathlib import Path

import pytest
import torch

from transformers_kad.integrations.loading.models import load_model, load_tokenizer
from transformers_kad.integrations.loading.prompts import encode
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.evaluation.judge import Judge
from transformers_kad.recipes.evaluation.kept_scores import PromptedText

PAIR = Path(__file__).resolve().parents[3] / "recipes" / "tiny_pair"
QUESTION = [{"role": "user", "content": "Mia has 34 apples. Jon brings 28 more. How many apples are there?"}]
OTHER = [*QUESTION, {"role": "assistant", "content": "We get 62."}, {"role": "user", "content": "Really?"}]
TEXTS = [
    PromptedText(QUESTION, "We get 34 + 28 = 62. The answer is 62."),
    PromptedText(QUESTION, "62"),
    PromptedText(OTHER, "We get 34 + 28 = 61. The answer is 61. Then Mia has a great many apples."),
]


@pytest.fixture(scope="module")
def judge():
    return Judge.load(str(PAIR / "aligned"), ModelArguments(device="cpu"), {})


def by_hand(judge, text):
    """The sum of -log p over the answer's tokens, each from a forward of the tokens before it."""
    ids = encode(judge.tokenizer, [text.prompt])["input_ids"][0].tolist()
    total = 0.0
    for token in judge.tokenizer(text.text, add_special_tokens=False)["input_ids"]:
        with torch.inference_mode():
            logits = judge.model(input_ids=torch.tensor([ids])).logits[0, -1]
        total -= logits.log_softmax(-1)[token].item()
        ids.append(token)
    return total


@pytest.mark.parametrize("text", TEXTS)
def test_the_nll_is_that_of_the_answer_given_the_prompt(judge, text):
    (score,) = judge.score([text])
    assert score["nll"] == pytest.approx(by_hand(judge, text), rel=1e-4, abs=1e-5)
    assert score["tokens"] == len(judge.tokenizer.tokenize(text.text))
    assert score["cut"] is False


def test_the_prompt_and_its_markup_are_not_counted(judge):
    """Transformers' own loss with labels on the answer alone."""
    text = TEXTS[0]
    prompt = encode(judge.tokenizer, [text.prompt])["input_ids"]
    answer = judge.tokenizer(text.text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    labels = torch.cat([torch.full_like(prompt, -100), answer], dim=1)
    with torch.inference_mode():
        loss = judge.model(input_ids=torch.cat([prompt, answer], dim=1), labels=labels).loss.item()
    (score,) = judge.score([text])
    assert score["nll"] / score["tokens"] == pytest.approx(loss, rel=1e-4)


def test_a_batch_with_padding_gives_the_scores_of_single_texts(judge):
    single = [judge.score([text])[0] for text in TEXTS]
    for batch, alone in zip(judge.score(TEXTS), single, strict=True):
        assert batch["nll"] == pytest.approx(alone["nll"], rel=1e-4, abs=1e-5)
        assert batch["tokens"] == alone["tokens"]


def test_a_right_answer_is_likelier_than_a_wrong_one(judge):
    right, wrong = (PromptedText(QUESTION, f"We get 34 + 28 = {n}. The answer is {n}.") for n in (62, 63))
    found = [score["nll"] for score in judge.score([right, wrong])]
    assert found[0] + 2 < found[1]


def test_an_empty_answer_has_no_nll_and_leaves_the_others_alone(judge):
    empty, full = judge.score([PromptedText(QUESTION, ""), TEXTS[0]])
    assert empty == {"nll": None, "tokens": 0, "cut": False}
    assert full["nll"] == pytest.approx(judge.score([TEXTS[0]])[0]["nll"], rel=1e-4)


def test_a_judge_without_a_chat_template_reads_plain_text(judge):
    tokenizer = load_tokenizer(PAIR / "base")
    tokenizer.chat_template = None
    base = Judge(load_model(PAIR / "base"), tokenizer)
    (score,) = base.score([TEXTS[0]])
    ids = tokenizer(QUESTION[0]["content"] + "\n")["input_ids"]
    answer = tokenizer(TEXTS[0].text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = base.model(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    expected = -sum(logits[len(ids) - 1 + at, token].item() for at, token in enumerate(answer))
    assert score["nll"] == pytest.approx(expected, rel=1e-4)


def test_a_text_beyond_the_context_is_scored_as_far_as_it_fits(judge, monkeypatch):
    text = TEXTS[0]
    prompt = encode(judge.tokenizer, [text.prompt])["input_ids"].shape[1]
    full = judge.score([text])[0]
    monkeypatch.setattr(judge.model.config, "max_position_embeddings", prompt + full["tokens"])
    assert judge.score([text])[0] == full
    monkeypatch.setattr(judge.model.config, "max_position_embeddings", prompt + 5)
    (cut,) = judge.score([text])
    assert (cut["tokens"], cut["cut"]) == (5, True)
    kept = judge.tokenizer(text.text, add_special_tokens=False)["input_ids"][:5]
    first = PromptedText(QUESTION, judge.tokenizer.decode(kept))
    assert judge.tokenizer(first.text, add_special_tokens=False)["input_ids"] == kept
    assert cut["nll"] == pytest.approx(by_hand(judge, first), rel=1e-4, abs=1e-5)
    for limit in (prompt, prompt - 3):
        monkeypatch.setattr(judge.model.config, "max_position_embeddings", limit)
        assert judge.score([text, PromptedText(QUESTION, "")])[0] == {"nll": None, "tokens": 0, "cut": True}


def test_a_judge_in_bfloat16_sums_in_higher_precision(judge):
    low = Judge.load(str(PAIR / "base"), ModelArguments(device="cpu", dtype="bfloat16"), {})
    high = Judge.load(str(PAIR / "base"), ModelArguments(device="cpu"), {})
    assert low.model.dtype == torch.bfloat16
    found, expected = (one.score([TEXTS[2]])[0]["nll"] for one in (low, high))
    assert math.isclose(found, expected, rel_tol=0.05)


def test_a_judge_whose_logits_overflow_is_named(judge, monkeypatch):
    forward = type(judge.model).forward

    def overflow(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits[..., 0] = float("nan")
        return output

    monkeypatch.setattr(type(judge.model), "forward", overflow)
    with pytest.raises(ValueError, match=r"The judge .* gives a text a log-likelihood of nan.*--dtype bfloat16"):
        judge.score(TEXTS[:1])
