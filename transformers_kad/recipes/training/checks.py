"""Checks that a proxy can guide a base, from tokenizers and configurations, before any weights are loaded."""

from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ...integrations.loading.models import below_adapter, load_tokenizer
from ...integrations.loading.prompts import no_padding_error, pad_token_id
from ...integrations.loading.reading import check_generation_config, load_architecture
from ...models.model_settings import text_setting
from ...models.vocabulary import describe_different_ids
from . import AlignmentError
from .arguments import log

# Texts that tokenizers with the same vocabulary, but different rules, split differently.
PROBES = (
    "Hello, world! It's 12 + 7 = 19.",
    "  two spaces\n\n\ttab, newline\n",
    "déjà vu, 東京, naïve, 🙂",
    "don't  x=1;y(2)",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Pair:
    """A base and a proxy that fit together.

    Attributes:
        tokenizer: the base's tokenizer, with the chat template to train with.
        vocabulary: the number of rows of the proxy's embedding matrix, padding included.
        context_length: the maximum length of a text for the proxy, in tokens; None if its configuration has none.
        eos_token_ids: the ids that end a text, from the generation configurations of both.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    context_length: int | None
    eos_token_ids: tuple[int, ...]


def check_pair(base: str, proxy: str, chat_template: str | None = None) -> Pair:
    """Check that the proxy can be trained for this base and guide it.

    Args:
        base: Hub id or folder of the base. Its weights are not loaded.
        proxy: Hub id or folder of the proxy, a model or an adapter.
        chat_template: file with a chat template to use instead of theirs.

    Raises:
        AlignmentError: ids mean different strings, text is split differently, special tokens exist in only one of the
            vocabularies, the embedding matrix is too small, there is no chat template, or a model is not a causal
            language model.
    """
    configs = load_config(base, "--base"), load_config(proxy, "--proxy")
    tokenizer = _load_tokenizer(base, "--base")
    vocabulary = text_setting(configs[1], "vocab_size", len(tokenizer))
    own_tokenizer = None if _has_no_tokenizer(proxy) else _load_tokenizer(proxy, "--proxy")
    if own_tokenizer is None:
        log(f"The proxy {proxy} has no tokenizer of its own; the base's is used.")
        if len(tokenizer) > vocabulary:
            raise AlignmentError(
                f"The base's tokenizer has {len(tokenizer)} tokens, but the proxy's embeddings end at {vocabulary}. "
                "Take a proxy of the same model family."
            )
    else:
        check_same_tokens(tokenizer, own_tokenizer)
    tokenizer.chat_template = find_chat_template(chat_template, tokenizer, own_tokenizer)
    if tokenizer.pad_token is None:
        if pad_token_id(tokenizer) is None:
            raise AlignmentError(str(no_padding_error(tokenizer)))
        tokenizer.pad_token_id = pad_token_id(tokenizer)
    context = text_setting(configs[1], "max_position_embeddings")
    eos = {index for path, config in zip((base, proxy), configs, strict=True) for index in _eos_ids(path, config)}
    return Pair(tokenizer, vocabulary, context, tuple(sorted(eos)))


def check_same_tokens(base_tokenizer: PreTrainedTokenizerBase, proxy_tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that two tokenizers give the same ids for the same strings.

    Their sizes may differ by padding, or by tokens that are not special and that only one of them has.

    Raises:
        AlignmentError: they don't; the message names the first ids or strings that differ.
    """
    difference = describe_different_ids(base_tokenizer, proxy_tokenizer)
    if difference is not None:
        raise AlignmentError(f"{difference} Take a proxy of the same model family.")
    base, proxy = base_tokenizer.get_vocab(), proxy_tokenizer.get_vocab()
    moved = [token for token in base.keys() & proxy.keys() if base[token] != proxy[token]]
    if moved:
        shown = ", ".join(f"{t!r}: {base[t]} and {proxy[t]}" for t in sorted(moved, key=base.__getitem__)[:5])
        raise AlignmentError(
            f"Base and proxy must share one vocabulary, but {len(moved)} strings have different ids (base and proxy): "
            f"{shown}. Take a proxy of the same model family."
        )
    for owner, other, tokenizer, vocabulary in (
        ("base", "proxy", base_tokenizer, proxy),
        ("proxy", "base", proxy_tokenizer, base),
    ):
        needed = [token for token in tokenizer.all_special_tokens if token != tokenizer.pad_token]
        missing = [token for token in needed if token not in vocabulary]
        if missing:
            eos = " (its end of sequence)" if tokenizer.eos_token in missing else ""
            raise AlignmentError(
                f"The {owner}'s tokenizer has special tokens that the {other}'s lacks: {missing[:5]}{eos}. Take a "
                "proxy of the same model family, or give both the same special tokens."
            )
    for text in PROBES:
        one, two = (t(text, add_special_tokens=False)["input_ids"] for t in (base_tokenizer, proxy_tokenizer))
        if one != two:
            raise AlignmentError(
                f"Base and proxy have the same tokens but split text differently: {text!r} is {one[:12]} to the base "
                f"and {two[:12]} to the proxy. Take a proxy of the same model family."
            )


def find_chat_template(
    path: str | None, tokenizer: PreTrainedTokenizerBase, proxy_tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """The chat template of a file, else the base's, else the proxy's.

    Raises:
        AlignmentError: the file can't be read, there is no template, or there are several and none is the default.
    """
    if path is not None:
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AlignmentError(f"--chat_template {path!r} cannot be read: {error}") from error
    for candidate in (tokenizer, proxy_tokenizer):
        if candidate is not None and candidate.chat_template is not None:
            if isinstance(candidate.chat_template, dict) and "default" not in candidate.chat_template:
                raise AlignmentError(
                    f"The tokenizer {candidate.name_or_path!r} has several chat templates, "
                    f"{', '.join(sorted(candidate.chat_template))}, and none of them is called default. Give the one "
                    "to train with by --chat_template FILE."
                )
            return candidate.get_chat_template()
    raise AlignmentError(
        f"Neither the tokenizer of the base ({tokenizer.name_or_path!r}) nor the proxy's has a chat template. Give "
        "one with --chat_template FILE, for example that of the family's instruct model."
    )


def load_config(path: str, option: str) -> PreTrainedConfig:
    """The configuration of a causal language model, or of the model below an adapter.

    Raises:
        AlignmentError: there is none, or it is that of an encoder-decoder model.
    """
    try:
        while (below := below_adapter(path)) is not None:
            path = below
        config = load_architecture(path)
        check_generation_config(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise AlignmentError(f"{option} {path!r} is not a folder or Hub id of a model: {reason}") from error
    if config.is_encoder_decoder:
        raise AlignmentError(f"{option} {path!r} is an encoder-decoder model; KAD needs decoders alone.")
    return config


def _load_tokenizer(path: str, option: str) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise AlignmentError(f"{option} {path!r} needs a tokenizer: {reason}") from error


def _has_no_tokenizer(path: str) -> bool:
    """Whether a local folder has no tokenizer, nor the model below it if it is an adapter. False for Hub ids."""
    if not Path(path).is_dir() or any((Path(path) / name).exists() for name in TOKENIZER_FILES):
        return False
    below = below_adapter(path)
    return below is None or _has_no_tokenizer(below)


def _eos_ids(path: str, config: PreTrainedConfig) -> list[int]:
    try:
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # an adapter, or a model that was saved without this file
        eos = text_setting(config, "eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]
