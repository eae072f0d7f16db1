"""Whatever changes a model's outputs changes its fingerprint, and nothing else does."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

from transformers_kad import DualDeferral, KADCandidateGenerator, KADLogitsProcessor
from transformers_kad.models.fingerprint import fingerprint

PROMPT = torch.tensor([[5, 9, 3, 7, 7, 1, 2, 8, 11, 30, 4]])


def fused_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    torch.optim.AdamW(model.parameters(), lr=0.3, fused=True).step()


def tiny_fused_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True).step()


def there_and_back(model):
    model.to(torch.bfloat16).to(torch.float32)


def data_assigned(model):
    model.lm_head.weight.data = model.lm_head.weight.data * 3


def data_written(model):
    model.lm_head.weight.data.mul_(3)


def one_weight(model):
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] += 4


def one_bit(model):
    model.lm_head.weight.data.view(torch.int32)[7, 1] ^= 1


def rows_swapped(model):
    weight = model.model.embed_tokens.weight.data
    weight[[3, 9]] = weight[[9, 3]]


def norm_permuted(model):
    weight = model.model.norm.weight.data
    weight[:4] = torch.tensor([3.0, 1.0, 2.0, 5.0])
    before = fingerprint(model)
    weight[:4] = weight[[2, 0, 3, 1]]
    assert fingerprint(model) != before


def weights_exchanged(model):
    """Two tensors of one shape change places: the sum over all stays."""
    first, second = (layer.mlp.down_proj.weight.data for layer in model.model.layers)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def from_a_vector(model):
    vector = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(vector * 1.5, model.parameters())


def pruned(model):
    prune.l1_unstructured(model.lm_head, "weight", amount=0.5)


def buffer_written(model):
    model.model.rotary_emb.inv_freq.data.mul_(0.5)


def attention_scaled(model):
    model.model.layers[0].self_attn.scaling *= 3


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 2)


def layer_replaced(model):
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])


def activation_replaced(model):
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def forward_replaced(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda hidden: 3 * hidden


def configured(model):
    model.config.sliding_window = 4


CHANGES = [
    fused_step,
    tiny_fused_step,
    there_and_back,
    data_assigned,
    data_written,
    one_weight,
    one_bit,
    rows_swapped,
    norm_permuted,
    weights_exchanged,
    from_a_vector,
    pruned,
    buffer_written,
    attention_scaled,
    hooked,
    layer_replaced,
    activation_replaced,
    forward_replaced,
    configured,
]
# These change the logits by less than is seen in a short text, or only with other settings.
SMALL = {tiny_fused_step, one_bit, configured}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_changes_the_fingerprint(change):
    model = tiny_model(seed=2)
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocabulary", [50, 51])
def test_every_weight_of_every_type_counts(dtype, vocabulary):
    model = tiny_model(vocabulary=vocabulary, hidden=24, seed=2).to(dtype)
    before = fingerprint(model)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for place in (0, len(flat) // 2, len(flat) - 1):
            kept = flat[place].clone()
            flat[place] = kept + 1
            assert fingerprint(model) != before
            flat[place] = kept
            assert fingerprint(model) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)),
        lambda model: model.disable_adapter_layers(),
        lambda model: model.merge_adapter(),
        lambda model: [module.scaling.update(default=7.0) for module in model.modules() if hasattr(module, "scaling")
                       and isinstance(module.scaling, dict)],
    ],
)  # fmt: skip
def test_adapters_count(change):
    model = get_peft_model(tiny_model(seed=2), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_places_count_in_large_tensors_too():
    module = torch.nn.Module()
    module.register_buffer("large", torch.randn(300, 401, generator=torch.Generator().manual_seed(0)))
    before = fingerprint(module)
    flat = module.large.view(-1)
    for first, second in ((0, 1024), (7, len(flat) - 1), (len(flat) - 2, 5000)):
        flat[[first, second]] = flat[[second, first]].clone()
        assert fingerprint(module) != before
        flat[[first, second]] = flat[[second, first]].clone()
        assert fingerprint(module) == before


def test_forwards_and_gradients_change_nothing():
    model = tiny_model(seed=2)
    before = fingerprint(model)
    model.generate(PROMPT, max_new_tokens=4, do_sample=False)
    model(PROMPT, labels=PROMPT).loss.backward()
    model.generate(PROMPT, max_new_tokens=4, do_sample=True)
    assert fingerprint(model) == before


def test_weights_without_data_and_of_other_kinds():
    with torch.device("meta"):
        assert fingerprint(torch.nn.Linear(3, 4)) is not None
    with torch.inference_mode():
        model = torch.nn.Linear(3, 4)
    assert fingerprint(model) == fingerprint(model)
    odd = torch.nn.Module()
    odd.register_buffer("scalar", torch.tensor(1.5))
    odd.register_buffer("flags", torch.tensor([True, False, True]))
    odd.register_buffer("nothing", torch.empty(0, 3))
    odd.register_buffer("transposed", torch.arange(15.0).view(3, 5).T)
    odd.register_buffer("part", torch.arange(15, dtype=torch.int16)[1:])
    before = fingerprint(odd)
    for tensor in odd.buffers():
        if tensor.numel():
            kept = tensor.clone()
            tensor.data.fill_(0)
            assert fingerprint(odd) != before
            tensor.data.copy_(kept)
    assert fingerprint(odd) == before


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("change", [change for change in CHANGES if change not in SMALL])
def test_a_call_after_a_change_is_that_of_a_new_processor(base, change, speculative):
    """The kind of fault: logits from a cache that other weights filled."""
    proxy = tiny_model(seed=2)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.9))
    settings = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}
    settings |= {"assistant_model": proxy} if speculative else {}
    base.generate(PROMPT, logits_processor=[kad], **settings)
    change(proxy)
    got = base.generate(PROMPT, logits_processor=[kad], **settings)
    expected = base.generate(PROMPT, logits_processor=[KADLogitsProcessor(proxy, DualDeferral(0.9))], **settings)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(got.scores), torch.cat(expected.scores), atol=1e-4, rtol=1e-4)


def test_a_candidate_generator_sees_a_change():
    proxy = tiny_model(seed=2)
    generator = KADCandidateGenerator(proxy, num_assistant_tokens=3, vocabulary=50, do_sample=False)
    generator.get_candidates(PROMPT)
    fused_step(proxy)
    _, logits = generator.get_candidates(PROMPT)
    with torch.no_grad():
        torch.testing.assert_close(logits[:, 0], proxy(PROMPT).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_a_processor_asked_by_hand_sees_a_change(base):
    proxy = tiny_model(seed=2)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.9))
    with torch.no_grad():
        scores = base(PROMPT).logits[:, -1]
    kad(PROMPT, scores)
    fused_step(proxy)
    torch.testing.assert_close(kad(PROMPT, scores), KADLogitsProcessor(proxy, DualDeferral(0.9))(PROMPT, scores))


@pytest.mark.parametrize("speculative", [False, True])
def test_a_call_after_one_under_autocast_is_that_of_a_new_processor(base, speculative):
    """And the other way round: a cache that was filled in another precision is not gone on with."""
    proxy = tiny_model(seed=2)
    kad = KADLogitsProcessor(proxy, DualDeferral(0.9))
    settings = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}
    settings |= {"assistant_model": proxy} if speculative else {}
    for enabled in (True, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            got = base.generate(PROMPT, logits_processor=[kad], **settings)
            fresh = KADLogitsProcessor(proxy, DualDeferral(0.9))
            expected = base.generate(PROMPT, logits_processor=[fresh], **settings)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(torch.cat(got.scores), torch.cat(expected.scores), atol=1e-4, rtol=1e-4)
