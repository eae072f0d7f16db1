"""Run a session and check everything that must hold of it."""

import copy
import linecache
import math
import random
import re
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from fuzz_models import (
    FORGETTING_IN_PROMPTS,
    IN_FLOAT32_INSIDE,
    PADDING,
    WITHOUT_GIVEN_CACHE,
    base_model,
    proxy_model,
    tokenizer,
)
from fuzz_oracle import NO_TOKEN, BeamOracle, Force, Oracle, PlainRule, Position
from fuzz_parts import CRITERIA, PROCESSORS, Watch
from fuzz_results import Result, check_statistics, check_trace, difference, same
from fuzz_sessions import WARPERS, Call, Session
from transformers import Cache, DynamicCache, GenerationConfig, StoppingCriteriaList

import transformers_kad
from transformers_kad import KADLogitsProcessor, attach, detach, kad_generate
from transformers_kad.models.by_version import CACHE
from transformers_kad.models.cache_rollback import may_be_recurrent
from transformers_kad.models.cached_model import LARGEST_SHARE_OF_HOLES

PACKAGE = str(Path(transformers_kad.__file__).parent)
# Combinations that the library documents as refused: a message that matches none of these is a defect.
REFUSALS = (
    r"`trace=True` is not available with beams",
    r"`compile=True` decodes from `input_ids` alone .* got a filled cache",
    r"after the processors behind KAD in `logits_processor`, so that no token can be chosen",
    r"are NaN, \+inf or all -inf",
)
# How much two ways of computing the same logits may differ. Nothing is compared in bfloat16, whose ties are common.
TOLERANCES = {"float64": 1e-6, "float32": 2e-4}
PERTURBATIONS = 24


@dataclass
class Account:
    """What was seen so far.

    Attributes:
        counts: how often each thing was seen, by "dimension: value".
        refusals: how often each refusal was met, by the beginning of its message.
        session: the newest session.
    """

    counts: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    session: Session | None = None

    def add(self, **values: object) -> None:
        """Count a value of each dimension."""
        self.counts.update(f"{name}: {value}" for name, value in values.items())


def check(session: Session, account: Account | None = None) -> None:
    """Run the calls of a session, and raise `AssertionError` where something does not hold."""
    account = Account() if account is None else account
    account.session = session
    with patch.object(torch, "compile", lambda model, **settings: model):  # a minute for every shape
        Run(session, account).check()


class Refused(Exception):
    """The library refused a call."""


class Run:
    """A session that is running: its models, its processor, and what it has returned so far."""

    def __init__(self, session: Session, account: Account) -> None:
        self.session, self.account = session, account
        self.base = base_model(session.base, session.dtype)
        self.proxy = proxy_model(
            session.proxy,
            session.proxy_dtype,
            session.proxy_vocabulary,
            session.noisy,
            session.adapted,
        )
        self.settings = dict(session.processor)
        temperature = self.settings.get("component_temperature", 1.0)
        self.rule = PlainRule(session.rule, dict(session.parameters), temperature)
        self.longest = 0  # columns of a cache
        self.cache: Any = None  # what the last call returned
        self.texts: list[list[int]] = []  # of the last call, without padding
        self.remembered: list[tuple[list[int], int, list[float | None]]] = []  # of a rule with a memory
        dtypes = {session.dtype, session.proxy_dtype}
        self.tolerance = None if "bfloat16" in dtypes else max(TOLERANCES[dtype] for dtype in dtypes)
        if self.tolerance is not None and {session.base, session.proxy} & {*IN_FLOAT32_INSIDE}:
            self.tolerance = max(self.tolerance, TOLERANCES["float32"])
        self.is_exact = self.tolerance == TOLERANCES["float64"]

    def check(self) -> None:
        """All calls, one after the other."""
        session = self.session
        self.account.add(sessions="all", base=session.base, proxy=session.proxy, rule=session.rule)
        self.account.add(dtypes=f"{session.dtype} and {session.proxy_dtype}", adapted=session.adapted)
        self.account.add(
            vocabulary=session.proxy_vocabulary,
            calls=len(session.calls),
            again=session.again,
        )
        self.account.add(**self.settings)
        weights = {name: value.clone() for name, value in self.proxy.state_dict().items()}
        kad = self._new_processor()
        try:
            for number, call in enumerate(session.calls):
                self._change(call, kad)
                result = self._checked_call(kad, call)
                if number < len(session.calls) - 1:
                    continue
                self._check_again(kad, call, result)
        finally:
            if any(call.change in ("weights", "load") for call in session.calls):
                self.proxy.load_state_dict(weights)
            if session.adapted:
                self.proxy.set_adapter("first")

    def _new_processor(self) -> KADLogitsProcessor:
        return KADLogitsProcessor(
            self.proxy,
            self.session.rule,
            **self.settings,
            **dict(self.session.parameters),
        )

    def _change(self, call: Call, kad: KADLogitsProcessor) -> None:
        """What happens before a call."""
        if call.change == "weights":
            with torch.no_grad():
                for parameter in self.proxy.parameters():
                    parameter.mul_(1.1)
        elif call.change == "load":
            smaller = {name: value * 0.9 for name, value in self.proxy.named_parameters()}  # no buffers
            self.proxy.load_state_dict({**self.proxy.state_dict(), **smaller})
        elif call.change == "adapter":
            self.proxy.set_adapter("second")
        elif call.change == "reset":
            kad.reset()
            self.remembered = []

    def _check_again(self, kad: KADLogitsProcessor, call: Call, result: Result | None) -> None:
        """The last call once more: a processor that has served calls decodes as a new one."""
        if result is None or not self.session.again:
            return
        is_fresh = self.session.again == "fresh"
        if is_fresh:
            kad, self.remembered = self._new_processor(), []
            if call.continues and self.rule.name == "paced":
                return
        if call.continues:
            call = replace(call, continues=False, prompts=tuple(map(tuple, result.prompts)))
        again = self._checked_call(kad, call)
        both_fresh = is_fresh and len(self.session.calls) == 1
        by_time = self.settings.get("num_assistant_tokens") == "auto" and self.is_speculative(call)
        if again is None or by_time:
            return
        # Greedy texts were compared with the oracle, which knows what is a tie. Draws of fresh processors are equal to
        # the bit; those behind a cache differ by rounding, which decides no draw in float64.
        if both_fresh or (call.do_sample and self.is_exact):
            assert torch.equal(again.ids, result.ids), f"the same call gave {result.ids} and then {again.ids}"
        if both_fresh:
            assert again.statistics == result.statistics

    def _checked_call(self, kad: KADLogitsProcessor, call: Call) -> Result | None:
        """One call and all that must hold of it; None if the library refused it."""
        prompts = self._prompts(call)
        self._count(call, prompts)
        arguments = self._arguments(call, prompts)
        before = self._snapshot(arguments)
        if call.cache and len(prompts) == call.beams == call.returned == 1:
            arguments[CACHE] = self._cache_for(call)
        try:
            output = self._generate(kad, call, arguments)
        except Exception as error:
            self._check_untouched(before, arguments)
            self.cache = None
            self.texts, self.remembered = (
                prompts,
                [] if kad.state.remembered == [] else self.remembered,
            )
            if is_refusal(error):
                self.account.refusals[re.sub(r"[^a-zA-Z` ]+", "_", str(error))[:80]] += 1
                self.account.add(calls_refused="all")
                return None
            self._excuse(error, call, prompts)
            return None
        self._check_untouched(before, arguments)
        ids = output if torch.is_tensor(output) else output.sequences
        result = Result(call, prompts, arguments["input_ids"], ids, kad.statistics, output)
        result.check_shape(self.is_speculative(call))
        check_statistics(kad.statistics, call, self.settings, self.is_speculative(call))
        check_trace(kad, result)
        self._check_caches(kad, result)
        self.cache = getattr(output, "past_key_values", None) if len(ids) == 1 else None
        if self._forgets_in_prompts(call) and "prefill_chunk_size" in dict(call.settings):
            self.cache = None  # each chunk but the first was read behind a filled cache
        self.account.add(calls="all")
        if call.beams > 1:
            self._check_beams(call, result)
        else:
            self._check_tokens(call, result, kad)
        self.texts = [prompt + tokens for prompt, tokens in zip(result.prompts_of_rows, result.tokens, strict=True)]
        return result

    def _cache_for(self, call: Call) -> Cache | None:
        """The cache of the caller's that a call reads its text into."""
        if self.session.base in WITHOUT_GIVEN_CACHE:
            return None
        is_held = isinstance(self.cache, Cache) and call.continues and not self._forgets_in_prompts(call)
        self.account.add(cache="held" if is_held else "new")
        return self.cache if is_held else DynamicCache(config=self.base.config.get_text_config(decoder=True))

    def _forgets_in_prompts(self, call: Call) -> bool:
        """Whether the base forgets its states where a call reads a prompt behind a filled cache."""
        return self.session.base in FORGETTING_IN_PROMPTS and not self.is_speculative(call)

    def is_speculative(self, call: Call) -> bool:
        """Whether a call is decoded with drafts."""
        return call.path != "tokens" and call.beams == 1

    def _count(self, call: Call, prompts: list[list[int]]) -> None:
        self.account.add(
            path=call.path,
            do_sample=call.do_sample,
            beams=call.beams,
            rows=len(prompts),
        )
        self.account.add(
            continues=call.continues,
            change=call.change,
            proxy_prompt=bool(call.proxy_prompts),
        )
        self.account.add(as_config=call.as_config, returned=call.returned)
        for kind in ("before", "after", "criteria"):
            for name in getattr(call, kind):
                self.account.add(**{kind: name})
        for name, _ in call.settings:
            self.account.add(setting=name)

    def _prompts(self, call: Call) -> list[list[int]]:
        if not call.continues or not self.texts:
            return [list(prompt) for prompt in call.prompts]
        step = max(len(self.texts) // len(call.prompts), 1)
        return [text + list(new) for text, new in zip(self.texts[::step], call.prompts, strict=True)]

    def _arguments(self, call: Call, prompts: list[list[int]]) -> dict[str, Any]:
        """The arguments of `generate` but for the processor, and what asks for drafts."""
        length = max(map(len, prompts)) + call.padding
        ids = torch.tensor([[PADDING] * (length - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = {
            "max_new_tokens": call.limit,
            "do_sample": call.do_sample,
            "num_beams": call.beams,
        }
        settings |= copy.deepcopy(dict(call.settings)) | {
            "num_return_sequences": call.returned,
            "pad_token_id": PADDING,
        }
        if call.eos:
            settings["eos_token_id"] = list(call.eos)
        arguments = {"generation_config": GenerationConfig(**settings)} if call.as_config else settings
        if "stop_strings" in settings:
            arguments["tokenizer"] = tokenizer()
        if call.criteria:
            arguments["stopping_criteria"] = StoppingCriteriaList(CRITERIA[name]() for name in call.criteria)
        return {"input_ids": ids, "attention_mask": mask, **arguments}

    def _generate(self, kad: KADLogitsProcessor, call: Call, arguments: dict[str, Any]) -> Any:
        before, after = ([PROCESSORS[name]() for name in names] for names in (call.before, call.after))
        processors = [*before, kad, *after]
        own = {"logits_processor": processors}
        if call.path == "drafts":
            own["assistant_model"] = self.proxy
        elif call.path == "loop":
            own["custom_generate"] = kad_generate
        elif call.path in ("attached", "argument"):
            own["logits_processor"] = before
            if call.path == "argument":
                own["kad"] = kad
        listed = list(own["logits_processor"])
        torch.manual_seed(call.seed)
        states = (
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        )
        with (
            attached(self.base, kad) if call.path == "attached" else nullcontext(),
            self._proxy_prompt(kad, call),
        ):
            output = self.base.generate(**arguments, **own)
        assert [*map(id, own["logits_processor"])] == [*map(id, listed)], "the list of processors was changed"
        assert random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]
        assert call.do_sample or torch.equal(torch.get_rng_state(), states[0]), "greedy decoding drew random numbers"
        return output

    def _proxy_prompt(self, kad: KADLogitsProcessor, call: Call) -> Any:
        if not call.proxy_prompts:
            return nullcontext()
        length = max(map(len, call.proxy_prompts))
        ids = [[PADDING] * (length - len(prompt)) + [*prompt] for prompt in self._own_prompts(call)]
        mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in call.proxy_prompts]
        return kad.proxy_prompt({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})

    def _own_prompts(self, call: Call) -> list[list[int]]:
        """The proxy's own prompts, in its own vocabulary."""
        return [[token % self.session.proxy_vocabulary for token in prompt] for prompt in call.proxy_prompts]

    def _snapshot(self, arguments: dict[str, Any]) -> list[Any]:
        """What a call must not change."""
        models = (self.base, self.proxy)
        values = {}
        for name in arguments.keys() - {
            CACHE,
            "tokenizer",
            "stopping_criteria",
        }:
            value = arguments[name]
            values[name] = value.to_dict() if isinstance(value, GenerationConfig) else copy.deepcopy(value)
        criteria = [*map(id, arguments.get("stopping_criteria", []))]
        configs = [config.to_dict() for model in models for config in (model.config, model.generation_config)]
        weights = [parameter._version for model in models for parameter in model.parameters()]
        names = [[name for name in sorted(vars(model)) if name != "_kad_static_models"] for model in models]
        attributes = [*names, *(model.training for model in models)]
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for model in models for m in model.modules()]
        return [values, criteria, configs, weights, attributes, hooks]

    def _check_untouched(self, before: list[Any], arguments: dict[str, Any]) -> None:
        for old, new in zip(before, self._snapshot(arguments), strict=True):
            assert same(old, new), f"the call changed {difference(old, new)}"

    def _check_caches(self, kad: KADLogitsProcessor, result: Result) -> None:
        """A cache holds no more than the longest text has tokens, and in a batch a small share of holes besides."""
        own = self._own_prompts(result.call) or result.prompts
        # A beam search goes on while other beams than those that it returns are likely to win.
        new = result.call.limit if result.call.beams > 1 else result.ids.shape[1] - result.inputs.shape[1]
        longest = max(map(len, own)) + new
        columns = longest + (0 if result.call.proxy_prompts else result.call.padding)
        if len(result.ids) > 1:
            columns = math.ceil(columns / (1 - LARGEST_SHARE_OF_HOLES))
        # A call that does not ask the proxy, or asks it in the static cache, leaves the cache of an earlier one.
        if self.settings.get("lazy") or self.settings.get("compile"):
            columns = self.longest = max(columns, self.longest)
        for cached in kad.state.models:
            held = cached.cached_length
            assert held <= columns, f"the {cached.role} has {held} tokens in its cache, and the text {columns}"
        cache = getattr(result.output, "past_key_values", None)
        if isinstance(cache, Cache) and len(result.ids) == 1 and not may_be_recurrent(cache):
            assert cache.get_seq_length() <= result.inputs.shape[1] + new

    def _first_states(self, prompts: list[list[int]]) -> list[float | None]:
        """Of each prompt the state of a rule with a memory, which goes on from the text that shares most with it."""
        states = []
        for prompt in prompts:
            state, longest = self.rule.first_state, 0
            for ids, prompt_length, along in self.remembered:
                pairs = enumerate(zip(ids, prompt, strict=False))
                shared = next(
                    (at for at, (own, other) in pairs if own != other),
                    min(len(ids), len(prompt)),
                )
                if shared >= prompt_length and shared > longest:
                    state, longest = along[shared - prompt_length], shared
            states.append(state)
        return states

    def _run_oracle(
        self,
        call: Call,
        prompts: list[list[int]],
        processors: list[Any],
        *,
        fills_up: bool,
    ) -> Any:
        """The same call of transformers, with other processors in its list."""
        if self.is_speculative(call):  # in transformers' own loop not every base can read a prompt in chunks
            call_settings = dict(call.settings)
            call_settings.pop("prefill_chunk_size", None)
            call = replace(call, settings=tuple(call_settings.items()))
        arguments = self._arguments(replace(call, do_sample=call.returned > 1), prompts)
        if not call.eos and fills_up:
            if call.as_config:
                arguments["generation_config"].eos_token_id = [NO_TOKEN]
            else:
                arguments["eos_token_id"] = [NO_TOKEN]
        arguments["logits_processor"] = processors
        return self.base.generate(**arguments)

    def _check_tokens(self, call: Call, result: Result, kad: KADLogitsProcessor) -> None:
        """Every token of every row is what the oracle would have chosen, or could have drawn, and nothing follows."""
        prompts = self._own_prompts(call) or result.prompts
        prompts = [prompt for prompt in prompts for _ in range(call.returned)]
        first = [state for state in self._first_states(result.prompts) for _ in range(call.returned)]
        oracle = Oracle(self.rule, self.proxy, prompts, result.tokens, first)
        before, after = ([PROCESSORS[name]() for name in names] for names in (call.before, call.after))
        processors = [*before, oracle, *after, Force(oracle)]
        fills_up = self.is_speculative(call) or bool(call.eos) or "own eos" in call.criteria
        expected = self._run_oracle(call, result.prompts, processors, fills_up=fills_up)
        ids = expected if torch.is_tensor(expected) else expected.sequences
        assert torch.equal(ids, result.ids), f"expected {ids.tolist()}, got {result.ids.tolist()}"
        pairs = zip(result.prompts_of_rows, result.tokens, oracle.states_along, strict=True)
        self.remembered = [(prompt + tokens, len(prompt), along) for prompt, tokens, along in pairs]
        self._check_memory(kad)
        if self.tolerance is None:
            return
        for row, positions in enumerate(oracle.positions):
            for at, (token, position) in enumerate(zip(result.tokens[row], positions, strict=True)):
                faults = self._faults(call, result, kad, row, at, token, position)
                if faults and self._is_undecided(position):
                    self.account.add(positions="undecided")
                    if self.rule.name == "paced":  # what follows depends on it, in the next call as well
                        held = kad.state.remembered
                        self.remembered = [(text.ids, text.prompt_length, text.states.tolist()) for text in held]
                    return
                assert not faults, f"row {row}, token {at} ({token}): {'; '.join(faults)}"
                self.account.add(positions="compared")

    def _check_memory(self, kad: KADLogitsProcessor) -> None:
        """What the processor remembers for a rule with a memory are the texts of the call."""
        if self.rule.name == "paced":
            assert [text.ids for text in kad.state.remembered] == [ids for ids, *_ in self.remembered]
            for text, (ids, length, _) in zip(kad.state.remembered, self.remembered, strict=True):
                assert (text.prompt_length, len(text.states)) == (
                    length,
                    len(ids) - length + 1,
                )

    def _faults(
        self,
        call: Call,
        result: Result,
        kad: KADLogitsProcessor,
        row: int,
        at: int,
        token: int,
        position: Position,
    ) -> list[str]:
        """What is wrong with a token, as far as can be told from its position."""
        faults, settings, close = [], dict(call.settings), 20 * self.tolerance
        final = position.final
        if final.max() == -math.inf and not call.do_sample:  # token by token, transformers emits what argmax finds
            if self.is_speculative(call):
                faults.append("the processors behind KAD had left no token")
        elif not call.do_sample:
            gap = float(final.max() - final[token])
            if not gap <= close:
                faults.append(f"{int(final.argmax())} is likelier than it by {gap:.3g} nats")
        elif final[token] == -math.inf:
            faults.append("it can't be drawn")
        elif settings.get("top_k") and int((final > final[token] + close).sum()) >= settings["top_k"]:
            faults.append("it is not among the top k")
        masses = result.statistics.sequences[row].deferral_masses
        if (masses is None) != (position.mass is None):
            faults.append(f"the deferral mass is {masses}, not {position.mass}")
        elif masses is not None and abs(masses[at] - position.mass) > close:
            faults.append(f"the deferral mass is {masses[at]}, not {position.mass}")
        if kad.trace is not None:
            record = kad.trace.sequences[row][at]
            found = record.base_prob, record.proxy_prob, record.target_prob
            wanted = position.p[token], position.q[token], position.r[token]
            if max(abs(one - other) for one, other in zip(found, wanted, strict=True)) > close:
                faults.append(f"the trace says p, q, r = {found}, not {wanted}")
        warped = any(settings.get(name) for name in WARPERS)
        scores = getattr(result.output, "scores", None)
        if scores is not None and not self.settings.get("lazy"):
            own = scores[at][row].double().softmax(-1)
            if own[token] == 0 and call.do_sample:
                faults.append("its score is -inf")
            if not warped and float((own - final.softmax(-1)).abs().max()) > 5 * close:
                faults.append("its scores are not log r")
        return faults

    def _is_undecided(self, position: Position) -> bool:
        """Whether rounding decides what the rule does at a position: small changes of the logits change r much."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(PERTURBATIONS):
            noisy = [
                None if logits is None else logits + self.tolerance * torch.randn(len(logits), generator=generator)
                for logits in (
                    position.scores,
                    position.proxy_logits,
                    position.reference_logits,
                )
            ]
            state = position.state
            if state is not None:
                state += self.tolerance * float(torch.randn((), generator=generator))
            other = self.rule.apply(Position(*noisy, state), generator)
            if max(abs(one - two) for one, two in zip(other.r, position.r, strict=True)) > 20 * self.tolerance:
                return True
        return False

    def _check_beams(self, call: Call, result: Result) -> None:
        """The sequences of a beam search are those of the oracle, unless rounding decides about one of its steps."""
        states = self._first_states(result.prompts)
        prompts = self._own_prompts(call) or result.prompts
        oracle = BeamOracle(self.rule, self.proxy, prompts, result.inputs.shape[1], states, call.beams)
        before, after = ([PROCESSORS[name]() for name in names] for names in (call.before, call.after))
        expected = self._run_oracle(call, result.prompts, [*before, oracle, *after], fills_up=False)
        ids = expected if torch.is_tensor(expected) else expected.sequences
        if self.tolerance is None:
            return
        faults = [] if same(ids.tolist(), result.ids.tolist()) else [f"{result.ids.tolist()}, not {ids.tolist()}"]
        for row, sequence in enumerate(result.statistics.sequences):
            own = result.ids[row, result.inputs.shape[1] :].tolist()
            for at, mass in enumerate(sequence.deferral_masses or ()):
                wanted = oracle.masses.get((row, tuple(own[:at])))
                if wanted is None or abs(mass - wanted) > 20 * self.tolerance:
                    faults.append(f"the deferral mass of token {at} of beam {row} is {mass}, not {wanted}")
        if faults and (not self.is_exact or any(map(self._is_undecided, oracle.positions))):
            self.account.add(beams="undecided")
            return
        assert not faults, f"the beams: {'; '.join(faults)}"

    def _excuse(self, error: Exception, call: Call, prompts: list[list[int]]) -> None:
        """An error that is not the library's is excused where transformers raises it without KAD as well."""
        settings = tuple((name, value) for name, value in call.settings if name != "stop_strings")
        endless = replace(call, eos=(), criteria=(), settings=settings)  # which no other text ends before the error
        for plain in (call, endless):
            before, after = ([PROCESSORS[name]() for name in names] for names in (call.before, call.after))
            torch.manual_seed(call.seed)
            try:
                self.base.generate(**self._arguments(plain, prompts), logits_processor=[*before, *after])
            except type(error):
                self.account.add(invalid_calls=f"{type(error).__name__}: {str(error)[:60]}")
                return
            except Exception:
                pass
        if call.after and self._processors_leave_nothing(type(error), call, prompts):
            self.account.add(invalid_calls="the processors behind KAD left no token")
            return
        raise AssertionError(f"{type(error).__name__}: {error}") from error

    def _processors_leave_nothing(self, kind: type[Exception], call: Call, prompts: list[list[int]]) -> bool:
        """Whether a call ends with the same error again, behind processors of the user's that ban what KAD left."""
        behind_kad, behind_all = Watch(), Watch()
        names = {**PROCESSORS, "behind KAD": lambda: behind_kad, "behind all": lambda: behind_all}
        watched = replace(call, after=("behind KAD", *call.after, "behind all"))
        with patch.dict(PROCESSORS, names), suppress(kind):
            self._generate(self._new_processor(), watched, self._arguments(call, prompts))
        return behind_all.has_seen_none and not behind_kad.has_seen_none


@contextmanager
def attached(base: Any, kad: KADLogitsProcessor) -> Iterator[None]:
    """A processor attached to a base for a while."""
    attach(base, kad)
    try:
        yield
    finally:
        detach(base)


def is_refusal(error: Exception) -> bool:
    """Whether an error was raised by a statement of the library, and says what `REFUSALS` expects."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    statement = linecache.getline(frame.filename, frame.lineno or 0).strip()
    is_own = frame.filename.startswith(PACKAGE) and statement.startswith("raise")
    return is_own and any(re.search(pattern, str(error)) for pattern in REFUSALS)
