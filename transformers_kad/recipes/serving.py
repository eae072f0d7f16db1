"""What the recipe that serves does: load a pair, build the application, and run it."""

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from transformers import GenerationConfig

from ..configuration import KADConfig
from ..integrations.loading.prompts import PLAIN_SAMPLING
from ..integrations.serving import build_app
from ..logits_process import KADLogitsProcessor
from ..rules.registry import RULES
from ..utils.sources import shown_name
from .arguments import ModelArguments
from .pair import Pair


def make_app(models: ModelArguments, config: KADConfig, *, name: str | None = None, **settings: Any) -> FastAPI:
    """Load a pair, and build the application that serves it.

    Requests are sampled from the target as it is, unless they say otherwise.

    Args:
        models: base and proxy must be given.
        config: the settings of requests that name none.
        name: the model that clients ask for; None for the base's Hub id, or the name of its folder.
        **settings: further arguments of `build_app`.
    """
    assert models.base is not None
    needs_reference = RULES[config.rule].needs_reference
    pair = Pair(models, merge_proxy=not needs_reference or models.reference is not None)
    pair.base.generation_config = GenerationConfig(
        **PLAIN_SAMPLING, eos_token_id=pair.eos_token_ids, pad_token_id=pair.pad_token_id
    )

    def make_processor(asked: KADConfig) -> KADLogitsProcessor:
        if RULES[asked.rule].needs_reference and not needs_reference and models.reference is None:
            raise ValueError(
                f"The rule {asked.rule!r} needs the proxy before alignment, which this server has not loaded. It is "
                "to be started with --reference, or with this rule."
            )
        return pair.processor(asked)

    if models.reference is not None:
        assert pair.reference is not None  # loaded now, not within a request
    name = shown_name(models.base) if name is None else name
    return build_app(pair.base, pair.tokenizer, config, make_processor, name=name, **settings)


def serve(models: ModelArguments, config: KADConfig, *, host: str, port: int, **settings: Any) -> None:
    """Serve a pair until the process is interrupted. `settings` are those of `make_app`."""
    app = make_app(models, config, **settings)
    print(f"Rule: {config.make_rule()!r}. Stop with Ctrl+C.", file=sys.stderr)
    uvicorn.run(app, host=host, port=port, log_level="info")
