"""KAD in vLLM's Model Runner V2, without vLLM and without a GPU: contexts as it hands them over are made by hand.

The class was never run in an engine.
"""

import os

import pytest
import torch
from fake_vllm_engine import engine_settings, sampling_params
from fake_vllm_v2_engine import FakeV2Engine, Request, context, request_state
from scipy.stats import chisquare
from tiny_families import tiny_family
from tiny_models import tiny_model

from transformers_kad import KADConfig, KADLogitsProcessor
from transformers_kad.integrations.loading import load_model
from transformers_kad.integrations.vllm_v2 import KADLogitsProcessorV2
from transformers_kad.rules.composition import compose
from transformers_kad.rules.registry import make_rule

NEW = [12, 3, 8, 1, 15, 6, 10, 4, 9, 2, 14, 5]
RULES = [
    {"rule": "dual", "parameters": {"threshold": 0.9}},
    False,
    {"rule": "primal", "parameters": {"budget": 0.3}},
    {"rule": "ensemble", "parameters": {"weight": 0.5}},
]
# Of a random model of full attention, and of those whose caches take tokens back in other ways.
PROXIES = {
    "full attention": lambda: tiny_model(seed=2),
    "sliding windows": lambda: tiny_model("mistral", seed=2),
    "recurrent states": lambda: tiny_family("qwen3_5_text", seed=2),
}


@pytest.fixture(scope="module")
def base():
    return tiny_model(hidden=32, seed=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base):
    paths = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in (*PROXIES, "base")}
    for name, model in ({name: make() for name, make in PROXIES.items()} | {"base": base}).items():
        model.save_pretrained(paths[name])
    return paths


@pytest.fixture
def use(monkeypatch, tmp_path, folders):
    """Write the settings of the engine; returns what makes a processor of the state of requests."""
    monkeypatch.delenv("KAD_CACHE_GIB", raising=False)

    def make(proxy="full attention", rule="dual", cache_gib=None, settings=None, **parameters):
        folder = tmp_path / f"kad_{len(os.listdir(tmp_path))}"
        KADConfig(rule=rule, parameters=parameters, proxy=str(folders[proxy])).save_pretrained(folder)
        monkeypatch.setenv("KAD_CONFIG", str(folder))
        if cache_gib is not None:
            monkeypatch.setenv("KAD_CACHE_GIB", cache_gib)
        made = settings or engine_settings(folders["base"], speculative=object())
        return lambda state: KADLogitsProcessorV2(made, state)

    return make


def greedy_texts(base, proxy, prompts, asked):
    """The texts of `generate`, each with the rule that its request asks for."""
    texts = []
    for at, (prompt, new) in enumerate(zip(prompts, NEW, strict=True)):
        own = asked[at % len(asked)]
        kad = [] if own is False else [KADLogitsProcessor(proxy, own["rule"], **own["parameters"])]
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
        texts.append(base.generate(ids, logits_processor=kad, **settings)[0, len(prompt) :].tolist())
    return texts


def random_prompts(seed=3, longest=30):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (len(NEW),), generator=generator).tolist()
    return [torch.randint(2, 50, (length,), generator=generator).tolist() for length in lengths]


def drafter_of(prompt, text, generator):
    """Drafts the tokens that will come, of which a quarter are replaced."""

    def draft(so_far):
        coming = text[len(so_far) - len(prompt) :]
        luck = torch.rand(len(coming), generator=generator).tolist()
        return [(token + 1) % 50 if chance < 0.25 else token for token, chance in zip(coming, luck, strict=True)]

    return draft


def requests_of(prompts, texts, asked):
    generator = torch.Generator().manual_seed(4)
    return [
        Request(prompt, new, sampling_params(asked[at % len(asked)]), drafter_of(prompt, texts[at], generator))
        for at, (prompt, new) in enumerate(zip(prompts, NEW, strict=True))
    ]


@pytest.mark.parametrize("longest_draft", [0, 4])
@pytest.mark.parametrize("cache_gib", [None, "0", "0.00005"])
@pytest.mark.parametrize("proxy", PROXIES)
def test_texts_are_those_of_generate(use, base, folders, proxy, cache_gib, longest_draft):
    """Each request with its own rule or none, while requests join, leave and are preempted, and slots are recycled."""
    prompts = random_prompts()
    texts = greedy_texts(base, load_model(folders[proxy]), prompts, RULES)
    made = use(proxy, cache_gib=cache_gib, threshold=0.6)
    engine = FakeV2Engine(base, made, slots=4, chunk=16, longest_draft=longest_draft, unrest=0.4)
    assert engine.run(requests_of(prompts, texts, RULES)) == texts
    assert texts != greedy_texts(base, load_model(folders[proxy]), prompts, [False])
    assert min(engine.preemptions, engine.parts) > 2
    if longest_draft:
        assert min(engine.accepted, engine.refused, engine.placeholders) > 2


def test_rows_of_r_are_those_of_models_without_caches(use, base, folders):
    """Rows in any order; some tokens of the first step's drafts are kept and others refused in the second."""
    proxy, state = load_model(folders["full attention"]), request_state(3)
    processor = use(threshold=0.4)(state)
    texts = {0: [3, 4, 5, 6], 1: [7, 8], 2: [9, 10, 11]}
    for slot, text in texts.items():
        state.prefill_len.np[slot] = len(text)
        assert processor.add_request(slot, sampling_params(False if slot == 1 else None)) == (slot != 1)
    steps = [
        {0: [], 1: [], 2: []},
        {0: [20, 21, 22], 1: [23], 2: []},
        {0: [24], 1: [], 2: [25, 26]},  # of 20, 21 and 22, the first two were kept
        {0: [27, 28], 1: [], 2: [29]},  # the draft of slot 0 was kept, that of slot 2 refused
    ]
    grown = [{0: [], 1: [], 2: []}, {0: [30], 1: [31], 2: [32]}, {0: [20, 21, 33], 1: [34], 2: [35]}]
    grown.append({0: [24, 36], 1: [37], 2: [38]})
    generator = torch.Generator().manual_seed(5)
    for drafts, new in zip(steps, grown, strict=True):
        rows, wanted = [], []
        for slot, draft in drafts.items():
            texts[slot] += new[slot]
            text = texts[slot]
            state.all_token_ids.gpu[slot, : len(text)] = torch.tensor(text)
            ids = torch.tensor([[*text, *draft]])
            with torch.no_grad():
                logits = [model(ids).logits[0, len(text) - 1 :] for model in (base, proxy)]
            target = compose(make_rule("dual", threshold=0.4), *logits).target_probs.log()
            inputs = zip([text[-1], *draft], *logits[:1], target, strict=True)
            for at, (token, of_base, of_target) in enumerate(inputs):
                rows.append((slot, at, len(text) - 1 + at, token))
                wanted.append((of_base, of_base if slot == 1 else of_target))
        order = torch.randperm(len(rows), generator=generator).tolist()
        found = processor.apply(torch.stack([wanted[at][0] for at in order]), context([rows[at] for at in order]))
        torch.testing.assert_close(found, torch.stack([wanted[at][1] for at in order]), atol=1e-4, rtol=1e-4)


def test_one_forward_of_the_proxy_reads_all_drafts(use, base, folders):
    prompts = random_prompts()
    texts = greedy_texts(base, load_model(folders["full attention"]), prompts, RULES[:1])
    engine = FakeV2Engine(base, use(), slots=12, longest_draft=4)
    (reader,) = engine.processor._proxy.readers
    before = reader.forwards
    assert engine.run(requests_of(prompts, texts, RULES[:1])) == texts
    assert engine.steps <= reader.forwards - before <= engine.steps + len(prompts)  # of those that join, one more
    assert min(engine.accepted, engine.refused) > 2


def test_drafted_tokens_are_distributed_as_the_target(use, base, folders):
    """The first two tokens of 4,000 requests, of which the second is drafted. Fails once in a million if right."""
    draws, prompt = 4000, [3, 4, 5]
    proxy = load_model(folders["full attention"])
    kad = KADLogitsProcessor(proxy, "dual", threshold=0.3)
    with torch.no_grad():
        first = kad(torch.tensor([prompt]), base(torch.tensor([prompt])).logits[:, -1])[0].exp()
        ids = torch.tensor([[*prompt, token] for token in range(50)])
        second = KADLogitsProcessor(proxy, "dual", threshold=0.3)(ids, base(ids).logits[:, -1]).exp()
    law = (first[:, None] * second).double().flatten()

    def draft(text):
        return [int(second[text[-1]].topk(3).indices[text[-1] % 3])]

    wanted = [Request(prompt, 3, sampling_params(), draft) for _ in range(draws)]
    engine = FakeV2Engine(base, use(threshold=0.3), slots=64, longest_draft=1, sample=True, seed=8)
    texts = torch.tensor([text[:2] for text in engine.run(wanted)])
    counts = torch.bincount(texts[:, 0] * 50 + texts[:, 1], minlength=2500).double()
    rare = law * draws < 5
    found = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([law[~rare], law[rare].sum()[None]]) / law.sum() * draws
    assert len(expected) > 10 and min(engine.accepted, engine.refused) > 200
    assert chisquare(found, expected).pvalue > 1e-6


def test_a_recycled_slot_begins_anew(use, base):
    """The request before had the same tokens at first, another rule, and a draft that nobody took back."""
    state = request_state(1)
    processor = use(threshold=0.4)(state)

    def step(rows):
        ids = torch.tensor([[3, 4, 5, 6, 7]])
        with torch.no_grad():
            logits = base(ids).logits[0, 1 : 1 + len(rows)]
        return processor.apply(logits.clone(), context(rows)), logits

    state.prefill_len.np[0] = 2
    state.all_token_ids.gpu[0, :2] = torch.tensor([3, 4])
    processor.add_request(0, sampling_params(RULES[3]))
    other, _ = step([(0, 0, 1, 4), (0, 1, 2, 9)])
    processor.add_request(0, sampling_params())
    found, logits = step([(0, 0, 1, 4)])
    assert not torch.allclose(found[0], other[0])
    assert not torch.allclose(found[0], logits[0])
    processor.add_request(0, sampling_params(False))
    found, logits = step([(0, 0, 1, 4)])
    assert torch.equal(found, logits)


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"rule": "dul"}, "Did you mean 'dual'?"), ({"rule": "paced"}, "has a memory of each text")],
)
def test_bad_settings_of_a_request(use, asked, message):
    processor = use(threshold=0.5)(request_state(1))
    for check in (KADLogitsProcessorV2.validate_params, lambda params: processor.add_request(0, params)):
        with pytest.raises(ValueError) as error:
            check(sampling_params(asked))
        assert message in str(error.value)


def test_engines_that_are_refused(use, folders):
    with pytest.raises(ValueError, match="has a memory of each text"):
        use(rule="paced")(request_state(1))
    settings = engine_settings(folders["base"], prompt_embeds=True)
    with pytest.raises(ValueError, match="got `enable_prompt_embeds=True`"):
        use(settings=settings)(request_state(1))
