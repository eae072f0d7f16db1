"""`generate` with a KAD processor samples from the law of section "target r", token by token and speculatively.

The models have four tokens, so the law of short texts is computed exactly (exact_law.py) and samples are compared
with it by chi-square. A p-value below THRESHOLD fails a test. P_VALUES of them are computed at most, so with correct
code the module gives a false alarm with a probability of at most FALSE_ALARM = 1e-6 over the choice of the seeds
(Bonferroni, and as far as the chi-square approximation goes); the seeds are fixed.

The last tests plant bugs in the package and demand that the same comparison refuses what comes out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import exact_law
import numpy as np
import pytest
import torch
from exact_law import Law, Paced, PlainRule, Text
from tiny_models import tiny_model
from transformers import LogitsProcessor, PreTrainedModel

from transformers_kad import RULES, Ensemble, KADCandidateGenerator, KADLogitsProcessor, PrimalDeferral
from transformers_kad.decoding import speculative_round
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.models.text_reader import TextReader
from transformers_kad.rules.base import Rule
from transformers_kad.rules.registry import make_rule

FALSE_ALARM = 1e-6
P_VALUES = 91
THRESHOLD = FALSE_ALARM / P_VALUES

VOCABULARY = 4
PROMPT = (1, 2, 3, 1)  # 0 is the padding
STEPWISE_SAMPLES = 20_000
COMMON: dict[str, Any] = {"do_sample": True, "top_k": 0}

SPECULATIVE = {"dual": {"threshold": 0.4}, "primal": {"budget": 0.5}}
PLAIN = {"dual": exact_law.dual(0.4), "primal": exact_law.primal(0.5)}

# What a user's processors add to the scores: before KAD by the last token, after it by the length of the text.
BIAS_BEFORE = np.array([[-1.5, 0, 0.5, 0], [0.5, -1.5, 0, 0], [0, 0.5, -2, 0], [0, 0.5, 0, -1]])
BIAS_AFTER = np.array([[1.0, -1, 0.5, 0], [1, -1, 0.5, -1]])


class BiasByLastToken(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.tensor(BIAS_BEFORE, dtype=scores.dtype)[input_ids[:, -1]]


class BiasByLength(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.tensor(BIAS_AFTER, dtype=scores.dtype)[input_ids.shape[1] % 2]


@dataclass(frozen=True)
class Setting:
    """A call of `generate`, described once for the package and for the computation by hand."""

    component_temperature: float = 1.0
    suppressed: tuple[int, ...] = ()
    bias: bool = False  # a user's processors before and after KAD
    temperature: float = 1.0  # of `generate` itself, on r
    top_p: float = 1.0
    eos: int | None = None
    min_new_tokens: int = 0
    proxy_prompt: Text | None = None

    def arguments(self, kad: KADLogitsProcessor) -> dict[str, Any]:
        chosen: dict[str, Any] = {"logits_processor": [kad]}
        if self.bias:
            chosen["logits_processor"] = [BiasByLastToken(), kad, BiasByLength()]
        if self.suppressed:
            chosen["suppress_tokens"] = list(self.suppressed)
        if self.temperature != 1:
            chosen["temperature"] = self.temperature
        if self.top_p < 1:
            chosen["top_p"] = self.top_p
        if self.eos is not None:
            chosen["eos_token_id"] = self.eos
        if self.min_new_tokens:
            chosen["min_new_tokens"] = self.min_new_tokens
        return chosen

    def law(self, rule: PlainRule | Paced, models: "Models", length: int, prompt: Text = PROMPT) -> Law:
        """The exact law of the texts that follow the prompt."""
        base = logits_of(models.base, prompt, length)
        proxy = logits_of(models.proxy, self.proxy_prompt or prompt, length)
        reference = logits_of(models.reference, prompt, length)

        def distributions(prefix: Text) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            scores = base[prefix].copy()
            scores[list(self.suppressed)] = -np.inf
            if len(prefix) < self.min_new_tokens:
                scores[self.eos] = -np.inf
            if self.bias:
                scores += BIAS_BEFORE[(prompt + prefix)[-1]]
            banned = scores == -np.inf
            p, q, q0 = (
                exact_law.softmax(np.where(banned, -np.inf, logits[:VOCABULARY]) / self.component_temperature)
                for logits in (scores, proxy[prefix], reference[prefix])
            )
            return p, q, q0

        @cache
        def multiplier(prefix: Text) -> float:
            if not prefix:
                return rule.start
            return rule.after(multiplier(prefix[:-1]), distributions(prefix[:-1])[0])

        def step(prefix: Text) -> np.ndarray:
            memory = (multiplier(prefix),) if isinstance(rule, Paced) else ()
            with np.errstate(divide="ignore", invalid="ignore"):
                log_r = np.log(rule(*distributions(prefix), *memory))
            if self.bias:
                log_r = log_r + BIAS_AFTER[len(prompt + prefix) % 2]
            return exact_law.nucleus(exact_law.softmax(log_r / self.temperature), self.top_p)

        return exact_law.law_of_texts(step, length, self.eos)


@dataclass(frozen=True)
class Models:
    base: PreTrainedModel
    proxy: PreTrainedModel
    reference: PreTrainedModel = field(
        default_factory=lambda: tiny_model("gpt2", vocabulary=VOCABULARY, hidden=8, seed=126)
    )


@cache
def models(kind: str = "plain") -> Models:
    if kind == "sliding":  # shorter than the texts, so that taking tokens back is not just cutting
        return Models(
            tiny_model("mistral", vocabulary=VOCABULARY, hidden=8, seed=10, sliding_window=4),
            tiny_model("mistral", vocabulary=VOCABULARY, hidden=8, seed=112, sliding_window=4),
        )
    base = tiny_model("llama", vocabulary=VOCABULARY, hidden=8, seed=8)
    if kind == "larger_proxy_vocabulary":
        return Models(base, tiny_model("gpt2", vocabulary=VOCABULARY + 2, hidden=8, seed=121))
    return Models(base, tiny_model("gpt2", vocabulary=VOCABULARY, hidden=8, seed=110))


@cache
def logits_of(model: PreTrainedModel, prompt: Text, length: int) -> dict[Text, np.ndarray]:
    return exact_law.prefix_logits(model, prompt, length, VOCABULARY)


def new_tokens(sequences: torch.Tensor, prompt_length: int, eos: int | None) -> list[Text]:
    texts = [tuple(row) for row in sequences[:, prompt_length:].tolist()]
    if eos is None:
        return texts
    return [text[: text.index(eos) + 1] if eos in text else text for text in texts]


def sample_stepwise(
    kad: KADLogitsProcessor, base: PreTrainedModel, setting: Setting, length: int, samples: int, seed: int
) -> list[Text]:
    torch.manual_seed(seed)
    arguments = setting.arguments(kad) | COMMON
    sequences = base.generate(torch.tensor([PROMPT]), max_new_tokens=length, num_return_sequences=samples, **arguments)
    return new_tokens(sequences, len(PROMPT), setting.eos)


@dataclass
class Drafted:
    """Texts sampled speculatively, and what became of the drafts, over all rounds."""

    texts: list[Text]
    drafted: int
    accepted: int
    accepted_in_full: int  # rounds that got a bonus token after a whole draft


def sample_speculative(
    kad: KADLogitsProcessor,
    base: PreTrainedModel,
    setting: Setting,
    length: int,
    samples: int,
    seed: int,
    rows: int = 1,
) -> Drafted:
    """Sample in calls of `rows` sequences each."""
    torch.manual_seed(seed)
    arguments = setting.arguments(kad) | COMMON | {"num_return_sequences": rows, "max_new_tokens": length}
    prompt = torch.tensor([PROMPT])
    result = Drafted([], 0, 0, 0)
    for _ in range(samples // rows):
        sequences = base.generate(prompt, assistant_model=kad.proxy, **arguments)
        result.texts += new_tokens(sequences, len(PROMPT), setting.eos)
        statistics = kad.statistics
        result.drafted += statistics.drafted
        result.accepted += statistics.accepted
        result.accepted_in_full += sum(statistics.acceptance_histogram[kad.num_assistant_tokens :])
    return result


def make_kad(
    chosen: Models, rule: Rule, setting: Setting, drafts: int | str = 5, **settings: Any
) -> KADLogitsProcessor:
    return KADLogitsProcessor(
        chosen.proxy,
        rule,
        reference=chosen.reference if rule.needs_reference else None,
        component_temperature=setting.component_temperature,
        num_assistant_tokens=drafts,
        **settings,
    )


def prompted(kad: KADLogitsProcessor, setting: Setting) -> Any:
    return kad.proxy_prompt(torch.tensor([setting.proxy_prompt or PROMPT]))


def part_of(texts: list[Text], positions: range) -> list[Text]:
    return [tuple(text[at] for at in positions) for text in texts]


def p_values_around_the_bonus(texts: list[Text], law: Law, drafts: int) -> list[float]:
    """Of the first two tokens, and of the last token drafted in the first round with the two that follow."""
    windows = [range(2), range(drafts - 1, drafts + 2)]
    return [exact_law.chi_square_p_value(part_of(texts, at), exact_law.marginal_law(law, at)) for at in windows]


@pytest.fixture(scope="module")
def judge() -> Iterator[Callable[[float], None]]:
    """Counts the p-values that can raise a false alarm."""
    yield from exact_law.counted_p_values(THRESHOLD, P_VALUES)


# Token by token

PACE = {"budget": 0.4, "threshold": 0.4, "step_size": 2.0, "smallest_threshold": 0.1, "largest_threshold": 0.9}
RULE_CASES: list[tuple[str, dict[str, Any], PlainRule | Paced]] = [
    ("dual", {"threshold": 0.4}, exact_law.dual(0.4)),
    ("primal", {"budget": 0.5}, exact_law.primal(0.5)),
    ("exact", {"budget": 0.6, "tolerance": 0.0}, exact_law.exact(0.6)),
    ("nudging", {"threshold": 0.6}, exact_law.nudging(0.6)),
    ("confidence_bet", {"margin": 0.4}, exact_law.confidence_bet(0.4)),
    ("cascade", {"variant": "diff", "alpha": 0.35}, exact_law.cascade("diff", 0.35)),
    ("cascade", {"variant": "opt", "alpha": 0.3}, exact_law.cascade("opt", 0.3)),
    ("cascade", {"variant": "token_v2", "alpha": 0.3}, exact_law.cascade("token_v2", 0.3)),
    ("cascade", {"variant": "token_v3", "alpha": 0.5}, exact_law.cascade("token_v3", 0.5)),
    ("paced", PACE, Paced(**PACE)),
    ("implicit_reward", {"beta": 0.7}, exact_law.implicit_reward(0.7)),
    ("ensemble", {"weight": 0.3}, exact_law.ensemble(0.3)),
    ("blend_in", {"threshold": 0.7}, exact_law.blend_in(0.7)),
]


def test_every_rule_has_a_case() -> None:
    assert {name for name, *_ in RULE_CASES} == set(RULES)


@pytest.mark.parametrize(
    ("name", "parameters", "plain"), RULE_CASES, ids=[c[1].get("variant", c[0]) for c in RULE_CASES]
)
def test_rules_token_by_token(
    judge: Callable[[float], None], name: str, parameters: dict[str, Any], plain: PlainRule
) -> None:
    setting, chosen = Setting(), models()
    kad = make_kad(chosen, make_rule(name, **parameters), setting)
    samples = STEPWISE_SAMPLES // 16 if name == "exact" else STEPWISE_SAMPLES  # its knapsacks are solved one by one
    texts = sample_stepwise(kad, chosen.base, setting, 3, samples, seed=11)
    law = setting.law(plain, chosen, 3)
    judge(exact_law.chi_square_p_value(texts, law))
    # The case says something only where the rule is neither of the two models.
    for other in (lambda p, q, _: p, lambda p, q, _: q):
        assert exact_law.chi_square_p_value(texts, setting.law(other, chosen, 3)) < THRESHOLD


def test_padded_batch_token_by_token(judge: Callable[[float], None]) -> None:
    """Prompts of different lengths in one batch, each repeated: rows keep their own proxy text and mask."""
    setting, chosen, short = Setting(), models(), (3, 2)
    kad = make_kad(chosen, make_rule("dual", **SPECULATIVE["dual"]), setting)
    prompts = torch.tensor([PROMPT, (0, 0, *short)])
    torch.manual_seed(2)
    arguments = setting.arguments(kad) | COMMON
    sequences = chosen.base.generate(
        prompts,
        attention_mask=(prompts != 0).long(),
        max_new_tokens=3,
        num_return_sequences=STEPWISE_SAMPLES // 2,
        **arguments,
    )
    texts = new_tokens(sequences, len(PROMPT), None)
    for prompt, rows in ((PROMPT, texts[: len(texts) // 2]), (short, texts[len(texts) // 2 :])):
        judge(exact_law.chi_square_p_value(rows, setting.law(exact_law.dual(0.4), chosen, 3, prompt)))


# Speculatively


def draft_and_compare(
    name: str, drafts: int, samples: int, kind: str = "plain", rows: int = 1
) -> tuple[Drafted, list[float]]:
    setting, chosen, length = Setting(), models(kind), drafts + 2
    kad = make_kad(chosen, make_rule(name, **SPECULATIVE[name]), setting, drafts)
    drafted = sample_speculative(kad, chosen.base, setting, length, samples, seed=drafts, rows=rows)
    return drafted, p_values_around_the_bonus(drafted.texts, setting.law(PLAIN[name], chosen, length), drafts)


def speculative_p_value(name: str, drafts: int, samples: int) -> float:
    """The smallest of those that test_speculative judges."""
    return min(draft_and_compare(name, drafts, samples, rows=100)[1])


SPECULATIVE_CASES = [
    *((name, drafts, 300, "plain", 1) for name, drafts in (("dual", 1), ("primal", 3), ("dual", 5))),
    *((name, drafts, 10_000, "plain", 1000) for name in SPECULATIVE for drafts in (1, 3, 5)),
    ("dual", 3, 300, "sliding", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "drafts", "samples", "kind", "rows"), SPECULATIVE_CASES)
def test_speculative(
    judge: Callable[[float], None], name: str, drafts: int, samples: int, kind: str, rows: int
) -> None:
    drafted, p_values = draft_and_compare(name, drafts, samples, kind, rows)
    # Residual and bonus had their say, each many times.
    assert drafted.accepted < 0.8 * drafted.drafted
    assert drafted.accepted_in_full > 0.4**drafts * samples
    for p_value in p_values:
        judge(p_value)


@pytest.mark.slow
@pytest.mark.parametrize("is_synchronous", [True, False])
def test_padded_batch_speculative(
    judge: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, is_synchronous: bool
) -> None:
    """Rows of different lengths that leave the batch at their end; and as on a device that must be waited for."""
    monkeypatch.setattr(KADCandidateGenerator, "is_synchronous", is_synchronous)
    for p_value in p_values_of_padded_batch(5000, drafts=2):
        judge(p_value)


def p_values_of_padded_batch(
    samples: int, rule: tuple[str, dict[str, Any], PlainRule | Paced] | None = None, **of_kad: Any
) -> list[float]:
    """Of so many texts of each of two prompts of different lengths, which end at an end of sequence."""
    setting, chosen, short = Setting(eos=3, component_temperature=1.2), models(), (3, 2)
    name, parameters, plain = rule or ("dual", SPECULATIVE["dual"], PLAIN["dual"])
    kad = make_kad(chosen, make_rule(name, **parameters), setting, **of_kad)
    prompts = torch.tensor([PROMPT, (0, 0, *short)])
    torch.manual_seed(4)
    arguments = setting.arguments(kad) | COMMON | {"pad_token_id": 0, "num_return_sequences": samples}
    sequences = chosen.base.generate(
        prompts, attention_mask=(prompts != 0).long(), assistant_model=kad.proxy, max_new_tokens=4, **arguments
    )
    texts = new_tokens(sequences, len(PROMPT), setting.eos)
    return [
        exact_law.chi_square_p_value(rows, setting.law(plain, chosen, 4, prompt))
        for prompt, rows in ((PROMPT, texts[:samples]), (short, texts[samples:]))
    ]


# Settings, on both paths

SETTINGS = {
    "component_temperature": Setting(component_temperature=0.7),
    "user_processors_and_warpers": Setting(bias=True, temperature=1.3, top_p=0.8),
    "suppressed": Setting(suppressed=(2,), component_temperature=1.2),
    "eos": Setting(eos=3),
    "eos_banned_at_first": Setting(eos=1, min_new_tokens=2),
    "proxy_prompt": Setting(proxy_prompt=(3, 3, 2, 1, 2)),
    "larger_proxy_vocabulary": Setting(),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_token_by_token(judge: Callable[[float], None], name: str) -> None:
    setting, chosen, length = SETTINGS[name], models(name), 4
    kad = make_kad(chosen, make_rule("primal", **SPECULATIVE["primal"]), setting)
    with prompted(kad, setting):
        texts = sample_stepwise(kad, chosen.base, setting, length, STEPWISE_SAMPLES, seed=5)
    law = setting.law(PLAIN["primal"], chosen, length)
    judge(exact_law.chi_square_p_value(texts, law))
    # Without the setting, the law is another one.
    if setting.eos is None or setting.min_new_tokens:
        without = Setting(eos=setting.eos).law(PLAIN["primal"], models(), length)
        assert exact_law.chi_square_p_value(texts, without) < THRESHOLD


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_speculative(judge: Callable[[float], None], name: str) -> None:
    setting, chosen, length, drafts = SETTINGS[name], models(name), 4, 2
    kad = make_kad(chosen, make_rule("dual", **SPECULATIVE["dual"]), setting, drafts)
    with prompted(kad, setting):
        drafted = sample_speculative(kad, chosen.base, setting, length, 1000, seed=6, rows=100)
    law = setting.law(PLAIN["dual"], chosen, length)
    if setting.eos is None:
        for p_value in p_values_around_the_bonus(drafted.texts, law, drafts):
            judge(p_value)
    else:
        judge(exact_law.chi_square_p_value(drafted.texts, law))


# A proxy that is the base

SAME = {"nudging": {"threshold": 0.6}, "ensemble": {"weight": 0.3}, "blend_in": {"threshold": 0.7}}


@pytest.mark.parametrize("name", SAME)
def test_own_proxy_changes_nothing(judge: Callable[[float], None], name: str) -> None:
    """Rules that swap or average whole distributions give r = p where q = p."""
    base = models().base
    setting, chosen = Setting(), Models(base, base)
    kad = make_kad(chosen, make_rule(name, **SAME[name]), setting)
    texts = sample_stepwise(kad, base, setting, 3, STEPWISE_SAMPLES, seed=7)
    judge(exact_law.chi_square_p_value(texts, setting.law(lambda p, q, _: p, chosen, 3)))


def test_own_proxy_sharpens_with_a_mask(judge: Callable[[float], None]) -> None:
    """A deferred token is drawn again, from p: the kept ones gain, r = (1 - d) p + D p."""
    base = models().base
    setting, chosen = Setting(), Models(base, base)
    kad = make_kad(chosen, make_rule("dual", **SPECULATIVE["dual"]), setting)
    texts = sample_stepwise(kad, base, setting, 3, STEPWISE_SAMPLES, seed=8)
    judge(exact_law.chi_square_p_value(texts, setting.law(PLAIN["dual"], chosen, 3)))
    assert exact_law.chi_square_p_value(texts, setting.law(lambda p, q, _: p, chosen, 3)) < THRESHOLD


@pytest.mark.slow
def test_own_proxy_speculative(judge: Callable[[float], None]) -> None:
    """r = q up to rounding: next to nothing is refused, and where it is, the residual is no distribution."""
    base, drafts = models().base, 2
    setting, chosen = Setting(), Models(base, base)
    kad = make_kad(chosen, make_rule("ensemble", weight=0.3), setting, drafts)
    drafted = sample_speculative(kad, base, setting, drafts + 2, 1000, seed=9, rows=100)
    assert drafted.accepted > 0.999 * drafted.drafted
    for p_value in p_values_around_the_bonus(
        drafted.texts, setting.law(lambda p, q, _: p, chosen, drafts + 2), drafts
    ):
        judge(p_value)


# The comparison of test_speculative refuses wrong code


@pytest.mark.slow
@pytest.mark.parametrize("drawn_from", ["mix(q, q)", "q flattened"])
def test_refuses_a_draft_from_another_distribution(monkeypatch: pytest.MonkeyPatch, drawn_from: str) -> None:
    """mix(q, q) is what a proxy drafts from when its own generate is given the KAD processor."""
    rule, draw = make_rule("dual", **SPECULATIVE["dual"]), KADCandidateGenerator._draw

    def mixed(self: KADCandidateGenerator, q: torch.Tensor) -> Any:
        return draw(self, rule(q, q))

    def flattened(self: KADCandidateGenerator, q: torch.Tensor) -> Any:
        return draw(self, q.sqrt())

    monkeypatch.setattr(KADCandidateGenerator, "_draw", mixed if drawn_from == "mix(q, q)" else flattened)
    assert speculative_p_value("dual", 1, 1000) < THRESHOLD


@pytest.mark.slow
def test_refuses_a_replacement_from_r(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refusal the token comes from r instead of the residual."""
    draw_next = speculative_round.draw_next

    def from_target(target: torch.Tensor, draft: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return draw_next(target, torch.zeros_like(draft), *args, **kwargs)

    monkeypatch.setattr(speculative_round, "draw_next", from_target)
    assert speculative_p_value("dual", 1, 500) < THRESHOLD


@pytest.mark.slow
def test_refuses_a_bonus_from_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    make_targets, compose = speculative_round.SpeculativeRound._make_targets, speculative_round.compose_positions
    is_bonus = False

    def noting_the_bonus(self: Any, begin: int, end: int) -> Any:
        nonlocal is_bonus
        is_bonus = begin >= self._draft_ids.shape[1]
        return make_targets(self, begin, end)

    def with_wrong_bonus(rule: Any, *logits: Any, **settings: Any) -> Any:
        return compose(Ensemble(0.0) if is_bonus else rule, *logits, **settings)

    monkeypatch.setattr(speculative_round.SpeculativeRound, "_make_targets", noting_the_bonus)
    monkeypatch.setattr(speculative_round, "compose_positions", with_wrong_bonus)
    assert speculative_p_value("dual", 1, 500) < THRESHOLD


@pytest.mark.slow
def test_refuses_rows_that_take_back_what_another_row_took_back(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = TextReader.accept
    monkeypatch.setattr(TextReader, "accept", lambda self, accepted: accept(self, [min(accepted)] * len(accepted)))
    assert speculative_p_value("dual", 1, 2000) < THRESHOLD


@pytest.mark.slow
def test_refuses_one_budget_for_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    defer = PrimalDeferral.defer

    def flattened(self: PrimalDeferral, p: torch.Tensor, q: torch.Tensor | None = None) -> torch.Tensor:
        return defer(self, p.reshape(1, -1)).reshape(p.shape)

    monkeypatch.setattr(PrimalDeferral, "defer", flattened)
    assert speculative_p_value("primal", 3, 300) < THRESHOLD


def test_refuses_a_proxy_one_token_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token: q of the position before."""
    logits = CachedModel.logits

    def behind(self: CachedModel, input_ids: torch.Tensor, mask: Any = None, **kwargs: Any) -> torch.Tensor:
        return logits(self, input_ids[:, :-1], mask, **kwargs)

    monkeypatch.setattr(CachedModel, "logits", behind)
    setting, chosen = Setting(), models()
    kad = make_kad(chosen, make_rule("dual", **SPECULATIVE["dual"]), setting)
    texts = sample_stepwise(kad, chosen.base, setting, 3, STEPWISE_SAMPLES, seed=1)
    assert exact_law.chi_square_p_value(texts, setting.law(PLAIN["dual"], chosen, 3)) < THRESHOLD
