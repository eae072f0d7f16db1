"""Devices and quantization: what their names stand for."""

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from transformers_kad.integrations.loading.devices import QUANTIZATIONS, pick_device, quantization_config


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_is_the_fastest_device_there_is(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto") == device


def test_a_named_device_is_taken():
    assert pick_device("cuda:3") == "cuda:3"


def test_every_quantization_has_its_configuration():
    made = {name: quantization_config(name) for name in QUANTIZATIONS}
    assert isinstance(made.pop("torchao-int8"), TorchAoConfig)
    assert {name: (type(c), c.load_in_8bit, c.load_in_4bit) for name, c in made.items()} == {
        "bitsandbytes-8bit": (BitsAndBytesConfig, True, False),
        "bitsandbytes-4bit": (BitsAndBytesConfig, False, True),
    }
    assert quantization_config(None) is None


def test_torchao_does_not_change_the_precision_of_other_models():
    before = torch.get_float32_matmul_precision()
    assert quantization_config("torchao-int8").quant_type.set_inductor_config is False
    assert torch.get_float32_matmul_precision() == before
