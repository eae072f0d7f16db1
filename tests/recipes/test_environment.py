"""The environment of a measurement: versions of the libraries, and the kind of machine."""

import importlib.metadata

import torch
from packaging.version import Version

from transformers_kad.recipes.environment import describe_environment


def test_versions_are_those_that_are_installed():
    found = describe_environment()
    for name in ("torch", "transformers", "peft"):  # a wheel of torch may name its CUDA in one of the two alone
        assert Version(found[name]).public == Version(importlib.metadata.version(name)).public
    assert found["transformers_kad"] == importlib.metadata.version("transformers-kad")


def test_the_cpu_is_described_by_its_threads_and_a_gpu_by_its_name(monkeypatch):
    assert f"{torch.get_num_threads()} threads" in describe_environment("cpu")["device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card at {device}")
    assert describe_environment("cuda:1")["device"] == "Card at cuda:1"
    assert describe_environment("mps")["device"] == "mps"
