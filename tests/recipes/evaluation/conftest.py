"""The figures that plots save."""

import pytest

from transformers_kad.recipes.evaluation import accuracy_plots, decoding_plots


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], accuracy_plots.save_figure
    for module in (accuracy_plots, decoding_plots):
        monkeypatch.setattr(module, "save_figure", lambda figure, stem: saved.append(figure) or save(figure, stem))
    return saved
