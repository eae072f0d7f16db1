"""KAD in vLLM, without vLLM: a processor in a stand-in for the V1 engine, which changes its batch as that does.

What needs vLLM itself is in `tests/vllm_engine/end_to_end.py`, of which the last output is kept beside it.
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from fake_vllm_engine import BatchUpdate, Direction, FakeEngine, Request, engine_settings, sampling_params
from scipy.stats import chisquare
from tiny_models import tiny_model

from transformers_kad import KADConfig, KADLogitsProcessor
from transformers_kad.integrations import vllm
from transformers_kad.integrations.loading import load_model
from transformers_kad.integrations.vllm import KADBatchLogitsProcessor

ROOT = Path(__file__).resolve().parents[2]
PAIR = ROOT / "recipes" / "tiny_pair"
NEW = [12, 3, 8, 1, 15, 6, 10, 4, 9, 2, 14, 5, 7, 11, 13, 16, 3, 9, 20, 4, 6, 1, 8, 10]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("KAD_CONFIG", "KAD_CACHE_GIB"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Write the settings of the engine, and make a processor with them."""

    def make(proxy=PAIR / "proxy", rule="dual", base=PAIR / "base", cache_gib=None, settings=None, **parameters):
        folder = tmp_path / f"kad_{len(os.listdir(tmp_path))}"
        KADConfig(rule=rule, parameters=parameters, proxy=str(proxy)).save_pretrained(folder)
        monkeypatch.setenv("KAD_CONFIG", str(folder))
        if cache_gib is not None:
            monkeypatch.setenv("KAD_CACHE_GIB", cache_gib)
        return KADBatchLogitsProcessor(settings or engine_settings(base), torch.device("cpu"), False)

    return make


@pytest.fixture(scope="module")
def pair_base():
    return load_model(PAIR / "base")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random models, saved without tokenizers: bases of 50 and 64 tokens, and proxies of 60 and 50."""
    made = {"base": tiny_model(hidden=32, seed=1), "proxy": tiny_model(hidden=16, seed=2, vocabulary=60)}
    made["wide"] = tiny_model(hidden=32, seed=1, vocabulary=64)
    made["short"] = tiny_model(hidden=16, seed=2, max_position_embeddings=64)
    paths = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, model in made.items():
        model.save_pretrained(paths[name])
    return paths


def prompts(count=24, longest=30, largest=600):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(2, largest, (length,), generator=generator).tolist() for length in lengths]


def requests(kad=None, count=24, **settings):
    """One request for each prompt; `kad` is a list of what they ask for, taken in turn."""
    asked = kad or [None]
    return [
        Request(prompt, new, sampling_params(asked[at % len(asked)]))
        for at, (prompt, new) in enumerate(zip(prompts(count, **settings), NEW, strict=False))
    ]


def expected(base, proxy, wanted, rule="dual", **parameters):
    """The greedy texts of `generate`, each with its own rule where the requests ask for one."""
    texts = []
    for request in wanted:
        asked = request.params.extra_args["kad"] if request.params.extra_args else {}
        own = asked or {"rule": rule, "parameters": parameters}
        processors = [] if asked is False else [KADLogitsProcessor(proxy, own["rule"], **own["parameters"])]
        ids = torch.tensor([request.prompt])
        output = base.generate(
            ids,
            logits_processor=processors,
            do_sample=False,
            max_new_tokens=request.new,
            eos_token_id=None,
            pad_token_id=0,
        )
        texts.append(output[0, ids.shape[1] :].tolist())
    return texts


@pytest.mark.parametrize("chunk", [512, 4])
@pytest.mark.parametrize("cache_gib", [None, "0", "0.0002"])
def test_texts_are_those_of_generate(use, pair_base, chunk, cache_gib):
    """While requests join, leave, change places and are preempted, whatever the memory of the proxy's cache."""
    engine = FakeEngine(pair_base, use(threshold=0.6, cache_gib=cache_gib), chunk=chunk, unrest=0.3)
    texts = engine.run(requests())
    assert texts == expected(pair_base, load_model(PAIR / "proxy"), requests(), threshold=0.6)
    assert texts != expected(pair_base, load_model(PAIR / "proxy"), requests([False]))
    assert engine.preemptions > 3 and engine.swaps > 3


def test_a_rule_for_each_request(use, pair_base):
    asked = [
        {"rule": "dual", "parameters": {"threshold": 0.9}},
        False,
        {"rule": "primal", "parameters": {"budget": 0.3}},
        {"rule": "ensemble", "parameters": {"weight": 0.5}},
    ]
    engine = FakeEngine(pair_base, use(threshold=0.2), unrest=0.3)
    texts = engine.run(requests(asked))
    assert texts == expected(pair_base, load_model(PAIR / "proxy"), requests(asked))
    assert texts != FakeEngine(pair_base, use(threshold=0.2)).run(requests())


def test_a_rule_that_needs_the_proxy_before_alignment(use, pair_base):
    asked = [
        {"rule": "implicit_reward", "parameters": {"beta": 0.8}},
        {"rule": "dual", "parameters": {"threshold": 0.5}},
    ]
    engine = FakeEngine(pair_base, use(rule="implicit_reward", beta=0.8), unrest=0.3)
    texts = engine.run(requests(asked))
    assert texts == expected(pair_base, load_model(PAIR / "proxy", merge=False), requests(asked))


@pytest.mark.parametrize("name", ["base", "wide"])
def test_vocabularies_that_differ_by_padding(use, folders, name):
    base, proxy = load_model(folders[name]), load_model(folders["proxy"])
    processor = use(folders["proxy"], base=folders[name], threshold=0.5)
    wanted = requests(largest=50)
    assert FakeEngine(base, processor, unrest=0.2).run(requests(largest=50)) == expected(
        base, proxy, wanted, threshold=0.5
    )


def test_the_temperature_of_both_models(use, folders):
    base, proxy = load_model(folders["base"]), load_model(folders["proxy"])
    processor = use(folders["proxy"], base=folders["base"], threshold=0.3)
    asked = sampling_params({"component_temperature": 1.7})
    processor.update_state(BatchUpdate(1, [], [(0, asked, [3, 4, 5], [])], []))
    ids, kad = torch.tensor([[3, 4, 5]]), KADLogitsProcessor(proxy, "dual", threshold=0.3, component_temperature=1.7)
    with torch.no_grad():
        logits = base(ids).logits[:, -1]
    target = kad(ids, logits)
    torch.testing.assert_close(processor.apply(logits.clone()), target, atol=1e-4, rtol=1e-4)


def test_sampled_tokens_are_distributed_as_the_target(use, pair_base):
    """The first token of 3,000 requests, of which half ask for another threshold. Fails once in a million if right."""
    prompt, thresholds = prompts()[0], (0.2, 0.7)
    wanted = [{"rule": "dual", "parameters": {"threshold": threshold}} for threshold in thresholds]
    asked = [Request(prompt, 1, sampling_params(wanted[at % 2])) for at in range(3000)]
    texts = FakeEngine(pair_base, use(), rows=64, sample=True, seed=8).run(asked)
    ids = torch.tensor([prompt])
    for at, threshold in enumerate(thresholds):
        kad = KADLogitsProcessor(load_model(PAIR / "proxy"), "dual", threshold=threshold)
        with torch.no_grad():
            target = kad(ids, pair_base(ids).logits[:, -1])[0].exp().double()
        counts = torch.bincount(torch.tensor(texts[at::2]).flatten(), minlength=len(target)).double()
        rare = target * 1500 < 5
        found = torch.cat([counts[~rare], counts[rare].sum()[None]])
        law = torch.cat([target[~rare], target[rare].sum()[None]]) / target.sum()
        assert len(law) > 5
        assert chisquare(found[law > 0], law[law > 0] * 1500).pvalue > 5e-7
        assert counts[target == 0].sum() == 0


def test_one_forward_of_the_proxy_reads_all_running_requests(use, pair_base):
    processor = use(threshold=0.6)
    engine = FakeEngine(pair_base, processor, rows=8)
    texts = engine.run([Request(prompt, 12, sampling_params()) for prompt in prompts(8)])
    assert [len(text) for text in texts] == [12] * 8
    (reader,) = processor._proxy.readers
    assert 12 <= reader.forwards <= engine.steps + 8  # of those that go on, and of those that joined


def test_requests_without_guidance_are_not_read(use, pair_base):
    processor = use(threshold=0.6)
    before = processor._proxy.readers[0].forwards
    FakeEngine(pair_base, processor).run(requests([False]))
    assert processor._proxy.readers[0].forwards == before


def test_moves_onto_rows_of_unguided_requests(use):
    """A row that a guided request leaves or comes to has the guidance of the request that is there then."""
    processor = use()
    guided, free, text = sampling_params(), sampling_params(False), [3, 4]

    def update(removed=(), added=(), moved=()):
        processor.update_state(BatchUpdate(3, list(removed), list(added), list(moved)))
        return sorted(processor._requests)

    assert update(added=[(0, guided, text, []), (1, free, text, []), (2, guided, text, [])]) == [0, 2]
    assert update(moved=[(1, 0, Direction.SWAP)]) == [1, 2]
    assert update(removed=[0], moved=[(2, 0, Direction.UNIDIRECTIONAL)]) == [0, 1]
    assert update(added=[(0, free, text, [])]) == [1]  # in the place of the request before
    assert update(removed=[1], moved=[(0, 1, Direction.UNIDIRECTIONAL)]) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rule": "dul"}, "Unknown rule 'dul'. Did you mean 'dual'?"),
        ({"rul": "dual"}, "Unknown field of `kad`: 'rul'. Did you mean 'rule'?"),
        ({"parameters": {"treshold": 0.5}}, "Did you mean 'threshold'?"),
        ({"parameters": {"threshold": 1.5}}, "must lie in (0, 1], got 1.5"),
        ({"parameters": {"threshold": "high"}}, "must be a number in (0, 1], got 'high'"),
        ({"parameters": [0.5]}, "must be an object, got [0.5]"),
        ({"num_assistant_tokens": 3}, "Unknown field of `kad`: 'num_assistant_tokens'"),
        ({"component_temperature": 0}, "must be a positive number, got 0"),
        ({"rule": "implicit_reward"}, "needs the proxy before alignment"),
        ({"rule": "paced"}, "has a memory of each text"),
        ("no", "must be JSON, got 'no'"),
        ('{"rule": "dul"}', "Did you mean 'dual'?"),
        (2, "must be false or an object"),
        (0.5, "must be false or an object"),
    ],
)
def test_bad_settings_of_a_request(use, asked, message):
    use(threshold=0.5)
    with pytest.raises(ValueError) as error:
        KADBatchLogitsProcessor.validate_params(sampling_params(asked))
    assert message in str(error.value)


def test_settings_of_a_request_as_the_server_passes_them_on(use):
    processor = use(threshold=0.5)

    def guidance(asked):
        KADBatchLogitsProcessor.validate_params(sampling_params(asked))
        return vllm.guidance_of(processor._proxy.config, sampling_params(asked))

    assert guidance(None) == guidance(True) == guidance(1) == guidance("true") == guidance({})
    assert guidance(None).rule.threshold == 0.5
    assert guidance(False) is guidance(0) is guidance("false") is None
    asked = {"parameters": {"threshold": 0.7}}
    assert guidance(json.dumps(asked)) == guidance(asked)
    assert guidance(asked).rule.threshold == 0.7


def test_engines_that_are_refused(use, folders):
    def refused(message, **settings):
        with pytest.raises(ValueError, match=message):
            use(**settings)

    base, proxy = folders["base"], folders["proxy"]
    refused("speculative", settings=engine_settings(base, speculative=object()))
    refused("got `enable_prompt_embeds=True`", settings=engine_settings(base, prompt_embeds=True))
    refused("--max-model-len 64", proxy=folders["short"], settings=engine_settings(base, longest=65))
    refused("pass `reference=`", proxy=proxy, rule="implicit_reward", settings=engine_settings(base))
    refused("has a memory of each text", proxy=proxy, rule="paced", settings=engine_settings(base))
    refused("KAD_CACHE_GIB must be a number of GiB, got 'much'", cache_gib="much")
    refused("KAD_CACHE_GIB must be a number of GiB, got '-1'", cache_gib="-1")


def test_tokenizers_that_differ_are_refused(use, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    shutil.copy(PAIR / "base" / "tokenizer_config.json", other)
    tokenizer = json.loads((PAIR / "base" / "tokenizer.json").read_text(encoding="utf-8"))
    known = tokenizer["model"]["vocab"]
    known["x"], known["y"] = known["y"], known["x"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    use(settings=engine_settings(PAIR / "base", tokenizer=PAIR / "base"))
    with pytest.raises(ValueError, match=r"2 token ids mean different strings .*'x'"):
        use(settings=engine_settings(PAIR / "base", tokenizer=other))


def test_settings_that_are_missing(use, monkeypatch, tmp_path, folders):
    settings = engine_settings(folders["base"])
    with pytest.raises(ValueError, match=r"KAD_CONFIG must name a folder .*save_pretrained"):
        KADBatchLogitsProcessor(settings, torch.device("cpu"), False)
    KADConfig().save_pretrained(tmp_path / "nameless")
    monkeypatch.setenv("KAD_CONFIG", str(tmp_path / "nameless"))
    with pytest.raises(ValueError, match=r"No proxy is named by KAD_CONFIG=.*nameless"):
        KADBatchLogitsProcessor(settings, torch.device("cpu"), False)
    monkeypatch.setenv("KAD_CONFIG", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        KADBatchLogitsProcessor(settings, torch.device("cpu"), False)


def test_logits_that_are_none_are_named(use, folders, tmp_path):
    broken = load_model(folders["proxy"])
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    base = load_model(folders["base"])
    processor = use(tmp_path / "broken", base=folders["base"])
    with pytest.raises(ValueError, match="logits of the proxy LlamaForCausalLM"):
        FakeEngine(base, processor).run([Request([3, 4], 2, sampling_params())])
    with pytest.raises(ValueError, match="logits of the base for position 2"):
        processor.apply(torch.full((1, 50), torch.nan))


# --- The run in vLLM itself -----------------------------------------------------------------------------------------


def load_script():
    spec = importlib.util.spec_from_file_location("end_to_end", ROOT / "tests" / "vllm_engine" / "end_to_end.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def kept_report():
    return json.loads((ROOT / "tests" / "vllm_engine" / "end_to_end.json").read_text(encoding="utf-8"))


def test_the_run_in_vllm_is_of_these_sources():
    script, report = load_script(), kept_report()
    assert report["sources"] == script.hash_of_sources(), (
        "the integration has changed since it ran in vLLM: run it again, see tests/vllm_engine/README.md"
    )
    assert list(report["parts"]) == list(script.PARTS)


def test_the_texts_of_vllm_are_those_of_generate_with_the_newest_transformers(pair_base):
    """The script itself compares them with `generate` in the transformers that vLLM asks for."""
    texts = kept_report()["parts"]["requests"]
    kad = KADLogitsProcessor(load_model(PAIR / "proxy"), "dual", threshold=0.6)
    for prompt, text in zip(texts["prompts"], texts["texts"], strict=True):
        ids = torch.tensor([prompt])
        found = pair_base.generate(ids, logits_processor=[kad], do_sample=False, max_new_tokens=48, pad_token_id=0)
        assert found[0, len(prompt) :].tolist() == text
    assert len(texts["texts"]) == 24
