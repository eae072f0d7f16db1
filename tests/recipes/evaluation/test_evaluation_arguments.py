"""The command line of evaluations: what is refused, and which models and devices it stands for."""

from types import SimpleNamespace

import pytest

from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.evaluation import arguments as module
from transformers_kad.recipes.evaluation.arguments import (
    EvaluationArguments,
    EvaluationSampling,
    MethodArguments,
    make_decoder,
)

ALONE = SimpleNamespace(num_processes=1, local_process_index=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": ["gsm"]}, "'gsm'.*Did you mean 'gsm8k'"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"few_shot": -1}, "--few_shot must be at least 0, got -1"),
        ({"template_arguments": "[]"}, "--template_arguments must be a JSON object"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments(**settings)


def test_a_task_that_is_named_twice_is_evaluated_once():
    (workload,) = EvaluationArguments(task=["tiny", "tiny"], limit=3).workloads(EvaluationSampling(seed=7))
    assert (len(workload.instances), workload.max_new_tokens, workload.seed) == (3, 48, 7)


def test_the_length_is_the_tasks_unless_it_is_given():
    assert "max_new_tokens" not in EvaluationSampling(max_new_tokens=5).settings()
    (workload,) = EvaluationArguments(limit=1).workloads(EvaluationSampling(max_new_tokens=5))
    assert workload.max_new_tokens == 5


def test_methods_share_the_parameters_of_the_command_line():
    chosen = MethodArguments(method=["kad-dual", "nudging:threshold=0.9"], threshold=0.25)
    assert [method.label for method in chosen.methods()] == ["kad-dual threshold=0.25", "nudging threshold=0.9"]


def test_with_drafts_each_instance_is_answered_alone_unless_a_batch_size_is_given():
    drafts, none = EvaluationSampling(), EvaluationSampling(speculative=False)
    sizes = [
        EvaluationArguments(limit=1, batch_size=size).workloads(sampling)[0].batch_size
        for size in (None, 8)
        for sampling in (drafts, none)
    ]
    assert sizes == [1, 16, 8, 8]


def test_greedy_samples_and_a_missing_pair_are_refused(tmp_path):
    greedy = EvaluationSampling(do_sample=False)
    with pytest.raises(ValueError, match="--num_samples 2 needs --do_sample"):
        make_decoder(ModelArguments(), EvaluationArguments(num_samples=2), greedy, ALONE, default_pair=tmp_path)
    with pytest.raises(ValueError, match="No pair in"):
        make_decoder(ModelArguments(), EvaluationArguments(), greedy, ALONE, default_pair=tmp_path)


def test_a_pair_is_used_where_no_model_is_named(tmp_path, monkeypatch):
    for name in ("base", "proxy"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(module, "Pair", lambda models: SimpleNamespace(models=models))
    monkeypatch.setattr(module, "Decoder", lambda pair, settings, **options: SimpleNamespace(pair=pair, **options))
    asked = EvaluationArguments(pair=tmp_path, chat="no", proxy_chat="yes")
    decoder = make_decoder(ModelArguments(), asked, EvaluationSampling(), ALONE, default_pair=tmp_path / "other")
    assert (decoder.pair.models.base, decoder.pair.models.proxy) == (str(tmp_path / "base"), str(tmp_path / "proxy"))
    assert (decoder.chat, decoder.proxy_chat) == (False, True)
