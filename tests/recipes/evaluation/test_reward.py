"""Rewards in batches and one by one, and models that give none."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from transformers_kad.integrations.loading.models import load_tokenizer
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.evaluation.kept_scores import PromptedText
from transformers_kad.recipes.evaluation.reward import RewardModel, check_reward_model

PAIR = Path(__file__).resolve().parents[3] / "recipes" / "tiny_pair"
CPU = ModelArguments(device="cpu")
QUESTION = [{"role": "user", "content": "Mia has 34 apples. How many apples are there?"}]
TEXTS = [PromptedText(QUESTION, text) for text in ("There are 34 apples.", "34", "I do not know, and you?", "")]


@pytest.fixture
def classifier(tmp_path):
    """Saves a classifier with random weights, and the tokenizer of the tiny pair."""

    def save(kind=LlamaForSequenceClassification, template=True, **changes):
        tokenizer = load_tokenizer(PAIR / "base")
        if not template:
            tokenizer.chat_template = None
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "num_labels": 1, **sizes}
        settings |= {"pad_token_id": tokenizer.pad_token_id, **changes}
        config = (LlamaConfig if kind is LlamaForSequenceClassification else BertConfig)(**settings)
        kind(config).save_pretrained(tmp_path / "reward")
        tokenizer.save_pretrained(tmp_path / "reward")
        return str(tmp_path / "reward")

    return save


def rewards(model, texts):
    return [score["reward"] for score in model.score(texts)]


def test_a_reward_is_the_output_for_the_chat_with_the_answer(classifier):
    model = RewardModel.load(classifier(), CPU)
    chat = [*QUESTION, {"role": "assistant", "content": TEXTS[0].text}]
    inputs = model.tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model.model(**inputs).logits.item()
    assert rewards(model, TEXTS[:1]) == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (LlamaForSequenceClassification, {}),
        (LlamaForSequenceClassification, {"pad_token_id": None}),
        (LlamaForSequenceClassification, {"pad_token_id": 5}),  # not the padding token of the tokenizer
        (BertForSequenceClassification, {}),
    ],
)
def test_a_batch_gives_the_rewards_of_single_texts(kind, settings, classifier):
    path = classifier(kind, initializer_range=0.5, **settings)
    model = RewardModel.load(path, CPU)
    single = [rewards(model, [text])[0] for text in TEXTS]
    assert rewards(model, TEXTS) == pytest.approx(single, rel=1e-4, abs=1e-6)
    assert len({round(reward, 5) for reward in single}) == 4


def test_without_a_chat_template_prompt_and_answer_are_a_pair(classifier):
    model = RewardModel.load(classifier(BertForSequenceClassification, template=False), CPU)
    inputs = model.tokenizer(QUESTION[0]["content"], TEXTS[0].text, return_tensors="pt")
    with torch.inference_mode():
        expected = model.model(**inputs).logits.item()
    assert rewards(model, TEXTS[:1]) == [pytest.approx(expected, rel=1e-5)]


def test_a_text_beyond_the_context_has_no_reward(classifier):
    model = RewardModel.load(classifier(), CPU)
    found = rewards(model, [PromptedText(QUESTION, "apples " * 200), TEXTS[0]])
    assert found == [None, pytest.approx(rewards(model, TEXTS[:1])[0], rel=1e-4)]


def test_a_model_with_two_labels_is_refused_before_its_weights_are_loaded(classifier):
    path = classifier(num_labels=2)
    for file in Path(path).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"--reward_model .*reward' has 2 labels, but a reward is a single number"):
        check_reward_model(path)


def test_a_language_model_without_the_weights_of_a_reward_is_refused(tmp_path):
    shutil.copytree(PAIR / "base", tmp_path / "base")
    config = LlamaConfig.from_pretrained(tmp_path / "base", num_labels=1)
    config.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"lacks weights \(score.weight\), so its rewards would be random"):
        RewardModel.load(str(tmp_path / "base"), CPU)
