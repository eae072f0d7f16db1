"""Batches, decoded speculatively: every row is what it would be alone, and none waits for another."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_other_tokenizer import TEXTS, make_kad
from test_speculative import CountForwards
from test_vocabulary import TOKENIZERS
from tiny_models import tiny_model
from transformers import (
    LogitsProcessor,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
)

from transformers_kad import (
    DualDeferral,
    ImplicitReward,
    KADLogitsProcessor,
    align_vocabularies,
)
from transformers_kad.integrations.loading.models import load_model, load_tokenizer
from transformers_kad.models import cached_model as proxy_module
from transformers_kad.models.cached_model import LARGEST_SHARE_OF_HOLES, CachedModel

GREEDY = {"do_sample": False, "max_new_tokens": 24}
LENGTHS = (12, 5, 9, 1, 12, 7, 3, 10, 2, 8, 11, 4, 6, 12, 5, 9)


def padded(rows: int) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left with an id that stands for nothing else there."""
    generator = torch.Generator().manual_seed(7)
    ids, mask = torch.zeros(rows, 12, dtype=torch.long), torch.zeros(rows, 12, dtype=torch.long)
    for row, length in enumerate(LENGTHS[:rows]):
        ids[row, -length:] = torch.randint(1, 50, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def alone(base, inputs, row, **settings):
    """A row's new tokens when it is decoded as the only one, without padding."""
    keep = inputs["attention_mask"][row].bool()
    ids = base.generate(inputs["input_ids"][row, keep][None], **settings)
    return ids[0, int(keep.sum()) :].tolist()


def trimmed(tokens, ends=()):
    """A row's tokens up to its end."""
    for at, token in enumerate(tokens):
        if token in ends:
            return tokens[: at + 1]
    return tokens


@pytest.mark.parametrize(
    ("rows", "base_architecture", "proxy_architecture", "chunk"),
    [(2, "llama", "qwen3", None), (4, "gpt2", "llama", None), (8, "qwen3", "gpt2", 5), (16, "llama", "llama", None)],
)
def test_rows_are_what_they_are_alone(rows, base_architecture, proxy_architecture, chunk):
    base = tiny_model(base_architecture, hidden=32, seed=1)
    kad = KADLogitsProcessor(tiny_model(proxy_architecture, seed=2), DualDeferral(0.6), num_assistant_tokens=4)
    inputs, settings = padded(rows), {"logits_processor": [kad], "prefill_chunk_size": chunk, **GREEDY}
    ids = base.generate(**inputs, assistant_model=kad.proxy, **settings)
    statistics = kad.statistics
    assert len({row.rounds for row in statistics.sequences}) > 1  # some rows were faster than others
    for row in range(rows):
        for assistant in (None, kad.proxy):
            kad.reset()
            assert ids[row, 12:].tolist() == alone(base, inputs, row, assistant_model=assistant, **settings)
        own = kad.statistics.sequences[0]
        assert statistics.sequences[row].acceptance_histogram == own.acceptance_histogram
        assert statistics.sequences[row].deferral_mass == pytest.approx(own.deferral_mass, abs=1e-4)


def test_several_sequences_of_a_prompt_and_of_each_of_several(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6))
    settings = {"logits_processor": [kad], "do_sample": True, "max_new_tokens": 6, "num_return_sequences": 3}
    torch.manual_seed(0)
    ids = base.generate(**padded(2), assistant_model=proxy, **settings)
    assert ids.shape == (6, 18)
    assert torch.equal(ids[:, :12], padded(2)["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in ids.tolist()}) > 2
    assert len(kad.statistics.sequences) == 6


def test_finished_rows_leave_the_batch_and_no_forward_is_wasted(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.8), num_assistant_tokens=3)
    with CountForwards(base) as of_base, CountForwards(proxy) as of_proxy:
        base.generate(**padded(8), logits_processor=[kad], assistant_model=proxy, **GREEDY)
    rounds = [row.rounds for row in kad.statistics.sequences]
    assert len(of_base.lengths) == max(rounds) == kad.statistics.base_forwards
    # Row by row as many forwards as it had rounds.
    assert [shape[0] for shape in of_base.lengths] == [sum(r > at for r in rounds) for at in range(max(rounds))]
    assert min(rounds) < max(rounds)
    assert len(of_proxy.lengths) == kad.statistics.proxy_forwards <= 4 * max(rounds)
    assert {shape[1] for shape in of_proxy.lengths[1:]} == {1}


def test_holes_are_closed_before_they_are_a_large_share(base, proxy, monkeypatch):
    widest = []
    closed = []

    def watching(self, tokens):
        keep(self, tokens)
        widest.append(self.cached_length / max(int(self._texts.full_mask.sum(dim=-1).max()), 1))

    keep, close = CachedModel.take_back, CachedModel._close_holes
    monkeypatch.setattr(CachedModel, "take_back", watching)
    monkeypatch.setattr(CachedModel, "_close_holes", lambda self, length: closed.append(self) or close(self, length))
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=4)
    base.generate(**padded(8), logits_processor=[kad], assistant_model=proxy, do_sample=False, max_new_tokens=80)
    assert max(widest) <= 1 / (1 - LARGEST_SHARE_OF_HOLES) + 1e-9
    assert kad.state.models.proxy in closed
    assert len(set(map(id, closed))) == 2  # the base's cache too
    rounds = max(row.rounds for row in kad.statistics.sequences)
    assert len(closed) < rounds  # of 2 * rounds times that they could be


def test_holes_without_closing_give_the_same_text(base, proxy, monkeypatch):
    texts = []
    for share in (0.0, 0.1, 1.0):
        monkeypatch.setattr(proxy_module, "LARGEST_SHARE_OF_HOLES", share)
        kad = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=4)
        texts.append(base.generate(**padded(4), logits_processor=[kad], assistant_model=proxy, **GREEDY))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("ends", [1, 2, 5])
def test_every_row_ends_at_its_own_end_of_sequence(base, proxy, ends):
    inputs, kad = padded(8), KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=4)
    settings = {"logits_processor": [kad], **GREEDY}
    free = base.generate(**inputs, **settings)[:, 12:]
    ids = free[:, 3:].unique()[:: len(free[:, 3:].unique()) // ends].tolist()[:ends]
    drafted = base.generate(**inputs, assistant_model=proxy, eos_token_id=ids, pad_token_id=0, **settings)[:, 12:]
    expected = [trimmed(row, ids) for row in free.tolist()]
    assert len({len(row) for row in expected}) > 1
    assert [trimmed(row, ids) for row in drafted.tolist()] == expected
    for row, tokens in zip(drafted.tolist(), expected, strict=True):
        assert row[len(tokens) :] == [0] * (drafted.shape[1] - len(tokens))
    assert [row.tokens for row in kad.statistics.sequences] == [len(row) for row in expected]


def test_stop_strings_end_every_row():
    pair = "recipes/tiny_pair"
    base, tokenizer = load_model(f"{pair}/base"), load_tokenizer(f"{pair}/base")
    kad = KADLogitsProcessor(load_model(f"{pair}/proxy"), DualDeferral(0.4))
    questions = ["Mia has 34 apples. Jon brings 28 more.", "Ana has 9 eggs.", "Tom had 50 coins and lost 13 of them."]
    inputs = tokenizer(questions, padding=True, return_tensors="pt")
    settings = {"logits_processor": [kad], "stop_strings": [".", "="], "tokenizer": tokenizer, **GREEDY}
    one_by_one = base.generate(**inputs, **settings)
    drafted = base.generate(**inputs, assistant_model=kad.proxy, **settings)
    width = inputs["input_ids"].shape[1]
    texts = [tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True) for ids in (one_by_one, drafted)]
    assert texts[0] == texts[1]
    assert len({len(row) for row in texts[1]}) > 1
    assert all(text.rstrip()[-1] in ".=" for text in texts[1])


class StopAtToken(StoppingCriteria):
    """Ends rows at a token, and notes every text that it was asked about."""

    def __init__(self, token):
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


def test_custom_criteria_are_asked_about_all_rows_after_every_token(base, proxy):
    inputs, kad = padded(4), KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=4)
    settings = {"logits_processor": [kad], **GREEDY}
    free = base.generate(**inputs, **settings)[:, 12:].tolist()
    token = free[0][5]
    stop = StopAtToken(token)
    ids = base.generate(
        **inputs,
        assistant_model=proxy,
        stopping_criteria=StoppingCriteriaList([stop, MaxTimeCriteria(1e6)]),
        **settings,
    )[:, 12:].tolist()
    expected = [trimmed(row, [token]) for row in free]
    assert [row[: len(tokens)] for row, tokens in zip(ids, expected, strict=True)] == expected
    assert stop.lengths == [13 + at for at in range(max(map(len, expected)))]


@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.4, "min_new_tokens": 3}])
def test_scores_and_logits_of_a_batch(base, proxy, processors):
    """They are those of token by token decoding; rows that ended say that only padding comes."""
    inputs, kad = padded(4), KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=3)
    settings = {"logits_processor": [kad], **GREEDY, **processors}
    free = base.generate(**inputs, **settings)[:, 12:]
    settings |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    settings |= {"eos_token_id": [int(free[0, 6]), int(free[1, 9])], "pad_token_id": 0}
    one_by_one = base.generate(**inputs, **settings)
    drafted = base.generate(**inputs, assistant_model=proxy, **settings)
    assert torch.equal(one_by_one.sequences, drafted.sequences)
    assert len(one_by_one.scores) == len(drafted.scores) == len(drafted.logits)
    lengths = [row.tokens for row in kad.statistics.sequences]
    assert min(lengths) < max(lengths)
    for name in ("scores", "logits"):
        for row, length in enumerate(lengths):
            for at, step in enumerate(drafted[name]):
                if at < length:
                    torch.testing.assert_close(step[row], one_by_one[name][at][row], atol=2e-3, rtol=2e-3)
                else:
                    assert step[row].tolist() == [0.0] + [-torch.inf] * 49
    transition = base.compute_transition_scores(drafted.sequences, drafted.scores)
    assert (transition > -torch.inf).all()


class Bias(LogitsProcessor):
    """Depends on the text, in a way that padding changes nothing."""

    def __init__(self, strength):
        self.strength, self.texts = strength, []

    def __call__(self, input_ids, scores):
        self.texts += [tuple(row) for row in input_ids.tolist()]
        return scores + self.strength * torch.nn.functional.one_hot((input_ids[:, -1] + 1) % 50, 50)


def test_user_processors_before_and_after_in_a_batch(base, proxy):
    kad, before, after = KADLogitsProcessor(proxy, DualDeferral(0.6)), Bias(3.0), Bias(-2.0)
    settings = {"logits_processor": [before, kad, after], "temperature": None, **GREEDY}
    one_by_one = base.generate(**padded(4), **settings)
    seen = sorted(before.texts)
    before.texts.clear(), after.texts.clear()
    drafted = base.generate(**padded(4), assistant_model=proxy, **settings)
    assert torch.equal(one_by_one, drafted)
    assert sorted(before.texts) == sorted(after.texts) == seen
    assert not torch.equal(drafted, base.generate(**padded(4), logits_processor=[kad], **GREEDY))


def test_a_watermark_with_a_state_of_the_whole_batch(base, proxy):
    """It is called as token by token: once a step, with all rows. It leaves one token of each pair at a time."""
    watermark = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3], context_history_size=64)
    processor = watermark.construct_processor(50, "cpu")
    settings = {"logits_processor": [KADLogitsProcessor(proxy), processor], **GREEDY}
    one_by_one = base.generate(**padded(3), **settings)
    processor.state = None
    drafted = base.generate(**padded(3), assistant_model=proxy, **settings)
    assert torch.equal(one_by_one, drafted)
    assert not torch.equal(drafted, base.generate(**padded(3), logits_processor=[KADLogitsProcessor(proxy)], **GREEDY))


@pytest.mark.parametrize("drafter", ["proxy", "prompt_lookup"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_next_turn_of_a_batch_of_chats_is_as_without_the_turn_before(base, proxy, rows, drafter):
    """What the caches keep of the turn before, the number of its tokens among it, is not taken for the next one's."""
    inputs = padded(rows)
    settings = {"assistant_model": proxy, "pad_token_id": 0, **GREEDY}
    kad = KADLogitsProcessor(proxy, DualDeferral(0.9), num_assistant_tokens=3, drafter=drafter)
    for turn in range(4):
        width = inputs["input_ids"].shape[1]
        fresh = KADLogitsProcessor(proxy, DualDeferral(0.9))
        expected = base.generate(**inputs, logits_processor=[fresh], pad_token_id=0, **GREEDY)
        text = base.generate(**inputs, logits_processor=[kad], **settings)
        assert torch.equal(text, expected), turn
        more = torch.full((rows, 2), 5 + turn)
        mask = inputs["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(rows, text.shape[1] + 2 - width)], dim=1)
        inputs = {"input_ids": torch.cat([text, more], dim=1), "attention_mask": mask}


@pytest.mark.parametrize("role", ["base", "proxy"])
def test_windows_do_not_count_refused_tokens(base, proxy, role):
    sliding = tiny_model("mistral", hidden=32, seed=3)
    models = {"base": base, "proxy": proxy, role: sliding}
    kad = KADLogitsProcessor(models["proxy"], DualDeferral(0.6))
    settings = {"logits_processor": [kad], **GREEDY}
    expected = models["base"].generate(**padded(3), **settings)
    assert torch.equal(models["base"].generate(**padded(3), assistant_model=models["proxy"], **settings), expected)
    assert len({row.rounds for row in kad.statistics.sequences}) > 1  # every row accepts its own number of tokens


def test_a_reference_follows_every_row(base, proxy):
    kad = KADLogitsProcessor(proxy, ImplicitReward(1.0), reference=tiny_model(seed=9))
    settings = {"logits_processor": [kad], **GREEDY}
    ids = base.generate(**padded(5), assistant_model=proxy, **settings)
    assert torch.equal(ids, base.generate(**padded(5), **settings))


def test_an_adapter_switched_off_for_every_row(base):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    kad = KADLogitsProcessor(get_peft_model(tiny_model(seed=2), config).eval(), ImplicitReward(0.7))
    settings = {"logits_processor": [kad], **GREEDY}
    ids = base.generate(**padded(3), assistant_model=kad.proxy, **settings)
    assert torch.equal(ids, base.generate(**padded(3), **settings))


def test_a_prompt_of_its_own_for_the_proxy_of_every_row(base, proxy):
    check_prompts_of_the_proxys_own(base, proxy)


def check_prompts_of_the_proxys_own(base, proxy, **of_kad):
    """Drafts give the text of token by token, and the proxy's prompts count."""
    kad, own = KADLogitsProcessor(proxy, DualDeferral(0.6), **of_kad), padded(6)
    own = {name: value[3:, -9:] for name, value in own.items()}
    settings = {"logits_processor": [kad], **GREEDY}
    with kad.proxy_prompt(own):
        ids = base.generate(**padded(3), assistant_model=proxy, **settings)
        assert torch.equal(ids, base.generate(**padded(3), **settings))
    assert not torch.equal(ids, base.generate(**padded(3), assistant_model=proxy, **settings))


def test_a_proxy_with_a_tokenizer_of_its_own():
    base, tokenizer = load_model("recipes/tiny_pair/base"), load_tokenizer("recipes/tiny_pair/base")
    kad = make_kad(align_vocabularies(tokenizer, TOKENIZERS["byte-level"], minimum_share=0.5))
    inputs = tokenizer([*TEXTS, "Ben"], padding=True, return_tensors="pt")
    settings = {"logits_processor": [kad], "eos_token_id": None, "pad_token_id": 0, **GREEDY}
    ids = base.generate(**inputs, assistant_model=kad.proxy, **settings)
    assert 0 < kad.statistics.accepted < kad.statistics.drafted
    assert torch.equal(ids, base.generate(**inputs, **settings))


@pytest.mark.parametrize(("role", "limit"), [("base", 22), ("proxy", 40)])
def test_contexts_that_end_before_some_drafts_do(role, limit):
    models = {
        "base": tiny_model("gpt2", hidden=32, seed=1, **({"n_positions": limit} if role == "base" else {})),
        "proxy": tiny_model("gpt2", seed=2, **({"n_positions": limit} if role == "proxy" else {})),
    }
    kad = KADLogitsProcessor(models["proxy"], DualDeferral(0.6), num_assistant_tokens=6)
    settings = {"logits_processor": [kad], "do_sample": False, "max_new_tokens": limit - 12}
    ids = models["base"].generate(**padded(4), assistant_model=kad.proxy, **settings)
    for row in range(4):
        assert ids[row, 12:].tolist() == alone(models["base"], padded(4), row, **settings)


def test_statistics_and_trace_of_a_batch(base, proxy):
    kad = KADLogitsProcessor(proxy, DualDeferral(0.6), num_assistant_tokens=4, trace=True)
    ids = base.generate(**padded(3), logits_processor=[kad], assistant_model=proxy, **GREEDY)
    for row, (own, records) in enumerate(zip(kad.statistics.sequences, kad.trace.sequences, strict=True)):
        assert [record.token_id for record in records] == ids[row, 12:].tolist()
        assert own.tokens == len(records) == 24
        assert own.accepted == sum(record.drafted for record in records)
        assert own.accepted == sum(k * count for k, count in enumerate(own.acceptance_histogram))
        assert own.rounds == sum(own.acceptance_histogram)
        assert own.deferral_mass == pytest.approx(sum(record.deferral_mass for record in records) / 24)
    one_by_one = copy.deepcopy(kad.trace)
    base.generate(**padded(3), logits_processor=[kad], **GREEDY)
    for drafted, plain in zip(one_by_one.sequences, kad.trace.sequences, strict=True):
        torch.testing.assert_close(
            torch.tensor([[r.base_prob, r.proxy_prob, r.target_prob] for r in drafted]),
            torch.tensor([[r.base_prob, r.proxy_prob, r.target_prob] for r in plain]),
            atol=1e-4,
            rtol=1e-3,
        )


@pytest.mark.parametrize("role", ["base", "proxy"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_broken_logits_name_the_row(base, proxy, role, do_sample):
    broken = tiny_model(hidden=32, vocabulary=51, seed=1)  # the last id is in its vocabulary alone
    with torch.no_grad():
        broken.get_input_embeddings().weight[50] = float("nan")
    models = {"base": broken, "proxy": proxy if role == "base" else copy.deepcopy(broken)}
    if role == "proxy":
        models["base"] = tiny_model(hidden=32, vocabulary=51, seed=3)
    inputs = padded(3)
    inputs["input_ids"][1, -3] = 50  # only the second row has it
    kad = KADLogitsProcessor(models["proxy"])
    settings = {"logits_processor": [kad], "do_sample": do_sample, "max_new_tokens": 8}
    with pytest.raises(ValueError, match=rf"logits of the {role} .* position 12 of sequence 1 "):
        models["base"].generate(**inputs, assistant_model=kad.proxy, **settings)


def test_a_prefix_function_is_told_the_row(base, proxy):
    kad, asked = KADLogitsProcessor(proxy, DualDeferral(0.6)), []

    def allowed(row, text):
        asked.append((row, len(text)))
        return [at for at in range(50) if at % 4 == row % 4]

    settings = {"logits_processor": [kad], "prefix_allowed_tokens_fn": allowed, **GREEDY}
    drafted = base.generate(**padded(4), assistant_model=proxy, **settings)
    assert sorted(asked) == [(row, 12 + at) for row in range(4) for at in range(24)]
    assert torch.equal(drafted, base.generate(**padded(4), **settings))
    assert {(row, token % 4) for row, ids in enumerate(drafted[:, 12:].tolist()) for token in ids} == {
        (row, row) for row in range(4)
    }
