"""One round, with distributions that are written down here: what is emitted, and where a fault is an error."""

import pytest
import torch
from transformers import EtaLogitsWarper

from transformers_kad import Ensemble
from transformers_kad.decoding.candidate_generator import Draft
from transformers_kad.decoding.open_call import OpenCall
from transformers_kad.decoding.proxy_models import ProxyModels
from transformers_kad.decoding.settings import DecodingSettings
from transformers_kad.decoding.speculative_round import RoundSettings, SpeculativeRound
from transformers_kad.decoding.text_buffer import TextBuffer
from transformers_kad.models.model_errors import UnusableLogitsError

VOCABULARY = 6


class NextLogits:
    """Stands for the drafter at the bonus position."""

    def __init__(self, logits):
        self.logits, self.calls = logits, 0

    def next_logits(self):
        self.calls += 1
        return self.logits


def certain(ids):
    """Logits `(B, n, V)` that leave no doubt about ids `(B, n)`."""
    return torch.nn.functional.one_hot(torch.tensor(ids), VOCABULARY).float() * 60


def make_round(
    base, proxy, drafted, wanted, *, processors=(), after=(), in_step=False, base_logits=None, by_block=False
):
    """A round of two rows whose r is the base's p, greedy, or by blocks from distributions that leave no doubt."""
    models = ProxyModels(proxy, None, without_adapter=False)
    verification = "block" if by_block else "token"
    decoding = DecodingSettings(Ensemble(1.0), verification=verification)
    call = OpenCall(decoding, models, lambda ids: (ids, None))
    settings = RoundSettings(base, call, processors, after, 2, do_sample=by_block, with_chances=True)
    assert settings.verification == verification
    logits = certain(drafted)
    draft = Draft(torch.tensor(drafted), logits.softmax(-1), torch.tensor([len(row) for row in drafted]), logits)
    base_logits = certain(wanted) if base_logits is None else base_logits
    texts = TextBuffer(torch.tensor([[1, 2], [3, 4]]), padding=0)
    texts.append(1, 5)
    return SpeculativeRound(settings, [0, 1], texts, draft, base_logits, None, in_step=in_step)


def run(round_, bonus=None, ends=()):
    """The tokens that each row emits; rows in `ends` are ended by the first tokens that they emit."""
    emitted = {0: [], 1: []}

    def emit(tokens):
        count = min(map(len, tokens.values())) if round_.in_step else None
        for row, own in tokens.items():
            emitted[row] += own[:count]
        return [row for row in tokens if row not in ends]

    generator = NextLogits(certain([[0], [0]])[:, 0] if bonus is None else bonus)
    round_.decide(generator, emit)
    return emitted, generator.calls


def test_a_row_emits_what_is_accepted_and_one_token_more(base, proxy):
    round_ = make_round(base, proxy, [[1, 2], [3, 4]], [[1, 2, 5], [3, 0, 0]])
    emitted, bonus_steps = run(round_)
    assert emitted == {0: [1, 2, 5], 1: [3, 0]}
    assert (round_.accepted, round_.lengths, bonus_steps) == ([2, 1], [2, 2], 1)
    assert [chances[:2] for chances in round_.chances] == [[1.0, 1.0], [1.0, 0.0]]


def test_the_bonus_step_is_saved_where_no_row_gets_there(base, proxy):
    emitted, bonus_steps = run(make_round(base, proxy, [[1, 2], [3, 4]], [[0, 2, 5], [3, 0, 0]]))
    assert (emitted, bonus_steps) == ({0: [0], 1: [3, 0]}, 0)


@pytest.mark.parametrize("by_block", [False, True])
def test_rows_in_step_end_where_the_first_of_them_ends(base, proxy, by_block):
    round_ = make_round(base, proxy, [[1, 2], [3, 4]], [[1, 2, 5], [3, 0, 0]], in_step=True, by_block=by_block)
    assert run(round_)[0] == {0: [1, 2], 1: [3, 0]}


# An `EtaLogitsWarper` raises where one row of scores is no distribution.
ETA = [EtaLogitsWarper(1e-4)]
PLACES = pytest.mark.parametrize("eta", [{}, {"processors": ETA}, {"after": ETA}], ids=["no eta", "before", "behind"])


@PLACES
@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_position_without_a_distribution_is_an_error_if_a_row_comes_there(base, proxy, at, by_block, eta):
    logits = certain([[1, 2, 5], [3, 0, 0]])
    logits[1, at] = torch.nan
    round_ = make_round(base, proxy, [[1, 2], [3, 4]], None, base_logits=logits, by_block=by_block, **eta)
    if at == 2:  # the draft was refused before
        assert run(round_)[0] == {0: [1, 2, 5], 1: [3, 0]}
    else:
        with pytest.raises(UnusableLogitsError, match=rf"base Llama.* for position {3 + at} of sequence 1"):
            run(round_)


@PLACES
@pytest.mark.parametrize("by_block", [False, True])
def test_a_fault_behind_the_end_of_a_text_is_none(base, proxy, by_block, eta):
    logits = certain([[1, 2, 5], [3, 4, 0]])
    logits[1, 1] = torch.nan
    round_ = make_round(base, proxy, [[1, 2], [3, 4]], None, base_logits=logits, by_block=by_block, **eta)
    assert run(round_, ends=(1,))[0] == {0: [1, 2, 5], 1: [3]}


def test_positions_and_scores_are_those_of_the_row(base, proxy):
    round_ = make_round(base, proxy, [[1, 2], [3, 4]], [[1, 2, 5], [3, 4, 0]])
    run(round_)
    p = certain([[1, 2, 5], [3, 4, 0]]).softmax(-1)
    for row in (0, 1):
        pieces = round_.positions(row, 3)
        assert torch.equal(torch.cat([piece.target_probs for piece in pieces]), p[row])
        assert torch.equal(torch.stack([round_.scores(row, at) for at in range(3)]), p[row].log())
        assert sum(len(piece.target_probs) for piece in round_.positions(row, 1)) == 1
