"""Every way of decoding x every kind of proxy x every pair of vocabularies: the law of the texts is that of r.

Compared by chi-square with the law computed by hand over a vocabulary of four tokens, as in test_distribution.py. A
p-value below THRESHOLD fails a test; P_VALUES of them are computed, so with correct code the module gives a false
alarm with a probability of at most FALSE_ALARM = 1e-6 over the choice of the seeds (Bonferroni). The seeds are fixed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import exact_law
import numpy as np
import pytest
import torch
from exact_law import Text
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from transformers_kad import DualDeferral, ImplicitReward, KADLogitsProcessor, align_vocabularies

FALSE_ALARM = 1e-6
P_VALUES = 56
THRESHOLD = FALSE_ALARM / P_VALUES

SIZE = 4  # the base's vocabulary
LENGTH = 3
PROMPT = (1, 2, 3, 1)
SAMPLES = {"token by token": 10_000, "speculative": 1_000}
ROWS = 100  # of a call that decodes speculatively; `test_distribution.py` has those of one row


def spelling_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are strings of letters."""
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BASE_TOKENIZER = spelling_tokenizer({"a": 0, "b": 1, "ab": 2, "c": 3}, [("a", "b")])
PROXY_TOKENIZER = spelling_tokenizer({"c": 0, "bb": 1, "d": 2, "a": 3, "b": 4}, [("b", "b")])


@dataclass(frozen=True)
class Vocabularies:
    """A pair of vocabularies, by hand.

    Attributes:
        proxy_size: of the proxy's.
        reads: the proxy's tokens for each generated token of the base.
        says: the proxy's id of each base token that it can say.
        prompt: the proxy's reading of PROMPT.
    """

    proxy_size: int
    reads: tuple[Text, ...] = ((0,), (1,), (2,), (3,))
    says: tuple[int | None, ...] = (0, 1, 2, 3)
    prompt: Text = PROMPT


VOCABULARIES = {
    "equal": Vocabularies(4),
    "proxy padded": Vocabularies(6),
    "base padded": Vocabularies(3, reads=((0,), (1,), (2,), (0,)), says=(0, 1, 2, None), prompt=(1, 2, 0, 1)),
    # The text of the prompt is b + ab + c + b; the proxy tokenizes it anew. It has no "ab".
    "other tokenizer": Vocabularies(5, ((3,), (4,), (3, 4), (0,)), (3, 4, None, 0), prompt=(4, 3, 4, 0, 4)),
}


def with_adapter(model: PreTrainedModel, name: str = "default", seed: int = 5) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, init_lora_weights=False, target_modules="all-linear"
    )
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model.eval()
    return get_peft_model(model, config, adapter_name=name).eval()


def two_adapters(model: PreTrainedModel) -> PeftModel:
    adapted = with_adapter(with_adapter(model, "first"), "second", seed=6)
    adapted.set_adapter("second")
    return adapted


def with_activated_adapter(model: PreTrainedModel, prompt: Text) -> PeftModel:
    """Activated by two tokens inside the prompt."""
    torch.manual_seed(5)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=16,
        init_lora_weights=False,
        target_modules="all-linear",
        alora_invocation_tokens=list(prompt[2:4]),
    )
    return get_peft_model(model, config).eval()


KINDS: dict[str, Callable[[PreTrainedModel], PreTrainedModel | PeftModel]] = {
    "model": lambda model: model,
    "LoRA": with_adapter,
    "LoRA, merged": lambda model: with_adapter(model).merge_and_unload(),
    "LoRA, second of two": two_adapters,
    "LoRA, implicit reward": with_adapter,
    "LoRA, base too": with_adapter,
    "LoRA, activated": lambda model: model,  # see `pair`
}


@cache
def pair(kind: str, vocabulary: str) -> tuple[PreTrainedModel | PeftModel, PreTrainedModel | PeftModel]:
    base = tiny_model("llama", vocabulary=SIZE, hidden=8, seed=8)
    if kind == "LoRA, base too":
        base = with_adapter(base, seed=7)
    words = VOCABULARIES[vocabulary]
    proxy = tiny_model("qwen3", vocabulary=words.proxy_size, hidden=8, seed=110)
    if kind == "LoRA, activated":
        return base, with_activated_adapter(proxy, words.prompt)
    return base, KINDS[kind](proxy)


def logits_after(model: PreTrainedModel | PeftModel, ids: Text, **kwargs: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False, **kwargs).logits[0, -1].double().numpy()


@cache
def laws(kind: str, vocabulary: str) -> dict[str, exact_law.Law]:
    """The law of r, and those of texts by p alone and by q alone, from which it must differ."""
    base, proxy = pair(kind, vocabulary)
    words = VOCABULARIES[vocabulary]

    @cache
    def distributions(prefix: Text) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        text = words.prompt + tuple(piece for token in prefix for piece in words.reads[token])

        offsets = {"alora_offsets": [len(text) - 2]} if kind == "LoRA, activated" else {}

        def said(model: PreTrainedModel | PeftModel) -> np.ndarray:
            logits = logits_after(model, text, **offsets)
            return exact_law.softmax(np.array([-np.inf if i is None else logits[i] for i in words.says]))

        p, q, q0 = exact_law.softmax(logits_after(base, PROMPT + prefix)), said(proxy), np.ones(SIZE)
        if isinstance(proxy, PeftModel):
            with proxy.disable_adapter():
                q0 = said(proxy)
        return p, q, q0

    def target(p: np.ndarray, q: np.ndarray, q0: np.ndarray) -> np.ndarray:
        if kind != "LoRA, implicit reward":
            return exact_law.dual(0.4)(p, q, None)
        weights = np.where(q > 0, p * (q / np.where(q0 > 0, q0, 1)) ** 0.7, 0)
        return weights / weights.sum()

    def law(rule: Callable[..., np.ndarray]) -> exact_law.Law:
        return exact_law.law_of_texts(lambda prefix: rule(*distributions(prefix)), LENGTH)

    return {"r": law(target), "p": law(lambda p, q, q0: p), "q": law(lambda p, q, q0: q)}


def sample(path: str, kad: KADLogitsProcessor, base: PreTrainedModel | PeftModel) -> list[Text]:
    torch.manual_seed(17)
    settings: dict[str, Any] = {"logits_processor": [kad], "do_sample": True, "top_k": 0, "max_new_tokens": LENGTH}
    prompt, samples = torch.tensor([PROMPT]), SAMPLES[path]
    if path == "token by token":
        ids = base.generate(input_ids=prompt, num_return_sequences=samples, **settings)
    else:
        settings |= {"assistant_model": kad.proxy, "num_return_sequences": ROWS}
        ids = torch.cat([base.generate(input_ids=prompt, **settings) for _ in range(samples // ROWS)])
    return [tuple(row) for row in ids[:, len(PROMPT) :].tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", SAMPLES)
def test_the_law_is_that_of_the_target(path: str, kind: str, vocabulary: str) -> None:
    base, proxy = pair(kind, vocabulary)
    kad = KADLogitsProcessor(
        proxy,
        ImplicitReward(0.7) if kind == "LoRA, implicit reward" else DualDeferral(0.4),
        num_assistant_tokens=2,
        vocabulary_alignment=align_vocabularies(BASE_TOKENIZER, PROXY_TOKENIZER, sample_text="abca", minimum_share=0.5)
        if vocabulary == "other tokenizer"
        else None,
    )
    texts = sample(path, kad, base)
    expected = laws(kind, vocabulary)
    assert exact_law.chi_square_p_value(texts, expected["r"]) >= THRESHOLD
    # The same samples tell r from either model.
    for other in ("p", "q"):
        assert exact_law.chi_square_p_value(texts, expected[other]) < THRESHOLD
