"""Imports the models of transformers without the messages that an installed torchao prints meanwhile.

transformers imports torchao together with its models, where it is installed. torchao then logs the names of its
compiled files that do not fit this version of PyTorch or this GPU, and calls a function that PyTorch has deprecated.
These messages are dropped during this import only: a program that imports torchao or transformers before this package
sees them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def _is_known(record: logging.LogRecord) -> bool:
    """Whether a message is one of those that are logged when torchao 0.18 is imported with PyTorch 2.13."""
    if record.name == "torchao":
        return record.getMessage().startswith(("Failed to load ", "Skipping import of cpp extensions"))
    registered = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return str(getattr(registered, "__module__", "")).startswith("torchao.") and "register_constant" in str(record.msg)


@contextmanager
def known_messages_dropped() -> Iterator[None]:
    """Drop the messages that `_is_known` recognizes, and no others, while the context is open."""

    def keep(record: logging.LogRecord) -> bool:
        return not _is_known(record)

    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


with known_messages_dropped():
    import transformers.modeling_utils  # noqa: F401
