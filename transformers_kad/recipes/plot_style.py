"""The style that all plots share. Plots need `pip install -e ".[eval]"`.

Plots can be read in black and white: methods differ in label, marker and line style as well as in colour. Equal inputs
give equal files, whatever matplotlib style the user has set. The text of an SVG is stored as text.
"""

import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathStem = str | os.PathLike[str]

# Okabe and Ito, "Color Universal Design", 2008, without the yellow, which is hard to see on white.
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
    "text.parse_math": False,  # dollar signs in labels are not formulas
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


class GroupStyle(NamedTuple):
    """The marker, line style and colour of a group."""

    marker: str
    line_style: Any
    color: str


def group_style(index: int) -> GroupStyle:
    """The style of a group by its index: 12 groups differ in their markers, and 60 in marker and line style."""
    return GroupStyle(MARKERS[index % 12], LINE_STYLES[index % 5], COLORS[index % 7])


@contextmanager
def matplotlib_style() -> Iterator[None]:
    """Use matplotlib's defaults and `_STYLE`, and restore the user's settings afterwards."""
    try:
        from matplotlib import style  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install -e ".[eval]"') from error
    with style.context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float, layout: Any = None) -> "Figure":
    """A figure, with its size in inches, that pyplot does not know and no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def wrap_label(text: str, width: int) -> str:
    """A label broken into lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(text, width))


def set_limits(axes: "Axes", xs: Sequence[float], ys: Sequence[float]) -> None:
    """Set the limits of the axes, with a margin for labels around the points."""
    for values, set_limits in ((xs, axes.set_xlim), (ys, axes.set_ylim)):
        low, high = min(values), max(values)
        margin = 0.1 * (high - low) if high > low else 0.5 * abs(high) or 0.5
        set_limits(low - margin, high + margin)


def percent_axis(axes: "Axes") -> None:
    """Show the values of the vertical axis as percentages."""
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415

    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def whole_number_axis(axes: "Axes", most: int) -> None:
    """Put at most `most` ticks on the horizontal axis, at whole numbers."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True))


def save_figure(figure: "Figure", path_stem: PathStem) -> list[Path]:
    """Write a figure as PNG and SVG, and return both paths."""
    paths = [Path(f"{os.fspath(path_stem)}.{ending}") for ending in ("png", "svg")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
