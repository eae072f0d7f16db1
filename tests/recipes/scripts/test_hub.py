"""The Hub repo for `generate(custom_generate=...)`, from a local folder, against the direct call."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from packaging.version import Version
from transformers import LogitsProcessor, TextIteratorStreamer

from transformers_kad import KADConfig, KADLogitsProcessor, __version__
from transformers_kad.integrations.loading.models import load_model, load_tokenizer
from transformers_kad.integrations.loading.prompts import PLAIN_SAMPLING, encode
from transformers_kad.recipes.word_problems import make_problems

HUB = Path(__file__).resolve().parents[3] / "recipes" / "hub"
PAIR = HUB.parent / "tiny_pair"
CONFIG = KADConfig("dual", {"threshold": 0.6}, num_assistant_tokens=3)
QUESTIONS = [problem.question for problem in make_problems("test", 3, seed=2)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PAIR / "base")


@pytest.fixture(scope="module")
def models():
    return load_model(PAIR / "base"), load_model(PAIR / "proxy")


@pytest.fixture
def repo(tmp_path):
    """A copy, as a download would be."""
    return str(shutil.copytree(HUB, tmp_path / "repo"))


def custom(repo, **settings):
    return {"custom_generate": repo, "trust_remote_code": True, "kad_config": CONFIG, **settings}


def sampled(model, inputs, seed, **settings):
    torch.manual_seed(seed)
    return model.generate(**inputs, **PLAIN_SAMPLING, max_new_tokens=40, **settings).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_gives_the_same_tokens_as_the_direct_call(repo, models, tokenizer, seed):
    base, proxy = models
    inputs = encode(tokenizer, QUESTIONS[:1])
    kad = KADLogitsProcessor.from_config(proxy, CONFIG)
    direct = sampled(base, inputs, seed, logits_processor=[kad], assistant_model=proxy)
    assert sampled(base, inputs, seed, assistant_model=proxy, **custom(repo)) == direct
    assert sampled(base, inputs, seed) != direct


@pytest.mark.parametrize("speculative", [False, True])
def test_batches_and_several_sequences(repo, models, tokenizer, speculative):
    base, proxy = models
    inputs = encode(tokenizer, QUESTIONS)
    kad = KADLogitsProcessor.from_config(proxy, CONFIG)
    settings = {"num_return_sequences": 2, "pad_token_id": 0}
    drafts = {"assistant_model": proxy} if speculative else {}
    direct = sampled(base, inputs, 0, logits_processor=[kad], **drafts, **settings)
    made = custom(repo, speculative=speculative, **settings)
    assert sampled(base, inputs, 0, assistant_model=proxy, **made) == direct


@pytest.mark.parametrize("do_sample", [False, True])
def test_padded_batches_are_drafted(repo, models, tokenizer, do_sample):
    """Each call drafts for rows with padding, and every row has the tokens of the direct call."""
    base, proxy = models
    inputs = encode(tokenizer, QUESTIONS)
    assert 0 < inputs["attention_mask"].sum() < inputs["attention_mask"].numel()
    settings = {**(PLAIN_SAMPLING if do_sample else {"do_sample": False}), "max_new_tokens": 40, "pad_token_id": 0}
    kad = KADLogitsProcessor.from_config(proxy, CONFIG)
    forwards = []
    hook = base.register_forward_pre_hook(lambda *args: forwards.append(1))
    torch.manual_seed(0)
    direct = base.generate(**inputs, **settings, logits_processor=[kad], assistant_model=proxy)
    expected, drafted = len(forwards), kad.statistics.drafted
    forwards.clear()
    torch.manual_seed(0)
    through_hub = base.generate(**inputs, **settings, assistant_model=proxy, **custom(repo))
    hook.remove()
    assert through_hub.tolist() == direct.tolist()
    assert len(forwards) == expected < direct.shape[1] - inputs["input_ids"].shape[1]  # rounds, not tokens
    assert drafted > 0


def test_beams_are_not_drafted(repo, models, tokenizer):
    base, proxy = models
    inputs = encode(tokenizer, QUESTIONS[:1])
    settings = {"num_beams": 2, "do_sample": False, "max_new_tokens": 8, "assistant_model": proxy}
    with pytest.raises(ValueError, match="got num_beams=2: pass `speculative=False`"):
        base.generate(**inputs, **settings, **custom(repo))
    ids = base.generate(**inputs, **settings, **custom(repo, speculative=False))
    assert ids.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("form", ["config", "mapping", "folder", "none"])
def test_every_form_of_the_configuration(repo, models, tokenizer, tmp_path, form):
    base, proxy = models
    inputs = encode(tokenizer, QUESTIONS[:1])
    CONFIG.save_pretrained(tmp_path / "saved")
    given = {
        "config": CONFIG,
        "mapping": {"rule": "dual", "parameters": {"threshold": 0.6}, "num_assistant_tokens": 3},
        "folder": tmp_path / "saved",
        "none": None,
    }[form]
    kad = KADLogitsProcessor.from_config(proxy, KADConfig() if form == "none" else CONFIG)
    direct = sampled(base, inputs, 1, logits_processor=[kad], assistant_model=proxy)
    assert sampled(base, inputs, 1, assistant_model=proxy, **custom(repo, kad_config=given)) == direct


def test_streamer_stop_strings_and_the_users_processors_arrive(repo, models, tokenizer):
    base, proxy = models
    inputs = encode(tokenizer, QUESTIONS[:1])
    calls = []

    class Count(LogitsProcessor):
        def __call__(self, input_ids, scores):
            calls.append(input_ids.shape[1])
            return scores

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = base.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=40,
        assistant_model=proxy,
        streamer=streamer,
        stop_strings=["answer"],
        tokenizer=tokenizer,
        logits_processor=[Count()],
        **custom(repo),
    )
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    assert text.endswith("answer")
    assert "".join(streamer) == text
    prompt_length, length = inputs["input_ids"].shape[1], ids.shape[1]
    assert calls[: length - prompt_length] == list(range(prompt_length, length))


def test_tokenizers_are_compared_when_both_are_given(repo, models, tokenizer):
    base, proxy = models
    other = load_tokenizer(PAIR / "proxy")
    other.add_tokens(["only here"])
    inputs = encode(tokenizer, QUESTIONS[:1])
    settings = custom(repo, assistant_model=proxy, tokenizer=tokenizer, assistant_tokenizer=other)
    base.generate(**inputs, **settings, max_new_tokens=2)

    class Renamed:
        def get_vocab(self):
            return {f"{token}!": index for token, index in other.get_vocab().items()}

    settings["assistant_tokenizer"] = Renamed()
    with pytest.raises(ValueError, match="token ids mean different strings"):
        base.generate(**inputs, **settings, max_new_tokens=2)


def test_a_proxy_is_needed(repo, models, tokenizer):
    with pytest.raises(ValueError, match="assistant_model=proxy"):
        models[0].generate(**encode(tokenizer, QUESTIONS[:1]), **custom(repo), max_new_tokens=2)


def test_the_card_is_one_of_a_custom_generation_method():
    card = ModelCard.load(HUB / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["custom_generate"]


def test_the_requirement_is_met_by_this_version():
    (requirement,) = (HUB / "custom_generate" / "requirements.txt").read_text().split()
    name, minimum = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
    assert name == "transformers-kad"
    assert Version(minimum) <= Version(__version__)
