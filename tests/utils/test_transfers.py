"""Copies to a device for which nobody waits, and reading several tensors at once."""

import pytest
import torch
from pretended_device import DEVICE, pretended_device

from transformers_kad.utils.transfers import fetch, send


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3, 1], [3, 1]), ([[1], [2]], [[1], [2]]), ([], []), (torch.tensor([True, False]), [True, False])],
    ids=str,
)
def test_what_is_sent_arrives_without_a_wait(values, expected):
    with pretended_device() as waits:
        sent = send(values, DEVICE)
        assert sent.device == DEVICE
        assert waits.count == 0
        assert sent.tolist() == expected
    assert send(values, torch.device("cpu")).tolist() == expected
    assert sent.dtype == (values.dtype if torch.is_tensor(values) else torch.int64)


def test_several_tensors_are_read_in_one_copy_as_they_are():
    tensors = {
        "large": torch.tensor([[2**40 + 1], [-5]]),
        "flags": torch.tensor([True, False, True]),
        "shares": torch.tensor([[0.1, 1e-30], [torch.inf, -0.0]]),
        "one": torch.tensor(7),
        "none": torch.empty(2, 0),
    }
    expected = {name: tensor.tolist() for name, tensor in tensors.items()}
    assert fetch(tensors) == expected
    with pretended_device() as waits:
        on_device = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
        waits.places.clear()
        assert fetch(on_device) == expected
    assert waits.count == 1
