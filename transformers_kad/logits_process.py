"""KADLogitsProcessor: what a user puts into `generate(logits_processor=[...])`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationMixin, LogitsProcessor, PreTrainedModel

from .configuration import DEFAULT_VERIFICATION, KADConfig
from .decoding.lazy import LazyStep
from .decoding.open_call import OpenCall
from .decoding.processor_state import ProcessorState
from .decoding.proxy_models import ProxyModels
from .decoding.proxy_text import ProxyPrompt
from .decoding.refusals import refuse_by_hand
from .decoding.settings import DecodingSettings
from .decoding.token_by_token import EagerStep
from .models.adapters import check_adapters, model_below
from .models.forward_inputs import PER_TOKEN
from .models.model_errors import describe, how_to_compile
from .models.vocabulary import VocabularyAlignment, check_tokenizers
from .records.statistics import KADStatistics
from .records.trace import KADTrace
from .rules.base import Rule
from .rules.deferral import DualDeferral
from .rules.registry import RULES, make_rule, unknown_name_message

_SETTINGS = tuple(field.name for field in fields(DecodingSettings))


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
        compile: speculative decoding in static caches: the proxy's step and the base's verification are compiled by
            `torch.compile`, as CUDA graphs on CUDA. It takes a while at the first call, for the first batch of more
            than 1, 2, 4, 8, ... rows, and again for texts that outgrow the caches, whose length is a multiple of 256
            tokens. For models whose layers all have attention, full or within sliding windows.
        lazy: token by token, draw from p first, and ask the proxy only where the token drawn is deferred; its cache
            then catches up in one forward. The distribution is the same, with fewer forwards of the proxy: on
            average D a token for one sequence; a batch asks where any row that goes on needs it. For rules whose
            mask does not depend on q (`dual`, `primal`, `exact`, `nudging`, `paced`), with `do_sample=True` and
            nothing after KAD that changes scores: no warper (`top_k=0`, `temperature=1.0`, `top_p=1.0`), no processor.
            The scores it returns, which `output_scores` shows, are 0 at the token drawn and -inf elsewhere, so that
            sampling emits that one; the base's own are in `output_logits`.
        verification: how speculative decoding verifies a draft. "token" decides on one draft token after the other,
            "block" on the draft as a whole, which accepts at least as many tokens on average (Sun et al., ICLR 2025,
            arXiv 2403.10444). Both are exact. Where they are equal in law, in greedy decoding and with prompt
            lookup, and where processors of your own have to be called one position after the other, so that the
            whole draft is not known at once, tokens are verified with either value.
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
        verification: str = DEFAULT_VERIFICATION,
        trace: bool = False,
        tokenizer: Any = None,
        proxy_tokenizer: Any = None,
        vocabulary_alignment: VocabularyAlignment | None = None,
        **rule_parameters: Any,
    ) -> None:
        settings = DecodingSettings(
            rule=_resolve_rule(rule, rule_parameters),
            component_temperature=component_temperature,
            num_assistant_tokens=num_assistant_tokens,
            drafter=drafter,
            compile=compile,
            lazy=lazy,
            verification=verification,
            trace=trace,
            tokenizer=tokenizer,
            vocabulary_alignment=vocabulary_alignment,
        )
        if tokenizer is None and proxy_tokenizer is not None:
            raise ValueError("Pass `tokenizer` as well to have it compared with `proxy_tokenizer`, got only that.")
        if proxy_tokenizer is not None and vocabulary_alignment is None:
            check_tokenizers(tokenizer, proxy_tokenizer)
        if vocabulary_alignment is not None and not isinstance(vocabulary_alignment, VocabularyAlignment):
            raise TypeError(
                "`vocabulary_alignment` must come from `align_vocabularies(base_tokenizer, proxy_tokenizer)`, got "
                f"{type(vocabulary_alignment).__name__}."
            )
        _check_model(proxy, "proxy")
        self.state = ProcessorState(settings, _make_models(settings.rule, proxy, reference))

    @classmethod
    def from_config(cls, proxy: PreTrainedModel, config: KADConfig, **kwargs: Any) -> "KADLogitsProcessor":
        """A processor with the settings of a `KADConfig`.

        `kwargs` are further arguments of the constructor; one that is also a setting takes the place of the config's.
        """
        return cls(proxy, config.make_rule(), **{**config.settings, **kwargs})

    def __repr__(self) -> str:
        attached = "".join(sorted(f", attached to {describe(base)}" for base in self.state.attached_to))
        return f"{type(self).__name__}(proxy={describe(self.proxy)}, {self.state.settings!r}{attached})"

    @property
    def proxy(self) -> PreTrainedModel:
        """The proxy."""
        return self.state.models.proxy.model

    @property
    def reference(self) -> PreTrainedModel | None:
        """The proxy before alignment, for rules that need one."""
        reference = self.state.models.reference
        return None if reference is None else reference.model

    @property
    def settings(self) -> DecodingSettings:
        """All settings, which never change. Each but `trace` is an attribute of the processor too, as `kad.rule`."""
        return self.state.settings

    def __getattr__(self, name: str) -> Any:
        if "state" in vars(self) and name in _SETTINGS:
            return getattr(self.state.settings, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "trace" and name in _SETTINGS:
            raise AttributeError(
                f"`{name}` of a processor can't be changed, got {value!r:.200}: build another processor. It may share "
                "the proxy."
            )
        super().__setattr__(name, value)

    @property
    def statistics(self) -> KADStatistics | None:
        """What happened in the last finished call; None before the first."""
        return self.state.statistics

    @property
    def trace(self) -> KADTrace | None:
        """The record of every token of the last finished call, if it was asked for."""
        return self.state.trace

    def reset(self) -> None:
        """Drop all caches, those of compiled forwards included. Within a call of its own: at the end of the call.

        What was compiled is kept, and used again with caches of the same size.

        A call that continues a cache and one that fills it anew compute the same up to rounding; with a `reset()`
        before, two runs with equal seeds agree to the bit.

        Raises:
            RuntimeError: a call in another thread is open.
        """
        self.state.reset()

    @contextmanager
    def proxy_prompt(self, proxy_inputs: Mapping[str, torch.Tensor] | torch.Tensor) -> Iterator[None]:
        """Give the proxy a prompt of its own for the calls inside, its chat template for example.

        It reaches the calls of this thread and this asynchronous task. A `threading.Thread` that is started inside
        needs a block of its own; a task that is created inside keeps the prompt after the block.

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
        unknown = sorted(given.keys() & self.state.models.proxy.accepted_inputs)
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
        largest, vocabulary = int(ids.max()) if ids.numel() else 0, self.state.models.proxy.vocabulary
        if largest >= vocabulary:
            raise ValueError(
                f"`proxy_prompt` takes ids of the proxy, got the id {largest}, and the vocabulary of "
                f"{describe(self.proxy)} ends at {vocabulary}: tokenize with the proxy's own tokenizer."
            )
        with self.state.using_proxy_prompt(ProxyPrompt(ids, mask, further)):
            yield

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
                imported, or whose texts are padded.

        This is for use by hand, in a decoding loop of your own: it works on the ids it gets, assumes no padding, and
        takes no row for finished. In `generate` itself a step of the open call takes this processor's place.
        """
        call = self.state.open_call
        if call is not None:
            whose = "this" if call.is_in_this_thread else "another"
            raise RuntimeError(
                f"This KAD processor is in use by a call of `generate` in {whose} thread, whose text would change if "
                "the processor were asked by hand. Build another processor; they may share the proxy."
            )
        refuse_by_hand(self, input_ids)
        settings, models = self.state.settings, self.state.models
        alignment = settings.vocabulary_alignment
        call = OpenCall(settings, models, _same_text if alignment is None else alignment.retokenize)
        models.prepare()
        step = (LazyStep if settings.lazy else EagerStep)(call)
        result = step(input_ids, scores)
        step.finish()
        models.finish(caches_are_valid=True)
        return result


def _same_text(input_ids: torch.Tensor) -> tuple[torch.Tensor, None]:
    """The proxy reads texts `(rows, L)` of the base as they are."""
    return input_ids, None


def _resolve_rule(rule: Rule | str, parameters: dict[str, Any]) -> Rule:
    if isinstance(rule, str):
        return make_rule(rule, **parameters)
    if not isinstance(rule, tuple(RULES.values())) and not (
        callable(rule) and not isinstance(rule, type) and hasattr(rule, "needs_reference")
    ):
        raise TypeError(f"`rule` must be a rule object or one of {', '.join(RULES)}, got {rule!r}.")
    if parameters:
        names = ["reference", *_SETTINGS, "proxy_tokenizer"]
        names.remove("rule")
        raise TypeError(
            f"{unknown_name_message('argument', next(iter(parameters)), names)} Parameters of a rule are passed "
            f'along only when it is given by name, as in rule="dual", threshold=0.5; here it is {rule!r}.'
        )
    return rule


def _make_models(rule: Rule, proxy: PreTrainedModel, reference: PreTrainedModel | None) -> ProxyModels:
    """The proxy, and the reference that the rule needs: the one given, or the proxy with its adapter switched off."""
    if not rule.needs_reference:
        if reference is not None:
            raise ValueError(f"`reference` is for rules that need one, which {rule!r} does not.")
        return ProxyModels(proxy, None, without_adapter=False)
    if reference is not None:
        _check_model(reference, "reference")
        return ProxyModels(proxy, reference, without_adapter=False)
    if isinstance(proxy, PeftModel):
        check_adapters(proxy, "reference", without_adapter=True)
        return ProxyModels(proxy, proxy, without_adapter=True)
    raise ValueError(
        f"{rule!r} needs the proxy before alignment: pass `reference=`, or a `PeftModel` as proxy, whose "
        "adapter is then switched off."
    )


def _check_model(model: PreTrainedModel, role: str) -> None:
    """Raise unless the model can serve as proxy or reference."""
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise TypeError(
            f"`{role}` must be a causal LM or a PeftModel, got {type(model).__name__}{how_to_compile(role, model)}."
        )
    if not isinstance(model_below(model), GenerationMixin):
        raise TypeError(f"`{role}` must be a causal LM, which has a head and `generate`, got {type(model).__name__}.")
    if getattr(model.get_input_embeddings(), "weight", None) is None:  # such as MusicGen, which has several
        raise TypeError(f"`{role}` must be a model of text with one table of embeddings, got {type(model).__name__}.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"KAD needs a decoder-only {role}, got the encoder-decoder model {describe(model)}.")
    check_adapters(model, role)
