"""Sums in float64, in parts and as a whole, and what is looked up on the CPU alone."""

import pytest
import torch
from rule_cases import UNIT, random_rows, whole_units

from transformers_kad.rules import arithmetic
from transformers_kad.rules.arithmetic import (
    may_be_any,
    replace_rows,
    split_for_float64,
    sum_in_float64,
    zero_outside,
)


@pytest.mark.parametrize("at_once", [1, 999, 1000, 2500, 2**18])
def test_sums_are_those_of_float64_whatever_the_parts(at_once, monkeypatch):
    monkeypatch.setattr(arithmetic, "CONVERTED_AT_ONCE", at_once)
    units = torch.stack([whole_units(1000, 3 * 2**30 + i, seed=i) for i in range(6)]).view(2, 3, 1000)
    sums = sum_in_float64(units * UNIT)
    assert sums.dtype == torch.float64
    assert torch.equal(sums, units.sum(-1).double() * UNIT)


@pytest.mark.parametrize(("at_once", "rows"), [(1, 1), (1999, 1), (2000, 2), (4999, 4), (5000, 5)])
def test_rows_are_split_so_that_a_part_is_small_and_never_empty(at_once, rows, monkeypatch):
    monkeypatch.setattr(arithmetic, "CONVERTED_AT_ONCE", at_once)
    probs = random_rows(5, 1000, seed=1)
    parts = split_for_float64(probs)
    assert max(map(len, parts)) == rows
    assert torch.equal(torch.cat(parts), probs)
    assert len(split_for_float64(torch.empty(5, 1000, device="meta"))) == 1


def test_no_rows_have_no_sums():
    assert sum_in_float64(torch.zeros(0, 7)).shape == (0,)
    assert sum_in_float64(torch.zeros(2, 0, 7)).shape == (2, 0)


def test_zeros_are_put_outside_the_mask():
    probs, mask = random_rows(4, 9, seed=1), random_rows(4, 9, seed=2) > 0.1
    assert torch.equal(zero_outside(mask, probs), probs.where(mask, 0.0))


def test_flagged_rows_are_replaced():
    probs, others = random_rows(3, 5, seed=1), random_rows(3, 5, seed=2)
    replaced = replace_rows(probs, torch.tensor([False, True, False]), others)
    assert torch.equal(replaced, torch.stack([probs[0], others[1], probs[2]]))
    assert replace_rows(probs, torch.tensor([False] * 3), others) is probs


def test_flags_are_looked_up_on_the_cpu_alone():
    assert not may_be_any(torch.tensor([False, False]))
    assert may_be_any(torch.tensor([False, True]))
    assert may_be_any(torch.zeros(2, dtype=torch.bool, device="meta"))
