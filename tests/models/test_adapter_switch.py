"""A model with its adapters switched off is the model that they were put on, and they come back as they were."""

import copy
import sys
import types
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_adapters import ANOTHER_MODEL_BELOW, KINDS, NOT_FOLLOWABLE, accepted, adapted, invoking_ids
from test_cached_model import plain, random_ids
from tiny_models import tiny_model
from torch import nn

from transformers_kad import ImplicitReward, KADLogitsProcessor
from transformers_kad.models.adapter_switch import AdapterSwitch
from transformers_kad.models.cached_model import CachedModel


def without(model, ids):
    with torch.no_grad():
        return AdapterSwitch(model).forward(input_ids=ids).logits[:, -1:]


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_an_adapter_switched_off_is_the_model_below_and_comes_back(settings):
    ids = random_ids(1, 6)
    below = plain(tiny_model(seed=3), ids)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, **settings)
    model = get_peft_model(tiny_model(seed=3), config).eval()
    with torch.no_grad():
        if settings.get("modules_to_save"):
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    adapted = plain(model, ids)
    assert (adapted - below).abs().max() > 0.1
    trained = [parameter.requires_grad for parameter in model.parameters()]
    torch.testing.assert_close(without(model, ids), below)

    def interrupt(*_):
        raise InterruptedError

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(InterruptedError):
        without(model, ids)
    handle.remove()
    torch.testing.assert_close(plain(model, ids), adapted)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    with model.disable_adapter():
        torch.testing.assert_close(without(model, ids), below)
        torch.testing.assert_close(plain(model, ids), below)  # it was off before
    torch.testing.assert_close(plain(model, ids), adapted)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(KINDS) - NOT_FOLLOWABLE))
def test_every_kind_of_adapter_switched_off_is_the_model_before_or_is_refused(name: str) -> None:
    model, ids = adapted(name), invoking_ids(1, 8)
    before = plain(tiny_model(seed=3, **KINDS[name].below), ids, 8)
    with torch.no_grad():
        on = model(input_ids=ids).logits
        assert (on - before).abs().max() > 0.1
        off = AdapterSwitch(model).forward(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, on, rtol=0, atol=0)
        with model.disable_adapter():
            torch.testing.assert_close(off, model(input_ids=ids).logits)
    same = torch.allclose(off, before, atol=1e-4)
    assert accepted(model, without_adapter=True) == same == (name not in ANOTHER_MODEL_BELOW)
    if not same:
        with pytest.raises(ValueError, match=r"not the proxy before alignment: .*reference="):
            KADLogitsProcessor(model, ImplicitReward(1.0))
        KADLogitsProcessor(model, ImplicitReward(1.0), reference=tiny_model(seed=3))


def switches(model: PeftModel) -> list[tuple[str, type, Any]]:
    """What a forward without adapter changes for its time: flags and whole modules."""
    return [(name, type(module), getattr(module, "disable_adapters", None)) for name, module in model.named_modules()]


@pytest.mark.parametrize("name", ["LORA", "modules_to_save", "LN_TUNING", "ADAPTION_PROMPT"])
def test_an_interrupt_anywhere_leaves_the_adapter_as_it_was(name: str) -> None:
    """One KeyboardInterrupt at each line, call and return of each function of the module, one after the other."""
    model, ids = adapted(name), random_ids(1, 4)
    layers = [module for module in model.modules() if isinstance(getattr(module, "disable_adapters", None), bool)]
    if layers:
        layers[0]._disable_adapters = True  # found off, to be left off
    before = switches(model)
    file = AdapterSwitch.forward.__code__.co_filename

    def interrupted_at(number: int) -> bool:
        events = 0

        def trace(frame: types.FrameType, event: str, _: Any) -> Any:
            nonlocal events
            if frame.f_code.co_filename != file:
                return None
            events += 1
            if events == number:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            AdapterSwitch(model).forward(input_ids=ids)
        except KeyboardInterrupt as interrupt:
            return bool(interrupt)  # its traceback holds all frames: nothing is mended by their end
        finally:
            sys.settrace(None)
        return events >= number

    number = 1
    with torch.no_grad():
        while interrupted_at(number) or number < 10:
            assert switches(model) == before, number
            number += 1
    assert number > 30
    assert switches(model) == before


def test_a_forward_without_the_adapter_does_not_search_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are searched when a call begins."""
    model, ids = adapted("LORA"), random_ids(1, 6)
    cached = CachedModel(model, without_adapter=True)
    cached.refresh()
    expected = plain(tiny_model(seed=3), ids)
    searched = []
    modules = nn.Module.modules
    monkeypatch.setattr(nn.Module, "modules", lambda self: searched.append(self) or modules(self))
    torch.testing.assert_close(cached.logits(ids), expected)
    cached.extend(random_ids(1, 1))
    assert searched == []
    cached.refresh()
    assert model in searched


def test_an_adapter_that_was_added_between_calls_is_switched_off_too() -> None:
    model, ids = adapted("LORA"), random_ids(1, 6)
    cached = CachedModel(model, "reference", without_adapter=True)
    cached.refresh()
    cached.logits(ids)
    # On layers that had no adapter when the modules were searched.
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], init_lora_weights=False)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    cached.refresh()
    torch.testing.assert_close(cached.logits(ids), plain(tiny_model(seed=3), ids))


def test_a_copy_switches_off_the_adapters_of_its_own_model() -> None:
    model, ids = adapted("LORA"), random_ids(1, 6)
    copied = copy.deepcopy(CachedModel(model, "reference", without_adapter=True))
    torch.testing.assert_close(copied.logits(ids), plain(tiny_model(seed=3), ids))
    assert copied.model is not model
