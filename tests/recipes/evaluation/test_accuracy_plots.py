"""Plots of accuracy, against speed and against the parameter."""

import random

from plot_cases import RULES, assert_says, made_up_points

from transformers_kad.recipes.evaluation.accuracy_plots import plot_accuracy_parameter, plot_accuracy_speed
from transformers_kad.recipes.evaluation.points import Point


def test_the_front_is_drawn_with_filled_markers(tmp_path, figures):
    """The fast and the accurate point are on the front, the third is neither."""
    points = [Point("a", 0.9, 0.8, 0.95, 10), Point("b", 0.5, 0.4, 0.6, 30), Point("c", 0.4, 0.3, 0.5, 20)]
    plot_accuracy_speed(points, tmp_path / "plot")
    lines = figures[-1].axes[0].lines
    faces = {line.get_xdata()[0]: line.get_markerfacecolor() for line in lines if line.get_linestyle() == "None"}
    assert faces[20] == "white"
    assert "white" not in (faces[10], faces[30])
    (front,) = (line for line in lines if line.get_drawstyle() == "steps-pre")
    assert (list(front.get_xdata()), list(front.get_ydata())) == ([10, 30], [0.9, 0.5])


def group_of(line, points):
    """The group whose accuracies a line has."""
    (name,) = {group for group in RULES if {p.accuracy for p in points if p.group == group} == set(line.get_ydata())}
    return name


def test_each_group_is_a_line_in_the_order_of_its_values(tmp_path, figures):
    points = made_up_points(40, groups=8)
    random.Random(0).shuffle(points)
    constants = [Point("base alone", 0.35, 0.3, 0.4, 10), Point("proxy alone", 0.5, 0.44, 0.55, 90)]
    paths = plot_accuracy_parameter([*points, *constants], tmp_path / "plot", title="GSM8K", parameter="threshold α")
    assert_says(paths, *RULES, "base alone", "proxy alone", "threshold α", "accuracy (95 % interval)", "GSM8K")
    lines = [line for line in figures[-1].axes[0].lines if len(line.get_xdata()) == 5]
    assert len(lines) == 8
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in lines}) == 8
    for line in lines:
        group = [p for p in points if p.accuracy in line.get_ydata() and p.group == group_of(line, points)]
        assert sorted((p.value, p.accuracy) for p in group) == list(zip(*line.get_data(), strict=True))
    bars = [bar for bars in figures[-1].axes[0].collections for bar in bars.get_segments()]
    assert sorted((bar[0][1], bar[1][1]) for bar in bars) == sorted((p.low, p.high) for p in [*points, *constants])


def test_a_group_looks_the_same_in_both_plots(tmp_path, figures):
    points = made_up_points(12)
    plot_accuracy_speed(points, tmp_path / "speed")
    plot_accuracy_parameter(points, tmp_path / "parameter")
    speed, parameter = (figure.axes[0] for figure in figures[-2:])
    by_accuracy = {line.get_ydata()[0]: line.get_marker() for line in speed.lines if line.get_linestyle() == "None"}
    lines = [line for line in parameter.lines if line.get_marker() != "None" and len(line.get_xdata()) == 3]
    marked = [(by_accuracy[y], line.get_marker()) for line in lines for y in line.get_ydata() if y in by_accuracy]
    assert len({marker for _, marker in marked}) == 4
    assert all(one == other for one, other in marked)
