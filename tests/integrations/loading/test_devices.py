"""Devices and quantization: what their names stand for."""

import sys

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from transformers_kad.integrations.loading import devices
from transformers_kad.integrations.loading.devices import QUANTIZATIONS, pick_device, quantization_config


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_is_the_fastest_device_there_is_and_it_is_told_once(monkeypatch, capsys, cuda, mps, device):
    devices._tell_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert [pick_device("auto"), pick_device("auto")] == [device, device]
    assert capsys.readouterr().err.splitlines() == [
        f'Device: {device}, which is the first available one of "cuda", "mps" and "cpu".'
    ]


def test_a_named_device_is_taken_without_a_word(capsys):
    devices._tell_once.cache_clear()
    assert pick_device("cuda:3") == "cuda:3"
    assert capsys.readouterr().err == ""


def test_every_quantization_has_its_configuration():
    pytest.importorskip("torchao.quantization")
    made = {name: quantization_config(name) for name in QUANTIZATIONS}
    assert isinstance(made.pop("torchao-int8"), TorchAoConfig)
    assert {name: (type(c), c.load_in_8bit, c.load_in_4bit) for name, c in made.items()} == {
        "bitsandbytes-8bit": (BitsAndBytesConfig, True, False),
        "bitsandbytes-4bit": (BitsAndBytesConfig, False, True),
    }
    assert quantization_config(None) is None


def test_without_torchao_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(
        ImportError, match=r"'torchao-int8' needs torchao: pip install -e \"\.\[quantization\]\" \(.*torchao"
    ):
        quantization_config("torchao-int8")


def test_torchao_does_not_change_the_precision_of_other_models():
    pytest.importorskip("torchao.quantization")
    before = torch.get_float32_matmul_precision()
    assert quantization_config("torchao-int8").quant_type.set_inductor_config is False
    assert torch.get_float32_matmul_precision() == before
