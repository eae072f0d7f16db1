"""Imports torchao, as transformers would, without what it prints to those who did not ask for it.

transformers imports an installed torchao with its models. torchao then names its compiled files that do not fit this
PyTorch or this GPU, and uses what PyTorch has deprecated. These messages are dropped, and only during this import:
whoever imports torchao or transformers before this package sees them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def _is_known(record: logging.LogRecord) -> bool:
    """Whether a message is one of those that importing torchao 0.18 writes beside PyTorch 2.13."""
    if record.name == "torchao":
        return record.getMessage().startswith(("Failed to load ", "Skipping import of cpp extensions"))
    registered = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return str(getattr(registered, "__module__", "")).startswith("torchao.") and "register_constant" in str(record.msg)


@contextmanager
def known_messages_dropped() -> Iterator[None]:
    """Drop the messages of :func:`_is_known` inside, and no others."""

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
