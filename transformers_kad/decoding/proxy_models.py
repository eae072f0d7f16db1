"""The models beside the base, with the caches that they keep from one call of `generate` to the next."""

import weakref
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.cached_model import CachedModel
from ..models.static_model import StaticCacheModel


class ProxyModels:
    """The proxy, and the reference if the rule needs one.

    Attributes:
        proxy: the proxy with its cache.
        reference: the proxy before alignment with its cache, or None.
    """

    def __init__(self, proxy: PreTrainedModel, reference: PreTrainedModel | None, *, without_adapter: bool) -> None:
        self.proxy = CachedModel(proxy, "proxy")
        self.reference = None
        if reference is not None:
            self.reference = CachedModel(reference, "reference", without_adapter=without_adapter)
        self._static_proxy: StaticCacheModel | None = None
        self._compiled_bases: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
        self._caches_are_valid = True

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the models without their caches."""
        reference = self.reference
        return {
            "proxy": self.proxy.model,
            "reference": None if reference is None else reference.model,
            "without_adapter": reference is not None and reference.without_adapter,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a copy is built as any other

    def __iter__(self) -> Iterator[CachedModel]:
        """The proxy and, if there is one, the reference."""
        yield self.proxy
        if self.reference is not None:
            yield self.reference

    @property
    def proxy_forwards(self) -> int:
        """Forwards of the proxy so far, over all calls."""
        return self.proxy.forwards + (0 if self._static_proxy is None else self._static_proxy.forwards)

    def prepare(
        self, prompt_inputs: Mapping[str, torch.Tensor] | None = None, attention_mask: torch.Tensor | None = None
    ) -> None:
        """Before a call, drop caches that an exception left unfinished, or that other weights have filled.

        Args:
            prompt_inputs: what the call passes for every token of its prompts, see `CachedModel.use_prompt_inputs`.
            attention_mask: of the prompts, `(B, P)`.
        """
        if prompt_inputs or not self._caches_are_valid:
            self._reset_caches()
        self._caches_are_valid = False  # until `finish` says that the call has left them so
        states: dict[int, Hashable] = {}  # the reference may be the proxy with its adapter switched off
        for cached in self:
            cached.use_prompt_inputs(prompt_inputs or {}, attention_mask)
            cached.refresh(states.get(id(cached.model)))
            states[id(cached.model)] = cached.state

    def finish(self, *, caches_are_valid: bool) -> None:
        """After a call, note whether the caches hold what they say."""
        self._caches_are_valid = caches_are_valid

    def crop(self, length: int) -> None:
        """Take back all but the first `length` tokens of the texts from every cache."""
        for cached in self:
            cached.crop(length)

    def reset(self) -> None:
        """Drop all caches, and free the memory of those of compiled forwards. What was compiled stays."""
        for cached in self:
            cached.reset()
        for static in self._static_models():
            static.free()

    def static_proxy(self, width: int) -> StaticCacheModel:
        """The proxy in a static cache with compiled forwards of `width` tokens, kept from call to call."""
        if self._static_proxy is None or self._static_proxy.width != width:
            self._static_proxy = StaticCacheModel(self.proxy.model, "proxy", width=width)
        self._static_proxy.refresh()
        return self._static_proxy

    def static_base(self, base: PreTrainedModel, width: int) -> StaticCacheModel:
        """The same for a base, which keeps it: a processor that did would keep the base alive."""
        self._compiled_bases.add(base)
        attached = vars(base).setdefault(_AttachedModels.NAME, _AttachedModels())
        static: StaticCacheModel | None = attached.get(self)
        if static is None or static.model is not base or static.width != width:
            static = attached[self] = StaticCacheModel(base, "base", width=width)
        static.refresh()
        return static

    def _reset_caches(self) -> None:
        """Empty all caches; static ones keep their memory."""
        for cached in (*self, *self._static_models()):
            cached.reset()

    def _static_models(self) -> list[StaticCacheModel]:
        of_bases = (vars(base)[_AttachedModels.NAME].get(self) for base in list(self._compiled_bases))
        return [static for static in (self._static_proxy, *of_bases) if static is not None]


class _AttachedModels(weakref.WeakKeyDictionary[ProxyModels, StaticCacheModel]):
    """The static caches of a base, by the processor's models. Copies and pickles of the base leave them out."""

    NAME = "_kad_static_models"

    def __deepcopy__(self, memo: dict[int, Any]) -> "_AttachedModels":
        return type(self)()

    def __reduce__(self) -> tuple[type["_AttachedModels"], tuple[()]]:
        return type(self), ()
