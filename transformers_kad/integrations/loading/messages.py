"""Messages of the libraries below that a user of a command line can do nothing about."""

import warnings

from transformers.utils import logging


def quieten() -> None:
    """Hide what a person at a terminal can't act on: bars of loading weights, peft's use of a deprecated attribute."""
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
