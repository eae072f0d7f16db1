"""`lazy=True`: the same law token by token, with the proxy asked only where a deferred token was drawn.

Two kinds of evidence. The distributions that tokens are drawn from are compared, position by position, with what both
models say of the finished text without caches. And generated texts are compared with their exact law by chi-square
(exact_law.py, test_distribution.py). A p-value below THRESHOLD fails a test; P_VALUES of them are computed at most,
so with correct code the module gives a false alarm with a probability of at most FALSE_ALARM = 1e-6 over the choice of
the seeds (Bonferroni, and as far as the chi-square approximation goes); the seeds are fixed. Planted bugs must fail.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import exact_law
import numpy as np
import pytest
import torch
from exact_law import Law, Paced, PlainRule, Text
from test_distribution import (
    COMMON,
    PACE,
    PROMPT,
    STEPWISE_SAMPLES,
    VOCABULARY,
    Setting,
    logits_of,
    models,
    new_tokens,
)
from test_logits_process import ProxyCalls, lora_proxy, pad_left
from test_vocabulary import TOKENIZERS
from tiny_models import tiny_model
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, WatermarkingConfig

from transformers_kad import (
    RULES,
    CascadeDeferral,
    DualDeferral,
    ExactDeferral,
    KADConfig,
    KADLogitsProcessor,
    NudgingDeferral,
    PrimalDeferral,
    align_vocabularies,
    kad_generate,
)
from transformers_kad.decoding import lazy
from transformers_kad.decoding.open_call import OpenCall
from transformers_kad.integrations.loading.models import load_model, load_tokenizer
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.records.recorders import StepRecorder
from transformers_kad.rules.base import DeferralRule, Rule
from transformers_kad.rules.registry import make_rule

FALSE_ALARM = 1e-6
P_VALUES = 30
THRESHOLD = FALSE_ALARM / P_VALUES

PAIR = Path(__file__).resolve().parents[2] / "recipes" / "tiny_pair"
LONG = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])
SHORT = torch.tensor([[40, 2, 2, 11, 30]])
SAMPLING = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}


def make_lazy(proxy: Any, rule: Rule | None = None, **settings: Any) -> KADLogitsProcessor:
    return KADLogitsProcessor(proxy, rule or DualDeferral(0.4), lazy=True, **settings)


@pytest.fixture(scope="module")
def judge() -> Iterator[Callable[[float], None]]:
    """Counts the p-values that can raise a false alarm."""
    yield from exact_law.counted_p_values(THRESHOLD, P_VALUES)


# What is drawn from


@dataclass
class Step:
    drawn: lazy.BaseDraw
    probs: list[torch.Tensor] = field(default_factory=list)  # p, and q where the proxy was asked


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every step of every call: the draw from the base, and the distributions that tokens were drawn from."""
    seen: list[Step] = []
    draw, draw_from_base = lazy.draw, lazy.draw_from_base
    probs: list[torch.Tensor] = []

    def record_draw(given: torch.Tensor) -> torch.Tensor:
        probs.append(given)
        return draw(given)

    def record_step(rule: DeferralRule, base_logits: torch.Tensor, state: Any) -> lazy.BaseDraw:
        nonlocal probs
        probs = []
        seen.append(Step(draw_from_base(rule, base_logits, state), probs))
        return seen[-1].drawn

    monkeypatch.setattr(lazy, "draw", record_draw)
    monkeypatch.setattr(lazy, "draw_from_base", record_step)
    return seen


def probs_without_cache(model: Any, text: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=text, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
    return (logits / temperature).softmax(-1)


def check_draws(steps: list[Step], base: Any, proxy: Any, ids: torch.Tensor, mask: torch.Tensor, **own: Any) -> None:
    """p and q of every step are those of the models without caches on the finished texts, and D fits the mask.

    `own`: `prompt` and `prompt_mask` of the proxy, the processor's `temperature`, `banned` ids.
    """
    begin, temperature = mask.shape[1], own.get("temperature", 1.0)
    missed = 0
    for at, step in enumerate(steps):
        text = ids[:, : begin + at]
        more = torch.ones(len(ids), at, dtype=torch.long)
        p = probs_without_cache(base, text, torch.cat([mask, more], -1), temperature)
        p[:, own.get("banned", [])] = 0
        torch.testing.assert_close(step.probs[0], p / p.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)
        missed += len(step.probs) == 1
        if len(step.probs) == 2:
            read = torch.cat([own.get("prompt", ids[:, :begin]), ids[:, begin : begin + at]], -1)
            read_mask = torch.cat([own.get("prompt_mask", mask), more], -1)
            q = probs_without_cache(proxy, read, read_mask, temperature)
            q[:, own.get("banned", [])] = 0
            torch.testing.assert_close(step.probs[1], q / q.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)
    assert 0 < missed < len(steps)  # the cache had to catch up


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gpt2", "lora"])
def test_one_text_is_drawn_from_p_and_q(base, steps, architecture):
    """Mistral's window of 8 is passed, also by what the cache has missed."""
    proxy = lora_proxy() if architecture == "lora" else tiny_model(architecture, seed=2)
    kad = make_lazy(proxy, DualDeferral(0.15))
    for seed in range(3):
        steps.clear()
        torch.manual_seed(seed)
        ids = base.generate(LONG, logits_processor=[kad], **(SAMPLING | {"max_new_tokens": 30}))
        check_draws(steps, base, proxy, ids, torch.ones_like(LONG))


@pytest.mark.parametrize("settings", [{}, {"num_return_sequences": 2}, {"prefill_chunk_size": 3}])
@pytest.mark.parametrize("own_prompts", [False, True])
def test_a_padded_batch_is_drawn_from_p_and_q(base, proxy, steps, settings, own_prompts):
    """Left padding of different lengths, bans, a temperature, prompts of the proxy's own: every row its own text."""
    kad = make_lazy(proxy, DualDeferral(0.1), component_temperature=0.8)
    banned = [4, 8, 20]
    ids, mask = pad_left([LONG, SHORT])
    own_ids, own_mask = pad_left([torch.tensor([[7, 7, 30]]), torch.tensor([[21, 4, 33, 12, 6, 2, 19]])])
    repeats = settings.get("num_return_sequences", 1)
    own = {"temperature": 0.8, "banned": banned}
    arguments = {"logits_processor": [kad], "suppress_tokens": banned, **SAMPLING, "max_new_tokens": 20, **settings}
    torch.manual_seed(1)
    if own_prompts:
        own |= {"prompt": own_ids.repeat_interleave(repeats, 0), "prompt_mask": own_mask.repeat_interleave(repeats, 0)}
        with kad.proxy_prompt({"input_ids": own_ids, "attention_mask": own_mask}):
            texts = base.generate(ids, attention_mask=mask, **arguments)
    else:
        texts = base.generate(ids, attention_mask=mask, **arguments)
    check_draws(steps, base, proxy, texts, mask.repeat_interleave(repeats, 0), **own)
    assert not set(texts[:, mask.shape[1] :].flatten().tolist()) & set(banned)


def test_a_proxy_with_another_tokenizer_is_drawn_from_its_own_spelling(steps):
    base, tokenizer = load_model(PAIR / "base"), load_tokenizer(PAIR / "base")
    alignment = align_vocabularies(tokenizer, TOKENIZERS["byte-level"], minimum_share=0.5)
    proxy = tiny_model(vocabulary=len(TOKENIZERS["byte-level"]), seed=3)
    kad = make_lazy(proxy, DualDeferral(0.3), vocabulary_alignment=alignment)
    texts = ["Mia has 12 apples. She buys", "So 3 + 4 = 7, and the old man", "There are 40 plums on"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    settings = SAMPLING | {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    ids = base.generate(**inputs, logits_processor=[kad], **settings)
    begin, asked, widths = inputs["input_ids"].shape[1], 0, set()
    for at, step in enumerate(steps):
        for row in range(len(ids) if len(step.probs) == 2 else 0):
            prompt = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].argmax() :]
            read = alignment.retokenize(prompt)[0]
            if at:
                spelled = alignment.spell(ids[row : row + 1, begin : begin + at])
                read = torch.cat([read, spelled[0]], -1)
                widths |= set(spelled[2])
            with torch.no_grad():
                q = alignment.to_base(proxy(read).logits[:, -1], step.probs[1].shape[-1]).softmax(-1)[0]
            torch.testing.assert_close(step.probs[1][row], q, atol=1e-5, rtol=1e-4)
        asked += len(step.probs) == 2
    assert 0 < asked < len(steps)
    assert max(widths) > 1


def test_what_the_proxy_missed_is_read_in_chunks(base, proxy):
    kad = make_lazy(proxy, DualDeferral(0.05))
    widest = {}
    for size in (None, 3):
        kad.reset()
        torch.manual_seed(3)
        with ProxyCalls(proxy) as shapes:
            base.generate(LONG, logits_processor=[kad], prefill_chunk_size=size, **(SAMPLING | {"max_new_tokens": 40}))
        widest[size] = max(columns for _, columns in shapes)
    assert widest[3] < LONG.shape[1] <= widest[None]


def test_a_chat_that_continues_and_a_call_that_shares_nothing(base, proxy, steps):
    kad = make_lazy(proxy, DualDeferral(0.15))
    torch.manual_seed(2)
    settings = {"logits_processor": [kad], **SAMPLING, "max_new_tokens": 30}
    first = base.generate(LONG, **settings)
    longer = torch.cat([first, SHORT], dim=1)
    for prompt in (longer, SHORT, SHORT.repeat(2, 1), SHORT, longer.flip(1).repeat(1, 2)):
        steps.clear()
        check_draws(steps, base, proxy, base.generate(prompt, **settings), torch.ones_like(prompt))


# The law of texts


def sample(kad: KADLogitsProcessor, setting: Setting, length: int, seed: int, samples: int) -> list[Text]:
    torch.manual_seed(seed)
    sequences = models().base.generate(
        torch.tensor([PROMPT]), max_new_tokens=length, num_return_sequences=samples, **setting.arguments(kad), **COMMON
    )
    return new_tokens(sequences, len(PROMPT), setting.eos)


RULE_CASES: list[tuple[str, dict[str, Any], PlainRule]] = [
    ("dual", {"threshold": 0.4}, exact_law.dual(0.4)),
    ("primal", {"budget": 0.5}, exact_law.primal(0.5)),
    ("exact", {"budget": 0.6, "tolerance": 0.0}, exact_law.exact(0.6)),
    ("nudging", {"threshold": 0.6}, exact_law.nudging(0.6)),
    ("paced", PACE, Paced(**PACE)),
]


def test_every_rule_that_needs_no_q_has_a_case():
    masks = {name for name, rule in RULES.items() if issubclass(rule, DeferralRule) and not rule.needs_proxy}
    assert {name for name, *_ in RULE_CASES} == masks


@pytest.mark.parametrize(("name", "parameters", "plain"), RULE_CASES, ids=[case[0] for case in RULE_CASES])
def test_rules(judge, name, parameters, plain):
    setting, chosen = Setting(), models()
    kad = make_lazy(chosen.proxy, make_rule(name, **parameters))
    samples = STEPWISE_SAMPLES // 16 if name == "exact" else STEPWISE_SAMPLES  # its knapsacks are solved one by one
    texts = sample(kad, setting, 3, 21, samples)
    judge(exact_law.chi_square_p_value(texts, setting.law(plain, chosen, 3)))
    # The case says something only where the rule is neither of the two models.
    for other in (lambda p, q, _: p, lambda p, q, _: q):
        assert exact_law.chi_square_p_value(texts, setting.law(other, chosen, 3)) < THRESHOLD


SETTINGS = {
    "component_temperature": Setting(component_temperature=0.7),
    "suppressed": Setting(suppressed=(2,), component_temperature=1.2),
    "eos": Setting(eos=3),
    "eos_banned_at_first": Setting(eos=1, min_new_tokens=2),
    "proxy_prompt": Setting(proxy_prompt=(3, 3, 2, 1, 2)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(judge, name):
    setting, chosen, length = SETTINGS[name], models(), 4
    kad = make_lazy(chosen.proxy, PrimalDeferral(0.5), component_temperature=setting.component_temperature)
    with kad.proxy_prompt(torch.tensor([setting.proxy_prompt or PROMPT])):
        texts = sample(kad, setting, length, 22, STEPWISE_SAMPLES)
    judge(exact_law.chi_square_p_value(texts, setting.law(exact_law.primal(0.5), chosen, length)))
    # Without the setting, the law is another one.
    if setting.eos is None or setting.min_new_tokens:
        without = Setting(eos=setting.eos).law(exact_law.primal(0.5), chosen, length)
        assert exact_law.chi_square_p_value(texts, without) < THRESHOLD


def test_a_padded_batch_with_ends_bans_and_a_temperature(judge):
    setting, chosen, short = Setting(component_temperature=0.8, suppressed=(2,), eos=3), models(), (3, 2)
    kad = make_lazy(chosen.proxy, DualDeferral(0.4), component_temperature=0.8)
    prompts = torch.tensor([PROMPT, (0, 0, *short)])
    torch.manual_seed(23)
    sequences = chosen.base.generate(
        prompts,
        attention_mask=(prompts != 0).long(),
        max_new_tokens=4,
        num_return_sequences=STEPWISE_SAMPLES // 2,
        **setting.arguments(kad),
        **COMMON,
    )
    texts = new_tokens(sequences, len(PROMPT), setting.eos)
    for prompt, rows in ((PROMPT, texts[: len(texts) // 2]), (short, texts[len(texts) // 2 :])):
        judge(exact_law.chi_square_p_value(rows, setting.law(exact_law.dual(0.4), chosen, 4, prompt)))


class Script(LogitsProcessor):
    """The first `length` generated tokens are fair draws among two each, which a threshold below 1/2 keeps."""

    def __init__(self, length: int = 3) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - len(PROMPT)
        if at >= self.length:
            return scores
        scores = torch.full_like(scores, -torch.inf)
        scores[:, [at, at + 1]] = 0
        return scores


def scripted_law() -> Law:
    chosen, script = models(), Script()
    base, proxy = (logits_of(model, PROMPT, script.length + 2) for model in (chosen.base, chosen.proxy))

    def step(prefix: Text) -> np.ndarray:
        if len(prefix) < script.length:
            return np.array([0.5 if v in (len(prefix), len(prefix) + 1) else 0.0 for v in range(VOCABULARY)])
        p, q = (exact_law.softmax(logits[prefix][:VOCABULARY]) for logits in (base, proxy))
        return exact_law.dual(0.4)(p, q, None)

    return exact_law.law_of_texts(step, script.length + 2)


def scripted_p_value(steps: list[Step] | None = None) -> float:
    """Of texts whose first three tokens no row defers: the proxy then reads all that it missed, in every row other."""
    chosen, script = models(), Script()
    kad = make_lazy(chosen.proxy, DualDeferral(0.4))
    torch.manual_seed(24)
    arguments = {"logits_processor": [script, kad], "max_new_tokens": script.length + 2, **COMMON}
    sequences = chosen.base.generate(torch.tensor([PROMPT]), num_return_sequences=STEPWISE_SAMPLES, **arguments)
    assert steps is None or [len(step.probs) for step in steps] == [1] * script.length + [2, 2]
    return exact_law.chi_square_p_value(new_tokens(sequences, len(PROMPT), None), scripted_law())


def test_a_proxy_that_missed_several_tokens(judge, steps):
    judge(scripted_p_value(steps))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dual", "primal"])
def test_one_text_a_call(judge, name):
    """Every text misses its own tokens, and begins with what is left of the last one's cache."""
    parameters, plain = next((case[1], case[2]) for case in RULE_CASES if case[0] == name)
    setting, chosen, length = Setting(), models(), 5
    kad = make_lazy(chosen.proxy, make_rule(name, **parameters))
    torch.manual_seed(25)
    texts, asked = [], 0
    for _ in range(800):
        arguments = setting.arguments(kad) | COMMON
        sequences = chosen.base.generate(torch.tensor([PROMPT]), max_new_tokens=length, **arguments)
        texts += new_tokens(sequences, len(PROMPT), None)
        asked += kad.statistics.proxy_forwards
    assert 0.2 < asked / (len(texts) * length) < 0.8
    law = setting.law(plain, chosen, length)
    for positions in (range(2), range(length - 2, length)):
        part = [tuple(text[at] for at in positions) for text in texts]
        judge(exact_law.chi_square_p_value(part, exact_law.marginal_law(law, positions)))


def test_by_hand_outside_generate(judge):
    """One position, drawn for many rows at once, by somebody else's loop."""
    chosen = models()
    kad = make_lazy(chosen.proxy, DualDeferral(0.4))
    text = torch.tensor([PROMPT]).repeat(STEPWISE_SAMPLES, 1)
    with torch.no_grad():
        scores = chosen.base(text[:1]).logits[:, -1].repeat(STEPWISE_SAMPLES, 1)
    torch.manual_seed(26)
    tokens = kad(text, scores).argmax(-1)
    law = Setting().law(exact_law.dual(0.4), chosen, 1)
    judge(exact_law.chi_square_p_value([(token,) for token in tokens.tolist()], law))
    assert kad.statistics is None


# The comparison refuses wrong code


def p_value_of(setting: Setting) -> float:
    chosen = models()
    kad = make_lazy(chosen.proxy, DualDeferral(0.4), component_temperature=setting.component_temperature)
    texts = sample(kad, setting, 3, 27, STEPWISE_SAMPLES)
    return exact_law.chi_square_p_value(texts, setting.law(exact_law.dual(0.4), chosen, 3))


def plant_keep_the_deferred(monkeypatch):
    monkeypatch.setattr(lazy, "draw_again", lambda drawn, base_logits, proxy_logits: drawn.tokens)


def plant_draw_the_kept_again(monkeypatch):
    monkeypatch.setattr(
        lazy, "draw_again", lambda drawn, base_logits, proxy_logits: lazy.draw(proxy_logits.softmax(-1))
    )


def plant_one_uniform_number_for_both_draws(monkeypatch):
    draw, state = lazy.draw, []

    def draw_alike(probs):
        if state:  # the second of a step
            after = torch.get_rng_state()
            torch.set_rng_state(state.pop())
            token = draw(probs)
            torch.set_rng_state(after)
            return token
        state.append(torch.get_rng_state())
        return draw(probs)

    monkeypatch.setattr(lazy, "draw", draw_alike)


def plant_the_proxy_one_token_behind(monkeypatch):
    logits = CachedModel.logits
    monkeypatch.setattr(
        CachedModel,
        "logits",
        lambda self, input_ids, attention_mask=None, **settings: logits(self, input_ids[:, :-1], None, **settings),
    )


def plant_the_base_in_the_proxys_place(monkeypatch):
    draw_again = lazy.draw_again
    monkeypatch.setattr(lazy, "draw_again", lambda drawn, base_logits, _: draw_again(drawn, base_logits, base_logits))


@pytest.mark.parametrize(
    "plant",
    [
        plant_keep_the_deferred,
        plant_draw_the_kept_again,
        plant_one_uniform_number_for_both_draws,
        plant_the_proxy_one_token_behind,
        plant_the_base_in_the_proxys_place,
    ],
)
def test_refuses(monkeypatch, plant):
    plant(monkeypatch)
    assert p_value_of(Setting()) < THRESHOLD


def test_refuses_a_q_that_was_not_tempered(monkeypatch):
    draw_again = lazy.draw_again
    monkeypatch.setattr(
        lazy,
        "draw_again",
        lambda drawn, base_logits, proxy_logits: draw_again(drawn, base_logits, 0.7 * proxy_logits),
    )
    assert p_value_of(Setting(component_temperature=0.7)) < THRESHOLD


def test_refuses_a_q_that_keeps_its_bans(monkeypatch):
    monkeypatch.setattr(
        lazy,
        "draw_again",
        lambda drawn, base_logits, proxy_logits: torch.where(
            drawn.deferred, lazy.draw(proxy_logits.softmax(-1)), drawn.tokens
        ),
    )
    assert p_value_of(Setting(suppressed=(3,))) < THRESHOLD


def test_refuses_bans_taken_from_q_without_renormalising(monkeypatch):
    """What was q's on banned tokens stays where it fell: with the base's own draw."""

    def not_renormalised(drawn, base_logits, proxy_logits):
        again = lazy.draw(proxy_logits.softmax(-1))
        allowed = base_logits.gather(-1, again[:, None]).squeeze(-1) > -torch.inf
        return torch.where(drawn.deferred & allowed, again, drawn.tokens)

    monkeypatch.setattr(lazy, "draw_again", not_renormalised)
    assert p_value_of(Setting(suppressed=(3,))) < THRESHOLD


@pytest.mark.parametrize("missed", ["left out", "read in another order", "masked"])
def test_refuses_a_cache_that_was_not_caught_up(monkeypatch, missed):
    logits = CachedModel.logits

    def behind(self, input_ids, attention_mask=None, **settings):
        held = self.cached_length or len(PROMPT)
        begun, skipped, newest = input_ids[:, :held], input_ids[:, held:-1], input_ids[:, -1:]
        if missed == "left out":
            input_ids = torch.cat([begun, newest], -1)
        elif missed == "masked":
            mask = [torch.full_like(part, keep) for part, keep in ((begun, 1), (skipped, 0), (newest, 1))]
            attention_mask = torch.cat(mask, -1)
        else:
            input_ids = torch.cat([begun, skipped.flip(-1), newest], -1)
        return logits(self, input_ids, attention_mask, **settings)

    monkeypatch.setattr(CachedModel, "logits", behind)
    assert scripted_p_value() < THRESHOLD


# How often the proxy is asked


def unfinished(ids: torch.Tensor, prompt_length: int, ends: set[int]) -> list[list[bool]]:
    """For each step, which rows had not ended before it."""
    generated = ids[:, prompt_length:].tolist()
    return [[not ends & set(row[:at]) for row in generated] for at in range(len(generated[0]))]


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_forwards_are_the_steps_in_which_a_row_that_goes_on_drew_a_deferred_token(base, proxy, steps, rows):
    kad = make_lazy(proxy, DualDeferral(0.1))
    ends = {7, 19, 33, 48}
    idle = 0  # steps in which nobody but finished rows drew a deferred token
    for seed in range(8):
        steps.clear()
        torch.manual_seed(seed)
        with ProxyCalls(proxy) as shapes:
            ids = base.generate(
                LONG.repeat(rows, 1),
                logits_processor=[kad],
                eos_token_id=sorted(ends),
                **(SAMPLING | {"max_new_tokens": 60}),
            )
        going_on = unfinished(ids, LONG.shape[1], ends)
        deferred = [step.drawn.deferred.tolist() for step in steps]
        asked = [any(d and u for d, u in zip(*row, strict=True)) for row in zip(deferred, going_on, strict=True)]
        assert len(shapes) == kad.statistics.proxy_forwards == sum(asked)
        assert kad.statistics.base_forwards == len(steps)
        idle += sum(any(row) and not ask for row, ask in zip(deferred, asked, strict=True))
        # Nothing is read twice, and nothing that came after the last question.
        read = max((at for at, ask in enumerate(asked) if ask), default=-1)
        assert seed > 0 or sum(columns for _, columns in shapes) == (LONG.shape[1] + read if read >= 0 else 0)
    assert idle > 0 or rows == 1


@pytest.mark.slow
@pytest.mark.parametrize("rule", [DualDeferral(0.3), PrimalDeferral(0.6), ExactDeferral(0.6), NudgingDeferral(0.3)])
def test_the_share_of_forwards_is_the_mean_deferral_mass(base, proxy, rule):
    """Question t is a coin that falls with probability D_t; six standard deviations are a false alarm of 2e-9."""
    kad = make_lazy(proxy, rule)
    torch.manual_seed(4)
    tokens, forwards, expected, variance = 0, 0, 0.0, 0.0
    for _ in range(3):
        base.generate(LONG, logits_processor=[kad], **(SAMPLING | {"max_new_tokens": 300}))
        statistics = kad.statistics
        (masses,) = (sequence.deferral_masses for sequence in statistics.sequences)
        tokens, forwards = tokens + statistics.tokens, forwards + statistics.proxy_forwards
        expected += sum(masses)
        variance += sum(mass * (1 - mass) for mass in masses)
        assert statistics.deferral_mass == pytest.approx(sum(masses) / 300)
    if isinstance(rule, NudgingDeferral):  # all or nothing: no chance is left
        assert forwards == pytest.approx(expected, abs=1e-3)
    else:
        assert abs(forwards - expected) <= 6 * math.sqrt(variance)
    assert 0.1 * tokens < forwards < 0.9 * tokens


def test_it_asks_no_more_often_than_without(base, proxy):
    forwards = {}
    for chosen in (False, True):
        kad = KADLogitsProcessor(proxy, DualDeferral(0.3), lazy=chosen)
        torch.manual_seed(5)
        with ProxyCalls(proxy) as shapes:
            base.generate(LONG, logits_processor=[kad], **(SAMPLING | {"max_new_tokens": 100}))
        assert kad.statistics.base_forwards == 100
        forwards[chosen] = len(shapes), sum(columns for _, columns in shapes)
    assert forwards[False] == (100, LONG.shape[1] + 99)
    assert forwards[True][0] < 70
    assert forwards[True][1] <= LONG.shape[1] + 99


def test_everything_deferred_asks_at_every_step_and_nothing_never(base, proxy):
    settings = SAMPLING | {"max_new_tokens": 20}
    kad = make_lazy(proxy, PrimalDeferral(1.0))
    base.generate(LONG, logits_processor=[kad], **settings)
    assert kad.statistics.proxy_forwards == 20
    assert kad.statistics.deferral_mass == pytest.approx(1.0)
    kad = make_lazy(proxy, PrimalDeferral(0.0))
    base.generate(LONG, logits_processor=[kad], **settings)
    assert kad.statistics.proxy_forwards == 0
    assert kad.statistics.deferral_mass == 0


class StopAt(StoppingCriteria):
    """Ends rows at tokens that are 1 modulo 3."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([int(row[-1]) % 3 == 1 for row in input_ids])


def test_rows_that_a_criterion_ended_ask_no_more(base, proxy, steps):
    kad = make_lazy(proxy, DualDeferral(0.1))
    idle = 0
    for seed in range(10):
        steps.clear()
        torch.manual_seed(seed)
        ids = base.generate(
            LONG.repeat(4, 1),
            logits_processor=[kad],
            stopping_criteria=[StopAt()],
            eos_token_id=49,
            suppress_tokens=[0, 49],  # 0 is the padding
            **(SAMPLING | {"max_new_tokens": 40}),
        )
        generated = ids[:, LONG.shape[1] :].tolist()
        lengths = [[*row, 0].index(0) for row in generated]
        assert [s.tokens for s in kad.statistics.sequences] == lengths
        deferred = [step.drawn.deferred.tolist() for step in steps]
        asked = [any(row[i] and at < lengths[i] for i in range(4)) for at, row in enumerate(deferred)]
        assert kad.statistics.proxy_forwards == sum(asked)
        idle += sum(any(row) and not ask for row, ask in zip(deferred, asked, strict=True))
    assert idle > 0


def test_without_an_end_of_sequence_rows_that_a_criterion_ended_go_on(base, proxy, steps):
    """As `generate` has it: without an end of sequence there is no padding, and the rows' texts are returned."""
    kad = make_lazy(proxy, DualDeferral(0.15))
    torch.manual_seed(6)
    ids = base.generate(
        LONG.repeat(2, 1), logits_processor=[kad], stopping_criteria=[StopAt()], **(SAMPLING | {"max_new_tokens": 40})
    )
    ended = [next(at for at, token in enumerate(row) if token % 3 == 1) for row in ids[:, LONG.shape[1] :].tolist()]
    assert min(ended) < max(ended) == ids.shape[1] - LONG.shape[1] - 1
    check_draws(steps, base, proxy, ids, torch.ones_like(LONG).repeat(2, 1))


# What comes out


def test_sliding_windows_do_not_grow_beyond_their_size(base):
    kad = make_lazy(tiny_model("mistral", seed=2), DualDeferral(0.15))  # a window of 8
    torch.manual_seed(13)
    base.generate(LONG, logits_processor=[kad], **(SAMPLING | {"max_new_tokens": 60}))
    assert all(layer.keys.shape[-2] < 8 for layer in kad.state.models.proxy._cache.layers)


def test_statistics_are_those_of_the_text(base, proxy):
    rule = PrimalDeferral(0.7)
    kad = make_lazy(proxy, rule)
    ids, mask = pad_left([LONG, SHORT])
    torch.manual_seed(7)
    settings = SAMPLING | {"max_new_tokens": 40, "eos_token_id": [9, 21, 30]}
    texts = base.generate(ids, attention_mask=mask, logits_processor=[kad], **settings)
    statistics, width = kad.statistics, ids.shape[1]
    rows = texts[:, width:].tolist()
    lengths = [next((at + 1 for at, token in enumerate(row) if token in (9, 21, 30)), len(row)) for row in rows]
    assert min(lengths) < max(lengths)
    assert [sequence.tokens for sequence in statistics.sequences] == lengths
    assert statistics.tokens == statistics.rounds == sum(lengths)
    assert statistics.base_forwards == max(lengths)
    assert (statistics.drafted, statistics.accepted, statistics.acceptance_rate) == (0, 0, None)
    for row, length in enumerate(lengths):
        expected = []
        for at in range(length):
            more = torch.cat([mask[row : row + 1], torch.ones(1, at, dtype=torch.long)], -1)
            p = probs_without_cache(base, texts[row : row + 1, : width + at], more)
            expected.append(float((p * rule.defer(p)).sum()))
        assert statistics.sequences[row].deferral_masses == pytest.approx(expected, abs=1e-4)
    assert kad.trace is None


def test_equal_seeds_give_equal_texts_and_statistics(base, proxy):
    kad = make_lazy(proxy, DualDeferral(0.3))
    outcomes = []
    for seed in (8, 8, 9):
        kad.reset()
        torch.manual_seed(seed)
        ids = base.generate(LONG.repeat(2, 1), logits_processor=[kad], **SAMPLING)
        outcomes.append((ids.tolist(), kad.statistics, torch.rand(1).item()))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] != outcomes[2][0]


def test_output_scores_are_forced_and_output_logits_the_bases(base, proxy):
    kad = make_lazy(proxy, DualDeferral(0.3))
    torch.manual_seed(10)
    output = base.generate(
        LONG.repeat(2, 1),
        logits_processor=[kad],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        renormalize_logits=True,  # harmless
        **SAMPLING,
    )
    width = LONG.shape[1]
    for at, (scores, logits) in enumerate(zip(output.scores, output.logits, strict=True)):
        expected = torch.full((2, 50), -torch.inf).scatter(1, output.sequences[:, width + at, None], 0.0)
        assert torch.equal(scores, expected)
        with torch.no_grad():
            own = base(output.sequences[:, : width + at]).logits[:, -1]
        torch.testing.assert_close(logits, own, atol=1e-4, rtol=1e-4)


def test_processors_before_kad_change_p(base, proxy, steps):
    class AtLeastTen(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.arange(10), -torch.inf)

    kad = make_lazy(proxy, DualDeferral(0.15))
    torch.manual_seed(11)
    ids = base.generate(LONG, logits_processor=[AtLeastTen(), kad], **(SAMPLING | {"max_new_tokens": 30}))
    check_draws(steps, base, proxy, ids, torch.ones_like(LONG), banned=list(range(10)))


def test_where_every_token_of_q_is_banned_q_is_p(proxy, steps):
    base = tiny_model(hidden=32, seed=1, vocabulary=60)
    kad = make_lazy(proxy, PrimalDeferral(1.0), component_temperature=0.5)
    torch.manual_seed(14)
    ids = base.generate(LONG, logits_processor=[kad], suppress_tokens=list(range(50)), **SAMPLING)
    assert int(ids[:, LONG.shape[1] :].min()) >= 50
    for step in steps:
        torch.testing.assert_close(step.probs[1], step.probs[0])


def test_unusable_logits_are_named(base):
    proxy = tiny_model(seed=2)
    kad = make_lazy(proxy, PrimalDeferral(1.0))
    with pytest.raises(ValueError, match="logits of the base for position 8 of sequence 1"):
        kad(LONG.repeat(2, 1), torch.stack([torch.zeros(50), torch.full((50,), torch.nan)]))
    with torch.no_grad():
        proxy.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"logits of the proxy Llama.* for position 8 of sequence 0"):
        base.generate(LONG, logits_processor=[kad], **SAMPLING)


def test_a_call_after_an_exception_half_way(base, proxy, steps):
    class Explode(LogitsProcessor):
        armed = True

        def __call__(self, input_ids, scores):
            if self.armed and input_ids.shape[1] == LONG.shape[1] + 9:
                raise InterruptedError("stopped half way")
            return scores

    kad, bomb = make_lazy(proxy, DualDeferral(0.15)), Explode()
    settings = {"logits_processor": [bomb, kad], **SAMPLING, "max_new_tokens": 30}
    torch.manual_seed(12)
    with pytest.raises(InterruptedError):
        base.generate(LONG, **settings)
    bomb.armed = False
    steps.clear()
    check_draws(steps, base, proxy, base.generate(LONG, **settings), torch.ones_like(LONG))


# Refusals


def test_settings_and_repr(proxy):
    assert "lazy" not in repr(KADLogitsProcessor(proxy))
    assert "lazy=True" in repr(make_lazy(proxy))
    config = KADConfig(rule="primal", parameters={"budget": 0.8})
    assert KADLogitsProcessor.from_config(proxy, config, lazy=True).lazy
    assert not KADLogitsProcessor.from_config(proxy, config).lazy


@pytest.mark.parametrize("name", [name for name in RULES if name not in {case[0] for case in RULE_CASES}])
def test_rules_that_look_at_q_are_refused(proxy, name):
    with pytest.raises(ValueError, match=rf"\(dual, primal, exact, nudging, paced\), got {RULES[name].__name__}\("):
        KADLogitsProcessor(proxy, name, lazy=True)


def test_a_rule_of_ones_own_is_served_by_what_it_declares(base, proxy):
    class Own(DeferralRule):
        def defer(self, base_probs, proxy_probs=None):
            assert proxy_probs is None
            return base_probs < 0.2

    kad = make_lazy(proxy, Own())
    base.generate(LONG, logits_processor=[kad], **SAMPLING)
    assert kad.statistics.tokens == 12
    Own.needs_proxy = True
    with pytest.raises(ValueError, match="does not depend on q"):
        make_lazy(proxy, Own())


def test_a_trace_is_refused(proxy):
    with pytest.raises(ValueError, match="`lazy=True` and `trace=True`"):
        make_lazy(proxy, trace=True)


def refused(base, message, kad, **arguments):
    """Before anything is run: the statistics and the random state stay."""
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        base.generate(LONG, **{"logits_processor": [kad], **SAMPLING, **arguments})
    assert torch.equal(torch.get_rng_state(), state)
    assert kad.statistics is None


WARPED = [
    ("temperature", 0.7, "1.0"),
    ("top_h", 0.4, "None"),
    ("top_k", 20, "0"),
    ("top_p", 0.9, "1.0"),
    ("min_p", 0.05, "None"),
    ("typical_p", 0.9, "1.0"),
    ("epsilon_cutoff", 3e-4, "0.0"),
    ("eta_cutoff", 3e-4, "0.0"),
]


@pytest.mark.parametrize("where", ["call", "generation_config", "model"])
@pytest.mark.parametrize(("name", "value", "off"), WARPED)
def test_warpers_are_refused_wherever_they_are_set(base, proxy, monkeypatch, name, value, off, where):
    message = rf"got {name}={value} .*pass {name}={off}"
    arguments = {key: setting for key, setting in SAMPLING.items() if key != name}
    kad = make_lazy(proxy)
    state = torch.get_rng_state()
    if where == "call":
        arguments[name] = value
    elif where == "generation_config":
        arguments = {"generation_config": GenerationConfig(**arguments, **{name: value})}
    else:
        monkeypatch.setattr(base.generation_config, name, value)
    with pytest.raises(ValueError, match=message):
        base.generate(LONG, logits_processor=[kad], **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    if where == "model":  # the way out that the message names
        arguments[name] = {"0": 0, "1.0": 1.0, "0.0": 0.0, "None": None}[off]
        base.generate(LONG, logits_processor=[kad], **arguments)
        assert kad.statistics.tokens == 12


def test_the_default_top_k_of_generate_is_refused(base, proxy):
    kad = make_lazy(proxy)
    settings = {"logits_processor": [kad], "do_sample": True, "max_new_tokens": 4}
    for arguments in (settings, {**settings, "generation_config": GenerationConfig(do_sample=True)}):
        with pytest.raises(ValueError, match=r"got top_k=50 .*generate's defaults: pass top_k=0"):
            base.generate(LONG, **arguments)
    for off in (0, None):
        base.generate(LONG, top_k=off, **settings)
        assert kad.statistics.tokens == 4
    config = GenerationConfig(do_sample=True, top_k=0, temperature=1.0, top_p=1.0, min_p=None, max_new_tokens=3)
    base.generate(LONG, logits_processor=[kad], generation_config=config)
    assert kad.statistics.tokens == 3


def decode(model, input_ids, logits_processor, **kwargs):
    return input_ids


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("got do_sample=False: pass do_sample=True", {"do_sample": False}),
        ("got do_sample=None: pass do_sample=True", {"do_sample": None}),
        ("got num_beams=3: pass num_beams=1", {"num_beams": 3}),
        ("got watermarking_config=.*pass watermarking_config=None", {"watermarking_config": WatermarkingConfig()}),
        ("leave out `assistant_model`", {"assistant_model": True}),
        ("leave out `assistant_model`", {"custom_generate": kad_generate}),
        ("got custom_generate=<function decode", {"custom_generate": decode}),
        ("got dola_layers='low'.*leave out `dola_layers`", {"dola_layers": "low"}),
        ("got use_mtp=True.*leave out `use_mtp`", {"use_mtp": True}),
    ],
)
def test_calls_are_refused(base, proxy, message, arguments):
    if arguments.get("assistant_model"):
        arguments = {"assistant_model": proxy}
    refused(base, message, make_lazy(proxy), **arguments)


def test_a_processor_behind_kad_is_refused(base, proxy):
    class Behind(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    kad = make_lazy(proxy)
    refused(base, r"got \[.*Behind object.*before KAD", kad, logits_processor=[kad, Behind()])
    base.generate(LONG, logits_processor=[Behind(), kad], **SAMPLING)
    assert kad.statistics.tokens == 12


def test_a_processor_without_lazy_takes_all_of_these(base, proxy):
    kad = KADLogitsProcessor(proxy, CascadeDeferral())
    base.generate(LONG, logits_processor=[kad], do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=4)
    assert kad.statistics.proxy_forwards == 4


def test_a_token_that_was_not_drawn_raises(base, proxy):
    """Whatever put it there: the text is no draw from r."""
    kad = make_lazy(proxy)
    with torch.no_grad():
        scores = base(LONG).logits[:, -1]
    for replaced in (False, True):
        call = OpenCall(kad.settings, kad.state.models, lambda ids: (ids, None), StepRecorder(False), LONG.shape[1])
        kad.state.open(call)
        step = lazy.LazyStep(call)
        token = step(LONG, scores).argmax(-1, keepdim=True)
        other = (token + 1).clamp(max=49).where(token < 49, 1)
        if replaced:
            with pytest.raises(RuntimeError, match="drew another token at position 8 of sequence 0"):
                step(torch.cat([LONG, other], 1), scores)
        else:
            step(torch.cat([LONG, token], 1), scores)
        kad.state.close(call)
