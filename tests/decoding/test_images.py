"""Vision-language models as base and as proxy, against computations without a cache and without this library."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_vision_models import IMAGE, VOCABULARY, mllama_prompt, next_logits, prompts, row_of, tiny_vision_model
from transformers import PreTrainedModel
from versions import skip_if_chunks_are_wrong

from transformers_kad import DualDeferral, KADLogitsProcessor
from transformers_kad.models.by_version import CACHE

TOKENS = 16
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": TOKENS}
RULE = DualDeferral(0.3)


def by_hand(base: PreTrainedModel, proxy: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> list[int]:
    """The likeliest tokens of r. Of the prompt, the proxy reads what stands for no image."""
    text, banned = prompt["input_ids"], base.generation_config.suppress_tokens
    for _ in range(TOKENS):
        of_text = text[:, text[0] != IMAGE]
        logits = [next_logits(base, prompt, text), next_logits(proxy, {"input_ids": of_text}, of_text)]
        for own in logits:
            own[:, banned] = -torch.inf
        text = torch.cat([text, RULE(*(own.softmax(-1) for own in logits)).argmax(-1, keepdim=True)], dim=1)
    return text[0, -TOKENS:].tolist()


def new_tokens(
    base: PreTrainedModel, kad: KADLogitsProcessor, inputs: dict[str, Any], **settings: Any
) -> list[list[int]]:
    return base.generate(**inputs, logits_processor=[kad], **GREEDY, **settings)[:, -TOKENS:].tolist()


@pytest.fixture(scope="module")
def proxy() -> PreTrainedModel:
    return tiny_model(vocabulary=VOCABULARY, seed=2)


CASES = [
    ("qwen3_vl", [None]),
    ("qwen3_vl", [2]),
    ("qwen3_vl", [2, None, 4]),
    ("gemma3", [None]),
    ("gemma3", [2]),
    ("gemma3", [2, 4]),
    ("paligemma", [None]),
    ("paligemma", [2]),
    ("paligemma", [2, 4]),
]


@pytest.mark.parametrize(("kind", "images"), CASES)
def test_token_by_token(kind, images, proxy):
    base, kad = tiny_vision_model(kind), KADLogitsProcessor(proxy, RULE)
    inputs = prompts(kind, images)
    expected = [by_hand(base, proxy, row_of(inputs, row, kind, images)) for row in range(len(images))]
    assert new_tokens(base, kad, inputs) == expected
    if kind != "paligemma":  # of which transformers itself reads every chunk in both directions
        if images != [None]:
            skip_if_chunks_are_wrong()
        assert new_tokens(base, kad, inputs, prefill_chunk_size=5) == expected


@pytest.mark.parametrize(("kind", "images"), CASES)
def test_speculative(kind, images, proxy):
    base, kad = tiny_vision_model(kind, seed=1), KADLogitsProcessor(proxy, RULE)
    inputs = prompts(kind, images)
    expected = [by_hand(base, proxy, row_of(inputs, row, kind, images)) for row in range(len(images))]
    assert new_tokens(base, kad, inputs, assistant_model=proxy) == expected
    assert 0 < kad.statistics.accepted < kad.statistics.drafted
    if kind != "paligemma":
        assert new_tokens(base, kad, inputs, assistant_model=proxy, prefill_chunk_size=5) == expected


def test_a_draft_with_a_placeholder_is_no_image(proxy):
    """A placeholder behind the prompt would be one more than the images have."""
    base, proxy = tiny_vision_model("qwen3_vl"), copy.deepcopy(proxy)
    proxy.lm_head.weight.data[IMAGE] = 100 * proxy.lm_head.weight.data[7]
    inputs, kad = prompts("qwen3_vl", [2]), KADLogitsProcessor(proxy, RULE)
    expected = new_tokens(base, kad, inputs)
    assert new_tokens(base, kad, inputs, assistant_model=proxy) == expected


@pytest.mark.parametrize("speculative", [False, True])
def test_other_images_and_a_chat_that_goes_on(proxy, speculative):
    """The positions behind an image depend on it, and the model remembers those of its last call."""
    base, kad = tiny_vision_model("qwen3_vl"), KADLogitsProcessor(proxy, RULE)
    settings = {"assistant_model": proxy} if speculative else {}
    for images in ([2], [None], [5]):
        inputs = prompts("qwen3_vl", images)
        assert new_tokens(base, kad, inputs, **settings) == [by_hand(base, proxy, inputs)]
    call = {"logits_processor": [kad], "return_dict_in_generate": True, **GREEDY, **settings}
    answer = base.generate(**inputs, **call)
    chat = torch.cat([answer.sequences, torch.tensor([[5, 9, 11]])], dim=1)
    longer = {**inputs, "input_ids": chat, "attention_mask": torch.ones_like(chat)}
    longer["mm_token_type_ids"] = (chat == IMAGE).long()
    expected = [by_hand(base, proxy, longer)]
    assert new_tokens(base, kad, longer, **settings) == expected
    continued = {name: longer[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    assert new_tokens(base, kad, continued, **{CACHE: answer.past_key_values}, **settings) == expected


@pytest.mark.parametrize("speculative", [False, True])
def test_several_sequences_of_a_prompt_with_an_image(proxy, speculative):
    """`generate` repeats the images as well. Sampling from the likeliest token alone is greedy."""
    base, kad, inputs = tiny_vision_model("qwen3_vl"), KADLogitsProcessor(proxy, RULE), prompts("qwen3_vl", [2])
    settings = {"assistant_model": proxy} if speculative else {}
    sampling = {"do_sample": True, "top_k": 1, "num_return_sequences": 3, "max_new_tokens": TOKENS}
    texts = base.generate(**inputs, logits_processor=[kad], **sampling, **settings)[:, -TOKENS:].tolist()
    assert texts == [by_hand(base, proxy, inputs)] * 3


@pytest.mark.parametrize("speculative", [False, True])
def test_positions_of_images_are_the_bases_alone(proxy, speculative):
    """They have several dimensions, which a model of text alone does not count."""
    base, kad, inputs = tiny_vision_model("qwen3_vl"), KADLogitsProcessor(proxy, RULE), prompts("qwen3_vl", [2])
    settings = {"assistant_model": proxy} if speculative else {}
    expected = new_tokens(base, kad, inputs, **settings)
    positions = base._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    assert positions.dim() == 3
    assert new_tokens(base, kad, inputs, position_ids=positions, **settings) == expected


@pytest.mark.parametrize("image", [False, True])
def test_a_base_that_attends_to_images_in_layers_of_their_own(image, proxy):
    """What the cache holds of an image there is no part of the text, of which tokens could be taken back."""
    base, kad, inputs = tiny_vision_model("mllama"), KADLogitsProcessor(proxy, RULE), mllama_prompt(image)
    expected = [by_hand(base, proxy, inputs)]
    assert new_tokens(base, kad, inputs) == expected
    if image:
        with pytest.raises(ValueError, match=r"images in layers of their own\. Leave out `assistant_model`"):
            new_tokens(base, kad, inputs, assistant_model=proxy)
    else:
        assert new_tokens(base, kad, inputs, assistant_model=proxy) == expected
        assert 0 < kad.statistics.accepted < kad.statistics.drafted


def test_token_types_that_the_proxy_does_not_take_leave_its_cache(proxy):
    """A processor returns them for every prompt; a proxy that reads without them can go on where it was."""
    base, kad, inputs = tiny_vision_model("gemma3"), KADLogitsProcessor(proxy, RULE), prompts("gemma3", [None])
    columns = []
    handle = proxy.register_forward_pre_hook(
        lambda module, args, kwargs: columns.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        answer = base.generate(**inputs, logits_processor=[kad], **GREEDY)
        assert columns == [inputs["input_ids"].shape[1]] + [1] * (TOKENS - 1)
        types = {"attention_mask": torch.ones_like(answer), "token_type_ids": torch.zeros_like(answer)}
        base.generate(answer, **types, logits_processor=[kad], **GREEDY)
        assert columns[TOKENS:] == [1] * TOKENS
    finally:
        handle.remove()


def test_a_text_prompt_with_compile(proxy, monkeypatch):
    """Of images that are not there, `generate` prepares an empty dictionary."""
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    base, inputs = tiny_vision_model("qwen3_vl"), prompts("qwen3_vl", [None])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = new_tokens(base, KADLogitsProcessor(proxy, RULE), text)
    kad = KADLogitsProcessor(proxy, RULE, compile=True, num_assistant_tokens=2)
    assert new_tokens(base, kad, text, assistant_model=proxy) == expected
    with pytest.raises(ValueError, match=r"decodes from `input_ids` alone .* Leave out `compile`"):
        new_tokens(base, kad, prompts("qwen3_vl", [2]), assistant_model=proxy)


def test_a_prompt_of_placeholders_alone_is_refused(proxy):
    base, kad, ids = tiny_vision_model("qwen3_vl"), KADLogitsProcessor(proxy), torch.full((1, 4), IMAGE)
    images = {name: value for name, value in prompts("qwen3_vl", [2]).items() if "_ids" not in name}
    images |= {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.ones_like(ids)}
    with pytest.raises(ValueError, match=r"Prompt 0 has placeholders .* `with kad.proxy_prompt"):
        base.generate(ids, **images, logits_processor=[kad], **GREEDY)
    with kad.proxy_prompt(torch.tensor([[5, 6]])):
        base.generate(ids, **images, logits_processor=[kad], **GREEDY)
    assert kad.statistics.tokens == TOKENS


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3"])
@pytest.mark.parametrize("drafter", [None, "proxy", "prompt_lookup"])
def test_a_proxy_of_a_vision_language_model_reads_the_text(kind, drafter):
    base, proxy = tiny_model(vocabulary=VOCABULARY, seed=3), tiny_vision_model(kind, seed=1)
    base.generation_config.suppress_tokens = proxy.generation_config.suppress_tokens
    kad = KADLogitsProcessor(proxy, RULE, drafter=drafter or "proxy")
    settings = {"assistant_model": proxy} if drafter else {}
    ids, mask = (prompts(kind, [None, None, None])[name] for name in ("input_ids", "attention_mask"))
    alone = [{"input_ids": row[kept.bool()][None]} for row, kept in zip(ids, mask, strict=True)]
    expected = [by_hand(base, proxy, row) for row in alone]
    assert [new_tokens(base, kad, row, **settings)[0] for row in alone] == expected
    if drafter is None or kind != "gemma3":  # speculative batches over sliding windows are refused
        assert new_tokens(base, kad, {"input_ids": ids, "attention_mask": mask}, **settings) == expected


@pytest.mark.parametrize("speculative", [False, True])
def test_base_and_proxy_of_vision_language_models(speculative):
    """The proxy reads the text, and no images; a warning says so."""
    base, proxy = tiny_vision_model("qwen3_vl"), tiny_vision_model("qwen3_vl", seed=1)
    inputs, settings = prompts("qwen3_vl", [2]), {"assistant_model": proxy} if speculative else {}
    assert new_tokens(base, KADLogitsProcessor(proxy, RULE), inputs, **settings) == [by_hand(base, proxy, inputs)]


@pytest.mark.parametrize("drafter", [None, "proxy", "prompt_lookup"])
def test_a_proxy_that_reads_its_prompt_in_both_directions(drafter):
    base, proxy = tiny_model(vocabulary=VOCABULARY, seed=3), tiny_vision_model("paligemma", seed=1)
    prompt = {name: value.repeat(1, 2) for name, value in prompts("paligemma", [None], length=6).items()}
    text, ids = prompt["input_ids"], prompt["input_ids"]
    for _ in range(TOKENS):
        q = next_logits(proxy, prompt, text).softmax(-1)
        probs = next_logits(base, {"input_ids": ids}, text).softmax(-1), q
        text = torch.cat([text, RULE(*probs).argmax(-1, keepdim=True)], dim=1)
    kad = KADLogitsProcessor(proxy, RULE, drafter=drafter or "proxy")
    with kad.proxy_prompt(prompt):
        settings = {"assistant_model": proxy} if drafter else {}
        assert new_tokens(base, kad, {"input_ids": ids}, **settings) == text[:, -TOKENS:].tolist()
