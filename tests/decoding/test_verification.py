"""`verify` emits tokens that are distributed exactly as the target, for every rule.

How it is tested: the base and the proxy are Markov chains over a handful of tokens, so p, q and with them r depend
on the last token, and every law can be written down. Many drafts are verified at once; what a row emits is continued
by drawing from r until all rows are equally long; then the counts are compared with the exact law by chi-square
tests. Tests of the test plant the bugs that such a loop can have and demand that they are found.
"""

import functools
import re

import pytest
import reference
import torch
from scipy.stats import chi2

from transformers_kad import (
    RULES,
    BlendIn,
    CascadeDeferral,
    ConfidenceBetDeferral,
    DualDeferral,
    Ensemble,
    ExactDeferral,
    ImplicitReward,
    NudgingDeferral,
    PacedDeferral,
    PrimalDeferral,
    verify,
)
from transformers_kad.decoding import verification
from transformers_kad.rules import arithmetic

# The probability that a correct `verify` fails any comparison of this module, had the seeds not been fixed. By
# Bonferroni each comparison gets an equal part; `assert_same_law` counts that there are no more than planned.
FALSE_ALARM = 1e-6
COMPARISONS = 400
THRESHOLD = FALSE_ALARM / COMPARISONS
# Cells with a smaller expected count are pooled. The chi-square law is an approximation, and so far out in its tail
# it needs more than the usual 5.
SMALLEST_CELL = 25

SIZE = 4
START = 0  # the token before the first
ROWS = 100_000
TABLES = 386  # the seed of two chains on which every rule below is far from p and from q, from the first token on

CHAIN_RULES = [
    DualDeferral(0.3),
    PrimalDeferral(0.5),
    ExactDeferral(0.5),
    NudgingDeferral(0.55),
    ConfidenceBetDeferral(0.1),
    CascadeDeferral("diff", 0.05),
    CascadeDeferral("opt", 0.3),
    CascadeDeferral("token_v2", 0.2),
    CascadeDeferral("token_v3", 0.5),
    ImplicitReward(1.0),
    Ensemble(0.6),
    BlendIn(0.7),
]

compared = []


# --- The harness ----------------------------------------------------------------------------------------------


def chi_square_p_value(counts, probs):
    """The p-value of counts under a law, both flat; 0 where something impossible was seen."""
    counts, probs = counts.double().flatten(), probs.double().flatten()
    assert abs(float(probs.sum()) - 1) < 1e-6
    if counts[probs == 0].sum() > 0:
        return 0.0
    expected = probs * counts.sum()
    small = expected < SMALLEST_CELL
    cells = torch.stack([counts, expected])
    pooled = cells[:, small].sum(1, keepdim=True)
    cells = torch.cat([cells[:, ~small], pooled], dim=1) if pooled[1] >= SMALLEST_CELL else cells[:, ~small]
    if cells.shape[1] < 2:
        return 1.0
    statistic = ((cells[0] - cells[1]).square() / cells[1]).sum()
    return float(chi2.sf(float(statistic), cells.shape[1] - 1))


def conditional_p_values(states, tokens, table):
    """P-values of the tokens drawn in each state, where `table[state]` is their law."""
    counts = torch.bincount(states * SIZE + tokens, minlength=SIZE * SIZE).view(SIZE, SIZE)
    return {s: chi_square_p_value(counts[s], table[s]) for s in range(SIZE) if counts[s].sum() >= 100}


def draw(probs, generator):
    """One token a row, by inversion of the cumulated probabilities."""
    cumulated = probs.double().cumsum(-1)
    uniform = torch.rand(len(probs), 1, dtype=torch.float64, generator=generator)
    return (uniform * cumulated[:, -1:] >= cumulated[:, :-1]).sum(-1)


def draw_draft(table, rows, drafted, generator):
    """Drafts `(rows, drafted)` of a chain, and the token before each position, `(rows, drafted + 1)`."""
    before = torch.full((rows, drafted + 1), START)
    for i in range(drafted):
        before[:, i + 1] = draw(table[before[:, i]], generator)
    return before[:, 1:], before


def tables(rule, seed=TABLES):
    """p, q and r of every state, each `(SIZE, SIZE)`."""
    generator = torch.Generator().manual_seed(seed)
    p, q, q0 = ((1.2 * torch.randn(SIZE, SIZE, generator=generator)).softmax(-1) for _ in range(3))
    return p, q, rule(p, q, q0)


def p_values(rule, drafted, *, verify=verify, draft_table=None, targets=None, lengths=None, seed=1):
    """Verify drafts of the proxy's chain and compare all that comes out with its exact law.

    Args:
        verify: the function under test.
        draft_table: the chain that drafts are drawn from, if not the one that is reported to `verify`.
        targets: what makes the target of a whole window `(rows, drafted + 1, SIZE)` from p and q of its positions, if
            not the rule, position by position.
        lengths: draft lengths, `(ROWS,)`, all `drafted` by default.
    """
    p, q, r = tables(rule)
    generator = torch.Generator().manual_seed(seed)
    draft, before = draw_draft(q if draft_table is None else draft_table, ROWS, drafted, generator)
    target_probs = r[before] if targets is None else targets(p[before], q[before])
    accepted, following = verify(target_probs, q[before[:, :-1]], draft, lengths, generator=generator)
    full = torch.full((ROWS,), drafted) if lengths is None else lengths
    assert bool(((accepted >= 0) & (accepted <= full)).all())
    assert bool(((following >= 0) & (following < SIZE)).all())

    # What a row emits, continued by r to one token more than the longest draft.
    rows = torch.arange(ROWS)
    emitted = torch.cat([draft, following[:, None]], dim=1)
    emitted[rows, accepted] = following
    for i in range(1, drafted + 1):
        missing = accepted < i
        emitted[missing, i] = draw(r[emitted[missing, i - 1]], generator)
    last = before[rows, accepted]  # the token before the one that was drawn
    refused = accepted < full
    residual = torch.tensor([reference.residual(*both) for both in zip(r.tolist(), q.tolist(), strict=True)])

    found = {"the first two tokens": _joint(emitted[:, :2], r, START)}
    if drafted > 1:
        around = emitted[:, drafted - 1 :]
        law = reference.chain_law(r.tolist(), START, drafted - 1)
        reached = [sum(prob for tokens, prob in law.items() if tokens[-1] == s) for s in range(SIZE)]
        found["the two tokens around the bonus position"] = _joint(around, r, reached)
    if lengths is None:
        law = torch.tensor(reference.accepted_law(r.tolist(), q.tolist(), START, drafted))
        found["the number of accepted tokens"] = chi_square_p_value(
            torch.bincount(accepted, minlength=drafted + 1), law
        )
    for s, p_value in conditional_p_values(last[~refused], following[~refused], r).items():
        found[f"the bonus token after {s}"] = p_value
    for s, p_value in conditional_p_values(last[refused], following[refused], residual).items():
        found[f"the token in place of one refused after {s}"] = p_value
    return found


def _joint(pairs, r, start):
    """The p-value of two neighbouring tokens: the first is reached from a state, or from a law over states."""
    states = torch.zeros(SIZE, dtype=torch.float64)
    if isinstance(start, int):
        states[start] = 1
    else:
        states += torch.tensor(start, dtype=torch.float64)
    law = (states @ r.double())[:, None] * r.double()
    counts = torch.bincount(pairs[:, 0] * SIZE + pairs[:, 1], minlength=SIZE * SIZE)
    return chi_square_p_value(counts, law / law.sum())


def assert_same_law(found):
    compared.extend(found)
    assert len(compared) <= COMPARISONS, "more comparisons than the false-alarm probability was divided by"
    different = {name: p_value for name, p_value in found.items() if p_value < THRESHOLD}
    assert not different


# --- What is emitted ------------------------------------------------------------------------------------------


def test_every_rule_is_among_the_chains_and_differs_from_both_models_there():
    # r of a rule with a memory depends on more than the last token.
    assert {type(rule) for rule in CHAIN_RULES} == set(RULES.values()) - {PacedDeferral}
    for rule in CHAIN_RULES:
        p, q, r = (table.tolist() for table in tables(rule))
        assert max(map(reference.total_variation, r, p)) > 0.3, rule
        assert max(map(reference.total_variation, r, q)) > 0.3, rule
        assert reference.acceptance_probability(r[START], q[START]) < 0.7, rule


@pytest.mark.parametrize("drafted", [1, 3, 5])
@pytest.mark.parametrize("rule", CHAIN_RULES, ids=repr)
def test_tokens_are_distributed_as_the_target(rule, drafted):
    found = p_values(rule, drafted)
    assert len(found) >= 4
    assert_same_law(found)


@pytest.mark.parametrize("rule", [DualDeferral(0.3), PrimalDeferral(0.5), ImplicitReward(1.0)], ids=repr)
def test_rows_that_draft_fewer_tokens_are_distributed_as_the_target(rule):
    lengths = torch.arange(ROWS) % 4  # 0, 1, 2 or 3 of 3
    found = p_values(rule, 3, lengths=lengths)
    assert_same_law(found)


def test_without_a_draft_the_token_is_drawn_from_the_target():
    r = torch.tensor([0.1, 0.2, 0.3, 0.4])
    accepted, following = verify(
        r.expand(ROWS, 1, SIZE),
        torch.zeros(ROWS, 0, SIZE),
        torch.zeros(ROWS, 0, dtype=torch.int64),
        generator=torch.Generator().manual_seed(5),
    )
    assert accepted.tolist() == [0] * ROWS
    assert_same_law({"no draft": chi_square_p_value(torch.bincount(following, minlength=SIZE), r)})


def test_a_deterministic_draft_is_accepted_with_its_probability_and_else_replaced_by_the_rest():
    r = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    y = 2
    one_hot = torch.zeros(ROWS, 1, SIZE)
    one_hot[:, :, y] = 1
    accepted, following = verify(
        r.expand(ROWS, 2, SIZE), one_hot, torch.full((ROWS, 1), y), generator=torch.Generator().manual_seed(6)
    )
    rest = torch.tensor([0.1, 0.2, 0.0, 0.4]) / 0.7
    first = torch.where(accepted == 1, y, following)
    assert_same_law(
        {
            "accepted": chi_square_p_value(torch.bincount(accepted, minlength=2), torch.tensor([0.7, 0.3])),
            "refused": chi_square_p_value(torch.bincount(following[accepted == 0], minlength=SIZE), rest),
            "bonus": chi_square_p_value(torch.bincount(following[accepted == 1], minlength=SIZE), r[1]),
            "first": chi_square_p_value(torch.bincount(first, minlength=SIZE), r[0]),
        }
    )


def test_a_token_that_the_target_rules_out_is_never_emitted():
    r = torch.tensor([0.5, 0.0, 0.5, 0.0]).expand(ROWS, 3, SIZE)
    q = torch.tensor([0.1, 0.4, 0.1, 0.4]).expand(ROWS, 2, SIZE)
    generator = torch.Generator().manual_seed(7)
    draft = draw(q.reshape(-1, SIZE), generator).view(ROWS, 2)
    accepted, following = verify(r, q, draft, generator=generator)
    kept = draft[torch.arange(2) < accepted[:, None]]
    assert len(kept) > 1000
    assert set(kept.tolist()) == set(following.tolist()) == {0, 2}


def test_a_draft_token_that_the_draft_distribution_rules_out_is_refused_where_the_target_does_too():
    r, q = torch.tensor([[[0.5, 0.5, 0.0]] * 2] * 100), torch.tensor([[[0.5, 0.5, 0.0]]] * 100)
    accepted, following = verify(r, q, torch.full((100, 1), 2), generator=torch.Generator().manual_seed(0))
    assert accepted.tolist() == [0] * 100
    assert set(following.tolist()) == {0, 1}


# --- Drawing --------------------------------------------------------------------------------------------------


LAWS = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.97, 0.03, 0.0], [0.25, 0.0, 0.0, 0.75], [1e-3, 1e-2, 0.1, 0.889]])


@pytest.mark.parametrize("scale", [1.0, 0.037, 250.0])
@pytest.mark.parametrize("at_once", [2**18, 999])
def test_tokens_are_drawn_with_their_probabilities_also_where_these_do_not_sum_to_one(scale, at_once, monkeypatch):
    monkeypatch.setattr(arithmetic, "CONVERTED_AT_ONCE", at_once)
    states = torch.arange(ROWS) % len(LAWS)
    tokens = verification.draw(LAWS[states] * scale, torch.Generator().manual_seed(int(scale * 100) + at_once))
    assert tokens.shape == (ROWS,)
    assert tokens.dtype == torch.int64
    law = LAWS / LAWS.sum(-1, keepdim=True)
    assert_same_law({f"state {s}": p for s, p in conditional_p_values(states, tokens, law).items()})


def fixed_uniform(monkeypatch, value):
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **_: torch.full(shape, value, dtype=dtype))


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0**20, 2.0**-100])
@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.25 - 2**-54, 1), (0.25, 3), (0.5, 3), (1 - 2**-53, 3)])
def test_a_token_is_drawn_by_inversion(uniform, token, scale, monkeypatch):
    fixed_uniform(monkeypatch, uniform)
    assert verification.draw(torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]) * scale).tolist() == [token]


def test_the_edges_between_the_tokens_of_a_large_vocabulary_are_exact(monkeypatch):
    # Whole numbers of 2^-40 below 2^-16 are exact in float32, and their sums in float64; those of float32 are not.
    units = torch.randint(1, 2**24, (60_000,), generator=torch.Generator().manual_seed(0))
    units[0] = -units[1:].sum() % 2**17 + 2**17  # so that what is left for the last token is exact too
    p = torch.cat([units, 2**40 - units.sum()[None]]).double() / 2**40
    edges, tokens = p.cumsum(0)[:-1:300], torch.arange(60_000)[::300]
    rows = p.float().expand(len(tokens), -1)
    for uniform, expected in [(edges, tokens + 1), (edges - 2.0**-53, tokens)]:
        monkeypatch.setattr(torch, "rand", lambda *shape, uniform=uniform, **_: uniform.view(shape))
        assert torch.equal(verification.draw(rows), expected)


@pytest.mark.parametrize("uniform", [0.0, 2**-53, 1 - 2**-53])
def test_a_token_without_probability_is_not_drawn_by_the_outermost_numbers(uniform, monkeypatch):
    p = torch.rand(1000, 9, generator=torch.Generator().manual_seed(0))
    p[:, [0, 4, 8]] = 0.0
    fixed_uniform(monkeypatch, uniform)
    assert set(verification.draw(p).tolist()) == {1 if uniform < 0.5 else 7}


def test_uniform_numbers_are_of_float64(monkeypatch):
    asked = []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, **settings: asked.append(settings) or rand(*shape, **settings))
    generator = torch.Generator()
    verification.draw(LAWS, generator)
    assert [(settings["dtype"], settings["generator"]) for settings in asked] == [(torch.float64, generator)]


def test_a_row_without_a_distribution_gives_some_token_and_leaves_the_others_alone():
    p = torch.rand(8, 50, generator=torch.Generator().manual_seed(0))
    expected = verification.draw(p, torch.Generator().manual_seed(1))
    p[1], p[3], p[5, 7], p[6] = torch.nan, 0.0, torch.nan, torch.inf
    tokens = verification.draw(p, torch.Generator().manual_seed(1))
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < 50
    fine = [0, 2, 4, 7]
    assert tokens[fine].tolist() == expected[fine].tolist()


def test_a_draw_depends_on_its_generator_alone_and_not_on_the_parts_it_is_made_in(monkeypatch):
    p = torch.rand(30, 50, generator=torch.Generator().manual_seed(0))
    first = verification.draw(p, torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for at_once in (1, 120, 10_000):
        monkeypatch.setattr(arithmetic, "CONVERTED_AT_ONCE", at_once)
        assert torch.equal(verification.draw(p, torch.Generator().manual_seed(5)), first)
    assert not torch.equal(verification.draw(p, torch.Generator().manual_seed(6)), first)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    globally = verification.draw(p)
    torch.manual_seed(1)
    assert torch.equal(verification.draw(p), globally)
    assert verification.draw(p[:0]).tolist() == []


# --- Tests of the test: each planted bug must be found --------------------------------------------------------


def verify_with_refusals_from_the_target(target_probs, draft_probs, draft_ids, lengths=None, *, generator):
    accepted, following = verify(target_probs, draft_probs, draft_ids, lengths, generator=generator)
    again = draw(target_probs[torch.arange(len(accepted)), accepted], generator)
    return accepted, torch.where(accepted < draft_ids.shape[1], again, following)


def verify_with_the_bonus_from(draft_table, target_probs, draft_probs, draft_ids, lengths=None, *, generator):
    accepted, following = verify(target_probs, draft_probs, draft_ids, lengths, generator=generator)
    again = draw(draft_table[draft_ids[:, -1]], generator)
    return accepted, torch.where(accepted == draft_ids.shape[1], again, following)


def assert_found(found, *names):
    for name in names:
        assert min(p_value for key, p_value in found.items() if key.startswith(name)) < THRESHOLD, name


@pytest.mark.parametrize("drafted", [1, 3])
@pytest.mark.parametrize("drawn_from", ["mix(q, q)", "q flattened"])
def test_the_test_finds_drafts_that_are_not_drawn_from_what_is_reported(drafted, drawn_from):
    """mix(q, q) is what a proxy drafts from when its own generate is given the KAD processor."""
    rule = PrimalDeferral(0.5)
    _, q, _ = tables(rule)
    found = p_values(rule, drafted, draft_table=rule(q, q) if drawn_from == "mix(q, q)" else 0.6 * q + 0.4 / SIZE)
    assert_found(found, "the first two tokens", "the number of accepted tokens")


@pytest.mark.parametrize("drafted", [1, 3])
def test_the_test_finds_refusals_that_are_not_drawn_from_the_residual(drafted):
    found = p_values(PrimalDeferral(0.5), drafted, verify=verify_with_refusals_from_the_target)
    assert_found(found, "the first two tokens", "the token in place of one refused")


@pytest.mark.parametrize("drafted", [1, 3])
def test_the_test_finds_a_bonus_token_that_is_drawn_from_the_proxy(drafted):
    rule = PrimalDeferral(0.5)
    _, q, _ = tables(rule)
    found = p_values(rule, drafted, verify=functools.partial(verify_with_the_bonus_from, q))
    assert_found(found, "the first two" if drafted == 1 else "the two tokens around", "the bonus token")


@pytest.mark.parametrize("drafted", [1, 3])
def test_the_test_finds_one_knapsack_budget_shared_by_the_window(drafted):
    rule = PrimalDeferral(0.5)

    def one_knapsack(p, q):
        # The masses of the window's positions add up to drafted + 1: the budget is scaled, to be fair to the bug.
        window = p.flatten(1) / (drafted + 1)
        mask = rule.defer(window).view(p.shape)
        return p.masked_fill(mask, 0) + (p * mask).sum(-1, keepdim=True) * q

    found = p_values(rule, drafted, targets=one_knapsack)
    assert_found(found, "the first two tokens")


def test_the_test_finds_a_draft_length_that_is_ignored():
    def verify_all(target_probs, draft_probs, draft_ids, lengths, *, generator):
        return verify(target_probs, draft_probs, draft_ids, generator=generator)

    lengths = torch.arange(ROWS) % 4
    with pytest.raises(AssertionError):
        p_values(PrimalDeferral(0.5), 3, verify=verify_all, lengths=lengths)


def test_impossible_tokens_and_wrong_laws_have_no_p_value_to_speak_of():
    assert chi_square_p_value(torch.tensor([10**6, 1]), torch.tensor([1.0, 0.0])) == 0
    assert chi_square_p_value(torch.tensor([51_500, 48_500]), torch.tensor([0.5, 0.5])) < THRESHOLD
    assert chi_square_p_value(torch.tensor([50_100, 49_900]), torch.tensor([0.5, 0.5])) > 0.4


# --- Greedy ---------------------------------------------------------------------------------------------------


def test_greedy_accepts_while_the_draft_is_the_likeliest_token_and_then_takes_that():
    # The likeliest tokens of the four positions are 1, 3, 0, 2.
    r = torch.full((4, SIZE), 0.1)
    r[torch.arange(4), torch.tensor([1, 3, 0, 2])] = 0.7
    drafts = torch.tensor([[1, 3, 0], [1, 3, 2], [1, 0, 0], [2, 3, 0], [1, 2, 3]])
    q = torch.full((5, 3, SIZE), 0.25)
    accepted, following = verify(r.expand(5, 4, SIZE), q, drafts, do_sample=False)
    assert accepted.tolist() == [3, 2, 1, 0, 1]
    assert following.tolist() == [2, 0, 3, 1, 3]


def test_greedy_stops_where_a_row_has_drafted_no_more():
    r = torch.full((4, SIZE), 0.1)
    r[torch.arange(4), torch.tensor([1, 3, 0, 2])] = 0.7
    draft = torch.tensor([[1, 3, 0]]).expand(4, 3)
    q = torch.full((4, 3, SIZE), 0.25)
    accepted, following = verify(r.expand(4, 4, SIZE), q, draft, torch.tensor([0, 1, 2, 3]), do_sample=False)
    assert accepted.tolist() == [0, 1, 2, 3]
    assert following.tolist() == [1, 3, 0, 2]


def test_greedy_equals_token_by_token_whatever_is_drafted():
    _, q, r = tables(PrimalDeferral(0.5), seed=3)
    generator = torch.Generator().manual_seed(0)
    draft, before = draw_draft(q, 1000, 3, generator)
    accepted, following = verify(r[before], q[before[:, :-1]], draft, do_sample=False)
    assert set(accepted.tolist()) == {0, 1, 2, 3}
    for row in range(1000):
        last = START
        for token in [*draft[row, : accepted[row]].tolist(), int(following[row])]:
            assert token == int(r[last].argmax())
            last = token


# --- Rounding, reproducibility, shapes ------------------------------------------------------------------------


def nearly(q, how, generator):
    if how == "equal":
        return q.clone()
    if how == "one ulp":
        up = torch.rand(q.shape, generator=generator) < 0.5
        return torch.nextafter(q, torch.where(up, 2.0, 0.0))
    return (q + 1e-7 * torch.randn(q.shape, generator=generator)).clamp(min=0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["equal", "one ulp", "1e-7"])
def test_four_million_drafts_from_nearly_the_target_are_verified_without_failure(how):
    generator = torch.Generator().manual_seed(11)
    size, rows, refusals, total = 5, 500_000, 0, 0  # with all three ways 1.2 * 10^7 drafts
    for _ in range(4):
        q = (2 * torch.randn(rows, 2, size, generator=generator)).softmax(-1)
        q[::50] = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])  # as where only one token is allowed
        r = nearly(q, how, generator)
        draft = draw(q.view(-1, size), generator).view(rows, 2)
        accepted, following = verify(torch.cat([r, r[:, :1]], 1), q, draft, generator=generator)
        assert int(following.min()) >= 0
        assert int(following.max()) < size
        refusals += int((accepted < 2).sum())
        total += rows * 2
    assert total == 4_000_000
    # A draft is refused with probability TV(q, r) < 1e-6.
    assert refusals == 0 if how == "equal" else refusals < 100


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-7, 1e-6])
def test_a_refusal_where_the_residual_is_nothing_but_rounding_draws_from_the_target(scale):
    # Drafts of a token that q rules out are refused with certainty: only the residual is tested here.
    generator = torch.Generator().manual_seed(12)
    q = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).expand(ROWS, 1, 5)
    r = (q * (1 - scale)).clone()
    accepted, following = verify(r.expand(ROWS, 2, 5), q, torch.full((ROWS, 1), 4), generator=generator)
    assert accepted.tolist() == [0] * ROWS
    counts = torch.bincount(following, minlength=5)
    assert_same_law({"fallback": chi_square_p_value(counts, torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]))})


def test_a_generator_makes_it_reproducible_and_nothing_else_plays_a_part():
    _, q, r = tables(DualDeferral(0.3))
    draft, before = draw_draft(q, 1000, 3, torch.Generator().manual_seed(0))
    arguments = r[before], q[before[:, :-1]], draft
    torch.manual_seed(0)
    first = verify(*arguments, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    torch.manual_seed(99)
    second = verify(*arguments, generator=torch.Generator().manual_seed(1))
    other = verify(*arguments, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was left alone
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


def test_without_a_generator_the_global_seed_counts():
    _, q, r = tables(DualDeferral(0.3))
    draft, before = draw_draft(q, 1000, 3, torch.Generator().manual_seed(0))
    results = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        results.append(torch.stack(verify(r[before], q[before[:, :-1]], draft)).tolist())
    assert results[0] == results[1] != results[2]


def test_results_are_whole_numbers_a_row_and_the_inputs_stay_as_they_were():
    _, q, r = tables(DualDeferral(0.3))
    draft, before = draw_draft(q, 10, 3, torch.Generator().manual_seed(0))
    arguments = r[before], q[before[:, :-1]], draft, torch.tensor([3] * 10)
    copies = [tensor.clone() for tensor in arguments]
    for do_sample in (True, False):
        accepted, following = verify(*arguments, do_sample=do_sample)
        assert accepted.dtype == following.dtype == torch.int64
        assert accepted.shape == following.shape == (10,)
    assert all(torch.equal(*both) for both in zip(arguments, copies, strict=True))


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("filler", [0, 3, -1, 99])
def test_what_stands_behind_the_draft_length_is_ignored(do_sample, filler):
    _, q, r = tables(DualDeferral(0.3))
    draft, before = draw_draft(q, 500, 3, torch.Generator().manual_seed(0))
    lengths = torch.arange(500) % 4
    target_probs, draft_probs = r[before], q[before[:, :-1]]
    expected = verify(target_probs, draft_probs, draft, lengths, do_sample, generator=torch.Generator().manual_seed(1))
    behind = torch.arange(3) >= lengths[:, None]
    result = verify(
        target_probs.masked_fill(torch.arange(4).expand(500, 4).gt(lengths[:, None])[..., None], torch.nan),
        draft_probs.masked_fill(behind[..., None], torch.nan),
        draft.masked_fill(behind, filler),
        lengths,
        do_sample,
        generator=torch.Generator().manual_seed(1),
    )
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_probs": (2, 5, 7)},
        {"target_probs": (2, 2, 7)},
        {"target_probs": (3, 4, 7)},
        {"target_probs": (2, 4, 8)},
        {"target_probs": (4, 7)},
        {"draft_probs": (2, 3, 8)},
        {"draft_probs": (1, 3, 7)},
        {"draft_probs": (3, 7)},
        {"draft_ids": (2, 4)},
        {"draft_ids": (2, 2)},
        {"draft_ids": (1, 3)},
        {"draft_ids": (3,)},
        {"draft_lengths": (3,)},
        {"draft_lengths": (2, 1)},
        {"draft_lengths": ()},
    ],
)
def test_shapes_that_do_not_fit_are_refused_and_all_are_echoed(wrong):
    shapes = {"target_probs": (2, 4, 7), "draft_probs": (2, 3, 7), "draft_ids": (2, 3), "draft_lengths": (2,)} | wrong
    arguments = {
        name: torch.full(shape, 1 / 7) if name.endswith("probs") else torch.ones(shape, dtype=torch.int64)
        for name, shape in shapes.items()
    }
    said = ".*".join(rf"{name} {re.escape(str(shape))}" for name, shape in shapes.items())
    for do_sample in (True, False):
        with pytest.raises(ValueError, match=said):
            verify(**arguments, do_sample=do_sample)


def test_a_target_without_the_bonus_position_is_refused():
    with pytest.raises(ValueError, match=r"target_probs \(2, 3, 4\), draft_probs \(2, 3, 4\)"):
        verify(torch.rand(2, 3, 4), torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))
