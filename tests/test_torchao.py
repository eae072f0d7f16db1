"""What importing torchao prints is kept from those who did not ask for it, and nothing else is.

All recipes: tests/recipes/scripts/test_every_recipe.py.
"""

import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from run_command import run_command

from transformers_kad._torchao import known_messages_dropped

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    **{name: [str(ROOT / "recipes" / f"{name}.py"), "--help"] for name in ("generate", "train_tiny_pair")},
    "lm_eval_model": ["-m", "transformers_kad.integrations.lm_eval", "--help"],
    "the library": ["-c", "import transformers_kad"],
}


def python(*words):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return run_command([sys.executable, *words], env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_nothing_of_torchao(command):
    assert find_spec("torchao") is not None, "without torchao there is nothing to see here"
    run = python(*COMMANDS[command])
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.slow
def test_who_imports_torchao_sees_what_it_says():
    plain, beside = python("-c", "import torchao"), python("-c", "import torchao, transformers_kad")
    # Else the library has nothing to keep quiet any more. torch 2.14 can load all parts of torchao.
    assert "Failed to load" in plain.stderr or "register_constant" in plain.stderr
    assert len(beside.stderr.splitlines()) >= len(plain.stderr.splitlines())


class _OfTorchao:
    __module__ = "torchao.quantization"


DEPRECATED = "%s is an Enum subclass. Calling register_constant() on Enum subclasses is deprecated."


@pytest.mark.parametrize(
    ("logger", "message", "arguments", "shown"),
    [
        ("torchao", "Failed to load %s: too old", ("/a/_C.so",), False),
        ("torchao", "Skipping import of cpp extensions due to incompatible torch version.", (), False),
        ("torchao", "int8 needs a GPU", (), True),
        ("torch.utils._pytree", DEPRECATED, (_OfTorchao,), False),
        ("torch.utils._pytree", DEPRECATED, (Path,), True),
        ("torch.utils._pytree", "A leaf of %s", (_OfTorchao,), True),
        ("mine", "Failed to load %s", ("/a/_C.so",), True),
    ],
)
def test_only_the_known_messages_are_dropped_and_only_meanwhile(logger, message, arguments, shown, caplog):
    with caplog.at_level(logging.WARNING, logger=logger):
        logging.getLogger(logger).addHandler(caplog.handler)
        try:
            with known_messages_dropped():
                logging.getLogger(logger).warning(message, *arguments)
            assert bool(caplog.records) is shown
            caplog.clear()
            logging.getLogger(logger).warning(message, *arguments)
            assert caplog.records
        finally:
            logging.getLogger(logger).removeHandler(caplog.handler)
