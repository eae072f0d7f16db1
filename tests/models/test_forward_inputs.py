"""A proxy is forwarded with what `generate` would forward it with, also where a model counts in a way of its own."""

import copy

import pytest
import torch
from tiny_families import tiny_family
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2_5_VLForConditionalGeneration
from versions import skip_if_chunks_are_wrong

from transformers_kad import DualDeferral, KADLogitsProcessor
from transformers_kad.models import forward_inputs
from transformers_kad.models.cache_rollback import Rollback
from transformers_kad.models.cached_model import CachedModel
from transformers_kad.models.forward_inputs import ForwardInputs
from transformers_kad.models.padding import PaddedTexts

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
PROMPT = torch.tensor([[5, 9, 3, 7, 7, 1, 2, 8, 11, 30, 4]])


def bamba():
    kinds = {
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bamba", **SIZES, mamba_expand=2, **kinds))


def qwen2_5_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={**SIZES, "rope_parameters": rope},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
        vocab_size=50,
        image_token_id=48,
        video_token_id=49,
        vision_start_token_id=46,
        vision_end_token_id=47,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    # What an earlier call of its own, with images, left behind.
    model.model.rope_deltas = torch.tensor([[-7], [-3], [-5]])
    return model


def of_type(model_type, **settings):
    return lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **settings}))


def gpt2():
    return tiny_model("gpt2", seed=3)


MODELS = {
    "bamba": bamba,
    "qwen2_5_vl": qwen2_5_vl,
    "gpt2": gpt2,
    "llama": of_type("llama"),
    "phi3": of_type("phi3"),
    "bloom": of_type("bloom", n_layer=2, n_head=4),
    "codegen": of_type("codegen", n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4),
    "falcon_h1": of_type("falcon_h1", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8),
    "minimax": of_type("minimax", num_local_experts=2, num_experts_per_tok=1, head_dim=8, block_size=4,
                       layer_types=["full_attention", "linear_attention"]),
    "moshi": of_type("moshi"),
    "ctrl": of_type("ctrl", n_embd=32, n_layer=2, n_head=4, dff=64, n_positions=128),
    "gemma3_text": of_type("gemma3_text", head_dim=8, sliding_window=8),
}  # fmt: skip


def make(name):
    torch.manual_seed(5)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.pad_token_id = 0
    return model


class Inputs:
    """What a model is forwarded with, in the block."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __enter__(self):
        self.handle = self.model.register_forward_pre_hook(self.note, with_kwargs=True)
        return self.seen

    def __exit__(self, *exception):
        self.handle.remove()

    def note(self, module, arguments, kwargs):
        names = ("input_ids", "position_ids", "attention_mask", "token_type_ids", "cache_position")
        self.seen.append({name: copy.deepcopy(kwargs[name]) for name in names if kwargs.get(name) is not None})


def check_prepared_masks(masks, columns, window):
    """Masks `(B, 1, 1, S)` of the newest token, one or one for each type of layers, against a mask of columns."""
    for kind, mask in (masks if isinstance(masks, dict) else {"full_attention": masks}).items():
        if mask is None:  # of recurrent layers, which take no mask for a single token
            assert kind == "linear_attention"
            continue
        expected = columns.bool()
        if kind == "sliding_attention":
            expected[:, :-window] = False
        attended = mask if mask.dtype == torch.bool else mask == 0  # eager attention adds its mask to the scores
        assert torch.equal(attended[:, 0, 0], expected[:, -mask.shape[-1] :]), kind


@pytest.mark.parametrize(("padded", "prepares"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", MODELS)
def test_the_inputs_and_the_logits_are_those_of_generate(name, padded, prepares, monkeypatch):
    """With masks of columns, as on the CPU, and with prepared ones, as on other devices."""
    monkeypatch.setattr(forward_inputs, "is_synchronous", lambda device: not prepares)
    model = make(name)
    prompt, mask = PROMPT, torch.ones_like(PROMPT)
    if padded:
        prompt = torch.cat([PROMPT, torch.cat([torch.zeros(1, 4, dtype=torch.long), PROMPT[:, :7]], dim=1)])
        mask = (prompt != 0).long()
    settings = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    with Inputs(model) as expected:
        out = model.generate(prompt, attention_mask=mask, **settings)
    if name == "qwen2_5_vl":
        model.model.rope_deltas = torch.tensor([[-7], [-3], [-5]])
    cached = CachedModel(model)
    cached.refresh()
    with Inputs(model) as seen:
        for step, logits in enumerate(out.logits):
            length = prompt.shape[1] + step
            all_mask = torch.cat([mask, mask.new_ones(len(mask), step)], dim=1)
            text = out.sequences[:, :length]
            got = cached.logits(text, all_mask if padded else None, continues=step > 0)[:, -1]
            cached.crop(length)
            torch.testing.assert_close(got, logits, atol=1e-4, rtol=1e-4)
    assert len(seen) == len(expected) == 5
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if torch.is_tensor(ours[key]) and ours[key].dim() <= 3:
                assert torch.equal(ours[key], value), key
            else:
                assert prepares and key == "attention_mask"
                check_prepared_masks(ours[key], value, window=8)


@pytest.mark.parametrize("name", MODELS)
def test_a_call_after_the_proxys_own_call_is_as_before_it(base, name):
    """The kind of fault: something that the proxy keeps from a call of its own gets into the next one."""
    proxy = make(name)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.9))
    settings = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    expected = base.generate(PROMPT, logits_processor=[kad], **settings)
    kad.reset()
    proxy.generate(torch.cat([PROMPT, PROMPT, PROMPT]), max_new_tokens=3, do_sample=False)
    if name == "qwen2_5_vl":
        proxy.model.rope_deltas = torch.tensor([[-7], [-3], [-5]])
    got = base.generate(PROMPT, logits_processor=[kad], **settings)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(got.scores), torch.cat(expected.scores), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_proxies_guide_by_their_logits_of_the_whole_text(base, name):
    """Against forwards of the whole text, with the positions that `generate` begins with."""
    proxy = make(name)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.9))
    settings = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    out = base.generate(PROMPT, logits_processor=[kad], **settings)
    for step, scores in enumerate(out.scores):
        text = out.sequences[:, : PROMPT.shape[1] + step]
        own = proxy.generate(text, do_sample=False, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
        with torch.no_grad():
            p, q = base(text).logits[:, -1].softmax(-1), own.logits[0].softmax(-1)
        torch.testing.assert_close(scores.exp(), DualDeferral(0.9)(p, q), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_drafts_give_the_text_of_token_by_token(base, name):
    proxy = make(name)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.9), num_assistant_tokens=3)
    settings = {"logits_processor": [kad], "do_sample": False, "max_new_tokens": 16}
    expected = base.generate(PROMPT, **settings)
    assert torch.equal(base.generate(PROMPT, assistant_model=proxy, **settings), expected)
    assert kad.statistics.drafted > 0


# --- Inputs that a call passes for every token ----------------------------------------------------------------


def given_inputs(rows):
    """Left-padded prompts with token types and with positions of their own."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(1, 50, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    types = torch.randint(1, 50, (rows, 9), generator=generator)
    positions = (mask.cumsum(-1) - 1).clamp(min=0) * 2 + 3
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "position_ids": positions}


@torch.no_grad()
def log_r_with_inputs(base, proxy, inputs, text, row, rule):
    """Log r behind a text `(L,)` of one row, without a cache."""
    keep = inputs["attention_mask"][row].bool()
    more = len(text) - len(keep)
    values = {"input_ids": torch.cat([inputs["input_ids"][row][keep], text[len(keep) :]])[None]}
    if "token_type_ids" in inputs:
        types = inputs["token_type_ids"][row][keep]
        values["token_type_ids"] = torch.cat([types, types[-1:].expand(more)])[None]
    if "position_ids" in inputs:
        positions = inputs["position_ids"][row][keep]
        values["position_ids"] = torch.cat([positions, positions[-1:] + torch.arange(1, more + 1)])[None]
    p, q = (model(**values).logits[0, -1].softmax(-1) for model in (base, proxy))
    return rule(p, q).log()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("names", [("token_type_ids",), ("position_ids",), ("token_type_ids", "position_ids")])
@pytest.mark.parametrize("path", ["token by token", "speculative", "prompt lookup", "several sequences", "chunks"])
def test_token_types_and_positions_of_the_call_reach_the_proxy(path, names, rows):
    base, proxy = tiny_model("gpt2", hidden=32, seed=1), tiny_model("gpt2", seed=3)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.9), drafter="prompt_lookup" if path == "prompt lookup" else "proxy")
    inputs = given_inputs(rows)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", *names)}
    settings = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    settings["logits_processor"] = [kad]
    if path in ("speculative", "prompt lookup", "several sequences"):
        settings["assistant_model"] = proxy
    if path == "several sequences":
        settings |= {"num_return_sequences": 2, "do_sample": True, "top_k": 0}
    if path == "chunks":
        settings["prefill_chunk_size"] = 4
        if names == ("token_type_ids",) and rows == 1:
            skip_if_chunks_are_wrong()
    plain = base.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings)
    out = base.generate(**inputs, **settings)
    assert (torch.cat(plain.scores) - torch.cat(out.scores)).abs().nan_to_num(0, 0, 0).max() > 0.5  # they matter
    per_prompt = len(out.sequences) // rows
    for row in range(len(out.sequences)):
        for step, scores in enumerate(out.scores):
            text = out.sequences[row, : 9 + step]
            expected = log_r_with_inputs(base, proxy, inputs, text, row // per_prompt, kad.rule)
            torch.testing.assert_close(scores[row].exp(), expected.exp(), atol=1e-3, rtol=1e-3)
    again = base.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings)
    if not settings["do_sample"]:  # nothing of it is left for the next call
        assert torch.equal(again.sequences, plain.sequences)
        torch.testing.assert_close(torch.cat(again.scores), torch.cat(plain.scores), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("speculative", [False, True])
def test_token_types_of_a_prompt_of_the_proxys_own(base, speculative):
    proxy = tiny_model("gpt2", seed=3)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.9))
    own = given_inputs(1)
    settings = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    settings |= {"logits_processor": [kad]} | ({"assistant_model": proxy} if speculative else {})
    with kad.proxy_prompt(own):
        out = base.generate(PROMPT, **settings)
    for step, scores in enumerate(out.scores):
        more = out.sequences[0, PROMPT.shape[1] : PROMPT.shape[1] + step]
        types, positions = own["token_type_ids"][0], own["position_ids"][0]
        with torch.no_grad():
            q = proxy(
                torch.cat([own["input_ids"][0], more])[None],
                token_type_ids=torch.cat([types, types[-1:].expand(step)])[None],
                position_ids=torch.cat([positions, positions[-1:] + torch.arange(1, step + 1)])[None],
            ).logits[0, -1]
            p = base(out.sequences[:, : PROMPT.shape[1] + step]).logits[0, -1]
        expected = DualDeferral(0.9)(p.softmax(-1), q.softmax(-1))
        torch.testing.assert_close(scores[0].exp(), expected, atol=1e-3, rtol=1e-3)
    with (
        pytest.raises(ValueError, match=r"got \['inputs_embeds'\] as well"),
        kad.proxy_prompt({**own, "inputs_embeds": torch.zeros(1, 9, 16)}),
    ):
        pass


def test_inputs_that_the_proxy_could_take_and_does_not_get_are_named_once(caplog):
    base, proxy = make("qwen2_5_vl"), make("qwen2_5_vl")
    kad = KADLogitsProcessor(proxy, DualDeferral(0.9))
    with caplog.at_level("WARNING", logger="transformers_kad.decoding.generate_wrapper"):
        for _ in range(2):
            types = torch.zeros_like(PROMPT)
            base.generate(PROMPT, mm_token_type_ids=types, logits_processor=[kad], do_sample=False, max_new_tokens=2)
    messages = [record.message for record in caplog.records if "could take as well" in record.message]
    assert len(messages) == 1
    assert "['mm_token_type_ids']" in messages[0]


@pytest.mark.parametrize("drafter", ["proxy", "prompt_lookup"])
@pytest.mark.parametrize("first", [3, 30])
def test_positions_that_run_ahead_of_the_tokens_are_read_as_given(first, drafter):
    """A context is counted in tokens; what lies beyond it by its position alone is no draft that nobody reads."""
    base = tiny_model(hidden=32, seed=1, max_position_embeddings=24)
    proxy = tiny_model(seed=2, max_position_embeddings=24)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.9), num_assistant_tokens=4, drafter=drafter)
    ids = PROMPT[:, :4].repeat(1, 2)
    inputs = {"input_ids": ids, "position_ids": torch.arange(8)[None] * 2 + first}
    settings = {"do_sample": False, "max_new_tokens": 16, "return_dict_in_generate": True, "output_scores": True}
    out = base.generate(**inputs, logits_processor=[kad], assistant_model=proxy, **settings)
    inputs["attention_mask"] = torch.ones_like(ids)
    for step, scores in enumerate(out.scores):
        expected = log_r_with_inputs(base, proxy, inputs, out.sequences[0, : 8 + step], 0, kad.rule)
        torch.testing.assert_close(scores[0].exp(), expected.exp(), atol=1e-3, rtol=1e-3)
    assert kad.statistics.drafted > 0


@pytest.mark.parametrize(
    ("family", "of_cache", "expected"),
    [
        ("llama", Rollback.BEHIND_MASK, Rollback.BEHIND_MASK),
        ("gpt_neo", Rollback.BEHIND_MASK, Rollback.BY_ROW),  # windows over a cache of full attention
        ("bloom", Rollback.BEHIND_MASK, Rollback.IN_STEP),  # takes no `position_ids`
        ("mpt", Rollback.BEHIND_MASK, Rollback.IN_STEP),
        ("mistral", Rollback.BY_ROW, Rollback.BY_ROW),
        ("qwen3_next", Rollback.BY_STATE, Rollback.BY_STATE),
        ("minimax", Rollback.BY_COPY, Rollback.BY_COPY),
    ],
)
def test_a_model_decides_with_its_cache_how_tokens_are_taken_back(family, of_cache, expected):
    assert ForwardInputs(tiny_family(family)).rollback(of_cache) is expected


def test_the_first_columns_of_given_inputs_leave_with_their_padding():
    inputs, ids = ForwardInputs(tiny_model(seed=3)), torch.tensor([[0, 0, 5, 6], [0, 7, 8, 9]])
    mask = (ids != 0).long()
    inputs.use_prompt_inputs({"position_ids": torch.tensor([[0, 0, 3, 7], [0, 2, 4, 6]])}, mask)
    texts = PaddedTexts(ids, mask).extend(torch.tensor([[10], [11]]), None)
    before = inputs.positions(texts, 5)
    assert before.tolist() == [[0, 0, 3, 7, 8], [0, 2, 4, 6, 7]]
    inputs.drop_prompt_columns(1)
    assert torch.equal(inputs.positions(texts.without_first(1), 4), before[:, 1:])


def test_given_inputs_of_columns_that_have_moved_are_not_read_again():
    inputs, ids = ForwardInputs(tiny_model(seed=3)), torch.tensor([[5, 6], [7, 8]])
    inputs.use_prompt_inputs({"position_ids": torch.tensor([[3, 7], [4, 6]])}, None)
    texts = PaddedTexts(ids)
    inputs.build(texts, 2, 1, is_first=True)
    inputs.forget_prompt_columns()
    inputs.build(texts.extend(ids, None), 2, 1, is_first=False)
    with pytest.raises(ValueError, match="would have to read a batch again whose rows have moved, and `position_ids`"):
        inputs.build(texts, 2, 1, is_first=True)
    inputs.use_prompt_inputs({}, None)
    inputs.forget_prompt_columns()
    inputs.build(texts, 2, 1, is_first=True)
