"""Vocabularies that differ: padding rows, tokenizers that claim to be one, tokenizers that are two."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transformers_kad import KADLogitsProcessor, align_vocabularies
from transformers_kad.models.vocabulary import SAMPLE_TEXT, VocabularyAlignment, align_vocabulary, check_tokenizers
from transformers_kad.recipes.word_problems import make_problems

PAIR = Path(__file__).resolve().parents[2] / "recipes" / "tiny_pair"
CORPUS = [SAMPLE_TEXT, *(problem.question + problem.solution for problem in make_problems("train", 300))]


def byte_level(size: int = 400, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def sentencepiece_like(size: int = 500, **special: str) -> PreTrainedTokenizerFast:
    """BPE with "▁" for spaces, a space before every text, and bytes as a last resort, as in Llama 2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    names = ["<unk>", "<s>", *special.values()]
    tokenizer.train_from_iterator(
        (word for text in CORPUS for word in text.split("\n")),
        trainers.BpeTrainer(vocab_size=size, special_tokens=[*names, *fallback], show_progress=False),
    )
    # Bytes are ordinary tokens; the trainer takes them only as special ones.
    state = tokenizer.to_str().replace('"special":true', '"special":false')
    tokenizer = Tokenizer.from_str(_without_added(state, set(fallback)))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", clean_up_tokenization_spaces=False, **special
    )


def _without_added(state: str, names: set[str]) -> str:
    parsed = json.loads(state)
    parsed["added_tokens"] = [token for token in parsed["added_tokens"] if token["content"] not in names]
    return json.dumps(parsed)


TOKENIZERS = {
    "tiny pair": AutoTokenizer.from_pretrained(PAIR / "base"),
    "byte-level": byte_level(eos_token="</s>", pad_token="<pad>"),
    "sentencepiece": sentencepiece_like(eos_token="<|im_end|>"),
}
PAIRS = [(a, b) for a in TOKENIZERS for b in TOKENIZERS if a != b]


def align(base: str, proxy: str) -> VocabularyAlignment:
    return align_vocabularies(TOKENIZERS[base], TOKENIZERS[proxy], minimum_share=0.0)


def decode(name: str, ids: list[int]) -> str:
    return TOKENIZERS[name].decode(ids, clean_up_tokenization_spaces=False)


# --- Padding rows -------------------------------------------------------------------------------------------


def test_padding_rows():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert align_vocabulary(logits, 2).tolist() == [[1.0, 2.0]]
    assert align_vocabulary(logits, 4).tolist() == [[1.0, 2.0, 3.0, -torch.inf]]
    assert align_vocabulary(logits.bfloat16(), 3).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(151_936, 152_064), (152_064, 151_936)])
@pytest.mark.parametrize("path", ["greedy", "sample", "batch", "beams", "speculative", "speculative sample"])
def test_padded_vocabularies_of_real_size_on_every_path(sizes, path):
    """Without tokenizers. The padding rows of the larger model change nothing, however likely they are."""
    base, proxy = (tiny_model(vocabulary=size, hidden=4, seed=seed) for seed, size in enumerate(sizes))
    common = min(sizes)
    with torch.no_grad():
        for model in (base, proxy):
            model.lm_head.weight[:common] *= 4  # spread out, so that the rule has something to decide
    kad = KADLogitsProcessor(proxy, "dual", threshold=0.3)
    prompt = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]][: 2 if path == "batch" else 1])
    arguments = {
        "greedy": {},
        "sample": {"do_sample": True, "top_k": 0},
        "batch": {},
        "beams": {"num_beams": 2},
        "speculative": {"assistant_model": proxy},
        "speculative sample": {"assistant_model": proxy, "do_sample": True, "top_k": 0},
    }[path]
    settings = {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True}
    output = base.generate(prompt, logits_processor=[kad], **settings, **arguments)
    assert kad.statistics.tokens == 6 * len(prompt)
    last = prompt if path == "beams" else output.sequences[:, :-1]
    with torch.no_grad():
        p = base(last).logits[:, -1].softmax(-1)
        q = proxy(last).logits[:, -1, :common].softmax(-1)
    q = torch.nn.functional.pad(q, (0, sizes[0] - common))
    expected = kad.rule(p, q)
    # A beam's scores are summed up; the first ones are those of one token.
    got = output.scores[0][:1].exp() if path == "beams" else output.scores[-1].softmax(-1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)


# --- One tokenizer ------------------------------------------------------------------------------------------


def test_equal_tokenizers_pass_and_others_name_the_first_ids_that_differ():
    tokenizer = TOKENIZERS["tiny pair"]
    check_tokenizers(tokenizer, AutoTokenizer.from_pretrained(PAIR / "proxy"))
    with pytest.raises(ValueError, match=r"token ids mean different strings .*0: .*align_vocabularies"):
        check_tokenizers(tokenizer, TOKENIZERS["byte-level"])


# --- Two tokenizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "proxy"), PAIRS)
def test_shared_tokens_stand_for_the_same_text(base, proxy):
    """By the tokenizers' own decoders, after a letter, since a lone first space may be cut off."""
    alignment = align(base, proxy)
    assert len(alignment.base_ids) > 100
    assert len(set(alignment.proxy_ids.tolist())) == len(alignment.proxy_ids)
    special = set(TOKENIZERS[base].all_special_ids)
    letter = {name: TOKENIZERS[name]("a", add_special_tokens=False)["input_ids"] for name in (base, proxy)}
    for base_id, proxy_id in zip(alignment.base_ids.tolist(), alignment.proxy_ids.tolist(), strict=True):
        assert alignment.base_id(proxy_id) == base_id
        if base_id in special:
            continue
        assert decode(base, [*letter[base], base_id]) == decode(proxy, [*letter[proxy], proxy_id])


@pytest.mark.parametrize(("base", "proxy"), PAIRS)
def test_every_token_that_both_have_is_shared(base, proxy):
    alignment = align(base, proxy)
    spaces = {"Ġ": " ", "▁": " "}

    def strings(name):  # ASCII tokens, as text
        special = set(TOKENIZERS[name].all_special_tokens)
        plain = {t: i for t, i in TOKENIZERS[name].get_vocab().items() if t not in special}
        texts = {"".join(spaces.get(c, c) for c in t): i for t, i in plain.items()}
        return {t: i for t, i in texts.items() if t.isascii() and t.isprintable() and not t.startswith("<0x")}

    ours, theirs = strings(base), strings(proxy)
    both = ours.keys() & theirs.keys()
    assert len(both) > 90
    for text in both:
        assert alignment.base_id(theirs[text]) == ours[text]


def test_tokens_of_one_role_are_one_token():
    alignment = align("byte-level", "sentencepiece")
    base, proxy = TOKENIZERS["byte-level"], TOKENIZERS["sentencepiece"]
    assert (base.eos_token, proxy.eos_token) == ("</s>", "<|im_end|>")
    assert alignment.base_id(proxy.eos_token_id) == base.eos_token_id
    assert alignment.base_id(proxy.bos_token_id) is None  # the base has none


def test_an_end_of_sequence_that_the_base_knows_by_name_keeps_its_name():
    base = byte_level(eos_token="</s>", additional="<|im_end|>")
    base = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer, eos_token="</s>", additional_special_tokens=["<|im_end|>"]
    )
    alignment = align_vocabularies(base, TOKENIZERS["sentencepiece"], minimum_share=0)
    proxy_eos = TOKENIZERS["sentencepiece"].eos_token_id
    assert alignment.base_id(proxy_eos) == base.convert_tokens_to_ids("<|im_end|>")


def test_q_is_restricted_to_the_shared_tokens_and_renormalised():
    alignment = align("tiny pair", "byte-level")
    logits = torch.randn(2, 3, alignment.report.proxy_size + 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = align_vocabulary(logits, 700, alignment).softmax(-1)
    assert q.shape == (2, 3, 700)
    assert q.dtype == torch.float32
    full = logits.double().softmax(-1)
    shared = full[..., alignment.proxy_ids]
    torch.testing.assert_close(q[..., alignment.base_ids].double(), shared / shared.sum(-1, keepdim=True))
    others = torch.ones(700, dtype=torch.bool)
    others[alignment.base_ids] = False
    assert (q[..., others] == 0).all()


@pytest.mark.parametrize(("base", "proxy"), PAIRS)
@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_round_trips(base, proxy, text):
    """As a prompt, and token by token as generated text, whatever tokens the base cut it into."""
    alignment = align_cached(base, proxy)
    # The name of a special token is read as that token, which the other tokenizer calls by its own name.
    assume(not any(name in text for name in TOKENIZERS[base].all_special_tokens))
    text = "x" + text.replace("▁", "_")  # SentencePiece can't tell its mark from a space
    ids = TOKENIZERS[base](text, add_special_tokens=False)["input_ids"]
    text = decode(base, ids)
    read, mask = alignment.retokenize(torch.tensor([ids]))
    assert mask.all()
    assert decode(proxy, read[0].tolist()) == text
    spelled, mask, _ = alignment.spell(torch.tensor([ids]))
    assert mask.all()
    first = decode(proxy, spelled[0].tolist())
    # A SentencePiece base begins with a space of its own making.
    assert first in (text, " " + text)


_ALIGNMENTS: dict[tuple[str, str], VocabularyAlignment] = {}


def align_cached(base: str, proxy: str) -> VocabularyAlignment:
    if (base, proxy) not in _ALIGNMENTS:
        _ALIGNMENTS[base, proxy] = align(base, proxy)
    return _ALIGNMENTS[base, proxy]


def test_shared_tokens_are_read_as_one_token_and_others_as_several():
    alignment = align("tiny pair", "byte-level")
    shared, unshared = 0, 0
    for base_id in range(alignment.report.base_size):
        ids, _, _ = alignment.spell(torch.tensor([[base_id]]))
        if base_id in alignment.base_ids:
            assert ids.tolist() == [[int(alignment.proxy_ids[alignment.base_ids.tolist().index(base_id)])]]
            shared += 1
        elif base_id not in TOKENIZERS["tiny pair"].all_special_ids:
            assert ids.shape[1] > 1
            unshared += 1
    assert shared > 300
    assert unshared > 100


def test_rows_that_spell_differently_get_holes_before_the_shorter_spelling():
    alignment = align("tiny pair", "byte-level")
    lengths = [alignment.spell(torch.tensor([[i]]))[0].shape[1] for i in range(alignment.report.base_size)]
    one, three = lengths.index(1, 10), lengths.index(3)
    ids, mask, widths = alignment.spell(torch.tensor([[one, three, one], [one, one, three]]))
    assert widths == [1, 3, 3]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 1, 1]]
    spelled = alignment.spell(torch.tensor([[three]]))[0][0].tolist()
    assert ids[0][mask[0].bool()].tolist() == [int(ids[0, 0]), *spelled, int(ids[0, 0])]
    # What has been spelled stays where it is when the texts grow.
    longer, longer_mask, _ = alignment.spell(torch.tensor([[one, three, one, three], [one, one, three, one]]))
    assert torch.equal(longer[:, :7], ids)
    assert torch.equal(longer_mask[:, :7], mask)


def test_special_tokens_in_a_prompt_are_mapped_or_left_out():
    base, proxy = TOKENIZERS["tiny pair"], TOKENIZERS["byte-level"]
    alignment = align("tiny pair", "byte-level")
    ids = base("<|user|>Ada has 1 hat.<|end|>", return_tensors="pt")["input_ids"]
    read, _ = alignment.retokenize(ids)
    assert proxy.decode(read[0]) == "Ada has 1 hat.</s>"  # no user turn there, another name for the end


def test_a_prompt_gets_the_beginning_that_the_proxys_tokenizer_gives_every_text():
    proxy = sentencepiece_like(eos_token="<|im_end|>")
    proxy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", proxy.bos_token_id)]
    )
    alignment = align_vocabularies(TOKENIZERS["tiny pair"], proxy, minimum_share=0)
    ids = TOKENIZERS["tiny pair"]("Ada has 1 hat.", return_tensors="pt")["input_ids"]
    assert alignment.retokenize(ids)[0].tolist() == [proxy("Ada has 1 hat.")["input_ids"]]
    assert alignment.retokenize(ids)[0][0, 0] == proxy.bos_token_id


def test_prompts_of_a_batch_are_padded_on_the_left():
    base = AutoTokenizer.from_pretrained(PAIR / "base", padding_side="left")
    texts = ["Ada has 1 hat.", "Ben has 12 hats and Cleo has none of them."]
    inputs = base(texts, padding=True, return_tensors="pt")
    alignment = align("tiny pair", "sentencepiece")
    ids, mask = alignment.retokenize(inputs["input_ids"], inputs["attention_mask"])
    assert mask[0, 0] == 0
    for row, kept, text in zip(ids, mask, texts, strict=True):
        assert decode("sentencepiece", row[kept.bool()].tolist()) == text


def test_the_report_counts_what_is_shared():
    alignment = align("tiny pair", "byte-level")
    report = alignment.report
    assert report.shared == len(alignment.base_ids)
    assert (report.base_size, report.proxy_size) == (len(TOKENIZERS["tiny pair"]), len(TOKENIZERS["byte-level"]))
    ids = TOKENIZERS["tiny pair"](SAMPLE_TEXT)["input_ids"]
    assert report.base_text_tokens == len(ids)
    assert report.base_text_shared == sum(i in set(alignment.base_ids.tolist()) for i in ids)
    assert report.unspellable == 0  # both have every byte
    assert f"{report.shared} tokens are shared" in str(report)


def test_too_little_shared_is_refused_with_the_report():
    with pytest.raises(ValueError, match=r"shares too little .*`minimum_share` is 99\.0%.*tokens are shared: .*%"):
        align_vocabularies(TOKENIZERS["tiny pair"], TOKENIZERS["byte-level"], minimum_share=0.99)
    text = "12 + 7 = 19"
    alignment = align_vocabularies(
        TOKENIZERS["tiny pair"], TOKENIZERS["byte-level"], minimum_share=0.0, sample_text=text
    )
    assert alignment.report.base_text_tokens == len(TOKENIZERS["tiny pair"](text)["input_ids"])
    with pytest.raises(ValueError, match=r"\[0, 1\], got 80"):
        align_vocabularies(TOKENIZERS["tiny pair"], TOKENIZERS["byte-level"], minimum_share=80)


def test_tokens_that_cannot_be_spelled_are_counted_and_read_as_padding():
    tokenizer = Tokenizer(models.BPE(vocab={"<pad>": 0, "a": 1, "b": 2}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    small = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    alignment = align_vocabularies(TOKENIZERS["tiny pair"], small, minimum_share=0)
    base_special = len(TOKENIZERS["tiny pair"].all_special_ids)
    spellable = sum(set(t) <= {"a", "b"} for t in TOKENIZERS["tiny pair"].get_vocab())
    assert alignment.report.unspellable == alignment.report.base_size - base_special - spellable
    seven = TOKENIZERS["tiny pair"].convert_tokens_to_ids("7")
    assert alignment.spell(torch.tensor([[seven]]))[0].tolist() == [[0]]


def test_added_tokens_that_are_not_special_are_text():
    base = byte_level(eos_token="</s>")
    base.add_tokens([AddedToken("<think>", special=False)])
    alignment = align_vocabularies(base, TOKENIZERS["byte-level"], minimum_share=0)
    ids = base("So <think>7", return_tensors="pt")["input_ids"]
    assert len(base("<think>")["input_ids"]) == 1
    assert TOKENIZERS["byte-level"].decode(alignment.retokenize(ids)[0][0]) == "So <think>7"
    assert TOKENIZERS["byte-level"].decode(alignment.spell(ids)[0][0]) == "So <think>7"


CHAT = "<|user|>Hi there<|end|> and <|assistant|>So"


def chat_tokenizers(make):
    """A tokenizer whose special tokens are those of CHAT."""
    tokenizer = make(eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    return tokenizer


@pytest.mark.parametrize("base", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("proxy", [byte_level, sentencepiece_like])
def test_a_chat_keeps_its_text_between_special_tokens(base, proxy):
    """No space is made or lost after a special token, whatever the tokenizers do at the start of a text."""
    base, proxy = chat_tokenizers(base), chat_tokenizers(proxy)
    alignment = align_vocabularies(base, proxy, minimum_share=0)
    read, _ = alignment.retokenize(base(CHAT, return_tensors="pt")["input_ids"])
    assert proxy.decode(read[0], clean_up_tokenization_spaces=False) == CHAT
    assert proxy.convert_ids_to_tokens(read[0])[0] == "<|user|>"


def test_text_that_spells_a_special_token_of_the_proxy_stays_text():
    base, proxy = TOKENIZERS["tiny pair"], TOKENIZERS["byte-level"]
    alignment = align("tiny pair", "byte-level")
    for text in ("say </s> now", "</s>"):
        ids = base(text, return_tensors="pt")["input_ids"]
        for read in (alignment.retokenize(ids)[0], alignment.spell(ids)[0]):
            assert proxy.eos_token_id not in read[0].tolist()
            assert proxy.decode(read[0]) == text


def test_tokens_can_be_said_to_be_the_same():
    base, proxy = chat_tokenizers(byte_level), byte_level(eos_token="</s>", pad_token="<turn_end>")
    turn_end = proxy.convert_tokens_to_ids("<turn_end>")
    assert align_vocabularies(base, proxy, minimum_share=0).base_id(turn_end) is None
    alignment = align_vocabularies(base, proxy, minimum_share=0, same={"<turn_end>": "<|assistant|>"})
    assert alignment.base_id(turn_end) == base.convert_tokens_to_ids("<|assistant|>")
    for same, message in (({"<x>": "a"}, "'<x>', which is no token of the proxy"), ({"a": "<y>"}, "of the base")):
        with pytest.raises(ValueError, match=message):
            align_vocabularies(base, proxy, minimum_share=0, same=same)


def test_added_tokens_without_a_row_in_a_model_are_left_out():
    base, proxy = byte_level(eos_token="</s>"), byte_level(eos_token="</s>")
    size = len(base)
    for tokenizer in (base, proxy):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    alignment = align_vocabularies(base, proxy)
    assert align_vocabulary(torch.zeros(1, size), size, alignment).isfinite().all()
    assert alignment.base_id(proxy.pad_token_id) == base.pad_token_id


def test_an_alignment_can_be_pickled():
    alignment = align("tiny pair", "byte-level")
    ids = TOKENIZERS["tiny pair"]("Ada has 1 hat.", return_tensors="pt")["input_ids"]
    expected = alignment.spell(ids)[0].tolist()
    assert pickle.loads(pickle.dumps(alignment)).spell(ids)[0].tolist() == expected


@pytest.mark.slow
def test_large_vocabularies_with_many_added_tokens_are_matched():
    """As many added tokens as Gemma has; a search through all matches for each would take minutes."""

    def large(offset):
        vocabulary = {"a": offset, "b": 1 - offset} | {f"w{i + offset}": 2 + i for i in range(100_000)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.decoder = decoders.Fuse()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        fast.add_tokens([AddedToken(f"<unused{i}>", special=True) for i in range(5000)])
        return fast

    alignment = align_vocabularies(large(0), large(1), sample_text="ab")
    assert alignment.report.shared == 2 + 99_999 + 5000


@pytest.mark.parametrize("given", [None, "gpt2"])
def test_what_is_no_tokenizer_is_named(given):
    with pytest.raises(TypeError, match=f"`proxy_tokenizer` must be a tokenizer .* got {type(given).__name__}"):
        align_vocabularies(TOKENIZERS["tiny pair"], given)


def test_an_empty_sample_is_refused():
    with pytest.raises(ValueError, match="must hold text, got ' '"):
        align_vocabularies(TOKENIZERS["tiny pair"], TOKENIZERS["byte-level"], sample_text=" ")


def test_models_smaller_than_their_tokenizers_are_named():
    alignment = align("tiny pair", "byte-level")
    with pytest.raises(ValueError, match=r"proxy's tokenizer has the token id \d+, but .* ends at 300"):
        align_vocabulary(torch.zeros(1, 300), 700, alignment)
    with pytest.raises(ValueError, match=r"base's tokenizer has the token id \d+, but .* ends at 200"):
        align_vocabulary(torch.zeros(1, 700), 200, alignment)
