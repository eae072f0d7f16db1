"""Texts that grow on the host, and are written to the device when they are asked for."""

import torch
from pretended_device import DEVICE, pretended_device

from transformers_kad.decoding.text_buffer import FIRST_ROOM, TextBuffer


def test_rows_grow_by_themselves_and_are_filled_up_to_the_longest():
    texts = TextBuffer(torch.tensor([[1, 2], [3, 4]]), padding=0)
    for row, token in ((0, 5), (1, 6), (0, 7)):
        texts.append(row, token)
    assert texts.lengths == [4, 3]
    assert texts.text(1).tolist() == [[3, 4, 6]]
    assert texts.all_texts().tolist() == [[1, 2, 5, 7], [3, 4, 6, 0]]
    texts.append(1, 8)
    assert texts.all_texts().tolist() == [[1, 2, 5, 7], [3, 4, 6, 8]]


def test_there_is_room_for_texts_of_any_length():
    texts, tokens = TextBuffer(torch.empty(1, 0, dtype=torch.long), padding=0), list(range(3 * FIRST_ROOM + 1))
    for token in tokens:
        texts.append(0, token)
        if token == FIRST_ROOM:
            assert texts.text(0)[0].tolist() == tokens[: FIRST_ROOM + 1]
    assert texts.text(0)[0].tolist() == tokens


def test_a_text_that_was_given_out_stays_as_it_was():
    texts = TextBuffer(torch.tensor([[1, 2]]), padding=0)
    before, all_before = texts.text(0), texts.all_texts()
    texts.append(0, 3)
    assert texts.text(0).tolist() == [[1, 2, 3]]
    assert before.tolist() == all_before.tolist() == [[1, 2]]


def test_all_new_tokens_are_written_in_one_copy_without_a_wait():
    with pretended_device() as waits:
        texts = TextBuffer(torch.tensor([[1, 2], [3, 4]]).to(DEVICE), padding=0)
        waits.places.clear()
        for token in (5, 6, 7):
            texts.append(0, token)
            texts.append(1, token)
        assert texts.text(0).device == DEVICE
        assert waits.count == 0
        assert texts.all_texts().tolist() == [[1, 2, 5, 6, 7], [3, 4, 5, 6, 7]]
