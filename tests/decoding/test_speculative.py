"""Speculative decoding: same text, every promise of generate kept, no forward wasted."""

import copy
import string
from queue import Empty
from threading import Thread

import pytest
import torch
from run_command import SECONDS
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from transformers_kad import (
    DualDeferral,
    ImplicitReward,
    KADLogitsProcessor,
    PrimalDeferral,
    kad_generate,
)
from transformers_kad.models.by_version import CACHE

GREEDY = {"do_sample": False, "max_new_tokens": 24}
PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 3]])


def new_tokens(ids: torch.Tensor, prompt: torch.Tensor = PROMPT) -> list[int]:
    return ids[0, prompt.shape[1] :].tolist()


class CountForwards:
    """Counts a model's forwards and the tokens in each."""

    def __init__(self, model):
        self.lengths = []
        self.handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.lengths.append(kwargs["input_ids"].shape)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.handle.remove()


class RecordingStreamer:
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.reshape(-1).tolist())

    def end(self):
        self.ended += 1


class StopAfter(StoppingCriteria):
    """Stops once a token id has been emitted, and notes every text that it was asked about."""

    def __init__(self, token):
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return torch.tensor([input_ids[0, -1].item() == self.token])


class StopAtLength(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= self.length])


@pytest.mark.parametrize("base_architecture", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("proxy_architecture", ["llama", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_greedy_text_is_that_of_token_by_token_decoding(base_architecture, proxy_architecture, chunk):
    """Hidden sizes, architectures, sliding windows (8, passed by the text of 72) and chunked prefill."""
    base = tiny_model(base_architecture, hidden=32, seed=1)
    proxy = tiny_model(proxy_architecture, hidden=16, seed=2)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4), num_assistant_tokens=4)
    settings = {"do_sample": False, "max_new_tokens": 60, "logits_processor": [kad], "prefill_chunk_size": chunk}
    one_by_one = base.generate(PROMPT, **settings)
    kad.reset()
    drafted = base.generate(PROMPT, assistant_model=proxy, **settings)
    assert torch.equal(one_by_one, drafted)
    assert 0 < kad.statistics.accepted < kad.statistics.drafted  # both acceptance and refusal happened


@pytest.mark.parametrize("rule", [PrimalDeferral(0.7), ImplicitReward(1.0)])
def test_other_rules_give_the_same_greedy_text(base, proxy, rule):
    reference = tiny_model(seed=9) if rule.needs_reference else None
    kad = KADLogitsProcessor(proxy, rule, reference=reference)
    one_by_one = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    drafted = base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)
    assert torch.equal(one_by_one, drafted)
    assert kad.statistics.drafted > 0


def test_a_round_costs_one_base_forward_and_no_proxy_distribution_twice(base, proxy):
    gamma = 3
    kad = KADLogitsProcessor(proxy, DualDeferral(0.8), num_assistant_tokens=gamma)
    with CountForwards(base) as of_base, CountForwards(proxy) as of_proxy:
        base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)
    statistics = kad.statistics
    assert len(of_base.lengths) == statistics.rounds == statistics.base_forwards
    assert len(of_proxy.lengths) == statistics.proxy_forwards
    # One forward a drafted token, and one more only where a whole draft was accepted.
    whole = statistics.acceptance_histogram[gamma] if len(statistics.acceptance_histogram) > gamma else 0
    assert whole > 0
    assert statistics.proxy_forwards <= statistics.drafted + whole + 1  # + 1: the last round may be cut short
    assert statistics.proxy_forwards <= statistics.rounds * (gamma + 1)
    # Behind the prefill a proxy forward is over one token, a base forward over the draft and the token before it.
    assert of_proxy.lengths[0] == PROMPT.shape
    assert {shape[1] for shape in of_proxy.lengths[1:]} == {1}
    assert max(shape[1] for shape in of_base.lengths[1:]) == gamma + 1


@pytest.mark.parametrize("limit", range(1, 9))
def test_the_length_limit_holds_to_the_token(base, proxy, limit, monkeypatch):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.8), num_assistant_tokens=3)
    settings = {"do_sample": False, "logits_processor": [kad]}
    texts = []
    forward = kad.state.models.proxy._forward
    monkeypatch.setattr(
        kad.state.models.proxy, "_forward", lambda read, *args: texts.append(read.ids) or forward(read, *args)
    )
    ids = base.generate(PROMPT, max_new_tokens=limit, assistant_model=proxy, **settings)
    assert len(new_tokens(ids)) == limit
    assert max(text.shape[1] for text in texts) <= PROMPT.shape[1] + limit - 1  # nothing drafted in vain
    assert torch.equal(ids, base.generate(PROMPT, max_new_tokens=limit, **settings))


def greedy_text(base, proxy, count=24):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.8), num_assistant_tokens=4)
    ids = base.generate(PROMPT, logits_processor=[kad], do_sample=False, max_new_tokens=count)
    return new_tokens(ids)


@pytest.mark.parametrize("position", range(12))
def test_end_of_sequence_ends_the_text_wherever_it_falls_in_a_round(base, proxy, position):
    text = greedy_text(base, proxy)
    eos = text[position]
    first = text.index(eos)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.8), num_assistant_tokens=4)
    ids = base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, eos_token_id=[eos, 49], **GREEDY)
    assert new_tokens(ids) == text[: first + 1]
    statistics = kad.statistics
    assert statistics.tokens == first + 1
    ends_on_draft = statistics.accepted + statistics.rounds - statistics.tokens
    assert ends_on_draft in (0, 1)
    assert sum(statistics.acceptance_histogram) == statistics.rounds
    assert sum(k * h for k, h in enumerate(statistics.acceptance_histogram)) == statistics.accepted


def test_drafts_stop_at_end_of_sequence(base):
    """A proxy that always drafts the end of sequence drafts one token a round."""
    proxy = tiny_model(seed=2)
    eos = 7
    with torch.no_grad():
        proxy.lm_head.weight.zero_()
        proxy.lm_head.weight[eos] = 0.0
    proxy.lm_head.register_forward_hook(lambda module, args, out: out + 50 * (torch.arange(50) == eos))
    kad = KADLogitsProcessor(proxy, DualDeferral(1e-9), num_assistant_tokens=5)  # the base is always sure
    base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, eos_token_id=eos, **GREEDY)
    assert kad.statistics.rounds > 1
    assert kad.statistics.drafted <= kad.statistics.rounds


@pytest.mark.parametrize("position", [0, 1, 2, 3, 5, 8])
def test_custom_stopping_criteria_hold_to_the_token_and_see_every_token_once(base, proxy, position):
    text = greedy_text(base, proxy)
    criterion = StopAfter(text[position])
    kad = KADLogitsProcessor(proxy, DualDeferral(0.8), num_assistant_tokens=4)
    ids = base.generate(
        PROMPT,
        logits_processor=[kad],
        assistant_model=proxy,
        stopping_criteria=StoppingCriteriaList([criterion]),
        **GREEDY,
    )
    first = text.index(text[position])
    assert new_tokens(ids) == text[: first + 1]
    assert criterion.lengths == list(range(PROMPT.shape[1] + 1, ids.shape[1] + 1))


def test_a_users_max_length_criterion_holds(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.8), num_assistant_tokens=4)
    ids = base.generate(
        PROMPT,
        logits_processor=[kad],
        assistant_model=proxy,
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(PROMPT.shape[1] + 6)]),
        **GREEDY,
    )
    assert len(new_tokens(ids)) == 6


@pytest.mark.parametrize("speculative", [False, True])
def test_a_streamer_gets_the_prompt_each_token_once_and_the_end(base, proxy, speculative):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.8))
    streamer = RecordingStreamer()
    assistant = proxy if speculative else None
    ids = base.generate(PROMPT, logits_processor=[kad], assistant_model=assistant, streamer=streamer, **GREEDY)
    assert streamer.puts[0] == PROMPT[0].tolist()
    assert streamer.puts[1:] == [[token] for token in new_tokens(ids)]
    assert streamer.ended == 1


def test_a_streamer_in_a_thread(base, proxy):
    class Identity:
        def decode(self, ids, **kwargs):
            return "".join(f"{i} " for i in ids)

    kad = KADLogitsProcessor(proxy, DualDeferral(0.8))
    expected = new_tokens(base.generate(PROMPT, logits_processor=[kad], **GREEDY))
    streamer = TextIteratorStreamer(Identity(), skip_prompt=True, timeout=SECONDS)
    arguments = {"logits_processor": [kad], "assistant_model": proxy, "streamer": streamer, **GREEDY}
    thread = Thread(target=base.generate, args=(PROMPT,), kwargs=arguments)
    thread.start()
    try:
        text = "".join(streamer)
    except Empty:
        pytest.fail("The streamer never got its end().")
    thread.join()
    assert [int(word) for word in text.split()] == expected


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_are_the_processed_log_r_and_logits_the_bases(base, proxy, do_sample):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5), num_assistant_tokens=3)
    settings = {
        "logits_processor": [kad],
        "max_new_tokens": 10,
        "do_sample": do_sample,
        "temperature": 0.7,
        "top_k": 0,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    torch.manual_seed(5)
    drafted = base.generate(PROMPT, assistant_model=proxy, **settings)
    assert len(drafted.scores) == len(drafted.logits) == 10
    assert isinstance(drafted.past_key_values, DynamicCache)
    assert drafted.past_key_values.get_seq_length() == drafted.sequences.shape[1] - 1
    # The same along the same text: plain forwards of both models, and the rule by hand.
    with torch.no_grad():
        base_logits = base(drafted.sequences).logits[0, PROMPT.shape[1] - 1 : -1]
        q = proxy(drafted.sequences).logits[0, PROMPT.shape[1] - 1 : -1].softmax(-1)
    p = base_logits.softmax(-1)
    log_r = DualDeferral(0.5)(p, q).log() / (0.7 if do_sample else 1.0)
    torch.testing.assert_close(torch.cat(drafted.logits), base_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(drafted.scores), log_r, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("speculative", [False, True])
def test_stop_strings(base, proxy, speculative):
    """With a tokenizer of single characters."""
    vocabulary = {character: i for i, character in enumerate(string.ascii_letters[:50])}
    plain = Tokenizer(models.BPE(vocabulary, merges=[]))
    plain.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    text = greedy_text(base, proxy)
    stop = tokenizer.decode(text[3:5])
    end = next(i for i in range(len(text)) if tokenizer.decode(text[i : i + 2]) == stop) + 2
    kad = KADLogitsProcessor(proxy, DualDeferral(0.8), num_assistant_tokens=4)
    settings = {
        "logits_processor": [kad],
        "assistant_model": proxy if speculative else None,
        "tokenizer": tokenizer,
    }
    ids = base.generate(PROMPT, stop_strings=[stop], **settings, **GREEDY)
    assert new_tokens(ids) == text[:end]
    config = GenerationConfig(stop_strings=[stop], pad_token_id=0, **GREEDY)
    ids = base.generate(PROMPT, generation_config=config, **settings)
    assert new_tokens(ids) == text[:end]
    assert config.stop_strings == [stop]
    other = tokenizer.decode(text[7:9])
    end_of_other = next(i for i in range(len(text)) if tokenizer.decode(text[i : i + 2]) == other) + 2
    for with_other in (config, GenerationConfig(pad_token_id=0, **GREEDY)):
        ids = base.generate(PROMPT, generation_config=with_other, stop_strings=[other], **settings)
        assert new_tokens(ids) == text[:end_of_other]
    own = copy.deepcopy(base)
    own.generation_config.stop_strings = [stop]
    assert new_tokens(own.generate(PROMPT, **settings, **GREEDY)) == text[:end]
    with pytest.raises(ValueError, match="tokenizer"):
        base.generate(PROMPT, stop_strings=[stop], logits_processor=[kad], assistant_model=proxy, **GREEDY)


class Bias(LogitsProcessor):
    """Adds to one id's score depending on the text's length; notes the lengths that it saw."""

    def __init__(self, strength):
        self.strength, self.lengths = strength, []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores + self.strength * torch.nn.functional.one_hot(torch.tensor(input_ids.shape[1] % 50), 50)


def test_user_processors_before_and_after_keep_their_meaning(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=3)
    before, after = Bias(3.0), Bias(-2.0)
    settings = {"logits_processor": [before, kad, after], "repetition_penalty": 1.3, **GREEDY}
    one_by_one = base.generate(PROMPT, **settings)
    before.lengths.clear()
    drafted = base.generate(PROMPT, assistant_model=proxy, **settings)
    assert torch.equal(one_by_one, drafted)
    plain = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    assert not torch.equal(plain, drafted)
    assert before.lengths == after.lengths[len(one_by_one[0]) - PROMPT.shape[1] :]


class Parity(LogitsProcessor):
    """Keeps a state: every second call it prefers even ids. Notes the lengths that it saw."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores + 3.0 * (torch.arange(50) % 2 == len(self.lengths) % 2)


@pytest.mark.parametrize("before", [True, False])
def test_processors_with_a_state_are_called_as_token_by_token(base, proxy, before):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=4)
    texts, lengths = [], []
    for assistant in (None, proxy):
        own = Parity()
        processors = [own, kad] if before else [kad, own]
        texts.append(base.generate(PROMPT, logits_processor=processors, assistant_model=assistant, **GREEDY))
        lengths.append(own.lengths)
    assert torch.equal(*texts)
    assert lengths[0] == lengths[1] == list(range(PROMPT.shape[1], PROMPT.shape[1] + 24))


def test_classifier_free_guidance_which_keeps_a_cache(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=4)
    settings = {"logits_processor": [kad], "guidance_scale": 1.7, **GREEDY}
    one_by_one = base.generate(PROMPT, **settings)
    assert torch.equal(one_by_one, base.generate(PROMPT, assistant_model=proxy, **settings))
    assert not torch.equal(one_by_one, base.generate(PROMPT, logits_processor=[kad], **GREEDY))


@pytest.mark.parametrize("role", ["base", "proxy"])
def test_drafts_end_where_a_context_does(role):
    """The text ends in time, at the last position of GPT-2's table; a draft of ten would not."""
    short = {"n_positions": PROMPT.shape[1] + 8}
    base = tiny_model("gpt2", hidden=32, seed=1, **(short if role == "base" else {}))
    proxy = tiny_model("gpt2", seed=2, **(short if role == "proxy" else {}))
    kad = KADLogitsProcessor(proxy, DualDeferral(0.8), num_assistant_tokens=10)
    settings = {"logits_processor": [kad], "do_sample": False}
    expected = base.generate(PROMPT, max_new_tokens=8, **settings)
    criterion = StoppingCriteriaList([MaxLengthCriteria(PROMPT.shape[1] + 8)])
    ids = base.generate(PROMPT, assistant_model=proxy, max_new_tokens=8, stopping_criteria=criterion, **settings)
    assert torch.equal(ids, expected)
    last = StopAtLength(PROMPT.shape[1] + 8)  # not known to the drafts as a limit
    ids = base.generate(PROMPT, assistant_model=proxy, max_new_tokens=100, stopping_criteria=[last], **settings)
    assert torch.equal(ids, expected)


def test_a_cache_that_holds_more_than_the_ids_is_refused(base, proxy):
    kad = KADLogitsProcessor(proxy)
    cache = base(PROMPT[:, :9]).past_key_values
    with pytest.raises(ValueError, match="holds 9 tokens, more than the 3"):
        base.generate(PROMPT[:, 9:], **{CACHE: cache}, logits_processor=[kad], assistant_model=proxy, **GREEDY)


def test_a_left_padded_prompt(base, proxy):
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    expected = new_tokens(base.generate(PROMPT, logits_processor=[kad], **GREEDY))
    for assistant in (None, proxy):
        ids = base.generate(padded, attention_mask=mask, logits_processor=[kad], assistant_model=assistant, **GREEDY)
        assert new_tokens(ids, padded) == expected


def test_a_cache_of_the_users_is_continued(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    first = base.generate(
        PROMPT, logits_processor=[kad], assistant_model=proxy, return_dict_in_generate=True, **GREEDY
    )
    longer = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    expected = base.generate(longer, logits_processor=[kad], **GREEDY)
    with CountForwards(base) as of_base:
        ids = base.generate(
            longer,
            **{CACHE: first.past_key_values},
            logits_processor=[kad],
            assistant_model=proxy,
            **GREEDY,
        )
    assert torch.equal(ids, expected)
    assert of_base.lengths[0][1] <= 4 + kad.num_assistant_tokens  # three new tokens and the one not yet forwarded


def test_the_loop_as_custom_generate(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.8))
    expected = base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)
    streamer = RecordingStreamer()
    ids = base.generate(PROMPT, logits_processor=[kad], custom_generate=kad_generate, streamer=streamer, **GREEDY)
    assert torch.equal(ids, expected)
    assert streamer.ended == 1
    with pytest.raises(ValueError, match="needs a `KADLogitsProcessor`"):
        base.generate(PROMPT, custom_generate=kad_generate, **GREEDY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_proxy_of_another_dtype(base, dtype):
    proxy = tiny_model(seed=2).to(dtype)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    for do_sample in (False, True):
        torch.manual_seed(0)
        ids = base.generate(
            PROMPT, logits_processor=[kad], assistant_model=proxy, max_new_tokens=8, do_sample=do_sample, top_k=0
        )
        assert len(new_tokens(ids)) == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("proxy_device", ["cpu", "cuda"])
def test_base_and_proxy_on_devices(proxy_device):
    base, proxy = tiny_model(hidden=32, seed=1).cuda(), tiny_model(seed=2).to(proxy_device)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    one_by_one = base.generate(PROMPT.cuda(), logits_processor=[kad], **GREEDY)
    drafted = base.generate(PROMPT.cuda(), logits_processor=[kad], assistant_model=proxy, **GREEDY)
    assert torch.equal(one_by_one, drafted)


@pytest.mark.parametrize(("base_size", "proxy_size"), [(50, 56), (56, 50)])
def test_vocabularies_that_differ_by_padding(base_size, proxy_size):
    base = tiny_model(hidden=32, seed=1, vocabulary=base_size)
    proxy = tiny_model(seed=2, vocabulary=proxy_size)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    one_by_one = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    drafted = base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)
    assert torch.equal(one_by_one, drafted)
    torch.manual_seed(0)
    ids = base.generate(
        PROMPT, logits_processor=[kad], assistant_model=proxy, do_sample=True, top_k=0, max_new_tokens=60
    )
    assert int(ids.max()) < base_size


def test_two_runs_with_equal_seeds_are_equal(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5), trace=True)
    runs = []
    for _ in range(2):
        kad.reset()  # what the cache spares differs from a prefill by rounding
        torch.manual_seed(11)
        ids = base.generate(
            PROMPT, logits_processor=[kad], assistant_model=proxy, do_sample=True, top_k=0, max_new_tokens=30
        )
        runs.append((ids.tolist(), kad.statistics, kad.trace))
    assert runs[0] == runs[1]


def test_the_trace_of_a_speculative_call(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5), trace=True)
    torch.manual_seed(3)
    ids = base.generate(
        PROMPT, logits_processor=[kad], assistant_model=proxy, do_sample=True, top_k=0, max_new_tokens=30
    )
    assert [record.token_id for record in kad.trace] == new_tokens(ids)
    assert sum(record.drafted for record in kad.trace) == kad.statistics.accepted
    with torch.no_grad():
        p = base(ids).logits[0, PROMPT.shape[1] - 1 : -1].softmax(-1)
        q = proxy(ids).logits[0, PROMPT.shape[1] - 1 : -1].softmax(-1)
    deferral = p < 0.5
    mass = (p * deferral).sum(-1)
    for at, (record, token) in enumerate(zip(kad.trace, new_tokens(ids), strict=True)):
        r = float(p[at, token] * ~deferral[at, token] + mass[at] * q[at, token])
        expected = (float(p[at, token]), float(q[at, token]), r, float(mass[at]))
        got = (record.base_prob, record.proxy_prob, record.target_prob, record.deferral_mass)
        assert got == pytest.approx(expected, abs=1e-5)
        assert record.proxy_share == pytest.approx(float(q[at, token] * mass[at]) / r, abs=1e-4)
    assert kad.statistics.deferral_mass == pytest.approx(float(mass.mean()), abs=1e-5)


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_outputs_that_the_loop_does_not_collect_are_refused(base, proxy, name):
    kad = KADLogitsProcessor(proxy)
    with pytest.raises(ValueError, match=name):
        base.generate(
            PROMPT,
            logits_processor=[kad],
            assistant_model=proxy,
            return_dict_in_generate=True,
            **{name: True},
            **GREEDY,
        )


def test_caches_that_cannot_take_tokens_back_are_refused(base, proxy):
    settings = {"logits_processor": [KADLogitsProcessor(proxy)], "cache_implementation": "static", **GREEDY}
    with pytest.raises(ValueError, match="from a static or quantized cache"):
        base.generate(PROMPT, assistant_model=proxy, **settings)


def test_a_base_without_a_cache_reads_its_text_again_in_every_round(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {"logits_processor": [kad], "use_cache": False, **GREEDY}
    expected = base.generate(PROMPT, **settings)
    assert torch.equal(base.generate(PROMPT, assistant_model=proxy, **settings), expected)
    assert kad.statistics.base_forwards < expected.shape[1] - PROMPT.shape[1]


@pytest.mark.parametrize("role", ["base", "proxy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("do_sample", [False, True])
def test_broken_logits_name_the_model_and_the_position(role, value, do_sample):
    models = {"base": tiny_model(hidden=32, seed=1), "proxy": tiny_model(seed=2)}
    broken = models[role]
    # Broken from the fourth new token on, which a draft of five reaches in its middle.
    limit = PROMPT.shape[1] + 2

    def spoil(module, args, kwargs, output):
        positions = output.past_key_values.get_seq_length() - torch.arange(output.logits.shape[1]).flip(0)
        output.logits[:, positions > limit] = value
        return output

    broken.register_forward_hook(spoil, with_kwargs=True)
    kad = KADLogitsProcessor(models["proxy"], DualDeferral(0.9))
    for assistant in (None, models["proxy"]):
        settings = {"max_new_tokens": 20, "do_sample": do_sample, "top_k": 0}
        with pytest.raises(ValueError, match=rf"logits of the {role}.* position {limit + 1} of sequence 0"):
            base_model = models["base"]
            base_model.generate(PROMPT, logits_processor=[kad], assistant_model=assistant, **settings)
