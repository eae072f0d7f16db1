"""How often the host waits for the device, on a device that is not there and counts it. See `pretended_device`."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_device import DEVICE, Waits, pretended_device
from test_other_tokenizer import TEXTS, make_kad
from test_vocabulary import TOKENIZERS
from tiny_families import tiny_family
from tiny_models import tiny_model
from transformers import (
    LogitsProcessor,
    MaxTimeCriteria,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
)

from transformers_kad import KADLogitsProcessor, align_vocabularies
from transformers_kad.decoding import candidate_generator
from transformers_kad.decoding.draft_length import Stopwatch
from transformers_kad.integrations.loading.models import load_model, load_tokenizer
from transformers_kad.models.model_errors import UnusableLogitsError
from transformers_kad.records.statistics import KADStatistics

DRAFT = 3
PROMPT = 6
OF_KAD = {"drafter", "trace", "rule", "budget", "verification", "compile"}


class OwnProcessor(LogitsProcessor):
    """One of the user's, which has to be called position by position."""

    def __call__(self, input_ids, scores):
        return scores


class OwnCriterion(StoppingCriteria):
    """One of the user's, which ends nothing."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def prompts(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(1, 1 + rows * PROMPT).view(rows, PROMPT)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, :row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def counted(
    base: PreTrainedModel, proxy: PreTrainedModel, rows: int, tokens: int, *, speculative: bool = True, **settings: Any
) -> tuple[torch.Tensor, KADStatistics, Waits]:
    """A greedy call on the device: its sequences and statistics, and the waits in it."""
    of_kad = {
        key: settings.pop(key)
        for key in ("drafter", "trace", "rule", "budget", "verification", "compile")
        if key in settings
    }
    before, after = settings.pop("before", []), settings.pop("after", [])
    base, proxy = copy.deepcopy(base), copy.deepcopy(proxy)
    with pretended_device() as waits:
        base.to(DEVICE)
        proxy.to(DEVICE)
        kad = KADLogitsProcessor(proxy, num_assistant_tokens=settings.pop("draft", DRAFT), **of_kad)
        inputs = {name: value.to(DEVICE) for name, value in prompts(rows).items()}
        waits.places.clear()
        call: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None} | settings
        call["logits_processor"] = [*before, kad, *after]
        if speculative:
            call["assistant_model"] = proxy
        ids = base.generate(**inputs, **call).cpu()
    assert kad.statistics is not None
    return ids, kad.statistics, waits


def growth(short: Waits, long: Waits) -> Counter[str]:
    """What the longer of two calls waited for more often, by the place."""
    more = Counter(long.places)
    more.subtract(short.places)
    return +more


def once_a_round(rounds: int, tokens: int) -> int:
    return rounds


def once_a_position(rounds: int, tokens: int) -> int:
    return (1 + DRAFT) * rounds


def once_a_token(rounds: int, tokens: int) -> int:
    return rounds + tokens


TARGETS = {
    # name: (rows, settings, the expected number of waits in some rounds, which emit some tokens of each row)
    "one text": (1, {}, once_a_round),
    "sampling": (1, {"do_sample": True, "top_k": 0}, once_a_round),
    "a padded batch": (4, {}, once_a_round),
    "a padded batch, sampled": (4, {"do_sample": True, "top_k": 0}, once_a_round),
    "primal": (4, {"rule": "primal", "budget": 0.8}, once_a_round),
    "a rule with a memory": (4, {"rule": "paced"}, once_a_round),
    "block verification": (4, {"verification": "block", "do_sample": True, "top_k": 0}, once_a_round),
    "drafts of lengths chosen in the call": (4, {"draft": "auto"}, once_a_round),
    "static caches": (1, {"compile": True}, once_a_round),
    "static caches of a batch": (4, {"compile": True}, once_a_round),
    "a trace": (2, {"trace": True}, once_a_round),
    "processors that run ahead": (
        2,
        {"before": [RepetitionPenaltyLogitsProcessor(1.1)], "after": [TemperatureLogitsWarper(0.7)]},
        once_a_round,
    ),
    # Every position of a draft is reached, since the base drafts for itself, and so is the one behind it.
    "a processor of the user's": (1, {"before": [OwnProcessor()]}, once_a_position),
    "the same in a batch": (4, {"after": [OwnProcessor()]}, once_a_position),
    "a criterion": (1, {"stopping_criteria": [MaxTimeCriteria(1e6)]}, once_a_token),
    "a criterion in a batch": (4, {"stopping_criteria": [MaxTimeCriteria(1e6)]}, once_a_token),
    "a criterion of the user's": (4, {"stopping_criteria": [OwnCriterion()]}, once_a_token),
    "prompt lookup": (1, {"drafter": "prompt_lookup"}, once_a_round),
    "prompt lookup of a batch": (4, {"drafter": "prompt_lookup"}, once_a_round),
    "token by token": (1, {"speculative": False}, lambda rounds, tokens: tokens),
    "token by token, a padded batch": (4, {"speculative": False}, lambda rounds, tokens: tokens),
    "token by token, a rule with a memory": (
        4,
        {"speculative": False, "rule": "paced"},
        lambda rounds, tokens: tokens,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.usefixtures("uncompiled")
def test_a_round_waits_for_the_device_once(name: str) -> None:
    """And once more for each token, where something of the user's has to be asked about each."""
    rows, settings, expected = TARGETS[name]
    base = tiny_model()
    calls = [counted(base, base, rows, tokens, **settings) for tokens in (12, 36)]
    (_, short, before), (_, long, after) = calls
    more = growth(before, after)
    rounds = long.base_forwards - short.base_forwards
    assert more.total() == expected(rounds, 24), more
    if settings.get("speculative", True) and not {"drafter", "do_sample", "draft"} & settings.keys():
        assert rounds == 24 // (1 + DRAFT)  # the base drafts for itself, so that all is accepted


@pytest.mark.parametrize("settings", [{}, {"drafter": "prompt_lookup"}], ids=["proxy", "prompt_lookup"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral", "gemma2", "gemma3_text", "olmo2"])
def test_refused_tokens_and_rows_that_leave_cost_no_waits(family: str, settings: dict[str, Any]) -> None:
    """Of rows that end by their own ends, in a batch of a base and a proxy that seldom agree."""
    base, proxy = tiny_family(family), tiny_family(family, seed=1)
    ids = base.generate(**prompts(4), do_sample=False, max_new_tokens=30, eos_token_id=None)
    assert len(ids) == 4
    lengths, waits = [], []
    for tokens in (8, 16):
        of_call = counted(base, proxy, 4, tokens, eos_token_id=None, pad_token_id=0, **settings)
        lengths.append(of_call[1].base_forwards)
        waits.append(of_call[2])
    more = growth(*waits)
    assert more.total() == lengths[1] - lengths[0] > 1, more


def test_the_text_on_a_device_is_that_of_the_cpu() -> None:
    """Whole drafts and their bonus position are run before anything is looked at, with the same result."""
    base, proxy = tiny_model(), tiny_model(seed=1)
    for rows in (1, 4):
        for settings in ({}, {"drafter": "prompt_lookup"}, {"speculative": False}, {"before": [OwnProcessor()]}):
            ids, _, _ = counted(base, proxy, rows, 20, **settings)
            of_kad = {key: value for key, value in settings.items() if key == "drafter"}
            kad = KADLogitsProcessor(proxy, num_assistant_tokens=DRAFT, **of_kad)
            expected = base.generate(
                **prompts(rows), do_sample=False, max_new_tokens=20, eos_token_id=None, logits_processor=[kad]
            )
            assert torch.equal(ids, expected)


def test_a_proxy_with_another_tokenizer_is_told_its_tokens_without_a_wait() -> None:
    folder = Path(__file__).resolve().parents[2] / "recipes" / "tiny_pair" / "base"
    tokenizer, calls = load_tokenizer(folder), []
    texts = tokenizer(TEXTS, return_tensors="pt", padding=True)
    alignment = align_vocabularies(tokenizer, TOKENIZERS["byte-level"], minimum_share=0.5)
    for tokens in (12, 36):
        base, kad = load_model(folder), make_kad(alignment)
        with pretended_device() as waits:
            base.to(DEVICE)
            kad.proxy.to(DEVICE)
            inputs = {name: value.to(DEVICE) for name, value in texts.items()}
            settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None}
            base.generate(**inputs, **settings, logits_processor=[kad], assistant_model=kad.proxy)
        calls.append((kad.statistics.base_forwards, waits))
    (short, before), (long, after) = calls
    assert growth(before, after).total() == long - short > 1


def test_steps_are_timed_only_where_the_times_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, each timed step takes two events."""
    timed: list[torch.device] = []

    def start(device: torch.device) -> Stopwatch:
        timed.append(device)
        return Stopwatch(device)

    monkeypatch.setattr(candidate_generator, "Stopwatch", start)
    base, proxy = tiny_model(), tiny_model(seed=1)
    for draft, expected in ((DRAFT, 0), ("auto", 1)):
        timed.clear()
        kad = KADLogitsProcessor(proxy, num_assistant_tokens=draft)
        base.generate(**prompts(1), do_sample=False, max_new_tokens=8, logits_processor=[kad], assistant_model=proxy)
        assert len(timed) == expected


@pytest.mark.parametrize("tokens", [3, 4, 9], ids=["never reached", "the last step", "in between"])
@pytest.mark.parametrize("role", ["base", "proxy"])
def test_logits_that_are_nan_on_a_device_are_an_error_of_their_own_position(role: str, tokens: int) -> None:
    """Also where they are looked at one step later, and where no step follows."""
    base, proxy = tiny_model(), tiny_model(seed=1)
    steps = 0

    def spoil(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            output.logits[1] = torch.nan

    {"base": base, "proxy": proxy}[role].register_forward_hook(spoil)
    if tokens == 3:
        counted(base, proxy, 2, tokens, speculative=False)
    else:
        with pytest.raises(UnusableLogitsError, match=f"of the {role} .*for position {PROMPT + 3} of sequence 1"):
            counted(base, proxy, 2, tokens, speculative=False)
