"""The caches of the proxy and the reference from call to call."""

import pytest
import torch
from tiny_models import tiny_model

from transformers_kad.decoding.proxy_models import ProxyModels

IDS = torch.tensor([[3, 14, 15, 9, 26]])


def read(models):
    for cached in models:
        cached.logits(IDS)


def test_caches_of_a_call_that_did_not_finish_are_dropped(proxy):
    models = ProxyModels(proxy, tiny_model(seed=5), without_adapter=False)
    models.prepare()
    read(models)
    models.finish(caches_are_valid=True)
    models.prepare()
    assert [cached.cached_length for cached in models] == [5, 5]
    models.prepare()  # the call before never came to its end
    assert [cached.cached_length for cached in models] == [0, 0]


def test_a_call_with_inputs_of_its_own_begins_with_empty_caches(proxy):
    models = ProxyModels(proxy, None, without_adapter=False)
    models.prepare()
    read(models)
    models.finish(caches_are_valid=True)
    models.prepare({"position_ids": torch.arange(5)[None]})
    assert models.proxy.cached_length == 0


def test_crop_takes_back_tokens_of_every_cache(proxy):
    models = ProxyModels(proxy, tiny_model(seed=5), without_adapter=False)
    models.prepare()
    read(models)
    models.crop(3)
    assert [cached.cached_length for cached in models] == [3, 3]


@pytest.mark.usefixtures("uncompiled")
def test_static_caches_are_kept_for_the_same_width_alone(base, proxy):
    models = ProxyModels(proxy, None, without_adapter=False)
    of_proxy, of_base = models.static_proxy(1), models.static_base(base, 6)
    assert models.static_proxy(1) is of_proxy
    assert models.static_base(base, 6) is of_base
    assert models.static_base(base, 4) is not of_base
    assert models.static_base(tiny_model(seed=3), 6) is not of_base
    other = ProxyModels(proxy, None, without_adapter=False)
    assert other.static_proxy(1) is not of_proxy


def test_forwards_of_both_kinds_of_caches_count(proxy):
    models = ProxyModels(proxy, None, without_adapter=False)
    models.prepare()
    read(models)
    assert models.proxy_forwards == 1
    models.static_proxy(1).forwards = 4
    assert models.proxy_forwards == 5
