"""Plots of an evaluation, as PNG and SVG. They need `pip install "transformers-kad[eval]"`.

Nothing depends on colour alone: a method is told apart by its label, its marker and its line style, so that the plots
can be read in print. Equal inputs give equal files, whatever style the user has set. The text of an SVG is text.
"""

import itertools
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathStem = str | os.PathLike[str]

# Okabe and Ito, "Color Universal Design", 2008, without the yellow, which white paper swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "*", "h")
LINE_STYLES = ("-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2)))

_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.dpi": 200,
    "font.size": 8,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 6,
    "savefig.bbox": "tight",
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "transformers_kad",
    "text.parse_math": False,  # labels are taken as they are, dollar signs too
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@dataclass(frozen=True)
class Point:
    """One method as measured.

    Attributes:
        label: its name.
        accuracy: in [0, 1].
        low: lower end of the accuracy's 95 % interval.
        high: upper end.
        tokens_per_second: throughput, > 0.
        group: the family that it belongs to, a rule for example; "" for none.
        value: the parameter's value within its group, None for a method without one.

    Raises:
        ValueError: for values out of range.
    """

    label: str
    accuracy: float
    low: float
    high: float
    tokens_per_second: float
    group: str = ""
    value: float | None = None

    def __post_init__(self) -> None:
        rounding = 1e-9
        if not -rounding <= self.low <= self.accuracy + rounding <= self.high + 2 * rounding <= 1 + 3 * rounding:
            raise ValueError(
                f"Point {self.label!r} needs 0 <= low <= accuracy <= high <= 1, got low={self.low!r}, "
                f"accuracy={self.accuracy!r}, high={self.high!r}."
            )
        if not 0 < self.tokens_per_second < math.inf:
            raise ValueError(
                f"`tokens_per_second` of point {self.label!r} must be finite and > 0, got {self.tokens_per_second!r}."
            )
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"`value` of point {self.label!r} must be finite or None, got {self.value!r}.")


class GroupStyle(NamedTuple):
    """How a group is drawn."""

    marker: str
    line_style: Any
    color: str


def group_style(index: int) -> GroupStyle:
    """The style of the group with this index: a marker of its own up to 12, a pair of marker and line up to 60."""
    return GroupStyle(MARKERS[index % 12], LINE_STYLES[index % 5], COLORS[index % 7])


def _groups(points: Sequence[Point]) -> dict[str, int]:
    """The index of each group, so that it looks the same in every plot of these points."""
    return {group: at for at, group in enumerate(dict.fromkeys(p.group for p in points if p.group))}


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: none is at least as accurate and as fast, and better in one of the two.

    Returns:
        By rising tokens/s, so by falling accuracy. Equal points are all on the front or none is.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.tokens_per_second, -p.accuracy)):
        best = front[-1] if front else None
        equal = best and (best.accuracy, best.tokens_per_second) == (point.accuracy, point.tokens_per_second)
        if best is None or equal or point.accuracy > best.accuracy:
            front.append(point)
    return front[::-1]


# --- Accuracy against speed -----------------------------------------------------------------------------------


def plot_accuracy_speed(points: Sequence[Point], path_stem: PathStem, *, title: str = "") -> list[Path]:
    """Plot accuracy with its intervals against tokens/s, the Pareto front marked by a line and filled markers.

    Every point is labelled where there is room. Where there is none, points have numbers, and a key beside the plot.

    Args:
        points: what to plot, one or more.
        path_stem: the files without their endings; missing folders are made.
        title: a heading.

    Returns:
        The PNG and the SVG file.

    Raises:
        ValueError: no points.
        ImportError: matplotlib is not installed.
    """
    if not points:
        raise ValueError("`points` is empty: there is nothing to plot.")
    with matplotlib_style():
        figure, fits = _accuracy_speed_figure(points, title, numbered=False)
        if not fits:
            figure, _ = _accuracy_speed_figure(points, title, numbered=True)
        return save_figure(figure, path_stem)


def _accuracy_speed_figure(points: Sequence[Point], title: str, numbered: bool) -> "tuple[Figure, bool]":
    """The figure, and whether all labels, or all numbers, found room in it."""
    groups = _groups(points)
    points = sorted(points, key=lambda p: (p.tokens_per_second, -p.accuracy, p.label))
    figure = new_figure(7, min(7.0, max(4.4, 1 + 0.15 * len(points))) if numbered else 4.4)
    axes = figure.add_axes((0.1, 0.12, 0.86, 0.8))
    axes.set(xlabel="tokens per second", ylabel="accuracy (95 % interval)")
    axes.set_title(wrap_label(title, 90), loc="left")
    _set_limits(axes, [p.tokens_per_second for p in points], [y for p in points for y in (p.low, p.high)])
    _percent(axes)

    front = pareto_front(points)
    speeds, accuracies = [p.tokens_per_second for p in front], [p.accuracy for p in front]
    axes.plot(speeds, accuracies, drawstyle="steps-pre", color="0.35", linestyle="--", linewidth=1, zorder=2)
    for point in points:
        style = group_style(groups.get(point.group, len(groups)))
        face = style.color if point in front else "white"
        x, y = point.tokens_per_second, point.accuracy
        axes.plot([x, x], [point.low, point.high], color="0.6", linewidth=0.9, zorder=1)
        axes.plot(x, y, marker=style.marker, color=style.color, markerfacecolor=face, linestyle="none", zorder=3)

    _add_legend(figure, groups)
    if numbered:
        _add_key(axes, [wrap_label(p.label, 90) for p in points])
        return figure, _place_labels(axes, points, [str(at + 1) for at in range(len(points))])
    return figure, _place_labels(axes, points, [wrap_label(p.label, 28) for p in points])


def _add_legend(figure: "Figure", groups: Mapping[str, int]) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    handles = [Line2D([], [], color="0.35", linestyle="--", linewidth=1, label="Pareto front (filled markers)")]
    for group, index in groups.items():
        style = group_style(index)
        handles.append(Line2D([], [], marker=style.marker, color=style.color, linestyle="none"))
        handles[-1].set_label(wrap_label(group, 40))
    widest = max(len(line) for handle in handles for line in str(handle.get_label()).split("\n"))
    columns = max(1, min(len(handles), 110 // (widest + 6)))
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.53, 0.02), ncols=columns)


def _add_key(axes: "Axes", labels: Sequence[str]) -> None:
    """Number and label of every point, beside the plot, in lines of 11 points."""
    line = 0
    for at, label in enumerate(labels):
        for text, offset, side in ((str(at + 1), 26, "right"), (label, 32, "left")):
            axes.annotate(
                text,
                (1, 1),
                xycoords="axes fraction",
                xytext=(offset, -11 * line),
                textcoords="offset points",
                ha=side,
                va="top",
                fontweight="bold" if side == "right" else "normal",
                annotation_clip=False,
            )
        line += 1 + label.count("\n")


class _Box(NamedTuple):
    """A rectangle in points (1/72 inch)."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "_Box") -> bool:
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def is_crossed(self, start: tuple[float, float], end: tuple[float, float]) -> bool:
        """Whether the segment passes through, by cutting it to the box side by side."""
        first, last = 0.0, 1.0
        for a, b, low, high in (
            (start[0], end[0], self.left, self.right),
            (start[1], end[1], self.bottom, self.top),
        ):
            if a == b:
                if not low < a < high:
                    return False
                continue
            enter, leave = sorted(((low - a) / (b - a), (high - a) / (b - a)))
            first, last = max(first, enter), min(last, leave)
        return first < last

    @property
    def centre(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2


_DISTANCES = (6, 10, 16, 24, 34, 46, 60, 80, 105)  # of a label from its point, in points
_DIRECTIONS = [math.tau * step / 16 for step in (0, 8, 2, 14, 6, 10, 1, 15, 7, 9, 4, 12, 3, 13, 5, 11)]  # right first
_LEADER = 14  # from this distance on, a line leads from the point to its label
_MARKER = 4.5  # half a marker
_LABEL_SIZE = 7.5


def _place_labels(axes: "Axes", points: Sequence[Point], labels: Sequence[str]) -> bool:
    """Put each label near its point, clear of markers and of the other labels; False if one could not be."""
    figure: Any = axes.figure
    renderer, scale = figure.canvas.get_renderer(), 72 / figure.dpi
    frame = axes.get_window_extent(renderer)
    inside = _Box(frame.x0 * scale, frame.y0 * scale, frame.x1 * scale, frame.y1 * scale)

    def in_points(x: float, y: float) -> tuple[float, float]:
        right, up = axes.transData.transform((x, y))
        return float(right) * scale, float(up) * scale

    anchors = [in_points(p.tokens_per_second, p.accuracy) for p in points]
    lines = [(in_points(p.tokens_per_second, p.low), in_points(p.tokens_per_second, p.high)) for p in points]
    front = [in_points(p.tokens_per_second, p.accuracy) for p in pareto_front(points)]
    for (x0, y0), (x1, y1) in itertools.pairwise(front):
        lines += [((x0, y0), (x0, y1)), ((x0, y1), (x1, y1))]
    markers = [_Box(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in anchors]
    placed: list[_Box] = []
    leaders: list[tuple[tuple[float, float], tuple[float, float]]] = []
    all_fit = True

    def cost(box: _Box, at: int, distance: float) -> float:
        """Whole numbers are overlaps, which are errors; the rest prefers short ways and free ground."""
        errors = sum(box.overlaps(other) for other in (*placed, *markers))
        errors += sum(box.is_crossed(*leader) for leader in leaders)
        errors += not (inside.left < box.left and box.right < inside.right)
        errors += not (inside.bottom < box.bottom and box.top < inside.top)
        if distance >= _LEADER:
            others = (*placed, *markers[:at], *markers[at + 1 :])
            errors += sum(other.is_crossed(anchors[at], box.centre) for other in others)
        crossed = sum(box.is_crossed(*line) for line in lines)
        return errors + min(0.9, distance / 400 + 0.08 * crossed)

    def crowding(at: int) -> float:
        return -sum(1 / (1 + math.dist(anchors[at], other)) for other in anchors)

    for at in sorted(range(len(points)), key=lambda k: (crowding(k), k)):
        x, y = anchors[at]
        probe = axes.text(0, 0, labels[at], fontsize=_LABEL_SIZE)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        width, height = extent.width * scale + 2, extent.height * scale + 1
        least, box, way = math.inf, inside, 0.0
        for distance in _DISTANCES:
            if least <= distance / 400:  # nothing further away is better
                break
            for angle in _DIRECTIONS:
                right = x + math.cos(angle) * (distance + width / 2)
                up = y + math.sin(angle) * (distance + height / 2)
                candidate = _Box(right - width / 2, up - height / 2, right + width / 2, up + height / 2)
                if (its_cost := cost(candidate, at, distance)) < least:
                    least, box, way = its_cost, candidate, distance
        all_fit = all_fit and least < 1
        placed.append(box)
        arrow = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            labels[at],
            (points[at].tokens_per_second, points[at].accuracy),
            xytext=(box.centre[0] - x, box.centre[1] - y),
            textcoords="offset points",
            fontsize=_LABEL_SIZE,
            ha="center",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4},
            arrowprops=arrow if way >= _LEADER else None,
            zorder=2.5,  # over lines, under markers
        )
        if way >= _LEADER:
            leaders.append((anchors[at], box.centre))
    return all_fit


# --- Accuracy against the parameter ---------------------------------------------------------------------------


def plot_accuracy_parameter(
    points: Sequence[Point], path_stem: PathStem, *, title: str = "", parameter: str = "parameter"
) -> list[Path]:
    """Plot accuracy with its intervals against the parameter's value, one line a group.

    Groups stand a little beside each other, so that intervals at the same value do not hide one another. A method
    without a value is a horizontal line, its interval at the right end.

    Args:
        points: what to plot; at least one has a value.
        path_stem: the files without their endings; missing folders are made.
        title: a heading.
        parameter: what the horizontal axis is called.

    Returns:
        The PNG and the SVG file.

    Raises:
        ValueError: no point has a value.
        ImportError: matplotlib is not installed.
    """
    valued = [point for point in points if point.value is not None]
    if not valued:
        raise ValueError(f"None of the {len(points)} `points` has a `value`: there is nothing to plot.")
    lines: dict[str, list[Point]] = {}
    for point in valued:
        lines.setdefault(point.group or point.label, []).append(point)
    with matplotlib_style():
        from matplotlib.transforms import ScaledTranslation  # noqa: PLC0415

        groups = _groups(points)
        extra = itertools.count(len(groups))  # for what is in no group
        constant = [point for point in points if point.value is None]
        names = [wrap_label(name, 34) for name in (*lines, *(point.label for point in constant))]
        figure = new_figure(6.4, max(4.2, 1 + 0.17 * sum(1 + name.count("\n") for name in names)))
        axes = figure.add_axes((0.1, 0.12, 0.86, 0.8))
        axes.set(xlabel=wrap_label(parameter, 80), ylabel="accuracy (95 % interval)")
        axes.set_title(wrap_label(title, 90), loc="left")
        values = [point.value for point in points if point.value is not None]
        _set_limits(axes, values, [y for p in points for y in (p.low, p.high)])
        _percent(axes)

        ends: list[_LineEnd] = []
        step = min(4.0, 20 / len(lines))
        for at, (name, group) in enumerate(lines.items()):
            style = group_style(groups[name] if name in groups else next(extra))
            group.sort(key=lambda p: (p.value, p.label))
            shift = ScaledTranslation((at - (len(lines) - 1) / 2) * step / 72, 0, figure.dpi_scale_trans)
            moved = axes.transData + shift
            xs, ys = [p.value or 0.0 for p in group], [p.accuracy for p in group]
            axes.plot(
                xs, ys, marker=style.marker, color=style.color, linestyle=style.line_style, transform=moved, zorder=3
            )
            axes.vlines(
                xs, [p.low for p in group], [p.high for p in group], style.color, linewidth=0.8, transform=moved
            )
            ends.append(_LineEnd(xs[-1], ys[-1], moved, style, style.marker))
        for at, point in enumerate(constant):
            style, right = group_style(next(extra)), axes.get_xlim()[1]
            moved = axes.transData + ScaledTranslation(-4 * at / 72, 0, figure.dpi_scale_trans)
            axes.axhline(point.accuracy, color=style.color, linestyle=style.line_style, linewidth=1, zorder=2)
            axes.vlines(right, point.low, point.high, style.color, linewidth=0.8, transform=moved, clip_on=False)
            ends.append(_LineEnd(right, point.accuracy, axes.transData, style, "none"))
        _label_lines(axes, ends, names)
        return save_figure(figure, path_stem)


class _LineEnd(NamedTuple):
    """Where a line ends, in which coordinates, and how it looks."""

    x: float
    y: float
    transform: Any
    style: GroupStyle
    marker: str


def _label_lines(axes: "Axes", ends: Sequence[_LineEnd], names: Sequence[str]) -> None:
    """Right of the plot, at the height of each line's end, its marker, its line style and its name."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    figure: Any = axes.figure
    height = axes.get_window_extent().height * 72 / figure.dpi
    bottom, top = axes.get_ylim()
    order = sorted(range(len(ends)), key=lambda at: (ends[at].y, -at))
    places = spread(
        [(ends[at].y - bottom) / (top - bottom) for at in order],
        [10.5 * (1 + names[at].count("\n")) / height for at in order],
    )
    for at, place in zip(order, places, strict=True):
        end = ends[at]
        handle = Line2D(
            [1.03, 1.075, 1.12],
            [place] * 3,
            color=end.style.color,
            linestyle=end.style.line_style,
            marker=end.marker,
            markevery=[1],
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.add_line(handle)
        axes.text(1.14, place, names[at], transform=axes.transAxes, va="center")
        axes.annotate(
            "",
            (end.x, end.y),
            xycoords=end.transform,
            xytext=(1.025, place),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 5},
            annotation_clip=False,
            zorder=1,
        )


def spread(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Centres of boxes near where they are wanted, in rising order, free of overlaps and in [0, 1] if they fit.

    >>> spread([0.5, 0.5], [0.25, 0.25])
    [0.5, 0.75]
    >>> spread([1.0, 1.0], [0.25, 0.25])
    [0.625, 0.875]
    """
    places: list[float] = []
    end = 0.0
    for centre, height in zip(wanted, heights, strict=True):
        places.append(max(centre, end + height / 2))
        end = places[-1] + height / 2
    start = 1.0
    for at in reversed(range(len(places))):
        places[at] = min(places[at], start - heights[at] / 2)
        start = places[at] - heights[at] / 2
    return places


# --- A panel a method -----------------------------------------------------------------------------------------


def plot_acceptance_lengths(
    histograms: Mapping[str, Sequence[int]], path_stem: PathStem, *, title: str = ""
) -> list[Path]:
    """Plot how many draft tokens rounds accepted, one panel a method, with the mean.

    A method that never drafted has nothing to accept: it is left out, and a note says so.

    Args:
        histograms: by method, entry k is the number of rounds that emitted k draft tokens.
        path_stem: the files without their endings; missing folders are made.
        title: a heading.

    Returns:
        The PNG and the SVG file.

    Raises:
        ValueError: no method drafted, or a count is negative.
        ImportError: matplotlib is not installed.
    """
    for method, histogram in histograms.items():
        if any(not 0 <= count < math.inf for count in histogram):
            raise ValueError(f"Histograms hold counts >= 0, got {list(histogram)!r} of method {method!r}.")
    shown = {method: list(map(int, h)) for method, h in histograms.items() if len(h) > 1 and any(h)}
    if not shown:
        raise ValueError(f"None of the methods {list(histograms)} drafted anything: there is nothing to plot.")
    with matplotlib_style():
        sums = {m: (sum(h), sum(k * count for k, count in enumerate(h))) for m, h in shown.items()}
        headings = {m: f"mean {accepted / rounds:.2f}, {rounds:,} rounds" for m, (rounds, accepted) in sums.items()}
        figure, panels = _panels(headings, title, "draft tokens accepted in a round", "share of rounds")
        for axes, (method, histogram) in zip(panels, shown.items(), strict=True):
            rounds, accepted = sums[method]
            shares = [count / rounds for count in histogram]
            axes.bar(range(len(shares)), shares, width=0.8, color="#56B4E9", edgecolor="black", linewidth=0.6)
            axes.axvline(accepted / rounds, color="black", linestyle="--", linewidth=1)
        longest = max(map(len, shown.values()))
        highest = max(max(h) / sums[m][0] for m, h in shown.items())
        _whole_ticks(panels[0], 8)
        panels[0].set(xlim=(-0.7, longest - 0.3), ylim=(0, 1.08 * highest))
        _percent(panels[0])
        _add_notes(figure, {"Left out, nothing was drafted": [m for m in histograms if m not in shown]})
        return save_figure(figure, path_stem)


def plot_deferral_positions(
    masses: Mapping[str, Sequence[float | None]],
    path_stem: PathStem,
    *,
    title: str = "",
    counts: Mapping[str, Sequence[int]] | None = None,
) -> list[Path]:
    """Plot the mean deferral mass D at each position of the text, one panel a method.

    A rule that is no mask has no D: its method is left out, and a note says so.

    Args:
        masses: by method, mean D at position 0, 1, ... of the generated text; None where it is not known.
        path_stem: the files without their endings; missing folders are made.
        title: a heading.
        counts: by method, how many texts reach each position; shown behind the masses, which are the noisier the
            fewer there are.

    Returns:
        The PNG and the SVG file.

    Raises:
        ValueError: no method has a mass, a mass is out of range, or `counts` do not fit.
        ImportError: matplotlib is not installed.
    """
    for method, values in masses.items():
        for at, mass in enumerate(values):
            if mass is not None and not 0 <= mass <= 1 + 1e-6:  # a sum of float32 probabilities
                raise ValueError(f"Masses must be None or in [0, 1], got {mass!r} at {at} of method {method!r}.")
        if counts is not None and len(counts.get(method, ())) != len(values):
            raise ValueError(
                f"`counts` must have one entry a mass, got {len(counts.get(method, ()))} for the {len(values)} "
                f"masses of method {method!r}."
            )
    shown = {m: list(values) for m, values in masses.items() if any(value is not None for value in values)}
    if not shown:
        raise ValueError(f"None of the methods {list(masses)} has a deferral mass: there is nothing to plot.")
    with matplotlib_style():
        headings = dict.fromkeys(shown, "")
        figure, panels = _panels(headings, title, "position in the generated text", "mean deferral mass D")
        longest = max(map(len, shown.values()))
        most = 0 if counts is None else max(max(counts[method]) for method in shown)
        for axes, (method, values) in zip(panels, shown.items(), strict=True):
            known = [math.nan if value is None else value for value in values]
            few = len(values) <= 40
            axes.plot(known, color="black", linewidth=1, marker="o" if few else None, markersize=3, zorder=3)
            if counts is not None and most > 0:
                heights = [count / most for count in counts[method]]
                axes.fill_between(range(len(heights)), heights, step="mid", color="0.88", linewidth=0, zorder=0.5)
        _whole_ticks(panels[0], 5)
        panels[0].set(xlim=(-0.02 * longest - 0.5, 1.02 * longest - 0.5), ylim=(0, 1.05))
        notes = {"Left out, no deferral mass": [method for method in masses if method not in shown]}
        if counts is not None:
            notes["Grey"] = [f"texts that reach the position, 1 on the axis = {most:,}"]
        _add_notes(figure, notes)
        return save_figure(figure, path_stem)


def _panels(headings: Mapping[str, str], title: str, xlabel: str, ylabel: str) -> "tuple[Figure, list[Axes]]":
    """A figure with one small plot a method, all on the same axes. `headings`: what stands below its name."""
    methods = list(headings)
    columns = min(len(methods), 3 if len(methods) <= 9 else 5)
    rows = math.ceil(len(methods) / columns)
    titles = [f"{wrap_label(method, 30)}\n{heading}".rstrip() for method, heading in headings.items()]
    title_lines = 1 + max(name.count("\n") for name in titles)
    figure = new_figure(max(2.5 * columns, 3.6), rows * (1.5 + 0.15 * title_lines) + 0.6, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes, name in zip(panels, titles, strict=False):
        axes.set_title(name, fontsize=8)
    for at, axes in enumerate(panels[len(methods) :], start=len(methods)):
        axes.remove()
        panels[at - columns].xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    if title:
        figure.suptitle(wrap_label(title, max(45, 30 * columns)), fontsize=9)
    return figure, panels[: len(methods)]


def _add_notes(figure: "Figure", notes: Mapping[str, Sequence[str]]) -> None:
    """Below the plot, a line or more for each heading that has entries."""
    width = int(figure.get_figwidth() * 15)
    lines = [wrap_label(f"{heading}: {', '.join(entries)}.", width) for heading, entries in notes.items() if entries]
    if lines:
        figure.text(0.01, -0.1 / figure.get_figheight(), "\n".join(lines), va="top")


# --- What all plots share -------------------------------------------------------------------------------------


@contextmanager
def matplotlib_style() -> Iterator[None]:
    """Matplotlib's own defaults and `_STYLE`; what the user had set is set again afterwards."""
    try:
        from matplotlib import style  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "transformers-kad[eval]"') from error
    with style.context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float, layout: Any = None) -> "Figure":
    """A figure of its own, in inches: it is in no list of pyplot's, and no window shows it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def wrap_label(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _set_limits(axes: "Axes", xs: Sequence[float], ys: Sequence[float]) -> None:
    """Limits with room around what is plotted for the labels."""
    for values, set_limits in ((xs, axes.set_xlim), (ys, axes.set_ylim)):
        low, high = min(values), max(values)
        margin = 0.1 * (high - low) if high > low else 0.5 * abs(high) or 0.5
        set_limits(low - margin, high + margin)


def _percent(axes: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415

    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _whole_ticks(axes: "Axes", most: int) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True))


def save_figure(figure: "Figure", path_stem: PathStem) -> list[Path]:
    paths = [Path(f"{os.fspath(path_stem)}.{ending}") for ending in ("png", "svg")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
