"""Models and tokenizers from a Hub id or a folder, whether it holds a whole model or an adapter."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file


def below_adapter(path: str | Path) -> str | None:
    """The id or folder of the model that an adapter belongs to; None if `path` is a whole model.

    The adapter may name it relative to its own folder.
    """
    if find_adapter_config_file(str(path)) is None:
        return None
    name = str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path)
    beside = Path(path) / name
    return str(beside.resolve()) if beside.is_dir() else name


def load_model(
    path: str | Path, *, device: str = "cpu", dtype: str = "auto", merge: bool = True, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """A causal LM in evaluation mode, its adapter included.

    Args:
        path: Hub id or folder of a model or of an adapter, which is put on the model that it names.
        device: where the model goes, unless `device_map` says so.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        merge: merge the adapter into the weights, since it costs at every step otherwise. Without it the result is
            a `PeftModel`.
        **kwargs: for `AutoModelForCausalLM.from_pretrained`: `device_map`, `quantization_config` and so on.
    """
    below = below_adapter(path)
    if below is None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **kwargs)
        return (model if kwargs.get("device_map") else model.to(device)).eval()
    adapted = PeftModel.from_pretrained(load_model(below, device=device, dtype=dtype, **kwargs), str(path))
    return (adapted.merge_and_unload() if merge else adapted).eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or an adapter, padding on the left. Adapters that have none use their model's.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, padding_side="left")
    except (OSError, ValueError) as error:
        below = below_adapter(path)
        if below is None:
            raise ValueError(f"No tokenizer could be loaded from {str(path)!r}: {error}") from error
        return AutoTokenizer.from_pretrained(below, padding_side="left")
