"""Peak memory: what a block took at once, whatever was taken before."""

import mmap

import pytest
import torch

from transformers_kad.recipes.benchmarking.memory import PeakMemory

MEBIBYTE = 2**20


def allocated(size):
    """A tensor of so many bytes, which may stay with the C library once it is freed."""
    torch.ones(size // 4)


def mapped(size):
    """So many bytes of memory that the system gets back at once."""
    with mmap.mmap(-1, size) as block:
        for _ in range(size // MEBIBYTE):
            block.write(bytes(MEBIBYTE))


def taken(sizes, take=allocated):
    """The peak of blocks of so many mebibytes, one after the other."""
    with PeakMemory(torch.device("cpu")) as memory:
        for size in sizes:
            take(size * MEBIBYTE)
    return memory.bytes


# The C library may keep a freed block beside a larger one that follows, so that both would count: blocks of different
# sizes are mapped.
@pytest.mark.skipif(taken([1]) is None, reason="this system does not say")
@pytest.mark.parametrize(
    ("sizes", "take"), [([64], allocated), ([64, 64], allocated), ([64, 64], mapped), ([8, 64, 8], mapped)]
)
def test_the_largest_counts_also_the_second_time(sizes, take):
    for _ in range(2):
        assert 60 * MEBIBYTE < taken(sizes, take) < 80 * MEBIBYTE


@pytest.mark.skipif(taken([1]) is None, reason="this system does not say")
def test_what_was_there_before_does_not_count():
    before = torch.ones(64 * MEBIBYTE // 4)
    assert taken([8]) < 16 * MEBIBYTE
    assert before[0] == 1


def test_where_it_cannot_be_had_it_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers_kad.recipes.benchmarking.memory._RESET", tmp_path / "no" / "such")
    assert taken([1]) is None
