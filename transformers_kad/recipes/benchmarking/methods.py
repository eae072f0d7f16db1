"""The decoding methods that are timed, and how each of them calls `generate`."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from transformers import CompileConfig, StaticCache

from ...configuration import KADConfig
from ...integrations.loading.prompts import PLAIN_SAMPLING
from ...logits_process import KADLogitsProcessor
from ...models.by_version import CACHE
from ...models.cached_model import CachedModel
from ...models.static_model import CAPACITY_STEP, StaticCacheModel
from ...records.statistics import KADStatistics
from ..evaluation.decoding import fix_draft_length
from .bounds import Shape
from .subjects import Subject


@contextmanager
def rows_in_step() -> Iterator[None]:
    """Inside, all rows of a batch emit the same number of tokens in every round, whatever the layers of their models.

    Other batches do so only where a cache can't have holes.
    """
    with patch.object(CachedModel, "needs_rows_in_step", new=True):
        yield


@dataclass(frozen=True)
class _Kind:
    """One kind of decoding.

    Attributes:
        label: its name in tables and plots.
        drafts: whether it is measured with every draft length.
        options: arguments of `KADLogitsProcessor`; None for methods without KAD.
        speculative: whether the proxy is passed as `assistant_model`.
        compiled: whether forward passes after the prompt are compiled.
        one_row: whether it only decodes one text at a time.
        in_step: whether it runs with `rows_in_step`, which makes no difference to a single text.
    """

    label: str
    drafts: bool = False
    options: Mapping[str, Any] | None = None
    speculative: bool = False
    compiled: bool = False
    one_row: bool = False
    in_step: bool = False


KINDS = {
    "base": _Kind("base alone"),
    "base_compiled": _Kind("base alone, compiled", compiled=True),
    "proxy": _Kind("proxy alone"),
    "assisted": _Kind("assisted decoding without KAD", drafts=True, speculative=True, one_row=True),
    "token_by_token": _Kind("KAD token by token", options={}),
    "lazy": _Kind("KAD token by token, lazy", options={"lazy": True}),
    "speculative": _Kind("KAD speculative", drafts=True, options={}, speculative=True),
    "auto": _Kind("KAD speculative, γ auto", options={"num_assistant_tokens": "auto"}, speculative=True),
    "prompt_lookup": _Kind("KAD, prompt lookup", drafts=True, options={"drafter": "prompt_lookup"}, speculative=True),
    "compiled": _Kind(
        "KAD speculative, compiled",
        drafts=True,
        options={"compile": True},
        speculative=True,
        compiled=True,
    ),
    "in_step": _Kind("KAD speculative, rows in step", drafts=True, options={}, speculative=True, in_step=True),
}


@dataclass(frozen=True)
class Method:
    """A kind of decoding, with a draft length if it has one."""

    kind: str
    draft_length: int | None = None

    @property
    def key(self) -> str:
        """The name of the method in the results.

        >>> Method("speculative", 5).key
        'speculative:5'
        """
        return self.kind if self.draft_length is None else f"{self.kind}:{self.draft_length}"

    @property
    def label(self) -> str:
        """The name of the method in tables and plots."""
        label = KINDS[self.kind].label
        return label if self.draft_length is None else f"{label}, γ = {self.draft_length}"

    @property
    def place(self) -> tuple[int, int]:
        """The sort key of the method in tables."""
        return list(KINDS).index(self.kind), self.draft_length or 0

    @classmethod
    def from_key(cls, key: str) -> "Method":
        """The method with this key."""
        kind, _, length = key.partition(":")
        return cls(kind, int(length) if length else None)


def expand(names: Sequence[str], draft_lengths: Sequence[int]) -> list[Method]:
    """Expand names and keys of methods to methods. A name stands for the kind with all draft lengths, if it drafts.

    The base alone, which all methods are compared with, comes first.

    Raises:
        ValueError: a kind is unknown, or a draft length was given for a kind that does not draft.

    >>> [method.key for method in expand(["auto", "speculative", "assisted:4"], [3, 5])]
    ['base', 'auto', 'speculative:3', 'speculative:5', 'assisted:4']
    """
    methods = []
    for name in ("base", *names):
        kind, _, length = name.partition(":")
        if kind not in KINDS:
            raise ValueError(f"--methods are of {', '.join(KINDS)}, got {name!r}.")
        if length and not (KINDS[kind].drafts and length.isdecimal() and int(length)):
            raise ValueError(f"A draft length is given to a method that drafts, as in speculative:5, got {name!r}.")
        lengths = [int(length)] if length else draft_lengths if KINDS[kind].drafts else [None]
        methods += [Method(kind, own) for own in lengths]
    return list(dict.fromkeys(methods))


class MethodRunner:
    """Runs all methods with the same models, rule and number of tokens.

    Every text gets `max_new_tokens` tokens, since there is no end of sequence.

    Args:
        subject: the models.
        config: the rule.
        rows: the number of texts in a batch.
        max_new_tokens: the number of new tokens of each text.
        longest_prompt: the length of the longest prompt of the whole run, in tokens.
    """

    def __init__(
        self, subject: Subject, config: KADConfig, *, rows: int, max_new_tokens: int, longest_prompt: int
    ) -> None:
        self.subject, self.config, self.rows = subject, config, rows
        self.max_new_tokens, self.longest_prompt = max_new_tokens, longest_prompt
        self._processors: dict[Method, KADLogitsProcessor] = {}
        self._static: StaticCache | None = None
        self._base_step: StaticCacheModel | None = None
        self._compiled_before: dict[str, Counter[int]] = {}  # compiled forward passes before the last call

    def reason_to_skip(self, method: Method) -> str | None:
        """Prepare a method. Returns the reason if it can't be measured with these models, else None."""
        kind = KINDS[method.kind]
        if kind.one_row and self.rows > 1:
            return f"takes one text at a time, not {self.rows}"
        if kind.in_step and self.rows == 1:
            return "compares the rows of a batch, and there is one"
        sizes = [model.get_input_embeddings().weight.shape[0] for model in self.subject.models.values()]
        aligned = self.subject.pair is not None and self.subject.pair.alignment is not None
        if method.kind == "assisted" and (aligned or sizes[0] != sizes[1]):
            return f"needs base and proxy of one vocabulary, got {sizes[0]} and {sizes[1]} rows"
        if kind.options is None or method in self._processors:
            return None
        drafts = {} if method.draft_length is None else {"num_assistant_tokens": method.draft_length}
        try:
            self._processors[method] = self.subject.processor(self.config, **kind.options, **drafts)
        except ValueError as error:
            return str(error)
        return None

    def generate(self, method: Method, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Generate texts `(rows, L + max_new_tokens)` by a method, without caches of earlier calls."""
        subject, kind = self.subject, KINDS[method.kind]
        arguments: dict[str, Any] = {}
        if kind.speculative:
            arguments["assistant_model"] = subject.proxy
        if kind.options is not None:
            self._processors[method].reset()
            arguments["logits_processor"] = [self._processors[method]]
        elif method.draft_length is not None:
            fix_draft_length(subject.proxy, method.draft_length)
        elif kind.compiled:
            arguments |= self._compile_base()
        if kind.compiled and method.draft_length is not None:
            models = self._static_models(method)
            self._compiled_before = {name: model.compiled_forwards.copy() for name, model in models.items()}
        model = subject.proxy if method.kind == "proxy" else subject.base
        with rows_in_step() if kind.in_step else nullcontext():
            return model.generate(
                **inputs,
                **PLAIN_SAMPLING,
                **arguments,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=None,
                pad_token_id=subject.pad_token_id,
            )

    def _compile_base(self) -> dict[str, Any]:
        """The arguments of a compiled call. All calls share one static cache, so that they are compiled once."""
        if self._static is None:
            length = -(-(self.longest_prompt + self.max_new_tokens) // CAPACITY_STEP) * CAPACITY_STEP
            self._static = StaticCache(config=self.subject.base.config, max_cache_len=length)
        self._static.reset()
        on_cuda = self.subject.device.type == "cuda"
        settings = CompileConfig(dynamic=False, mode="reduce-overhead" if on_cuda else "default")
        settings._compile_all_devices = True
        return {CACHE: self._static, "compile_config": settings}

    def statistics(self, method: Method) -> KADStatistics | None:
        """The statistics of the method's last call; None for methods without KAD."""
        return self._processors[method].statistics if method in self._processors else None

    def compiled_counts(self, method: Method, prompt: int) -> dict[Shape, int]:
        """The forward passes of a compiled method's last call. The prompts, of `prompt` columns, are not compiled."""
        if method.draft_length is None:
            compiled = {Shape("base compiled", self.rows, 1): self.max_new_tokens - 1}
            return {Shape("base", self.rows, prompt): 1, **compiled}
        counts = {
            Shape(f"{name} compiled", rows, model.width): count
            for name, model in self._static_models(method).items()
            for rows, count in (model.compiled_forwards - self._compiled_before[name]).items()
        }
        prompts = {Shape("base", self.rows, prompt + method.draft_length): 1, Shape("proxy", self.rows, prompt): 1}
        return {**prompts, **counts}

    def compiled_models(self, method: Method) -> dict[Shape, StaticCacheModel]:
        """The compiled models that a method uses after its first call, by the shape of their forward passes."""
        if method.draft_length is None:
            if self._base_step is None:
                self._base_step = StaticCacheModel(self.subject.base, "base", width=1)
            return {Shape("base compiled", self.rows, 1): self._base_step}
        return {
            Shape(f"{name} compiled", rows, model.width): model
            for name, model in self._static_models(method).items()
            for rows in model.compiled_forwards
        }

    def _static_models(self, method: Method) -> dict[str, StaticCacheModel]:
        """The base and the proxy of a method that drafts, in static caches."""
        assert method.draft_length is not None
        models = self._processors[method].state.models
        return {
            "base": models.static_base(self.subject.base, method.draft_length + 1),
            "proxy": models.static_proxy(1),
        }


def counts_to_json(counts: Mapping[Shape, int]) -> list[list[Any]]:
    """Counts as JSON values."""
    return [[*shape, count] for shape, count in sorted(counts.items())]


def counts_from_json(values: Sequence[Sequence[Any]]) -> Counter[Shape]:
    """The inverse of `counts_to_json`."""
    return Counter({Shape(*value[:3]): value[3] for value in values})
