"""KAD in the continuous batching of transformers, token by token. Experimental.

In continuous batching requests join and leave the batch at every step, and the base reads its running requests in one
forward over a paged cache. Here the proxy does so too: one forward over all running requests, which are the rows of a
padded batch with a cache of its own, and one more over the prompts that join in the same step.

    with continuous_batching(base, kad) as manager:
        manager.add_request(ids, threshold=0.6)
        for output in manager:
            ...

or, for a list of prompts, `generate_batch(base, prompts, kad)`.

The scheduler hands out one token for each request and step, so that there is no speculative decoding. What this module
uses of `transformers.generation.continuous_batching` is no public interface.
`tests/integrations/test_continuous_batching.py` says what has moved when a new version changes it.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager, RequestState
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput

from ..decoding.attachment import ends_of_both
from ..decoding.call_arguments import CallArguments
from ..decoding.refusals import refuse_base
from ..logits_process import KADLogitsProcessor
from ..models.activated_lora import invocation_tokens
from ..models.adapters import model_below
from ..models.model_errors import ContextLengthError, is_unusable, unusable_logits_error
from ..models.running_texts import RunningTexts
from ..models.text_reader import tempered
from ..models.vocabulary import align_vocabulary
from ..rules.base import Rule, StatefulRule
from ..rules.composition import compose, with_bans
from ..rules.registry import unknown_name_message

REMEMBERED_REQUESTS = 10_000  # whose states of a rule with a memory are kept


class ContinuousBatchingKAD(ContinuousBatchingLogitsProcessor):
    """Turns the base's scores of the running requests into log r.

    Every parameter of the rule is one that a request may set, `manager.add_request(ids, threshold=0.6)`, in place of
    that of the processor.

    Args:
        kad: the processor, of which the models and the settings are used. Its caches and statistics are not.
    """

    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, kad: KADLogitsProcessor) -> None:
        self.kad = kad
        rule = kad.settings.rule
        known = fields(rule) if is_dataclass(rule) else ()
        self.supported_kwargs = {field.name: type(getattr(rule, field.name)) for field in known}
        self._models = [
            RunningTexts(cached.model, cached.role, without_adapter=cached.without_adapter)
            for cached in kad.state.models
        ]
        self._requests: list[RequestState] = []
        # Of a rule with a memory, by the request: the length of the text, and the state behind its next token. A
        # request that is moved out of the batch comes back under its name.
        self._rule_states: OrderedDict[str, tuple[int, torch.Tensor]] = OrderedDict()

    @property
    def context_length(self) -> int | None:
        """The longest text that the proxy reads, in tokens; None without a limit."""
        return self.kad.state.models.proxy.context_length

    def checked_parameters(self, parameters: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
        """Parameters of a request as they are passed on, of which those of the rule have been checked.

        Args:
            parameters: what the request sets.
            known: the names that some processor of the manager knows.

        Raises:
            ValueError: a value out of range.
            TypeError: a name that nobody knows.
        """
        for name in parameters:
            if name not in known:
                raise TypeError(unknown_name_message("parameter of a request:", name, known))
        self._rule_of(parameters)
        # transformers takes no integer for a float.
        kinds = {name: self.supported_kwargs.get(name) for name in parameters}
        return {name: float(value) if kinds[name] is float else value for name, value in parameters.items()}

    def _rule_of(self, parameters: dict[str, Any]) -> Rule:
        """The rule of a request with these parameters, among which there may be those of other processors."""
        own = {name: value for name, value in parameters.items() if name in self.supported_kwargs}
        return replace(self.kad.settings.rule, **own) if own else self.kad.settings.rule

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Every request has its parameters in its state, and none in the tensor."""
        int32_tensor.fill_(0)

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        """Remember whose scores come next, in their order."""
        self._requests = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._requests), dtype=torch.int32, device="cpu")

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Log r of each request, for the base's scores `(n, V)`. There may be more rows, which nobody reads."""
        requests, settings = self._requests, self.kad.settings
        if not requests:
            return scores
        own = scores[: len(requests)]
        base_logits = tempered(with_bans(own), settings.component_temperature)
        self._check("base", None, own)
        # The states of two steps in a row exist at the same time, so that their ids can name them.
        texts = {id(state): [*state.initial_tokens, *state.generated_tokens] for state in requests}
        of_models = []
        for running in self._models:
            logits = align_vocabulary(running.logits(texts), scores.shape[-1], None)
            self._check(running.role, running.model, logits)
            of_models.append(tempered(logits, settings.component_temperature))
        guided = torch.empty_like(own)
        rules = [self._rule_of(state.logit_processor_kwargs) for state in requests]
        for rule in dict.fromkeys(rules):
            rows = [row for row, other in enumerate(rules) if other == rule]
            state = self._states_before(rule, [requests[row] for row in rows], own.device)
            made = compose(rule, base_logits[rows], *(logits[rows] for logits in of_models), state=state)
            guided[rows] = made.target_probs.log().to(guided)
            if made.next_state is not None:
                self._keep_states([requests[row] for row in rows], made.next_state)
        return torch.cat([guided, scores[len(requests) :]])

    def _states_before(self, rule: Rule, requests: list[RequestState], device: torch.device) -> torch.Tensor | None:
        """Of a rule with a memory, the states behind the texts of some requests, `(n, ...)`."""
        if not isinstance(rule, StatefulRule):
            return None
        states = rule.initial_state(len(requests), device)
        for row, request in enumerate(requests):
            length, behind = self._rule_states.get(request.request_id, (None, None))
            if behind is not None and length == _length(request) - 1:
                states[row] = behind
        return states

    def _keep_states(self, requests: list[RequestState], states: torch.Tensor) -> None:
        for request, state in zip(requests, states, strict=True):
            self._rule_states[request.request_id] = _length(request), state
            self._rule_states.move_to_end(request.request_id)
        while len(self._rule_states) > max(REMEMBERED_REQUESTS, len(self._requests)):
            self._rule_states.popitem(last=False)

    def _check(self, role: str, model: PreTrainedModel | None, logits: torch.Tensor) -> None:
        """Raise for logits that define no distribution."""
        flags = is_unusable(logits).tolist()
        if any(flags):
            state = self._requests[flags.index(True)]
            raise unusable_logits_error(role, model, _length(state), flags.index(True))


def _length(request: RequestState) -> int:
    """The length of the text of a request, in tokens."""
    return len(request.initial_tokens) + len(request.generated_tokens)


class KADBatchingManager(ContinuousBatchingManager):
    """A manager of continuous batching whose requests are guided. Made by `init_continuous_batching`.

    Attributes:
        kad: the processor of its requests.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        kad: KADLogitsProcessor,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
    ) -> None:
        super().__init__(base, generation_config, continuous_batching_config)
        self.kad = ContinuousBatchingKAD(kad)
        # In its place among those of the configuration: behind bans and penalties, before temperature and top_p.
        self.logit_processor = ContinuousBatchingLogitsProcessorList(
            base._get_logits_processor(generation_config, logits_processor=LogitsProcessorList([self.kad])),
            per_request_processors=continuous_batching_config.per_request_processors,
            drop_unsupported_processors=continuous_batching_config.drop_unsupported_processors,
        )
        self.logit_processor.tensors_required += 1

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        **settings: Any,
    ) -> str | None:
        """Add a prompt, see `ContinuousBatchingManager.add_request`.

        A text ends where the proxy's context does, whatever `max_new_tokens` says.

        Args:
            input_ids: the prompt.
            request_id: its name; None to make one.
            max_new_tokens: None for those of the generation configuration.
            **settings: those of `ContinuousBatchingManager.add_request`, and parameters of the rule.

        Raises:
            ValueError: a parameter out of range, or a prompt that the proxy can't read.
            TypeError: a parameter that does not exist.
        """
        own = {name: settings.pop(name) for name in list(settings) if name not in _SETTINGS_OF_REQUESTS}
        own = self.kad.checked_parameters(own, self.logit_processor.supported_keys)
        limit, wanted = self.kad.context_length, max_new_tokens
        if limit is not None:
            if len(input_ids) >= limit:
                raise ContextLengthError(
                    f"The prompt has {len(input_ids)} tokens, and the proxy reads at most {limit}."
                )
            wanted = self.generation_config.max_new_tokens if wanted is None else wanted
            room = limit - len(input_ids)
            wanted = room if wanted is None else min(wanted, room)
        name: str | None = super().add_request(list(input_ids), request_id, wanted, **settings, **own)
        return name


# Settings that run a step as one program on the device, or begin it before the last token of each text is known.
_NEED_ONE_PROGRAM = (
    *("use_async_batching", "use_cuda_graph"),
    *("default_compile_level", "varlen_compile_config", "decode_compile_config"),
)
# The arguments of `ContinuousBatchingManager.add_request` beside those that `KADBatchingManager` names.
_SETTINGS_OF_REQUESTS = ("streaming", "record_timestamps", "eos_token_id")


def init_continuous_batching(
    base: PreTrainedModel,
    kad: KADLogitsProcessor,
    *,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    assistant_model: object = None,
) -> KADBatchingManager:
    """A manager of continuous batching whose requests are guided. Experimental; it is not started yet.

    Texts end at the end-of-sequence ids of the base and of the proxy.

    Args:
        base: the base.
        kad: the processor. Its statistics are not written.
        generation_config: of all requests; None for the base's own.
        continuous_batching_config: without asynchronous batches, CUDA graphs and compilation, since the processor has
            to know the last token of each text and runs a model of its own.
        assistant_model: must be None, since there is no speculative decoding in continuous batching.

    Raises:
        ValueError: what can't be guided in this way.
    """
    _refuse(kad, assistant_model)
    model = model_below(base)
    refuse_base(kad.state, model)
    config = copy.deepcopy(continuous_batching_config) or ContinuousBatchingConfig()
    for name in _NEED_ONE_PROGRAM:
        value = getattr(config, name)
        if value not in (None, False, (False, False)):
            raise ValueError(f"KAD in continuous batching runs without `{name}`, got {value!r:.200}: leave it out.")
    config.use_async_batching = config.use_cuda_graph = False
    settings = copy.deepcopy(generation_config or model.generation_config)
    ends = ends_of_both(kad.state, CallArguments(model, {"generation_config": settings}))
    settings.eos_token_id = ends or -1  # -1 for none
    return KADBatchingManager(model, kad, settings, config)


def _refuse(kad: KADLogitsProcessor, assistant_model: object) -> None:
    """Raise `ValueError` for processors that can't serve in continuous batching."""
    settings = kad.settings
    if assistant_model is not None:
        raise ValueError(
            "Continuous batching emits one token for each request and step, so that there is no speculative decoding, "
            f"got an `assistant_model` ({type(assistant_model).__name__}): leave it out, or decode with `generate`."
        )
    for name, value in (("lazy", settings.lazy), ("trace", settings.trace)):
        if value:
            raise ValueError(f"`{name}=True` is not available in continuous batching: build a processor without it.")
    if settings.vocabulary_alignment is not None:
        raise ValueError(
            "`vocabulary_alignment` is not available in continuous batching: take a proxy with the base's tokenizer."
        )
    if invocation_tokens(kad.proxy) is not None:
        raise ValueError("A proxy that is an activated LoRA is not available in continuous batching.")
    for cached in kad.state.models:
        if cached.longrope_switch is not None:
            raise ValueError(
                f"A {cached.role} with LongRoPE is not available in continuous batching, where the longest request "
                "would decide how all others are read."
            )


@contextmanager
def continuous_batching(
    base: PreTrainedModel, kad: KADLogitsProcessor, **settings: Any
) -> Iterator[KADBatchingManager]:
    """Run a manager whose requests are guided, for the time of the block. Experimental.

    Args:
        base: the base.
        kad: the processor.
        **settings: those of `init_continuous_batching`.
    """
    manager = init_continuous_batching(base, kad, **settings)
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True)
        manager.destroy()


def generate_batch(
    base: PreTrainedModel,
    inputs: Sequence[Sequence[int]],
    kad: KADLogitsProcessor,
    *,
    max_new_tokens: int | None = None,
    **settings: Any,
) -> list[GenerationOutput]:
    """Decode prompts of any length by continuous batching, guided by a proxy. Experimental.

    Args:
        base: the base.
        inputs: token ids of each prompt, without padding.
        kad: the processor.
        max_new_tokens: of each prompt; None for that of the generation configuration.
        **settings: those of `init_continuous_batching`.

    Returns:
        The output of each prompt, in their order: `generated_tokens`, and `error` where one failed.

    Raises:
        RuntimeError: the thread that decodes has died.
    """
    results: dict[str, GenerationOutput] = {}
    with continuous_batching(base, kad, **settings) as manager:
        if manager.num_return_sequences > 1:
            raise ValueError(
                f"`num_return_sequences` must be 1, got {manager.num_return_sequences}: give a prompt several times."
            )
        ids = manager.add_requests([list(text) for text in inputs], max_new_tokens=max_new_tokens)
        while len(results) < len(ids):
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                results[output.request_id] = output
            elif output is None and not manager.is_running():
                raise RuntimeError("The thread of continuous batching ended before all prompts were decoded.")
    return [results[name] for name in ids]
