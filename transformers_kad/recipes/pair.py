"""A base and a proxy that are loaded together, ready for `generate`."""

import sys
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration import KADConfig
from ..integrations.loading.devices import pick_device, quantization_config
from ..integrations.loading.models import below_adapter, clear_generation_config, load_model, load_tokenizer
from ..integrations.loading.prompts import eos_token_ids, pad_token_id
from ..logits_process import KADLogitsProcessor
from ..models.vocabulary import align_vocabularies, check_tokenizers
from ..rules.registry import RULES
from .arguments import ModelArguments


class Pair:
    """A loaded base and proxy, with the tokenizers and token ids that a call of `generate` needs.

    Args:
        models: which models, and the devices they run on; `base` and `proxy` must be given.
        merge_proxy: merge the proxy's adapter into its weights. An adapter that is not merged costs time at every
            step.

    Attributes:
        base: the base, in evaluation mode. Its `generation_config` is emptied, so that no penalties, beams or minimal
            lengths of the model's own come into effect.
        proxy: the proxy.
        tokenizer: the base's tokenizer; it gets the proxy's chat template if it has none of its own.
        proxy_tokenizer: the proxy's tokenizer.
        alignment: the `VocabularyAlignment` of both, or None if they share one vocabulary.
        device: the device of the inputs.
        eos_token_ids: every id of the base's vocabulary that ends a turn of either model, or None.
        proxy_eos_token_ids: the ids of the proxy's vocabulary that end its turns.
        pad_token_id: the id that finished rows are padded with; None if the tokenizer has no token for that.

    Raises:
        ValueError: the tokenizers differ, and `align_vocabularies` is not set.
    """

    def __init__(self, models: ModelArguments, *, merge_proxy: bool = True) -> None:
        assert models.base is not None and models.proxy is not None
        self.models = models
        self.device = pick_device(models.device)
        self.tokenizer, self.proxy_tokenizer = load_tokenizer(models.base), load_tokenizer(models.proxy)
        self.alignment = None
        if models.align_vocabularies:
            self.alignment = align_vocabularies(self.tokenizer, self.proxy_tokenizer)
            print(self.alignment.report, file=sys.stderr)
        else:
            try:
                check_tokenizers(self.tokenizer, self.proxy_tokenizer)
            except ValueError as error:
                raise ValueError(f"{error} On the command line: --align_vocabularies.") from error
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = self.proxy_tokenizer.chat_template
        self.base = self.load_large(models.base)
        self.proxy = self._load(models.proxy, merge=merge_proxy)
        ends = set(eos_token_ids(self.base)) | {self.tokenizer.eos_token_id}
        self.proxy_eos_token_ids = sorted({*eos_token_ids(self.proxy), self.proxy_tokenizer.eos_token_id} - {None})
        for end in self.proxy_eos_token_ids:
            ends.add(end if self.alignment is None else self.alignment.base_id(end))
        self.eos_token_ids = sorted(ends - {None}) or None
        self.pad_token_id = pad_token_id(self.tokenizer)
        clear_generation_config(self.base)

    def _load(self, path: str, **kwargs: Any) -> PreTrainedModel:
        return load_model(path, device=self.device, dtype=self.models.dtype, **kwargs)

    def load_large(self, path: str) -> PreTrainedModel:
        """See :func:`load_large`."""
        return load_large(self.models, path, self.device)

    @cached_property
    def reference(self) -> PreTrainedModel | None:
        """The proxy before alignment, loaded at the first access.

        It is None if the proxy has an adapter that can be switched off, or if the unaligned proxy is not known.
        """
        if self.models.reference is not None:
            return self._load(self.models.reference)
        below = below_adapter(str(self.models.proxy))
        merged = not hasattr(self.proxy, "peft_config")
        return self._load(below) if below is not None and merged else None

    def processor(self, config: KADConfig, *, trace: bool = False) -> KADLogitsProcessor:
        """A processor for this pair with the settings of a configuration."""
        return KADLogitsProcessor.from_config(
            self.proxy,
            config,
            reference=self.reference if RULES[config.rule].needs_reference else None,
            trace=trace,
            tokenizer=self.tokenizer,
            proxy_tokenizer=self.proxy_tokenizer,
            vocabulary_alignment=self.alignment,
        )


def load_large(models: ModelArguments, path: str, device: str) -> PreTrainedModel:
    """Load a model as large as the base: with its dtype, distributed over devices and quantized like the base."""
    spread = {**device_spread(models), "quantization_config": quantization_config(models.quantization)}
    merge = models.quantization is None and models.device_map is None
    given = {name: value for name, value in spread.items() if value is not None}
    return load_model(path, device=device, dtype=models.dtype, merge=merge, **given)


def device_spread(models: ModelArguments) -> dict[str, Any]:
    """The arguments of `from_pretrained` that distribute a large model over devices; None for those not given."""
    limits = {int(k) if k.isdigit() else k: v for k, v in (models.limits or {}).items()} or None
    if limits is None and models.gpus is not None and isinstance(models.spread, str):
        limits = {gpu: free_memory(gpu) for gpu in models.gpus}
    return {"device_map": models.spread, "max_memory": limits, "offload_folder": models.offload_folder}


def free_memory(gpu: int) -> int:
    """The memory of a GPU that a model may use, in bytes. A tenth is left free for caches and activations."""
    return int(torch.cuda.mem_get_info(gpu)[0] * 0.9)
