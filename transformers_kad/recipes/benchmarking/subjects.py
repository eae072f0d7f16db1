"""The models that are timed, and their prompts."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...configuration import KADConfig
from ...integrations.loading.devices import pick_device
from ...integrations.loading.models import clear_generation_config
from ...integrations.loading.prompts import Prompt, encode
from ...integrations.loading.reading import NO_CODE, load_architecture
from ...logits_process import KADLogitsProcessor
from ...models.offloading import execution_device
from ...models.text_reader import tempered
from ...rules.registry import RULES
from ...utils.sources import check_source
from ..arguments import ModelArguments
from ..evaluation.decoding import as_text
from ..pair import Pair
from ..word_problems import make_problems
from .inflate import inflate


@dataclass(frozen=True)
class Subject:
    """The base and the proxy that are timed, with empty generation configurations.

    Attributes:
        base: the base.
        proxy: the proxy.
        pad_token_id: the id that shorter prompts are padded with.
        tokenizer: the base's tokenizer; None for random weights, whose prompts are random tokens.
        pair: the loaded pair; None for random weights.
    """

    base: PreTrainedModel
    proxy: PreTrainedModel
    pad_token_id: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None
    pair: Pair | None = None

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """Both models by name."""
        return {"base": self.base, "proxy": self.proxy}

    @property
    def device(self) -> torch.device:
        """The device that the base computes on."""
        return execution_device(self.base)

    @property
    def vocabulary(self) -> int:
        """The number of ids that both models have."""
        return min(model.get_input_embeddings().weight.shape[0] for model in self.models.values())

    def processor(self, config: KADConfig, **options: Any) -> KADLogitsProcessor:
        """A processor with the settings of a configuration and further arguments of the constructor."""
        reference = self.pair.reference if self.pair is not None and RULES[config.rule].needs_reference else None
        alignment = None if self.pair is None else self.pair.alignment
        return KADLogitsProcessor(
            self.proxy,
            config.make_rule(),
            reference=reference,
            component_temperature=config.component_temperature,
            vocabulary_alignment=alignment,
            **{"verification": config.verification, **options},
        )


def load_subject(
    models: ModelArguments, *, random_weights: Mapping[str, str], inflated: Mapping[str, int], seed: int = 0
) -> Subject:
    """Load the models of a command line.

    Args:
        models: the models and their device.
        random_weights: the Hub id, folder or file with the configurations of base and proxy, to use random weights;
            empty to load `models`.
        inflated: for each model, the number of parameters that it is inflated to.
        seed: seed of the random weights.
    """
    if random_weights:
        device, dtype = pick_device(models.device), models.dtype
        torch.manual_seed(seed)
        base, proxy = (
            random_model(load_architecture(check_source(random_weights[name])), device=device, dtype=dtype)
            for name in ("base", "proxy")
        )
        subject = Subject(base, proxy)
    else:
        pair = Pair(models)
        clear_generation_config(pair.proxy)
        subject = Subject(pair.base, pair.proxy, pair.pad_token_id or 0, pair.tokenizer, pair)
    for name, parameters in inflated.items():
        inflate(subject.models[name], parameters)
    return subject


def random_model(
    config: PreTrainedConfig, *, device: torch.device | str, dtype: str = "auto", **changes: Any
) -> PreTrainedModel:
    """A model with random weights, created on its device.

    Args:
        config: the architecture.
        device: the device.
        dtype: dtype of the weights; "auto" for that of the configuration, or else float32.
        **changes: changed settings of the configuration, such as `vocab_size`.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    for name, value in {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changes}.items():
        setattr(text, name, value)
    wanted = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, **NO_CODE).eval()
    clear_generation_config(model)
    return model.requires_grad_(False)


def _arithmetic(count: int, seed: int) -> list[Prompt]:
    return [[{"role": "user", "content": problem.question}] for problem in make_problems("test", count, seed)]


def _copying(count: int, seed: int) -> list[Prompt]:
    return [
        [
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": problem.solution},
            {"role": "user", "content": problem.question},
        ]
        for problem in make_problems("test", count, seed)
    ]


@dataclass(frozen=True)
class SpeedTask:
    """The prompts of a benchmark.

    Attributes:
        prompts: `(count, seed) -> chats`.
        max_new_tokens: the number of new tokens, for which the tiny pair's answers keep their style.
        help: a description.
    """

    prompts: Callable[[int, int], Sequence[Prompt]]
    max_new_tokens: int
    help: str


TASKS = {
    "arithmetic": SpeedTask(_arithmetic, 96, "word problems"),
    "copying": SpeedTask(_copying, 24, "word problems that were solved before in the same chat"),
}


def make_inputs(subject: Subject, task: str, rows: int, seed: int, prompt_tokens: int) -> dict[str, torch.Tensor]:
    """Make prompts as model inputs `(rows, L)`, padded on the left.

    Without a tokenizer each prompt has `prompt_tokens` random tokens, whatever the task.
    """
    if subject.tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(subject.vocabulary, (rows, prompt_tokens), generator=generator).to(subject.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    prompts = TASKS[task].prompts(rows, seed)
    if subject.tokenizer.chat_template is None:
        prompts = [as_text(prompt) for prompt in prompts]
    inputs = encode(subject.tokenizer, prompts, str(subject.device))
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def threshold_that_defers(base: PreTrainedModel, mass: float, *, tokens: int = 64, temperature: float = 1.0) -> float:
    """The threshold of the dual rule that gives a base a certain mean deferral mass on a random text.

    For random weights a threshold has no meaning of its own. This function determines their acceptance rate, which is
    at least the deferral mass.

    Args:
        base: the base.
        mass: the mean of D over the positions.
        tokens: length of the text.
        temperature: `component_temperature`.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.get_input_embeddings().weight.shape[0], (1, tokens), generator=generator)
    with torch.no_grad():
        logits = base(input_ids=ids.to(execution_device(base))).logits[0].float()
    probs = tempered(logits, temperature).softmax(-1)
    values = probs.flatten().sort().values
    place = int(torch.searchsorted(values.cpu().double().cumsum(0), mass * len(probs)))
    return float(values[min(place, len(values) - 1)])
