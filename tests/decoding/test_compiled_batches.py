"""`compile=True` with batches, padding and sliding windows: the text of the eager path, and what is compiled."""

import functools

import exact_law
import pytest
import test_distribution
import torch
from exact_law import PlainRule
from test_batches import Bias, StopAtToken, check_prompts_of_the_proxys_own, padded
from test_other_tokenizer import TEXTS, make_kad
from test_vocabulary import TOKENIZERS
from tiny_families import tiny_family
from tiny_models import tiny_model
from transformers import StoppingCriteriaList, SynthIDTextWatermarkingConfig
from versions import skip_if_shapes_are_few

from transformers_kad import DualDeferral, KADLogitsProcessor, align_vocabularies
from transformers_kad.integrations.loading.models import load_model, load_tokenizer
from transformers_kad.models.static_cache import TextStore
from transformers_kad.models.static_model import CAPACITY_STEP

RULE = DualDeferral(0.6)
GREEDY = {"do_sample": False, "max_new_tokens": 24}
FALSE_ALARM, P_VALUES = 1e-6, 2
PAIRS = {
    "full": ("llama", "qwen3"),
    "windows": ("mistral", "llama"),
    "both": ("gemma3_text", "mistral"),
    "chunks": ("llama4_text", "gpt2"),
}


def make_pair(name):
    """A base and a proxy; those that are not among the tiny models have their windows in some layers only."""
    small = ("llama", "qwen3", "mistral", "gpt2")
    return (
        tiny_model(family, hidden=hidden, vocabulary=96, seed=seed)
        if family in small
        else tiny_family(family, seed=seed)
        for family, hidden, seed in zip(PAIRS[name], (32, 16), (1, 2), strict=True)
    )


def both(base, proxy, inputs, drafts=4, verification="token", **arguments):
    """The texts of the eager path and of the compiled one, which must agree, and the processor that compiled."""
    settings = {"num_assistant_tokens": drafts, "verification": verification}
    processors = [KADLogitsProcessor(proxy, RULE, compile=compiled, **settings) for compiled in (False, True)]
    texts = []
    for kad in processors:
        torch.manual_seed(0)
        settings = {"assistant_model": proxy, "logits_processor": [kad]}
        texts.append(base.generate(**inputs, **settings, **GREEDY | arguments))
    eager, compiled = texts
    assert torch.equal(compiled, eager)
    of_eager, of_compiled = (kad.statistics for kad in processors)
    assert [row.acceptance_histogram for row in of_compiled.sequences] == [
        row.acceptance_histogram for row in of_eager.sequences
    ]
    assert of_compiled.proxy_forwards == of_eager.proxy_forwards
    assert of_compiled.base_forwards == of_eager.base_forwards
    return compiled, processors[1]


# --- The same text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("pair", ["full", "windows", "both"])
def test_greedy_text_is_that_of_the_eager_path(uncompiled, pair, rows):
    base, proxy = make_pair(pair)
    _, kad = both(base, proxy, padded(rows))
    assert rows < 4 or len({row.rounds for row in kad.statistics.sequences}) > 1
    assert 0 < kad.statistics.accepted < kad.statistics.drafted


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("pair", ["full", "windows"])
def test_sampled_text_is_that_of_the_eager_path_with_either_verification(uncompiled, pair, rows):
    base, proxy = make_pair(pair)
    texts = []
    for verification in ("token", "block"):
        text, kad = both(base, proxy, padded(rows), verification=verification, do_sample=True)
        assert 0 < kad.statistics.accepted < kad.statistics.drafted
        texts.append(text)
    assert not torch.equal(*texts)  # so that blocks were verified


def test_greedy_text_with_chunked_attention(uncompiled):
    base, proxy = make_pair("chunks")
    both(base, proxy, padded(3))


def test_attention_that_adds_its_mask(uncompiled):
    base, proxy = make_pair("windows")
    for model in (base, proxy):
        model.set_attn_implementation("eager")
    _, kad = both(base, proxy, padded(3))
    for model in (base, proxy):  # and from one call to the next
        model.set_attn_implementation("sdpa")
    settings = {"assistant_model": proxy, **GREEDY}
    eager = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=4)
    expected = base.generate(**padded(3), logits_processor=[eager], **settings)
    assert torch.equal(base.generate(**padded(3), logits_processor=[kad], **settings), expected)


def test_prompts_are_read_in_chunks(uncompiled, base, proxy):
    for rows in (1, 5):
        both(base, proxy, padded(rows), prefill_chunk_size=5)


def test_holes_in_prompts(uncompiled, base, proxy):
    inputs = padded(3)
    inputs["attention_mask"][0, 4:6] = 0
    inputs["attention_mask"][2, 8] = 0
    both(base, proxy, inputs)


@pytest.mark.parametrize("pair", ["full", "both"])
def test_rows_end_early_and_the_others_move_to_smaller_buckets(uncompiled, pair, monkeypatch):
    base, proxy = make_pair(pair)
    moves, move = [], TextStore.move_rows

    def watching(self, sources, targets, columns):
        moves.append((list(sources), list(targets)))
        move(self, sources, targets, columns)

    monkeypatch.setattr(TextStore, "move_rows", watching)
    free = both(base, proxy, padded(8))[0][:, 12:].tolist()
    moves.clear()
    ends = {free[row][at] for row, at in ((0, 3), (1, 6), (3, 9))}
    _, kad = both(base, proxy, padded(8), eos_token_id=sorted(ends), pad_token_id=0)
    lengths = [row.tokens for row in kad.statistics.sequences]
    assert len(set(lengths)) > 2
    assert min(lengths) < 10
    assert any(max(sources) >= 4 for sources, _ in moves)
    assert all(sorted(sources) == sorted(targets) for sources, targets in moves)  # with rows that have ended
    token = free[2][7]
    stop = {"stopping_criteria": StoppingCriteriaList([StopAtToken(token)]), "pad_token_id": 0}
    _, kad = both(base, proxy, padded(8), **stop)
    assert min(row.tokens for row in kad.statistics.sequences) < 24


def test_rows_that_go_in_step(uncompiled, base, proxy):
    watermark = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3], context_history_size=64)
    texts = []
    for compiled in (False, True):
        processor = watermark.construct_processor(50, "cpu")
        kad = KADLogitsProcessor(proxy, DualDeferral(0.6), compile=compiled)
        settings = {"assistant_model": proxy if compiled else None, **GREEDY}
        texts.append(base.generate(**padded(3), logits_processor=[kad, processor], **settings))
    assert torch.equal(*texts)
    assert len({row.rounds for row in kad.statistics.sequences}) == 1


def test_processors_of_the_user(uncompiled, base, proxy):
    texts = []
    for compiled in (False, True):
        kad = KADLogitsProcessor(proxy, DualDeferral(0.6), compile=compiled)
        processors = [Bias(3.0), kad, Bias(-2.0)]
        settings = {"assistant_model": proxy, "temperature": None, **GREEDY}
        texts.append(base.generate(**padded(4), logits_processor=processors, **settings))
    assert torch.equal(*texts)


@pytest.mark.parametrize("drafter", ["proxy", "prompt_lookup"])
@pytest.mark.parametrize("pair", ["full", "both"])
def test_chats_go_on_from_the_static_cache(uncompiled, pair, drafter):
    """Turn by turn, with rows in another order and fewer of them."""
    base, proxy = make_pair(pair)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.9), num_assistant_tokens=3, drafter=drafter, compile=True)
    settings = {"assistant_model": proxy, "pad_token_id": 0, **GREEDY}
    inputs = padded(5)
    widths = []
    base.register_forward_pre_hook(
        lambda model, args, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    for turn, order in enumerate(([0, 1, 2, 3, 4], [4, 0, 3, 2, 1], [2, 4, 1], [1, 0, 2])):
        inputs = {name: values[order] for name, values in inputs.items()}
        expected = base.generate(**inputs, logits_processor=[KADLogitsProcessor(proxy, DualDeferral(0.9))], **settings)
        widths.clear()
        text = base.generate(**inputs, logits_processor=[kad], **settings)
        assert torch.equal(text, expected), turn
        width = inputs["input_ids"].shape[1]
        # All rows are read from the column on in which the shortest text was in its last round: 11 tokens more than
        # those of the last round and the two new ones, where the prompts differ by 11.
        assert turn == 0 or max(widths) <= 11 + 4 + 2
        mask = inputs["attention_mask"]
        more = torch.full((len(order), 2), 5 + turn)
        mask = torch.cat([mask, mask.new_ones(len(order), text.shape[1] + 2 - width)], dim=1)
        inputs = {"input_ids": torch.cat([text, more], dim=1), "attention_mask": mask}


def test_a_larger_batch_after_a_smaller_one(uncompiled, base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), compile=True)
    eager = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {"assistant_model": proxy, **GREEDY}
    for rows in (2, 5, 1, 3):
        expected = base.generate(**padded(rows), logits_processor=[eager], **settings)
        assert torch.equal(base.generate(**padded(rows), logits_processor=[kad], **settings), expected)
    kad.reset()
    assert torch.equal(base.generate(**padded(rows), logits_processor=[kad], **settings), expected)


def test_drafts_are_looked_up_in_every_row(uncompiled):
    base, proxy = make_pair("both")
    texts = []
    for compiled in (False, True):
        kad = KADLogitsProcessor(proxy, DualDeferral(0.9), drafter="prompt_lookup", compile=compiled)
        settings = {"assistant_model": proxy, **GREEDY, "max_new_tokens": 60}
        texts.append(base.generate(**padded(5), logits_processor=[kad], **settings))
    assert torch.equal(*texts)
    assert kad.statistics.accepted > 0


def test_a_prompt_of_its_own_for_the_proxy_of_every_row(uncompiled, base, proxy):
    check_prompts_of_the_proxys_own(base, proxy, compile=True)


def test_a_proxy_with_a_tokenizer_of_its_own(uncompiled):
    base, tokenizer = load_model("recipes/tiny_pair/base"), load_tokenizer("recipes/tiny_pair/base")
    kad = make_kad(align_vocabularies(tokenizer, TOKENIZERS["byte-level"], minimum_share=0.5), compile=True)
    inputs = tokenizer([*TEXTS, "Ben"], padding=True, return_tensors="pt")
    settings = {"logits_processor": [kad], "eos_token_id": None, "pad_token_id": 0, **GREEDY}
    ids = base.generate(**inputs, assistant_model=kad.proxy, **settings)
    assert 0 < kad.statistics.accepted < kad.statistics.drafted
    assert torch.equal(ids, base.generate(**inputs, **settings))


def test_texts_that_outgrow_the_cache_of_an_earlier_call(uncompiled, base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), compile=True)
    eager = KADLogitsProcessor(proxy, DualDeferral(0.6))
    for count in (5, CAPACITY_STEP + 20):
        settings = {"assistant_model": proxy, "do_sample": False, "max_new_tokens": count}
        expected = base.generate(**padded(3), logits_processor=[eager], **settings)
        assert torch.equal(base.generate(**padded(3), logits_processor=[kad], **settings), expected)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_what_compiled_forwards_would_not_read_is_refused(uncompiled, base, name):
    proxy = tiny_family("bert") if name == "token_type_ids" else tiny_model(vocabulary=96, seed=2)
    kad = KADLogitsProcessor(proxy, compile=True)
    settings = {"logits_processor": [kad], "assistant_model": proxy, **GREEDY}
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), name: torch.tensor([[0, 0, 1]])}
    with (
        kad.proxy_prompt(prompt),
        pytest.raises(ValueError, match=rf"decodes from `input_ids` alone, got `{name}` in `proxy_prompt`"),
    ):
        base.generate(**padded(1), **settings)


# --- The same law ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_samples_of_a_padded_batch_have_the_law_of_r(uncompiled):
    """Rows of two lengths in caches with windows, which leave the batch at their ends."""
    setting, chosen = test_distribution.Setting(eos=3, component_temperature=1.2), test_distribution.models("sliding")
    rule: PlainRule = exact_law.dual(0.4)
    kad = KADLogitsProcessor(
        chosen.proxy, DualDeferral(0.4), component_temperature=1.2, num_assistant_tokens=2, compile=True
    )
    long, short, samples = (1, 2, 3, 1, 2, 1), (3, 2), 5000
    prompts = torch.tensor([long, (0,) * 4 + short])
    torch.manual_seed(4)
    sequences = chosen.base.generate(
        prompts,
        attention_mask=(prompts != 0).long(),
        assistant_model=kad.proxy,
        max_new_tokens=4,
        pad_token_id=0,
        num_return_sequences=samples,
        **setting.arguments(kad) | test_distribution.COMMON,
    )
    texts = test_distribution.new_tokens(sequences, len(long), setting.eos)
    for prompt, rows in ((long, texts[:samples]), (short, texts[samples:])):
        p_value = exact_law.chi_square_p_value(rows, setting.law(rule, chosen, 4, prompt))
        assert p_value >= FALSE_ALARM / P_VALUES
        for other in (lambda p, q, _: p, lambda p, q, _: q):  # the law of neither model alone
            wrong = setting.law(other, chosen, 4, prompt)
            assert exact_law.chi_square_p_value(rows, wrong) < FALSE_ALARM / P_VALUES


# --- What is compiled ------------------------------------------------------------------------------------------


def test_there_is_one_graph_for_each_bucket_and_width(monkeypatch):
    """Traced without breaks, and run as traced: what the compiler makes of a graph is not the subject here."""
    skip_if_shapes_are_few()
    base, proxy = make_pair("both")
    shapes = []

    def note(graph, inputs):
        ids = [tuple(value.shape) for value in inputs if value.dtype == torch.long and value.dim() == 2]
        shapes.append(min(ids, key=lambda shape: shape[1]))
        return graph

    traced = functools.partial(torch.compile, backend=note, fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=4, compile=True)
    eager = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=4)
    for rows in (5, 3, 4, 5, 1):
        if rows == 4:
            kad.reset()  # what was compiled is used again with new caches
        expected, ids = (
            base.generate(**padded(rows), logits_processor=[processor], assistant_model=proxy, **GREEDY)
            for processor in (eager, kad)
        )
        assert torch.equal(ids, expected)
    assert sorted(shapes) == sorted((rows, width) for rows in (1, 2, 4, 8) for width in (1, 5))


@pytest.mark.slow
def test_a_compiled_batch_with_padding_and_windows():
    base, proxy = tiny_model("mistral", hidden=32, seed=1), tiny_model(seed=2)
    _, kad = both(base, proxy, padded(2), drafts=3)
    assert kad.state.models.static_base(base, 4).forwards == kad.statistics.base_forwards
