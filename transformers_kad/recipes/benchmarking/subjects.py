"""The models that are timed, and what they are asked."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...configuration import KADConfig
from ...integrations.loading.arguments import ModelArguments
from ...integrations.loading.devices import pick_device
from ...integrations.loading.models import forget_generation_settings
from ...integrations.loading.prompts import Prompt, encode
from ...logits_process import KADLogitsProcessor
from ...rules.composition import RULES
from ...utils.sources import check_source
from ..evaluation.decoding import as_text
from ..pair import Pair
from ..word_problems import make_problems
from .inflate import inflate


@dataclass(frozen=True)
class Subject:
    """Base and proxy, with no generation settings of their own.

    Attributes:
        base: the base.
        proxy: the proxy.
        pad_token_id: what shorter prompts are filled up with.
        tokenizer: the base's; None for random weights, which are asked random tokens.
        pair: where the models come from, if they have weights.
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
        """Where the base is."""
        return self.base.device

    @property
    def vocabulary(self) -> int:
        """How many ids both models have."""
        return min(model.get_input_embeddings().weight.shape[0] for model in self.models.values())

    def processor(self, config: KADConfig, **options: Any) -> KADLogitsProcessor:
        """A processor with the settings of a config and further arguments of the constructor."""
        reference = self.pair.reference if self.pair is not None and RULES[config.rule].needs_reference else None
        alignment = None if self.pair is None else self.pair.alignment
        return KADLogitsProcessor(
            self.proxy,
            config.make_rule(),
            reference=reference,
            component_temperature=config.component_temperature,
            vocabulary_alignment=alignment,
            **options,
        )


def load_subject(
    models: ModelArguments, *, random_weights: Mapping[str, str], inflated: Mapping[str, int], seed: int = 0
) -> Subject:
    """The models of a command line.

    Args:
        models: which, and where they run.
        random_weights: for base and proxy a Hub id, a folder or a file with a configuration; the weights are random
            then. Empty: those of `models`.
        inflated: by model, how many parameters it is to be inflated to.
        seed: of random weights.
    """
    if random_weights:
        device, dtype = pick_device(models.device), models.dtype
        torch.manual_seed(seed)
        base, proxy = (
            random_model(AutoConfig.from_pretrained(check_source(random_weights[name])), device=device, dtype=dtype)
            for name in ("base", "proxy")
        )
        subject = Subject(base, proxy)
    else:
        pair = Pair(models)
        forget_generation_settings(pair.proxy)
        subject = Subject(pair.base, pair.proxy, pair.pad_token_id or 0, pair.tokenizer, pair)
    for name, parameters in inflated.items():
        inflate(subject.models[name], parameters)
    return subject


def random_model(
    config: PreTrainedConfig, *, device: torch.device | str, dtype: str = "auto", **changes: Any
) -> PreTrainedModel:
    """A model of an architecture with random weights, made where it is to run.

    Args:
        config: the architecture.
        device: where.
        dtype: of the weights; "auto": the configuration's, else float32.
        **changes: what is to differ from the configuration, such as `vocab_size`.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    for name, value in {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changes}.items():
        setattr(text, name, value)
    wanted = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted).eval()
    forget_generation_settings(model)
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
    """What the models are asked.

    Attributes:
        prompts: so many chats, drawn with a seed.
        max_new_tokens: as many tokens as the tiny pair's answers keep their style for.
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
    """Prompts as model inputs `(rows, L)`, padded on the left.

    Models without a tokenizer are asked `prompt_tokens` random tokens each, whatever the task.
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
    """The dual rule's threshold with which a base defers a share of the probability of a random text, on average.

    Random weights know nothing, so that a threshold says nothing about them: this sets their acceptance, which is at
    least the deferral mass.

    Args:
        base: the base.
        mass: wanted mean of D over the positions.
        tokens: length of the text.
        temperature: `component_temperature`.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.get_input_embeddings().weight.shape[0], (1, tokens), generator=generator)
    with torch.no_grad():
        probs = (base(input_ids=ids.to(base.device)).logits[0].float() / temperature).softmax(-1)
    values = probs.flatten().sort().values
    place = int(torch.searchsorted(values.double().cumsum(0), mass * len(probs)))
    return float(values[min(place, len(values) - 1)])
