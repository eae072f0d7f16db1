"""Activated LoRA: the proxy is active from its invocation tokens on, behind a cache as in a call of its own."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from test_adapters import ENDS, GREEDY, INVOCATION, adapted, generated, invoking_ids, padded_prompts
from test_cached_model import plain
from tiny_models import tiny_model
from transformers import PreTrainedModel

from transformers_kad import DualDeferral, KADLogitsProcessor
from transformers_kad.models.activated_lora import NEVER, active_columns, first_difference, tokens_before_activation
from transformers_kad.models.cached_model import CachedModel


def q_by_hand(proxy: PeftModel, ids: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """The distribution of an aLoRA behind a text `(1, L)`, activated by its prompt as in peft's `generate`."""
    prompt = ids[0, :prompt_length].tolist()
    starts = [at for at in range(prompt_length - 1) if prompt[at : at + 2] == INVOCATION]
    offsets = [ids.shape[1] - starts[-1]] if starts else [0]
    with torch.no_grad():
        return proxy(input_ids=ids, alora_offsets=offsets, use_cache=False).logits[:, -1].softmax(-1)


def greedy_by_hand(base: PreTrainedModel, proxy: PeftModel, prompt: torch.Tensor, rule: Any) -> list[int]:
    ids, length = prompt[None], len(prompt)
    while ids.shape[1] < length + GREEDY["max_new_tokens"] and (ids.shape[1] == length or int(ids[0, -1]) not in ENDS):
        with torch.no_grad():
            p = base(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
        token = rule(p, q_by_hand(proxy, ids, length)).argmax(-1)
        ids = torch.cat([ids, token[None]], dim=-1)
    return ids[0, length:].tolist()


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("drafter", [None, "proxy", "prompt_lookup"])
def test_an_activated_lora_as_proxy(drafter: str | None, chunk: int | None) -> None:
    """A padded batch, then a chat that continues its first text, invoked once more, on both paths."""
    proxy, base, rule = adapted("activated LoRA"), tiny_model(seed=1), DualDeferral(0.6)
    kad = KADLogitsProcessor(proxy, rule, drafter=drafter or "proxy")
    settings = {**GREEDY, "logits_processor": [kad], "eos_token_id": ENDS, "prefill_chunk_size": chunk}
    if drafter is not None:
        settings["assistant_model"] = proxy
    ids, mask = padded_prompts()
    texts = generated(base.generate(input_ids=ids, attention_mask=mask, **settings), 12)
    expected = [greedy_by_hand(base, proxy, row[kept.bool()], rule) for row, kept in zip(ids, mask, strict=True)]
    assert texts == expected
    assert len({len(text) for text in texts}) > 1  # some rows left the batch before others
    text = ids[0][mask[0].bool()].tolist() + texts[0]
    for turn in ([20, *INVOCATION, 21], [22], [*INVOCATION]):
        text = text + turn
        prompt = torch.tensor([text])
        answer = base.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert generated(answer, len(text))[0] == greedy_by_hand(base, proxy, torch.tensor(text), rule)
        text = answer[0].tolist()


def test_rows_that_change_places_take_their_activations_along() -> None:
    """Each text shares six tokens with the other row's, but for where it is invoked last."""
    model = adapted("activated LoRA")
    cached = CachedModel(model)
    cached.logits(torch.tensor([[20, *INVOCATION, 21, 22, 23, 24, 25], [30, *INVOCATION, 31, 32, 33, *INVOCATION]]))
    texts = torch.tensor([[30, *INVOCATION, 31, 32, 33, 34, 35], [20, *INVOCATION, 21, 22, 23, *INVOCATION]])
    torch.testing.assert_close(cached.logits(texts), plain(model, texts), atol=1e-4, rtol=1e-4)


def test_an_activated_lora_with_beams() -> None:
    """Beams take one another's place: the same texts as with a proxy that reads every text from its beginning."""
    proxy, base = adapted("activated LoRA"), tiny_model(seed=1)
    ids, mask = padded_prompts()
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {**GREEDY, "logits_processor": [kad], "num_beams": 3, "input_ids": ids, "attention_mask": mask}
    texts = base.generate(**settings)

    forgetful = KADLogitsProcessor(proxy, DualDeferral(0.6))
    read = forgetful.state.models.proxy.logits

    def read_anew(*arguments: Any, **keywords: Any) -> torch.Tensor:
        forgetful.state.models.proxy.reset()
        return read(*arguments, **{**keywords, "continues": False})

    forgetful.state.models.proxy.logits = read_anew
    assert torch.equal(base.generate(**{**settings, "logits_processor": [forgetful]}), texts)


def test_an_activated_lora_by_hand_and_with_a_prompt_of_its_own() -> None:
    proxy, base, rule = adapted("activated LoRA"), tiny_model(seed=1), DualDeferral(0.6)
    kad = KADLogitsProcessor(proxy, rule)
    own, ids = invoking_ids(1, 9), invoking_ids(1, 6)
    for length in (4, 5, 6):  # the invocation is complete at 5
        text = ids[:, :length]
        p = plain(base, text)[:, 0]
        expected = rule(p.softmax(-1), q_by_hand(proxy, text, length))
        torch.testing.assert_close(kad(text, p).exp(), expected, atol=1e-5, rtol=1e-4)
    with kad.proxy_prompt(own):
        for assistant in (None, proxy):
            text = base.generate(input_ids=ids, logits_processor=[kad], assistant_model=assistant, **GREEDY)
            for length in range(6, text.shape[1]):
                p = plain(base, text[:, :length])[:, 0].softmax(-1)
                q = q_by_hand(proxy, torch.cat([own, text[:, 6:length]], dim=1), 9)
                assert int(rule(p, q).argmax()) == int(text[0, length])


def test_the_last_invocation_in_the_prompt_counts() -> None:
    """In tokens, so that padding before a text changes nothing."""
    ids, mask = padded_prompts()
    before = tokens_before_activation(adapted("activated LoRA"), ids, mask)
    assert before.tolist() == [1, 9, NEVER, 0]
    assert active_columns(before, mask).tolist() == [9, 3, 0, 10]
    assert tokens_before_activation(adapted("activated LoRA"), ids[:, :1], mask[:, :1]).tolist() == [NEVER] * 4
    assert tokens_before_activation(tiny_model(), ids, mask) is None


def test_activations_differ_from_the_first_column_that_is_active_in_one_of_them() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    here = torch.tensor([4, 3])
    assert first_difference(here, here, mask) == 6
    assert first_difference(here, torch.tensor([4, NEVER]), mask) == 5  # the fourth token, behind two of padding
    assert first_difference(here, torch.tensor([2, 3]), mask) == 2
