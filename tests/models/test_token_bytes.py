"""What the tokens of tokenizers stand for."""

import pytest
from test_vocabulary import TOKENIZERS
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from transformers_kad import align_vocabularies
from transformers_kad.models.token_bytes import TokenBytes, byte_level_text


def test_a_tokenizer_that_cannot_be_read_as_text_is_refused():
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    pieces = PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path="pieces")
    with pytest.raises(ValueError, match=r"'pieces' writes its tokens .*WordPiece"):
        align_vocabularies(TOKENIZERS["tiny pair"], pieces)


def test_a_tokenizer_without_a_decoder_is_refused():
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1}, unk_token="a")), name_or_path="words"
    )
    with pytest.raises(ValueError, match=r"'words' writes its tokens .*'no decoder'"):
        align_vocabularies(TOKENIZERS["tiny pair"], words)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["Ada has 12 hats.", "Grüße, 東京 🙂", "a\nb\tc"])
def test_tokens_stand_for_the_bytes_of_their_text(name, text):
    tokens = TokenBytes(TOKENIZERS[name])
    space = b" " if tokens.space_at_start else b""
    assert tokens.bytes_of(tokens.tokenize(text)) == space + text.encode()
    pieces = tokens.longest_pieces(text.encode())
    assert tokens.bytes_of(pieces) == text.encode()
    assert len(pieces) <= len(text.encode())
    assert tokens.has_every_byte


def test_a_byte_that_is_a_token_is_taken_before_its_fallback():
    tokens = TokenBytes(TOKENIZERS["sentencepiece"])
    vocabulary = TOKENIZERS["sentencepiece"].get_vocab()
    assert tokens.text[vocabulary["<0x61>"]] == tokens.text[vocabulary["a"]] == b"a"
    assert tokens.by_text[b"a"] == vocabulary["a"]
    assert tokens.by_text[b"\xff"] == vocabulary["<0xFF>"]


def test_bytes_without_a_token_are_not_spelled():
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer.decoder = decoders.Fuse()
    tokens = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert tokens.longest_pieces(b"aab") == (0, 2)
    assert tokens.longest_pieces(b"abc") == ()
    assert not tokens.has_every_byte


def test_the_bytes_of_a_byte_level_token():
    assert byte_level_text("Ġhé") == b" h\xe9"
    assert byte_level_text("a b") is None  # no such tokenizer writes a space
