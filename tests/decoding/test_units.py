"""Numbers of two units: the base's tokens, and the tokens that a proxy with a tokenizer of its own reads them in.

The base's tokens are words, the proxy's are letters, so that nearly every number differs from one unit to the other.
"""

import itertools

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformers_kad import DualDeferral, ImplicitReward, KADLogitsProcessor, align_vocabularies
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.models.model_errors import ContextLengthError
from transformers_kad.models.static_model import CAPACITY_STEP
from transformers_kad.models.text_reader import TextReader

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["ab", "abc", "bca", "cabb", "ca", "bb", "aabbcc", "cb"]


def byte_level(extra):
    """A byte-level tokenizer of all bytes and some longer pieces."""
    vocabulary = {piece: index for index, piece in enumerate(["<pad>", *extra, *ALPHABET])}
    merges = [(word[:n], word[n]) for word in extra for n in range(1, len(word)) if word[: n + 1] in vocabulary]
    tokenizer = Tokenizer(models.BPE(vocabulary, [merge for merge in merges if merge[0] in vocabulary]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


BASE_TOKENIZER, PROXY_TOKENIZER = byte_level(WORDS), byte_level([])
ALIGNMENT = align_vocabularies(BASE_TOKENIZER, PROXY_TOKENIZER, minimum_share=0.0)
LETTERS = [len(BASE_TOKENIZER) - len(ALPHABET) + ALPHABET.index(letter) for letter in "abc"]
SPOKEN = [*range(1, len(WORDS) + 1), *LETTERS]  # what the base says: words of two to six letters, and letters


def make_base(seed=1):
    """A base that says the words and letters, and likes to repeat itself."""
    base = tiny_model(vocabulary=len(BASE_TOKENIZER), hidden=32, seed=seed)
    base.generation_config.suppress_tokens = sorted(set(range(len(BASE_TOKENIZER))) - set(SPOKEN))
    return base


def make_proxy(architecture="llama", seed=2, **settings):
    return tiny_model(architecture, vocabulary=len(PROXY_TOKENIZER), seed=seed, **settings)


def prompts(rows, repeats=3):
    """Prompts that repeat themselves, so that a lookup finds something."""
    generator = torch.Generator().manual_seed(3)
    places = torch.randint(0, len(SPOKEN), (rows, 5), generator=generator)
    return torch.tensor(SPOKEN)[places].repeat(1, repeats)


@torch.no_grad()
def log_r_by_hand(base, proxy, ids, rule, reference=None):
    """Log r behind a text `(1, L)`, without a cache, the proxy reading the letters."""
    read, _ = ALIGNMENT.retokenize(ids[:, :15])
    spelled = [piece for token in ids[0, 15:].tolist() for piece in ALIGNMENT.spell_token(token)]
    read = torch.cat([read, torch.tensor([spelled], dtype=torch.long)], dim=1)
    banned = torch.ones(len(BASE_TOKENIZER), dtype=torch.bool)
    banned[SPOKEN] = False

    def probs(logits):
        return logits.masked_fill(banned, -torch.inf).softmax(-1)

    def of(model):
        return probs(ALIGNMENT.to_base(model(read).logits[:, -1], len(BASE_TOKENIZER)))

    p = probs(base(ids).logits[:, -1])
    return rule(p, of(proxy), None if reference is None else of(reference)).log()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("drafter", ["proxy", "prompt_lookup"])
@pytest.mark.parametrize("kind", ["dual", "implicit_reward", "compiled"])
def test_scores_are_those_without_a_cache(uncompiled, rows, drafter, kind):
    base, proxy = make_base(), make_proxy()
    rule = ImplicitReward(0.2) if kind == "implicit_reward" else DualDeferral(0.5)
    reference = make_proxy(seed=9) if kind == "implicit_reward" else None
    kad = KADLogitsProcessor(
        proxy,
        rule,
        reference=reference,
        drafter=drafter,
        vocabulary_alignment=ALIGNMENT,
        compile=kind == "compiled",
    )
    settings = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True}
    settings |= {"logits_processor": [kad], "pad_token_id": 0}
    out = base.generate(prompts(rows), assistant_model=proxy, **settings)
    assert kad.statistics.drafted > 0
    widths = {len(ALIGNMENT.spell_token(token)) for token in out.sequences[:, 15:].flatten().tolist()}
    if (
        kind != "implicit_reward"
    ):  # which gives no probability to a word that the proxy can't say; its drafts have some
        assert len(widths) > 1
    for row, step in itertools.product(range(rows), range(20)):
        expected = log_r_by_hand(base, proxy, out.sequences[row : row + 1, : 15 + step], rule, reference)
        torch.testing.assert_close(out.scores[step][row].exp(), expected[0].exp(), atol=1e-3, rtol=1e-3)


def test_a_reader_answers_behind_tokens_of_the_base():
    """One entry a token, however many columns it is read in, and in rows that differ."""
    proxy = make_proxy()
    reader = TextReader(CachedModel(proxy), vocabulary=len(BASE_TOKENIZER), vocabulary_alignment=ALIGNMENT)
    texts = prompts(2, repeats=1)
    prompt, mask = ALIGNMENT.retokenize(texts)
    reader.begin(prompt, mask)
    tokens = torch.tensor([[SPOKEN[6], SPOKEN[8], SPOKEN[0]], [SPOKEN[9], SPOKEN[3], SPOKEN[2]]])
    got = reader.read(tokens, logits_to_keep=4)
    assert got.shape[1] == 4
    for row in range(2):
        for count in range(4):
            own = prompt[row][mask[row].bool()].tolist()
            own += [piece for token in tokens[row, :count].tolist() for piece in ALIGNMENT.spell_token(token)]
            with torch.no_grad():
                expected = ALIGNMENT.to_base(proxy(torch.tensor([own])).logits[0, -1], len(BASE_TOKENIZER))
            torch.testing.assert_close(got[row, count], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("drafter", ["proxy", "prompt_lookup"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_proxys_context_ends_in_its_own_tokens(rows, drafter):
    """Drafts of words that it reads letter by letter stay within it, and beyond it both ways of decoding refuse."""
    base = make_base()
    whole = make_proxy(max_position_embeddings=512)
    settings = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    kad = KADLogitsProcessor(whole, DualDeferral(0.5), vocabulary_alignment=ALIGNMENT)
    text = base.generate(prompts(rows), logits_processor=[kad], **settings)
    _, mask = ALIGNMENT.retokenize(prompts(rows))
    needed = [
        int(mask[row].sum()) + sum(len(ALIGNMENT.spell_token(token)) for token in text[row, 15:-1].tolist())
        for row in range(rows)
    ]
    short = make_proxy(max_position_embeddings=max(needed))
    kad = KADLogitsProcessor(short, DualDeferral(0.5), drafter=drafter, vocabulary_alignment=ALIGNMENT)
    assert torch.equal(base.generate(prompts(rows), logits_processor=[kad], assistant_model=short, **settings), text)
    shorter = make_proxy(max_position_embeddings=max(needed) - 1)
    kad = KADLogitsProcessor(shorter, DualDeferral(0.5), drafter=drafter, vocabulary_alignment=ALIGNMENT)
    for assistant in (None, shorter):
        with pytest.raises(ContextLengthError, match=f"ends at {max(needed) - 1}"):
            base.generate(prompts(rows), logits_processor=[kad], assistant_model=assistant, **settings)


def test_a_compiled_proxy_makes_room_for_its_own_tokens(uncompiled):
    """A text of less than a step of the base's tokens, and of more than one of the proxy's."""
    base, proxy = make_base(), make_proxy(max_position_embeddings=1024)
    settings = {"do_sample": False, "max_new_tokens": CAPACITY_STEP - 80, "pad_token_id": 0}
    settings["suppress_tokens"] = sorted(
        set(range(len(BASE_TOKENIZER))) - {3, 4, 7}
    )  # words of three letters and more
    texts = []
    for compiled in (False, True):
        kad = KADLogitsProcessor(proxy, DualDeferral(0.5), vocabulary_alignment=ALIGNMENT, compile=compiled)
        texts.append(base.generate(prompts(1), logits_processor=[kad], assistant_model=proxy, **settings))
    own = sum(len(ALIGNMENT.spell_token(token)) for token in texts[0][0].tolist())
    assert own > CAPACITY_STEP
    assert torch.equal(*texts)
