"""Where a model computes whose weights accelerate keeps elsewhere, and weights that are nowhere."""

import copy
import re

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import nn

from transformers_kad.models.offloading import check_weights, execution_device

CPU, META = torch.device("cpu"), torch.device("meta")
ON_DISK = {"model": "disk", "lm_head": "disk"}


def test_a_model_computes_where_its_weights_are_loaded_to():
    model = tiny_model(seed=1)
    assert execution_device(model) == CPU
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=CPU)
    assert offloaded.device == META
    assert offloaded._hf_hook.execution_device is None  # the hooks of the layers know it
    assert execution_device(offloaded) == CPU
    adapted = get_peft_model(offloaded, LoraConfig(target_modules=["q_proj"]))
    assert execution_device(adapted) == CPU
    assert execution_device(model.to(META)) == META


def test_the_device_may_be_named_by_a_string_and_stand_in_one_of_several_hooks(tmp_path):
    model = dispatch_model(tiny_model(seed=1), ON_DISK, offload_dir=tmp_path)
    assert model.device == META
    assert execution_device(model) == CPU
    both = cpu_offload(nn.Linear(2, 2), execution_device=CPU)  # one hook for the model, one for its weights
    assert len(both._hf_hook.hooks) == 2
    both.device = META
    assert execution_device(both) == CPU


def test_offloaded_weights_have_values_elsewhere(tmp_path):
    check_weights(tiny_model(seed=1), "proxy")
    check_weights(cpu_offload(tiny_model(seed=1), execution_device=CPU), "proxy")
    check_weights(cpu_offload(tiny_model("gpt2", seed=1), execution_device=CPU), "proxy")  # with tied weights
    check_weights(dispatch_model(tiny_model(seed=1), ON_DISK, offload_dir=tmp_path), "proxy")
    whole_layers = cpu_offload(tiny_model(seed=1), execution_device=CPU, preload_module_classes=["LlamaDecoderLayer"])
    check_weights(whole_layers, "proxy")


def test_a_weight_without_values_is_named():
    lost = tiny_model(seed=1)
    lost.lm_head.to(META)
    with pytest.raises(ValueError, match=re.escape("weight 'lm_head.weight' of the base LlamaForCausalLM (unnamed)")):
        check_weights(lost, "base")


def test_an_adapter_that_peft_puts_on_an_offloaded_model_has_no_values():
    lora = LoraConfig(target_modules=["q_proj"])
    late = get_peft_model(cpu_offload(tiny_model(seed=1), execution_device=CPU), lora)
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight' of the proxy .*Put the adapter on the model"):
        check_weights(late, "proxy")
    check_weights(cpu_offload(get_peft_model(tiny_model(seed=1), lora), execution_device=CPU), "proxy")
