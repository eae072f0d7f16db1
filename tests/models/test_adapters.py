"""Adapters of peft, every type of them: behind a cache, switched off, inside a base that verifies drafts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import CordaConfig, LoraGAConfig, VeloraConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from test_cached_model import plain, random_ids
from tiny_models import tiny_model
from transformers import PreTrainedModel
from versions import PEFT, skip_if_peft_is_behind, skip_if_torch_is_old

from transformers_kad import DualDeferral, ImplicitReward, KADLogitsProcessor
from transformers_kad.models import adapters
from transformers_kad.models.adapters import check_adapters
from transformers_kad.models.cached_model import CachedModel

try:
    from peft.tuners.lora.config import KasaConfig
except ImportError:  # before peft 0.21
    KasaConfig = None

TARGETS = ["q_proj", "v_proj", "down_proj"]
INVOCATION = [7, 8]


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: its configuration, the model below, and what has to be done to that before."""

    config: type[PeftConfig] = LoraConfig
    settings: dict[str, Any] = field(default_factory=dict)
    below: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[PreTrainedModel, PeftConfig], None] | None = None


def run_some_text(model: PreTrainedModel) -> None:
    model(input_ids=random_ids(1, 60, seed=8))  # CorDA takes one text at a time


def prepare_corda(model: PreTrainedModel, config: PeftConfig) -> None:
    preprocess_corda(model, config, run_model=lambda: run_some_text(model))


def prepare_loraga(model: PreTrainedModel, config: PeftConfig) -> None:
    def backward() -> None:
        ids = random_ids(4, 24, seed=8)
        model(input_ids=ids, labels=ids).loss.backward()

    preprocess_loraga(model, config, backward)


# Settings that a type needs on a model this small. Of every type that is not named here the defaults are tried.
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "C3A": {"target_modules": TARGETS, "block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "FOURIERFT": {"target_modules": TARGETS, "n_frequency": 8},
    "IA3": {"target_modules": TARGETS, "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "MISS": {"target_modules": TARGETS, "r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"target_modules": TARGETS, "r": 4},
    "P_TUNING": {"num_virtual_tokens": 3},
    "ROAD": {"target_modules": TARGETS, "group_size": 8},
    "SHADOW": {},
    "SHIRA": {"target_modules": TARGETS, "r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [7, 8, 9, 10]},
    "VBLORA": {"target_modules": TARGETS, "vector_length": 8},
    "WAVEFT": {"target_modules": TARGETS, "n_frequency": 8},
}
KINDS = {
    peft_type.value: Kind(config, SETTINGS.get(peft_type.value, {"target_modules": TARGETS}))
    for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if peft_type.value != "XLORA"  # is made of adapters on the disk
}


def lora(below: dict[str, Any] | None = None, prepare: Any = None, **settings: Any) -> Kind:
    return Kind(LoraConfig, {"target_modules": TARGETS, "r": 4, **settings}, below or {}, prepare)


WITH_BIASES = {"attention_bias": True}
TIED = {"tie_word_embeddings": True}
KINDS |= {
    f"init {name}": lora(init_lora_weights=name)
    for name in ("gaussian", "orthogonal", "eva", "mica", "olora", "pissa", "pissa_niter_4")
}
KINDS |= {
    "init corda": lora(prepare=prepare_corda, init_lora_weights="corda", corda_config=CordaConfig()),
    "init lora_ga": lora(prepare=prepare_loraga, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()),
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True),
    "velora": lora(velora_config=VeloraConfig(num_groups=4)),
    "activated LoRA": lora(alora_invocation_tokens=INVOCATION),
    "lora_bias": lora(WITH_BIASES, lora_bias=True),
    "target_parameters": lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "layer_replication": lora(layer_replication=[[0, 2], [1, 2]]),
    "trainable tokens": lora(trainable_token_indices=[1, 2, 3]),
    "modules_to_save": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "modules_to_save, tied": lora(TIED, modules_to_save=["lm_head"]),
    "tied embeddings": lora(TIED, target_modules=[*TARGETS, "embed_tokens", "lm_head"]),
    "bias all": lora(WITH_BIASES, bias="all"),
    "bias lora_only": lora(WITH_BIASES, bias="lora_only"),
    "bias all, none there": lora(bias="all"),
    "bias lora_only, none there": lora(bias="lora_only"),
    "bias lora_only, none in its layers": lora(WITH_BIASES, target_modules=["down_proj"], bias="lora_only"),
    "OFT with biases": Kind(
        PEFT_TYPE_TO_CONFIG_MAPPING["OFT"], {"target_modules": TARGETS, "bias": "oft_only"}, WITH_BIASES
    ),
    "PVERA that samples": Kind(
        PEFT_TYPE_TO_CONFIG_MAPPING["PVERA"], {"target_modules": TARGETS, "sample_at_inference": True}
    ),
}

if KasaConfig is not None:
    KINDS["kasa"] = lora(kasa_config=KasaConfig())

# Those that put tokens, or keys and values, before the text.
VIRTUAL_TOKENS = {"CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
NOT_FOLLOWABLE = {"LILY", "POLY", "PVERA that samples", *VIRTUAL_TOKENS}
ANOTHER_MODEL_BELOW = {
    "OFT with biases",
    "bias all",
    "bias lora_only",
    "init corda",
    "init lora_ga",
    "init olora",
    "init pissa",
    "init pissa_niter_4",
    "kasa",
    "layer_replication",
}


def kind_of(name: str) -> Kind:
    """A kind of adapter; a test of one that the installed peft does not have is skipped."""
    if name not in KINDS:
        pytest.skip(f"peft {PEFT} has no adapter of this kind: {name}")
    if name == "SHADOW":
        skip_if_peft_is_behind()
    return KINDS[name]


def adapted(name: str, seed: int = 3) -> PeftModel:
    """A model with an adapter of a kind, all that peft would train changed at random."""
    kind = kind_of(name)
    below = tiny_model(seed=seed, **kind.below)
    config = kind.config(task_type="CAUSAL_LM", **kind.settings)
    if kind.prepare is not None:
        kind.prepare(below, config)
    torch.manual_seed(0)
    model = get_peft_model(below, config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def invoking_ids(rows: int, length: int, seed: int = 0, at: int = 3) -> torch.Tensor:
    ids = random_ids(rows, length, seed).clamp(min=9)
    for row in range(rows):
        ids[row, at + row : at + row + 2] = torch.tensor(INVOCATION)
    return ids


def accepted(model: PeftModel, *, without_adapter: bool = False) -> bool:
    try:
        check_adapters(model, "proxy", without_adapter=without_adapter)
    except ValueError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter_behind_a_cache_is_refused_or_right(name: str) -> None:
    """As on whole texts: token by token, and in drafts of which every row keeps another part until one leaves."""
    model = adapted(name)
    assert accepted(model) == (name not in NOT_FOLLOWABLE)
    if name in NOT_FOLLOWABLE:
        with pytest.raises(ValueError, match="adapter"):
            KADLogitsProcessor(model)
        return
    ids = invoking_ids(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :2] = 0, 0
    whole = [plain(model, ids[row : row + 1, int((mask[row] == 0).sum()) :], 11)[0] for row in range(3)]
    expected = torch.stack(whole)  # the last 11 positions
    close = {"atol": 2e-4, "rtol": 1e-4}

    tokens = CachedModel(model)
    for length in range(10, 21):
        got = tokens.logits(ids[:, :length], mask[:, :length], continues=length > 10, prompt_length=10)
        torch.testing.assert_close(got[:, 0], expected[:, length - 10], **close)

    drafts = CachedModel(model)
    drafts.logits(ids[:, :10], mask[:, :10], prompt_length=10, chunk_size=3)
    wrong = torch.cat([ids[:, 10:13], random_ids(3, 2, seed=2)], dim=1)
    wrong[1, 1] = 49
    got = drafts.extend(wrong, logits_to_keep=5)
    torch.testing.assert_close(got[0, :3], expected[0, 1:4], **close)
    drafts.take_back([2, 4, 2])
    drafts.select_rows([0, 1])
    got = drafts.extend(torch.stack([ids[0, 13:15], ids[1, 11:13]]), logits_to_keep=2)
    torch.testing.assert_close(got[0], expected[0, 4:6], **close)
    torch.testing.assert_close(got[1], expected[1, 2:4], **close)


def test_loftq_is_known_by_its_configuration() -> None:
    """It needs a quantization library, so that it can't be tried."""
    model = adapted("init gaussian")
    model.peft_config["default"].init_lora_weights = "loftq"
    assert not accepted(model, without_adapter=True)


def test_an_adapter_that_transformers_loaded_is_seen() -> None:
    skip_if_peft_is_behind()  # transformers refuses it
    model = tiny_model(seed=3)
    model.add_adapter(KINDS["LILY"].config(target_modules=TARGETS))
    with pytest.raises(ValueError, match="LILY"):
        KADLogitsProcessor(model)


def test_a_mixture_of_adapters_on_the_disk_is_refused(tmp_path) -> None:
    adapted("LORA").save_pretrained(tmp_path)
    below = tiny_model(seed=3)
    below.config.use_cache = False
    config = PEFT_TYPE_TO_CONFIG_MAPPING["XLORA"](
        task_type="CAUSAL_LM", hidden_size=16, adapters={"0": str(tmp_path), "1": str(tmp_path)}
    )
    with pytest.raises(ValueError, match="XLORA"):
        KADLogitsProcessor(get_peft_model(below, config).eval())


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("name", ["activated LoRA", "SHADOW"])
def test_texts_that_change_at_will_behind_a_cache(name: str, architecture: str) -> None:
    """A walk of growing, shrinking, reordered and other texts, in which the invocation comes, moves and goes."""
    kind = kind_of(name)
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_model(architecture, seed=3), kind.config(task_type="CAUSAL_LM", **kind.settings)
    ).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    cached, ids, reused, found = CachedModel(model), invoking_ids(2, 12), 0, set()
    for step in range(60):
        move = int(torch.randint(0, 5, (), generator=generator))
        if move == 0:
            ids = torch.cat([ids, random_ids(len(ids), 1 + step % 4, seed=step)], dim=1)
        elif move == 1:
            ids = ids[:, : max(6, ids.shape[1] - 3)]
        elif move == 2:
            ids = ids[torch.randint(0, len(ids), (1 + step % 3,), generator=generator)]
        elif move == 3:  # invoked once more in some rows, or at another place
            place = int(torch.randint(0, ids.shape[1] - 1, (), generator=generator))
            ids = ids.clone()
            ids[:: 1 + step % 2, place : place + 2] = torch.tensor(INVOCATION)
        else:
            ids = invoking_ids(1 + step % 3, 10, seed=step, at=step % 5)
        keep, before = 1 + step % 3, cached.cached_length
        got = cached.logits(ids, logits_to_keep=keep)
        torch.testing.assert_close(got, plain(model, ids, keep), atol=5e-4, rtol=5e-4)
        reused += before > 0
        found |= set() if cached._tokens_before_activation is None else set(cached._tokens_before_activation.tolist())
        cached.crop(ids.shape[1] - step % 2)
    assert reused > 20
    assert len(found) > 5 or name == "SHADOW"


GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14, "pad_token_id": 0}
ENDS = list(range(11, 17))


def generated(ids: torch.Tensor, prompt_length: int) -> list[list[int]]:
    """The new tokens of each row, up to its end."""
    rows = []
    for row in ids[:, prompt_length:].tolist():
        ends = [at for at, token in enumerate(row) if token in ENDS]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


def padded_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with the invocation once, twice, and not at all, and one that begins with it."""
    ids = invoking_ids(4, 12)
    ids[1, 9:11] = torch.tensor(INVOCATION)
    ids[2] = ids[2].clamp(min=9)
    ids[3] = ids[3].clamp(min=9)
    ids[3, 2:4] = torch.tensor(INVOCATION)
    mask = torch.ones_like(ids)
    mask[0, :2], mask[3, :2] = 0, 0
    return ids, mask


def needed_by(name: str, rows: int) -> dict[str, torch.Tensor]:
    """What calls of a model with such an adapter must pass."""
    needs_task = name in ("MULTITASK_PROMPT_TUNING", "POLY")
    return {"task_ids": torch.zeros(rows, dtype=torch.long)} if needs_task else {}


@pytest.mark.parametrize("name", sorted(NOT_FOLLOWABLE - {"POLY"}))  # with `task_ids`, POLY verifies drafts
def test_a_base_that_no_draft_can_be_verified_with_is_refused(name: str) -> None:
    if name == "PVERA that samples":
        skip_if_torch_is_old()
    base, kad = adapted(name), KADLogitsProcessor(tiny_model(seed=9))
    settings = {"input_ids": random_ids(1, 6), "logits_processor": [kad], **needed_by(name, 1), **GREEDY}
    base.generate(**settings)
    with pytest.raises(ValueError, match=r"can't verify drafts: leave out `assistant_model`"):
        base.generate(assistant_model=kad.proxy, **settings)


def test_an_adapter_whose_cache_peft_would_lose_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if "SHADOW" not in KINDS:
        pytest.skip(f"peft {PEFT} has no adapter of this kind")
    model = get_peft_model(tiny_model(seed=3), KINDS["SHADOW"].config(task_type="CAUSAL_LM")).eval()
    monkeypatch.setattr(adapters, "PEFT_LOSES_CACHE", True)
    with pytest.raises(ValueError, match=r"of type SHADOW, which needs peft 0\.22 or transformers before 5\.24"):
        KADLogitsProcessor(model)
    monkeypatch.setattr(adapters, "PEFT_LOSES_CACHE", False)
    KADLogitsProcessor(model)


@pytest.mark.parametrize("name", sorted(VIRTUAL_TOKENS))
def test_a_base_with_virtual_tokens_is_right_token_by_token(name: str) -> None:
    """As a computation in which both models read the whole text anew for every token."""
    skip_if_peft_is_behind()
    base, proxy, rule = adapted(name), tiny_model(seed=9), DualDeferral(0.3)
    ids, needed = random_ids(2, 6), needed_by(name, 2)
    text = ids
    for _ in range(GREEDY["max_new_tokens"]):
        whole = {"input_ids": text, "attention_mask": torch.ones_like(text), "use_cache": False}
        with torch.no_grad():
            logits = base(**whole, **needed).logits[:, -1], proxy(**whole).logits[:, -1]
        text = torch.cat([text, rule(*(own.softmax(-1) for own in logits)).argmax(-1, keepdim=True)], dim=1)
    kad = KADLogitsProcessor(proxy, rule)
    assert torch.equal(base.generate(input_ids=ids, logits_processor=[kad], **needed, **GREEDY), text)


def two_adapters(seed: int = 3) -> PeftModel:
    """A model with the adapters `default` and `other`."""
    model = adapted("LORA", seed)
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, init_lora_weights=False))
    return model.eval()


def test_values_by_row_and_rows_that_leave() -> None:
    """`adapter_names` and `task_ids`: right token by token and for one row, refused with drafts in a batch."""
    kad = KADLogitsProcessor(tiny_model(seed=9), DualDeferral(0.3))
    poly = Kind(PEFT_TYPE_TO_CONFIG_MAPPING["POLY"], {"target_modules": TARGETS, "n_tasks": 3})
    KINDS_BY_ROW = {"adapter_names": (two_adapters(), ["other", "default", "__base__"])}
    KINDS["POLY by row"] = poly
    KINDS_BY_ROW["task_ids"] = (adapted("POLY by row"), torch.tensor([2, 0, 1]))
    del KINDS["POLY by row"]
    for name, (base, values) in KINDS_BY_ROW.items():
        ids = random_ids(3, 6)
        settings = {**GREEDY, "logits_processor": [kad], "eos_token_id": ENDS}
        together = generated(base.generate(input_ids=ids, **{name: values}, **settings), 6)
        for assistant in (None, kad.proxy):
            for row in range(3):
                alone = {name: values[row : row + 1], "assistant_model": assistant}
                text = base.generate(input_ids=ids[row : row + 1], **alone, **settings)
                assert generated(text, 6)[0] == together[row]
        plain_call = dict(settings) if name == "adapter_names" else {**settings, name: torch.tensor([0, 0, 0])}
        before = base.generate(input_ids=ids, **plain_call)
        with pytest.raises(ValueError, match=f"{name}.*one sequence at a time"):
            base.generate(input_ids=ids, assistant_model=kad.proxy, **{name: values}, **settings)
        # Nothing of the refused call is left on the model.
        assert torch.equal(base.generate(input_ids=ids, **plain_call), before)


def test_an_interrupted_call_leaves_no_names_of_adapters_behind() -> None:
    """peft removes its hooks only where `generate` ends well."""
    base, kad, ids = two_adapters(), KADLogitsProcessor(tiny_model(seed=9)), random_ids(2, 6)
    settings = {"input_ids": ids, "logits_processor": [kad], **GREEDY}
    before = base.generate(**settings)

    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.generate(adapter_names=["other", "__base__"], stopping_criteria=[interrupt], **settings)
    assert torch.equal(base.generate(**settings), before)


@pytest.mark.parametrize("processors", ["no list", "two", "an unknown argument"])
def test_a_refused_call_leaves_no_names_of_adapters_behind(processors: str) -> None:
    """Whatever refuses it, and however early."""
    base, kad, ids = two_adapters(), KADLogitsProcessor(tiny_model(seed=9)), random_ids(2, 6)
    before = base.generate(input_ids=ids, logits_processor=[kad], **GREEDY)
    given = {"no list": kad, "two": [kad, kad]}.get(processors, [kad])
    settings = {"input_ids": ids, "logits_processor": given, **GREEDY}
    settings |= {"max_new_tokns": 3} if processors == "an unknown argument" else {}
    with pytest.raises((TypeError, ValueError), match=r"must be a list|one KAD processor|not used by the model"):
        base.generate(adapter_names=["other", "__base__"], **settings)
    assert torch.equal(base.generate(input_ids=ids, logits_processor=[kad], **GREEDY), before)


@pytest.mark.parametrize("merged", [["default"], ["default", "other"]])
def test_what_the_user_merged_stays_merged(merged: list[str]) -> None:
    """Of two active adapters one or both are merged: with a reference q stays what it is; else one is asked for."""
    proxy, base = two_adapters(), tiny_model(seed=1)
    proxy.base_model.set_adapter(["default", "other"])
    own = KADLogitsProcessor(proxy, ImplicitReward(0.8))
    proxy.merge_adapter(merged)
    ids = random_ids(1, 6)
    before = plain(proxy, ids)
    with pytest.raises(ValueError, match=r"merge_adapter\(\) put .*default.* into the weights.*reference="):
        KADLogitsProcessor(proxy, ImplicitReward(0.8))
    settings = {"input_ids": ids, **GREEDY}
    for assistant in (None, proxy):
        with pytest.raises(ValueError, match="merge_adapter"):  # merged since the processor was built
            base.generate(logits_processor=[own], assistant_model=assistant, **settings)
        for rule, reference in ((ImplicitReward(0.8), tiny_model(seed=3)), (DualDeferral(0.3), None)):
            kad = KADLogitsProcessor(proxy, rule, reference=reference)
            base.generate(logits_processor=[kad], assistant_model=assistant, **settings)
            torch.testing.assert_close(plain(proxy, ids), before, atol=0, rtol=0)
            assert {tuple(sorted(layer.merged_adapters)) for layer in lora_layers(proxy)} == {tuple(sorted(merged))}
    proxy.unmerge_adapter()
    base.generate(logits_processor=[own], **settings)


def lora_layers(model: PeftModel) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]
