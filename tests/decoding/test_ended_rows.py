"""Rows of a batch that have ended: token by token `generate` fills them up, and nothing of that counts."""

import pytest
import torch
from test_batches import padded, trimmed
from test_callbacks import StopAtToken
from tiny_models import tiny_model
from transformers import EosTokenCriteria, Lfm2Config, Lfm2ForCausalLM, LogitsProcessor, StoppingCriteria

from transformers_kad import DualDeferral, ImplicitReward, KADLogitsProcessor
from transformers_kad.integrations.loading.models import load_model, load_tokenizer

BEGIN = 12
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def make_kad(proxy, rule=None, **settings):
    return KADLogitsProcessor(proxy, rule or DualDeferral(0.6), **settings)


@pytest.fixture(scope="module")
def free(base, proxy):
    """The texts that nothing ends."""
    kad = make_kad(proxy)
    return base.generate(**padded(5), logits_processor=[kad], **GREEDY)[:, BEGIN:].tolist()


# What is counted

ENDS = {
    "padding is the end of sequence": {"stop": [22], "eos_token_id": 47, "pad_token_id": 47},
    "padding is an end of sequence that nobody says": {"stop": [22, 47], "eos_token_id": 13, "pad_token_id": 13},
    "rows end on the padding": {"stop": [47], "eos_token_id": 40, "pad_token_id": 47},
    "rows end on the padding, and it is the end of sequence": {"stop": [], "eos_token_id": 47, "pad_token_id": 47},
    "padding stands in the texts": {"stop": [22], "eos_token_id": 40, "pad_token_id": 47},
    "the first token ends a row": {"stop": [49], "eos_token_id": 4, "pad_token_id": 49},
    "several ends of sequence": {"stop": [31], "eos_token_id": [40, 47], "pad_token_id": 40},
}


def expected_texts(free, case):
    eos = case["eos_token_id"]
    return [trimmed(row, [*case["stop"], *(eos if isinstance(eos, list) else [eos])]) for row in free]


def settings_of(case):
    settings = {name: value for name, value in case.items() if name != "stop"} | GREEDY
    return settings | {"stopping_criteria": [StopAtToken(case["stop"])]}


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("case", ENDS.values(), ids=ENDS)
def test_a_row_counts_up_to_its_end(base, proxy, free, case, speculative):
    kad = make_kad(proxy, trace=True)
    settings = settings_of(case) | ({"assistant_model": proxy} if speculative else {})
    ids = base.generate(**padded(5), logits_processor=[kad], **settings)[:, BEGIN:].tolist()
    expected = expected_texts(free, case)
    assert len({len(row) for row in expected}) > 1
    assert [row[: len(text)] for row, text in zip(ids, expected, strict=True)] == expected
    assert [row.tokens for row in kad.statistics.sequences] == [len(text) for text in expected]
    assert [[record.token_id for record in records] for records in kad.trace.sequences] == expected
    assert all(record.target_prob > 0 for records in kad.trace.sequences for record in records)
    assert [len(row.deferral_masses) for row in kad.statistics.sequences] == [len(text) for text in expected]


@pytest.mark.parametrize("speculative", [False, True])
def test_an_end_of_sequence_criterion_of_the_users_takes_the_place_of_generates(base, proxy, free, speculative):
    kad = make_kad(proxy)
    ids = base.generate(
        **padded(5),
        logits_processor=[kad],
        stopping_criteria=[EosTokenCriteria(torch.tensor([38]))],
        eos_token_id=47,
        pad_token_id=38,
        assistant_model=proxy if speculative else None,
        **GREEDY,
    )[:, BEGIN:].tolist()
    expected = [trimmed(row, [38]) for row in free]
    assert [row[: len(text)] for row, text in zip(ids, expected, strict=True)] == expected
    assert [row.tokens for row in kad.statistics.sequences] == [len(text) for text in expected]


@pytest.mark.parametrize("speculative", [False, True])
def test_stop_strings_where_the_padding_is_the_end_of_sequence(speculative):
    pair = "recipes/tiny_pair"
    base, tokenizer = load_model(f"{pair}/base"), load_tokenizer(f"{pair}/base")
    kad = KADLogitsProcessor(load_model(f"{pair}/proxy"), DualDeferral(0.4), trace=True)
    questions = ["Mia has 34 apples. Jon brings 28 more.", "Ana has 9 eggs.", "Tom had 50 coins and lost 13 of them."]
    inputs = tokenizer(questions, padding=True, return_tensors="pt")
    ids = base.generate(
        **inputs,
        logits_processor=[kad],
        stop_strings=[".", "="],
        tokenizer=tokenizer,
        pad_token_id=tokenizer.eos_token_id,
        assistant_model=kad.proxy if speculative else None,
        **GREEDY,
    )[:, inputs["input_ids"].shape[1] :].tolist()
    ends = [next(at for at, token in enumerate(row) if set(tokenizer.decode(token)) & set(".=")) for row in ids]
    assert len(set(ends)) > 1
    assert [row.tokens for row in kad.statistics.sequences] == [at + 1 for at in ends]
    assert all(record.target_prob > 0 for records in kad.trace.sequences for record in records)


def test_a_padding_id_beyond_the_vocabulary_costs_no_finished_work(base, proxy, free):
    """As after `tokenizer.add_special_tokens({"pad_token": ...})` without resizing the base; drafts never read it."""
    kad, settings = make_kad(proxy), {"eos_token_id": 47, "return_dict_in_generate": True, "output_scores": True}
    out = base.generate(
        **padded(5), logits_processor=[kad], assistant_model=proxy, pad_token_id=50, **settings, **GREEDY
    )
    expected = [trimmed(row, [47]) for row in free]
    assert len({len(row) for row in expected}) > 1
    assert [[token for token in row if token != 50] for row in out.sequences[:, BEGIN:].tolist()] == expected
    for row, text in enumerate(expected):
        assert [bool(step[row].amax() > -torch.inf) for step in out.scores[len(text) - 1 : len(text) + 1]] in (
            [True, False],
            [True],
        )


def test_without_an_end_of_sequence_rows_go_on_and_count(base, proxy, free):
    kad = make_kad(proxy)
    ids = base.generate(
        **padded(5), logits_processor=[kad], stopping_criteria=[StopAtToken([22])], pad_token_id=0, **GREEDY
    )
    assert ids[:, BEGIN:].tolist() == [row[: ids.shape[1] - BEGIN] for row in free]
    assert [row.tokens for row in kad.statistics.sequences] == [ids.shape[1] - BEGIN] * 5


def decode_without_criteria(end, padding):
    """A decoding method of the user's that asks no criterion: one id ends a row, another one fills it up."""

    def decode(model, input_ids, logits_processor, **kwargs):
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        for _ in range(10):
            tokens = logits_processor(input_ids, model(input_ids).logits[:, -1]).argmax(-1)
            input_ids = torch.cat([input_ids, tokens.masked_fill(ended, padding)[:, None]], dim=1)
            ended |= tokens == end
        return input_ids

    return decode


def test_padding_at_the_end_of_a_row_that_nothing_ended_is_text(base, proxy):
    """Without criteria of the user's only an end of sequence ends a row before the others."""
    kad, ids = make_kad(proxy), padded(5)["input_ids"][:, -3:].clamp(min=1)

    def generated(end, padding):
        method = {"custom_generate": decode_without_criteria(end, padding), "eos_token_id": end}
        return base.generate(ids, logits_processor=[kad], pad_token_id=padding, **method, **GREEDY)[:, 3:].tolist()

    rows = generated(-1, 0)
    end = next(token for token in rows[0] if token not in rows[1])
    expected = [trimmed(row, [end]) for row in rows]
    assert len(expected[0]) < len(expected[1]) == 10
    assert [row[: len(text)] for row, text in zip(generated(end, rows[1][-1]), expected, strict=True)] == expected
    assert [row.tokens for row in kad.statistics.sequences] == [len(row) for row in expected]


@pytest.mark.parametrize("case", ENDS.values(), ids=ENDS)
def test_a_beam_counts_up_to_its_end(base, proxy, case):
    kad = make_kad(proxy)
    settings = settings_of(case) | {"num_beams": 3, "num_return_sequences": 2}
    ids = base.generate(**padded(3), logits_processor=[kad], **settings)[:, BEGIN:].tolist()
    expected = expected_texts(ids, case)
    assert [row.tokens for row in kad.statistics.sequences] == [len(text) for text in expected]
    assert [len(row.deferral_masses) for row in kad.statistics.sequences] == [len(text) for text in expected]


def recurrent():
    torch.manual_seed(3)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    special = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": None}
    return Lfm2ForCausalLM(Lfm2Config(**sizes, **heads, **special, initializer_range=0.5)).eval()


@pytest.mark.parametrize("make_proxy", [lambda: tiny_model(hidden=16, seed=2), recurrent], ids=["llama", "recurrent"])
def test_beams_of_equal_prompts_have_the_masses_of_their_own_texts(base, make_proxy):
    """Also where the proxy reads every text anew, and does not say which it continues."""
    kad = make_kad(make_proxy())
    prompts = torch.tensor([[3, 14, 15, 9, 26], [4, 4, 8, 2, 7], [3, 14, 15, 9, 26]])
    settings = {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": 47, "pad_token_id": 0}
    ids = base.generate(prompts, logits_processor=[kad], do_sample=False, max_new_tokens=10, **settings)
    lengths = [len(trimmed(row[5:].tolist(), [47])) for row in ids]
    assert [own.tokens for own in kad.statistics.sequences] == lengths
    for row, length, own in zip(ids, lengths, kad.statistics.sequences, strict=True):
        with torch.no_grad():
            p = base(row[None, : 5 + length]).logits[0, 4 : 4 + length].softmax(-1)
        expected = (p * (p < 0.6)).sum(-1)
        torch.testing.assert_close(torch.tensor(own.deferral_masses), expected, atol=1e-4, rtol=1e-4)


# What is checked, and what stands for it


def models(role, change):
    """Base, proxy and reference, one of them changed."""
    chosen = {
        "base": tiny_model(hidden=32, seed=1),
        "proxy": tiny_model(hidden=16, seed=2),
        "reference": tiny_model(hidden=16, seed=3),
    }
    if role is not None:
        change(chosen[role])
    return chosen


def texts_of(chosen, inputs, lazy=False, reference=False, before=(), **settings):
    rule = ImplicitReward(1.0) if reference else DualDeferral(0.6)
    extra = {"reference": chosen["reference"]} if reference else {}
    kad = make_kad(chosen["proxy"], rule, lazy=lazy, **extra)
    torch.manual_seed(4)
    sampling = {"do_sample": True, "top_k": 0}
    return chosen["base"].generate(**inputs, logits_processor=[*before, kad], **(sampling | settings)), kad


PATHS = [("proxy", False, False), ("proxy", True, False), ("reference", False, True), ("proxy", False, True)]
END = 49


class EndAt(LogitsProcessor):
    """Before KAD: an end of sequence for each row at its own length of the text, and nowhere else."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores):
        is_end = torch.arange(scores.shape[-1]) == END
        ends = self.lengths == input_ids.shape[1]
        return scores.masked_fill(torch.where(ends[:, None], ~is_end, is_end), -torch.inf)


class StopAt(StoppingCriteria):
    """Ends each row at its own length of the text."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return self.lengths <= input_ids.shape[1]


def ending(kind, lengths):
    """Settings that end each row's text at a length."""
    if kind == "criterion":
        return {"stopping_criteria": [StopAt(lengths)], "eos_token_id": END, "suppress_tokens": [0, END]}
    return {"before": [EndAt([length - 1 for length in lengths])], "eos_token_id": END, "suppress_tokens": [0]}


@pytest.mark.parametrize("kind", ["end of sequence", "criterion"])
@pytest.mark.parametrize(("role", "lazy", "reference"), PATHS)
def test_a_long_row_that_ended_does_not_use_up_the_context(role, lazy, reference, kind):
    """The first row would come to its 30 tokens 18 tokens on, but ends before."""
    inputs = {name: value[[0, 3]] for name, value in padded(4).items()}  # 12 tokens and 1
    settings = {"pad_token_id": 0, "max_new_tokens": 28, **ending(kind, [BEGIN + 7, BEGIN + 24])}
    expected, _ = texts_of(models(None, None), inputs, lazy, reference, **settings)

    def shorten(model):
        model.config.max_position_embeddings = 30

    ids, limited = texts_of(models(role, shorten), inputs, lazy, reference, **settings)
    assert torch.equal(ids, expected)
    assert [row.tokens for row in limited.statistics.sequences] == [7, 24]
    with pytest.raises(ValueError, match=rf"but the {role} .* ends at 10"):

        def shorter(model):
            model.config.max_position_embeddings = 10

        texts_of(models(role, shorter), inputs, lazy, reference, **settings)


@pytest.mark.parametrize("kind", ["end of sequence", "criterion"])
@pytest.mark.parametrize(
    ("role", "lazy", "reference"), [*PATHS, ("base", False, False), ("base", True, False), ("base", False, True)]
)
def test_broken_logits_of_a_finished_row_stop_nobody(role, lazy, reference, kind):
    """The padding's embedding is NaN: only finished rows read it."""
    inputs = {"input_ids": padded(5)["input_ids"][:, -3:].clamp(min=1)}
    ends = [3 + 4, 3 + 12, 3 + 1, 3 + 9, 3 + 12]
    settings = {"pad_token_id": 0, "max_new_tokens": 28, **ending(kind, ends)}
    expected, kad = texts_of(models(None, None), inputs, lazy, reference, **settings)
    assert [row.tokens for row in kad.statistics.sequences] == [4, 12, 1, 9, 12]

    def spoil(model):
        with torch.no_grad():
            model.get_input_embeddings().weight[0] = float("nan")

    ids, broken = texts_of(models(role, spoil), inputs, lazy, reference, **settings)
    assert torch.equal(ids, expected)
    assert broken.statistics.sequences == kad.statistics.sequences


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("role", ["base", "proxy", "reference"])
def test_broken_logits_of_a_row_that_goes_on_are_named(role, do_sample, speculative):
    def spoil(model):
        with torch.no_grad():
            model.get_input_embeddings().weight[31] = float("nan")

    chosen = models(role, spoil)
    inputs = {"input_ids": padded(5)["input_ids"][:, -3:].clamp(min=1, max=30)}
    inputs["input_ids"][3, 1] = 31
    assistant = chosen["proxy"] if speculative else None
    with pytest.raises(ValueError, match=rf"logits of the {role} .*position 3 of sequence 3 "):
        texts_of(chosen, inputs, reference=True, do_sample=do_sample, assistant_model=assistant, max_new_tokens=4)
