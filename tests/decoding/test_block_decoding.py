"""`generate` with verification="block" samples from r, and verifies blocks where it is meant to.

The laws are those of `test_distribution`: exact, of models with four tokens, compared by chi-square. A p-value below
THRESHOLD fails a test. P_VALUES of them are computed at most, so with correct code the module gives a false alarm with
a probability of at most FALSE_ALARM over the choice of the seeds, which are fixed.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import exact_law
import pytest
import reference
import torch
from exact_law import Text
from test_distribution import (
    COMMON,
    PLAIN,
    PROMPT,
    RULE_CASES,
    SPECULATIVE,
    Setting,
    make_kad,
    models,
    new_tokens,
    p_values_of_padded_batch,
    part_of,
)
from tiny_models import tiny_model
from transformers import LogitsProcessor

from transformers_kad import KADCandidateGenerator, KADLogitsProcessor
from transformers_kad.decoding import speculative_round, verification
from transformers_kad.decoding.draft_length import DraftLength
from transformers_kad.decoding.speculative_round import SpeculativeRound
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.rules.registry import make_rule

FALSE_ALARM = 1e-6
P_VALUES = 60
THRESHOLD = FALSE_ALARM / P_VALUES

JOINT = 3  # the first tokens, whose joint law is compared: those of one round or two


@pytest.fixture(scope="module")
def judge() -> Iterator[Callable[[float], None]]:
    """Counts the p-values that can raise a false alarm."""
    yield from exact_law.counted_p_values(THRESHOLD, P_VALUES)


def sample(
    kad: KADLogitsProcessor, base: Any, setting: Setting, length: int, samples: int, seed: int, rows: int = 1000
) -> list[Text]:
    """Texts of `length` tokens from speculative batches. The identities of the statistics are checked on the way."""
    torch.manual_seed(seed)
    arguments = setting.arguments(kad) | COMMON | {"num_return_sequences": rows, "max_new_tokens": length}
    texts = []
    for _ in range(samples // rows):
        ids = base.generate(torch.tensor([PROMPT]), assistant_model=kad.proxy, pad_token_id=0, **arguments)
        texts += new_tokens(ids, len(PROMPT), setting.eos)
        counts, histogram = kad.statistics, kad.statistics.acceptance_histogram
        assert sum(histogram) == counts.rounds
        assert sum(k * count for k, count in enumerate(histogram)) == counts.accepted
        assert counts.accepted <= counts.tokens <= counts.accepted + counts.rounds
        if CachedModel.needs_rows_in_step is not True:  # rounds that end together may end on draft tokens
            assert counts.tokens == counts.accepted + counts.rounds
    return texts


def p_value(
    name: str,
    drafts: int,
    samples: int,
    *,
    parameters: dict[str, Any] | None = None,
    plain: Any = None,
    setting: Setting | None = None,
    rows: int = 1000,
) -> float:
    """That of the first tokens of texts that one whole draft and more fit into."""
    setting, chosen = setting or Setting(), models()
    kad = make_kad(chosen, make_rule(name, **(parameters or SPECULATIVE[name])), setting, drafts, verification="block")
    texts = sample(kad, chosen.base, setting, max(drafts + 1, JOINT), samples, seed=drafts, rows=rows)
    law = setting.law(plain or PLAIN[name], chosen, JOINT)
    return exact_law.chi_square_p_value(part_of(texts, range(JOINT)), law)


# --- The distribution -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [1, 3, 5, 8])
@pytest.mark.parametrize(
    ("name", "parameters", "plain"), RULE_CASES, ids=[case[1].get("variant", case[0]) for case in RULE_CASES]
)
def test_every_rule(judge: Callable[[float], None], name: str, parameters: Any, plain: Any, drafts: int) -> None:
    samples = 200 if name == "exact" else 2000  # its knapsacks are solved one by one
    judge(p_value(name, drafts, samples, parameters=parameters, plain=plain, rows=200))


@pytest.mark.slow
@pytest.mark.parametrize("is_synchronous", [True, False])
def test_rows_that_end_and_leave_the_batch(
    judge: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, is_synchronous: bool
) -> None:
    """Drafts that end with an end of sequence, in a padded batch; and as on a device that must be waited for."""
    monkeypatch.setattr(KADCandidateGenerator, "is_synchronous", is_synchronous)
    for p_value in p_values_of_padded_batch(2000, drafts=3, verification="block"):
        judge(p_value)


@pytest.mark.slow
def test_rows_that_end_their_rounds_together(judge: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """With 20 rows nearly every row has accepted more than the shortest one."""
    monkeypatch.setattr(CachedModel, "needs_rows_in_step", True)
    judge(p_value("primal", 3, 2000, rows=20))


@pytest.mark.slow
def test_warpers_and_bans(judge: Callable[[float], None]) -> None:
    setting = Setting(suppressed=(2,), component_temperature=1.2, temperature=1.3, top_p=0.8)
    judge(p_value("dual", 3, 2000, setting=setting))


@pytest.mark.slow
def test_automatic_draft_lengths(judge: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    turn = itertools.cycle([0, 3, 1, 5, 2, 0, 4])
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows, in_step: next(turn))
    chosen, setting = models(), Setting()
    rule = make_rule("dual", **SPECULATIVE["dual"])
    kad = make_kad(chosen, rule, setting, drafts="auto", verification="block")
    texts = sample(kad, chosen.base, setting, 4, 2000, seed=3, rows=500)
    judge(exact_law.chi_square_p_value(texts, setting.law(PLAIN["dual"], chosen, 4)))


# The comparisons above refuse wrong code


@pytest.mark.slow
@pytest.mark.parametrize("function", ["residual_of", "chances_of_paths"])
def test_refuses(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """A residual without P; the chain of minima restarted at each position."""
    wrong = {
        "residual_of": lambda target, draft, path_chances: (target - draft).clamp(min=0),
        "chances_of_paths": lambda ratios: torch.cat([torch.ones_like(ratios[:, :1]), ratios.clamp(max=1)], dim=-1),
    }
    monkeypatch.setattr(verification, function, wrong[function])
    assert p_value("primal", 3, 2000) < THRESHOLD


@pytest.mark.slow
def test_refuses_a_replacement_in_every_row_that_ends_its_round_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CachedModel, "needs_rows_in_step", True)
    verify_positions = SpeculativeRound._verify_positions

    def cut(self: SpeculativeRound, begin: int, end: int) -> Any:
        decision = verify_positions(self, begin, end)
        return decision._replace(accepted=[min(decision.accepted)] * len(decision.accepted))

    monkeypatch.setattr(SpeculativeRound, "_verify_positions", cut)
    assert p_value("primal", 3, 2000, rows=20) < THRESHOLD


# --- Where blocks are verified ----------------------------------------------------------------------------------


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The verifications that were used."""
    names = set[str]()
    for verification_name, name in (("block", "accept_block"), ("token", "count_accepted")):
        original = getattr(speculative_round, name)

        def noting(*arguments: Any, note: str = verification_name, function: Any = original, **settings: Any) -> Any:
            names.add(note)
            return function(*arguments, **settings)

        monkeypatch.setattr(speculative_round, name, noting)
    return names


def decode(base: Any, kad: KADLogitsProcessor, before: list[LogitsProcessor] | None = None, **settings: Any) -> Any:
    torch.manual_seed(1)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 20, **settings}
    prompt = torch.tensor([[3, 14, 15, 9, 2, 6, 14, 15]])
    return base.generate(prompt, logits_processor=[*(before or []), kad], assistant_model=kad.proxy, **settings)


@pytest.mark.parametrize(
    ("settings", "arguments", "expected"),
    [
        ({}, {}, "block"),
        ({}, {"repetition_penalty": 1.2, "temperature": 0.8, "top_p": 0.9}, "block"),
        ({"num_assistant_tokens": "auto"}, {}, "block"),
        ({}, {"do_sample": False}, "token"),
        ({"drafter": "prompt_lookup"}, {}, "token"),
        ({}, {"before": "bias"}, "token"),
        ({"verification": "token"}, {}, "token"),
    ],
)
def test_blocks_are_verified_where_they_differ_and_are_known(
    base: Any, proxy: Any, used: set[str], settings: dict[str, Any], arguments: dict[str, Any], expected: str
) -> None:
    kad = KADLogitsProcessor(proxy, "dual", threshold=0.6, **{"verification": "block", **settings})
    if arguments.get("before") == "bias":

        class Unknown(LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                return scores

        arguments = {"before": [Unknown()]}
    decode(base, kad, **arguments)
    assert used == {expected}
    assert kad.statistics.tokens == 20


@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_texts_are_those_of_token_by_token(base: Any, proxy: Any, rows: int) -> None:
    kad = KADLogitsProcessor(proxy, "dual", threshold=0.6, verification="block")
    prompt = torch.tensor([[3, 14, 15, 9]]).repeat(rows, 1)
    greedy = {"logits_processor": [kad], "do_sample": False, "max_new_tokens": 20}
    assert torch.equal(base.generate(prompt, assistant_model=proxy, **greedy), base.generate(prompt, **greedy))


def test_two_runs_with_equal_seeds_are_equal_and_those_of_the_two_verifications_differ(base: Any, proxy: Any) -> None:
    results = []
    for value in ("block", "block", "token"):
        kad = KADLogitsProcessor(proxy, "dual", threshold=0.6, verification=value)
        results.append((decode(base, kad).tolist(), kad.statistics))
    assert results[0] == results[1] != results[2]


def test_more_tokens_are_accepted(base: Any) -> None:
    """Over 60 texts of 40 tokens: 2400 tokens, and a gain of several standard deviations."""
    rounds = {}
    for value in ("token", "block"):
        kad = KADLogitsProcessor(
            tiny_model(seed=2), "ensemble", weight=0.7, num_assistant_tokens=6, verification=value
        )
        decode(base, kad, num_return_sequences=60, max_new_tokens=40)
        rounds[value] = kad.statistics.rounds
    assert rounds["block"] < 0.98 * rounds["token"]


# --- The automatic draft length ---------------------------------------------------------------------------------


def test_the_chance_of_k_tokens_in_a_row_is_estimated_without_bias() -> None:
    """Over all texts y ~ r of a chain, what is added to the estimate of token verification is the gain, exactly."""
    generator = torch.Generator().manual_seed(0)
    r, q = ((torch.randn(3, 3, generator=generator)).double().softmax(-1).tolist() for _ in range(2))
    accepted = reference.block_accepted_law(r, q, 0, 5)
    by_tokens = reference.accepted_law(r, q, 0, 5)
    for k in range(1, 6):
        mean = gain = 0.0
        for text, prob in reference.chain_law(r, 0, k).items():
            steps = list(itertools.pairwise((0, *text)))
            chances = [reference.acceptance_probability(r[last], q[last]) for last, _ in steps]
            lengths = DraftLength()
            lengths.accepted(0, chances, [q[last][v] / r[last][v] for last, v in steps])
            window = lengths._windows[0][k - 1]
            assert len(lengths._windows[0]) == k
            assert lengths._in_a_row()[k - 1] == min(window.estimate, 1.0)
            mean += prob * window.by_block
            gain += prob * (window.estimate - math.prod(chances))
        assert mean == pytest.approx(sum(accepted[k:]), abs=1e-12)
        assert gain == pytest.approx(sum(accepted[k:]) - sum(by_tokens[k:]), abs=1e-12)
        assert gain == pytest.approx(0.0, abs=1e-12) if k == 1 else gain > 0.05 * sum(by_tokens[k:])


def test_windows_go_on_from_round_to_round_and_rows_are_kept_apart() -> None:
    together, apart = DraftLength(), DraftLength()
    chances, ratios = [0.9, 0.8, 0.7, 0.6, 0.5], [0.5, 3.0, 0.25, 1.5, 0.9]
    together.accepted(0, chances, ratios)
    apart.accepted(0, chances[:2], ratios[:2])
    apart.accepted(1, [0.3], [0.1])
    apart.accepted(0, chances[2:], ratios[2:])
    assert together._windows[0] == apart._windows[0]
    # Windows of the last 1, 2, ... tokens: the running minimum of the products from their beginning.
    assert [window.by_block for window in together._windows[0]] == pytest.approx(
        [0.9, 1.0, 0.25, 0.75, 0.375], abs=1e-12
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("is_synchronous", [True, False])
def test_what_is_noted_are_the_quotients_of_the_emitted_tokens(
    base: Any, monkeypatch: pytest.MonkeyPatch, rows: int, is_synchronous: bool
) -> None:
    monkeypatch.setattr(KADCandidateGenerator, "is_synchronous", is_synchronous)
    noted: dict[int, list[float]] = {row: [] for row in range(rows)}
    monkeypatch.setattr(DraftLength, "accepted", lambda self, row, chances, ratios: noted[row].extend(ratios))
    turn = itertools.cycle([3, 0, 5, 1])
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows, in_step: next(turn))
    kad = KADLogitsProcessor(
        tiny_model(seed=2), "dual", threshold=0.6, num_assistant_tokens="auto", verification="block", trace=True
    )
    decode(base, kad, num_return_sequences=rows, max_new_tokens=40)
    for row, records in enumerate(kad.trace.sequences):
        assert noted[row] == pytest.approx([record.proxy_prob / record.target_prob for record in records], rel=1e-4)
    assert 0 < kad.statistics.accepted < kad.statistics.drafted


def test_as_many_drafts_are_accepted_as_the_automatic_draft_length_expects(base: Any, monkeypatch: Any) -> None:
    """Drafts of 4 over 100 texts of 48 tokens; the chances of token verification are too small by up to 0.036."""
    monkeypatch.setattr("transformers_kad.decoding.draft_length.MEMORY", 1.0)
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows, in_step: 4)
    made = []
    init = DraftLength.__init__
    monkeypatch.setattr(DraftLength, "__init__", lambda self, *a, **k: made.append(self) or init(self, *a, **k))
    kad = KADLogitsProcessor(
        tiny_model(seed=2), "ensemble", weight=0.7, num_assistant_tokens="auto", verification="block"
    )
    decode(base, kad, num_return_sequences=100, max_new_tokens=48)
    histogram = kad.statistics.acceptance_histogram
    observed = [sum(histogram[k:]) / sum(histogram) for k in range(1, 5)]
    assert made[0]._in_a_row()[:4] == pytest.approx(observed, abs=0.015)
