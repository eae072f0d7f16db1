"""Places the labels of plots so that they cover neither markers nor each other."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..plot_style import GroupStyle
from .points import Point, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class _Box(NamedTuple):
    """A rectangle in points (1/72 inch)."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "_Box") -> bool:
        """Whether two boxes have an area in common."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def is_crossed(self, start: tuple[float, float], end: tuple[float, float]) -> bool:
        """Whether a line segment passes through the box. The segment is clipped at each side of the box."""
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
        """The centre of the box."""
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2


_DISTANCES = (6, 10, 16, 24, 34, 46, 60, 80, 105)  # of a label from its point, in points
_DIRECTIONS = [math.tau * step / 16 for step in (0, 8, 2, 14, 6, 10, 1, 15, 7, 9, 4, 12, 3, 13, 5, 11)]  # right first
_LEADER = 14  # from this distance on, a line leads from the point to its label
_MARKER = 4.5  # half a marker
_LABEL_SIZE = 7.5


def place_labels(axes: "Axes", points: Sequence[Point], labels: Sequence[str]) -> bool:
    """Place each label near its point without covering markers or other labels. Returns whether all labels fit."""
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
        """The number of overlaps of a place, plus less than 1 for its distance and the lines that it covers."""
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
            if least <= distance / 400:  # no place further away costs less
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


class LineEnd(NamedTuple):
    """The end of a line with its coordinate system, style and marker."""

    x: float
    y: float
    transform: Any
    style: GroupStyle
    marker: str


def label_line_ends(axes: "Axes", ends: Sequence[LineEnd], names: Sequence[str]) -> None:
    """Show the marker, style and name of each line on the right of the plot, near the height of its end."""
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
    """The centres of boxes near the wanted places, in rising order, without overlaps and in [0, 1] if they fit.

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
