"""How the rows of a speculative call grow and end, with rounds that are written down here instead of decoded."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from transformers_kad.decoding.speculative_rows import Criteria, InStep, Output, Row, RowByRow
from transformers_kad.decoding.text_buffer import TextBuffer
from transformers_kad.records.recorders import BatchRecorder

END = 9


class NoteLengths(StoppingCriteria):
    """One of the user's, which ends nothing."""

    def __init__(self):
        self.shapes = []

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.append(tuple(input_ids.shape))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def make_rows(kind, criteria, count=2, **config):
    criteria = StoppingCriteriaList([MaxLengthCriteria(7), EosTokenCriteria(END), *criteria])
    rows = [Row(number, recorder) for number, recorder in enumerate(BatchRecorder(False).begin(count))]
    output = Output(0, GenerationConfig(**config), None)
    return kind(
        rows, TextBuffer(torch.tensor([[1, 2]] * count), 0), Criteria(criteria, frozenset({END}), count), output
    )


def texts_of(rows):
    return [rows.texts.text(row.number)[0].tolist() for row in rows.rows]


def test_rows_by_themselves_emit_all_their_tokens_up_to_an_end():
    rows = make_rows(RowByRow, [])
    going_on = rows.emit(SimpleNamespace(rows=[0, 1], in_step=False), {0: [3, END, 4], 1: [5, 6]})
    assert going_on == [1]
    assert texts_of(rows) == [[1, 2, 3, END], [1, 2, 5, 6]]
    assert [row.finished for row in rows.rows] == [True, False]
    assert rows.emit(SimpleNamespace(rows=[1], in_step=False), {0: [7, 7, 7, 7]}) == []  # the limit of 7 tokens
    assert texts_of(rows)[1] == [1, 2, 5, 6, 7, 7, 7]


def test_rows_that_end_a_round_together_emit_as_many_as_the_shortest():
    rows = make_rows(RowByRow, [], count=3)
    round_ = SimpleNamespace(rows=[0, 1, 2], in_step=True)
    assert rows.emit(round_, {0: [3, 4, 5], 1: [6, 7], 2: [8, 3, 4]}) == [0, 1, 2]
    assert texts_of(rows) == [[1, 2, 3, 4], [1, 2, 6, 7], [1, 2, 8, 3]]


def test_a_row_that_ends_does_not_hold_back_those_that_go_together():
    rows = make_rows(RowByRow, [], count=3)
    round_ = SimpleNamespace(rows=[0, 1, 2], in_step=True)
    assert rows.emit(round_, {0: [3, 4, 5], 1: [END], 2: [8, 3]}) == [0, 2]
    assert texts_of(rows) == [[1, 2, 3, 4], [1, 2, END], [1, 2, 8, 3]]
    assert [row.finished for row in rows.rows] == [False, True, False]


def test_rows_in_step_emit_as_many_as_the_shortest_and_padding_when_they_have_ended():
    note = NoteLengths()
    rows = make_rows(InStep, [note])
    assert rows.emit(SimpleNamespace(rows=[0, 1], in_step=False), {0: [3, 4, 5], 1: [6]}) == [0, 1]
    assert rows.texts.all_texts().tolist() == [[1, 2, 3], [1, 2, 6]]
    assert rows.emit(SimpleNamespace(rows=[0, 1], in_step=False), {0: [END], 1: [7]}) == [1]
    assert rows.emit(SimpleNamespace(rows=[1], in_step=False), {0: [8]}) == [0]
    assert rows.texts.all_texts().tolist() == [[1, 2, 3, END, 0], [1, 2, 6, 7, 8]]
    assert texts_of(rows) == [[1, 2, 3, END, 0], [1, 2, 6, 7, 8]]
    assert note.shapes == [(2, 3), (2, 4), (2, 5)]  # once a step, with all rows


@pytest.mark.parametrize(
    ("criteria", "rows", "step"), [([], 2, False), ([NoteLengths()], 2, True), ([NoteLengths()], 1, False)]
)
def test_criteria_of_the_users_need_the_rows_of_a_batch_in_step(criteria, rows, step):
    everything = StoppingCriteriaList([MaxLengthCriteria(7), *criteria])
    assert Criteria(everything, frozenset(), rows).need_step is step


def test_rows_of_different_lengths_are_filled_up_and_their_scores_say_so():
    config = {"return_dict_in_generate": True, "output_scores": True}
    rows = make_rows(RowByRow, [], **config)
    scores = torch.randn(2, 3, 10)
    round_ = SimpleNamespace(rows=[0, 1], in_step=False, scores=lambda place, at: scores[place, at])
    rows.emit(round_, {0: [3, END], 1: [5, 6, 7]})
    result = rows.output.finish(rows.rows, rows.texts.all_texts(), None)
    assert result.sequences.tolist() == [[1, 2, 3, END, 0], [1, 2, 5, 6, 7]]
    assert torch.equal(torch.stack(result.scores[:2], 1), scores[:, :2])
    assert torch.equal(result.scores[2][1], scores[1, 2])
    assert result.scores[2][0].tolist() == [0.0] + [-torch.inf] * 9  # all on the padding
    assert result.logits is None
