"""Generation with a proxy that has a tokenizer of its own: every path decodes the same text."""

from pathlib import Path

import pytest
import torch
from test_vocabulary import TOKENIZERS
from tiny_families import tiny_family
from tiny_models import tiny_model

from transformers_kad import ImplicitReward, KADLogitsProcessor, VocabularyAlignment, align_vocabularies
from transformers_kad.integrations.loading.models import load_model, load_tokenizer

PAIR = Path(__file__).resolve().parents[2] / "recipes" / "tiny_pair"
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TEXTS = ["Mia has 12 apples. She buys", "So 3 + 4 = 7, and the old man"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PAIR / "base")


@pytest.fixture(scope="module")
def base():
    return load_model(PAIR / "base")


@pytest.fixture(scope="module")
def alignment(tokenizer):
    return align_vocabularies(tokenizer, TOKENIZERS["byte-level"], minimum_share=0.5)


def make_proxy(architecture="llama", seed=3):
    return tiny_model(architecture, vocabulary=len(TOKENIZERS["byte-level"]), seed=seed)


def make_kad(alignment, proxy=None, rule="dual", **settings):
    settings = settings or {"threshold": 0.3}
    return KADLogitsProcessor(proxy or make_proxy(), rule, vocabulary_alignment=alignment, **settings)


def generated(base, tokenizer, kad, texts, **settings):
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    ids = base.generate(**inputs, logits_processor=[kad], **{**GREEDY, **settings})
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def greedy_by_hand(base, tokenizer, alignment, proxy, text, rule, count=24):
    """One position at a time, without a cache."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    read, _ = alignment.retokenize(ids)
    for _ in range(count):
        with torch.no_grad():
            p = base(ids).logits[:, -1].softmax(-1)
            q = alignment.to_base(proxy(read).logits[:, -1], p.shape[-1]).softmax(-1)
        token = rule(p, q).argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        read = torch.cat([read, alignment.spell(token)[0]], dim=1)
    return ids[0, -count:].tolist()


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_greedy_text_is_argmax_r_at_every_position(base, tokenizer, alignment, architecture, speculative):
    proxy = make_proxy(architecture)
    kad = make_kad(alignment, proxy)
    settings = {"assistant_model": proxy} if speculative else {}
    read = set[int]()
    for text in (*TEXTS, "There are 40 plums on", "12 + 30 = 42. Then"):
        expected = greedy_by_hand(base, tokenizer, alignment, proxy, text, kad.rule)
        assert generated(base, tokenizer, kad, [text], **settings) == [expected]
        read |= {alignment.spell(torch.tensor([[token]]))[0].shape[1] for token in expected}
    assert max(read) > 1  # a token that the proxy reads as several was among them


def test_rows_of_a_batch_decode_as_alone_though_they_spell_differently(base, tokenizer, alignment):
    kad = make_kad(alignment)
    alone = [generated(base, tokenizer, kad, [text])[0] for text in TEXTS]
    assert generated(base, tokenizer, kad, TEXTS) == alone
    widths = [[alignment.spell(torch.tensor([[token]]))[0].shape[1] for token in row] for row in alone]
    assert widths[0] != widths[1]  # so there were holes


def test_rows_of_a_speculative_batch_without_padding_may_spell_differently(base, tokenizer, alignment):
    texts = ["Mia has 12 apples. She buys", "Mia has 21 apples. She buys"]
    ids, mask = (tokenizer(texts, padding=True, return_tensors="pt")[name] for name in ("input_ids", "attention_mask"))
    assert mask.all() and alignment.retokenize(ids, mask)[1].all()
    proxy = make_proxy()
    kad = make_kad(alignment, proxy)
    alone = [generated(base, tokenizer, kad, [text])[0] for text in texts]
    widths = [[alignment.spell(torch.tensor([[token]]))[0].shape[1] for token in row] for row in alone]
    assert widths[0] != widths[1]
    assert generated(base, tokenizer, kad, texts, assistant_model=proxy) == alone


def test_beams_and_return_sequences(base, tokenizer, alignment):
    kad = make_kad(alignment)
    (best,) = generated(base, tokenizer, kad, TEXTS[:1], num_beams=3, length_penalty=0.0)
    kad.reset()
    assert generated(base, tokenizer, kad, TEXTS, num_beams=3, length_penalty=0.0)[0] == best
    twice = generated(base, tokenizer, kad, TEXTS[:1], num_beams=3, num_return_sequences=2, length_penalty=0.0)
    assert twice[0] == best
    assert twice[1] != best


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("family", ["mistral", "lfm2", "qwen3_next", "zaya", "jamba"])
def test_rows_spell_differently_over_windows_and_states(base, tokenizer, alignment, family, speculative):
    proxy = tiny_family(family, vocab_size=len(TOKENIZERS["byte-level"]))  # windows of 8
    kad = make_kad(alignment, proxy)
    expected = [greedy_by_hand(base, tokenizer, alignment, proxy, text, kad.rule) for text in TEXTS]
    widths = [[alignment.spell(torch.tensor([[token]]))[0].shape[1] for token in row] for row in expected]
    assert widths[0] != widths[1]  # so there were holes
    settings = {"assistant_model": proxy} if speculative else {}
    assert generated(base, tokenizer, kad, TEXTS, **settings) == expected


@pytest.mark.parametrize("family", ["bloom", "minimax"])
def test_columns_of_some_rows_only_are_refused_where_rows_go_in_step(base, tokenizer, alignment, family):
    proxy = tiny_family(family, vocab_size=len(TOKENIZERS["byte-level"]))
    kad = make_kad(alignment, proxy)
    with pytest.raises(ValueError, match=r"can't take back tokens of some rows only. Generate one sequence at a time"):
        generated(base, tokenizer, kad, TEXTS, assistant_model=proxy)
    expected = [greedy_by_hand(base, tokenizer, alignment, proxy, text, kad.rule) for text in TEXTS]
    assert [generated(base, tokenizer, kad, [text], assistant_model=proxy)[0] for text in TEXTS] == expected


@pytest.mark.parametrize("family", ["mistral", "qwen3_next"])
def test_drafts_that_were_looked_up_are_spelled_over_windows_and_states(base, tokenizer, alignment, family):
    proxy = tiny_family(family, vocab_size=len(TOKENIZERS["byte-level"]))
    kad = make_kad(alignment, proxy, threshold=0.3, drafter="prompt_lookup")
    texts = [f"{text} {text}" for text in TEXTS]  # so that something is found
    expected = [greedy_by_hand(base, tokenizer, alignment, proxy, text, kad.rule) for text in texts]
    assert generated(base, tokenizer, kad, texts, assistant_model=proxy) == expected
    assert kad.statistics.drafted > 0


def test_holes_do_not_count_as_context(base, tokenizer, alignment):
    """The proxy's longest row ends exactly at its context; with its holes counted it would not fit."""
    kad = make_kad(alignment)
    rows = generated(base, tokenizer, kad, TEXTS)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    prompts = alignment.retokenize(inputs["input_ids"], inputs["attention_mask"])[1].sum(-1)
    ids, mask, _ = alignment.spell(torch.tensor(rows)[:, :-1])
    longest = int((prompts + mask.sum(-1)).max())
    assert longest < prompts.max() + ids.shape[1]
    proxy = make_proxy()
    kad = make_kad(alignment, proxy)
    kad.state.models.proxy.context_length = longest
    assert generated(base, tokenizer, kad, TEXTS) == rows
    kad.state.models.proxy.context_length = longest - 1
    kad.reset()
    with pytest.raises(ValueError, match=f"The text has {longest} tokens, but the proxy .* ends at {longest - 1}"):
        generated(base, tokenizer, kad, TEXTS)


def test_an_end_without_a_counterpart_is_reported(base, tokenizer, alignment, caplog):
    proxy = make_proxy()
    unshared = next(i for i in range(400) if alignment.base_id(i) is None)
    proxy.generation_config.eos_token_id = [TOKENIZERS["byte-level"].eos_token_id, unshared]
    kad = make_kad(alignment, proxy)
    generated(base, tokenizer, kad, TEXTS[:1], eos_token_id=tokenizer.eos_token_id)
    assert f"token ids [{unshared}], which have no counterpart" in caplog.text


def test_only_new_tokens_are_spelled(base, tokenizer, alignment, monkeypatch):
    spelled = []
    spell = VocabularyAlignment.spell
    monkeypatch.setattr(
        VocabularyAlignment, "spell", lambda self, ids: spelled.append(ids.shape[1]) or spell(self, ids)
    )
    proxy = make_proxy()
    kad = make_kad(alignment, proxy)
    generated(base, tokenizer, kad, TEXTS[:1])
    assert sum(spelled) <= 24
    spelled.clear()
    generated(base, tokenizer, kad, TEXTS[:1], assistant_model=proxy)
    assert max(spelled) <= 6  # never the text anew


@pytest.mark.parametrize("speculative", [False, True])
def test_a_prompt_of_the_proxys_own_is_in_its_own_tokens(base, tokenizer, alignment, speculative):
    proxy = make_proxy()
    kad = make_kad(alignment, proxy)
    settings = {"assistant_model": proxy} if speculative else {}
    own = TOKENIZERS["byte-level"](TEXTS[0], return_tensors="pt")
    expected = generated(base, tokenizer, kad, TEXTS[:1], **settings)
    with kad.proxy_prompt(own):
        assert generated(base, tokenizer, kad, TEXTS[:1], **settings) == expected
    with kad.proxy_prompt(TOKENIZERS["byte-level"]("Another text.", return_tensors="pt")):
        assert generated(base, tokenizer, kad, TEXTS[:1], **settings) != expected


@pytest.mark.parametrize("speculative", [False, True])
def test_a_reference_reads_the_same_tokens(base, tokenizer, alignment, speculative):
    proxy, reference = make_proxy(), make_proxy(seed=4)
    kad = make_kad(alignment, proxy, ImplicitReward(0.5), reference=reference)
    (got,) = generated(base, tokenizer, kad, TEXTS[:1], **({"assistant_model": proxy} if speculative else {}))
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    read, _ = alignment.retokenize(ids)
    for token in got:
        with torch.no_grad():
            p = base(ids).logits[:, -1].softmax(-1)
            q, q0 = (alignment.to_base(m(read).logits[:, -1], p.shape[-1]).softmax(-1) for m in (proxy, reference))
        assert token == int(kad.rule(p, q, q0).argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        read = torch.cat([read, alignment.spell(torch.tensor([[token]]))[0]], dim=1)


def test_the_end_of_the_proxys_turn_has_the_bases_name(base, tokenizer, alignment, caplog):
    proxy = make_proxy()
    proxy.generation_config.eos_token_id = TOKENIZERS["byte-level"].eos_token_id
    assert proxy.generation_config.eos_token_id != tokenizer.eos_token_id
    kad = make_kad(alignment, proxy)
    generated(base, tokenizer, kad, TEXTS[:1], eos_token_id=tokenizer.eos_token_id)
    assert "run on" not in caplog.text
    generated(base, tokenizer, kad, TEXTS[:1])
    assert f"eos_token_id=[{tokenizer.eos_token_id}]" in caplog.text


def test_repr_shows_what_is_shared(alignment):
    assert "375 tokens are shared" in repr(make_kad(alignment))


def test_by_hand_the_whole_text_is_tokenized_anew(base, tokenizer, alignment):
    proxy = make_proxy()
    kad = make_kad(alignment, proxy)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = base(ids).logits[:, -1]
        q = alignment.to_base(proxy(alignment.retokenize(ids)[0]).logits[:, -1], scores.shape[-1]).softmax(-1)
    torch.testing.assert_close(kad(ids, scores).exp(), kad.rule(scores.softmax(-1), q))


def test_without_a_prompt_the_text_starts_from_the_bases_bos(base, tokenizer, alignment):
    kad = make_kad(alignment)
    comma = tokenizer.convert_tokens_to_ids(",")
    expected = base.generate(torch.tensor([[comma]]), logits_processor=[kad], **GREEDY)
    assert torch.equal(base.generate(bos_token_id=comma, logits_processor=[kad], **GREEDY), expected)
