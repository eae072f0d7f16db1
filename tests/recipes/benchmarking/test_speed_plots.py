"""Plots of speed: which lines are drawn, and where there is nothing to plot."""

import pytest

from transformers_kad.recipes.benchmarking import plots
from transformers_kad.recipes.benchmarking.methods import Method
from transformers_kad.recipes.benchmarking.plots import plot_batch_sizes, plot_draft_lengths, plot_growth


def row(key, ratio, *, size=1, bound=None):
    method = Method.from_key(key)
    return {
        "method": key,
        "label": method.label,
        "kind": method.kind,
        "draft_length": method.draft_length,
        "batch_size": size,
        "ratio": None if ratio is None else (ratio - 0.1, ratio, ratio + 0.2),
        "bound": bound,
    }


@pytest.fixture
def axes(monkeypatch):
    """The axes of the figures that are saved."""
    saved = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, stem: saved.append(figure.axes[0]) or [stem])
    return saved


def lines(axes):
    """The points of every line, without the ticks of its quartiles."""
    return [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) for line in axes.get_lines()]


def test_drafting_methods_are_lines_with_dashed_bounds_and_the_others_are_level(tmp_path, axes):
    rows = [
        row("base", 1.0),
        row("speculative:5", 1.5, bound=1.75),
        row("speculative:3", 1.25, bound=1.5),
        row("lazy", 0.75),
    ]
    assert plot_draft_lengths(rows, tmp_path / "plot") == [tmp_path / "plot"]
    drawn = lines(axes[0])
    assert ([3, 5], [1.25, 1.5], "-") in drawn
    assert ([3, 5], [1.5, 1.75], "--") in drawn
    assert sorted(ys[0] for xs, ys, _ in drawn if xs == [0, 1]) == [0.75, 1.0]


def test_without_drafts_or_with_one_batch_size_there_is_nothing_to_plot(tmp_path, axes):
    assert plot_draft_lengths([row("base", 1.0), row("speculative:5", None)], tmp_path / "plot") == []
    assert plot_batch_sizes([row("base", 1.0), row("speculative:5", 1.5)], tmp_path / "plot") == []
    assert axes == []


def test_batch_sizes_are_lines_of_the_methods_that_were_measured_at_several(tmp_path, axes):
    rows = [
        row("base", 1.0),
        row("base", 1.0, size=4),
        row("speculative:5", 1.5),
        row("speculative:5", 0.75, size=4),
        row("lazy", 1.25, size=4),
    ]
    plot_batch_sizes(rows, tmp_path / "plot")
    assert lines(axes[0]) == [([1, 4], [1.0, 1.0], "-"), ([1, 4], [1.5, 0.75], "-")]


def test_growth_is_drawn_on_logarithmic_axes(tmp_path, axes):
    plot_growth([8, 16], {"base alone": [1.0, 2.0]}, tmp_path / "plot", xlabel="tokens")
    assert (axes[0].get_xscale(), axes[0].get_yscale(), axes[0].get_xlabel()) == ("log", "log", "tokens")
    assert lines(axes[0])[0][:2] == ([8, 16], [1.0, 2.0])
