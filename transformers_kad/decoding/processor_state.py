"""What a KAD processor keeps between calls of `generate`."""

import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers import PreTrainedModel

from ..records.statistics import KADStatistics
from ..records.trace import KADTrace
from .call_arguments import as_id_list
from .open_call import OpenCall
from .proxy_models import ProxyModels
from .proxy_text import ProxyPrompt
from .rule_memory import RememberedText
from .settings import DecodingSettings


class ProcessorState:
    """The settings and the models of a processor, the call that is open, and the results of the last one.

    Attributes:
        settings: they never change.
        models: the proxy and the reference, with their caches.
        statistics: of the last finished call; None before the first, and where they could not be told.
        trace: of the last finished call, if it was asked for.
        warned: what was warned of already.
        attached_to: the bases that the processor is attached to; of copies of a base, those that have been called.
        remembered: for a rule with a memory, the texts of the last finished call.
    """

    def __init__(self, settings: DecodingSettings, models: ProxyModels) -> None:
        self.settings = settings
        self.models = models
        self.statistics: KADStatistics | None = None
        self.trace: KADTrace | None = None
        self.warned: set[Hashable] = set()
        self.attached_to: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
        self.remembered: list[RememberedText] = []
        self._claims: list[weakref.ref[OpenCall]] = []  # of calls, in order; the first that is not closed is open
        self._reset_at_close = False
        self._proxy_prompts: list[object] = []  # blocks of `using_proxy_prompt` that are open, in all threads

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but the caches and the calls."""
        return {name: vars(self)[name] for name in ("settings", "models", "statistics", "trace", "warned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        empty: dict[str, Any] = {
            "attached_to": weakref.WeakSet(),
            "remembered": [],
            "_claims": [],
            "_proxy_prompts": [],
        }
        vars(self).update(state, _reset_at_close=False, **empty)

    @property
    def open_call(self) -> OpenCall | None:
        """The running call of `generate`, in whatever thread."""
        for claim in list(self._claims):
            call = claim()
            # A call whose frames are gone is over, even if an interrupt kept it from being closed.
            if call is not None and not call.closed:
                return call
        return None

    def open(self, call: OpenCall) -> None:
        """Open a call of `generate`, one at a time. `close` must follow, whatever happens in between.

        Raises:
            RuntimeError: another call is open.
        """
        # Without a lock, which an interrupt could leave locked: the order of a list decides, and appending to it and
        # closing a call are one step each.
        claim = weakref.ref(call)
        self._claims.append(claim)
        other = self.open_call
        if other is not call:
            call.closed = True
            if other is not None and other.is_in_this_thread:
                raise RuntimeError(
                    "This KAD processor is in use by a call of `generate` that calls `generate` again. Pass on the "
                    "`logits_processor` that the decoding method of the call was given, or give the inner call a "
                    "processor of its own. They may share the proxy."
                )
            raise RuntimeError(
                "This KAD processor is in use by another call of `generate`. One processor serves one call at a time: "
                "build a processor for each thread. They may share the proxy, unless one of them switches its adapter "
                "off (`ImplicitReward` without `reference`)."
            )
        del self._claims[: self._claims.index(claim)]  # nobody else removes claims, since this call is open
        self.models.prepare(call.prompt_inputs, call.prompt_mask)

    def close(self, call: OpenCall) -> None:
        """Close a call of `generate` if it is the open one. Caches that it did not leave in order are not used."""
        if self.open_call is not call:
            call.closed = True
            return
        # What was read with inputs of this call's own is not what other calls would read.
        self.models.finish(caches_are_valid=call.finished and not call.prompt_inputs)
        if self._reset_at_close:
            self._reset_at_close = False
            self._forget()
        call.closed = True

    def reset(self) -> None:
        """Drop all caches and what a rule remembers, at the end of the open call if that runs in this thread.

        Raises:
            RuntimeError: a call in another thread is open.
        """
        call = self.open_call
        if call is None:
            self._forget()
        elif call.is_in_this_thread:
            self._reset_at_close = True
        else:
            raise RuntimeError("This KAD processor is in use by a call of `generate` in another thread.")

    def _forget(self) -> None:
        self.models.reset()
        self.remembered = []

    @property
    def proxy_ends(self) -> dict[int, int | None]:
        """The ids that end the proxy's turns, each with the base's id of the same token, None where it has none."""
        ends = as_id_list(self.models.proxy.model.generation_config.eos_token_id)
        alignment = self.settings.vocabulary_alignment
        return {end: end if alignment is None else alignment.base_id(end) for end in ends}

    @property
    def proxy_prompt(self) -> ProxyPrompt | None:
        """The proxy's own prompts in this thread and task, if it was given any."""
        return next((prompt for owner, prompt in reversed(_PROXY_PROMPTS.get()) if owner is self), None)

    @contextmanager
    def using_proxy_prompt(self, prompt: ProxyPrompt) -> Iterator[None]:
        """Give the proxy prompts of its own for the calls inside, in this thread and task alone."""
        entry = (self, prompt)
        try:
            _PROXY_PROMPTS.set((*_PROXY_PROMPTS.get(), entry))
            self._proxy_prompts.append(entry)
            yield
        finally:
            # Not by a token of the variable: a generator may be left in another context than it was entered in.
            _PROXY_PROMPTS.set(tuple(other for other in _PROXY_PROMPTS.get() if other is not entry))
            self._proxy_prompts[:] = [other for other in self._proxy_prompts if other is not entry]

    @property
    def has_proxy_prompt_elsewhere(self) -> bool:
        """Whether another thread or task gives the proxy prompts of its own, and this one does not."""
        return self.proxy_prompt is None and bool(self._proxy_prompts)

    def first_time(self, subject: Hashable) -> bool:
        """Whether this is the first question about a subject: of each, a warning is given once."""
        is_first = subject not in self.warned
        self.warned.add(subject)
        return is_first


# One variable for all processors: context variables are never freed. Nothing but the blocks of `using_proxy_prompt`
# puts processors into it.
_PROXY_PROMPTS: ContextVar[tuple[tuple[ProcessorState, ProxyPrompt], ...]] = ContextVar("proxy_prompts", default=())
