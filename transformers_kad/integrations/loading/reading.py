"""How files of models are read: without running code from them, and with one kind of error if they are damaged."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from ...utils.strict_json import parse_json_object

# Arguments of `from_pretrained`. Without the first, transformers asks on standard input whether code of the model may
# run, and takes a prompt that lies there for the answer.
NO_CODE: Mapping[str, Any] = MappingProxyType({"trust_remote_code": False})
# Other weights than safetensors are pickles, whose loading can run code.
NO_PICKLE: Mapping[str, Any] = MappingProxyType({"use_safetensors": True})
PICKLE_ADVICE = (
    "Weights in other formats are not read, since they can hold code: load them where you trust them, and save them "
    "again with `save_pretrained`."
)
# What transformers, peft and safetensors raise on truncated files and on files of another layout.
DAMAGES = (
    *(SafetensorError, StrictDataclassError, JSONDecodeError, UnicodeDecodeError),
    *(AttributeError, LookupError, TypeError),
)


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn the errors that damaged or unsafe files of a model raise into a `ValueError` that names the model.

    Args:
        path: Hub id or folder of the model.

    Raises:
        ValueError: a file is truncated or does not have the structure that transformers or peft expects, or the model
            needs code of its own.
    """
    try:
        yield
    except DAMAGES as error:
        raise ValueError(
            f"The files of {str(path)!r} can't be read, one of them is damaged or has another layout: {error!r:.500}. "
            "Copy or download the model again."
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{str(path)!r} needs Python code that lies in its folder or repo. No recipe runs it. If you trust that "
            "code, load the model in Python: load_model(..., trust_remote_code=True)."
        ) from error


def load_architecture(path: str | Path) -> PreTrainedConfig:
    """The configuration of a model, which is no adapter. Raises as `AutoConfig.from_pretrained` and `readable`."""
    with readable(path):
        return AutoConfig.from_pretrained(path, **NO_CODE)


def check_generation_config(path: str | Path) -> None:
    """Check the `generation_config.json` in the folder of a model, if there is one.

    transformers passes over a file that is not JSON. A model whose ends of a turn are only there would not stop.

    Raises:
        ValueError: it is not a JSON object, or its `eos_token_id` is neither an id nor a list of ids.
    """
    file = Path(path) / GENERATION_CONFIG_NAME
    if not file.is_file():
        return
    try:
        ends = parse_json_object(file.read_bytes()).get("eos_token_id")
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not a JSON object: {error}.") from error
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [] if ends is None else [ends])):
        raise ValueError(f"{str(file)!r}: `eos_token_id` must be an id or a list of ids, got {ends!r:.200}.")


def check_adapter_weights(path: str | Path) -> None:
    """Raise a `ValueError` if an adapter has no weights in the format safetensors."""
    try:
        cached_file(str(path), SAFETENSORS_WEIGHTS_NAME)
    except OSError as error:
        raise ValueError(
            f"The adapter {str(path)!r} has no {SAFETENSORS_WEIGHTS_NAME}. {PICKLE_ADVICE} "
            f"({str(error).splitlines()[0]})"
        ) from error
