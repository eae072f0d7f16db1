"""Generates the answers of a method to a batch of chats, and measures them."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import BatchEncoding, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ...configuration import KADConfig
from ...integrations.loading.models import clear_generation_config, load_tokenizer
from ...integrations.loading.prompts import Prompt, encode, eos_token_ids, pad_token_id
from ...integrations.loading.thoughts import thought_opened_by
from ...logits_process import KADLogitsProcessor
from ...models.adapters import model_below
from ...models.model_errors import (
    ContextLengthError,
    UnusableLogitsError,
    describe,
    is_unusable,
    unusable_logits_error,
)
from ...models.model_settings import context_length
from ...records.statistics import SequenceStatistics
from ...rules.registry import RULES
from ..pair import Pair
from .methods import Method


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: the generated text without the token that ended it, but with other special tokens. If the chat template
            opens a thought in the prompt (`<think>`), the text begins with that mark.
        ended: whether it ended by itself.
        tokens: the number of generated tokens, the end of the turn included.
        seconds: the time it took. Each answer of a batch gets an equal share of the batch's time.
        statistics: statistics of drafts, rounds and deferral; None for methods without a rule.
        error: the reason why there is no answer; None if there is one.
        ids: the generated tokens, the end of the turn included.
    """

    text: str = ""
    ended: bool = False
    tokens: int = 0
    seconds: float = 0.0
    statistics: SequenceStatistics | None = None
    error: str | None = None
    ids: Sequence[int] = ()


@dataclass(frozen=True)
class _Generator:
    """A model with its tokenizer, and the ids that end a turn and that pad."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: list[int] | None
    pad_token_id: int | None


@dataclass
class Decoder:
    """Answers prompts by any method, with a base, a proxy and an aligned model.

    Args:
        pair: base and proxy.
        settings: arguments of `generate` for sampling.
        speculative: rules draft with the proxy. Otherwise all methods decode token by token.
        aligned: Hub id or folder of the aligned large model, for the method "aligned".
        chat: whether to apply the base's chat template to prompts; None to apply it if there is one.
        proxy_chat: the same for the proxy's own prompt; "same" if the proxy gets the base's prompt.
        template_arguments: further arguments of the chat template.
    """

    pair: Pair
    settings: Mapping[str, Any]
    speculative: bool = True
    aligned: str | None = None
    chat: bool | None = None
    proxy_chat: bool | str | None = "same"
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._processor: tuple[KADConfig, KADLogitsProcessor] | None = None
        clear_generation_config(self.pair.proxy)

    @cached_property
    def _aligned_model(self) -> _Generator:
        if self.aligned is None:
            raise ValueError('The method "aligned" needs --aligned, the id or folder of the aligned large model.')
        model, tokenizer = self.pair.load_large(self.aligned), load_tokenizer(self.aligned)
        return self._make_generator(model, tokenizer, eos_token_ids(model))

    def _make_generator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]
    ) -> _Generator:
        clear_generation_config(model)
        eos = sorted({*ends, tokenizer.eos_token_id} - {None}) or None
        return _Generator(model, tokenizer, eos, pad_token_id(tokenizer))

    def _generator_of(self, method: Method) -> _Generator:
        if method.name == "aligned":
            return self._aligned_model
        if method.name == "proxy":
            return self._make_generator(self.pair.proxy, self.pair.proxy_tokenizer, self.pair.proxy_eos_token_ids)
        return _Generator(self.pair.base, self.pair.tokenizer, self.pair.eos_token_ids, self.pair.pad_token_id)

    def _processor_of(self, config: KADConfig) -> KADLogitsProcessor:
        if self._processor is None or self._processor[0] != config:
            self._processor = (config, self.pair.processor(config))
        return self._processor[1]

    def prepare(self, method: Method) -> None:
        """Load the models that a method needs.

        Raises:
            ValueError: the method can't be used with these models or settings.
        """
        self._generator_of(method)
        if method.config is not None:
            self._processor_of(method.config)
        if method.name == "assisted":
            sizes = [m.get_input_embeddings().weight.shape[0] for m in (self.pair.base, self.pair.proxy)]
            if self.pair.alignment is not None or sizes[0] != sizes[1]:
                raise ValueError(
                    "Stock speculative decoding needs base and proxy of one vocabulary, got "
                    f"{sizes[0]} and {sizes[1]} rows: leave out the method 'assisted'."
                )
            if not self.speculative:
                raise ValueError("The method 'assisted' is speculative: leave it out, or leave out --no_speculative.")

    def answer(self, method: Method, prompts: Sequence[Prompt], seed: int, max_new_tokens: int) -> list[Answer]:
        """Answer each prompt, with at most `max_new_tokens` tokens.

        Equal prompts and seeds give equal answers, independently of earlier calls. If a batch fails (a prompt is too
        long, or logits are NaN), or if a long prompt would shorten the answers to the others, its prompts are answered
        one by one. So are those of the method "assisted", since transformers drafts for one prompt at a time.
        """
        self.prepare(method)
        if method.config is not None:
            self._processor_of(method.config).reset()
        set_seed(seed)
        if len(prompts) > 1 and method.name != "assisted":
            try:
                return self._decode(method, prompts, max_new_tokens)
            except Exception as error:
                if not isinstance(error, _CrowdedError) and not is_failure(error):
                    raise
            set_seed(seed)
        return [self._decode_or_fail(method, prompt, max_new_tokens) for prompt in prompts]

    def _encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        chat: bool | str | None,
        model: PreTrainedModel,
    ) -> BatchEncoding:
        """Encode chats by the chat template if there is one and it is to be used, or else as plain text."""
        templated = tokenizer.chat_template is not None if chat is None else bool(chat)
        texts = prompts if templated else [as_text(prompt) for prompt in prompts]
        return encode(tokenizer, texts, self.pair.device, chat=templated, model=model, **self.template_arguments)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> tuple[BatchEncoding, BatchEncoding | None]:
        """The base's inputs for some prompts, and the proxy's; None if the proxy gets the base's prompts."""
        pair, own = self.pair, None
        inputs = self._encode(pair.tokenizer, prompts, self.chat, pair.base)
        if self.proxy_chat != "same":
            own = self._encode(pair.proxy_tokenizer, prompts, self.proxy_chat, pair.proxy)
        return inputs, own

    def _decode_or_fail(self, method: Method, prompt: Prompt, max_new_tokens: int) -> Answer:
        started = time.perf_counter()
        try:
            return self._decode(method, [prompt], max_new_tokens)[0]
        except Exception as error:
            if not is_failure(error):
                raise
            return Answer(seconds=time.perf_counter() - started, error=f"{type(error).__name__}: {error}")

    def _decode(self, method: Method, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
        """Answer all prompts in one batch."""
        generator, pair = self._generator_of(method), self.pair
        own = None
        if method.config is not None:
            inputs, own = self.encode_prompts(prompts)
        else:
            chat = self.proxy_chat if method.name == "proxy" and self.proxy_chat != "same" else self.chat
            inputs = self._encode(generator.tokenizer, prompts, chat, generator.model)
        length = inputs["input_ids"].shape[1]
        processors: list[LogitsProcessor] = [_RefuseUnusableLogits(generator.model)]
        rooms = [(generator.model, length)]
        extra: dict[str, Any] = {}
        own_prompt: Any = nullcontext()
        kad = None
        if method.config is not None:
            kad = self._processor_of(method.config)
            processors = [kad]
            proxy_length = length
            if own is not None:
                own_prompt, proxy_length = kad.proxy_prompt(own), own["input_ids"].shape[1]
            rooms.append((pair.proxy, proxy_length))
            if self.speculative:
                extra["assistant_model"] = kad.proxy
        elif method.name == "assisted":
            extra["assistant_model"] = pair.proxy
            rooms.append((pair.proxy, length))
            fix_draft_length(pair.proxy, int(method.num_assistant_tokens))
        room = _room(rooms, max_new_tokens)
        if room < max_new_tokens and len(prompts) > 1:
            raise _CrowdedError
        started = time.perf_counter()
        with own_prompt:
            ids = generator.model.generate(
                **inputs,
                **self.settings,
                **extra,
                max_new_tokens=room,
                eos_token_id=generator.eos_token_ids,
                pad_token_id=generator.pad_token_id,
                logits_processor=processors,
            )
        rows = ids[:, length:].tolist()
        seconds = (time.perf_counter() - started) / len(prompts)
        statistics = kad.statistics if kad is not None else None
        # Without the mark that the chat template put into the prompt, a thought would look like an answer.
        opened = [thought_opened_by(end) for end in generator.tokenizer.batch_decode(inputs["input_ids"][:, -16:])]
        return [
            _answer(row, opened[at], generator, seconds, statistics.sequences[at] if statistics else None)
            for at, row in enumerate(rows)
        ]


def _answer(
    row: list[int], opened: str, generator: _Generator, seconds: float, statistics: SequenceStatistics | None
) -> Answer:
    ends = set(generator.eos_token_ids or ())
    end = next((at for at, token in enumerate(row) if token in ends), None)
    text = opened + generator.tokenizer.decode(row[:end])
    tokens = len(row) if end is None else end + 1
    return Answer(text, end is not None, tokens, seconds, statistics, ids=row[:tokens])


class _CrowdedError(Exception):
    """Raised for a batch whose longest prompt leaves less room for answers than `max_new_tokens`."""


def as_text(prompt: Prompt) -> str:
    """A chat as plain text: the contents of its turns, separated by empty lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message["content"] for message in prompt) + "\n"


def is_failure(error: Exception) -> bool:
    """Whether an error is due to the prompt, so that others may succeed. All other errors end the run."""
    if isinstance(error, ContextLengthError | UnusableLogitsError | torch.OutOfMemoryError):
        return True
    # Assisted decoding of transformers divides by a residual that may be zero, and then samples from NaN.
    return isinstance(error, RuntimeError) and "probability tensor contains" in str(error)


class _RefuseUnusableLogits(LogitsProcessor):
    """Raises an error if a model's logits are NaN, +inf or all -inf, as KAD does."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        unusable = is_unusable(scores).tolist()
        if any(unusable):
            raise unusable_logits_error("model", self.model, input_ids.shape[1], unusable.index(True))
        return scores


def _room(prompts: Sequence[tuple[PreTrainedModel, int]], wanted: int) -> int:
    """The number of tokens that fit into the contexts after the prompts, at most `wanted`."""
    for model, length in prompts:
        limit = context_length(model)
        if limit is not None:
            if length >= limit:
                raise ContextLengthError(
                    f"The prompt has {length} tokens, but the context of {describe(model)} ends at {limit}."
                )
            wanted = min(wanted, limit - length)
    return wanted


def fix_draft_length(proxy: PreTrainedModel, num_assistant_tokens: int) -> None:
    """Make assisted decoding of transformers draft a fixed number of tokens, independently of their probability."""
    settings = model_below(proxy).generation_config
    settings.num_assistant_tokens = num_assistant_tokens
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0


def shared_settings(decoder: Decoder) -> dict[str, Any]:
    """The settings that determine the answers of all methods, as JSON values."""
    models = decoder.pair.models
    return {
        "base": models.base,
        "proxy": models.proxy,
        "dtype": models.dtype,
        "quantization": models.quantization,
        "device": torch.device(decoder.pair.device).type,
        "align_vocabularies": models.align_vocabularies,
        "speculative": decoder.speculative,
        "chat": decoder.chat,
        "proxy_chat": decoder.proxy_chat,
        "template_arguments": dict(decoder.template_arguments),
        "generate": dict(decoder.settings),
    }


def own_settings(decoder: Decoder, method: Method) -> dict[str, Any]:
    """The settings that determine the answers of this method only, as JSON values."""
    settings: dict[str, Any] = {"name": method.name, "shown_parameters": method.parameters}
    if method.name == "aligned":
        settings["aligned"] = decoder.aligned
    if method.name == "assisted":
        settings["num_assistant_tokens"] = method.num_assistant_tokens
    if method.config is not None:
        settings["rule"] = method.config.rule
        settings["parameters"] = dict(method.config.parameters)
        settings["component_temperature"] = method.config.component_temperature
        settings["num_assistant_tokens"] = method.config.num_assistant_tokens
        # Defaults are left out: results that were recorded without these settings can still be resumed.
        for name in ("drafter", "compile", "lazy", "verification"):
            if getattr(method.config, name) != getattr(KADConfig, name):
                settings[name] = getattr(method.config, name)
        if RULES[method.config.rule].needs_reference:
            settings["reference"] = decoder.pair.models.reference or "below the proxy's adapter"
    return settings
