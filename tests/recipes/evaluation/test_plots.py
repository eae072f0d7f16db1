"""Plots: what they say, read from the SVG; what they look like, where a test can tell."""

import itertools
import math
import random
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from matplotlib.text import Annotation, Text

from transformers_kad.recipes.evaluation import plots
from transformers_kad.recipes.evaluation.plots import (
    Point,
    group_style,
    pareto_front,
    plot_acceptance_lengths,
    plot_accuracy_parameter,
    plot_accuracy_speed,
    plot_deferral_positions,
    spread,
)
from transformers_kad.recipes.intervals import wilson_interval

deterministic = settings(derandomize=True, deadline=None, max_examples=200)
RULES = ("dual", "primal", "nudging", "confidence_bet", "cascade token_v3", "exact", "ensemble", "blend_in")


def made_up_points(count, long=False, groups=4):
    """Points of a seeded sweep, and with long labels if asked for."""
    rng, points = random.Random(count), []
    for at in range(count):
        group, value = RULES[at % groups], round(0.05 + 0.9 * (at // groups) / max(1, (count - 1) // groups), 2)
        correct = int(200 * (0.3 + 0.4 * value * rng.random() + 0.1 * rng.random()))
        label = f"{group} {value}" + f", a base of 32 B parameters with a LoRA proxy of 0.6 B, run {at}" * long
        speed = 20 + 60 * value * rng.random() + 10 * rng.random()
        points.append(Point(label, correct / 200, *wilson_interval(correct, 200), speed, group, value))
    return points


def text_of(svg):
    """All its text without the spaces, where labels may be broken."""
    texts = [node.itertext() for node in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]
    return "".join("".join(itertools.chain.from_iterable(texts)).split())


def texts_in(figure):
    """The texts that are drawn: ticks beyond the limits are not."""
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            places = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            beyond = [label for place, label in places if not low <= place <= high]
            texts = [text for text in texts if text not in beyond]
    return texts


def assert_says(paths, *expected):
    png, svg = paths
    found = text_of(svg)
    for text in expected:
        assert "".join(text.split()) in found, text
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


ALL = {
    "accuracy_speed": lambda stem, **options: plot_accuracy_speed(made_up_points(9), stem, **options),
    "accuracy_parameter": lambda stem, **options: plot_accuracy_parameter(made_up_points(9), stem, **options),
    "acceptance_lengths": lambda stem, **options: plot_acceptance_lengths(
        {"dual 0.4": [5, 3, 9], "primal 0.9": [1, 0, 2, 30]}, stem, **options
    ),
    "deferral_positions": lambda stem, **options: plot_deferral_positions(
        {"dual 0.4": [0.5, 0.25, 0.5], "primal 0.9": [0.5, 0.75]}, stem, **options
    ),
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, stem: saved.append(figure) or save(figure, stem))
    return saved


# --- The Pareto front -----------------------------------------------------------------------------------------


def dominates(a, b):
    return (
        a.accuracy >= b.accuracy
        and a.tokens_per_second >= b.tokens_per_second
        and (a.accuracy, a.tokens_per_second) != (b.accuracy, b.tokens_per_second)
    )


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), max_size=12))
@deterministic
def test_the_pareto_front_is_what_nothing_dominates(pairs):
    points = [Point(f"{at}", a / 6, 0, 1, speed) for at, (a, speed) in enumerate(pairs)]
    front = pareto_front(points)
    expected = [p for p in points if not any(dominates(other, p) for other in points)]
    assert sorted(front, key=lambda p: p.label) == sorted(expected, key=lambda p: p.label)
    speeds = [p.tokens_per_second for p in front]
    assert speeds == sorted(speeds)


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


# --- All plots ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_files_are_written_where_asked(tmp_path, plot):
    stem = tmp_path / "new folder" / "threshold_0.4"
    paths = plot(stem)
    assert paths == [tmp_path / "new folder" / f"threshold_0.4.{ending}" for ending in ("png", "svg")]
    assert sorted(stem.parent.iterdir()) == sorted(paths)
    assert imread(paths[0]).std() > 0.05
    assert ElementTree.parse(paths[1]).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_equal_inputs_give_equal_files_whatever_the_users_style(tmp_path, plot):
    first = [path.read_bytes() for path in plot(tmp_path / "first")]
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.facecolor": "red"}):
        second = [path.read_bytes() for path in plot(tmp_path / "second")]
        assert matplotlib.rcParams["font.size"] == 20
    assert first == second


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_a_title_is_shown_as_it_is(tmp_path, plot):
    title = "Costs $5 & <b>_x_</b>, α^2 $"
    assert_says(plot(tmp_path / "plot", title=title), title)


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_nothing_is_cut_off(tmp_path, plot):
    """The margin of the picture is empty on all sides."""
    pixels = imread(plot(tmp_path / "plot", title="A title " * 30)[0])[..., :3]
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert np.all(edge == 1)


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch, plot):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match=r'pip install "transformers-kad\[eval\]"'):
        plot(tmp_path / "plot")


def test_pyplot_is_not_touched(tmp_path):
    import matplotlib.pyplot as plt  # noqa: PLC0415

    for name, plot in ALL.items():
        plot(tmp_path / name)
    assert plt.get_fignums() == []


def test_groups_are_told_apart_without_colour():
    assert len({group_style(at).marker for at in range(12)}) == 12
    assert len({(group_style(at).marker, str(group_style(at).line_style)) for at in range(60)}) == 60
    assert all(group_style(at).line_style != group_style(at + 1).line_style for at in range(12))


# --- Accuracy against speed -----------------------------------------------------------------------------------


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


# --- Accuracy against the parameter ---------------------------------------------------------------------------


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


def group_of(line, points):
    """The group whose accuracies a line has."""
    (name,) = {group for group in RULES if {p.accuracy for p in points if p.group == group} == set(line.get_ydata())}
    return name


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


# --- A panel a method -----------------------------------------------------------------------------------------


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


# --- What can't be plotted ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0.5, 0.6, 0.7, 20), "low=0.6, accuracy=0.5"),
        ((0.5, 0.4, 0.45, 20), "high=0.45"),
        ((0.5, -0.1, 0.6, 20), "low=-0.1"),
        ((50, 40, 60, 20), "low=40, accuracy=50, high=60"),
        ((math.nan, 0.4, 0.6, 20), "accuracy=nan"),
        ((0.5, 0.4, 0.6, 0), "`tokens_per_second` of point 'dual' must be finite and > 0, got 0"),
        ((0.5, 0.4, 0.6, math.inf), "got inf"),
        ((0.5, 0.4, 0.6, 20, "", math.nan), "`value` of point 'dual' must be finite or None, got nan"),
    ],
)
def test_a_point_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Point("dual", *fields)


def test_intervals_at_the_ends_are_no_error():
    for correct in (0, 7):
        Point("dual", correct / 7, *wilson_interval(correct, 7), 20)
