"""Answers that can be looked at while they are generated: guided by KAD, of the base alone, and of the proxy alone."""

import functools
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, set_seed
from transformers.generation import BaseStreamer

from ...configuration import KADConfig
from ...integrations.loading.prompts import PLAIN_SAMPLING, encode
from ...integrations.requests import tokens_that_fit
from ...records.trace import KADTrace
from ..pair import Pair

MAX_PROMPT = 4000  # characters
MAX_NEW_TOKENS = 512
MAX_TEMPERATURE = 2.0

# Models are shared, and so is PyTorch's random state: one text is generated at a time.
_GENERATING = threading.Lock()


@dataclass(frozen=True)
class Question:
    """What a visitor asks for.

    Attributes:
        prompt: the user's turn.
        rule: the name of a rule.
        parameters: its parameters.
        temperature: of the sampling; 0 decodes greedily.
        seed: of the sampling, the same for each of the three texts.
        max_new_tokens: the maximum length of each text, in tokens.

    Raises:
        ValueError, TypeError: a value that is missing or out of range.
    """

    prompt: str
    rule: str = "dual"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("Write a prompt first.")
        if len(self.prompt) > MAX_PROMPT:
            raise ValueError(f"A prompt has at most {MAX_PROMPT} characters here, got {len(self.prompt)}.")
        for name, low, high in (("temperature", 0, MAX_TEMPERATURE), ("max_new_tokens", 1, MAX_NEW_TOKENS)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"`{name}` must lie between {low} and {high}, got {getattr(self, name)!r}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must lie between 0 and {2**32 - 1}, got {self.seed!r}.")

    def settings(self) -> dict[str, Any]:
        """The arguments of `generate`."""
        sampling = {**PLAIN_SAMPLING, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        return {**sampling, "max_new_tokens": self.max_new_tokens}


@dataclass(frozen=True)
class Answer:
    """The three texts as far as they are generated.

    Attributes:
        guided: the trace of the text guided by KAD, with its statistics; None or empty before the end of a round.
        base: the text of the base alone.
        proxy: the text of the proxy alone.
    """

    guided: KADTrace | None = None
    base: str = ""
    proxy: str = ""


def answer(
    pair: Pair, question: Question, stop: threading.Event, *, every: float = 0.1
) -> Generator[Answer, None, None]:
    """Answer a question in a thread of its own, with a processor of its own, and yield the answer while it grows.

    Leaving the iterator ends the answer at its next token, as `stop` does.

    Args:
        pair: the models.
        question: the prompt and the settings.
        stop: ends the answer where it is set.
        every: the least time between two steps of the answer that are yielded, in seconds. The last one always is.

    Raises:
        ValueError, TypeError, RuntimeError: what the rule, the processor or `generate` refuse.
    """
    work = _Work(pair, question, stop, every)
    thread = threading.Thread(target=work.run, daemon=True)
    thread.start()
    try:
        while (step := work.steps.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            yield step
    finally:
        stop.set()
        thread.join()


class _Work:
    """What the thread of an answer does.

    Attributes:
        steps: the answer while it grows; an exception if it fails; None at the end.
    """

    def __init__(self, pair: Pair, question: Question, stop: threading.Event, every: float) -> None:
        self.steps: queue.SimpleQueue[Answer | BaseException | None] = queue.SimpleQueue()
        self._pair, self._question, self._stop, self._every = pair, question, stop, every
        self._kad = pair.processor(KADConfig(question.rule, dict(question.parameters)), trace=True)

    def run(self) -> None:
        """Generate the three texts one after the other."""
        try:
            with _GENERATING:
                self._generate_texts()
        except BaseException as error:  # raised again where the answer is read
            self.steps.put(error)
        self.steps.put(None)

    def _generate_texts(self) -> None:
        pair, kad = self._pair, self._kad
        inputs = encode(pair.tokenizer, [self._question.prompt], pair.device, model=pair.base)
        guided = {"logits_processor": [kad], "assistant_model": kad.proxy}
        self._generate(pair.base, inputs, pair.eos_token_ids, self._guided_so_far, **guided)
        shown = Answer(kad.trace)
        self.steps.put(shown)
        for name, model, ends in (
            ("base", pair.base, pair.eos_token_ids),
            ("proxy", pair.proxy, pair.proxy_eos_token_ids),
        ):
            if self._stop.is_set():
                return
            step = functools.partial(_with_text, shown, name, pair.tokenizer)
            shown = step(self._generate(model, inputs, ends, step))
            self.steps.put(shown)

    def _generate(
        self,
        model: PreTrainedModel,
        inputs: BatchEncoding,
        ends: list[int] | None,
        step: Callable[[list[int]], Answer],
        **arguments: Any,
    ) -> list[int]:
        """Generate the ids of a text; `step` makes the answer so far of the ids so far."""
        pair, prompt_length = self._pair, inputs["input_ids"].shape[1]
        settings = self._question.settings()
        settings["max_new_tokens"] = tokens_that_fit(settings["max_new_tokens"], prompt_length, pair.base, pair.proxy)
        set_seed(self._question.seed)
        ids = model.generate(
            **inputs,
            **settings,
            **arguments,
            eos_token_id=ends,
            pad_token_id=pair.pad_token_id,
            stopping_criteria=[_Stop(self._stop)],
            streamer=_Steps(lambda ids: self.steps.put(step(ids)), self._every),
        )
        new: list[int] = ids[0, prompt_length:].tolist()
        return new

    def _guided_so_far(self, _: list[int]) -> Answer:
        call = self._kad.state.open_call
        return Answer(None if call is None else call.trace_so_far())


def _with_text(shown: Answer, name: str, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Answer:
    """The answer with the text of one of the models alone."""
    text = str(tokenizer.decode(ids))
    return replace(shown, base=text) if name == "base" else replace(shown, proxy=text)


class _Stop(StoppingCriteria):
    """Ends a text where an event is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stop.is_set(), device=input_ids.device)


class _Steps(BaseStreamer):
    """Tells the ids of a text while it grows, at most once in a time, without those of the prompt."""

    def __init__(self, tell: Callable[[list[int]], None], every: float) -> None:
        self._tell, self._every = tell, every
        self._ids: list[int] | None = None  # None before the prompt
        self._told = time.monotonic()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        if time.monotonic() - self._told >= self._every:
            self._tell(self._ids)
            self._told = time.monotonic()

    def end(self) -> None:
        """Nothing is left to tell: the text is returned."""
