"""The methods side by side: what each asks of generate, and what it is refused for."""

import pytest
import torch
from tiny_models import tiny_model

from transformers_kad import KADConfig
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.recipes.benchmarking.bounds import Shape
from transformers_kad.recipes.benchmarking.forwards import ForwardMeter
from transformers_kad.recipes.benchmarking.methods import (
    KINDS,
    Method,
    MethodRunner,
    counts_from_json,
    counts_to_json,
    expand,
    rows_in_step,
)
from transformers_kad.recipes.benchmarking.subjects import Subject

PROMPT = 7
NEW = 20
CONFIG = KADConfig("dual", {"threshold": 0.5})


def make_contest(base, proxy, rows=1, config=CONFIG):
    return MethodRunner(Subject(base, proxy), config, rows=rows, max_new_tokens=NEW, longest_prompt=PROMPT)


def inputs(rows=1):
    ids = torch.randint(1, 50, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(runner, method):
    """The text of a method, and the forwards of its models."""
    assert runner.reason_to_skip(method) is None
    with ForwardMeter(runner.subject.models, None) as meter:
        ids = runner.generate(method, inputs(runner.rows))
    return ids, meter.counts


def test_every_kind_is_expanded_by_the_draft_lengths_and_the_base_comes_first():
    keys = [method.key for method in expand(["auto", "speculative", "auto", "assisted"], [3, 5])]
    assert keys == ["base", "auto", "speculative:3", "speculative:5", "assisted:3", "assisted:5"]
    assert [Method.from_key(key).key for key in keys] == keys
    assert Method("speculative", 3).label == "KAD speculative, γ = 3"
    own = expand(["speculative:7", "assisted", "speculative:3"], [3])
    assert [method.key for method in own] == ["base", "speculative:7", "assisted:3", "speculative:3"]
    for name in ("fast", "fast:3", "auto:3", "speculative:0", "speculative:x"):
        with pytest.raises(ValueError, match=f"got '{name}'"):
            expand([name], [3])


@pytest.mark.parametrize("rows", [1, 3])
def test_every_method_emits_the_same_number_of_tokens(rows, base, proxy, uncompiled):
    runner = make_contest(base, proxy, rows)
    other = "in_step" if rows == 1 else "one_row"
    methods = [method for method in expand(list(KINDS), [3]) if not getattr(KINDS[method.kind], other)]
    assert len(methods) == {1: 10, 3: 10}[rows]
    for method in methods:
        ids, _ = run(runner, method)
        assert ids.shape == (rows, PROMPT + NEW), method.key
        statistics = runner.statistics(method)
        assert statistics is None or statistics.tokens == rows * NEW


def test_an_end_of_sequence_ends_nothing():
    # Whatever is drawn, both models hold it for an end.
    base, proxy = (tiny_model(seed=seed, eos_token_id=list(range(50))) for seed in (1, 2))
    for model in (base, proxy):
        model.generation_config.eos_token_id = None  # as loading leaves it
    runner = make_contest(base, proxy)
    for method in expand(["proxy", "assisted", "token_by_token", "lazy", "speculative"], [4]):
        assert run(runner, method)[0].shape == (1, PROMPT + NEW), method.key


def test_forwards_are_those_of_the_method(base, proxy):
    runner = make_contest(base, proxy)
    step = [Shape("base", 1, 1), Shape("proxy", 1, 1)]
    _, counts = run(runner, Method("base"))
    assert counts == {Shape("base", 1, PROMPT): 1, step[0]: NEW - 1}
    _, counts = run(runner, Method("proxy"))
    assert counts == {Shape("proxy", 1, PROMPT): 1, step[1]: NEW - 1}
    _, counts = run(runner, Method("token_by_token"))
    assert counts[step[0]] == counts[step[1]] == NEW - 1
    _, counts = run(runner, Method("lazy"))
    assert counts[step[0]] == NEW - 1
    assert counts[step[1]] <= NEW - 1
    for kind in ("assisted", "speculative"):
        _, counts = run(runner, Method(kind, 3))
        assert max(shape.tokens for shape in counts if shape.model == "base") == PROMPT + 3, kind
        assert counts[Shape("base", 1, 4)] > 0, kind
        assert all(shape.tokens in (1, 2, PROMPT) for shape in counts if shape.model == "proxy"), kind
    _, counts = run(runner, Method("prompt_lookup", 3))
    assert {shape[1:] for shape in counts if shape.model == "base"} == {
        shape[1:] for shape in counts if shape.model == "proxy"
    }


def test_the_peer_drafts_as_many_tokens_every_time_until_the_text_ends(base, proxy):
    runner, widths = make_contest(base, proxy), []
    handle = base.register_forward_pre_hook(
        lambda model, args, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    run(runner, Method("assisted", 4))
    handle.remove()
    drafts = [widths[0] - PROMPT, *(width - 1 for width in widths[1:])]
    assert drafts[:3] == [4, 4, 4]
    assert drafts == sorted(drafts, reverse=True)


def test_compiled_forwards_of_a_batch_are_counted_by_their_buckets(base, proxy, uncompiled):
    runner, method = make_contest(base, proxy, rows=3), Method("compiled", 3)
    for _ in range(2):  # the forwards of the call before are not counted again
        run(runner, method)
    counts = runner.compiled_counts(method, PROMPT)
    of_base = {shape.rows: count for shape, count in counts.items() if shape.model == "base compiled"}
    rounds = [row.rounds for row in runner.statistics(method).sequences]
    # Prompts of several lengths end in a compiled forward, so that every round is one.
    assert sum(of_base.values()) == max(rounds)
    assert set(of_base) <= {1, 2, 4}
    assert of_base[4] == sorted(rounds)[0]
    assert {shape.tokens for shape in counts if shape.model == "proxy compiled"} == {1}
    assert set(runner.compiled_models(method)) == {shape for shape in counts if "compiled" in shape.model}


def test_compiled_methods_are_counted_by_their_statistics(base, proxy, uncompiled):
    runner = make_contest(base, proxy)
    method = Method("compiled", 3)
    for _ in range(2):
        run(runner, method)
    statistics = runner.statistics(method)
    counts = runner.compiled_counts(method, PROMPT)
    assert counts == {
        Shape("base", 1, PROMPT + 3): 1,
        Shape("base compiled", 1, 4): statistics.rounds - 1,
        Shape("proxy", 1, PROMPT): 1,
        Shape("proxy compiled", 1, 1): statistics.proxy_forwards - 1,
    }
    assert {shape for shape in counts if "compiled" in shape.model} == set(runner.compiled_models(method))
    alone = runner.compiled_counts(Method("base_compiled"), PROMPT)
    assert alone == {Shape("base", 1, PROMPT): 1, Shape("base compiled", 1, 1): NEW - 1}


def test_the_compiled_base_keeps_one_cache(base, proxy, uncompiled):
    runner, caches = make_contest(base, proxy), set()
    for _ in range(2):
        run(runner, Method("base_compiled"))
        caches.add(id(runner._static))
    assert len(caches) == 1
    assert {layer.max_cache_len for layer in runner._static.layers} == {256}


def test_what_a_method_cannot_do_is_said(base, proxy):
    wide = tiny_model(seed=2, vocabulary=60)
    assert "one text at a time, not 2" in make_contest(base, proxy, rows=2).reason_to_skip(Method("assisted", 3))
    assert "and there is one" in make_contest(base, proxy).reason_to_skip(Method("in_step", 3))
    assert "got 50 and 60 rows" in make_contest(base, wide).reason_to_skip(Method("assisted", 3))
    assert make_contest(base, wide).reason_to_skip(Method("speculative", 3)) is None
    looks = KADConfig("confidence_bet", {"margin": 0.1})
    assert "does not depend on q" in make_contest(base, proxy, config=looks).reason_to_skip(Method("lazy"))


def test_counts_survive_json():
    counts = {Shape("base", 1, 6): 3, Shape("proxy", 2, 1): 1}
    assert counts_from_json(counts_to_json(counts)) == counts


def needs_rows_in_step():
    return getattr(CachedModel, "needs_rows_in_step", "left to the cache")


def test_rows_are_in_step_inside_and_as_before_outside(monkeypatch):
    own = property(lambda model: False)
    monkeypatch.setattr(CachedModel, "needs_rows_in_step", own, raising=False)
    with pytest.raises(KeyError), rows_in_step():
        assert CachedModel.needs_rows_in_step is True
        raise KeyError
    assert CachedModel.needs_rows_in_step is own


def test_only_the_method_in_step_is_run_so(base, proxy):
    runner, seen = make_contest(base, proxy, rows=2), {}
    before = needs_rows_in_step()
    handle = base.register_forward_pre_hook(lambda model, args: seen[method].add(needs_rows_in_step()))
    for method in expand(["in_step", "speculative", "auto"], [3]):
        seen[method] = set()
        run(runner, method)
    handle.remove()
    in_step = seen.pop(Method("in_step", 3))
    assert in_step == {True}
    assert all(each == {before} for each in seen.values())
