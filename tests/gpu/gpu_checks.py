"""What is checked on a GPU, as functions of the device, so that the CPU can run them too.

`test_on_gpu.py` runs them on a GPU, and `tests/test_gpu_checks.py` on the CPU, to see that they work.
"""

import contextlib
import copy
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import exact_law
import torch
from test_vocabulary import TOKENIZERS
from tiny_families import tiny_family
from tiny_models import tiny_model
from transformers import LogitsProcessor, PreTrainedModel

from transformers_kad import DualDeferral, KADLogitsProcessor, PrimalDeferral, align_vocabularies
from transformers_kad.decoding.speculative_round import SpeculativeRound
from transformers_kad.decoding.speculative_rows import Output
from transformers_kad.integrations.loading.models import load_model, load_tokenizer
from transformers_kad.recipes.benchmarking.methods import rows_in_step

PAIR = Path(__file__).resolve().parents[2] / "recipes" / "tiny_pair"
VOCABULARY = 50
NEW_TOKENS = 24
# The method of the loop that reads the results of a round, its only place that waits for the device, and what follows
# the last round.
READ, END = (SpeculativeRound, "_fetch"), (Output, "finish")


class CountingPenalty(LogitsProcessor):
    """A processor with a state, which is called token by token with all rows: makes rows go in step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls % scores.shape[-1]] -= 2.0
        return scores


@cache
def llamas() -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_model(hidden=32, seed=1), tiny_model(seed=2)


@cache
def families(base: str, proxy: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_family(base, vocab_size=VOCABULARY, seed=1), tiny_family(proxy, vocab_size=VOCABULARY, seed=2)


@cache
def windows() -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_model("mistral", hidden=32, seed=1), tiny_model("mistral", seed=2)


@dataclass(frozen=True)
class Way:
    """A way of decoding.

    Attributes:
        rows: the number of texts; prompts of more than one are padded on the left.
        models: a function that makes base and proxy, in float32 on the CPU.
        rule: the rule.
        kad: arguments of `KADLogitsProcessor`.
        call: arguments of `generate`.
        speculative: whether the proxy drafts.
        in_step: whether all rows are made to emit the same number of tokens a round.
        processors: makes further processors, which are put before and behind KAD.
    """

    rows: int = 1
    models: Callable[[], tuple[PreTrainedModel, PreTrainedModel]] = llamas
    rule: Any = field(default_factory=lambda: PrimalDeferral(0.6))
    kad: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    speculative: bool = True
    in_step: bool = False
    processors: Callable[[], tuple[list[LogitsProcessor], list[LogitsProcessor]]] = lambda: ([], [])


WAYS = {
    "token by token": Way(speculative=False),
    "token by token, 4 rows": Way(rows=4, speculative=False),
    "speculative": Way(),
    "speculative, 4 rows": Way(rows=4),
    "in step": Way(rows=4, in_step=True),
    "with processors that keep a state": Way(rows=4, processors=lambda: ([CountingPenalty()], [CountingPenalty()])),
    "with processors of transformers": Way(rows=4, call={"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
    "with an end": Way(rows=4, call={"eos_token_id": [3, 17, 26, 35]}),
    "automatic draft lengths": Way(rows=2, kad={"num_assistant_tokens": "auto"}),
    "prompt lookup": Way(kad={"drafter": "prompt_lookup"}),
    "prompt lookup, 4 rows": Way(rows=4, kad={"drafter": "prompt_lookup"}),
    "traced": Way(rows=4, kad={"trace": True}),
    "dual": Way(rows=4, rule=DualDeferral(0.3)),
    "beams": Way(rows=2, speculative=False, call={"num_beams": 3}),
    "sliding windows": Way(models=windows),
    "sliding windows, 4 rows": Way(rows=4, models=windows),
    "recurrent and full attention": Way(models=lambda: families("qwen3_next", "falcon_h1")),
    "recurrent and full attention, 4 rows": Way(rows=4, models=lambda: families("qwen3_next", "falcon_h1")),
    "recurrent": Way(rows=4, models=lambda: families("mamba2", "mamba2")),
}


def prompts(rows: int) -> dict[str, torch.Tensor]:
    """Prompts of 12, 5, 9, 1, ... tokens, padded on the left; a single one is not padded."""
    generator = torch.Generator().manual_seed(7)
    ids, mask = torch.zeros(rows, 12, dtype=torch.long), torch.zeros(rows, 12, dtype=torch.long)
    for row, length in enumerate([12, 5, 9, 1, 12, 7, 3, 10][:rows]):
        ids[row, -length:] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def moved(models: tuple[PreTrainedModel, PreTrainedModel], base: str, proxy: str) -> Any:
    """Copies of base and proxy on their devices."""
    return copy.deepcopy(models[0]).to(base), copy.deepcopy(models[1]).to(proxy)


def greedy_texts(
    way: Way, device: str, proxy_device: str | None = None, models: Any = None, new_tokens: int = NEW_TOKENS
) -> torch.Tensor:
    """The greedy texts of a way of decoding, on the CPU."""
    base, proxy = models or moved(way.models(), device, proxy_device or device)
    kad = KADLogitsProcessor(proxy, way.rule, **way.kad)
    before, after = way.processors()
    arguments = {"max_new_tokens": new_tokens, "pad_token_id": 0, "do_sample": False} | way.call
    if way.speculative:
        arguments["assistant_model"] = proxy
    inputs = {name: value.to(device) for name, value in prompts(way.rows).items()}
    with rows_in_step() if way.in_step else contextlib.nullcontext():
        texts = base.generate(**inputs, logits_processor=[*before, kad, *after], **arguments)
    assert texts.device.type == torch.device(device).type
    assert kad.statistics.tokens > 0
    if way.kad.get("trace"):
        assert [len(records) for records in kad.trace.sequences] == [one.tokens for one in kad.statistics.sequences]
    return texts.cpu()


def check_greedy(name: str, device: str, proxy_device: str | None = None) -> None:
    """The greedy texts of a way of decoding on a device are those of the CPU."""
    assert torch.equal(greedy_texts(WAYS[name], device, proxy_device), greedy_texts(WAYS[name], "cpu"))


def check_other_tokenizer(device: str) -> None:
    """The greedy texts with a proxy that has a tokenizer of its own are those of the CPU."""
    tokenizer = load_tokenizer(PAIR / "base")
    alignment = align_vocabularies(tokenizer, TOKENIZERS["byte-level"], minimum_share=0.5)
    inputs = tokenizer(["Mia has 12 apples. She buys", "So 3 + 4 = 7, and the"], padding=True, return_tensors="pt")
    texts = {}
    for place in ("cpu", device):
        base = load_model(PAIR / "base").to(place)
        proxy = tiny_model(vocabulary=len(TOKENIZERS["byte-level"]), seed=3).to(place)
        kad = KADLogitsProcessor(proxy, DualDeferral(0.3), vocabulary_alignment=alignment)
        for drafts in ({}, {"assistant_model": proxy}):
            texts[place, bool(drafts)] = base.generate(
                **inputs.to(place),
                logits_processor=[kad],
                max_new_tokens=16,
                do_sample=False,
                pad_token_id=0,
                **drafts,
            ).tolist()
    assert texts[device, False] == texts["cpu", False]
    assert texts[device, True] == texts["cpu", True]


# --- Laws ------------------------------------------------------------------------------------------------------

LAWS = {"dual": (DualDeferral(0.4), exact_law.dual(0.4)), "primal": (PrimalDeferral(0.5), exact_law.primal(0.5))}


def law_p_value(rule: str, device: str, *, speculative: bool, lazy: bool = False, samples: int = 20_000) -> float:
    """The p-value of texts of three tokens that are drawn on a device, against their exact law."""
    prompt, length, vocabulary = (1, 2, 3, 1), 3, 4
    own, plain = LAWS[rule]
    models = tiny_model(vocabulary=vocabulary, seed=1), tiny_model(vocabulary=vocabulary, seed=2)
    p, q = (exact_law.prefix_logits(model, prompt, length, vocabulary) for model in models)
    law = exact_law.law_of_texts(
        lambda text: plain(exact_law.softmax(p[text]), exact_law.softmax(q[text]), None), length
    )
    base, proxy = moved(models, device, device)
    kad = KADLogitsProcessor(proxy, own, num_assistant_tokens=2, lazy=lazy)
    drafts = {"assistant_model": proxy} if speculative else {}
    torch.manual_seed(0)
    texts: list[tuple[int, ...]] = []
    while len(texts) < samples:
        ids = torch.tensor([prompt] * min(2000, samples), device=device)
        drawn = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=[kad],
            do_sample=True,
            top_k=0,
            max_new_tokens=length,
            pad_token_id=0,
            **drafts,
        )
        texts += map(tuple, drawn[:, len(prompt) :].tolist())
    return exact_law.chi_square_p_value(texts, law)


# --- Waits -----------------------------------------------------------------------------------------------------


class ReadsOnly:
    """Context manager inside of which speculative rounds may wait for the device in one place alone: their read.

    From the first read of a call to its end, everything between two reads runs with the mode "error".

    Args:
        set_mode: sets the mode, such as `torch.cuda.set_sync_debug_mode`.

    Attributes:
        reads: how often results were read.
    """

    def __init__(self, set_mode: Callable[[str], None]) -> None:
        self._set_mode, self.reads = set_mode, 0

    def __enter__(self) -> "ReadsOnly":
        self._patches = contextlib.ExitStack()
        self._patches.callback(self._set_mode, "default")
        for (owner, name), mode_after in ((READ, "error"), (END, "default")):
            self._patches.enter_context(patch.object(owner, name, self._around(getattr(owner, name), mode_after)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._patches.close()

    def _around(self, function: Callable[..., Any], mode_after: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._set_mode("default")
            self.reads += mode_after == "error"
            result = function(*args, **kwargs)
            self._set_mode(mode_after)
            return result

        return wrapped


# The ways whose rounds wait only once.
ONE_WAIT = ("speculative", "speculative, 4 rows", "in step", "dual", "with an end", "sliding windows, 4 rows")


def check_waits(name: str, device: str, set_mode: Callable[[str], None]) -> None:
    """The rounds of a way of decoding wait for the device in their one read alone."""
    way = WAYS[name]
    models = moved(way.models(), device, device)
    expected = greedy_texts(way, device, models=models)  # what is only made once may wait
    with ReadsOnly(set_mode) as waits:
        assert torch.equal(greedy_texts(way, device, models=models), expected)
    assert waits.reads > 2
    if name.startswith("speculative"):
        assert waits.reads <= NEW_TOKENS


# How often the rounds of other ways may wait at most.
FURTHER_WAITS = {"speculative": 1, "speculative, 4 rows": 1, "prompt lookup": 2}


def check_waits_per_round(name: str, device: str, count_waits: Callable[[Callable[[], Any]], int]) -> None:
    """The rounds of a way of decoding wait at most as often as allowed, whatever is waited for around them.

    Args:
        name: the way.
        device: the device.
        count_waits: calls a function and returns how often the device was waited for.
    """
    way = WAYS[name]
    models = moved(way.models(), device, device)
    waits, reads = [], []
    for new_tokens in (NEW_TOKENS, NEW_TOKENS, 2 * NEW_TOKENS):  # what is only made once may wait in the first call
        with ReadsOnly(lambda mode: None) as read:
            waits.append(count_waits(partial(greedy_texts, way, device, models=models, new_tokens=new_tokens)))
        reads.append(read.reads)
    assert 0 < waits[2] - waits[1] <= FURTHER_WAITS[name] * (reads[2] - reads[1])


def check_waits_per_token(device: str, count_waits: Callable[[Callable[[], Any]], int]) -> None:
    """Token by token, a step waits for the device at most once more than a step of the base alone."""
    way = WAYS["token by token, 4 rows"]
    models = moved(way.models(), device, device)

    def alone(new_tokens: int) -> None:
        inputs = {name: value.to(device) for name, value in prompts(way.rows).items()}
        models[0].generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

    def guided(new_tokens: int) -> None:
        greedy_texts(way, device, models=models, new_tokens=new_tokens)

    further = []
    for decode in (alone, guided):
        waits = [count_waits(partial(decode, count)) for count in (NEW_TOKENS, NEW_TOKENS, 2 * NEW_TOKENS)]
        further.append(waits[2] - waits[1])
    assert further[1] - further[0] <= NEW_TOKENS


# --- Compiled code, threads, memory, several devices -----------------------------------------------------------


def check_compiled(device: str, rows: int, models: Any = llamas, **kad: Any) -> None:
    """Compiled rounds give the greedy texts of the CPU without compiling, in calls of different lengths."""
    eager = Way(rows=rows, models=models, kad=kad)
    base, proxy = moved(models(), device, device)
    processor = KADLogitsProcessor(proxy, eager.rule, compile=True, **kad)
    inputs = {name: value.to(device) for name, value in prompts(rows).items()}
    if rows == 1:
        del inputs["attention_mask"]
    expected = greedy_texts(eager, "cpu")
    for length in (NEW_TOKENS, 7):
        arguments = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
        texts = base.generate(**inputs, logits_processor=[processor], assistant_model=proxy, **arguments).cpu()
        assert torch.equal(texts, expected[:, : 12 + length])


def check_threads(device: str, **kad: Any) -> None:
    """Calls of other threads, one after the other, give the text of the CPU. Compiled, they may be refused."""
    base, proxy = moved(llamas(), device, device)
    processor, texts = KADLogitsProcessor(proxy, Way().rule, **kad), []
    ids = prompts(1)["input_ids"].to(device)

    def run() -> None:
        arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        try:
            drawn = base.generate(ids, logits_processor=[processor], assistant_model=proxy, **arguments)
            texts.append(drawn.tolist())
        except ValueError as error:
            texts.append(str(error))

    run()
    for _ in range(3):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    expected = greedy_texts(Way(), "cpu").tolist()
    assert len(texts) == 4
    assert texts[0] == expected
    for text in texts[1:]:
        assert text == expected or (kad.get("compile") and isinstance(text, str) and "thread" in text)


def bytes_held(device: str) -> int:
    """The bytes that tensors hold: on CUDA what is allocated, elsewhere those that Python knows."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        # Other subclasses, such as the tensors that `torch.compile` traces with, have no memory of their own.
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == torch.device(device).type
    }
    return sum(storages.values())


def memory_of_calls(device: str, calls: int, first: int, **kad: Any) -> tuple[int, int]:
    """The bytes that are held after some first calls, and after all calls, in turn of one row and of four."""
    base, proxy = moved(llamas(), device, device)
    processor = KADLogitsProcessor(proxy, PrimalDeferral(0.6), **kad)
    held = []
    for call in range(calls):
        inputs = {name: value.to(device) for name, value in prompts(4 if call % 2 else 1).items()}
        drafts = {} if call % 3 == 2 else {"assistant_model": proxy}
        torch.manual_seed(call)
        base.generate(
            **inputs, logits_processor=[processor], max_new_tokens=8, do_sample=True, pad_token_id=0, **drafts
        )
        if call + 1 in (first, calls):
            del inputs, drafts
            processor.reset()
            held.append(bytes_held(device))
    return held[0], held[1]


def spread_base(gpu: str | int) -> PreTrainedModel:
    """The base of the tiny pair by `device_map="auto"`, about half of it on a GPU and the rest on the CPU."""
    size = sum(weight.nbytes for weight in load_model(PAIR / "base").parameters())
    limits = {gpu: int(0.7 * size), "cpu": 2**30}
    return load_model(PAIR / "base", device_map="auto", max_memory=limits)


def check_spread(base: PreTrainedModel, device: str) -> None:
    """A base that is spread over devices gives the greedy texts of the CPU, token by token and with drafts."""
    tokenizer = load_tokenizer(PAIR / "base")
    inputs = tokenizer(["Mia has 12 apples. She buys", "So 3 + 4 = 7, and the"], padding=True, return_tensors="pt")
    alone = load_model(PAIR / "base")
    for drafts in (False, True):
        texts = []
        for model, place in ((alone, "cpu"), (base, device)):
            proxy = load_model(PAIR / "proxy").to(place)
            kad = KADLogitsProcessor(proxy, DualDeferral(0.5))
            arguments: dict[str, Any] = {"assistant_model": proxy} if drafts else {}
            ids = model.generate(
                **inputs.to(place), logits_processor=[kad], max_new_tokens=16, do_sample=False, **arguments
            )
            texts.append(ids.tolist())
        assert texts[0] == texts[1]


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, which would round float32 on CUDA."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
