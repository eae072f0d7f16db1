"""Messages of other libraries that users of a command line can do nothing about."""

import warnings

from transformers.utils import logging


def silence_libraries() -> None:
    """Hide the progress bars of loading weights, and a warning about peft's use of a deprecated attribute."""
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
