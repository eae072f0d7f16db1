"""Base and proxy together, loaded for `generate`."""

import sys
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration import KADConfig
from ..integrations.loading.arguments import ModelArguments
from ..integrations.loading.devices import pick_device, quantization_config
from ..integrations.loading.models import below_adapter, forget_generation_settings, load_model, load_tokenizer
from ..integrations.loading.prompts import eos_token_ids, pad_token_id
from ..logits_process import KADLogitsProcessor
from ..models.vocabulary import align_vocabularies, check_tokenizers
from ..rules.composition import RULES


class Pair:
    """Base and proxy, loaded, with what a call of `generate` needs to know of both.

    Args:
        models: which, and where; `base` and `proxy` are given.
        merge_proxy: merge the proxy's adapter into its weights, since it costs at every step otherwise.

    Attributes:
        base: the base, in evaluation mode. Its own `generation_config` is emptied: penalties, beams and minimal
            lengths that a model brings along are not the caller's.
        proxy: the proxy.
        tokenizer: the base's tokenizer, with the proxy's chat template if it has none of its own.
        proxy_tokenizer: the proxy's tokenizer.
        alignment: the `VocabularyAlignment` of both, None where their vocabularies are one.
        device: where inputs go.
        eos_token_ids: every id of the base's vocabulary that ends a turn of either model, or None.
        proxy_eos_token_ids: the ids of the proxy's vocabulary that end its turns.
        pad_token_id: what finished rows are filled with; None where the tokenizer has nothing to pad with.

    Raises:
        ValueError: tokenizers that differ, without `align_vocabularies`.
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
        forget_generation_settings(self.base)

    def _load(self, path: str, **kwargs: Any) -> PreTrainedModel:
        return load_model(path, device=self.device, dtype=self.models.dtype, **kwargs)

    def load_large(self, path: str) -> PreTrainedModel:
        """A model as large as the base: spread over devices and quantized as the base is."""
        models = self.models
        limits = {int(k) if k.isdigit() else k: v for k, v in (models.limits or {}).items()} or None
        if limits is None and models.gpus is not None and isinstance(models.spread, str):
            limits = {gpu: free_memory(gpu) for gpu in models.gpus}
        spread = {
            "device_map": models.spread,
            "max_memory": limits,
            "offload_folder": models.offload_folder,
            "quantization_config": quantization_config(models.quantization),
        }
        merge = models.quantization is None and models.device_map is None
        return self._load(path, merge=merge, **{name: value for name, value in spread.items() if value is not None})

    @cached_property
    def reference(self) -> PreTrainedModel | None:
        """The proxy before alignment, loaded when it is first asked for.

        None for a proxy with an adapter that can be switched off, and where nothing is known of it.
        """
        if self.models.reference is not None:
            return self._load(self.models.reference)
        below = below_adapter(str(self.models.proxy))
        merged = not hasattr(self.proxy, "peft_config")
        return self._load(below) if below is not None and merged else None

    def processor(self, config: KADConfig, *, trace: bool = False) -> KADLogitsProcessor:
        """A processor over the pair with the settings of a config."""
        return KADLogitsProcessor.from_config(
            self.proxy,
            config,
            reference=self.reference if RULES[config.rule].needs_reference else None,
            trace=trace,
            tokenizer=self.tokenizer,
            proxy_tokenizer=self.proxy_tokenizer,
            vocabulary_alignment=self.alignment,
        )


def free_memory(gpu: int) -> int:
    """What a model may take of a GPU, in bytes; a tenth of what is free is left for caches and activations."""
    return int(torch.cuda.mem_get_info(gpu)[0] * 0.9)
