"""What a user's processors and criteria see in speculative decoding is what `generate` shows them token by token."""

import threading

import exact_law
import pytest
import test_distribution
import torch
from lm_eval.models.utils_hf import MultiTokenEOSCriteria
from test_batches import padded
from tiny_models import tiny_model
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from transformers_kad import DualDeferral, KADLogitsProcessor
from transformers_kad.decoding import speculative_round
from transformers_kad.integrations.loading.models import load_model, load_tokenizer

END = 40  # emitted by one of the greedy texts, late
GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": END, "pad_token_id": 0}
BEGIN = 12  # where the new tokens of `padded` begin


def make_kad(proxy, **settings):
    return KADLogitsProcessor(proxy, DualDeferral(0.6), **{"num_assistant_tokens": 4, **settings})


def both(base, proxy, callbacks, rows=4, **settings):
    """The greedy texts of a batch token by token and speculatively, with callbacks made anew for each."""
    results = []
    for assistant in (None, proxy):
        kad = make_kad(proxy)
        own = callbacks(kad)
        ids = base.generate(**padded(rows), assistant_model=assistant, **own, **{**GREEDY, **settings})
        results.append((ids, kad, own))
    assert 0 < kad.statistics.accepted < kad.statistics.drafted
    return results


# Criteria


class StopAfterCalls(StoppingCriteria):
    def __init__(self, limit):
        self.limit, self.calls = limit, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= self.limit)


class StopAtSecond(StoppingCriteria):
    """Ends a row at its second even token; notes what it saw."""

    def __init__(self, rows):
        self.counts, self.texts = [0] * rows, []

    def __call__(self, input_ids, scores, **kwargs):
        self.texts.append(input_ids.tolist())
        for row, token in enumerate(input_ids[:, -1].tolist()):
            self.counts[row] += token % 2 == 0
        return torch.tensor([count >= 2 for count in self.counts])


class StopAtScore(StoppingCriteria):
    """Ends a row at a token with a score above its row's threshold; notes the shapes."""

    def __init__(self, thresholds):
        self.thresholds, self.shapes = torch.tensor(thresholds), []

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.append([tuple(step.shape) for step in scores])
        return scores[-1].gather(-1, input_ids[:, -1:]).squeeze(-1) > self.thresholds


@pytest.mark.parametrize("limit", [1, 2, 6, 11])
def test_a_criterion_that_counts_its_calls(base, proxy, limit):
    results = both(
        base,
        proxy,
        lambda kad: {"logits_processor": [kad], "stopping_criteria": [StopAfterCalls(limit)]},
        max_new_tokens=23,
    )
    assert torch.equal(results[0][0], results[1][0])
    assert results[1][0].shape[1] == BEGIN + limit
    assert [row.tokens for row in results[1][1].statistics.sequences] == [limit] * 4
    assert results[1][2]["stopping_criteria"][0].calls == limit


def test_a_criterion_with_a_list_of_the_rows_sees_what_it_sees_token_by_token(base, proxy):
    results = both(base, proxy, lambda kad: {"logits_processor": [kad], "stopping_criteria": [StopAtSecond(4)]})
    assert torch.equal(results[0][0], results[1][0])
    seen = [own["stopping_criteria"][0].texts for _, _, own in results]
    assert seen[0] == seen[1]
    lengths = [row.tokens for row in results[1][1].statistics.sequences]
    assert len(set(lengths)) > 2


def test_a_criterion_that_looks_at_the_scores_gets_those_of_all_rows(base, proxy):
    callbacks = lambda kad: {"logits_processor": [kad], "stopping_criteria": [StopAtScore([-0.9, -0.5, -0.2, 0.0])]}  # noqa: E731
    results = both(base, proxy, callbacks, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(results[0][0].sequences, results[1][0].sequences)
    seen = [own["stopping_criteria"][0].shapes for _, _, own in results]
    assert seen[0] == seen[1]
    assert len({row.tokens for row in results[1][1].statistics.sequences}) > 1


def test_the_harness_criterion_for_several_tokens():
    """It keeps a list of the rows, and ends the batch when all are done."""
    pair = "recipes/tiny_pair"
    base, tokenizer = load_model(f"{pair}/base"), load_tokenizer(f"{pair}/base")
    kad = KADLogitsProcessor(load_model(f"{pair}/proxy"), DualDeferral(0.4))
    questions = ["Mia has 34 apples. Jon brings 28 more.", "Ana has 9 eggs.", "Tom had 50 coins and lost 13 of them."]
    inputs = tokenizer(questions, padding=True, return_tensors="pt")
    width, texts = inputs["input_ids"].shape[1], []
    for assistant in (None, kad.proxy):
        criterion = MultiTokenEOSCriteria(".", tokenizer, width, len(questions))
        ids = base.generate(
            **inputs,
            logits_processor=[kad],
            assistant_model=assistant,
            stopping_criteria=StoppingCriteriaList([criterion]),
            do_sample=False,
            max_new_tokens=40,
        )
        texts.append(ids.tolist())
        assert criterion.done_tracker == [True] * 3
    assert texts[0] == texts[1]
    assert len(texts[0][0]) < width + 40


def test_a_criterion_that_another_thread_sets_ends_the_batch(base, proxy):
    """It can't be copied, and what is set must reach the call that runs."""

    class Cancelled(StoppingCriteria):
        def __init__(self):
            self.event, self.calls = threading.Event(), 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            if self.calls == 5:
                self.event.set()
            return torch.full((len(input_ids),), self.event.is_set())

    results = both(base, proxy, lambda kad: {"logits_processor": [kad], "stopping_criteria": [Cancelled()]})
    assert torch.equal(results[0][0], results[1][0])
    assert results[1][0].shape[1] == BEGIN + 5


def test_a_plain_function_with_a_count_of_its_own(base, proxy):
    def callbacks(kad):
        calls = []
        stop = lambda ids, scores, **_: torch.full((len(ids),), calls.append(1) or len(calls) >= 6)  # noqa: E731
        return {"logits_processor": [kad], "stopping_criteria": StoppingCriteriaList([stop])}

    results = both(base, proxy, callbacks)
    assert results[0][0].shape[1] == results[1][0].shape[1] == BEGIN + 6
    assert torch.equal(results[0][0], results[1][0])


# Processors


class Matchers(LogitsProcessor):
    """A grammar with one matcher a row, in the way of xgrammar's: each row's letters go round its own cycle.

    The first call makes the matchers, every other one has each accept the newest token of its row.
    """

    def __init__(self, cycles, padding=()):
        self.cycles, self.padding, self.matchers, self.done = cycles, set(padding), [], []

    def __call__(self, input_ids, scores):
        if not self.matchers:
            self.matchers, self.done = [0] * len(input_ids), [False] * len(input_ids)
        else:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                if not self.done[row]:
                    # A criterion may have ended the row: then there is padding.
                    assert token in self._allowed(row) | self.padding, f"row {row} can't accept {token}"
                    self.done[row] = token == END or token not in self._allowed(row)
                    self.matchers[row] += 1
        assert len(self.matchers) == len(input_ids), "The batch size must be the number of matchers."
        scores = scores.clone()
        for row, done in enumerate(self.done):
            if not done:
                banned = [token for token in range(scores.shape[-1]) if token not in self._allowed(row)]
                scores[row, banned] = -torch.inf
        return scores

    def _allowed(self, row):
        size, state = self.cycles[row % len(self.cycles)], self.matchers[row]
        allowed = {token for token in range(50) if token % size == state % size and token != END}
        return allowed | {END} if state >= 9 and state % size == 0 else allowed


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("cycles", [[3], [2, 5, 3, 4]])
def test_a_grammar_with_a_matcher_for_each_row(base, proxy, before, cycles):
    def callbacks(kad):
        grammar = Matchers(cycles)
        return {"logits_processor": [grammar, kad] if before else [kad, grammar]}

    results = both(base, proxy, callbacks)
    assert torch.equal(results[0][0], results[1][0])
    grammars = [next(p for p in own["logits_processor"] if isinstance(p, Matchers)) for _, _, own in results]
    assert grammars[0].matchers == grammars[1].matchers


def test_processors_and_criteria_with_states_together_sampled(base, proxy):
    """Whatever is drawn, every row keeps to its own grammar and ends where its own criterion says."""
    kad = make_kad(proxy)
    for seed in range(5):
        grammar, stop = Matchers([2, 5, 3, 4], padding=[0]), StopAtSecond(5)
        torch.manual_seed(seed)
        ids = base.generate(
            **padded(5),
            logits_processor=[grammar, kad],
            stopping_criteria=[stop],
            assistant_model=proxy,
            **(GREEDY | {"do_sample": True, "top_k": 0}),
        )[:, BEGIN:].tolist()
        for row, (tokens, own) in enumerate(zip(ids, kad.statistics.sequences, strict=True)):
            text = tokens[: own.tokens]
            size = [2, 5, 3, 4, 2][row]
            assert all(token == END or token % size == at % size for at, token in enumerate(text))
            even = [at for at, token in enumerate(text) if token % 2 == 0]
            assert len(text) == 24 or text[-1] == END or even[1:] == [len(text) - 1]
            assert tokens[own.tokens :] == [0] * (len(tokens) - own.tokens)


def test_guidance_that_keeps_a_cache_of_all_rows(base, proxy):
    results = both(base, proxy, lambda kad: {"logits_processor": [kad]}, guidance_scale=1.7)
    assert torch.equal(results[0][0], results[1][0])
    plain = base.generate(**padded(4), logits_processor=[make_kad(proxy)], **GREEDY)
    assert not torch.equal(plain, results[1][0])


def test_a_processor_made_for_the_prompts_of_all_rows(base, proxy):
    prompts = padded(4)["input_ids"]
    callbacks = lambda kad: {"logits_processor": [EncoderNoRepeatNGramLogitsProcessor(1, prompts), kad]}  # noqa: E731
    results = both(base, proxy, callbacks)
    assert torch.equal(results[0][0], results[1][0])
    plain = base.generate(**padded(4), logits_processor=[make_kad(proxy)], **GREEDY)
    assert not torch.equal(plain, results[1][0])


def test_transformers_own_callbacks_let_rows_accept_different_numbers(base, proxy):
    """Going in step takes more rounds, and is for callbacks that need it."""
    own, foreign = make_kad(proxy), make_kad(proxy)
    settings = {"assistant_model": proxy, "repetition_penalty": 1.1, **GREEDY}
    base.generate(**padded(4), logits_processor=[own], max_time=1e6, **settings)
    base.generate(**padded(4), logits_processor=[foreign], stopping_criteria=[StopAfterCalls(99)], **settings)
    assert len({row.rounds for row in own.statistics.sequences}) > 1
    assert own.statistics.base_forwards < foreign.statistics.base_forwards


# A criterion in the middle of a round, and the processors


class Seen(LogitsProcessor):
    def __init__(self):
        self.texts = []

    def __call__(self, input_ids, scores):
        self.texts += input_ids.tolist()
        return scores


class StopAtToken(StoppingCriteria):
    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens, dtype=torch.long)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self.tokens)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("at", range(10))
def test_a_processor_never_sees_a_token_that_is_not_emitted(base, proxy, at, rows):
    """The criterion ends a text in the middle of a draft: nothing is asked about what comes behind it."""
    free = base.generate(**padded(rows), logits_processor=[make_kad(proxy)], **GREEDY)
    stop = free[:, BEGIN + at].unique().tolist()
    seen = []
    for assistant in (None, proxy):
        before, after, kad = Seen(), Seen(), make_kad(proxy)
        ids = base.generate(
            **padded(rows),
            logits_processor=[before, kad, after],
            assistant_model=assistant,
            stopping_criteria=[StopAtToken(stop)],
            **GREEDY,
        )
        seen.append((ids.tolist(), before.texts, after.texts))
    assert seen[0] == seen[1]


# Processors behind KAD that leave nothing


class Spoil(LogitsProcessor):
    """From a text length on, some values for some rows."""

    def __init__(self, value, length, rows=(0,)):
        self.value, self.length, self.rows = value, length, list(rows)

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            scores = scores.clone()
            scores[self.rows] = self.value
        return scores


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("drafter", ["proxy", "prompt_lookup"])
@pytest.mark.parametrize(("rows", "spoiled"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize("length", [BEGIN, BEGIN + 3, BEGIN + 7])
def test_a_processor_behind_kad_that_leaves_no_token(base, proxy, value, length, rows, spoiled, drafter, do_sample):
    kad = make_kad(proxy, drafter=drafter)
    settings = {"logits_processor": [kad, Spoil(value, length, [spoiled])], "do_sample": do_sample}
    settings |= {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    message = rf"position {length} of sequence {spoiled} .* processors behind KAD"
    with pytest.raises(ValueError, match=message):
        base.generate(**padded(rows), assistant_model=proxy, top_k=0, **settings)
    if do_sample:  # token by token the same call ends as well
        with pytest.raises(RuntimeError, match="probability tensor"):
            base.generate(**padded(rows), top_k=0, **settings)


def test_a_warper_of_transformers_behind_kad_is_judged_too(base, proxy):
    """Processed for the whole draft at once: what lies behind the end of the text is nobody's fault."""
    kad = make_kad(proxy)
    with pytest.raises(ValueError, match="processors behind KAD"):
        base.generate(
            **padded(1),
            logits_processor=[kad, EncoderNoRepeatNGramLogitsProcessor(1, torch.arange(50)[None])],
            assistant_model=proxy,
            **GREEDY,
        )


def test_a_text_that_ends_before_the_fault_is_returned(base, proxy):
    for length in range(BEGIN + 1, BEGIN + 10):
        kad = make_kad(proxy)
        settings = {"logits_processor": [kad, Spoil(-torch.inf, length)], **GREEDY, "max_new_tokens": length - BEGIN}
        ids = base.generate(**padded(1), assistant_model=proxy, **settings)
        assert torch.equal(ids, base.generate(**padded(1), **settings))


@pytest.mark.parametrize("value", [torch.inf, 1e30])
def test_greedy_decoding_takes_a_token_that_is_forced_by_infinity(base, proxy, value):
    class Force(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(-1, torch.tensor([input_ids.shape[1] % 50]), value)

    texts = []
    for assistant in (None, proxy):
        settings = {"logits_processor": [make_kad(proxy), Force()], **GREEDY}
        texts.append(base.generate(**padded(1), assistant_model=assistant, **settings)[0, BEGIN:].tolist())
    assert texts[0] == texts[1] == [*range(BEGIN, BEGIN + 24)]


def test_the_base_may_break_behind_the_end_of_a_text():
    """A token whose logits are NaN ends the text: nobody reads them."""
    base = tiny_model(hidden=32, vocabulary=50, seed=1)
    proxy = tiny_model(hidden=16, seed=2)
    free = base.generate(**padded(1), logits_processor=[make_kad(proxy)], **GREEDY)[0, BEGIN:].tolist()
    end = free[6]
    with torch.no_grad():
        base.get_input_embeddings().weight[end] = float("nan")
    texts = []
    for assistant in (None, proxy):
        settings = {"logits_processor": [make_kad(proxy)], "stopping_criteria": [StopAtToken([end])], **GREEDY}
        texts.append(base.generate(**padded(1), assistant_model=assistant, **settings)[0, BEGIN:].tolist())
    assert texts[0] == texts[1] == free[: free.index(end) + 1]


# Going in step is exact


def p_values_in_step(calls=600, rows=3, drafts=2, length=4):
    """Of all texts, and of what two rows of a call say at their second and third tokens."""
    chosen, setting = test_distribution.models(), test_distribution.Setting()
    kad = test_distribution.make_kad(chosen, DualDeferral(0.4), setting, drafts)
    prompt, texts, whole_drafts = torch.tensor([test_distribution.PROMPT]), [], 0
    torch.manual_seed(5)
    for _ in range(calls):
        ids = chosen.base.generate(
            prompt,
            logits_processor=[kad],
            assistant_model=chosen.proxy,
            stopping_criteria=[StopAfterCalls(99)],
            num_return_sequences=rows,
            max_new_tokens=length,
            **test_distribution.COMMON,
        )
        texts.append(ids[:, prompt.shape[1] :])
        whole_drafts += sum(kad.statistics.acceptance_histogram[drafts:])
    assert whole_drafts > calls / 10
    law = setting.law(exact_law.dual(0.4), chosen, length)
    alone = exact_law.marginal_law(law, [1, 2])
    together = {(*a, *b): p * q for a, p in alone.items() for b, q in alone.items()}
    pairs = [tuple(pair) for pair in torch.stack(texts)[:, :2, 1:3].flatten(1).tolist()]
    every = [tuple(text) for text in torch.cat(texts).tolist()]
    return [exact_law.chi_square_p_value(every, law), exact_law.chi_square_p_value(pairs, together)]


@pytest.mark.slow
def test_rows_in_step_are_drawn_from_the_law_each_by_itself():
    """Two p-values, each below 5e-7 with that probability where the code is right."""
    assert min(p_values_in_step()) > 5e-7


@pytest.mark.slow
def test_the_law_refuses_a_row_that_takes_the_residual_where_another_ends_the_round(monkeypatch):
    """What a row emits where another refuses is its own accepted token."""
    decide = speculative_round.SpeculativeRound._fetch

    def residual_for_all(self, *arguments):
        decided = decide(self, *arguments)
        if self.in_step and min(decided.accepted) == 0:
            return decided._replace(accepted=[0] * len(decided.accepted))
        return decided

    monkeypatch.setattr(speculative_round.SpeculativeRound, "_fetch", residual_for_all)
    assert min(p_values_in_step()) < 5e-7
