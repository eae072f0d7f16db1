"""KADLogitsProcessor: what a user puts into `generate(logits_processor=[...])`."""

import threading
import weakref
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationMixin, LogitsProcessor, PreTrainedModel

from .configuration import KADConfig, check_drafter, check_settings
from .decoding import generate_wrapper
from .decoding.generate_wrapper import OpenCall
from .decoding.lazy import draw_again, draw_from_base, force
from .models.adapters import model_below
from .models.cached_model import PER_TOKEN, CachedModel, check_adapters, describe, is_unusable, unusable_logits_error
from .models.static_model import StaticCacheModel
from .models.text_reader import TextReader, tempered
from .models.vocabulary import VocabularyAlignment, align_vocabulary, check_tokenizers
from .records.statistics import KADStatistics, KADTrace, StepRecorder
from .rules.composition import RULES, Rule, compose, make_rule, unknown_name_message, with_bans
from .rules.deferral import DeferralRule, DualDeferral


class KADLogitsProcessor(LogitsProcessor):
    r"""Guides a base model with a small aligned proxy while it generates.

    At each position the base's distribution p and the proxy's q become the target r by a rule, and the
    processor returns log r. With a deferral mask d and the deferral mass D = sum_v d_v p_v,

        r_v = (1 - d_v) p_v + D q_v

    where p and q are softmax(logits / component_temperature) of the two models. Whatever `generate` itself
    warps (`temperature`, `top_k`, `top_p`) comes after, on r. Ids that are banned in the scores that reach this
    processor are removed from q as well: those at -inf, and those more than 746 nats below the likeliest of their
    row, where p is 0 even in float64 (other processors ban with -1e4, -1e9 or the smallest number of a dtype, and
    `remove_invalid_values=True` turns -inf into one).

    Paper: Hammal, Zweigenbaum, Corro, "KAD: A Framework for Proxy-based Test-time Alignment with Knapsack
    Approximation Deferral", EACL 2026 (arXiv 2510.27017).

    Args:
        proxy: a causal LM or a `PeftModel`, in evaluation mode, over the base's vocabulary or with a
            `vocabulary_alignment`.
        rule: a rule object, or a name from `RULES` with its parameters as further arguments.
        reference: the proxy before alignment, for `ImplicitReward` only. For a `PeftModel` the default is the
            proxy with its adapter switched off.
        component_temperature: divides both models' logits before the rule sees them.
        num_assistant_tokens: γ, the draft length of speculative decoding. "auto" chooses it round by round, from the
            acceptance and the times measured in the call so far, for the most tokens per second; 0, no draft, is among
            the choices. What is drawn then depends on times, so that equal seeds may give different texts, of the same
            distribution.
        drafter: "proxy", or "prompt_lookup" for drafts of what followed the last tokens earlier in the text, which
            cost no steps of the proxy; base and proxy verify them in one forward each.
        compile: speculative decoding of one sequence in static caches: the proxy's step and the base's verification
            are compiled by `torch.compile`, as CUDA graphs on CUDA. It takes a while at the first call, and again for
            a text that outgrows the caches, whose size is a multiple of 256 tokens.
        lazy: token by token, draw from p first, and ask the proxy only where the token drawn is deferred; its cache
            then catches up in one forward. The distribution is the same, with fewer forwards of the proxy: on
            average D a token for one sequence; a batch asks where any row that goes on needs it. For rules whose
            mask does not depend on q (`dual`, `primal`, `exact`, `nudging`), with `do_sample=True` and nothing after
            KAD that changes scores: no warper (`top_k=0`, `temperature=1.0`, `top_p=1.0`), no processor. The scores
            it returns, which `output_scores` shows, are 0 at the token drawn and -inf elsewhere, so that sampling
            emits that one; the base's own are in `output_logits`.
        trace: keep a record of every emitted token in `kad.trace`. Not with `lazy`, where q is unknown for most.
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
            a rule that needs a reference without one, `lazy` with a rule that looks at q or with a trace.
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
        num_assistant_tokens: int | str = 5,
        drafter: str = "proxy",
        compile: bool = False,
        lazy: bool = False,
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
        self.drafter = check_drafter(drafter, num_assistant_tokens)
        self.compile = compile
        if compile and num_assistant_tokens == "auto":
            raise ValueError('`compile=True` compiles for one draft length, got num_assistant_tokens="auto".')
        self._compiled: dict[str, StaticCacheModel] = {}
        self.lazy, self.record_trace = lazy, trace
        if lazy:
            _check_lazy(self.rule, trace)
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
        self.proxy_inputs: tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]] | None = None
        self.eos_warned: set[frozenset[int]] = set()
        self.inputs_warned: set[frozenset[str]] = set()
        self._claims: list[weakref.ref[OpenCall]] = []  # of calls, in order; the first that is not closed is open
        self._intact = True  # whether the caches hold what they say
        self._reset_wanted = False
        self._last_shape: tuple[int, int] | None = None  # of the call's texts when the proxy last read them
        self._forced: torch.Tensor | None = None  # (rows,): the tokens that a lazy step before forced

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
            f"component_temperature={self.component_temperature}, num_assistant_tokens={self.num_assistant_tokens!r}"
            + ("" if self.drafter == "proxy" else f", drafter={self.drafter!r}")
            + (", compile=True" if self.compile else "")
            + (", lazy=True" if self.lazy else "")
            + ("" if self.vocabulary_alignment is None else f", vocabulary_alignment={self.vocabulary_alignment!r}")
            + ")"
        )

    def reset(self) -> None:
        """Drop the caches of the proxy and the reference, compiled ones too. Within a call of its own: at its end.

        A call that continues a cache and one that fills it anew compute the same up to rounding; with a `reset()`
        before, two runs with equal seeds agree to the bit.

        Raises:
            RuntimeError: another thread's call is open.
        """
        call = self._call
        if call is None:
            self._drop_caches()
        elif call.thread == threading.get_ident():
            self._reset_wanted = True
        else:
            raise RuntimeError("This KAD processor is in use by a call of `generate` in another thread.")

    def _drop_caches(self) -> None:
        self._compiled.clear()
        for cached in self._cached:
            cached.reset()

    @contextmanager
    def proxy_prompt(self, proxy_inputs: Mapping[str, torch.Tensor] | torch.Tensor) -> Iterator[None]:
        """Give the proxy a prompt of its own for the calls inside, say its chat template.

        Args:
            proxy_inputs: `input_ids` `(B, L)`, padded on the left, one row a prompt of the call; or a mapping
                with `input_ids` and `attention_mask`, as tokenizers return it, and if the proxy takes them
                `token_type_ids` and `position_ids`.

        Raises:
            TypeError: no ids, or ids or a mask that are no tensors.
            ValueError: shapes that do not fit, padding on the right, ids beyond the proxy's vocabulary, or other
                inputs that the proxy would take.
        """
        if torch.is_tensor(proxy_inputs):
            proxy_inputs = {"input_ids": proxy_inputs}
        if not isinstance(proxy_inputs, Mapping) or "input_ids" not in proxy_inputs:
            raise TypeError(
                "`proxy_prompt` takes a tensor of ids, or a mapping with `input_ids` as tokenizers return it, got "
                f"{proxy_inputs!r}."
            )
        given = dict(proxy_inputs)
        ids, mask = given.pop("input_ids"), given.pop("attention_mask", None)
        further = {name: given.pop(name) for name in PER_TOKEN if given.get(name) is not None}
        unknown = sorted(given.keys() & self.cached_proxy.accepted_inputs)
        if unknown:
            raise ValueError(
                f"`proxy_prompt` takes a prompt of tokens, got {unknown} as well, which can't be passed on."
            )
        for name, value in (("ids", ids), ("a mask", ids if mask is None else mask)):
            if not torch.is_tensor(value):
                raise TypeError(
                    f"`proxy_prompt` takes tensors, got {name} of type {type(value).__name__}: tokenize with "
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
        largest, vocabulary = int(ids.max()) if ids.numel() else 0, self.cached_proxy.vocabulary
        if largest >= vocabulary:
            raise ValueError(
                f"`proxy_prompt` takes ids of the proxy, got the id {largest}, and the vocabulary of "
                f"{describe(self.proxy)} ends at {vocabulary}: tokenize with the proxy's own tokenizer."
            )
        before, self.proxy_inputs = self.proxy_inputs, (ids, mask, further)
        try:
            yield
        finally:
            self.proxy_inputs = before

    @property
    def _call(self) -> OpenCall | None:
        return next((call for claim in list(self._claims) if (call := _unclosed(claim)) is not None), None)

    @property
    def open_call(self) -> OpenCall:
        """The running call of `generate`."""
        call = self._call
        if call is None:
            raise RuntimeError("No call of `generate` is open for this processor.")
        return call

    def open(self, call: OpenCall) -> None:
        """Open a call of `generate`, one at a time. `close` must follow, whatever happens in between.

        Raises:
            RuntimeError: another call is open.
        """
        # Without a lock, which an interrupt could leave locked: the order of a list decides, and appending to it and
        # closing a call are one step each.
        claim = weakref.ref(call)
        self._claims.append(claim)
        if self._call is not call:
            call.closed = True
            raise RuntimeError(
                "This KAD processor is in use by another call of `generate`. One processor serves one call at a time: "
                "build a processor for each thread. They may share the proxy, unless one of them switches its adapter "
                "off (`ImplicitReward` without `reference`)."
            )
        del self._claims[: self._claims.index(claim)]  # by the open call alone
        self._last_shape = self._forced = None
        self._refresh(call)

    def close(self, call: OpenCall) -> None:
        """Close a call of `generate` if it is the open one. Caches that it did not leave in order are not used."""
        if self._call is not call:
            call.closed = True
            return
        # What was read with inputs of the call's own is not what other calls would read.
        self._intact = call.finished and not call.prompt_inputs
        if self._reset_wanted:
            self._reset_wanted = False
            self._drop_caches()
        call.closed = True

    def _refresh(self, call: OpenCall | None = None) -> None:
        """Before a call: forget caches that an exception or an interrupt left in the middle, or of other weights."""
        given = {} if call is None else call.prompt_inputs
        mask = None if call is None else call.attention_mask if call.proxy_prompt is None else call.proxy_prompt[1]
        if given or not self._intact:
            for cached in (*self._cached, *self._compiled.values()):
                cached.reset()
        self._intact = False  # until the call is finished
        states: dict[int, Hashable] = {}  # a reference may be the proxy with its adapter switched off
        for cached in self._cached:
            cached.use_prompt_inputs(given, mask)
            cached.refresh(states.get(id(cached.model)))
            states[id(cached.model)] = cached.state

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Turn the base's scores for the next token into log r, or with `lazy` into scores that force a draw from r.

        Args:
            input_ids: texts so far, `(rows, L)`.
            scores: the base's logits or log-probabilities, `(rows, V)`.

        Returns:
            log r, `(rows, V)` float32; -inf where r is 0. With `lazy` 0 at the token drawn and -inf elsewhere.

        Raises:
            ValueError: logits of either model that are NaN, +inf or all -inf.
            RuntimeError: a call of `generate` is open; a `generate` that was looked up before this library was
                imported, or whose texts are padded; with `lazy`, a token was emitted that was not drawn.

        This is for use by hand, in a decoding loop of your own: it works on the ids it gets, assumes no padding, and
        takes no row for finished. `generate` itself runs `step`.
        """
        call = self._call
        if call is not None:
            whose = "this" if call.thread == threading.get_ident() else "another"
            raise RuntimeError(
                f"This KAD processor is in use by a call of `generate` in {whose} thread, whose text would change if "
                "the processor were asked by hand. Build another processor; they may share the proxy."
            )
        generate_wrapper.refuse_by_hand(self, input_ids)
        self._refresh()
        result = self.step(input_ids, scores)
        self._intact = True
        return result

    def step(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`__call__` for the open call of `generate`, in its thread.

        Raises:
            RuntimeError: the open call runs in another thread.
        """
        call = self._call
        if call is not None and call.thread != threading.get_ident():
            raise RuntimeError("This KAD processor is in use by a call of `generate` in another thread.")
        return self._draw(input_ids, scores) if self.lazy else self._compose(input_ids, scores)

    @property
    def reference(self) -> PreTrainedModel | None:
        """The proxy before alignment, for rules that need one."""
        return None if self._cached_reference is None else self._cached_reference.model

    @property
    def proxy_forwards(self) -> int:
        """Forwards of the proxy so far, over all calls."""
        compiled = self._compiled.get("proxy")
        return self.cached_proxy.forwards + (0 if compiled is None else compiled.forwards)

    def compiled(self, model: PreTrainedModel, role: str, width: int) -> StaticCacheModel:
        """A model with its static cache, the same as in the last call if it is the same model."""
        known = self._compiled.get(role)
        if known is None or known.model is not model or known.width != width:
            known = self._compiled[role] = StaticCacheModel(model, role, width=width)
        known.refresh()
        return known

    def reference_reader(self, vocabulary: int, chunk_size: int | None) -> TextReader | None:
        """The reference as it follows texts in rounds; None for rules that need none."""
        if self._cached_reference is None:
            return None
        return TextReader(
            self._cached_reference,
            vocabulary=vocabulary,
            component_temperature=self.component_temperature,
            vocabulary_alignment=self.vocabulary_alignment,
            chunk_size=chunk_size,
        )

    def _compose(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log r."""
        text, vocabulary = self._read(input_ids), scores.shape[-1]
        proxy_logits = text.logits(self.cached_proxy)
        reference_logits = None if self._cached_reference is None else text.logits(self._cached_reference)
        composition = compose(
            self.rule,
            tempered(with_bans(scores), self.component_temperature),
            self._align_and_temper(proxy_logits, vocabulary),
            None if reference_logits is None else self._align_and_temper(reference_logits, vocabulary),
        )
        self._settle(text)
        ended = self._ended(input_ids)
        broken = [is_unusable(scores), is_unusable(proxy_logits).to(scores.device)]
        if reference_logits is not None:
            broken.append(is_unusable(reference_logits).to(scores.device))
        unusable = torch.stack(broken)
        for role, rows in zip(("base", "proxy", "reference"), (unusable & ~ended).tolist(), strict=False):
            self._check(role, rows, input_ids)
        call = self._call
        if call is not None and isinstance(call.recorder, StepRecorder):
            call.recorder.record(input_ids, composition, call.parents(input_ids))
            call.base_forwards += 1
        # `generate` chooses a token for rows that have ended too, and needs a distribution to do so.
        return composition.target_probs.log().masked_fill(unusable.any(0)[:, None], 0.0)

    def _draw(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores that force a token drawn from r. The proxy is asked where a row that goes on draws a deferred one."""
        assert isinstance(self.rule, DeferralRule)
        base_logits = tempered(with_bans(scores), self.component_temperature)
        drawn = draw_from_base(self.rule, base_logits)
        ended = self._ended(input_ids)
        replaced = torch.zeros_like(ended) if self._forced is None else input_ids[:, -1] != self._forced
        flags = torch.stack([drawn.deferred, is_unusable(scores), replaced.to(ended)]) & ~ended
        asks, unusable, replaced_rows = flags.tolist()
        self._check("base", unusable, input_ids)
        if any(replaced_rows):
            raise RuntimeError(
                f"`lazy=True` drew another token at position {input_ids.shape[1] - 1} of sequence "
                f"{replaced_rows.index(True)} than was emitted: something after KAD chose it. Leave out `lazy`."
            )
        tokens = drawn.tokens
        if any(asks):
            text = self._read(input_ids)
            proxy_logits = text.logits(self.cached_proxy)
            tokens = draw_again(drawn, base_logits, self._align_and_temper(proxy_logits, scores.shape[-1]))
            self._settle(text)
            self._check("proxy", (is_unusable(proxy_logits).to(ended) & ~ended).tolist(), input_ids)
        if self._call is not None:
            self._forced = tokens.to(input_ids.device)
            assert isinstance(self._call.recorder, StepRecorder)
            self._call.recorder.record_mass(input_ids, drawn.deferral_mass, None)
            self._call.base_forwards += 1
        return force(tokens, scores.shape[-1])

    def _ended(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which of the texts `(rows, L)` have ended, `(rows,)` boolean; none where it is not known."""
        known = None if self._call is None or self._call.ended_rows is None else self._call.ended_rows.flags
        if known is None or len(known) != len(input_ids):
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return known

    def _read(self, input_ids: torch.Tensor) -> "_Text":
        """The base's texts `(rows, L)` as the proxy and the reference read them."""
        call = self._call
        if call is None:
            if self.vocabulary_alignment is not None:
                return _Text(*self.vocabulary_alignment.retokenize(input_ids))
            return _Text(input_ids)
        before, self._last_shape = self._last_shape, (len(input_ids), input_ids.shape[1])
        longer = before is not None and before[0] == len(input_ids) and before[1] < input_ids.shape[1]
        return _Text(
            *call.proxy_text(input_ids),
            continues=call.rows_stay and longer,
            chunk_size=call.chunk_size,
            prompt_length=call.prompt_length if call.proxy_prompt is None else call.proxy_prompt[0].shape[1],
            ended=self._ended(input_ids),
        )

    def _settle(self, text: "_Text") -> None:
        for cached in self._cached:
            cached.crop(text.ids.shape[1])

    def _align_and_temper(self, logits: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """Logits of the proxy or the reference in the base's vocabulary, tempered: `(rows, V)` float32."""
        return tempered(align_vocabulary(logits, vocabulary, self.vocabulary_alignment), self.component_temperature)

    def _check(self, role: str, unusable: list[bool], input_ids: torch.Tensor) -> None:
        """Raise if a row of a model's logits is unusable."""
        if any(unusable):
            model = next((cached.model for cached in self._cached if cached.role == role), None)
            raise unusable_logits_error(role, model, input_ids.shape[1], unusable.index(True))

    def _make_reference(self, reference: PreTrainedModel | None) -> CachedModel | None:
        if not self.rule.needs_reference:
            if reference is not None:
                raise ValueError(f"`reference` is for rules that need one, which {self.rule!r} does not.")
            return None
        if reference is not None:
            return CachedModel(_checked(reference, "reference"), "reference")
        if isinstance(self.proxy, PeftModel):
            check_adapters(self.proxy, "reference", without_adapter=True)
            return CachedModel(self.proxy, "reference", without_adapter=True)
        raise ValueError(
            f"{self.rule!r} needs the proxy before alignment: pass `reference=`, or a `PeftModel` as proxy, whose "
            "adapter is then switched off."
        )


def _unclosed(claim: "weakref.ref[OpenCall]") -> OpenCall | None:
    """A call that is not over. One whose frames are gone is over, even if an interrupt kept it from being closed."""
    call = claim()
    return None if call is None or call.closed else call


class _Text(NamedTuple):
    """What the proxy and the reference are to read: the arguments of `CachedModel.logits`."""

    ids: torch.Tensor  # (rows, L')
    mask: torch.Tensor | None = None
    continues: bool = False
    chunk_size: int | None = None
    prompt_length: int | None = None
    ended: torch.Tensor | None = None  # (rows,): of which nobody reads the logits

    def logits(self, model: CachedModel) -> torch.Tensor:
        """For the token that follows, in the model's own vocabulary: `(rows, V')`."""
        return model.logits(
            self.ids,
            self.mask,
            continues=self.continues,
            chunk_size=self.chunk_size,
            prompt_length=self.prompt_length,
            ended=self.ended,
        )[:, -1]


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
    "drafter",
    "compile",
    "lazy",
    "trace",
    "tokenizer",
    "proxy_tokenizer",
    "vocabulary_alignment",
)


def _check_lazy(rule: Rule, trace: bool) -> None:
    """Raise unless tokens can be drawn without q where the base's own is kept."""
    if not isinstance(rule, DeferralRule) or rule.needs_proxy:
        masks = [name for name, kind in RULES.items() if issubclass(kind, DeferralRule) and not kind.needs_proxy]
        raise ValueError(
            f"`lazy=True` needs a deferral rule whose mask does not depend on q ({', '.join(masks)}), got {rule!r}: "
            "take one of those, or leave out `lazy`."
        )
    if trace:
        raise ValueError(
            "`lazy=True` and `trace=True` can't be combined: a record shows q, which is unknown wherever the proxy is "
            "not asked. Leave out one of them."
        )


def _checked(model: PreTrainedModel, role: str) -> PreTrainedModel:
    """Raise unless the model can serve as proxy or reference."""
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise TypeError(f"`{role}` must be a causal LM or a PeftModel, got {type(model).__name__}.")
    if not isinstance(model_below(model), GenerationMixin):
        raise TypeError(f"`{role}` must be a causal LM, which has a head and `generate`, got {type(model).__name__}.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"KAD needs a decoder-only {role}, got the encoder-decoder model {describe(model)}.")
    check_adapters(model, role)
    return model
