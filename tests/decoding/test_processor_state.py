"""What a processor keeps between calls: one call at a time, prompts of one thread, copies without caches."""

import contextvars
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from tiny_models import tiny_model
from transformers import StoppingCriteria

from transformers_kad import DualDeferral, KADLogitsProcessor

PROMPT = torch.tensor([[3, 14, 15, 9, 26]])
OTHER = torch.tensor([[7, 7, 7]])
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def make_kad(proxy, **settings):
    return KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=3, **settings)


class CallAgain(StoppingCriteria):
    def __init__(self, base, kad):
        self.base, self.kad, self.message = base, kad, None

    def __call__(self, input_ids, scores, **kwargs):
        with pytest.raises(RuntimeError) as caught:
            self.base.generate(input_ids, logits_processor=[self.kad], **GREEDY)
        self.message = str(caught.value)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("speculative", [False, True])
def test_a_call_that_calls_generate_again_is_told_so(base, proxy, speculative):
    """Not that threads are the matter."""
    kad = make_kad(proxy)
    criterion = CallAgain(base, kad)
    assistant = proxy if speculative else None
    settings = {"logits_processor": [kad], "assistant_model": assistant, **GREEDY}
    base.generate(PROMPT, stopping_criteria=[criterion], **settings)
    assert "calls `generate` again" in criterion.message
    assert "thread" not in criterion.message


def test_a_decoding_method_that_calls_generate_inside_with_the_list_it_was_given(base, proxy):
    """As the decoding methods on the Hub do that replace a mode of generate."""
    kad = make_kad(proxy)
    expected = base.generate(PROMPT, logits_processor=[kad], **GREEDY)

    def again(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        return model.generate(input_ids, logits_processor=logits_processor, **GREEDY)

    assert torch.equal(base.generate(PROMPT, logits_processor=[kad], custom_generate=again, **GREEDY), expected)
    assert kad.statistics.tokens == 12


def test_a_proxy_prompt_is_that_of_its_thread(base, proxy, caplog):
    kad = make_kad(proxy)
    plain = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    with kad.proxy_prompt(OTHER):
        prompted = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    assert not torch.equal(plain, prompted)
    inside, done, seen = threading.Event(), threading.Event(), []

    def hold():
        with kad.proxy_prompt(OTHER):
            inside.set()
            done.wait()
            seen.append(base.generate(PROMPT, logits_processor=[kad], **GREEDY))

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    assert torch.equal(base.generate(PROMPT, logits_processor=[kad], **GREEDY), plain)
    assert "does not reach this call" in caplog.text
    done.set()
    thread.join()
    assert torch.equal(seen[0], prompted)


def test_blocks_of_prompts_within_each_other(base, proxy):
    kad, other = make_kad(proxy), make_kad(proxy)
    assert kad.state.proxy_prompt is None
    with kad.proxy_prompt(OTHER), other.proxy_prompt(PROMPT):
        assert torch.equal(kad.state.proxy_prompt.input_ids, OTHER)
        assert torch.equal(other.state.proxy_prompt.input_ids, PROMPT)
        with kad.proxy_prompt(PROMPT[:, :2]):
            assert torch.equal(kad.state.proxy_prompt.input_ids, PROMPT[:, :2])
        assert torch.equal(kad.state.proxy_prompt.input_ids, OTHER)
    assert kad.state.proxy_prompt is None


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda kad: pickle.loads(pickle.dumps(kad))])
def test_copies_and_pickles_are_processors_without_caches(base, proxy, make_copy):
    kad = make_kad(proxy, tokenizer=None)
    expected = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    other = make_copy(kad)
    assert kad.state.models.proxy.cached_length > 0
    assert other.state.models.proxy.cached_length == 0
    assert (repr(other), other.statistics) == (repr(kad), kad.statistics)
    assert other.proxy is not proxy
    settings = {"logits_processor": [other], **GREEDY}
    assert torch.equal(base.generate(PROMPT, **settings), expected)
    assert torch.equal(base.generate(PROMPT, assistant_model=other.proxy, **settings), expected)


def test_a_copy_made_within_a_call_is_free(base, proxy):
    kad, copies = make_kad(proxy), []

    class Copy(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            copies.append(copy.deepcopy(kad))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    expected = base.generate(PROMPT, logits_processor=[kad], stopping_criteria=[Copy()], **GREEDY)
    assert torch.equal(base.generate(PROMPT, logits_processor=[copies[0]], **GREEDY), expected)


@pytest.mark.usefixtures("uncompiled")
def test_a_reset_frees_the_caches_of_compiled_forwards(base, proxy):
    kad = make_kad(proxy, compile=True)
    base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)
    models = kad.state.models
    static = [models.static_base(base, 4), models.static_proxy(1)]
    caches = [weakref.ref(model._store) for model in static]
    del static
    assert all(cache() is not None for cache in caches)
    kad.reset()
    gc.collect()
    assert all(cache() is None for cache in caches)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("settings", [{}, {"trace": True}, {"compile": True}], ids=str)
def test_a_processor_does_not_keep_the_base_alive(proxy, settings):
    base = tiny_model(hidden=32, seed=1)
    kad = make_kad(proxy, **settings)
    base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)
    if not settings.get("compile"):
        base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    alive = weakref.ref(base)
    del base
    gc.collect()
    assert alive() is None
    assert kad.statistics.tokens == 12


@pytest.mark.usefixtures("uncompiled")
def test_a_copy_of_the_base_has_no_static_cache_of_the_processor(base, proxy):
    kad = make_kad(proxy, compile=True)
    expected = base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)
    other = copy.deepcopy(base)
    assert not vars(other)["_kad_static_models"]
    ids = other.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)
    assert torch.equal(ids, expected)


def test_a_setting_of_a_processor_is_not_silently_ignored(proxy):
    kad = make_kad(proxy)
    for name, value in (("num_assistant_tokens", 1), ("lazy", True), ("rule", DualDeferral(0.1)), ("compile", True)):
        with pytest.raises(AttributeError, match=f"`{name}` of a processor can't be changed"):
            setattr(kad, name, value)
    assert kad.num_assistant_tokens == 3


def test_a_step_in_another_thread_or_after_its_call_is_refused(base, proxy):
    kad, kept, errors = make_kad(proxy), [], []

    def ask(ids):
        try:
            kept[0](ids, torch.zeros(1, 50))
        except RuntimeError as error:
            errors.append(str(error))

    def method(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        kept.append(logits_processor)
        thread = threading.Thread(target=ask, args=(input_ids,))
        thread.start()
        thread.join()
        return input_ids

    base.generate(PROMPT, logits_processor=[kad], custom_generate=method, **GREEDY)
    ask(PROMPT)
    assert ["in another thread" in errors[0], "a call of `generate` that is over" in errors[1]] == [True, True]


def test_a_block_may_be_left_in_another_context(proxy):
    """As servers do that run each step of a generator in a thread of a pool."""
    kad = make_kad(proxy)

    def stream():
        with kad.proxy_prompt(OTHER):
            yield kad.state.proxy_prompt
        assert kad.state.proxy_prompt is None

    steps = stream()
    assert contextvars.copy_context().run(next, steps) is not None
    assert contextvars.copy_context().run(next, steps, "end") == "end"
    assert not kad.state.has_proxy_prompt_elsewhere


@pytest.mark.usefixtures("uncompiled")
def test_a_reset_frees_the_static_caches_of_every_base(base, proxy):
    kad, other = make_kad(proxy, compile=True), tiny_model(hidden=32, seed=7)
    shallow = copy.copy(base)
    models = kad.state.models
    assert models.static_base(base, 4).model is base
    assert models.static_base(shallow, 4).model is shallow
    models.static_base(other, 4)
    statics = [models.static_base(shallow, 4), models.static_base(other, 4)]
    for static in statics:
        static.reserve(20)
    assert [static.capacity for static in statics] == [256, 256]
    kad.reset()
    assert [static.capacity for static in statics] == [0, 0]
