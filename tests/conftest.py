"""What every test shares: no network, one thread (the models are tiny), a base and a proxy."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

torch.set_num_threads(1)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static caches without the minute that compiling takes."""
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)


@pytest.fixture(scope="session")
def base() -> PreTrainedModel:
    return tiny_model(hidden=32, seed=1)


@pytest.fixture(scope="session")
def proxy() -> PreTrainedModel:
    return tiny_model(hidden=16, seed=2)
