"""The checks of IFEval (arXiv 2311.07911), which lm-evaluation-harness maintains."""

from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

from .task_data import Row

INSTALL = (
    "The task 'ifeval' needs the checks of lm-evaluation-harness: pip install -e \".[ifeval]\". Where nltk can't "
    "download its data: put the folder tokenizers/punkt_tab of nltk_data into a folder that NLTK_DATA names"
)


@cache
def checks() -> ModuleType:
    """The module of lm-evaluation-harness with the checks.

    Raises:
        ImportError: it is not installed, or the data of nltk is missing and can't be downloaded.
    """
    try:
        import langdetect  # noqa: PLC0415
        import nltk  # noqa: PLC0415
        from lm_eval.tasks.ifeval import utils  # noqa: PLC0415

        nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError) as error:
        raise ImportError(f"{INSTALL} ({str(error).strip().partition(chr(10))[0]}).") from error
    langdetect.DetectorFactory.seed = 0  # it draws random parts of a text otherwise
    return utils


def ifeval_names(row: Row) -> list[str]:
    """The constraints of a row in one line each: "length_constraints:number_words relation='at least' num_words=300".

    Raises:
        ValueError: a constraint is unknown.
        ImportError: the checks are not installed.
    """
    known = checks().instructions_registry.INSTRUCTION_DICT
    names = []
    for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        if name not in known:
            raise ValueError(f"the instruction {name!r} is unknown to lm-evaluation-harness.")
        names.append(" ".join([name, *(f"{key}={value!r}" for key, value in _given(arguments).items())]))
    return names


def check_ifeval(row: Row, text: str) -> tuple[list[bool], list[bool]]:
    """For each constraint of a row, whether a text follows it strictly, and loosely."""
    document = {name: row[name] for name in ("key", "prompt", "instruction_id_list", "kwargs")}
    found = checks().process_results(document, [text])
    return found["inst_level_strict_acc"], found["inst_level_loose_acc"]


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constraint. The data set has all arguments of all constraints, most of them None."""
    return {key: value for key, value in arguments.items() if value is not None}
