"""Token by token: every decoding of generate that takes processors, and the proxy's cache behind it."""

import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_models import tiny_model
from transformers import BartConfig, BartForConditionalGeneration, LogitsProcessor, StoppingCriteria
from transformers.cache_utils import DynamicCache

from transformers_kad import (
    DualDeferral,
    ExactDeferral,
    ImplicitReward,
    KADConfig,
    KADLogitsProcessor,
    PrimalDeferral,
)

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])
OTHER = torch.tensor([[40, 2, 2, 11, 30]])
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def log_r(base, proxy, text, rule):
    """log r for the token after a text `(1, L)`, without caches."""
    with torch.no_grad():
        p, q = (model(text).logits[:, -1].softmax(-1) for model in (base, proxy))
    return rule(p, q).log()


def greedy_by_hand(base, proxy, prompt, rule, count=12):
    text = prompt
    for _ in range(count):
        text = torch.cat([text, log_r(base, proxy, text, rule).argmax(-1, keepdim=True)], dim=1)
    return text


class ProxyCalls:
    """The shapes of the ids that the proxy was forwarded on."""

    def __init__(self, proxy):
        self.shapes = []
        self.handle = proxy.register_forward_pre_hook(
            lambda module, args, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )

    def __enter__(self):
        return self.shapes

    def __exit__(self, *exception):
        self.handle.remove()


@pytest.mark.parametrize("rule", [DualDeferral(0.4), PrimalDeferral(0.8), ExactDeferral(0.8)])
def test_greedy_is_argmax_r_at_every_position(base, proxy, rule):
    kad = KADLogitsProcessor(proxy, rule)
    ids = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    assert torch.equal(ids, greedy_by_hand(base, proxy, PROMPT, rule))


def test_scores_are_log_r_at_every_position(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    torch.manual_seed(0)
    output = base.generate(
        PROMPT,
        logits_processor=[kad],
        do_sample=True,
        top_k=0,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for at, scores in enumerate(output.scores):
        text = output.sequences[:, : PROMPT.shape[1] + at]
        torch.testing.assert_close(scores, log_r(base, proxy, text, DualDeferral(0.4)), atol=1e-4, rtol=1e-4)


def test_component_temperature_divides_both_models_logits(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4), component_temperature=0.5)
    with torch.no_grad():
        scores = base(PROMPT).logits[:, -1]
        q = (proxy(PROMPT).logits[:, -1] / 0.5).softmax(-1)
    expected = DualDeferral(0.4)((scores / 0.5).softmax(-1), q)
    torch.testing.assert_close(kad(PROMPT, scores).exp(), expected, atol=1e-5, rtol=1e-4)


def test_rows_of_a_left_padded_batch_decode_as_alone(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    alone = [base.generate(p, logits_processor=[kad], **GREEDY)[0, p.shape[1] :] for p in (PROMPT, OTHER)]
    width = PROMPT.shape[1]
    padded = torch.cat([PROMPT, torch.nn.functional.pad(OTHER, (width - OTHER.shape[1], 0))])
    mask = torch.ones_like(padded)
    mask[1, : width - OTHER.shape[1]] = 0
    ids = base.generate(padded, attention_mask=mask, logits_processor=[kad], **GREEDY)
    assert torch.equal(ids[:, width:], torch.stack(alone))
    # Without a mask `generate` infers it from the padding, and the proxy must agree.
    ids = base.generate(padded, logits_processor=[kad], **GREEDY)
    assert torch.equal(ids[:, width:], torch.stack(alone))


def test_num_return_sequences_follow_their_own_texts(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    torch.manual_seed(0)
    output = base.generate(
        torch.cat([PROMPT, PROMPT.flip(1)]),
        logits_processor=[kad],
        do_sample=True,
        top_k=0,
        num_return_sequences=3,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len({tuple(row) for row in output.sequences.tolist()}) > 2
    for row in range(6):
        for at in range(6):
            text = output.sequences[row : row + 1, : PROMPT.shape[1] + at]
            expected = log_r(base, proxy, text, DualDeferral(0.4))
            torch.testing.assert_close(output.scores[at][row : row + 1], expected, atol=1e-4, rtol=1e-4)
    assert len(kad.statistics.sequences) == 6


def beam_search_by_hand(base, proxy, prompt, rule, beams, count):
    """Beam search over texts of a fixed length, without caches."""
    texts, totals = prompt, torch.zeros(1)
    for _ in range(count):
        scores = totals[:, None] + torch.cat([log_r(base, proxy, text[None], rule) for text in texts])
        best = scores.flatten().topk(beams)
        rows, tokens = best.indices // scores.shape[1], best.indices % scores.shape[1]
        texts, totals = torch.cat([texts[rows], tokens[:, None]], dim=1), best.values
    return texts


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_beam_search_matches_rows_by_prefix(base, architecture):
    proxy = tiny_model(architecture, seed=2)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    with ProxyCalls(proxy) as shapes:
        ids = base.generate(
            PROMPT, logits_processor=[kad], num_beams=4, num_return_sequences=4, do_sample=False, max_new_tokens=10
        )
    assert torch.equal(ids, beam_search_by_hand(base, proxy, PROMPT, DualDeferral(0.6), 4, 10))
    assert shapes[1:] == [(4, 1)] * 9  # reordered, never filled anew
    # D of the beams that survived, followed through the steps.
    with torch.no_grad():
        p = base(ids).logits[:, PROMPT.shape[1] - 1 : -1].softmax(-1)
    mass = (p * (p < 0.6)).sum(-1).mean(-1)
    assert [s.deferral_mass for s in kad.statistics.sequences] == pytest.approx(mass.tolist(), abs=1e-4)


def test_beams_of_a_batch(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {"logits_processor": [kad], "num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    both = base.generate(torch.cat([PROMPT, PROMPT.flip(1)]), **settings)
    alone = [base.generate(prompt, **settings)[0] for prompt in (PROMPT, PROMPT.flip(1))]
    assert torch.equal(both, torch.stack(alone))


def test_the_proxy_runs_one_token_a_row_and_step(base, proxy):
    kad = KADLogitsProcessor(proxy)
    with ProxyCalls(proxy) as shapes:
        base.generate(PROMPT.repeat(3, 1), logits_processor=[kad], **GREEDY)
    assert shapes == [(3, PROMPT.shape[1])] + [(3, 1)] * 11
    assert kad.statistics.proxy_forwards == kad.statistics.base_forwards == 12


def test_a_chat_that_continues_forwards_only_what_is_new(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    with ProxyCalls(proxy) as shapes:  # from the first turn on: a hook that is new may change what the model computes
        first = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
        longer = torch.cat([first, OTHER], dim=1)
        turn = len(shapes)
        ids = base.generate(longer, logits_processor=[kad], **GREEDY)
    # The last token of the first turn was never forwarded.
    assert shapes[turn] == (1, OTHER.shape[1] + 1)
    assert torch.equal(ids, greedy_by_hand(base, proxy, longer, DualDeferral(0.4)))


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_calls_that_share_nothing_or_a_part_or_all(base, architecture):
    proxy = tiny_model(architecture, seed=2)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    half = torch.cat([PROMPT[:, :4], OTHER], dim=1)
    for prompt in (PROMPT, OTHER, PROMPT, PROMPT, half, PROMPT[:, :3], PROMPT.repeat(2, 1), PROMPT):
        ids = base.generate(prompt, logits_processor=[kad], **GREEDY)
        assert torch.equal(ids[:1], greedy_by_hand(base, proxy, prompt[:1], DualDeferral(0.4)))


class Explode(LogitsProcessor):
    """Raises at a text length, once."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            self.length = -1
            raise InterruptedError("stopped half way")
        return scores


@pytest.mark.parametrize("speculative", [False, True])
def test_a_call_after_an_exception_half_way(base, proxy, speculative):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    settings = {"logits_processor": [kad], "assistant_model": proxy if speculative else None, **GREEDY}
    expected = base.generate(PROMPT, **settings)
    statistics = kad.statistics
    bomb = Explode(PROMPT.shape[1] + 5)
    with pytest.raises(InterruptedError):
        base.generate(PROMPT, **{**settings, "logits_processor": [kad, bomb]})
    assert kad.statistics is statistics  # those of the last finished call
    assert torch.equal(base.generate(PROMPT, **settings), expected)


def test_a_call_after_an_exception_inside_the_proxy(base, proxy):
    """Its first layer is then one token ahead of the second."""
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    expected = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    calls = iter(range(100))

    def fail(module, args, kwargs):
        if next(calls) == 3:
            raise InterruptedError("stopped half way")

    handle = proxy.model.layers[1].register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(InterruptedError):
        base.generate(OTHER, logits_processor=[kad], **GREEDY)
    handle.remove()
    assert torch.equal(base.generate(PROMPT, logits_processor=[kad], **GREEDY), expected)


def lora_proxy() -> PeftModel:
    """A tiny proxy with two adapters, `default` and `other`, that both change it."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(seed=2), config)
    model.add_adapter("other", config)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("speculative", [False, True])
def test_a_change_of_adapter_or_weights_between_calls_is_seen(base, speculative):
    proxy = lora_proxy()
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    texts = []

    def check():
        ids = base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy if speculative else None, **GREEDY)
        assert torch.equal(ids, greedy_by_hand(base, proxy, PROMPT, DualDeferral(0.4)))
        texts.append(tuple(ids[0].tolist()))

    check()
    proxy.set_adapter("other")
    check()
    with proxy.disable_adapter():
        check()
    check()
    for module in proxy.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.2)
    check()
    proxy.merge_adapter(["default"])
    proxy.unmerge_adapter()
    with torch.no_grad():
        proxy.get_base_model().lm_head.weight.mul_(-1)
    check()
    assert len(set(texts)) >= 4  # the changes changed the text


@pytest.mark.parametrize("speculative", [False, True])
def test_implicit_reward_takes_q0_from_the_adapter_switched_off(base, speculative):
    proxy = lora_proxy()
    reference = tiny_model(seed=2)
    own = KADLogitsProcessor(proxy, ImplicitReward(0.8))
    given = KADLogitsProcessor(proxy, ImplicitReward(0.8), reference=reference)
    settings = {"assistant_model": proxy if speculative else None, **GREEDY}
    ids = base.generate(PROMPT, logits_processor=[own], **settings)
    assert torch.equal(ids, base.generate(PROMPT, logits_processor=[given], **settings))
    assert own.statistics.deferral_mass is None
    assert proxy.active_adapters == ["default"]
    assert proxy.get_model_status().enabled is True
    with torch.no_grad():
        p, q, q0 = (model(ids[:, :-1]).logits[:, -1].softmax(-1) for model in (base, proxy, reference))
    assert int(ImplicitReward(0.8)(p, q, q0).argmax()) == int(ids[0, -1])


def test_the_adapter_is_switched_on_again_after_an_exception_in_the_reference(base):
    proxy = lora_proxy()
    kad = KADLogitsProcessor(proxy, ImplicitReward(1.0))
    calls = iter(range(100))

    def fail(module, args, kwargs):
        if next(calls) == 1:  # the reference's first forward
            raise InterruptedError("stopped half way")

    handle = proxy.get_base_model().model.layers[1].register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(InterruptedError):
        base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    handle.remove()
    assert proxy.get_model_status().enabled is True
    ids = base.generate(PROMPT, logits_processor=[KADLogitsProcessor(proxy)], **GREEDY)
    assert torch.equal(ids, greedy_by_hand(base, proxy, PROMPT, DualDeferral(0.4)))


@pytest.mark.parametrize("speculative", [False, True])
def test_a_prompt_of_the_proxys_own(base, proxy, speculative):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {"logits_processor": [kad], "assistant_model": proxy if speculative else None, **GREEDY}
    with kad.proxy_prompt({"input_ids": OTHER, "attention_mask": torch.ones_like(OTHER)}):
        ids = base.generate(PROMPT, **settings)
    text = PROMPT
    for _ in range(12):
        own = torch.cat([OTHER, text[:, PROMPT.shape[1] :]], dim=1)
        with torch.no_grad():
            p, q = base(text).logits[:, -1].softmax(-1), proxy(own).logits[:, -1].softmax(-1)
        text = torch.cat([text, DualDeferral(0.6)(p, q).argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ids, text)
    assert not torch.equal(base.generate(PROMPT, **settings), text)  # only inside the block


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "beams", "best two"],
)
@pytest.mark.parametrize("rule", [DualDeferral(0.6), ImplicitReward(0.7)])
def test_the_proxys_own_prompts_of_a_batch(base, proxy, rule, settings):
    """Base prompts and proxy prompts of different lengths, both padded: every row decodes as it would alone."""
    reference = tiny_model("llama", seed=9) if rule.needs_reference else None
    kad = KADLogitsProcessor(proxy, rule, reference=reference)
    arguments = {"logits_processor": [kad], **GREEDY, **settings}
    prompts = [PROMPT, OTHER]
    own = [torch.tensor([[7, 7, 30]]), torch.tensor([[21, 4, 33, 12, 6, 2, 19]])]
    alone = []
    for prompt, own_prompt in zip(prompts, own, strict=True):
        kad.reset()
        with kad.proxy_prompt(own_prompt):
            alone.append(base.generate(prompt, **arguments)[:, prompt.shape[1] :])
    ids, mask = pad_left(prompts)
    own_ids, own_mask = pad_left(own)
    kad.reset()
    with kad.proxy_prompt({"input_ids": own_ids, "attention_mask": own_mask}):
        together = base.generate(ids, attention_mask=mask, **arguments)[:, ids.shape[1] :]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(base.generate(ids, attention_mask=mask, **arguments)[:, ids.shape[1] :], together)


def pad_left(prompts):
    width = max(prompt.shape[1] for prompt in prompts)
    padded = [torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts]
    masks = [torch.nn.functional.pad(torch.ones_like(prompt), (width - prompt.shape[1], 0)) for prompt in prompts]
    return torch.cat(padded), torch.cat(masks)


def test_a_proxy_prompt_padded_on_the_right_is_refused(proxy):
    kad = KADLogitsProcessor(proxy)
    ids, mask = torch.tensor([[4, 6, 0], [1, 2, 3]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    with pytest.raises(ValueError, match="padding_side"), kad.proxy_prompt({"input_ids": ids, "attention_mask": mask}):
        pass


@pytest.mark.parametrize("given", ["Hello", None, [[1, 2]], {"attention_mask": torch.ones(1, 2)}])
def test_a_proxy_prompt_that_is_none_is_refused(proxy, given):
    kad = KADLogitsProcessor(proxy)
    with pytest.raises(TypeError, match="takes a tensor of ids, or a mapping"), kad.proxy_prompt(given):
        pass


def test_a_proxy_prompt_of_another_vocabulary_is_refused(proxy):
    """Its ids are the proxy's own: those beyond its vocabulary would be read as padding."""
    kad, ids = KADLogitsProcessor(proxy), torch.tensor([[7, 49]])
    with kad.proxy_prompt(ids):
        pass
    with pytest.raises(ValueError, match=r"id 50, .* ends at 50"), kad.proxy_prompt(ids + 1):
        pass


def test_a_proxy_prompt_with_a_mask_of_lists_is_refused(proxy):
    kad, given = KADLogitsProcessor(proxy), {"input_ids": torch.tensor([[1, 2]]), "attention_mask": [[1, 1]]}
    with pytest.raises(TypeError, match="got a mask of type list"), kad.proxy_prompt(given):
        pass


def test_a_proxy_prompt_of_lists_is_refused(proxy):
    kad = KADLogitsProcessor(proxy)
    with pytest.raises(TypeError, match="got ids of type list"), kad.proxy_prompt({"input_ids": [[1, 2]]}):
        pass


def test_embeddings_as_prompt_need_ids_for_the_proxy(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    embeds = base.get_input_embeddings()(PROMPT).detach()
    with pytest.raises(ValueError, match="proxy_prompt"):
        base.generate(inputs_embeds=embeds, logits_processor=[kad], **GREEDY)
    with kad.proxy_prompt(PROMPT):
        ids = base.generate(inputs_embeds=embeds, logits_processor=[kad], **GREEDY)
    expected = greedy_by_hand(base, proxy, PROMPT, DualDeferral(0.6))
    assert torch.equal(ids, expected[:, PROMPT.shape[1] :])


def test_without_a_prompt_the_text_starts_from_bos(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    ids = base.generate(bos_token_id=5, logits_processor=[kad], **GREEDY)
    assert torch.equal(ids, greedy_by_hand(base, proxy, torch.tensor([[5]]), DualDeferral(0.6)))
    assert kad.statistics.tokens == 12


@pytest.mark.parametrize("speculative", [False, True])
def test_banned_tokens_never_come_back_through_q(base, proxy, speculative):
    kad = KADLogitsProcessor(proxy, DualDeferral(1.0))  # all but everything is the proxy's
    banned = proxy(PROMPT).logits[0, -1].topk(10).indices.tolist()
    torch.manual_seed(0)
    ids = base.generate(
        PROMPT,
        logits_processor=[kad],
        assistant_model=proxy if speculative else None,
        suppress_tokens=banned,
        do_sample=True,
        top_k=0,
        max_new_tokens=60,
    )
    assert not set(ids[0, PROMPT.shape[1] :].tolist()) & set(banned)


def test_statistics_of_finished_rows_stop_at_their_end(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4), trace=True)
    prompts = torch.cat([PROMPT, PROMPT.flip(1)])
    free = base.generate(prompts, logits_processor=[kad], **GREEDY)[:, PROMPT.shape[1] :]
    eos = int(free[0, 3])
    lengths = [row.index(eos) + 1 if eos in row else 12 for row in free.tolist()]
    base.generate(prompts, logits_processor=[kad], eos_token_id=eos, **GREEDY)
    assert lengths[0] <= 4 < lengths[1]
    assert [s.tokens for s in kad.statistics.sequences] == lengths
    assert kad.statistics.tokens == kad.statistics.rounds == sum(lengths)
    assert [len(records) for records in kad.trace.sequences] == lengths
    for row, records in enumerate(kad.trace.sequences):
        assert [record.token_id for record in records] == free[row, : lengths[row]].tolist()


def test_the_trace_token_by_token_is_that_of_the_speculative_call(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), trace=True)
    base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    one_by_one = kad.trace
    base.generate(PROMPT, logits_processor=[kad], assistant_model=proxy, **GREEDY)
    assert len(one_by_one) == len(kad.trace) == 12
    for a, b in zip(one_by_one, kad.trace, strict=True):
        assert a.token_id == b.token_id
        assert (a.base_prob, a.proxy_prob, a.target_prob) == pytest.approx(
            (b.base_prob, b.proxy_prob, b.target_prob), abs=1e-5
        )
    assert not any(record.drafted for record in one_by_one)


def test_rows_ended_by_a_criterion_are_counted_without_their_padding(base, proxy):
    class StopAt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([int(row[-1]) % 3 == 1 for row in input_ids])

    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    torch.manual_seed(2)
    ids = base.generate(
        PROMPT,
        logits_processor=[kad],
        stopping_criteria=[StopAt()],
        do_sample=True,
        top_k=0,
        num_return_sequences=4,
        max_new_tokens=20,
        eos_token_id=49,
        suppress_tokens=[0, 49],  # 0 is the padding
    )[:, PROMPT.shape[1] :]
    lengths = [int((row != 0).sum()) for row in ids]
    assert min(lengths) < max(lengths)
    assert [s.tokens for s in kad.statistics.sequences] == lengths


def test_without_an_end_of_sequence_the_padding_id_is_a_token_like_others(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    all_but_padding = list(range(1, 50))
    base.generate(
        PROMPT.repeat(2, 1), logits_processor=[kad], suppress_tokens=all_but_padding, do_sample=False, max_new_tokens=5
    )
    assert [s.tokens for s in kad.statistics.sequences] == [5, 5]


def test_a_prompt_changed_in_place_is_another_prompt(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(1.0))
    ids = PROMPT.clone()
    base.generate(ids, logits_processor=[kad], do_sample=False, max_new_tokens=1)
    ids[0, :4] = torch.tensor([30, 31, 32, 33])
    got = base.generate(ids, logits_processor=[kad], **GREEDY)
    assert torch.equal(got, greedy_by_hand(base, proxy, ids, DualDeferral(1.0)))


@pytest.mark.parametrize("speculative", [False, True])
def test_a_token_that_only_the_base_has_is_read_by_the_proxy_as_padding(proxy, speculative):
    base = tiny_model(hidden=32, seed=1, vocabulary=60)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.01))
    prompt = torch.cat([PROMPT, torch.tensor([[55, 3]])], dim=1)
    settings = {"logits_processor": [kad], "assistant_model": proxy if speculative else None}
    ids = base.generate(prompt, suppress_tokens=list(range(50)), do_sample=False, max_new_tokens=3, **settings)
    assert int(ids[:, -3:].min()) >= 50
    ids = base.generate(prompt, do_sample=False, max_new_tokens=1, **settings)
    with torch.no_grad():
        p = base(prompt).logits[:, -1].softmax(-1)
        q = proxy(prompt.where(prompt < 50, 0)).logits[:, -1].softmax(-1)
    expected = DualDeferral(0.01)(p, torch.nn.functional.pad(q, (0, 10))).argmax(-1)
    assert torch.equal(ids[:, -1], expected)


def test_by_hand_outside_generate(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    for text in (PROMPT, OTHER, torch.cat([OTHER, PROMPT], dim=1), PROMPT.repeat(2, 1)):
        with torch.no_grad():
            scores = base(text).logits[:, -1]
        expected = log_r(base, proxy, text, DualDeferral(0.4))
        torch.testing.assert_close(kad(text, scores), expected, atol=1e-4, rtol=1e-4)
    assert kad.statistics is None


class Wait(StoppingCriteria):
    """Holds a call open until it is told to go on."""

    def __init__(self):
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        self.reached.set()
        assert self.go_on.wait(60)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Inside(LogitsProcessor):
    """A processor of the user's that asks KAD by hand."""

    def __init__(self, kad):
        self.kad = kad

    def __call__(self, input_ids, scores):
        return self.kad(input_ids, scores)


def test_inside_another_processor_it_serves_texts_without_padding_and_refuses_others(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    expected = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    assert torch.equal(base.generate(PROMPT, logits_processor=[Inside(kad)], **GREEDY), expected)
    ids = torch.cat([PROMPT, PROMPT])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for settings in ({}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(RuntimeError, match=r"asked by hand about texts \(.*whose prompts are padded"):
            base.generate(ids, attention_mask=mask, logits_processor=[Inside(kad)], **{**GREEDY, **settings})
    assert torch.equal(base.generate(PROMPT, logits_processor=[kad], **GREEDY), expected)


def test_a_second_thread_is_refused_while_a_call_is_open(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    expected = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    wait, results = Wait(), []
    settings = {"logits_processor": [kad], "stopping_criteria": [wait], **GREEDY}
    thread = threading.Thread(target=lambda: results.append(base.generate(PROMPT, **settings)))
    thread.start()
    assert wait.reached.wait(60)
    with pytest.raises(RuntimeError, match="in use by another call"):
        base.generate(OTHER, logits_processor=[kad], **GREEDY)
    with pytest.raises(RuntimeError, match="another thread"):
        kad(OTHER, torch.zeros(1, 50))
    with pytest.raises(RuntimeError, match="another thread"):
        kad.reset()
    wait.go_on.set()
    thread.join()
    assert torch.equal(results[0], expected)
    assert base.generate(OTHER, logits_processor=[kad], **GREEDY).shape[1] == OTHER.shape[1] + 12


def test_calls_from_one_thread_after_another(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.4))
    expected = base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    results = []
    for _ in range(2):
        thread = threading.Thread(
            target=lambda: results.append(base.generate(PROMPT, logits_processor=[kad], **GREEDY))
        )
        thread.start()
        thread.join()
    assert all(torch.equal(ids, expected) for ids in results)
    assert len(results) == 2


def test_from_config_and_repr(proxy):
    config = KADConfig(rule="primal", parameters={"budget": 0.8}, component_temperature=0.7, num_assistant_tokens=3)
    kad = KADLogitsProcessor.from_config(proxy, config, trace=True)
    assert (kad.rule, kad.component_temperature, kad.num_assistant_tokens) == (PrimalDeferral(0.8), 0.7, 3)
    assert kad.settings.trace
    assert "PrimalDeferral(budget=0.8)" in repr(kad)
    assert "LlamaForCausalLM" in repr(kad)


def test_the_default_rule_is_dual_with_threshold_04(proxy):
    assert KADLogitsProcessor(proxy).rule == DualDeferral(0.4)


class Vocabulary:
    def __init__(self, **tokens):
        self.tokens = tokens

    def get_vocab(self):
        return self.tokens


def test_tokenizers_are_compared(proxy):
    same = Vocabulary(a=0, b=1, c=2)
    KADLogitsProcessor(proxy, tokenizer=same, proxy_tokenizer=Vocabulary(a=0, b=1, c=2, pad=3))
    with pytest.raises(ValueError, match="1: 'b' and 'x'"):
        KADLogitsProcessor(proxy, tokenizer=same, proxy_tokenizer=Vocabulary(a=0, x=1, c=2))
    with pytest.raises(ValueError, match="`tokenizer` as well"):
        KADLogitsProcessor(proxy, proxy_tokenizer=same)
    assert KADLogitsProcessor(proxy, tokenizer=same).tokenizer is same


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rule": "duel"}, ValueError, "Did you mean 'dual'"),
        ({"rule": "primal", "bugdet": 0.9}, TypeError, "Did you mean 'budget'"),
        ({"rule": "primal", "budget": 1.5}, ValueError, "1.5"),
        ({"rule": DualDeferral(0.4), "trase": True}, TypeError, "Did you mean 'trace'"),
        ({"rule": DualDeferral}, TypeError, "rule object"),
        ({"rule": 0.4}, TypeError, "0.4"),
        ({"rule": "implicit_reward"}, ValueError, "before alignment"),
        ({"component_temperature": 0.0}, ValueError, "0.0"),
        ({"component_temperature": float("nan")}, ValueError, "nan"),
        ({"num_assistant_tokens": 0}, ValueError, "got 0"),
        ({"num_assistant_tokens": 2.5}, ValueError, "2.5"),
        ({"reference": "proxy"}, ValueError, "reference"),
        ({"vocabulary_alignment": "tokenizer"}, TypeError, "align_vocabularies.* got str"),
    ],
)
def test_bad_arguments_are_echoed(proxy, arguments, error, message):
    with pytest.raises(error, match=message):
        KADLogitsProcessor(proxy, **arguments)


def test_models_that_cannot_serve_as_proxy_are_refused(proxy):
    with pytest.raises(TypeError, match="str"):
        KADLogitsProcessor("some/model")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    with pytest.raises(ValueError, match="encoder-decoder"):
        KADLogitsProcessor(BartForConditionalGeneration(BartConfig(**sizes, **heads)))
    virtual = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="prompt-learning"):
        KADLogitsProcessor(virtual)


def test_what_torch_compile_made_of_a_model_is_refused_with_what_to_do(base, proxy):
    compiled = torch.compile(proxy)
    for role, build in {
        "proxy": lambda: KADLogitsProcessor(compiled),
        "reference": lambda: KADLogitsProcessor(proxy, ImplicitReward(1.0), reference=compiled),
    }.items():
        with pytest.raises(TypeError, match=rf"got OptimizedModule. To compile the {role}, use `{role}.compile\(\)`"):
            build()
    with pytest.raises(ValueError, match=r"OptimizedModule: .* use `proxy.compile\(\)`"):
        base.generate(PROMPT, logits_processor=[KADLogitsProcessor(proxy)], assistant_model=compiled)


@pytest.mark.parametrize("rule", [DualDeferral(0.4), ImplicitReward(1.0)])
@pytest.mark.parametrize("speculative", [False, True])
def test_models_that_were_compiled_in_place(rule, speculative):
    """`model.compile()`: also of a `PeftModel` whose adapter is switched off and on between its forwards."""
    torch.compiler.reset()  # torch counts how often a function was compiled, in other tests too
    base, below = tiny_model(seed=1), tiny_model(seed=2)
    torch.manual_seed(0)
    proxy = get_peft_model(below, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    kad, graphs = KADLogitsProcessor(proxy, rule), []
    settings = {"logits_processor": [kad], "assistant_model": proxy if speculative else None, **GREEDY}
    expected = base.generate(PROMPT, **settings)

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for model in (base, proxy):
        model.compile(backend=count)
    kad.reset()
    assert torch.equal(base.generate(PROMPT, **settings), expected)
    assert graphs


def test_a_text_beyond_the_proxys_context_is_refused_by_name(base):
    proxy = tiny_model(seed=2, max_position_embeddings=16)
    proxy.config._name_or_path = "my/proxy"
    kad = KADLogitsProcessor(proxy)
    for assistant in (None, proxy):
        with pytest.raises(ValueError, match=r"17 tokens, but the proxy .*my/proxy.* ends at 16"):
            base.generate(
                PROMPT, logits_processor=[kad], assistant_model=assistant, do_sample=False, max_new_tokens=20
            )


def test_a_proxy_without_a_key_value_cache_reads_the_whole_text_and_says_so(base, proxy):
    expected = base.generate(PROMPT, logits_processor=[KADLogitsProcessor(proxy)], **GREEDY)
    proxy = tiny_model(seed=2)
    proxy.register_forward_hook(
        lambda module, args, kwargs, output: type(output)(logits=output.logits), with_kwargs=True
    )
    with pytest.warns(UserWarning, match="returned no `Cache` .* reads the whole text again"):
        got = base.generate(PROMPT, logits_processor=[KADLogitsProcessor(proxy)], **GREEDY)
    assert torch.equal(got, expected)


def test_reset_drops_the_cache(base, proxy):
    kad = KADLogitsProcessor(proxy)
    base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    kad.reset()
    with ProxyCalls(proxy) as shapes:
        base.generate(PROMPT, logits_processor=[kad], **GREEDY)
    assert shapes[0] == tuple(PROMPT.shape)


def test_sliding_windows_do_not_grow_beyond_their_size(base):
    proxy, reference = (tiny_model("mistral", seed=seed) for seed in (2, 3))  # windows of 8
    kad = KADLogitsProcessor(proxy, ImplicitReward(), reference=reference)
    for assistant in (None, proxy):
        base.generate(PROMPT, logits_processor=[kad], assistant_model=assistant, do_sample=False, max_new_tokens=40)
        for cached in (kad.state.models.proxy, kad.state.models.reference):
            assert isinstance(cached._cache, DynamicCache)
            assert all(layer.keys.shape[-2] < 8 for layer in cached._cache.layers)
