"""What was read in a round, and how far each row goes back."""

import torch

from transformers_kad.models.reading_round import Round


def round_of(*forwards):
    """A round of forwards: the number of columns or a mask, and whether states were copied before."""
    made = Round()
    for columns, copied in forwards:
        mask = columns if torch.is_tensor(columns) else None
        ids = torch.zeros(2, columns) if mask is None else torch.zeros(mask.shape)
        made.add(ids, mask, object() if copied else None)
    return made


def test_the_last_tokens_of_each_row_are_taken_back():
    made = round_of((2, False), (torch.tensor([[0, 1], [1, 1]]), False))
    assert made.kept_columns([0, 0]).tolist() == [[True, True, False, True], [True] * 4]
    assert made.kept_columns([1, 3]).tolist() == [[True, True, False, False], [True, False, False, False]]
    assert made.kept_columns([3, 4]).tolist() == [[False] * 4] * 2


def test_nothing_was_read():
    assert round_of().kept_columns([0, 0]).shape == (2, 0)
    assert round_of().copies_before([0, 1]) == [0, None]


def test_tokens_behind_a_copy_are_counted_in_each_row():
    made = round_of((1, True), (torch.tensor([[0, 1], [1, 1]]), True), (1, True))
    assert [[made.tokens_behind(row, place) for place in range(4)] for row in range(2)] == [[3, 2, 1, 0], [4, 3, 1, 0]]


def test_the_last_copy_that_is_not_behind_what_is_taken_back():
    made = round_of((1, True), (3, True), (1, True))
    assert made.copies_before([0, 1]) == [3, 2]
    assert made.copies_before([2, 4]) == [1, 1]  # within the forward over three tokens
    assert made.copies_before([5, 6]) == [0, None]


def test_a_first_forward_without_a_copy_cannot_be_taken_back():
    made = round_of((2, False), (1, True))
    assert made.copies_before([1, 2]) == [0, None]


def test_longer_steps_are_noted():
    assert not round_of((1, True), (1, True)).has_longer_steps
    assert round_of((1, True), (2, True)).has_longer_steps


def test_a_column_that_some_rows_took_back_at_once():
    made = round_of((1, True), (1, True))
    made.without_last_column([1, 0])
    assert [made.tokens_behind(row, 0) for row in range(2)] == [1, 2]
    assert made.kept_columns([1, 1]).tolist() == [[False, False], [True, False]]
