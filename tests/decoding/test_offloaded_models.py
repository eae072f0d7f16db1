"""Base, proxy and reference with their weights on the CPU or the disk: the texts are those of the models in memory."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, get_peft_model
from test_batches import GREEDY, padded
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from versions import skip_if_peft_is_old

from transformers_kad import DualDeferral, ImplicitReward, KADLogitsProcessor

CPU = torch.device("cpu")
MIXED = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk"}


def from_disk(model, folder, device_map):
    model.save_pretrained(folder / "saved")
    return AutoModelForCausalLM.from_pretrained(
        folder / "saved", device_map=device_map, offload_folder=folder / "offloaded"
    ).eval()


# How a model is offloaded, given a copy of it in memory and a folder.
OFFLOADS = {
    "device_map of the disk": lambda model, folder: from_disk(model, folder, {"": "disk"}),
    "device_map of CPU and disk": lambda model, folder: from_disk(
        model, folder, {**MIXED, "model.rotary_emb": "cpu", "lm_head": "disk"}
    ),
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
}


@pytest.fixture(params=OFFLOADS)
def offload(request, tmp_path):
    """Offloads copies of models."""

    def run(model):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return OFFLOADS[request.param](copy.deepcopy(model), folder)

    return run


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("offloaded", [("base",), ("proxy",), ("base", "proxy", "reference")], ids="+".join)
def test_texts_are_those_of_the_models_in_memory(offload, offloaded, rows):
    models = {"base": tiny_model(hidden=32, seed=1), "proxy": tiny_model(seed=2), "reference": tiny_model(seed=3)}
    texts = []
    for found in (models, {name: offload(m) if name in offloaded else m for name, m in models.items()}):
        rule = ImplicitReward(1.0) if "reference" in offloaded else DualDeferral(0.3)
        reference = found["reference"] if "reference" in offloaded else None
        kad = KADLogitsProcessor(found["proxy"], rule, reference=reference)
        for assistant in (None, found["proxy"]):
            settings = {"logits_processor": [kad], "assistant_model": assistant, **GREEDY}
            texts.append(found["base"].generate(**padded(rows), **settings))
        assert kad.statistics.accepted > 0
    assert all(torch.equal(text, texts[0]) for text in texts[1:])


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("role", ["base", "proxy", "reference"])
def test_a_model_whose_weights_are_nowhere_is_refused(tmp_path, role, speculative):
    """As by the mistake device_map={"": "meta"}, which transformers accepts."""
    models = {"base": tiny_model(hidden=32, seed=1), "proxy": tiny_model(seed=2), "reference": tiny_model(seed=3)}
    models[role] = from_disk(models[role], tmp_path, {"": "meta"})
    kad = KADLogitsProcessor(models["proxy"], ImplicitReward(1.0), reference=models["reference"])
    assistant = models["proxy"] if speculative else None
    with pytest.raises(ValueError, match=rf"of the {role} LlamaForCausalLM \(.*saved\) has no values: .*device_map"):
        models["base"].generate(**padded(2), logits_processor=[kad], assistant_model=assistant, **GREEDY)


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")  # peft loads the adapter twice
@pytest.mark.parametrize("offload_first", [False, True])
def test_a_proxy_with_an_adapter_that_is_switched_off(base, tmp_path, monkeypatch, offload_first):
    """Its weights on the disk. Where the model was offloaded first, peft has to be told where they go."""
    if offload_first:
        skip_if_peft_is_old()
    monkeypatch.chdir(tmp_path)  # where peft writes weights for accelerate to load
    model = tiny_model(seed=2)
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    in_memory = get_peft_model(copy.deepcopy(model), lora).eval()
    in_memory.save_pretrained(tmp_path / "adapter")
    if offload_first:
        below = from_disk(model, tmp_path, {"": "disk"})
        settings = {"device_map": {"": "disk"}, "offload_dir": tmp_path / "adapted"}
        offloaded = PeftModel.from_pretrained(below, tmp_path / "adapter", **settings).eval()
    else:
        offloaded = disk_offload(copy.deepcopy(in_memory), tmp_path / "offloaded", execution_device=CPU)
    texts = []
    for proxy in (in_memory, offloaded):
        kad = KADLogitsProcessor(proxy, ImplicitReward(1.0))
        for assistant in (None, proxy):
            settings = {"logits_processor": [kad], "assistant_model": assistant, **GREEDY}
            texts.append(base.generate(**padded(3), **settings))
    assert all(torch.equal(text, texts[0]) for text in texts[1:])


@pytest.mark.parametrize("role", ["base", "proxy"])
def test_offloaded_models_are_not_compiled(base, proxy, role):
    models = {"base": base, "proxy": proxy}
    models[role] = cpu_offload(copy.deepcopy(models[role]), execution_device=CPU)
    kad = KADLogitsProcessor(models["proxy"], DualDeferral(0.3), compile=True)
    with pytest.raises(ValueError, match=rf"those of the {role} LlamaForCausalLM \(unnamed\) are offloaded"):
        models["base"].generate(**padded(2), logits_processor=[kad], assistant_model=models["proxy"], **GREEDY)
