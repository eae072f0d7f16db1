"""Labels of plots: all of them are there, and none covers another."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Annotation, Text
from plot_cases import assert_says, deterministic, made_up_points, texts_in

from transformers_kad.recipes.evaluation.accuracy_plots import plot_accuracy_speed
from transformers_kad.recipes.evaluation.label_placement import spread
from transformers_kad.recipes.evaluation.points import Point


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("count", [1, 3, 9, 40])
def test_every_label_is_there_and_none_covers_another(tmp_path, figures, count, long):
    points = made_up_points(count, long)
    paths = plot_accuracy_speed(points, tmp_path / "plot", title="GSM8K")
    assert_says(paths, *(p.label for p in points), *(p.group for p in points))
    assert_says(paths, "tokens per second", "accuracy (95 % interval)", "Pareto front", "GSM8K")

    figure = figures[-1]
    figure.draw_without_rendering()
    texts = texts_in(figure)
    boxes = [Text.get_window_extent(text) for text in texts]
    for (a, first), (b, second) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not first.overlaps(second), (a.get_text(), b.get_text())
    markers = [line.get_xydata() for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    assert len(markers) == count
    centres = figure.axes[0].transData.transform(np.concatenate(markers))
    for text, box in zip(texts, boxes, strict=True):
        assert not any(box.contains(*centre) for centre in centres), text.get_text()


def test_points_are_numbered_where_labels_find_no_room(tmp_path, figures):
    plot_accuracy_speed(made_up_points(3), tmp_path / "few")
    plot_accuracy_speed(made_up_points(40, long=True), tmp_path / "many")
    few, many = ({text.get_text() for text in figure.findobj(Annotation)} for figure in figures)
    assert few == {p.label for p in made_up_points(3)}
    assert {str(number) for number in range(1, 41)} <= many


def test_a_number_is_that_of_its_label_in_the_key(tmp_path, figures):
    points = made_up_points(40, long=True)
    plot_accuracy_speed(points, tmp_path / "plot")
    annotations = list(figures[-1].axes[0].findobj(Annotation))
    at_points = {a.get_text(): a.xy for a in annotations if a.xycoords == "data"}
    in_key = sorted((a for a in annotations if a.xycoords != "data"), key=lambda a: (-a.xyann[1], a.xyann[0]))
    key = {in_key[at].get_text(): in_key[at + 1].get_text() for at in range(0, len(in_key), 2)}
    assert len(key) == 40
    for point in points:
        (number,) = (n for n, label in key.items() if "".join(label.split()) == "".join(point.label.split()))
        assert at_points[number] == (point.tokens_per_second, point.accuracy)


def test_equal_points_are_both_labelled(tmp_path):
    points = [Point(label, 0.5, 0.4, 0.6, 20) for label in ("one", "two", "three")]
    assert_says(plot_accuracy_speed(points, tmp_path / "plot"), "one", "two", "three")


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.1)), max_size=8).map(sorted))
@deterministic
def test_labels_beside_the_lines_are_spread_in_order(boxes):
    places = spread([place for place, _ in boxes], [height for _, height in boxes])
    edges = [(p - height / 2, p + height / 2) for p, (_, height) in zip(places, boxes, strict=True)]
    assert all(-1e-9 <= low < high <= 1 + 1e-9 for low, high in edges)
    assert all(one[1] <= other[0] + 1e-9 for one, other in itertools.pairwise(edges))
    free = all(one[1] <= other[0] for one, other in itertools.pairwise((w - h / 2, w + h / 2) for w, h in boxes))
    if free and all(h / 2 <= w <= 1 - h / 2 for w, h in boxes):
        assert places == pytest.approx([place for place, _ in boxes])
