"""Block verification, without models: tokens are distributed exactly as the target, for every rule.

Two kinds of tests on the chains of `test_verification`. By enumeration: all drafts of a length are put through
`block_chances` at once, and the law of what would be emitted is added up and compared with the target's; nothing is
drawn, so that nothing is left to chance. By sampling: `verify(..., verification="block")` runs over two rounds, and
the joint law of the first tokens is compared by chi-square. The tests at the end plant bugs, and demand that both
kinds of tests find them.
"""

import pytest
import reference
import torch
from test_verification import CHAIN_RULES, SIZE, START, chi_square_p_value, draw, tables

from transformers_kad import DualDeferral, Ensemble, PrimalDeferral, verify
from transformers_kad.decoding import verification
from transformers_kad.decoding.verification import accept_block, block_chances, count_accepted, draw_next

# The probability that correct code fails any comparison by sampling of this module, had the seeds not been fixed. By
# Bonferroni each comparison gets an equal part; `assert_same_law` counts that there are no more than planned.
FALSE_ALARM = 1e-6
COMPARISONS = 150
THRESHOLD = FALSE_ALARM / COMPARISONS

ROWS = 100_000
DRAFTS = [1, 3, 5, 8]
JOINT = 4  # number of first tokens whose joint law is compared

compared = []


def assert_same_law(found):
    compared.extend(found)
    assert len(compared) <= COMPARISONS, "more comparisons than the false-alarm probability was divided by"
    assert not {name: p_value for name, p_value in found.items() if p_value < THRESHOLD}


# --- By enumeration -------------------------------------------------------------------------------------------


def all_drafts(drafted, size=SIZE):
    """Every draft `(size ** drafted, drafted)`, and the token before each position, `(..., drafted + 1)`."""
    drafts = torch.cartesian_prod(*[torch.arange(size)] * drafted).view(-1, drafted)
    return drafts, torch.cat([torch.full((len(drafts), 1), START), drafts], dim=1)


def enumerated(q, r, drafted, lengths_of=None):
    """What one round does, over all drafts of a chain, in float64.

    Args:
        q: the draft's chain, `(SIZE, SIZE)`.
        r: the target's chain.
        drafted: γ.
        lengths_of: returns the draft lengths `(n,)` of drafts `(n, γ)`; all γ by default.

    Returns:
        The law of the accepted length, `(γ + 1,)`, and that of the first min(JOINT, γ + 1) tokens, a flat tensor.
    """
    drafts, before = all_drafts(drafted)
    target_probs, draft_probs = r[before], q[before[:, :-1]]
    lengths = torch.full((len(drafts),), drafted) if lengths_of is None else lengths_of(drafts)
    path, stop = verification.block_chances(target_probs[:, :drafted], draft_probs, drafts, lengths)
    stop = stop.double().masked_fill(torch.arange(1, drafted + 1) > lengths[:, None], 0.0)
    # P(the accepted length is i) = h_i Π_{j > i} (1 - h_j), with h_0 = 1.
    goes_on = (1 - stop).flip(-1).cumprod(-1).flip(-1)
    ends = torch.cat([torch.ones(len(drafts), 1), stop], 1) * torch.cat([goes_on, torch.ones(len(drafts), 1)], 1)
    under_q = draft_probs.double().gather(-1, drafts[..., None]).squeeze(-1).prod(-1)
    length = min(JOINT, drafted + 1)
    law = torch.zeros(SIZE**length, dtype=torch.float64)
    for count in range(drafted + 1):
        weights = under_q * ends[:, count]
        shown = drafts[:, :length] if count >= length else drafts[:, :count]
        codes = (shown * SIZE ** torch.arange(shown.shape[1]).flip(0)).sum(-1)
        if count >= length:
            law.index_add_(0, codes, weights)
            continue
        target, rest = target_probs[:, count].double(), target_probs[:, count].double()
        if count < drafted:
            residual = verification.residual_of(target_probs[:, count], draft_probs[:, count], path[:, count]).double()
            keeps = (count < lengths) & (residual.sum(-1) > verification.SMALLEST_RESIDUAL)
            rest = torch.where(keeps[:, None], residual / residual.sum(-1, keepdim=True), target)
        part = torch.zeros(SIZE**count, SIZE, dtype=torch.float64).index_add_(0, codes, weights[:, None] * rest)
        for _ in range(count + 1, length):
            part = part.reshape(-1, SIZE)[..., None] * r.double()
        law += part.flatten()
    return (under_q[:, None] * ends).sum(0), law


def law_of_chain(r, length):
    """The law of the first `length` tokens of a chain, a flat tensor."""
    law = r[START].double()
    for _ in range(length - 1):
        law = law.reshape(-1, SIZE)[..., None] * r.double()
    return law.flatten()


def up_to_the_first_three(drafts):
    """Draft lengths up to the first token 3, as where it ends a text."""
    return ((drafts == 3).cumsum(-1) == 0).sum(-1).add(1).clamp(max=drafts.shape[1])


LENGTHS = {"whole drafts": None, "up to a token": up_to_the_first_three}


def largest_error(drafted, lengths="whole drafts", rules=CHAIN_RULES):
    errors = []
    for rule in rules:
        _, q, r = tables(rule)
        _, law = enumerated(q, r, drafted, LENGTHS[lengths])
        errors.append(float((law - law_of_chain(r, min(JOINT, drafted + 1))).abs().max()))
    return max(errors)


ROUNDING = 1e-6  # of sums of a few numbers in float32


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("drafted", [1, 2, 3, 5])
def test_over_all_drafts_the_emitted_tokens_have_the_law_of_the_target(drafted, lengths):
    assert largest_error(drafted, lengths) < ROUNDING


@pytest.mark.parametrize("drafted", [1, 3, 5, 8])
def test_the_accepted_length_has_its_law_and_is_never_shorter_on_average(drafted):
    gains = []
    for rule in CHAIN_RULES:
        _, q, r = tables(rule)
        of_blocks, _ = enumerated(q, r, min(drafted, 5))
        expected = reference.block_accepted_law(r.tolist(), q.tolist(), START, min(drafted, 5))
        assert torch.allclose(of_blocks, torch.tensor(expected).double(), atol=ROUNDING), rule
        mean_of_blocks, mean_of_tokens = (
            sum(count * prob for count, prob in enumerate(law(r.tolist(), q.tolist(), START, drafted)))
            for law in (reference.block_accepted_law, reference.accepted_law)
        )
        gains.append(mean_of_blocks - mean_of_tokens)
    assert min(gains) > -1e-12
    assert max(map(abs, gains)) < 1e-12 if drafted == 1 else max(gains) > 0.05


def test_a_known_example_accepts_more():
    """Two tokens, q even, r = (1/3, 2/3): figures by hand, as in the motivating example of the paper."""
    r, q = torch.tensor([1 / 3, 2 / 3]).expand(4, 2, 2), torch.full((4, 2, 2), 0.5)
    drafts = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    path, stop = block_chances(r, q, drafts, torch.tensor([2] * 4))
    assert path.flatten().tolist() == pytest.approx([1, 2 / 3, 4 / 9, 1, 2 / 3, 8 / 9, 1, 1, 2 / 3, 1, 1, 1], abs=1e-6)
    # After a first 0: R_1 = (0, 2/3 * 2/3 - 1/2)_+ = 0, so that h_1 = 0. After a first 1: P_1 = 1, so that h_1 = 1.
    assert stop[:, 0].tolist() == [0, 0, 1, 1]
    assert stop[:, 1].tolist() == pytest.approx([4 / 9, 8 / 9, 2 / 3, 1], abs=1e-6)


# --- By sampling ----------------------------------------------------------------------------------------------


def p_values(rule, drafted, *, ragged=False, seed=1):
    """P-values of the accepted length, and of the first JOINT tokens, which two rounds and then r emit."""
    _, q, r = tables(rule)
    generator = torch.Generator().manual_seed(seed)
    rows, last = torch.arange(ROWS), torch.full((ROWS,), START)
    emitted, filled = torch.zeros(ROWS, 2 * (drafted + 1) + JOINT, dtype=torch.long), torch.zeros(ROWS).long()
    found = {}
    for round_ in range(2):
        before = last[:, None].repeat(1, drafted + 1)
        for i in range(drafted):
            before[:, i + 1] = draw(q[before[:, i]], generator)
        lengths = torch.randint(drafted + 1, (ROWS,), generator=generator) if ragged else None
        accepted, following = verify(
            r[before], q[before[:, :-1]], before[:, 1:], lengths, generator=generator, verification="block"
        )
        assert bool((accepted <= (drafted if lengths is None else lengths)).all())
        if round_ == 0 and not ragged:
            law = torch.tensor(reference.block_accepted_law(r.tolist(), q.tolist(), START, drafted))
            found["the accepted length"] = chi_square_p_value(torch.bincount(accepted, minlength=drafted + 1), law)
        for i in range(drafted + 1):
            token = torch.where(accepted == i, following, before[:, min(i + 1, drafted)])
            emitted[rows[i <= accepted], (filled + i)[i <= accepted]] = token[i <= accepted]
        filled += accepted + 1
        last = following
    for i in range(JOINT):
        missing = filled <= i
        emitted[missing, i] = draw(r[emitted[missing, i - 1]], generator)
    codes = (emitted[:, :JOINT] * SIZE ** torch.arange(JOINT).flip(0)).sum(-1)
    counts = torch.bincount(codes, minlength=SIZE**JOINT)
    return found | {"the first tokens": chi_square_p_value(counts, law_of_chain(r, JOINT))}


@pytest.mark.parametrize("drafted", DRAFTS)
@pytest.mark.parametrize("rule", CHAIN_RULES, ids=repr)
def test_tokens_are_distributed_as_the_target(rule, drafted):
    assert_same_law(p_values(rule, drafted))


@pytest.mark.parametrize("drafted", DRAFTS)
@pytest.mark.parametrize("rule", [DualDeferral(0.3), PrimalDeferral(0.5), Ensemble(0.6)], ids=repr)
def test_rows_that_draft_fewer_tokens_are_distributed_as_the_target(rule, drafted):
    assert_same_law(p_values(rule, drafted, ragged=True))


def test_a_deterministic_draft_is_accepted_as_in_token_verification():
    r = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    ids = torch.tensor([3, 0]).expand(ROWS, 2)
    one_hot = torch.nn.functional.one_hot(ids, SIZE).float()
    generator = torch.Generator().manual_seed(6)
    accepted, following = verify(r.expand(ROWS, 3, SIZE), one_hot, ids, generator=generator, verification="block")
    rest = torch.tensor([[0.1, 0.2, 0.3, 0.0], [0.0, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    found = {
        "accepted": chi_square_p_value(torch.bincount(accepted, minlength=3), torch.tensor([0.6, 0.12, 0.28])),
        **{
            f"after {count}": chi_square_p_value(
                torch.bincount(following[accepted == count], minlength=SIZE), rest[count] / rest[count].sum()
            )
            for count in range(3)
        },
    }
    assert_same_law(found)


# --- Units ----------------------------------------------------------------------------------------------------


def some_drafts(rows, drafted, size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    r = (1.5 * torch.randn(rows, drafted + 1, size, generator=generator)).softmax(-1)
    q = (1.5 * torch.randn(rows, drafted, size, generator=generator)).softmax(-1)
    return r, q, draw(q.view(-1, size), generator).view(rows, drafted)


def test_chances_are_those_of_the_formulas():
    r, q, ids = some_drafts(50, 4, size=7)
    path, stop = block_chances(r[:, :4], q, ids, torch.full((50,), 4))
    for row in range(50):
        chance = 1.0
        for i in range(4):
            if i:
                left = sum(max(0.0, chance * float(r[row, i, v]) - float(q[row, i, v])) for v in range(7))
                assert float(stop[row, i - 1]) == pytest.approx(
                    left / (left + 1 - chance) if chance < 1 else 1, abs=1e-5
                )
            assert float(path[row, i]) == pytest.approx(chance, abs=1e-5)
            chance = min(1.0, chance * float(r[row, i, ids[row, i]]) / float(q[row, i, ids[row, i]]))
        assert float(stop[row, 3]) == float(path[row, 4]) == pytest.approx(chance, abs=1e-5)


def test_rows_are_decided_each_by_its_own_draft_length():
    r, q, ids = some_drafts(40, 5)
    lengths = torch.arange(40) % 6
    path, stop = block_chances(r[:, :5], q, ids, lengths)
    for row, length in enumerate(lengths.tolist()):
        if length:
            alone = slice(row, row + 1)
            own = block_chances(r[alone, :length], q[alone, :length], ids[alone, :length], lengths[alone])
            assert torch.equal(path[alone, : length + 1], own[0])
            assert torch.equal(stop[alone, :length], own[1])
            assert stop[row, length - 1] == path[row, length]


def certain_uniform(monkeypatch, values):
    monkeypatch.setattr(
        torch, "rand", lambda shape, dtype, device, generator: torch.tensor(values, dtype=dtype).expand(shape)
    )


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, [0, 1, 2, 3]), (1 - 2**-53, [0, 0, 0, 0])])
def test_no_number_accepts_more_than_was_drafted_or_what_the_target_rules_out(monkeypatch, uniform, expected):
    q = torch.full((4, 3, 2), 0.5)
    lengths, ids = torch.tensor([0, 1, 2, 3]), torch.zeros(4, 3, dtype=torch.long)
    certain_uniform(monkeypatch, [uniform] * 3)
    assert accept_block(torch.tensor([0.25, 0.75]).expand(4, 3, 2), q, ids, lengths)[0].tolist() == expected
    accepted, path = accept_block(torch.tensor([0.0, 1.0]).expand(4, 3, 2), q, ids, lengths)
    assert accepted.tolist() == [0] * 4
    assert path.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("numbers", "expected"), [([0, 1, 1], 1), ([1, 0, 1], 2), ([0, 0, 1], 2), ([1, 1, 0], 3), ([1, 1, 1], 0)]
)
def test_the_largest_position_whose_number_is_small_enough_counts(monkeypatch, numbers, expected):
    # P_i = 1/2 for every i, and R_i = (0, 0.1): h = 0.1 / 0.6, 0.1 / 0.6, 0.5.
    r = torch.tensor([[[0.25, 0.75, 0], [0.5, 0, 0.5], [0.5, 0, 0.5]]])
    q = torch.tensor([[[0.5, 0.5, 0], [0.5, 0.35, 0.15], [0.5, 0.35, 0.15]]])
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert block_chances(r, q, ids, torch.tensor([3]))[1].flatten().tolist() == pytest.approx([1 / 6, 1 / 6, 0.5])
    with monkeypatch.context() as patched:
        certain_uniform(patched, [0.1 if number == 0 else 0.6 for number in numbers])
        accepted, path = accept_block(r, q, ids)
    assert (accepted.tolist(), path.tolist()) == ([expected], [0.5 if expected else 1.0])
    # The residual behind the accepted tokens, whose only token is 2; in front of all of them it is token 1.
    if expected < 3:
        assert draw_next(r, q, accepted, path_chances=path).tolist() == [2 if expected else 1]


def test_a_draft_from_the_target_itself_is_accepted_as_a_whole():
    """All residuals are zero there, so that h would be 0/0."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1000, 5, SIZE, generator=generator).softmax(-1)
    q[::10] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    ids = draw(q.view(-1, SIZE), generator).view(1000, 5)
    path, stop = block_chances(q, q, ids, torch.full((1000,), 5))
    assert path.unique().tolist() == stop.unique().tolist() == [1.0]


@pytest.mark.parametrize("size", [5, 30_000])
def test_where_target_and_draft_differ_by_rounding_next_to_nothing_is_refused(size):
    rows, drafted = 200_000 // size * 5 + 100, 4
    generator = torch.Generator().manual_seed(4)
    q = (2 * torch.randn(rows, drafted, size, generator=generator)).softmax(-1)
    r = torch.nextafter(q, torch.where(torch.rand(q.shape, generator=generator) < 0.5, 2.0, 0.0))
    ids = verification.draw(q.view(-1, size), generator).view(rows, drafted)
    accepted, path = accept_block(r, q, ids, generator=generator)
    assert int((accepted < drafted).sum()) <= 1  # with probability below 1e-6 a row
    assert bool((path > 1 - 1e-6).all())
    following = draw_next(r, q, torch.arange(rows) % drafted, path_chances=torch.ones(rows), generator=generator)
    assert int(following.min()) >= 0
    assert int(following.max()) < size


def test_over_all_drafts_from_nearly_the_target_the_law_is_the_targets():
    """h is made of rounding errors here, and still there is no bias above rounding."""
    _, q, _ = tables(DualDeferral(0.3))
    for seed in range(10):
        up = torch.rand(q.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        r = torch.nextafter(q, torch.where(up, 2.0, 0.0))
        _, law = enumerated(q, r, 4)
        assert float((law - law_of_chain(r, JOINT)).abs().max()) < 3e-7


def test_a_token_that_the_draft_rules_out_is_refused_where_the_target_does_too():
    r, q = torch.tensor([[[0.5, 0.5, 0.0]] * 3] * 100), torch.tensor([[[0.5, 0.5, 0.0]] * 2] * 100)
    accepted, following = verify(
        r, q, torch.full((100, 2), 2), generator=torch.Generator().manual_seed(0), verification="block"
    )
    assert accepted.tolist() == [0] * 100
    assert set(following.tolist()) == {0, 1}


@pytest.mark.parametrize("filler", [0, 3, -1, 99])
def test_what_stands_behind_the_draft_length_is_ignored(filler):
    r, q, ids = some_drafts(500, 3)
    lengths = torch.arange(500) % 4
    expected = verify(r, q, ids, lengths, generator=torch.Generator().manual_seed(1), verification="block")
    behind = torch.arange(3) >= lengths[:, None]
    result = verify(
        r.masked_fill(torch.arange(4).expand(500, 4).gt(lengths[:, None])[..., None], torch.nan),
        q.masked_fill(behind[..., None], torch.nan),
        ids.masked_fill(behind, filler),
        lengths,
        generator=torch.Generator().manual_seed(1),
        verification="block",
    )
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


def test_greedy_decoding_is_the_same_with_either_value():
    r, q, ids = some_drafts(300, 3)
    by_block = verify(r, q, ids, do_sample=False, verification="block")
    by_token = verify(r, q, ids, do_sample=False)
    assert all(torch.equal(*both) for both in zip(by_block, by_token, strict=True))


def test_a_generator_makes_it_reproducible_and_the_inputs_stay_as_they_were():
    r, q, ids = some_drafts(300, 3)
    copies = [tensor.clone() for tensor in (r, q, ids)]
    results = [
        torch.stack(verify(r, q, ids, generator=torch.Generator().manual_seed(seed), verification="block")).tolist()
        for seed in (1, 1, 2)
    ]
    assert results[0] == results[1] != results[2]
    assert all(torch.equal(*both) for both in zip((r, q, ids), copies, strict=True))


def test_nothing_is_drafted():
    r = torch.tensor([0.0, 0.0, 1.0]).expand(2, 1, 3)
    accepted, following = verify(r, torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.long), verification="block")
    assert (accepted.tolist(), following.tolist()) == ([0, 0], [2, 2])


def test_an_unknown_verification_and_shapes_that_do_not_fit_are_refused():
    r, q, ids = some_drafts(2, 3)
    with pytest.raises(ValueError, match=r"verification 'blok'. Did you mean 'block'\? Known: token, block"):
        verify(r, q, ids, verification="blok")
    with pytest.raises(ValueError, match=r"target_probs \(2, 3, 4\)"):
        verify(r[:, :3], q, ids, verification="block")


def test_the_bonus_position_may_be_missing_where_only_the_accepted_tokens_are_asked_for():
    r, q, ids = some_drafts(100, 3)
    with_bonus, without = (
        accept_block(target, q, ids, generator=torch.Generator().manual_seed(0)) for target in (r, r[:, :3])
    )
    assert all(torch.equal(*both) for both in zip(with_bonus, without, strict=True))


# --- Tests of the test: each planted bug must be found --------------------------------------------------------


def chain_restarted(ratios):
    return torch.cat([torch.ones_like(ratios[:, :1]), ratios.clamp(max=1)], dim=-1)


def minimum_at_the_end(ratios):
    return torch.cat([torch.ones_like(ratios[:, :1]), ratios.cumprod(-1).clamp(max=1)], dim=-1)


def residual_without_the_chance(target, draft, path_chances):
    return (target - draft).clamp(min=0)


def residual_of_the_target(target, draft, path_chances):
    return target if path_chances is None else path_chances[..., None] * target


def smallest_accepted(accepted):
    counts = torch.arange(1, accepted.shape[1] + 1)
    smallest = torch.where(accepted, counts, accepted.shape[1] + 1).amin(-1)
    return torch.where(accepted.any(-1), smallest, 0)


def stop_without_missing_mass(*arguments):
    path, stop = block_chances(*arguments)
    return path, torch.cat([torch.ones_like(stop[:, :-1]), stop[:, -1:]], dim=-1)


def stop_by_the_path_everywhere(*arguments):
    path, stop = block_chances(*arguments)
    return path, path[:, 1:].to(stop.dtype)


def lengths_ignored(target_probs, draft_probs, draft_ids, draft_lengths):
    return block_chances(target_probs, draft_probs, draft_ids, torch.full_like(draft_lengths, draft_ids.shape[1]))


def chance_of_the_whole_draft(*arguments):
    path, stop = block_chances(*arguments)
    return path[:, -1:].expand_as(path), stop


# The function in whose place the bug stands; with ragged drafts or not; and whether enumeration, which takes the
# functions below the draws alone, can see it.
BUGS = {
    "the residual without P": ("residual_of", residual_without_the_chance, False, True),
    "a token from r in place of the residual": ("residual_of", residual_of_the_target, False, True),
    "the chain of minima restarted at each position": ("chances_of_paths", chain_restarted, False, True),
    "the minimum taken at the end": ("chances_of_paths", minimum_at_the_end, False, True),
    "the smallest position in place of the largest": ("longest_accepted", smallest_accepted, False, False),
    "h without 1 - P": ("block_chances", stop_without_missing_mass, False, True),
    "h = P at every position": ("block_chances", stop_by_the_path_everywhere, False, True),
    "P of the whole draft in the residual": ("block_chances", chance_of_the_whole_draft, False, True),
    "h of the longest draft for shorter ones": ("block_chances", lengths_ignored, True, True),
}


@pytest.mark.parametrize("drafted", [3, 8])
@pytest.mark.parametrize("bug", BUGS)
def test_sampling_finds(monkeypatch, bug, drafted):
    name, wrong, ragged, _ = BUGS[bug]
    monkeypatch.setattr(verification, name, wrong)
    assert p_values(PrimalDeferral(0.5), drafted, ragged=ragged)["the first tokens"] < THRESHOLD


@pytest.mark.parametrize("bug", [bug for bug, (*_, seen) in BUGS.items() if seen])
def test_enumeration_finds(monkeypatch, bug):
    name, wrong, ragged, _ = BUGS[bug]
    monkeypatch.setattr(verification, name, wrong)
    lengths = "up to a token" if ragged else "whole drafts"
    assert largest_error(3, lengths, [PrimalDeferral(0.5)]) > 1000 * ROUNDING


@pytest.mark.parametrize("drafted", [3, 8])
def test_sampling_finds_one_number_for_all_positions(monkeypatch, drafted):
    rand = torch.rand

    def shared(shape, **settings):
        return rand((shape[0], 1), **settings).expand(shape)

    monkeypatch.setattr(
        verification.torch,
        "rand",
        lambda *shape, **settings: shared(*shape, **settings) if len(shape) == 1 else rand(*shape, **settings),
    )
    found = p_values(PrimalDeferral(0.5), drafted)
    assert min(found.values()) < THRESHOLD


@pytest.mark.parametrize("drafted", [3, 8])
def test_sampling_finds_that_tokens_were_verified_instead(monkeypatch, drafted):
    """That is exact as well, but accepts fewer tokens."""

    def by_token(target_probs, draft_probs, draft_ids, draft_lengths=None, generator=None):
        accepted = count_accepted(target_probs, draft_probs, draft_ids, draft_lengths, generator=generator)
        return accepted, torch.ones(len(accepted))

    monkeypatch.setattr(verification, "accept_block", by_token)
    found = p_values(PrimalDeferral(0.5), drafted)
    assert found["the accepted length"] < THRESHOLD <= found["the first tokens"]
