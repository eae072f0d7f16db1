"""KAD in the evaluation harness: log-likelihoods, generation, tasks, the command line, several processes."""

import functools
import importlib.util
import json
import math
import os
import runpy
import shutil
import sys
import tomllib
from contextlib import nullcontext
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import run_eval
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
from run_command import run_command
from transformers import AutoTokenizer, GenerationConfig, set_seed

from transformers_kad import KADConfig, KADLogitsProcessor, make_rule
from transformers_kad.integrations import lm_eval as lm_eval_model
from transformers_kad.integrations.lm_eval import KADLM
from transformers_kad.integrations.loading.models import load_model, load_tokenizer
from transformers_kad.integrations.loading.prompts import PLAIN_SAMPLING
from transformers_kad.recipes.word_problems import is_correct, make_problems

ROOT = Path(__file__).resolve().parents[2]
PAIR = ROOT / "recipes" / "tiny_pair"
BASE, PROXY, REFERENCE = (str(PAIR / name) for name in ("base", "proxy", "reference"))
TASKS = Path(__file__).parent / "lm_eval_tasks"
PROBLEMS = make_problems("test", 12)
UNTIL_END = {"until": ["<|end|>"], "max_gen_toks": 48}

RULES = {
    "dual": {"threshold": 0.4},
    "primal": {"budget": 0.8},
    "exact": {"budget": 0.8},
    "nudging": {"threshold": 0.7},
    "confidence_bet": {"margin": 0.05},
    "cascade": {"variant": "token_v3", "alpha": 0.5},
    "implicit_reward": {"beta": 1.25},
    "ensemble": {"weight": 0.7},
    "blend_in": {"threshold": 0.6},
}


@functools.cache
def models():
    """Base and proxy as plainly as can be: the adapter not merged."""
    return load_model(BASE), load_model(PROXY, merge=False)


def kad_lm(rule="dual", **arguments):
    arguments = {"base": BASE, "proxy": PROXY, "device": "cpu", "batch_size": 4, **RULES.get(rule, {}), **arguments}
    return KADLM(rule=rule, **arguments)


@functools.cache
def shared_lm(rule="dual", speculative=False):
    return kad_lm(rule, speculative=speculative)


def requests(kind, arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def distributions(rule, prefix, temperature=1.0, base=None, proxy=None):
    """What a rule is given after a prefix, from whole forwards without caches or padding."""
    base, proxy = base or models()[0], proxy or models()[1]
    ids = torch.tensor([prefix])

    def probs(model):
        with torch.no_grad():
            logits = model(ids).logits[0, -1].float()
        missing = base.config.vocab_size - len(logits)
        logits = torch.cat([logits, torch.full((max(missing, 0),), -torch.inf)])[: base.config.vocab_size]
        return (logits / temperature).softmax(-1)

    off = proxy.disable_adapter() if rule.needs_reference else nullcontext()
    with off:
        q0 = probs(proxy) if rule.needs_reference else None
    return probs(base), probs(proxy), q0


def next_probs(rule, prefix, **models_and_temperature):
    """r after a prefix."""
    return rule(*distributions(rule, prefix, **models_and_temperature))


def direct(rule, context, continuation, **models_and_temperature):
    """The log-likelihood of a continuation and whether it is greedy, token by token."""
    total, greedy = 0.0, True
    for at, token in enumerate(continuation):
        r = next_probs(rule, [*context, *continuation[:at]], **models_and_temperature)
        total += r[token].log().item()
        greedy = greedy and int(r.argmax()) == token
    return total, greedy


def direct_with_memory(rule, context, continuation):
    """The same for a rule with a memory, which begins with the continuation."""
    total, greedy, state = 0.0, True, rule.initial_state(1)
    for at, token in enumerate(continuation):
        p, q, _ = distributions(rule, [*context, *continuation[:at]])
        r, _, state = rule.step(p[None], q[None], state)
        total += r[0, token].log().item()
        greedy = greedy and int(r.argmax()) == token
    return total, greedy


def assert_same(values, expected):
    assert [greedy for _, greedy in values] == [greedy for _, greedy in expected]
    for (value, _), (wanted, _) in zip(values, expected, strict=True):
        assert value == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@functools.cache
def pairs():
    """Tokens of contexts and continuations of many lengths: cut inside a question, before and inside an answer."""
    lm = shared_lm()
    made = []
    for index, problem in enumerate(PROBLEMS[:6]):
        prompt = lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": problem.question}]))
        cut, answer = 4 + 2 * index, lm.tok_encode(problem.solution)
        made += [(prompt[:cut], prompt[cut:]), (prompt, answer[: 1 + 3 * index]), ([*prompt, *answer], [1])]
    greedy = generate(lm, prompts(lm)[:1])[0]
    return [*made, (lm.tok_encode(prompts(lm)[0]), [*lm.tok_encode(greedy), 1])]


def score(lm, some):
    return lm._loglikelihood_tokens([(None, *pair) for pair in some], disable_tqdm=True)


# --- Log-likelihoods ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_log_likelihoods_are_those_of_r_token_by_token(rule):
    values = score(shared_lm(rule), pairs())
    assert_same(values, [direct(make_rule(rule, **RULES[rule]), *pair) for pair in pairs()])
    if rule == "dual":  # the last is what greedy decoding wrote
        assert values[-1][1]
        assert not all(greedy for _, greedy in values)


def test_log_likelihoods_at_another_component_temperature():
    values = score(kad_lm(component_temperature=0.6), pairs()[:4])
    rule = make_rule("dual", **RULES["dual"])
    assert_same(values, [direct(rule, *pair, temperature=0.6) for pair in pairs()[:4]])
    assert values[0][0] != pytest.approx(score(shared_lm(), pairs()[:1])[0][0], rel=1e-3)


def test_log_likelihoods_at_a_tiny_component_temperature():
    first_tokens = [(context, continuation[:1]) for context, continuation in pairs()]
    values = score(kad_lm(component_temperature=1e-38), first_tokens)
    rule = make_rule("dual", **RULES["dual"])
    assert_same(values, [direct(rule, *pair, temperature=1e-4) for pair in first_tokens])
    assert {value for value, _ in values} == {0.0, -math.inf}


def test_log_likelihoods_of_texts():
    lm = shared_lm()
    texts = [("Mia has", " 34 apples."), ("", "Mia has"), (prompts(lm)[0], "We get")]
    ids = [(lm.tok_encode("Mia has"), lm.tok_encode(" 34 apples.")), ([1], lm.tok_encode("Mia has"))]
    ids.append((lm.tok_encode(prompts(lm)[0])[:-1], lm.tok_encode("\nWe get")))
    assert_same(
        lm.loglikelihood(requests("loglikelihood", texts), disable_tqdm=True),
        [direct(lm.kad.rule, *pair) for pair in ids],
    )


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_log_likelihoods_do_not_depend_on_the_batch_size(batch_size):
    assert_same(score(kad_lm(batch_size=batch_size), pairs()), score(shared_lm(), pairs()))


def test_long_continuations_are_scored_piece_by_piece(monkeypatch):
    whole = score(shared_lm(), pairs())
    monkeypatch.setattr(lm_eval_model, "_LOGITS_AT_ONCE", 3 * 640)
    assert score(shared_lm(), pairs()) == whole


def generated(lm, questions):
    """What the harness makes of its own requests for some texts."""
    asked = [(lm.apply_chat_template([{"role": "user", "content": question}]), UNTIL_END) for question in questions]
    return lm.generate_until(requests("generate_until", asked), disable_tqdm=True)


@pytest.mark.parametrize("names", [["input_ids", "token_type_ids", "attention_mask"], ["input_ids"]])
def test_tokenizers_without_a_padding_token_and_with_other_input_names_make_the_same_texts(tmp_path, names):
    """The harness would take the unknown token, or one that is not in the vocabulary, and reads a mask."""
    questions = [problem.question for problem in PROBLEMS[:4]]
    folder = tokenizer_without("pad_token", tmp_path, unk_token="<|user|>", model_input_names=names)
    lm = kad_lm(base=folder)
    assert lm.tokenizer.pad_token_id == lm.tokenizer.eos_token_id
    assert generated(lm, questions) == generated(shared_lm(), questions)


def tokenizer_without(token, folder, **changes):
    """The base in a folder of its own, whose tokenizer lacks a special token."""
    shutil.copytree(BASE, folder / "base")
    path = folder / "base" / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    del config[token]
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return str(folder / "base")


@pytest.mark.parametrize("larger", ["base", "proxy"])
def test_vocabularies_may_differ_by_padding_rows(tmp_path, larger):
    paths = {"base": BASE, "proxy": REFERENCE}
    for role, path in paths.items():
        model = load_model(path)
        if role == larger:
            model.resize_token_embeddings(672, mean_resizing=False)
            with torch.no_grad():
                model.get_output_embeddings().weight[640:] = model.get_output_embeddings().weight[:32]
        model.save_pretrained(tmp_path / role)
        AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / role)
    lm = kad_lm(base=tmp_path / "base", proxy=tmp_path / "proxy")
    loaded = {role: load_model(tmp_path / role) for role in paths}
    assert_same(score(lm, pairs()[:4]), [direct(lm.kad.rule, *pair, **loaded) for pair in pairs()[:4]])


def test_an_adapter_serves_as_base():
    lm = kad_lm(base=PROXY, proxy=PROXY)
    assert_same(score(lm, pairs()[:3]), [direct(lm.kad.rule, *pair, base=models()[1]) for pair in pairs()[:3]])


def test_one_forward_of_each_model_serves_all_choices_of_one_token(monkeypatch):
    lm = kad_lm("implicit_reward")
    asked = []
    for cached in lm._cached:
        monkeypatch.setattr(
            cached,
            "_call",
            lambda texts, new, keep, call=cached._call, role=cached.role: (
                asked.append((role, (len(texts.ids), new), keep)) or call(texts, new, keep)
            ),
        )
    choices = [([3, 4, 5, 6, 7], [8]), ([3, 4, 5, 6, 7], [9]), ([3, 4, 5, 6], [7, 10]), ([11, 14, 15], [12, 13])]
    values = score(lm, choices)
    assert asked == [("base", (2, 5), 3), ("proxy", (2, 5), 3), ("reference", (2, 5), 3)]
    assert_same(values, [direct(lm.kad.rule, *pair) for pair in choices])


def test_a_rule_with_a_memory_follows_each_continuation_from_its_beginning(monkeypatch):
    monkeypatch.setattr(lm_eval_model, "_LOGITS_AT_ONCE", 2000)  # several parts of a continuation
    parameters = {"budget": 0.5, "threshold": 0.3, "step_size": 1.5}
    lm = kad_lm("paced", **parameters)
    context, continuation = pairs()[-1]
    # Two requests with the same text, of which the continuation begins at different places.
    some = [*pairs(), ([*context, *continuation[:3]], continuation[3:])]
    values = score(lm, some)
    assert_same(values, [direct_with_memory(make_rule("paced", **parameters), *pair) for pair in some])
    forgetful = direct(make_rule("dual", threshold=0.3), context, continuation)[0]
    assert abs(values[-2][0] - forgetful) > 0.1


def test_only_the_positions_of_continuations_are_kept(monkeypatch):
    lm = shared_lm()
    kept = []
    monkeypatch.setattr(lm, "_log_target", lambda logits, *_: kept.append(len(logits[0])) or (logits[0], None))
    score(lm, [(list(range(5, 60)), [60, 61]), ([7] * 55, [8])])
    assert kept == [2, 1]


def test_an_impossible_continuation_is_minus_infinity():
    lm = kad_lm(component_temperature=0.01)
    context, continuation = pairs()[-1]
    values = score(lm, [(context, continuation), (context, continuation[::-1])])
    assert math.isfinite(values[0][0])
    assert values[1] == (-math.inf, False)
    assert direct(lm.kad.rule, context, continuation[::-1], temperature=0.01)[0] == -math.inf


def test_long_texts_are_cut_on_the_left(caplog):
    lm = kad_lm(max_length=12)
    assert lm.max_length == 12
    context, continuation = pairs()[-1]
    values = score(lm, [(context, continuation[:5])])
    assert_same(values, [direct(lm.kad.rule, context[-8:], continuation[:5])])
    assert "1 of 1 texts are truncated on the left to 12 tokens" in caplog.text


def test_the_shortest_context_of_all_models_counts(tmp_path):
    model = load_model(REFERENCE)
    model.config.max_position_embeddings = 64
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    assert kad_lm(proxy=tmp_path).max_length == 64
    assert shared_lm().max_length == 512


@pytest.mark.parametrize("max_length", [None, 9])
def test_rolling_log_likelihoods(max_length):
    lm = shared_lm() if max_length is None else kad_lm(max_length=max_length)
    solutions = [problem.solution for problem in PROBLEMS[:3]]
    values = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in solutions]))
    for text, value in zip(solutions, values, strict=True):
        windows = get_rolling_token_windows(lm.tok_encode(text), lm.prefix_token_id, lm.max_length, 1)
        expected = [direct(lm.kad.rule, *make_disjoint_window(window))[0] for window in windows]
        assert (len(expected) > 1) == (max_length is not None)
        assert value == pytest.approx(sum(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [([], [1], "0 and 1 tokens"), ([1], [], "1 and 0 tokens"), ([1], [2] * 513, "1 to 512 tokens after it")],
)
def test_texts_that_have_no_log_likelihood_are_refused(context, continuation, message):
    with pytest.raises(ValueError, match=message):
        score(shared_lm(), [(context, continuation)])


@pytest.mark.parametrize("role", ["base", "proxy"])
def test_unusable_logits_are_named(role):
    lm = kad_lm()
    broken = lm._model if role == "base" else lm.kad.proxy
    with torch.no_grad():
        broken.get_output_embeddings().weight[20] = torch.nan
    with pytest.raises(ValueError, match=f"logits of the {role} .* for position 2 of sequence 0"):
        score(lm, [([7, 8], [20, 9])])


# --- Generation ---------------------------------------------------------------------------------------------


def prompts(lm, problems=PROBLEMS):
    return [lm.apply_chat_template([{"role": "user", "content": problem.question}]) for problem in problems]


def generate(lm, contexts, **settings):
    arguments = [(context, {**UNTIL_END, **settings}) for context in contexts]
    return lm.generate_until(requests("generate_until", arguments), disable_tqdm=True)


def generate_directly(contexts, rule="dual", threshold=None, **settings):
    """New tokens of each prompt, decoded alone by a call of `generate`."""
    parameters = RULES[rule] if threshold is None else {"threshold": threshold}
    base, tokenizer = models()[0], load_tokenizer(BASE)
    texts = []
    for context in contexts:
        ids = tokenizer(context, return_tensors="pt")
        kad = KADLogitsProcessor(models()[1], rule, **parameters)
        settings = {"max_new_tokens": 48, "eos_token_id": 1, **settings}
        texts.append(base.generate(**ids, **settings, logits_processor=[kad])[0, ids["input_ids"].shape[1] :])
    return texts


@pytest.mark.parametrize("rule", ["dual", "primal", "implicit_reward"])
@pytest.mark.parametrize("speculative", [False, True])
def test_greedy_texts_are_those_of_generate(rule, speculative):
    lm = shared_lm(rule, speculative)
    tokenizer = load_tokenizer(BASE)
    expected = [
        tokenizer.decode(ids, skip_special_tokens=True)
        for ids in generate_directly(prompts(lm), rule, do_sample=False)
    ]
    assert generate(lm, prompts(lm)) == expected
    assert len(set(expected)) == len(expected)


@pytest.mark.parametrize(
    ("opened", "text", "answer"),
    [
        ("", "<think>\nIs it 12?\n</think>\n\nIt is 15.", "\n\nIt is 15."),
        ("", "<think>\nIs it 12?", ""),
        ("", "It is 15.", "It is 15."),
        ("<think>\n", "Is it 12?\n</think>\n\nIt is 15.", "\n\nIt is 15."),
        ("<think>\n", "Is it 12?", ""),
    ],
)
def test_thoughts_are_no_part_of_a_text(monkeypatch, opened, text, answer):
    lm = shared_lm()

    def write(context, max_length, stop, **settings):
        return torch.cat([context, torch.tensor([lm.tok_encode(text)] * len(context))], dim=-1)

    monkeypatch.setattr(lm, "_model_generate", write)
    contexts = [prompt + opened for prompt in prompts(lm)[:2]]
    assert generate(lm, contexts, until=["<|end|>"]) == [answer] * 2


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("stop", [" answer", "=", "get 3"])
def test_stop_strings_end_a_text_at_their_last_token(monkeypatch, speculative, stop):
    lm = shared_lm("dual", speculative)
    lengths = []
    inner = lm._model_generate

    def spy(context, **settings):
        output = inner(context, **settings)
        lengths.append(output.shape[1] - context.shape[1])
        return output

    monkeypatch.setattr(lm, "_model_generate", spy)
    contexts = prompts(lm)[:1]
    (ids,) = generate_directly(contexts, do_sample=False)
    whole = lm.tok_decode(ids)
    ends = [n for n in range(len(ids)) if stop in lm.tok_decode(ids[:n])] or [len(ids)]
    assert generate(lm, contexts, until=[stop]) == [whole.split(stop)[0]]
    assert lengths == [ends[0]]


@pytest.mark.parametrize("speculative", [False, True])
def test_the_task_s_limit_ends_a_text(speculative):
    lm = shared_lm("dual", speculative)
    expected = [lm.tok_decode(ids[:7]) for ids in generate_directly(prompts(lm), do_sample=False)]
    assert generate(lm, prompts(lm), max_gen_toks=7) == expected


def test_the_stop_strings_occur():
    (ids,) = generate_directly(prompts(shared_lm())[:1], do_sample=False)
    assert [stop in shared_lm().tok_decode(ids) for stop in (" answer", "=", "get 3")] == [True, True, True]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 5}])
def test_sampling_is_the_plain_law_unless_the_task_says_otherwise(monkeypatch, settings):
    lm = shared_lm()
    context = prompts(lm)[3]
    inner, passed = lm._model.generate, {}
    monkeypatch.setattr(lm._model, "generate", lambda **given: passed.update(given) or inner(**given))
    set_seed(3)
    sampled = generate(lm, [context], do_sample=True, **settings)
    set_seed(3)
    plain = {**PLAIN_SAMPLING, **settings}
    (ids,) = generate_directly([context], **plain)
    assert sampled == [lm.tok_decode(ids)]
    assert {name: passed[name] for name in plain} == plain


def test_speculative_sampling_draws_a_text_that_depends_on_the_seed():
    lm = shared_lm("dual", True)
    texts = set()
    for seed in range(20):
        set_seed(seed)
        texts |= set(generate(lm, prompts(lm)[:1], do_sample=True, temperature=1.5))
    assert len(texts) > 1
    assert lm.kad.statistics.drafted > 0


def test_what_the_base_s_own_configuration_asks_for_is_ignored(tmp_path):
    model = load_model(BASE)
    asked = {"temperature": 0.1, "top_k": 1, "do_sample": True, "repetition_penalty": 9.0, "min_new_tokens": 40}
    model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=[1, 7], **asked)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    lm = kad_lm(base=tmp_path)
    assert lm.eos_token_ids == [1, 7]
    assert generate(lm, prompts(lm)) == generate(shared_lm(), prompts(lm))


def test_the_ends_of_both_models_end_a_text(tmp_path):
    model = load_model(REFERENCE)
    model.generation_config.eos_token_id = 9
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    assert kad_lm(proxy=tmp_path).eos_token_ids == [1, 9]


def test_a_base_without_chat_template_takes_the_proxy_s(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = None
    load_model(BASE).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = kad_lm(base=tmp_path)
    assert prompts(lm) == prompts(shared_lm())


# --- Arguments ----------------------------------------------------------------------------------------------


def test_arguments_parse_from_text():
    lm = KADLM.create_from_arg_string(
        f"base={BASE},proxy={PROXY},rule=cascade,variant=diff,alpha=1,component_temperature=2,num_assistant_tokens=3,"
        "verification=block,speculative=true,device=cpu,batch_size=2,dtype=bfloat16",
        {"batch_size": 1, "device": "cuda:7", "max_batch_size": None},
    )
    config = KADConfig("cascade", {"variant": "diff", "alpha": 1}, 2, 3, base=BASE, proxy=PROXY, verification="block")
    assert lm.kad_config == config
    assert lm.kad.verification == "block"
    assert (lm.speculative, str(lm.device), lm.batch_size) == (True, "cpu", 2)
    assert lm._model.dtype == lm.kad.proxy.dtype == torch.bfloat16
    quoted = kad_lm(threshold="0.25", speculative="False")
    assert (quoted.kad.rule, quoted.speculative) == (make_rule("dual", threshold=0.25), False)


def test_a_config_gives_what_is_not_given(tmp_path):
    KADConfig("primal", {"budget": 0.5}, 1.2, 3, base=BASE, proxy=PROXY).save_pretrained(tmp_path)
    lm = KADLM(config=tmp_path, device="cpu")
    assert lm.kad_config == KADConfig("primal", {"budget": 0.5}, 1.2, 3, base=BASE, proxy=PROXY)
    assert lm.kad.rule == make_rule("primal", budget=0.5)
    other = KADLM(config=tmp_path, rule="dual", base=PROXY, device="cpu", num_assistant_tokens=2)
    assert other.kad_config == KADConfig("dual", {}, 1.2, 2, base=PROXY, proxy=PROXY)


def test_a_reference_can_be_given():
    lm = kad_lm("implicit_reward", reference=REFERENCE)
    assert_same(score(lm, pairs()), score(shared_lm("implicit_reward"), pairs()))


def test_a_large_base_can_be_spread():
    assert_same(score(kad_lm(parallelize=True), pairs()), score(shared_lm(), pairs()))


def test_a_large_base_can_be_quantized():
    pytest.importorskip("torchao.quantization")
    quantized = kad_lm(quantization="torchao-int8")
    ((value, _),) = score(quantized, pairs()[-1:])
    ((exact, _),) = score(shared_lm(), pairs()[-1:])
    assert value != exact
    assert value == pytest.approx(exact, abs=0.1)
    assert quantized.get_model_info()["kad"]["quantization"] == "torchao-int8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"treshold": 0.3}, "Unknown model argument 'treshold'. Did you mean 'threshold'?"),
        ({"budget": 0.3}, "Unknown parameter of the rule 'dual': 'budget'. Known: threshold"),
        ({"max_lenght": 12}, "Did you mean 'max_length'?"),
        ({"rule": "duel"}, "Unknown rule 'duel'. Did you mean 'dual'?"),
        ({"threshold": "high"}, "threshold`.*'high'"),
        ({"threshold": 1.5}, "1.5"),
        ({"speculative": "maybe"}, "`speculative` must be true or false, got 'maybe'"),
        ({"num_assistant_tokens": 0}, "`num_assistant_tokens`.*got 0"),
        ({"component_temperature": 0}, "`component_temperature`.*got 0"),
        ({"reference": REFERENCE}, "`reference` is for rules that need one, which 'dual' does not"),
        ({"base": None}, "Base and proxy are needed, got None.*--model_args base=...,proxy=..."),
    ],
)
def test_arguments_that_can_t_be_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        KADLM(**{"base": BASE, "proxy": PROXY, "device": "cpu", **arguments})


def test_a_proxy_with_another_vocabulary_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[400:402]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    load_model(REFERENCE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 token ids mean different strings"):
        kad_lm(proxy=tmp_path)


def test_the_harness_finds_the_type():
    assert get_model("kad") is KADLM
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    assert EntryPoint("kad", declared["kad"], "lm_eval.models").load() is KADLM


def test_a_missing_harness_is_named_with_what_installs_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    with pytest.raises(ImportError, match=r'pip install -e "\.\[lm-eval\]"'):
        runpy.run_path(lm_eval_model.__file__)


# --- Tasks --------------------------------------------------------------------------------------------------


def evaluate(lm, *tasks, **settings):
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return simple_evaluate(
        model=lm, tasks=list(tasks), task_manager=manager, apply_chat_template=True, bootstrap_iters=0, **settings
    )


@pytest.mark.parametrize("speculative", [False, True])
def test_a_task_s_score_is_that_of_generate_and_the_task_s_own_scorer(speculative):
    lm = kad_lm(threshold=1.0, speculative=speculative)
    results = evaluate(lm, "word_problems")
    texts = lm.tokenizer.batch_decode(generate_directly(prompts(lm), threshold=1.0, do_sample=False))
    expected = [is_correct(text, problem) for text, problem in zip(texts, PROBLEMS, strict=True)]
    assert [sample["strict"] for sample in results["samples"]["word_problems"]] == expected
    assert results["results"]["word_problems"]["strict,none"] == sum(expected) / len(expected)
    assert 0 < sum(expected) < len(expected)


@pytest.mark.parametrize("speculative", ["--speculative", "--no_speculative"])
def test_the_score_is_that_of_run_eval_problem_by_problem(tmp_path, speculative):
    arguments = ["--method", "kad-dual:threshold=1.0", "--limit", str(len(PROBLEMS)), "--no_do_sample", speculative]
    assert run_eval.main([*arguments, "--output", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    results = evaluate(kad_lm(threshold=1.0), "word_problems")
    samples = results["samples"]["word_problems"]
    assert [sample["strict"] for sample in samples] == [line["correct"] for line in lines]
    assert [sample["lenient"] for sample in samples] == [line["correct_lenient"] for line in lines]
    assert len({line["correct"] for line in lines}) == 2


def test_tasks_of_log_likelihoods():
    lm = shared_lm()
    results = evaluate(lm, "word_problems_choice", "word_problems_perplexity")
    samples = results["samples"]["word_problems_choice"]
    likeliest = [max(range(3), key=lambda i, sample=sample: sample["resps"][i][0][0]) for sample in samples]
    assert [sample["acc"] for sample in samples] == [float(choice == 2) for choice in likeliest]
    assert results["results"]["word_problems_choice"]["acc,none"] > 0.5
    total, words = 0.0, 0
    for problem in PROBLEMS:
        total += direct(lm.kad.rule, [1], lm.tok_encode(problem.solution))[0]
        words += len(problem.solution.split())
    perplexity = results["results"]["word_problems_perplexity"]["word_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-total / words), rel=1e-4)


def test_results_can_be_written_also_with_impossible_choices():
    lm = kad_lm(component_temperature=0.1)
    results = evaluate(lm, "word_problems_choice", "word_problems_perplexity", limit=6)
    samples = results["samples"]["word_problems_choice"]
    values = [answer[0][0] for sample in samples for answer in sample["resps"]]
    assert -math.inf in values
    assert not all(value == -math.inf for value in values)
    read = json.loads(json.dumps(results, default=handle_non_serializable))
    assert read["config"]["kad"]["component_temperature"] == 0.1
    assert read["results"]["word_problems_perplexity"]["word_perplexity,none"] == math.inf


def test_the_results_name_models_and_settings():
    info = shared_lm("implicit_reward", True).get_model_info()["kad"]
    assert (info["rule"], info["parameters"]) == ("implicit_reward", {"beta": 1.25})
    assert (info["base"], info["proxy"], info["speculative"], info["num_processes"]) == (BASE, PROXY, True, 1)


def test_answers_are_cached_for_the_harness(tmp_path):
    first = evaluate(kad_lm(), "word_problems_choice", use_cache=str(tmp_path / "answers"), limit=3)
    again = kad_lm()
    again._logits = None  # not to be called
    second = evaluate(again, "word_problems_choice", use_cache=str(tmp_path / "answers"), limit=3)
    assert second["results"] == first["results"]


@pytest.mark.slow
def test_the_batch_size_can_be_found_automatically():
    lm = kad_lm(batch_size="auto", max_batch_size=4, max_length=64)
    results = evaluate(lm, "word_problems_choice", limit=6)
    plain = evaluate(shared_lm(), "word_problems_choice", limit=6)
    assert results["results"] == plain["results"]
    assert lm.batch_sizes == {0: 4}


def test_measuring_the_batch_size_runs_r_at_every_position():
    lm = shared_lm()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    log_r = lm._model_call(ids)
    assert log_r.shape == (2, 3, 640)
    torch.testing.assert_close(log_r[1, 1].exp(), next_probs(lm.kad.rule, [8, 9]))


# --- The command line ---------------------------------------------------------------------------------------

COMMAND = ("-m", "transformers_kad.integrations.lm_eval")


def run(tmp_path, *words, launcher=()):
    """The results and the answers by document that the command writes."""
    arguments = f"base={BASE},proxy={PROXY},rule=primal,budget=0.8"
    tasks = "word_problems,word_problems_choice,word_problems_perplexity"
    command = [sys.executable, *launcher, *COMMAND, "--model", "kad", "--model_args", arguments, "--tasks", tasks]
    command += ["--include_path", str(TASKS), "--apply_chat_template", "--device", "cpu", "--log_samples", "--limit"]
    command += ["7", "--output_path", str(tmp_path / "results.json"), *words]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = run_command(command, env={**os.environ, **own}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr  # nothing that the person at the terminal can do something about
    (results,) = tmp_path.glob("results_*.json")
    answers = {}
    for path in tmp_path.glob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").partition("_2")[0]
        records = [json.loads(line) for line in path.read_text().splitlines()]
        # A process with fewer requests than others answers its last one again.
        answers[task] = {record["doc_id"]: [answer[0] for answer in record["resps"]] for record in records}
    return json.loads(results.read_text()), answers


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"))


@pytest.mark.slow
def test_the_command_runs_a_local_task(one_process):
    results, answers = one_process
    lm = shared_lm("primal")
    expected = evaluate(lm, "word_problems", limit=7)
    assert results["results"]["word_problems"]["strict,none"] == expected["results"]["word_problems"]["strict,none"]
    samples = expected["samples"]["word_problems"]
    assert answers["word_problems"] == {sample["doc_id"]: sample["resps"][0] for sample in samples}
    kad = results["config"]["kad"]
    assert (kad["base"], kad["proxy"], kad["rule"], kad["parameters"]) == (BASE, PROXY, "primal", {"budget": 0.8})


@pytest.mark.slow
def test_two_processes_share_the_requests_and_give_the_same_results(one_process, tmp_path):
    results, answers = run(tmp_path, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"))
    assert results["config"]["kad"]["num_processes"] == 2
    assert one_process[0]["config"]["kad"]["num_processes"] == 1
    assert answers == one_process[1]
    assert [len(documents) for documents in answers.values()] == [7, 7, 7]
    for task, figures in one_process[0]["results"].items():
        numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
        # The documents come in another order, and with it the rounding of sums.
        assert {name: results["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-12)
        assert numbers


def test_the_harness_s_table_has_a_header():
    """Releases of pytablewriter before 1.0 write A, B, C there when they are used as the harness uses them."""
    results = {"results": {"gsm8k": {"alias": "gsm8k", "exact_match,none": 0.5}}, "versions": {"gsm8k": 3}}
    table = make_table({**results, "n-shot": {"gsm8k": 0}, "higher_is_better": {"gsm8k": {"exact_match": True}}})
    assert [cell.strip() for cell in table.splitlines()[0].split("|")] == [
        *("", "Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr", ""),
    ]
