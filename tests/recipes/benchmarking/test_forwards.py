"""Forwards: counted where they happen, timed on their own; caches, looked at."""

import itertools
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoConfig, DynamicCache, MambaConfig, StaticCache

from transformers_kad.models.by_version import CACHE
from transformers_kad.models.static_model import StaticCacheModel
from transformers_kad.recipes.benchmarking.bounds import Shape
from transformers_kad.recipes.benchmarking.forwards import (
    IN_A_ROW,
    CacheMeter,
    ForwardMeter,
    ForwardTimer,
    time_compiled_forwards,
)
from transformers_kad.recipes.benchmarking.subjects import random_model

ARCHITECTURES = Path(__file__).resolve().parents[3] / "recipes" / "tiny_architectures"
IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 9, 3]])


def count_up():
    """A clock that shows 0, 1, 2, ..."""
    return itertools.count().__next__


def test_forwards_are_counted_by_shape_and_timed(base, proxy):
    with ForwardMeter({"base": base, "proxy": proxy}, count_up()) as meter:
        base.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
        proxy(IDS[:1, :2])
        proxy(input_ids=IDS)
    assert meter.counts == {
        Shape("base", 2, 6): 1,
        Shape("base", 2, 1): 3,
        Shape("proxy", 1, 2): 1,
        Shape("proxy", 2, 6): 1,
    }
    assert meter.of("base") == [1] * 4
    assert meter.of("proxy") == [1, 1]
    base(IDS)
    assert meter.counts.total() == 6  # the hooks are gone


def test_without_a_clock_forwards_are_only_counted(base):
    with ForwardMeter({"base": base}, None) as meter:
        base(IDS)
    assert meter.counts == {Shape("base", 2, 6): 1}
    assert meter.of("base") == []


def test_the_hooks_go_also_when_a_forward_fails(base):
    with pytest.raises(IndexError), ForwardMeter({"base": base}, None) as meter:
        base(torch.tensor([[10**6]]))
    base(IDS)
    assert meter.counts.total() == 1


@pytest.fixture(scope="module", params=["windowed", "hybrid"])
def architecture(request):
    """A model whose cache can't take back tokens, or not all of them."""
    return random_model(AutoConfig.from_pretrained(ARCHITECTURES / request.param / "proxy"), device="cpu")


def test_forwards_that_begin_with_a_text_are_prefills(architecture, base, proxy):
    static = StaticCache(config=base.config, max_cache_len=24)
    with torch.no_grad(), ForwardMeter({"base": base, "proxy": proxy, "other": architecture}, None) as meter:
        architecture.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        base(input_ids=IDS, **{CACHE: static})
        base(input_ids=IDS, **{CACHE: static})
        for _ in range(2):
            proxy(IDS[:1])
    assert meter.counts[Shape("other", 2, 1)] == 3
    assert meter.prefills == {Shape("other", 2, 6): 1, Shape("base", 2, 6): 1, Shape("proxy", 1, 6): 2}


def test_prefills_of_recurrent_layers_alone():
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    model = random_model(MambaConfig(**sizes), device="cpu")
    with ForwardMeter({"base": model}, None) as meter:
        model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert meter.counts == {Shape("base", 2, 6): 1, Shape("base", 2, 1): 3}
    assert meter.prefills == {Shape("base", 2, 6): 1}


def test_forwards_on_their_own_have_the_shapes_that_were_asked_for(base, proxy):
    shapes = [Shape("base", 2, 1), Shape("base", 2, 4), Shape("base", 1, 4), Shape("proxy", 1, 1)]
    prompts = [Shape("base", 2, 7), Shape("proxy", 3, 5)]
    with ForwardMeter({"base": base, "proxy": proxy}, None) as meter:
        timer = ForwardTimer({"base": base, "proxy": proxy}, shapes, prompts, held=10)
    assert meter.counts == {Shape("base", 2, 10): 1, Shape("base", 1, 10): 1, Shape("proxy", 1, 10): 1}
    with ForwardMeter({"base": base, "proxy": proxy}, None) as meter:
        times = [timer.measure() for _ in range(3)]
    assert meter.counts == dict.fromkeys(shapes, 3 * IN_A_ROW) | dict.fromkeys(prompts, 3)
    for measured in times:
        assert {shape: len(seconds) for shape, seconds in measured.items()} == (
            dict.fromkeys(shapes, IN_A_ROW) | dict.fromkeys(prompts, 1)
        )
        assert all(min(seconds) > 0 for seconds in measured.values())


def test_forwards_behind_a_text_find_it_in_the_cache(base):
    held = []

    def look(model, args, kwargs):
        cache = kwargs.get(CACHE)
        held.append((kwargs["input_ids"].shape[1], 0 if cache is None else cache.get_seq_length()))

    handle = base.register_forward_pre_hook(look, with_kwargs=True)
    shapes = [Shape("base", 2, 1), Shape("base", 2, 3)]
    timer = ForwardTimer({"base": base}, shapes, [Shape("base", 2, 8)], held=10)
    for _ in range(2):
        timer.measure()
    handle.remove()
    once = [*[(1, 10)] * IN_A_ROW, *[(3, 10)] * IN_A_ROW, (8, 0)]
    assert held == [(10, 0), *once * 2]


def test_every_forward_continues_the_same_text(architecture):
    held = []

    def look(model, args, kwargs):
        assert model is architecture  # only the cache is copied
        cache = kwargs.get(CACHE)
        length = 0 if cache is None else cache.get_seq_length()
        mask = kwargs["attention_mask"]  # of columns, or prepared: for each kind of layers, query and column
        mask = mask["full_attention"] if isinstance(mask, dict) else mask
        columns = mask[1] if mask.dim() == 2 else mask[1, 0, -1].long()
        held.append((kwargs["input_ids"].shape[1], length, columns.tolist()))

    handle = architecture.register_forward_pre_hook(look, with_kwargs=True)
    timer = ForwardTimer({"base": architecture}, [Shape("base", 2, 12), Shape("base", 2, 1)], [], held=60)
    for _ in range(2):
        timer.measure()
    handle.remove()
    text = [0] + [1] * 59
    once = [(new, 60, text + [1] * new) for new in (1, 12) for _ in range(IN_A_ROW)]
    assert held == [(60, 0, text), *once * 2]


def test_shapes_are_added_and_left_out(base, proxy):
    one, prompt = Shape("base", 1, 1), Shape("base", 1, 9)
    timer = ForwardTimer({"base": base, "proxy": proxy}, [one], [], held=10)
    assert set(timer.measure()) == {one}
    more = Shape("proxy", 2, 3)
    timer.add([one, more], [prompt])
    assert set(timer.measure(leave_out={one})) == {more, prompt}
    assert set(timer.measure(leave_out={prompt})) == {one, more}
    assert set(timer.measure()) == {one, more, prompt}


def test_compiled_forwards_are_steps_of_their_width(proxy, monkeypatch):
    shapes = []

    def compiled(forward, **settings):
        def run(cache, ids):
            shapes.append(tuple(ids.shape))
            return forward(cache, ids)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    model = StaticCacheModel(proxy, "proxy", width=4)
    times = [time_compiled_forwards(model, rows=rows, held=held) for rows, held in ((1, 9), (1, 12), (4, 9))]
    assert [len(seconds) for seconds in times] == [IN_A_ROW] * 3
    assert shapes[: 2 * IN_A_ROW] == [(1, 4)] * 2 * IN_A_ROW
    assert set(shapes[2 * IN_A_ROW :]) == {(4, 4)}
    assert model.capacity == 256


def test_a_cache_of_its_texts_alone_is_ideal(base):
    with CacheMeter({"base": base}, every=1) as caches:
        base.generate(IDS, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert caches.over_ideal == 1
    # Keys and values of 2 layers, 2 heads of width 8, float32, for 2 rows of 14 tokens before the last forward.
    assert caches.bytes == 2 * 2 * 2 * 8 * 4 * 2 * 14


def test_padding_and_room_are_more_than_ideal(base):
    cache, mask = DynamicCache(config=base.config), torch.ones_like(IDS)
    mask[0, :3] = 0
    with torch.no_grad():
        base(input_ids=IDS, attention_mask=mask, **{CACHE: cache})
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=-1)
        with CacheMeter({"base": base}, every=1) as caches:
            base(input_ids=IDS[:, :1], attention_mask=longer, **{CACHE: cache})
        assert caches.over_ideal == 12 / 9
        static = StaticCache(config=base.config, max_cache_len=24)
        base(input_ids=IDS, **{CACHE: static})
        with CacheMeter({"base": base}, every=1) as caches:
            base(input_ids=IDS[:, :1], **{CACHE: static})
    assert caches.over_ideal == 4


def test_the_beginning_of_a_text_does_not_count():
    model = tiny_model()
    with torch.no_grad(), CacheMeter({"base": model}, every=1) as caches:
        static = StaticCache(config=model.config, max_cache_len=24)
        model(input_ids=IDS[:, :2], **{CACHE: static})
        model(input_ids=IDS, **{CACHE: static})  # 24 columns for 2 tokens
        model(input_ids=IDS, **{CACHE: static})  # 24 for 8
        model(input_ids=IDS[:, :1], **{CACHE: static})  # 24 for 14
    assert caches.over_ideal == 3
    with CacheMeter({"base": model}) as caches:
        pass
    assert caches.over_ideal is None
    assert caches.bytes == 0


def test_recurrent_states_are_no_keys_and_values():
    model = random_model(AutoConfig.from_pretrained(ARCHITECTURES / "hybrid" / "proxy"), device="cpu")
    recurrent = random_model(
        MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4), device="cpu"
    )
    with CacheMeter({"base": model, "proxy": recurrent}, every=1) as caches:
        for each in (model, recurrent):
            each.generate(IDS, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert caches.over_ideal == 1
    # Of one layer, 2 heads of width 32, float32, for 2 rows of 14 tokens before the last forward.
    assert caches.bytes == 2 * 2 * 32 * 4 * 2 * 14
