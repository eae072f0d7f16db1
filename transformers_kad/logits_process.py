"""KADLogitsProcessor: what a user puts into `generate(logits_processor=[...])`."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import LogitsProcessor, PreTrainedModel

from . import hooks
from .composition import RULES, Rule, compose, make_rule, unknown_name_message
from .configuration import KADConfig, check_settings
from .deferral import DualDeferral
from .hooks import OpenCall
from .proxy import (
    CachedModel,
    describe,
    is_unusable,
    unusable_logits_error,
)
from .statistics import KADStatistics, KADTrace, StepRecorder
from .vocabulary import VocabularyAlignment, align_vocabulary, check_tokenizers


class KADLogitsProcessor(LogitsProcessor):
    r"""Guides a base model with a small aligned proxy while it generates.

    At each position the base's distribution p and the proxy's q become the target r by a rule, and the
    processor returns log r. With a deferral mask d and the deferral mass D = sum_v d_v p_v,

        r_v = (1 - d_v) p_v + D q_v

    where p and q are softmax(logits / component_temperature) of the two models. Whatever `generate` itself
    warps (`temperature`, `top_k`, `top_p`) comes after, on r. Ids at -inf in the scores that reach this
    processor are removed from q as well.

    Paper: Hammal, Zweigenbaum, Corro, "KAD: A Framework for Proxy-based Test-time Alignment with Knapsack
    Approximation Deferral", EACL 2026 (arXiv 2510.27017).

    Args:
        proxy: a causal LM or a `PeftModel`, in evaluation mode, over the base's vocabulary or with a
            `vocabulary_alignment`.
        rule: a rule object, or a name from `RULES` with its parameters as further arguments.
        reference: the proxy before alignment, for `ImplicitReward` only. For a `PeftModel` the default is the
            proxy with its adapter switched off.
        component_temperature: divides both models' logits before the rule sees them.
        num_assistant_tokens: draft length of speculative decoding.
        trace: keep a record of every emitted token in `kad.trace`.
        tokenizer: the base's tokenizer: the trace shows its text. When both are given, they are compared.
        proxy_tokenizer: the proxy's tokenizer.
        vocabulary_alignment: from `align_vocabularies`, for a proxy with a tokenizer other than the base's. Prompts
            are tokenized anew for the proxy, and q is restricted to the tokens that both have.
        **rule_parameters: parameters of a rule given by name.

    Attributes:
        statistics: `KADStatistics` of the last finished call, None before.
        trace: `KADTrace` of the last finished call if asked for, else None.

    Raises:
        ValueError: an unknown rule, a value out of range, an encoder-decoder proxy, tokenizers that differ,
            a rule that needs a reference without one.
        TypeError: a rule parameter that does not exist, or a rule that is no rule.

    A processor serves any number of calls, one after the other. It keeps the proxy's cache between calls for
    the prefix that they share; `reset()` drops it.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> base, proxy = (LlamaForCausalLM(LlamaConfig(**sizes)).eval() for _ in range(2))
    >>> kad = KADLogitsProcessor(proxy, "dual", threshold=0.4)
    >>> settings = dict(max_new_tokens=4, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
    >>> ids = base.generate(torch.tensor([[1, 2, 3]]), logits_processor=[kad], **settings)
    >>> kad.statistics.tokens
    4
    >>> ids = base.generate(
    ...     torch.tensor([[1, 2, 3]]), logits_processor=[kad], assistant_model=proxy, **settings
    ... )
    >>> kad.statistics.tokens
    4
    """

    supports_continuous_batching = False
    is_kad_processor = True

    def __init__(
        self,
        proxy: PreTrainedModel,
        rule: Rule | str = DualDeferral(0.4),
        *,
        reference: PreTrainedModel | None = None,
        component_temperature: float = 1.0,
        num_assistant_tokens: int = 5,
        trace: bool = False,
        tokenizer: Any = None,
        proxy_tokenizer: Any = None,
        vocabulary_alignment: VocabularyAlignment | None = None,
        **rule_parameters: Any,
    ) -> None:
        self.rule = _resolve_rule(rule, rule_parameters)
        check_settings(component_temperature, num_assistant_tokens)
        self.component_temperature = component_temperature
        self.num_assistant_tokens = num_assistant_tokens
        self.record_trace = trace
        if tokenizer is None and proxy_tokenizer is not None:
            raise ValueError("Pass `tokenizer` as well to have it compared with `proxy_tokenizer`, got only that.")
        if proxy_tokenizer is not None and vocabulary_alignment is None:
            check_tokenizers(tokenizer, proxy_tokenizer)
        if vocabulary_alignment is not None and not isinstance(vocabulary_alignment, VocabularyAlignment):
            raise TypeError(
                "`vocabulary_alignment` must come from `align_vocabularies(base_tokenizer, proxy_tokenizer)`, got "
                f"{type(vocabulary_alignment).__name__}."
            )
        self.tokenizer, self.vocabulary_alignment = tokenizer, vocabulary_alignment

        self.proxy = proxy
        self.cached_proxy = CachedModel(_checked(proxy, "proxy"))
        self._cached_reference = self._make_reference(reference)
        self._cached = [self.cached_proxy] + ([self._cached_reference] if self._cached_reference else [])

        self.statistics: KADStatistics | None = None
        self.trace: KADTrace | None = None
        self.proxy_inputs: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.eos_warned: set[frozenset[int]] = set()
        self._call: OpenCall | None = None
        self._lock = threading.Lock()
        self._last_shape: tuple[int, int] | None = None  # of the texts of the call's last step
        hooks.install()

    @classmethod
    def from_config(cls, proxy: PreTrainedModel, config: KADConfig, **kwargs: Any) -> "KADLogitsProcessor":
        """A processor with the settings of a `KADConfig`; `kwargs` are those of the constructor it lacks."""
        return cls(
            proxy,
            config.make_rule(),
            component_temperature=config.component_temperature,
            num_assistant_tokens=config.num_assistant_tokens,
            **kwargs,
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(proxy={describe(self.proxy)}, rule={self.rule!r}, "
            f"component_temperature={self.component_temperature}, num_assistant_tokens={self.num_assistant_tokens}"
            + ("" if self.vocabulary_alignment is None else f", vocabulary_alignment={self.vocabulary_alignment!r}")
            + ")"
        )

    def reset(self) -> None:
        """Drop the caches of the proxy and the reference. Not while another thread generates with this processor.

        A call that continues a cache and one that fills it anew compute the same up to rounding; with a `reset()`
        before, two runs with equal seeds agree to the bit.

        Raises:
            RuntimeError: another thread's call is open.
        """
        if self._call is not None and self._call.thread != threading.get_ident():
            raise RuntimeError("This KAD processor is in use by a call of `generate` in another thread.")
        for cached in self._cached:
            cached.reset()

    @contextmanager
    def proxy_prompt(self, proxy_inputs: Mapping[str, torch.Tensor] | torch.Tensor) -> Iterator[None]:
        """Give the proxy a prompt of its own for the calls inside, say its chat template.

        Args:
            proxy_inputs: `input_ids` `(B, L)`, padded on the left, one row a prompt of the call; or a mapping
                with `input_ids` and `attention_mask`, as tokenizers return it.
        """
        if torch.is_tensor(proxy_inputs):
            ids, mask = proxy_inputs, None
        else:
            ids, mask = proxy_inputs["input_ids"], proxy_inputs.get("attention_mask")
        if not torch.is_tensor(ids):
            raise TypeError(
                f"`proxy_prompt` takes tensors, got ids of type {type(ids).__name__}: tokenize with "
                '`return_tensors="pt"`.'
            )
        if ids.dim() != 2 or (mask is not None and mask.shape != ids.shape):
            raise ValueError(
                f"`proxy_prompt` takes ids (B, L) and a mask of that shape, got {tuple(ids.shape)} and "
                f"{None if mask is None else tuple(mask.shape)}."
            )
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "`proxy_prompt` takes prompts padded on the left, got padding at the end. Set "
                '`tokenizer.padding_side = "left"`.'
            )
        before, self.proxy_inputs = self.proxy_inputs, (ids, mask)
        try:
            yield
        finally:
            self.proxy_inputs = before

    @property
    def open_call(self) -> OpenCall:
        """The running call of `generate`."""
        if self._call is None:
            raise RuntimeError("No call of `generate` is open for this processor.")
        return self._call

    @contextmanager
    def opened(self, call: OpenCall) -> Iterator[None]:
        """Open a call of `generate` for the time of the block. One at a time."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "This KAD processor is in use by another call of `generate`. One processor serves one call at a "
                "time: build a processor for each thread. They may share the proxy, unless one of them switches its "
                "adapter off (`ImplicitReward` without `reference`)."
            )
        try:
            self._call, self._last_shape = call, None
            for cached in self._cached:
                cached.refresh()
            yield
        finally:
            self._call = None
            self._lock.release()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Turn the base's scores for the next token into log r.

        Args:
            input_ids: texts so far, `(rows, L)`.
            scores: the base's logits or log-probabilities, `(rows, V)`.

        Returns:
            log r, `(rows, V)` float32; -inf where r is 0.

        Raises:
            ValueError: logits of either model that are NaN, +inf or all -inf.
            RuntimeError: another thread's call is open.

        Used by hand, outside `generate`, it works on the ids it gets and assumes no padding.
        """
        call = self._call
        if call is None:
            for cached in self._cached:
                cached.refresh()
            ids, mask, continues, chunk_size = input_ids, None, False, None
            if self.vocabulary_alignment is not None:
                ids, mask = self.vocabulary_alignment.retokenize(input_ids)
        elif call.thread != threading.get_ident():
            raise RuntimeError("This KAD processor is in use by a call of `generate` in another thread.")
        else:
            ids, mask = call.proxy_text(input_ids)
            rows, length = input_ids.shape
            continues = call.rows_stay and self._last_shape == (rows, length - 1)
            chunk_size = call.chunk_size
            self._last_shape = (rows, length)

        proxy_logits = self.cached_proxy.logits(ids, mask, continues=continues, chunk_size=chunk_size)[:, -1]
        vocabulary = scores.shape[-1]
        composition = compose(
            self.rule,
            scores / self.component_temperature,
            align_vocabulary(proxy_logits, vocabulary, self.vocabulary_alignment) / self.component_temperature,
            self._reference_logits(ids, mask, 1, vocabulary, continues, chunk_size),
        )
        for cached in self._cached:
            cached.settle(ids.shape[1])
        self._check(scores, proxy_logits, input_ids.shape[1])
        if call is not None and isinstance(call.recorder, StepRecorder):
            parents = None if call.rows_stay else self.cached_proxy.parents or list(range(len(input_ids)))
            call.recorder.record(input_ids, composition, parents)
            call.base_forwards += 1
        return composition.target_probs.log()

    def reference_logits(self, input_ids: torch.Tensor, keep: int, vocabulary: int) -> torch.Tensor | None:
        """The reference's tempered logits at the last `keep` positions of the open call's text, `(keep, V)`.

        `input_ids` is the base's text `(1, L)`. None for rules that need no reference.
        """
        if self._cached_reference is None:
            return None
        call = self.open_call
        ids, mask = call.proxy_text(input_ids)
        return self._reference_logits(ids, mask, keep, vocabulary, False, call.chunk_size)

    def settle_reference(self, input_ids: torch.Tensor) -> None:
        """Take back what the reference has seen beyond the open call's text `(1, L)`, but for the last token."""
        if self._cached_reference is not None:
            self._cached_reference.settle(self.open_call.proxy_text(input_ids[:, :-1])[0].shape[1])

    def _reference_logits(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        keep: int,
        vocabulary: int,
        continues: bool,
        chunk_size: int | None,
    ) -> torch.Tensor | None:
        """`(rows * keep, V)`; rows and kept positions are never both more than one."""
        if self._cached_reference is None:
            return None
        logits = self._cached_reference.logits(ids, mask, keep=keep, continues=continues, chunk_size=chunk_size)
        logits = align_vocabulary(logits.flatten(0, 1), vocabulary, self.vocabulary_alignment)
        return logits / self.component_temperature

    def _check(self, scores: torch.Tensor, proxy_logits: torch.Tensor, position: int) -> None:
        unusable = torch.stack([is_unusable(scores), is_unusable(proxy_logits).to(scores.device)]).tolist()
        for name, model, rows in (("base", None, unusable[0]), ("proxy", self.proxy, unusable[1])):
            if any(rows):
                raise unusable_logits_error(name, model, position, rows.index(True))

    def _make_reference(self, reference: PreTrainedModel | None) -> CachedModel | None:
        if not self.rule.needs_reference:
            if reference is not None:
                raise ValueError(f"`reference` is for rules that need one, which {self.rule!r} does not.")
            return None
        if reference is not None:
            return CachedModel(_checked(reference, "reference"), "reference")
        if isinstance(self.proxy, PeftModel):
            return CachedModel(self.proxy, "reference", without_adapter=True)
        raise ValueError(
            f"{self.rule!r} needs the proxy before alignment: pass `reference=`, or a `PeftModel` as proxy, whose "
            "adapter is then switched off."
        )


def _resolve_rule(rule: Rule | str, parameters: dict[str, Any]) -> Rule:
    if isinstance(rule, str):
        return make_rule(rule, **parameters)
    if not isinstance(rule, tuple(RULES.values())) and not (
        callable(rule) and not isinstance(rule, type) and hasattr(rule, "needs_reference")
    ):
        raise TypeError(f"`rule` must be a rule object or one of {', '.join(RULES)}, got {rule!r}.")
    if parameters:
        raise TypeError(
            f"{unknown_name_message('argument', next(iter(parameters)), _SETTINGS)} Parameters of a rule are passed "
            f'along only when it is given by name, as in rule="dual", threshold=0.5; here it is {rule!r}.'
        )
    return rule


_SETTINGS = (
    "reference",
    "component_temperature",
    "num_assistant_tokens",
    "trace",
    "tokenizer",
    "proxy_tokenizer",
    "vocabulary_alignment",
)


def _checked(model: PreTrainedModel, role: str) -> PreTrainedModel:
    """Raise unless the model can serve as proxy or reference."""
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise TypeError(f"`{role}` must be a causal LM or a PeftModel, got {type(model).__name__}.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"KAD needs a decoder-only {role}, got the encoder-decoder model {describe(model)}.")
    if isinstance(model, PeftModel) and any(c.is_prompt_learning for c in model.peft_config.values()):
        raise ValueError(
            f"The {role} {describe(model)} has a prompt-learning adapter, whose virtual tokens do not fit the text; "
            "use an adapter that changes weights, such as LoRA."
        )
    return model
