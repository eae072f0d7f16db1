"""Knapsack approximation deferral (KAD) as a custom generation method of the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformers_kad import KADConfig, KADLogitsProcessor


def generate(
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None = None,
    kad_config: KADConfig | Mapping[str, Any] | str | Path | None = None,
    speculative: bool = True,
    logits_processor: list[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs: Any,
) -> Any:
    """Generate with a base that is guided by an aligned proxy. Returns the same as `model.generate`.

    Args:
        model: the base, which `generate` passes.
        assistant_model: the aligned proxy, a causal LM or a `PeftModel`.
        kad_config: a `KADConfig`, a mapping of its fields, or a folder or Hub repo with a `kad_config.json`.
            Default: the dual rule with its default threshold.
        speculative: let the proxy draft, also for batches. Beam search needs False.
        logits_processor: processors that are applied to the base's scores before KAD.
        tokenizer: the base's tokenizer, for `stop_strings`.
        assistant_tokenizer: the proxy's tokenizer. If both tokenizers are given, their token ids are compared.
        **kwargs: all other arguments of `generate`.

    Raises:
        ValueError: there is no `assistant_model`, or `KADLogitsProcessor` or `generate` refuses the arguments.
    """
    if assistant_model is None:
        raise ValueError("KAD needs an aligned proxy: pass `assistant_model=proxy`.")
    if kad_config is None:
        config = KADConfig()
    elif isinstance(kad_config, str | Path):
        config = KADConfig.from_pretrained(kad_config)
    else:
        config = kad_config if isinstance(kad_config, KADConfig) else KADConfig(**kad_config)
    compared = {} if assistant_tokenizer is None else {"tokenizer": tokenizer, "proxy_tokenizer": assistant_tokenizer}
    kad = KADLogitsProcessor.from_config(assistant_model, config, **compared)
    if speculative and kwargs.get("num_beams", 1) > 1:
        raise ValueError(f"Beams are not drafted, got num_beams={kwargs['num_beams']}: pass `speculative=False`.")
    return model.generate(
        logits_processor=[*(logits_processor or []), kad],
        assistant_model=assistant_model if speculative else None,
        tokenizer=tokenizer,
        **kwargs,
    )
