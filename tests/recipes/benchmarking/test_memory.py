"""Peak memory: what a block took at once, whatever was taken before."""

import pytest
import torch

from transformers_kad.recipes.benchmarking.memory import PeakMemory

MEBIBYTE = 2**20


def taken(sizes):
    """The peak of tensors of so many mebibytes, one after the other."""
    with PeakMemory(torch.device("cpu")) as memory:
        for size in sizes:
            torch.ones(size * MEBIBYTE // 4)
    return memory.bytes


@pytest.mark.skipif(taken([1]) is None, reason="this system does not say")
@pytest.mark.parametrize("sizes", [[64], [64, 64], [8, 64, 8]])
def test_the_largest_counts_also_the_second_time(sizes):
    for _ in range(2):
        assert 60 * MEBIBYTE < taken(sizes) < 80 * MEBIBYTE


@pytest.mark.skipif(taken([1]) is None, reason="this system does not say")
def test_what_was_there_before_does_not_count():
    before = torch.ones(64 * MEBIBYTE // 4)
    assert taken([8]) < 16 * MEBIBYTE
    assert before[0] == 1


def test_where_it_cannot_be_had_it_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers_kad.recipes.benchmarking.memory._RESET", tmp_path / "no" / "such")
    assert taken([1]) is None
