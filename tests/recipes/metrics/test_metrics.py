"""The `evaluate` modules: against cases worked out by hand, and against the traces of real calls."""

import doctest
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys

import evaluate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from transformers import StoppingCriteria, StoppingCriteriaList

import transformers_kad
from transformers_kad import DualDeferral, Ensemble, KADLogitsProcessor, PrimalDeferral
from transformers_kad.recipes.metrics import METRICS, metric_path

PROMPT = 45  # the proxy's greedy text after this prompt does not repeat a token among its first ten
deterministic = settings(derandomize=True, deadline=None, max_examples=50)


def load(name, **options):
    return evaluate.load(metric_path(name), **options)


@pytest.fixture(scope="module")
def metrics():
    return {name: load(name) for name in METRICS}


# --- Loading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_says_what_it_is(metrics, name):
    metric = metrics[name]
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == name
    assert len(metric.description) > 100
    assert "@" in metric.citation
    assert "https://arxiv.org/abs/2510.27017" in metric.info.reference_urls
    assert "Returns:" in metric.inputs_description
    assert metric.inputs_description in metric.compute.__doc__


@pytest.mark.parametrize("name", METRICS)
def test_the_example_of_a_metric_is_right(metrics, name):
    example = doctest.DocTestParser().get_doctest(metrics[name].inputs_description, {}, name, None, None)
    results = doctest.DocTestRunner().run(example)
    assert results.attempted >= 4
    assert results.failed == 0


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_can_be_loaded_by_its_file_and_used_as_a_class(metrics, name):
    by_file = evaluate.load(f"{metric_path(name)}/{name}.py")
    assert by_file.description == metrics[name].description
    module = __import__(f"transformers_kad.recipes.metrics.{name}.{name}", fromlist=["_"])
    (own,) = (c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, evaluate.Metric))
    assert own().description == metrics[name].description


def test_an_unknown_metric_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'decoding_stats'.*Did you mean 'decoding_statistics'\?.*answer_accuracy"):
        metric_path("decoding_stats")


def test_every_metric_ships_with_the_package():
    """Packages are found by their `__init__.py`; a folder without one would be left out of the wheel."""
    found = {module.name for module in pkgutil.walk_packages(transformers_kad.__path__, "transformers_kad.")}
    assert {f"transformers_kad.recipes.metrics.{name}.{name}" for name in METRICS} <= found
    assert importlib.metadata.version("transformers-kad") == transformers_kad.__version__


def test_two_metrics_in_one_process_keep_their_inputs_apart():
    first, second = load("decoding_statistics"), load("decoding_statistics")
    first.add_batch(tokens=[10], seconds=[1.0])
    second.add_batch(tokens=[90], seconds=[1.0])
    first.add(tokens=20, seconds=1.0)
    assert second.compute()["tokens"] == 90
    assert first.compute()["tokens"] == 30


def test_no_inputs_are_written_to_the_disk(tmp_path):
    metric = load("decoding_statistics", cache_dir=str(tmp_path))
    metric.add_batch(tokens=[10], seconds=[1.0])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert metric.compute()["tokens_per_second"] == 10


def test_a_metric_works_again_after_an_error():
    metric = load("decoding_statistics")
    for inputs in ({"tokens": [7], "seconds": [0.0]}, {"tokens": [7], "seconds": [1.0, 1.0]}):
        with pytest.raises(ValueError):
            metric.compute(**inputs)
        assert metric.compute(tokens=[10], seconds=[1.0])["tokens"] == 10


PROGRAM = """
import sys, evaluate
from transformers_kad.recipes.metrics import METRICS, metric_path
for name in METRICS:
    evaluate.load(metric_path(name))
decoding_statistics = evaluate.load(metric_path("decoding_statistics"))
for _ in range(50):
    decoding_statistics.add_batch(tokens=[int(sys.argv[1])], seconds=[1.0])
print(decoding_statistics.compute()["tokens"])
"""


@pytest.mark.slow
def test_two_processes_at_once_with_an_empty_cache(tmp_path):
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM]
    runs = [
        subprocess.Popen(
            [*command, argument], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for argument in ("1", "1000")
    ]
    for run, expected in zip(runs, ("50", "50000"), strict=True):
        output, errors = run.communicate()
        assert run.returncode == 0, errors
        assert output.split() == [expected]


# --- Answer accuracy ------------------------------------------------------------------------------------------


def test_the_accuracy_and_its_interval(metrics):
    result = metrics["answer_accuracy"].compute(
        predictions=[None, "7", "", "3.0", "12"], references=["1", "7", "2", "3", "13"], comparison="number"
    )
    interval = binomtest(2, 5).proportion_ci(method="wilson")
    assert (result["correct"], result["total"], result["accuracy"]) == (2, 5, 0.4)
    assert (result["low"], result["high"]) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_an_answer_that_is_missing_is_wrong_even_where_the_reference_is_empty(metrics):
    result = metrics["answer_accuracy"].compute(predictions=[None, ""], references=["", ""], comparison="text")
    assert result["correct"] == 0


def test_the_comparison_decides_what_matches(metrics):
    inputs = {"predictions": ["3.0"], "references": ["3"]}
    assert metrics["answer_accuracy"].compute(**inputs, comparison="number")["correct"] == 1
    assert metrics["answer_accuracy"].compute(**inputs, comparison="text")["correct"] == 0
    assert metrics["answer_accuracy"].compute(**inputs)["correct"] == 0


def test_notations_of_one_answer_match(metrics):
    written = {
        "number": ["12 000", "- 5", "90°", "1 1/2"],
        "math": [r"\$12,\!000", "-5", r"90^\circ", r"1\frac{1}{2}"],
    }
    for comparison, predictions in written.items():
        inputs = {"predictions": predictions, "references": ["12000", "-5", "90", "1.5"], "comparison": comparison}
        assert metrics["answer_accuracy"].compute(**inputs)["correct"] == 4


def test_copies_of_a_sample_make_the_interval_no_narrower(metrics):
    """10 instances, 6 right: three equal samples of each know no more than one."""
    right = [True] * 6 + [False] * 4
    once = [("a" if x else "b") for x in right]
    thrice = [answer for answer in once for _ in range(3)]
    one = metrics["answer_accuracy"].compute(predictions=once, references=["a"] * 10)
    three = metrics["answer_accuracy"].compute(predictions=thrice, references=["a"] * 30, samples=3)
    assert (three["low"], three["high"]) == (one["low"], one["high"])
    assert (three["correct"], three["total"]) == (18, 30)


def test_samples_that_differ_give_the_interval_of_their_share(metrics):
    """2 instances with 1 of 2 samples right each: 1 success in 2 trials."""
    result = metrics["answer_accuracy"].compute(
        predictions=["a", "x", "x", "b"], references=["a", "a", "b", "b"], samples=2
    )
    interval = binomtest(1, 2).proportion_ci(method="wilson")
    assert (result["low"], result["high"]) == pytest.approx((interval.low, interval.high), abs=1e-6)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"predictions": [], "references": []}, "got 0"),
        ({"predictions": ["a"] * 3, "references": ["a"] * 3, "samples": 2}, "rows of 2 samples, got 3"),
        ({"predictions": ["a"] * 2, "references": ["a", "b"], "samples": 2}, r"got \['a', 'b'\] from index 0"),
        ({"predictions": ["a"], "references": ["a"], "samples": 0}, "`samples` must be an integer >= 1, got 0"),
        ({"predictions": ["a"], "references": ["a"], "comparison": "number-ish"}, "number-ish"),
        ({"predictions": ["a", "b"], "references": ["a", None]}, "got None at index 1"),
        ({"predictions": ["a"]}, r"missing: \['references'\]"),
        ({"predictions": ["a", "b"], "references": ["a"]}, r"\(2\).*\(1\)"),
    ],
)
def test_bad_answers_are_refused(metrics, inputs, message):
    with pytest.raises(ValueError, match=message):
        metrics["answer_accuracy"].compute(**inputs)


# --- Numbers out of range -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tokens": [1, 2], "seconds": [1.0]}, r"\(2\).*\(1\)"),
        ({"tokens": [1]}, r"speed from \['tokens', 'seconds'\].* not enough: \['tokens'\]"),
        ({}, r"speed from \['tokens', 'seconds'\].* not enough: \[\]"),
        ({"tokens": [], "seconds": []}, "at least one call"),
        ({"tokens": [4, 1.5], "seconds": [1.0, 1.0]}, "got 1.5 at index 1"),
        ({"tokens": [-2], "seconds": [1.0]}, "got -2.0 at index 0"),
        ({"tokens": [None], "seconds": [1.0]}, "got None at index 0"),
        ({"tokens": [1], "seconds": [0.0]}, "`seconds`.* got 0.0 at index 0"),
        ({"tokens": [1], "seconds": [-1.0]}, "`seconds`.* got -1.0"),
        ({"tokens": [1], "seconds": [float("nan")]}, "`seconds`.* got nan"),
        ({"tokens": [1], "seconds": [float("inf")]}, "`seconds`.* got inf"),
        ({"drafted": [5, 3], "accepted": [5, 4]}, "got 4 of 3 at index 1"),
        ({"drafted": [5], "accepted": [-1]}, "`accepted`.* got -1.0"),
        ({"drafted": [float("inf")], "accepted": [1]}, "`drafted`.* got inf"),
        ({"histograms": [[1], [2, -1]]}, r"`histograms\[1\]`.* got -1.0 at index 1"),
        ({"histograms": [[0, 2]], "tokens": [1]}, r"\[0, 2\] emit 2 to 4 tokens, got 1"),
        ({"histograms": [[3, 0]], "tokens": [2]}, r"\[3, 0\] emit 3 to 3 tokens, got 2"),
        ({"histograms": [[0, 2]], "tokens": [2, 3]}, r"histograms \(1\) and tokens \(2\)"),
        ({"masses": [0.5, 1.1], "tokens": [1, 1]}, "got 1.1 at index 1"),
        ({"masses": [-0.1], "tokens": [1]}, "got -0.1 at index 0"),
        ({"masses": [float("nan")], "tokens": [1]}, "got nan"),
        ({"masses": [0.5], "tokens": [0.5]}, "`tokens`.* got 0.5"),
        ({"masses": [0.5]}, r"deferral mass from \['masses', 'tokens'\].* not enough: \['masses'\]"),
        ({"drafted": [5], "histograms": [[0, 1]]}, r"not enough: \['drafted', 'histograms'\]"),
    ],
)
def test_bad_numbers_are_refused(metrics, inputs, message):
    with pytest.raises(ValueError, match=message):
        metrics["decoding_statistics"].compute(**inputs)


def test_inputs_of_other_figures_cannot_follow(metrics):
    metric = load("decoding_statistics")
    metric.add(drafted=5, accepted=4)
    with pytest.raises(ValueError, match=r"before were \['drafted', 'accepted'\].*: \['tokens', 'seconds'\]"):
        metric.add(tokens=5, seconds=1.0)
    metric.add(drafted=5, accepted=2)
    assert metric.compute() == {"drafted": 10, "accepted": 6, "acceptance_rate": 0.6}
    assert metric.compute(tokens=[5], seconds=[2.0])["tokens_per_second"] == 2.5


def test_a_figure_can_follow_an_error_of_another_one(metrics):
    metric = load("decoding_statistics")
    with pytest.raises(ValueError, match=r"tokens \(1\) and seconds \(2\)"):
        metric.compute(tokens=[7], seconds=[1.0, 1.0])
    assert metric.compute(drafted=[4], accepted=[1])["acceptance_rate"] == 0.25


# --- Worked out by hand ---------------------------------------------------------------------------------------


def test_throughput_is_no_mean_of_rates(metrics):
    """A call of 1 token in 0.01 s and one of 99 in 0.99 + 9 s: 10 tokens/s in all, though the mean rate is 54.95."""
    result = metrics["decoding_statistics"].compute(tokens=[1, 99], seconds=[0.01, 9.99])
    assert result == {"tokens_per_second": pytest.approx(10), "tokens": 100, "seconds": pytest.approx(10)}


def test_nothing_drafted_has_no_rate_and_all_refused_the_rate_zero(metrics):
    compute = metrics["decoding_statistics"].compute
    assert compute(drafted=[0, 0], accepted=[0, 0]) == {"acceptance_rate": None, "drafted": 0, "accepted": 0}
    assert compute(drafted=[4], accepted=[0])["acceptance_rate"] == 0
    assert compute(drafted=[], accepted=[])["acceptance_rate"] is None


def test_the_acceptance_rate_weighs_drafts_and_not_texts(metrics):
    assert metrics["decoding_statistics"].compute(drafted=[1, 9], accepted=[1, 0])["acceptance_rate"] == 0.1


def test_histograms_of_different_lengths_are_added(metrics):
    """Rounds with 2, 2, 0 and 1 draft tokens: 5 in 4 rounds. Without `tokens` nobody knows how the texts ended."""
    assert metrics["decoding_statistics"].compute(histograms=[[1, 0, 2], [0, 1], []]) == {
        "acceptance_length": 1.25,
        "histogram": [1, 1, 2],
        "rounds": 4,
        "accepted": 5,
        "tokens_per_round": None,
        "draft_endings": None,
    }


def test_no_round_has_no_acceptance_length(metrics):
    result = metrics["decoding_statistics"].compute(histograms=[[]], tokens=[0])
    assert result["acceptance_length"] is result["tokens_per_round"] is None
    assert (result["histogram"], result["rounds"], result["draft_endings"]) == ([], 0, 0)


def test_one_mass_that_is_undefined_makes_the_mean_undefined(metrics):
    compute = metrics["decoding_statistics"].compute
    assert compute(masses=[None, 0.5], tokens=[3, 3]) == {"deferral_mass": None, "tokens": 6}
    assert compute(masses=[None, 0.5], tokens=[0, 3]) == {"deferral_mass": 0.5, "tokens": 3}
    assert compute(masses=[0.5], tokens=[0]) == {"deferral_mass": None, "tokens": 0}


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(1, 20)), min_size=1, max_size=8))
@deterministic
def test_the_deferral_mass_is_the_mean_over_all_positions(metrics, texts):
    positions = [mass / 64 for mass, count in texts for _ in range(count)]
    result = metrics["decoding_statistics"].compute(
        masses=[mass / 64 for mass, _ in texts], tokens=[count for _, count in texts]
    )
    assert result["deferral_mass"] == pytest.approx(sum(positions) / len(positions), abs=1e-12)


# --- Real calls -----------------------------------------------------------------------------------------------


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def prompt_of(seed, length=4):
    return torch.randint(1, 50, (1, length), generator=torch.Generator().manual_seed(seed))


def of_statistics(metrics, statistics):
    """All figures of some texts that come from the statistics."""
    return metrics["decoding_statistics"].compute(
        drafted=[s.drafted for s in statistics],
        accepted=[s.accepted for s in statistics],
        histograms=[s.acceptance_histogram for s in statistics],
        tokens=[s.tokens for s in statistics],
        masses=[s.deferral_mass for s in statistics],
    )


def test_metrics_of_sampled_texts_agree_with_their_traces(base, proxy, metrics):
    """A third of the vocabulary ends a text, a criterion cuts others; traces tell which tokens were drafted."""
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5), num_assistant_tokens=4, trace=True)
    statistics, records, eos = [], [], list(range(0, 50, 12))
    for seed in range(30):
        torch.manual_seed(seed)
        base.generate(
            prompt_of(seed),
            logits_processor=[kad],
            assistant_model=proxy,
            do_sample=True,
            top_k=0,
            max_new_tokens=25,
            eos_token_id=eos,
            stopping_criteria=StoppingCriteriaList([StopAt(4 + 7 + seed % 5)]),
        )
        statistics.append(kad.statistics)
        records.append(list(kad.trace))
    result = of_statistics(metrics, statistics)

    tokens = [record for text in records for record in text]
    ended_by_drafted_eos = sum(text[-1].drafted and text[-1].token_id in eos for text in records)
    cut_within_a_draft = sum(text[-1].drafted and text[-1].token_id not in eos for text in records)
    ended_otherwise = len(records) - ended_by_drafted_eos - cut_within_a_draft
    assert min(ended_by_drafted_eos, cut_within_a_draft, ended_otherwise) >= 3
    assert result["tokens"] == len(tokens)
    assert result["accepted"] == sum(record.drafted for record in tokens)
    assert result["draft_endings"] == ended_by_drafted_eos + cut_within_a_draft
    assert result["tokens"] == result["accepted"] + result["rounds"] - result["draft_endings"]
    assert sum(result["histogram"]) == result["rounds"]
    assert sum(k * count for k, count in enumerate(result["histogram"])) == result["accepted"]
    assert result["acceptance_length"] == result["accepted"] / result["rounds"]
    assert result["tokens_per_round"] == len(tokens) / result["rounds"]
    assert result["acceptance_rate"] == result["accepted"] / sum(s.drafted for s in statistics)
    assert 0 < result["acceptance_rate"] < 1
    expected = sum(record.deferral_mass for record in tokens) / len(tokens)
    assert result["deferral_mass"] == pytest.approx(expected, abs=1e-6)
    assert 0 < expected < 1


def generate_as_the_proxy(base, proxy, prompt, **options):
    """With a budget of 1 the target is the proxy's own law: greedy drafts of 4 are all accepted."""
    kad = KADLogitsProcessor(proxy, PrimalDeferral(budget=1.0), num_assistant_tokens=4)
    text = base.generate(prompt, logits_processor=[kad], assistant_model=proxy, do_sample=False, **options)
    return text[0, prompt.shape[1] :].tolist(), kad.statistics


@pytest.mark.parametrize("end", range(10))
def test_a_draft_cut_short_by_eos(base, proxy, metrics, end):
    """Rounds of 4 + 1 tokens; the proxy stops drafting at the end of sequence, which is the text's token `end`."""
    full, _ = generate_as_the_proxy(base, proxy, prompt_of(PROMPT), max_new_tokens=12)
    assert len(set(full[:10])) == 10, "the text repeats itself: choose another prompt"
    text, statistics = generate_as_the_proxy(base, proxy, prompt_of(PROMPT), max_new_tokens=40, eos_token_id=full[end])
    assert text == full[: end + 1]
    whole_rounds, last = divmod(end + 1, 5)  # `last` tokens in a last round that ends on a draft token, if any
    histogram = [0, 0, 0, 0, whole_rounds]
    if last:
        histogram[last] += 1
    drafted = 4 * whole_rounds + last  # nothing is drafted after the end of sequence, and all drafts are accepted
    result = of_statistics(metrics, [statistics])
    assert result == {
        "acceptance_rate": 1.0,
        "drafted": drafted,
        "accepted": drafted,
        "acceptance_length": drafted / (whole_rounds + bool(last)),
        "histogram": histogram[: 1 + max(k for k, count in enumerate(histogram) if count)],
        "rounds": whole_rounds + bool(last),
        "tokens_per_round": (end + 1) / (whole_rounds + bool(last)),
        "draft_endings": int(last > 0),
        "deferral_mass": pytest.approx(1.0),
        "tokens": end + 1,
    }


def test_a_draft_cut_short_by_a_criterion(base, proxy, metrics):
    """Stopped after 6 tokens: 4 + 1, then 1 of a draft of 4. The other 3 were drafted, and not accepted."""
    criteria = StoppingCriteriaList([StopAt(4 + 6)])
    text, statistics = generate_as_the_proxy(
        base, proxy, prompt_of(PROMPT), max_new_tokens=40, stopping_criteria=criteria
    )
    result = of_statistics(metrics, [statistics])
    assert len(text) == result["tokens"] == 6
    assert (result["drafted"], result["accepted"], result["acceptance_rate"]) == (8, 5, 0.625)
    assert (result["histogram"], result["rounds"], result["draft_endings"]) == ([0, 1, 0, 0, 1], 2, 1)
    assert (result["acceptance_length"], result["tokens_per_round"]) == (2.5, 3.0)


def test_token_by_token_nothing_is_drafted(base, proxy, metrics):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5))
    base.generate(prompt_of(0), logits_processor=[kad], do_sample=False, max_new_tokens=6)
    result = of_statistics(metrics, [kad.statistics])
    assert (result["acceptance_rate"], result["acceptance_length"]) == (None, 0)
    assert (result["histogram"], result["tokens_per_round"], result["draft_endings"]) == ([6], 1, 0)


def test_a_rule_that_is_no_mask_has_no_deferral_mass(base, proxy, metrics):
    kad = KADLogitsProcessor(proxy, Ensemble(0.5))
    base.generate(prompt_of(0), logits_processor=[kad], do_sample=False, max_new_tokens=6)
    assert of_statistics(metrics, [kad.statistics])["deferral_mass"] is None


def test_the_metrics_agree_with_the_statistics_of_a_call_of_several_texts(base, proxy, metrics):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.5))
    torch.manual_seed(0)
    base.generate(
        torch.cat([prompt_of(0), prompt_of(1), prompt_of(2)]),
        logits_processor=[kad],
        do_sample=True,
        top_k=0,
        max_new_tokens=20,
        eos_token_id=list(range(0, 50, 6)),
    )
    rows = kad.statistics.sequences
    assert len({row.tokens for row in rows}) > 1
    result = of_statistics(metrics, rows)
    assert result["deferral_mass"] == pytest.approx(kad.statistics.deferral_mass, abs=1e-9)
    assert (result["tokens"], result["rounds"]) == (kad.statistics.tokens, kad.statistics.rounds)


# --- ROUGE ----------------------------------------------------------------------------------------------------


def test_rouge_by_hand(metrics):
    texts = {"predictions": ["The cat sat.", "x"], "references": ["the cat sat down", "y"]}
    each = metrics["rouge"].compute(**texts, use_aggregator=False)
    assert each["rouge1"] == pytest.approx([2 * 1 * (3 / 4) / (1 + 3 / 4), 0])
    assert each["rouge2"] == pytest.approx([2 * 1 * (2 / 3) / (1 + 2 / 3), 0])
    assert each["rougeL"] == each["rouge1"]
    mean = metrics["rouge"].compute(**texts)
    assert mean == {name: pytest.approx(sum(values) / 2) for name, values in each.items()}


def test_rouge_compares_lines_and_stems_if_asked(metrics):
    texts = {"predictions": ["cats run\ndogs bark"], "references": ["dog bark\ncat runs"]}
    plain = metrics["rouge"].compute(**texts)
    stemmed = metrics["rouge"].compute(**texts, use_stemmer=True, rouge_types=("rougeL", "rougeLsum"))
    assert plain["rouge1"] == pytest.approx(0.25)
    assert (stemmed["rougeL"], stemmed["rougeLsum"]) == (pytest.approx(0.5), pytest.approx(1))
    assert stemmed.keys() == {"rougeL", "rougeLsum"}


def test_rouge_of_nothing_is_refused(metrics):
    with pytest.raises(ValueError, match="`predictions` is empty"):
        metrics["rouge"].compute(predictions=[], references=[])
