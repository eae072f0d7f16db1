"""Messages of other libraries: which ones are hidden."""

import warnings

import pytest
from transformers.utils import logging

from transformers_kad.integrations.loading.messages import silence_libraries


@pytest.fixture(autouse=True)
def bars_as_before():
    shown = logging.is_progress_bar_enabled()
    yield
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


def test_bars_and_the_warning_about_peft_are_hidden_and_no_other():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        logging.enable_progress_bar()
        silence_libraries()
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("something else", FutureWarning, stacklevel=1)
    assert not logging.is_progress_bar_enabled()
    assert [str(warning.message) for warning in seen] == ["something else"]
