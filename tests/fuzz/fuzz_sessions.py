"""What the fuzz draws: a processor and the calls of `generate` that it serves, one after the other.

The repr of a `Session` is the Python expression that makes it, without what is at its default, so that a failing
example can be copied into a test: `check(Session(...))`.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from fuzz_models import (
    ADAPTED,
    FAMILIES,
    FIRST_CHARACTER,
    NOT_IN_FLOAT64,
    VOCABULARY,
)
from hypothesis import strategies as st


class _ShortRepr:
    """The repr of a dataclass without the fields that are at their defaults."""

    def __repr__(self) -> str:
        shown = [f for f in fields(self) if getattr(self, f.name) != f.default or f.name in ("base", "calls")]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For Hypothesis, which would show every field."""
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Call(_ShortRepr):
    """One call of `generate`.

    Attributes:
        prompts: the tokens of each row, without padding; behind the row's text so far where it `continues`.
        continues: whether the prompts begin with the texts that the call before returned.
        path: "drafts" (`assistant_model`), "loop" (`custom_generate`), "attached", "argument" (`kad=`) or "tokens".
        do_sample: whether tokens are drawn.
        seed: of the random numbers.
        beams: `num_beams`.
        returned: `num_return_sequences`.
        limit: `max_new_tokens`.
        eos: `eos_token_id`.
        before: names of processors of `PROCESSORS` before KAD in the list.
        after: the same behind KAD.
        criteria: names of criteria of `CRITERIA`.
        settings: further arguments of `generate`.
        as_config: whether `settings` are passed within a `GenerationConfig`.
        proxy_prompts: prompts of the proxy's own, one for each row; none by default.
        padding: columns of padding before the longest prompt.
        cache: whether the call brings a cache: the one that the call before returned where the prompt continues its
            text, a new one otherwise. For a single text.
        change: what is done before the call: "weights" or "load" changes the proxy's weights, "adapter" its active
            adapter, "reset" drops the processor's caches.
    """

    prompts: tuple[tuple[int, ...], ...]
    continues: bool = False
    path: str = "drafts"
    do_sample: bool = False
    seed: int = 0
    beams: int = 1
    returned: int = 1
    limit: int = 8
    eos: tuple[int, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    criteria: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    as_config: bool = False
    proxy_prompts: tuple[tuple[int, ...], ...] = ()
    padding: int = 0
    cache: bool = False
    change: str = ""


@dataclass(frozen=True, repr=False)
class Session(_ShortRepr):
    """A pair of models, a processor, and its calls.

    Attributes:
        base: family of the base.
        proxy: family of the proxy.
        dtype: of the base's weights.
        proxy_dtype: of the proxy's weights.
        proxy_vocabulary: tokens of the proxy; the base has `VOCABULARY`.
        adapted: whether the proxy is a `PeftModel` with LoRA adapters.
        noisy: whether the proxy has the weights of the base of its family with noise; its own otherwise.
        rule: a name of `RULES`.
        parameters: of the rule.
        processor: further arguments of the processor.
        calls: in their order.
        again: the last call once more, on the "same" processor or on a "fresh" one; "" for neither.
    """

    base: str
    calls: tuple[Call, ...]
    proxy: str = "llama"
    dtype: str = "float64"
    proxy_dtype: str = "float64"
    proxy_vocabulary: int = VOCABULARY
    adapted: bool = False
    noisy: bool = False
    rule: str = "dual"
    parameters: tuple[tuple[str, Any], ...] = ()
    processor: tuple[tuple[str, Any], ...] = ()
    again: str = ""
    kind: str = field(default="", repr=False, compare=False)


LIMITS = (8, 12, 11, 10, 9, 7, 6, 5, 3, 2, 1)
TOKENS = st.integers(1, VOCABULARY - 1)
PROBABILITIES = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 0.9]),
    st.floats(0.01, 0.99).map(lambda x: round(x, 3)),
)
RULES = {
    "dual": {"threshold": PROBABILITIES.filter(bool)},
    "primal": {"budget": PROBABILITIES},
    "exact": {"budget": PROBABILITIES, "tolerance": st.sampled_from([1e-4, 1e-2])},
    "nudging": {"threshold": PROBABILITIES},
    "confidence_bet": {"margin": PROBABILITIES},
    "cascade": {
        "variant": st.sampled_from(["diff", "opt", "token_v2", "token_v3"]),
        "alpha": PROBABILITIES,
    },
    "paced": {
        "budget": PROBABILITIES,
        "threshold": st.sampled_from([0.2, 0.4, 0.8]),
        "step_size": st.sampled_from([0.1, 1.0, 5.0]),
    },
    "implicit_reward": {"beta": st.sampled_from([0.0, 0.5, 1.0, 2.0])},
    "ensemble": {"weight": PROBABILITIES},
    "blend_in": {"threshold": PROBABILITIES},
}
LAZY_RULES = ("dual", "primal", "exact", "nudging", "paced")
OWN_PROCESSORS = ("bias", "counted bias", "in place", "finite bans", "double")
LIBRARY_PROCESSORS = ("normalized", "penalty", "no repeats", "only some", "prefix")
PROCESSORS = st.lists(
    st.sampled_from([*LIBRARY_PROCESSORS, *OWN_PROCESSORS, *["counted bias"] * 7]),
    min_size=1,
    max_size=2,
).map(tuple)
WARPERS = {
    "temperature": st.sampled_from([0.5, 1.7]),
    "top_k": st.integers(1, 10),
    "top_p": st.sampled_from([0.3, 0.9]),
    "min_p": st.sampled_from([0.05, 0.3]),
    "typical_p": st.sampled_from([0.5, 0.9]),
    "epsilon_cutoff": st.just(0.02),
    "eta_cutoff": st.just(0.02),
}
CHANGES_OF_SCORES = {
    "repetition_penalty": st.sampled_from([0.7, 1.4]),
    "no_repeat_ngram_size": st.integers(1, 3),
    "encoder_repetition_penalty": st.just(1.3),
    "encoder_no_repeat_ngram_size": st.just(2),
    "bad_words_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=2), min_size=1, max_size=2),
    "suppress_tokens": st.lists(TOKENS, min_size=1, max_size=8, unique=True),
    "begin_suppress_tokens": st.lists(TOKENS, min_size=1, max_size=4, unique=True),
    "sequence_bias": st.just([[[5], -4.0], [[6], 2.0]]),
    "remove_invalid_values": st.just(True),
    "renormalize_logits": st.just(True),
}
ENDS = {
    "min_new_tokens": st.integers(1, 8),
    "min_length": st.integers(1, 12),
    "forced_eos_token_id": TOKENS,
    "exponential_decay_length_penalty": st.just((2, 1.5)),
    "stop_strings": st.lists(TOKENS.map(lambda token: chr(FIRST_CHARACTER + token)), min_size=1, max_size=4),
}
WAYS_TO_RUN = {
    "prefill_chunk_size": st.integers(1, 4),
    "use_cache": st.just(False),
    "cache_implementation": st.sampled_from(["dynamic", "hybrid"]),
}


@st.composite
def some_of(draw: st.DrawFn, table: dict[str, st.SearchStrategy[Any]], most: int) -> dict[str, Any]:
    """A few names of a table with values."""
    names = draw(st.lists(st.sampled_from(sorted(table)), unique=True, max_size=most))
    return {name: draw(table[name]) for name in sorted(names)}


def some_texts(rows: int, longest: int) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """The tokens of so many prompts."""
    text = st.lists(TOKENS, min_size=1, max_size=longest).map(tuple)
    return st.lists(text, min_size=rows, max_size=rows).map(tuple)


def one_in(count: int) -> st.SearchStrategy[bool]:
    """True once in so many times, and never in the simplest example."""
    return st.integers(0, count - 1).map(lambda number: number == count - 1)


@st.composite
def sessions(draw: st.DrawFn, kind: str) -> Session:
    """Sessions whose base has a cache of one kind of `FAMILIES`."""
    base = draw(st.sampled_from(FAMILIES[kind]))
    adapted = draw(one_in(5))
    if adapted:
        proxy = draw(st.sampled_from(sorted(ADAPTED)))
    else:
        proxy = draw(
            st.one_of(
                st.just(base),
                st.sampled_from(FAMILIES["full"]),
                st.sampled_from(FAMILIES[kind]),
            )
        )
    dtype, proxy_dtype = (
        draw(st.sampled_from(["float32", "bfloat16"] if family in NOT_IN_FLOAT64 else ["float64"] * 6 + types))
        for family, types in (
            (base, ["float32", "bfloat16"]),
            (proxy, ["float32", "bfloat16"]),
        )
    )
    # What has a state is drawn more often than the rest.
    names = ["implicit_reward"] * 3 * adapted + [name for name in RULES if name != "implicit_reward"] + ["paced"] * 3
    rule = draw(st.sampled_from(names))
    lazy = draw(one_in(8)) and rule in LAZY_RULES
    drafter = draw(st.sampled_from(["proxy", "proxy", "prompt_lookup"]))
    automatic = not lazy and drafter == "proxy" and draw(one_in(8))
    processor = {
        "num_assistant_tokens": "auto" if automatic else draw(st.integers(1, 8)),
        "component_temperature": draw(st.sampled_from([1.0, 1.0, 0.6, 1.8])),
        "drafter": drafter,
        "verification": draw(st.sampled_from(["token", "block"])),
        "lazy": lazy,
        "trace": not lazy and draw(st.booleans()),
        "compile": kind != "states" and not lazy and not automatic and draw(one_in(8)),
    }
    rows = draw(st.integers(1, 3))
    calls = []
    for number in range(draw(st.sampled_from([1, 1, 1, 1, 2, 2, 3]))):
        calls.append(draw(one_call(rows, lazy=lazy, first=number == 0, adapted=adapted)))
    if rows == 1 and not lazy and draw(st.booleans()):
        calls = [as_turn_of_a_chat(call, first=number == 0) for number, call in enumerate(calls)]
    return Session(
        base,
        tuple(calls),
        proxy=proxy,
        dtype=dtype,
        proxy_dtype=proxy_dtype,
        proxy_vocabulary=draw(st.sampled_from([VOCABULARY, VOCABULARY, VOCABULARY - 3, VOCABULARY + 5])),
        adapted=adapted,
        noisy=not adapted and proxy == base,
        rule=rule,
        parameters=tuple((name, draw(value)) for name, value in RULES[rule].items()),
        processor=tuple(processor.items()),
        again=draw(st.sampled_from(["", "", "same", "fresh"])),
        kind=kind,
    )


def as_turn_of_a_chat(call: Call, *, first: bool) -> Call:
    """The call as a turn of a chat, whose cache goes from call to call."""
    settings = {name: v for name, v in call.settings if name not in ("use_cache", "cache_implementation")}
    settings |= {"return_dict_in_generate": True}
    return replace(
        call,
        continues=not first,
        cache=True,
        beams=1,
        returned=1,
        padding=0,
        settings=tuple(settings.items()),
    )


def is_contradictory(settings: dict[str, Any]) -> bool:
    """Whether no `GenerationConfig` can be made of settings, since the token that is forced is suppressed as well."""
    return settings.get("forced_eos_token_id") in settings.get("suppress_tokens", ())


@st.composite
def one_call(draw: st.DrawFn, rows: int, *, lazy: bool, first: bool, adapted: bool) -> Call:
    """A call with so many rows, for a processor that is lazy or not."""
    continues = not first and draw(st.booleans())
    paths = ["drafts"] * 5 + ["loop", "attached", "argument", "tokens", "tokens"]
    path = draw(st.sampled_from(paths)) if not lazy else "tokens"
    do_sample = lazy or draw(st.booleans())
    beams = draw(st.sampled_from([1, 2, 3])) if path == "tokens" and not do_sample else 1
    settings: dict[str, Any] = {"top_k": 0} if do_sample else {}
    if do_sample and not lazy:
        settings |= draw(some_of(WARPERS, 2))
    settings |= draw(some_of(CHANGES_OF_SCORES, 2)) | draw(some_of(ENDS, 2)) | draw(some_of(WAYS_TO_RUN, 1))
    eos = tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=6, unique=True)))
    if not eos:
        settings.pop("exponential_decay_length_penalty", None)
    if draw(one_in(3)):
        settings |= {
            "return_dict_in_generate": True,
            "output_scores": True,
            "output_logits": True,
        }
    attached = path in ("attached", "argument")
    criteria = draw(st.sampled_from(["", "", "odd", "counted", "own eos"])) if beams == 1 else ""
    changes = ["", "", "weights", "load", "reset", *["adapter", "adapter"] * adapted]
    return Call(
        prompts=draw(some_texts(rows, 6)),
        continues=continues,
        path=path,
        do_sample=do_sample,
        seed=draw(st.integers(0, 9)) if do_sample else 0,
        beams=beams,
        returned=draw(st.integers(1, 2)) if do_sample and not continues and draw(one_in(4)) else 1,
        limit=draw(st.sampled_from(LIMITS)),
        eos=eos,
        before=draw(PROCESSORS) if draw(one_in(2)) else (),
        after=draw(PROCESSORS) if draw(one_in(2)) and not attached and not lazy else (),
        criteria=(criteria,) if criteria else (),
        settings=tuple(settings.items()),
        as_config=draw(one_in(4)) and not is_contradictory(settings),
        proxy_prompts=draw(some_texts(rows, 5)) if draw(one_in(6)) else (),
        padding=draw(st.integers(0, 3)),
        change="" if first else draw(st.sampled_from(changes)),
    )
