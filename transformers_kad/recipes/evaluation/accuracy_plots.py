"""Plots of accuracy against speed and against the parameter of a rule, as PNG and SVG."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..plot_style import (
    PathStem,
    group_style,
    matplotlib_style,
    new_figure,
    percent_axis,
    save_figure,
    set_limits,
    wrap_label,
)
from .label_placement import LineEnd, label_line_ends, place_labels
from .points import Point, group_indices, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_accuracy_speed(points: Sequence[Point], path_stem: PathStem, *, title: str = "") -> list[Path]:
    """Plot accuracy with its intervals against tokens/s. The Pareto front has a line and filled markers.

    Every point has its label if there is room for all. Otherwise points are numbered, with a key beside the plot.

    Args:
        points: the points, at least one.
        path_stem: the files without their endings; missing folders are created.
        title: the heading.

    Returns:
        The PNG and the SVG file.

    Raises:
        ValueError: there are no points.
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
    """The figure, and whether there was room for all labels or numbers."""
    groups = group_indices(points)
    points = sorted(points, key=lambda p: (p.tokens_per_second, -p.accuracy, p.label))
    figure = new_figure(7, min(7.0, max(4.4, 1 + 0.15 * len(points))) if numbered else 4.4)
    axes = figure.add_axes((0.1, 0.12, 0.86, 0.8))
    axes.set(xlabel="tokens per second", ylabel="accuracy (95 % interval)")
    axes.set_title(wrap_label(title, 90), loc="left")
    set_limits(axes, [p.tokens_per_second for p in points], [y for p in points for y in (p.low, p.high)])
    percent_axis(axes)

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
        return figure, place_labels(axes, points, [str(at + 1) for at in range(len(points))])
    return figure, place_labels(axes, points, [wrap_label(p.label, 28) for p in points])


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
    """Write the number and label of every point beside the plot, with a line height of 11 points."""
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


def plot_accuracy_parameter(
    points: Sequence[Point], path_stem: PathStem, *, title: str = "", parameter: str = "parameter"
) -> list[Path]:
    """Plot accuracy with its intervals against the value of the parameter, with one line for each group.

    Groups are shifted a little, so that their intervals at the same value don't hide each other. A method without a
    value is a horizontal line with its interval at the right end.

    Args:
        points: the points, at least one of which has a value.
        path_stem: the files without their endings; missing folders are created.
        title: the heading.
        parameter: the label of the horizontal axis.

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

        groups = group_indices(points)
        extra = itertools.count(len(groups))  # for methods without a group
        constant = [point for point in points if point.value is None]
        names = [wrap_label(name, 34) for name in (*lines, *(point.label for point in constant))]
        figure = new_figure(6.4, max(4.2, 1 + 0.17 * sum(1 + name.count("\n") for name in names)))
        axes = figure.add_axes((0.1, 0.12, 0.86, 0.8))
        axes.set(xlabel=wrap_label(parameter, 80), ylabel="accuracy (95 % interval)")
        axes.set_title(wrap_label(title, 90), loc="left")
        values = [point.value for point in points if point.value is not None]
        set_limits(axes, values, [y for p in points for y in (p.low, p.high)])
        percent_axis(axes)

        ends: list[LineEnd] = []
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
            ends.append(LineEnd(xs[-1], ys[-1], moved, style, style.marker))
        for at, point in enumerate(constant):
            style, right = group_style(next(extra)), axes.get_xlim()[1]
            moved = axes.transData + ScaledTranslation(-4 * at / 72, 0, figure.dpi_scale_trans)
            axes.axhline(point.accuracy, color=style.color, linestyle=style.line_style, linewidth=1, zorder=2)
            axes.vlines(right, point.low, point.high, style.color, linewidth=0.8, transform=moved, clip_on=False)
            ends.append(LineEnd(right, point.accuracy, axes.transData, style, "none"))
        label_line_ends(axes, ends, names)
        return save_figure(figure, path_stem)
