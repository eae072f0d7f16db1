"""Faults and limits of supported versions of transformers, torch and peft, for which tests are skipped."""

import inspect
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

TRANSFORMERS, PEFT = Version(version("transformers")), Version(version("peft"))


# Model families that are newer than docs/architectures.md and do not work yet.
NOT_YET = {"dory": "reads the cache in a way of its own, and raises an error where drafts are verified"}


def skip_if_not_yet(family: str) -> None:
    """Skip tests of a new family that is known not to work."""
    if family in NOT_YET:
        pytest.skip(f"{family}, new in transformers 5.24, {NOT_YET[family]}")


def skip_if_chunks_are_wrong() -> None:
    """Skip tests that read prompts with images or token types in chunks, where `generate` itself does so wrongly."""
    if Version("5.23") > TRANSFORMERS:
        pytest.skip(f"transformers {TRANSFORMERS} reads images and token types wrongly with `prefill_chunk_size`")


def skip_if_peft_is_behind() -> None:
    """Skip tests of adapters that fill a cache, of which peft must know the name that transformers gives it."""
    if Version("5.24") <= TRANSFORMERS and Version("0.22") > PEFT:
        pytest.skip(f"transformers {TRANSFORMERS} asks for peft 0.22, and peft {PEFT} loses the cache")


def skip_if_shapes_are_few() -> None:
    """Skip tests of many compiled shapes, where torch stops to compile a function anew after eight of them."""
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        pytest.skip(f"torch {torch.__version__} compiles a function for eight shapes, and runs others uncompiled")
