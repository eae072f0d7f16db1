"""KAD in vLLM: a processor for the V1 runner, with the proxy beside the engine.

The processor for Model Runner V2 is in `vllm_v2.py`, and has settings, requests and the proxy in common with this one.

vLLM loads the class by its name, and the class finds its settings by the environment variable `KAD_CONFIG`:

    KAD_CONFIG=kad vllm serve BASE --logits-processors transformers_kad.integrations.vllm:KADBatchLogitsProcessor

    LLM(model=BASE, logits_processors=["transformers_kad.integrations.vllm:KADBatchLogitsProcessor"])

Settings of one request are in `SamplingParams(extra_args={"kad": ...})`, or `vllm_xargs` of a request to the server.
docs/vllm.md describes both, how vLLM and this library are installed together, and what was tried.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, overload

import torch
from transformers import PreTrainedModel

from ..configuration import KADConfig
from ..logits_process import KADLogitsProcessor
from ..models.activated_lora import invocation_tokens
from ..models.cached_model import CachedModel
from ..models.model_errors import describe, is_unusable, unusable_logits_error
from ..models.running_texts import RunningTexts
from ..models.text_reader import tempered
from ..models.vocabulary import align_vocabulary, check_tokenizers
from ..rules.base import Rule, StatefulRule
from ..rules.composition import compose, with_bans
from ..utils.strict_json import parse_json
from .loading.configuration import with_models
from .loading.models import load_model, load_tokenizer
from .requests import config_of_request

if find_spec("vllm") is not None:
    from vllm.v1.sample.logits_processor import LogitsProcessor
else:  # for readers of the documentation and tests of what does not need the engine
    LogitsProcessor = object

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate

logger = logging.getLogger("vllm.transformers_kad")  # below that of vLLM, whose handler prints it

CONFIG_VARIABLE = "KAD_CONFIG"
CACHE_VARIABLE = "KAD_CACHE_GIB"
DEFAULT_CACHE_GIB = 4.0
# What a request may set. The other settings of a `KADConfig` are about `generate`.
SETTINGS_OF_REQUESTS = ("rule", "parameters", "component_temperature")


@lru_cache
def engine_config(folder: str | None) -> KADConfig:
    """The settings of the engine, from the folder or Hub repo that `KAD_CONFIG` names.

    Raises:
        ValueError: the variable is not set.
        FileNotFoundError: there is no `kad_config.json`.
    """
    if not folder:
        raise ValueError(
            f"The environment variable {CONFIG_VARIABLE} must name a folder or Hub repo with a kad_config.json, got "
            f'{folder!r}. Write one with `KADConfig(rule="dual", proxy="PROXY").save_pretrained("FOLDER")`.'
        )
    return KADConfig.from_pretrained(folder)


def cache_bytes_from(gib: str | None) -> int:
    """The memory that `KAD_CACHE_GIB` grants to the caches of the proxy, in bytes.

    Raises:
        ValueError: the value is no number, or negative.
    """
    try:
        size = float(gib or DEFAULT_CACHE_GIB)
    except ValueError:
        size = -1.0
    if not 0 <= size < float("inf"):
        raise ValueError(f"The environment variable {CACHE_VARIABLE} must be a number of GiB, got {gib!r}.")
    return int(size * 2**30)


def asked_of(sampling_params: "SamplingParams") -> object:
    """What a request asks for: the value of `kad` in its `extra_args`, of which the server passes on a simpler type.

    The server of vLLM takes numbers and text only: an object comes as a JSON text, and `false` as 0.

    Raises:
        ValueError: a text that is not JSON.
    """
    asked = (sampling_params.extra_args or {}).get("kad")
    if isinstance(asked, str):
        try:
            asked = parse_json(asked)
        except ValueError as error:
            raise ValueError(f"`kad` is a text, which must be JSON, got {asked!r:.200}: {error}.") from error
    if isinstance(asked, int) and asked in (0, 1):
        return bool(asked)
    return asked


@dataclass(frozen=True)
class Guidance:
    """What guides a request. Requests that are guided alike are computed together."""

    rule: Rule
    component_temperature: float


def guidance_of(default: KADConfig, sampling_params: "SamplingParams") -> Guidance | None:
    """What guides a request; None if it asks for the base alone.

    Raises:
        ValueError: an unknown name, a value out of range or of a wrong type, a rule with a memory, or a rule that
            needs the proxy before alignment in an engine that did not load it.
    """
    try:
        config = config_of_request(default, asked_of(sampling_params), SETTINGS_OF_REQUESTS)
    except TypeError as error:  # vLLM answers to a `ValueError` alone that the request is wrong
        raise ValueError(str(error)) from error
    if config is None:
        return None
    rule = config.make_rule()
    _refuse_memory(rule)
    if rule.needs_reference and not default.make_rule().needs_reference:
        raise ValueError(
            f"The rule {config.rule!r} needs the proxy before alignment, and this engine runs the rule "
            f"{default.rule!r}, which does not: ask for another rule, or name {config.rule!r} in {CONFIG_VARIABLE}."
        )
    return Guidance(rule, config.component_temperature)


def check_request(sampling_params: "SamplingParams") -> None:
    """Raise `ValueError` for a request whose `kad` can't be used. vLLM answers it with HTTP 400.

    vLLM calls this in the process that takes requests, where nothing but the environment tells the settings.
    """
    guidance_of(engine_config(os.environ.get(CONFIG_VARIABLE)), sampling_params)


class GuidedRequest(Sequence[int]):
    """A guided request and its tokens: the prompt, and behind it those in a list that goes on to change."""

    def __init__(self, guidance: Guidance, prompt: list[int], output: list[int]) -> None:
        self.guidance = guidance
        self.prompt = prompt
        self.output = output

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return (self.prompt + self.output)[index]
        at = index if index >= 0 else len(self) + index
        if not 0 <= at < len(self):
            raise IndexError(f"The request has {len(self)} tokens, got the index {index}.")
        return self.prompt[at] if at < len(self.prompt) else self.output[at - len(self.prompt)]

    def __iter__(self) -> Iterator[int]:
        yield from self.prompt
        yield from self.output

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class EngineProxy:
    """The proxy beside an engine, and the reference where the rule needs it: they turn logits of the base into log r.

    Raises:
        ValueError: no settings or settings that can't be used, or a proxy that does not fit.
    """

    def __init__(self, vllm_config: "VllmConfig", device: torch.device) -> None:
        if getattr(vllm_config.model_config, "enable_prompt_embeds", False):
            raise ValueError("KAD needs the tokens of all prompts, got `enable_prompt_embeds=True`: leave it out.")
        folder = os.environ.get(CONFIG_VARIABLE)
        config = engine_config(folder)
        try:
            self.config = with_models(config, base=vllm_config.model_config.model, proxy=None, source=folder)
        except ValueError as error:
            raise ValueError(f"No proxy is named by {CONFIG_VARIABLE}={folder!r}: set `proxy` there.") from error
        rule = self.config.make_rule()
        _refuse_memory(rule)
        proxy = load_model(str(self.config.proxy), device=str(device), merge=not rule.needs_reference)
        _check_tokenizers_of(vllm_config, str(self.config.proxy))
        kad = KADLogitsProcessor(proxy, rule)
        cache_bytes = cache_bytes_from(os.environ.get(CACHE_VARIABLE))
        models = list(kad.state.models)
        for cached in models:
            _refuse_model(cached, vllm_config.model_config.max_model_len)
        self.readers = [
            RunningTexts(
                cached.model,
                cached.role,
                without_adapter=cached.without_adapter,
                cache_bytes=cache_bytes // len(models),
            )
            for cached in models
        ]
        logger.info(
            "KAD guides all requests with %r, the proxy %s, and at most %.3g GiB for its caches.",
            rule,
            describe(proxy),
            cache_bytes / 2**30,
        )

    def guide(self, logits: torch.Tensor, rows: Mapping[GuidedRequest, Sequence[int]]) -> None:
        """Put log r in place of the base's logits `(n, V)`.

        Args:
            logits: written to.
            rows: of each request the rows of `logits` at its last positions, in the order of its text.
        """
        index = torch.tensor([row for own in rows.values() for row in own], device=logits.device)
        owners = [request for request, own in rows.items() for _ in own]
        lengths = [len(request) - back for request, own in rows.items() for back in range(len(own) - 1, -1, -1)]
        base_logits = logits[index]
        _check_logits("base", None, base_logits, lengths)
        of_models = [self._logits_of(reader, rows, owners, lengths, base_logits) for reader in self.readers]
        base_logits = with_bans(base_logits)
        for guidance in dict.fromkeys(request.guidance for request in rows):
            alike = [at for at, request in enumerate(owners) if request.guidance == guidance]
            target = compose(
                guidance.rule,
                *(
                    tempered(of_model[alike], guidance.component_temperature)
                    for of_model in (base_logits, *of_models[: 1 + guidance.rule.needs_reference])
                ),
            ).target_probs
            logits[index[alike]] = target.log().to(logits)

    @staticmethod
    def _logits_of(
        reader: RunningTexts,
        rows: Mapping[GuidedRequest, Sequence[int]],
        owners: Sequence[GuidedRequest],
        lengths: Sequence[int],
        base_logits: torch.Tensor,
    ) -> torch.Tensor:
        """The logits of the proxy or the reference for each row, in the base's vocabulary, `(n, V)` float32.

        The reference reads only requests whose rule needs it; the other rows are not filled.
        """
        texts = {
            request: request for request in rows if reader.role == "proxy" or request.guidance.rule.needs_reference
        }
        reading = [at for at, request in enumerate(owners) if request in texts]
        result = torch.empty_like(base_logits, dtype=torch.float32)
        if reading:
            logits = reader.logits(texts, {request: len(rows[request]) for request in texts})
            found = align_vocabulary(logits, base_logits.shape[-1])
            _check_logits(reader.role, reader.model, found, [lengths[at] for at in reading])
            result[reading] = found.to(result.device)
        return result


def _check_logits(role: str, model: PreTrainedModel | None, logits: torch.Tensor, lengths: Sequence[int]) -> None:
    """Raise for logits that define no distribution, which ends the engine."""
    unusable = is_unusable(logits).tolist()
    if any(unusable):
        row = unusable.index(True)
        raise unusable_logits_error(role, model, lengths[row], row)


class KADBatchLogitsProcessor(LogitsProcessor):
    """Turns the base's logits of the requests in a batch of vLLM into log r.

    One forward of the proxy reads the newest token of all running requests, and one more the prompts that join. A
    request is read from its beginning when it comes back after it was preempted. What vLLM keeps of prompts in its
    own cache (`--enable-prefix-caching`) is read by the proxy nevertheless, and a prompt that vLLM reads in chunks is
    read at once.

    vLLM applies what bans tokens (`allowed_token_ids`, `bad_words`, `min_tokens`, `logit_bias`, grammars) before this
    processor, and penalties, `temperature`, `top_k`, `top_p` and `min_p` after it, on r.

    Raises:
        ValueError: no settings or settings that can't be used, a speculative engine, or a proxy that does not fit.
    """

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """See `check_request`."""
        check_request(sampling_params)

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "In a V1 engine with speculative decoding, vLLM does not apply processors to the drafted tokens, so "
                "that KAD could not guide them: leave out the speculative configuration."
            )
        self._proxy = EngineProxy(vllm_config, device)
        self._requests: dict[int, GuidedRequest] = {}  # the guided ones, by their row

    def is_argmax_invariant(self) -> bool:
        """Always False: the likeliest token of r need not be that of the base."""
        return False

    def update_state(self, batch_update: "BatchUpdate | None") -> None:
        """Follow which request is in which row of the batch: first those removed, then those added, then moves."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._requests.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            self._requests.pop(row, None)
            guidance = guidance_of(self._proxy.config, params)
            if guidance is not None:
                if prompt is None:
                    raise ValueError("KAD needs the tokens of a prompt, got a request with embeddings alone.")
                self._requests[row] = GuidedRequest(guidance, prompt, output)
        for source, target, direction in batch_update.moved:
            moved, other = self._requests.pop(source, None), self._requests.pop(target, None)
            if moved is not None:
                self._requests[target] = moved
            if other is not None and direction.name == "SWAP":
                self._requests[source] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Log r in place of the base's logits `(n, V)`, in the rows of guided requests."""
        if self._requests:
            self._proxy.guide(logits, {request: [row] for row, request in sorted(self._requests.items())})
        return logits


def _refuse_memory(rule: Rule) -> None:
    """Raise `ValueError` for a rule with a memory."""
    if isinstance(rule, StatefulRule):
        raise ValueError(
            f"{rule!r} has a memory of each text, and vLLM does not tell a request that comes back after it was "
            "preempted from a new one: take a rule without a memory."
        )


def _refuse_model(cached: CachedModel, longest: int) -> None:
    """Raise `ValueError` unless the proxy or the reference can read every request, beside others of any length."""
    limit = cached.context_length
    if limit is not None and longest > limit:
        raise ValueError(
            f"Requests may have {longest} tokens, but the {cached.role} {describe(cached.model)} ends at {limit} "
            f"(max_position_embeddings): start vLLM with --max-model-len {limit}, or take a {cached.role} with a "
            "longer context."
        )
    if cached.longrope_switch is not None and longest > cached.longrope_switch:
        raise ValueError(
            f"The {cached.role} {describe(cached.model)} has LongRoPE, and the longest request of a batch would "
            f"decide how the others are read: start vLLM with --max-model-len {cached.longrope_switch}."
        )
    if invocation_tokens(cached.model) is not None:
        raise ValueError(
            f"The {cached.role} {describe(cached.model)} is an activated LoRA, which can't serve in vLLM."
        )


def _check_tokenizers_of(vllm_config: "VllmConfig", proxy: str) -> None:
    """Raise `ValueError` if ids mean different strings to base and proxy, where both have a tokenizer."""
    model_config = vllm_config.model_config
    if model_config.skip_tokenizer_init:
        return
    try:
        of_proxy = load_tokenizer(proxy)
    except ValueError:  # the proxy comes without one
        return
    check_tokenizers(load_tokenizer(model_config.tokenizer), of_proxy)
