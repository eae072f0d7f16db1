"""Loads models and tokenizers from a Hub id or folder, which may hold a whole model or an adapter."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from ...models.adapters import model_below
from ...models.model_settings import text_setting
from ...utils.sources import check_source, resolve_name
from .merging import merge_and_compare, reason_not_to_merge, trained_tokens
from .reading import NO_CODE, NO_PICKLE, PICKLE_ADVICE, check_adapter_weights, check_generation_config, readable


def below_adapter(path: str | Path) -> str | None:
    """The Hub id or folder of the model that an adapter was trained on; None if `path` is a whole model.

    The adapter may name the model relative to its own folder.

    Raises:
        FileNotFoundError: there is no folder `path`, or the folder that the adapter names does not exist.
        ValueError: the adapter does not name a model, or its configuration can't be read.
    """
    with readable(path):
        if find_adapter_config_file(check_source(path)) is None:
            return None
        named = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    if not isinstance(named, str) or not named:
        raise ValueError(
            f"The adapter {str(path)!r} does not say which model it belongs to: write the model's Hub id or folder "
            "into its adapter_config.json as `base_model_name_or_path`."
        )
    try:
        return check_source(resolve_name(named, path))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Folder not found: {named!r}, to which the adapter {str(path)!r} belongs. It was looked for beside the "
            f"adapter and in {os.getcwd()!r}. Correct `base_model_name_or_path` in its adapter_config.json."
        ) from error


def load_model(
    path: str | Path, *, device: str = "cpu", dtype: str = "auto", merge: bool = True, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """Load a causal language model in evaluation mode, with its adapter if it has one.

    An adapter is merged only if the merged model computes the same as before: not into a quantized model, not if it
    acts on embeddings that input and output share, not if peft can't merge it, and not if the logits of a short text
    change by more than rounding. In these cases the result is a `PeftModel`, and a warning names the reason.

    An adapter that was trained after tokens had been added contains their embeddings. The embeddings of the model
    below it are resized accordingly.

    Args:
        path: Hub id or folder of a model, or of an adapter, which is loaded on top of the model that it names.
        device: the device of the model, unless `device_map` is given.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        merge: merge the adapter into the weights. An adapter that is not merged costs time at every step; False always
            gives a `PeftModel`.
        **kwargs: for `AutoModelForCausalLM.from_pretrained`: `device_map`, `quantization_config` and so on. Code of
            the model is run only with `trust_remote_code=True`, and weights that are no safetensors are read only
            with `use_safetensors=None`.

    Raises:
        FileNotFoundError: `path` looks like a path, and there is no such folder.
        OSError: there are no weights in the format safetensors, or no model at all.
        ValueError: the adapter was trained on top of another one that can't be merged, or with more tokens whose
            embeddings it does not contain; files are damaged; weights are missing; or the model needs code of its own.
    """
    model, reason = _load(path, merge=merge, device=device, dtype=dtype, **kwargs)
    if reason is not None:
        warnings.warn(
            f"The adapter {str(path)!r} is not merged into its model: {reason}. It is used unmerged, which is slower.",
            stacklevel=2,
        )
    return model


def load_merged(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model without any adapter, so that another adapter can be trained on it.

    Args:
        path: Hub id or folder of a model or of an adapter.
        **kwargs: as for `load_model`.

    Raises:
        ValueError: the adapter can't be merged; the message names the reason.
        FileNotFoundError: as for `load_model`.
    """
    model, reason = _load(path, merge=True, **kwargs)
    if reason is not None:
        raise ValueError(
            f"Another adapter needs weights without an adapter, but the adapter {str(path)!r} can't be merged into "
            f"its model: {reason}."
        )
    return model


def load_tokenizer(path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or an adapter, with padding on the left.

    An adapter without a tokenizer uses that of its model. `kwargs` are arguments of `AutoTokenizer.from_pretrained`;
    code of the model is run only with `trust_remote_code=True`.

    Raises:
        ValueError: there is no tokenizer.
        FileNotFoundError: `path` looks like a path, and there is no such folder.
    """
    source = check_source(path)
    kwargs = {**NO_CODE, "padding_side": "left", **kwargs}
    try:
        with readable(path):
            return AutoTokenizer.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        below = below_adapter(path)
        if below is None:
            raise ValueError(f"No tokenizer could be loaded from {str(path)!r}: {error}") from error
        with readable(below):
            return AutoTokenizer.from_pretrained(below, **kwargs)


def _load(
    path: str | Path, *, merge: bool, device: str = "cpu", dtype: str = "auto", **kwargs: Any
) -> tuple[Any, str | None]:
    """Load a model. The second value is the reason why its adapter was not merged; None if it was or need not be."""
    below = below_adapter(path)
    if below is None:
        model = _load_whole(path, dtype=dtype, **kwargs)
        return (model if kwargs.get("device_map") else model.to(device)).eval(), None

    def load_adapted() -> PeftModel:
        return _put_adapter(load_merged(below, device=device, dtype=dtype, **kwargs), str(path)).eval()

    adapted = load_adapted()
    if not merge:
        return adapted, None
    reason = reason_not_to_merge(adapted)
    if reason is None:
        merged, reason = merge_and_compare(adapted)
        if reason is None:
            return merged, None
        del merged, adapted
        adapted = load_adapted()
    return adapted, reason


def _load_whole(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model that is no adapter.

    Raises:
        OSError: it is neither a folder with a model nor on the Hub, or has no weights in the format safetensors.
        ValueError: its files are damaged, or weights are missing.
    """
    kwargs = {**NO_CODE, **NO_PICKLE, **kwargs}
    check_generation_config(path)
    try:
        with readable(path):
            model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    except OSError as error:
        if Path(path).is_dir():
            advice = "" if any(Path(path).glob("*.safetensors")) else f" {PICKLE_ADVICE}"
            raise OSError(f"{error}{advice}") from error
        raise OSError(f"{str(path)!r} is not a folder, and could not be loaded from the Hub: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"Weights of {str(path)!r} have other shapes than its configuration says. Copy or download the model "
            "again."
        ) from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(
            f"{len(missing)} weights of {str(path)!r} are missing, {missing[0]!r} for example, and would be random. "
            "Copy or download the model again."
        )
    return model


def _put_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """Load the adapter in `path` on top of a model, after resizing the model's embeddings to those of the adapter.

    Raises:
        ValueError: the adapter was trained on a model of another shape, or its weights are damaged or missing.
    """
    check_adapter_weights(path)
    rows = _rows_of_adapter(model, path)
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter's rows take the place of all new ones
    try:
        with readable(path), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, path)
    except UserWarning as error:
        raise ValueError(
            f"Weights of the adapter {path!r} are missing, and would be random. Copy or download it again. "
            f"({error!s:.300})"
        ) from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"The adapter {path!r} was trained on a model of another shape than {model.name_or_path!r}, to which it "
            f"says it belongs: {error}"
        ) from error


def _rows_of_adapter(model: PreTrainedModel, path: str) -> int:
    """The number of tokens that a model needs embeddings for, so that an adapter fits.

    Raises:
        ValueError: the model has another number, and the adapter does not contain all of the missing embeddings.
    """
    with readable(path):
        config, weights = PeftConfig.from_pretrained(path), load_peft_weights(path, device="cpu")
    ends = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    names = {end: name for end, module in ends.items() for name, other in model.named_modules() if other is module}
    present = ends["input"].weight.shape[0]
    whole = {
        end: weight.shape[0]
        for key, weight in weights.items()
        for end, name in names.items()
        if re.fullmatch(rf"base_model\.model\.{re.escape(name)}\.((token_adapter\.)?base_layer\.)?weight", key)
    }
    trained = trained_tokens(config)
    last = max((token for tokens in trained.values() for token in tokens), default=-1)
    rows = max(whole.values(), default=max(present, last + 1))
    new = set(range(present, rows))
    brought = set(whole)
    for module, tokens in trained.items():
        if new <= set(tokens):
            brought |= {end for end, name in names.items() if name.endswith(module or names["input"])}
    # Input embeddings that are trained as a whole are a copy, which the output layer does not share.
    copied = names["input"].split(".")[-1] in (getattr(config, "modules_to_save", None) or ())
    if brought and text_setting(model.config, "tie_word_embeddings") and not copied:
        brought = set(names)
    if rows != present and brought != set(names):
        lacking = [name for end, name in names.items() if end not in brought]
        raise ValueError(
            f"The adapter {path!r} was trained with {rows} tokens, the model {model.name_or_path!r}, to which it says "
            f"it belongs, has {present}, and the adapter does not contain the embeddings of the others in "
            f"{', '.join(lacking)}. Save the model that it was trained on, embeddings resized, and name it in "
            "adapter_config.json as `base_model_name_or_path`."
        )
    return rows


def clear_generation_config(model: PreTrainedModel) -> None:
    """Replace a model's `generation_config`, or that of the model below an adapter, with an empty one."""
    model_below(model).generation_config = GenerationConfig()
