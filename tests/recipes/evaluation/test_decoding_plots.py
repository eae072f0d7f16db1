"""Plots of acceptance and deferral, and what can't be plotted."""

import itertools
import math

import pytest
from plot_cases import assert_says, made_up_points, text_of

from transformers_kad.recipes.evaluation.accuracy_plots import plot_accuracy_parameter, plot_accuracy_speed
from transformers_kad.recipes.evaluation.decoding_plots import plot_acceptance_lengths, plot_deferral_positions
from transformers_kad.recipes.evaluation.points import Point


def test_acceptance_histograms_are_shares_with_their_mean(tmp_path, figures):
    """Rounds with 0, 0, 1 and 2 draft tokens: shares 1/2, 1/4, 1/4, mean 0.75."""
    histograms = {"dual 0.4": [2, 1, 1], "token by token": [7], "no text": [], "all refused": [4, 0, 0]}
    paths = plot_acceptance_lengths(histograms, tmp_path / "plot", title="GSM8K")
    assert_says(
        paths, *histograms, "GSM8K", "draft tokens accepted in a round", "share of rounds",
        "mean 0.75, 4 rounds", "mean 0.00, 4 rounds", "Left out, nothing was drafted: token by token, no text.",
    )  # fmt: skip
    panels = figures[-1].axes
    assert [axes.get_title().split("\n")[0] for axes in panels] == ["dual 0.4", "all refused"]
    assert [bar.get_height() for bar in panels[0].patches] == [0.5, 0.25, 0.25]
    assert list(panels[0].lines[0].get_xdata()) == [0.75, 0.75]


@pytest.mark.parametrize("count", [1, 9, pytest.param(40, marks=pytest.mark.slow)])
def test_there_is_a_panel_for_every_method(tmp_path, figures, count):
    labels = [point.label for point in made_up_points(count, long=True)]
    assert_says(plot_acceptance_lengths({label: [1, 2, 3] for label in labels}, tmp_path / "lengths"), *labels)
    assert_says(plot_deferral_positions({label: [0.5, 0.25] for label in labels}, tmp_path / "masses"), *labels)
    for figure in figures:
        figure.draw_without_rendering()
        assert len(figure.axes) == count
        titles = [axes.title.get_window_extent() for axes in figure.axes]
        frames = [axes.get_window_extent() for axes in figure.axes]
        assert not any(one.overlaps(other) for one, other in itertools.combinations([*titles, *frames], 2))


def test_a_plot_without_a_note_has_none(tmp_path):
    paths = plot_acceptance_lengths({"dual 0.4": [2, 1, 1]}, tmp_path / "plot")
    assert "Leftout" not in text_of(paths[1])


def test_deferral_masses_are_drawn_at_their_positions(tmp_path, figures):
    masses = {"dual 0.4": [0.5, None, 0.25], "ensemble": [None, None], "blend_in": []}
    counts = {"dual 0.4": [10, 8, 5], "ensemble": [10, 10], "blend_in": []}
    paths = plot_deferral_positions(masses, tmp_path / "plot", title="GSM8K", counts=counts)
    assert_says(
        paths, *masses, "GSM8K", "position in the generated text", "mean deferral mass D",
        "Left out, no deferral mass: ensemble, blend_in.", "Grey: texts that reach the position, 1 on the axis = 10.",
    )  # fmt: skip
    (axes,) = figures[-1].axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0, 1, 2]
    assert list(line.get_ydata()) == pytest.approx([0.5, math.nan, 0.25], nan_ok=True)
    (area,) = axes.collections
    assert {round(y, 6) for y in area.get_paths()[0].vertices[:, 1]} == {0, 0.5, 0.8, 1}


@pytest.mark.parametrize(
    ("plot", "inputs", "options", "message"),
    [
        (plot_accuracy_speed, [], {}, "`points` is empty"),
        (plot_accuracy_parameter, [], {}, "None of the 0 `points` has a `value`"),
        (plot_accuracy_parameter, [Point("base", 0.5, 0.4, 0.6, 20)], {}, "None of the 1 `points` has a `value`"),
        (plot_acceptance_lengths, {}, {}, r"None of the methods \[\] drafted"),
        (plot_acceptance_lengths, {"base": [9], "proxy": []}, {}, r"\['base', 'proxy'\] drafted"),
        (plot_acceptance_lengths, {"dual": [9, -1]}, {}, r"got \[9, -1\] of method 'dual'"),
        (plot_deferral_positions, {}, {}, r"None of the methods \[\] has a deferral mass"),
        (plot_deferral_positions, {"ensemble": [None]}, {}, r"\['ensemble'\] has a deferral mass"),
        (plot_deferral_positions, {"dual": [0.5, 1.5]}, {}, "got 1.5 at 1 of method 'dual'"),
        (plot_deferral_positions, {"dual": [math.nan]}, {}, "got nan at 0"),
        (plot_deferral_positions, {"dual": [0.5]}, {"counts": {"dual": [1, 2]}}, "got 2 for the 1 masses of method"),
        (plot_deferral_positions, {"dual": [0.5]}, {"counts": {}}, "got 0 for the 1 masses of method 'dual'"),
    ],
)
def test_what_cannot_be_plotted_is_refused_and_nothing_is_written(tmp_path, plot, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        plot(inputs, tmp_path / "plot", **options)
    assert list(tmp_path.iterdir()) == []
