"""An interrupt at any line leaves a processor that serves the next call, and models as they were."""

import sys
import threading

import pytest
import torch
from tiny_models import tiny_model
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from transformers_kad import DualDeferral, KADLogitsProcessor
from transformers_kad.decoding import generate_wrapper, open_call, processor_state, proxy_models, token_by_token
from transformers_kad.models import cached_model

PROMPT = torch.tensor([[5, 9, 3, 7, 7, 1, 2, 8]])
GREEDY = {"do_sample": False, "max_new_tokens": 9}


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th line that is run in some files, as Ctrl-C could."""

    def __init__(self, files, at):
        self.files, self.left, self.where = files, at, None

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exception):
        sys.settrace(None)

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                raise KeyboardInterrupt
        return self.trace


def lines_run(files, call):
    """How many lines a call runs in some files."""
    counter = InterruptAt(files, at=-1)
    with counter:
        call()
    return -1 - counter.left


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("speculative", [False, True])
def test_the_call_after_an_interrupt_is_right(base, speculative, architecture):
    """Every line of the wrapper and of the proxy's cache, in a call that goes on from the one before."""
    model = tiny_model(architecture, seed=2)
    modules = (generate_wrapper, open_call, processor_state, proxy_models, token_by_token, cached_model)
    files = {module.__file__ for module in modules}
    kad = KADLogitsProcessor(model, DualDeferral(0.6), num_assistant_tokens=3)
    settings = {"logits_processor": [kad], **GREEDY, "assistant_model": model if speculative else None}

    def call():
        return base.generate(PROMPT, **settings)

    expected = call()
    total = lines_run(files, call)
    assert total > 300
    step = max(total // 120, 1)
    for at in range(1, total, step):
        with InterruptAt(files, at) as interrupted, pytest.raises(KeyboardInterrupt):
            call()
        assert torch.equal(call(), expected), interrupted.where


def test_a_processor_is_free_once_the_frames_of_an_interrupted_call_are_gone(base, proxy, monkeypatch):
    """Even where the interrupt kept the call from being closed."""
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    expected = base.generate(PROMPT, logits_processor=[kad], **GREEDY)

    def interrupt(self, call):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(processor_state.ProcessorState, "close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    assert torch.equal(base.generate(PROMPT, logits_processor=[kad], **GREEDY), expected)


class Ask(StoppingCriteria):
    """Does something to the processor after every token."""

    def __init__(self, action):
        self.action = action

    def __call__(self, input_ids, scores, **kwargs):
        self.action(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Broken(BaseStreamer):
    """Fails at the n-th token, as where nobody reads the text any more."""

    def __init__(self, at):
        self.left = at + 1  # the prompt comes first

    def put(self, value):
        self.left -= 1
        if self.left == 0:
            raise BrokenPipeError

    def end(self):
        pass


@pytest.mark.parametrize("speculative", [False, True])
def test_the_call_after_one_whose_streamer_failed_is_right(base, proxy, speculative):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {"logits_processor": [kad], **GREEDY, "assistant_model": proxy if speculative else None}
    expected = base.generate(PROMPT, **settings)
    statistics = kad.statistics
    for at in range(1, 10):
        with pytest.raises(BrokenPipeError) as failed:
            base.generate(PROMPT, streamer=Broken(at), **settings)
        assert kad.statistics is statistics  # those of the last call that ended
        assert torch.equal(base.generate(PROMPT, **settings), expected)
        assert failed.tb  # it holds the frames of the call, so that their end frees nothing
        statistics = kad.statistics


@pytest.mark.parametrize("speculative", [False, True])
def test_a_processor_asked_by_hand_within_its_own_call_says_so(base, proxy, speculative):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {"logits_processor": [kad], **GREEDY, "assistant_model": proxy if speculative else None}
    expected = base.generate(PROMPT, **settings)

    def ask(input_ids):
        with pytest.raises(RuntimeError, match="in use by a call of `generate` in this thread"):
            kad(input_ids.flip(-1), torch.zeros(1, 50))

    assert torch.equal(base.generate(PROMPT, stopping_criteria=[Ask(ask)], **settings), expected)


@pytest.mark.parametrize("speculative", [False, True])
def test_another_processor_over_the_same_proxy_may_be_asked_within_a_call(base, proxy, speculative):
    kad, other = (KADLogitsProcessor(proxy, DualDeferral(0.6)) for _ in range(2))
    settings = {"logits_processor": [kad], **GREEDY, "assistant_model": proxy if speculative else None}
    expected = base.generate(PROMPT, **settings)
    seen = []

    def ask(input_ids):
        text = input_ids.flip(-1)
        with torch.no_grad():
            scores = base(text).logits[:, -1]
        seen.append(other(text, scores))

    assert torch.equal(base.generate(PROMPT, stopping_criteria=[Ask(ask)], **settings), expected)
    assert len(seen) == 9
    text = expected.flip(-1)
    with torch.no_grad():
        p, q = (model(text).logits[:, -1].softmax(-1) for model in (base, proxy))
    torch.testing.assert_close(seen[-1].exp(), DualDeferral(0.6)(p, q), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("speculative", [False, True])
def test_reset_within_a_call_waits_for_its_end(base, proxy, speculative):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {"logits_processor": [kad], **GREEDY, "assistant_model": proxy if speculative else None}
    expected = base.generate(PROMPT, **settings)
    assert kad.state.models.proxy.cached_length > 0
    ids = base.generate(PROMPT, stopping_criteria=[Ask(lambda _: kad.reset())], **settings)
    assert torch.equal(ids, expected)
    assert kad.state.models.proxy.cached_length == 0


def test_a_call_within_a_call_of_the_same_processor_is_refused(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {"logits_processor": [kad], **GREEDY}
    expected = base.generate(PROMPT, **settings)

    def ask(input_ids):
        with pytest.raises(RuntimeError, match="in use by a call of `generate` that calls `generate` again"):
            base.generate(input_ids, **settings)

    assert torch.equal(base.generate(PROMPT, stopping_criteria=[Ask(ask)], **settings), expected)


def test_many_threads_and_one_processor(base, proxy):
    """Each call is answered or refused, and the processor is free at the end."""
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    expected = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    outcomes = []

    def run():
        try:
            outcomes.append(torch.equal(base.generate(PROMPT, logits_processor=[kad], **GREEDY), expected))
        except RuntimeError as error:
            outcomes.append("in use" in str(error))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 8
    assert torch.equal(base.generate(PROMPT, logits_processor=[kad], **GREEDY), expected)
