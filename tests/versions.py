"""The versions of transformers, torch and peft: what is installed and pinned, and for which of them tests are skipped.

It does not import the library, so that the canary can be run where that fails.
"""

import inspect
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from pages import text_of

TRANSFORMERS, PEFT = Version(version("transformers")), Version(version("peft"))
IS_5_24 = Version("5.24") <= TRANSFORMERS
LIST_MODELS = "list_models" if IS_5_24 else "get_gen_models"  # of the server's manager of models


def pins(name: str) -> dict[str, Version]:
    """The versions that a file of constraints pins, by package."""
    lines = text_of(name).splitlines()
    return {key: Version(pin) for key, _, pin in (line.partition("==") for line in lines if "==" in line)}


# Model families that are newer than docs/architectures.md and do not work yet.
NOT_YET = {
    "dory": "reads the cache in a way of its own, and raises an error where drafts are verified",
    "sarvam_mla": "has no tiny model in tests/tiny_families.py that runs",
}


def skip_if_not_yet(family: str) -> None:
    """Skip tests of a new family that is known not to work."""
    if family in ("qwen4_exp", "qwen4_exp_text"):
        skip_if_torch_is_old()
    if family in NOT_YET:
        pytest.skip(f"{family}, new in transformers 5.24, {NOT_YET[family]}")


def skip_if_bloom_is_not_static() -> None:
    """Skip tests of Bloom in a static cache, where it can't read from one."""
    if Version("5.21") > TRANSFORMERS:
        pytest.skip(f"Bloom of transformers {TRANSFORMERS} can't read from a static cache, and is refused")


def skip_if_torch_is_old() -> None:
    """Skip tests of a model or an adapter whose own code asks for a later torch than the oldest one."""
    if Version(torch.__version__) < Version("2.13"):
        pytest.skip(f"code of transformers or peft that this test runs asks for more than torch {torch.__version__}")


def skip_if_peft_is_old() -> None:
    """Skip tests of adapters that are loaded onto offloaded embeddings, which peft before 0.21 does not find."""
    if Version("0.21") > PEFT:
        pytest.skip(f"peft {PEFT} does not find a layer that is offloaded")


def skip_if_chunks_are_wrong() -> None:
    """Skip tests that read prompts with images or token types in chunks, where `generate` itself does so wrongly."""
    if Version("5.23") > TRANSFORMERS:
        pytest.skip(f"transformers {TRANSFORMERS} reads images and token types wrongly with `prefill_chunk_size`")


def skip_if_peft_is_behind() -> None:
    """Skip tests of adapters that fill a cache, of which peft must know the name that transformers gives it."""
    if IS_5_24 and Version("0.22") > PEFT:
        pytest.skip(f"transformers {TRANSFORMERS} asks for peft 0.22, and peft {PEFT} loses the cache")


def skip_if_shapes_are_few() -> None:
    """Skip tests of many compiled shapes, where torch stops to compile a function anew after eight of them."""
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        pytest.skip(f"torch {torch.__version__} compiles a function for eight shapes, and runs others uncompiled")
