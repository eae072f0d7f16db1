"""Plots of speed against the draft length and the batch size, and of the growth of costs, as PNG and SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plot_style import PathStem, group_style, matplotlib_style, new_figure, save_figure, wrap_label
from .methods import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]


def plot_draft_lengths(rows: Sequence[Row], path_stem: PathStem, *, title: str = "") -> list[Path]:
    """Plot the speed relative to the base alone against the draft length, with the bounds, for one batch size.

    Methods that draft are lines with quartiles, and their bounds dashed lines of the same colour. The others are
    horizontal lines.

    Args:
        rows: from `make_rows`.
        path_stem: the files without their endings; missing folders are created.
        title: the heading.

    Returns:
        The PNG and the SVG file; none if no method drafts.
    """
    drafted = [row for row in rows if row["draft_length"] is not None and row["ratio"]]
    level = [row for row in rows if row["draft_length"] is None and row["ratio"]]
    if not drafted:
        return []
    with matplotlib_style():
        figure = new_figure(7.5, 4.4)
        axes = figure.add_axes((0.08, 0.12, 0.56, 0.8))
        axes.set(xlabel="draft length γ", ylabel="tokens/s, base alone = 1")
        axes.set_title(wrap_label(title, 60), loc="left")
        axes.set_xticks(sorted({row["draft_length"] for row in drafted}))
        for kind in dict.fromkeys(row["kind"] for row in drafted):
            own = sorted((row for row in drafted if row["kind"] == kind), key=lambda row: row["draft_length"])
            _line(axes, [row["draft_length"] for row in own], own)
        for row in level:
            style = _style(row["kind"])
            axes.axhline(
                row["ratio"][1], color=style.color, linestyle=style.line_style, linewidth=1, label=row["label"]
            )
        _finish(axes)
        return save_figure(figure, path_stem)


def plot_batch_sizes(rows: Sequence[Row], path_stem: PathStem, *, title: str = "") -> list[Path]:
    """Plot the speed relative to the base alone at the same batch size against the batch size, a line per method.

    Methods that draft are shown with their bounds.

    Returns:
        The PNG and the SVG file; none if only one batch size was measured.
    """
    sizes = sorted({row["batch_size"] for row in rows if row["ratio"]})
    if len(sizes) < 2:
        return []
    with matplotlib_style():
        figure = new_figure(7.5, 4.4)
        axes = figure.add_axes((0.08, 0.12, 0.56, 0.8))
        axes.set(xlabel="batch size", ylabel="tokens/s, base alone at the same batch size = 1")
        axes.set_title(wrap_label(title, 60), loc="left")
        _logarithmic(axes, sizes)
        for at, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = [row for row in rows if row["method"] == method and row["ratio"]]
            if len(own) > 1:
                own.sort(key=lambda row: row["batch_size"])
                _line(axes, [row["batch_size"] for row in own], own, at)
        _finish(axes)
        return save_figure(figure, path_stem)


def plot_growth(
    sizes: Sequence[int], values: Mapping[str, Sequence[float]], path_stem: PathStem, *, xlabel: str
) -> list[Path]:
    """Plot seconds against a size, both on logarithmic axes, with one line for each method.

    Args:
        sizes: the sizes in rising order.
        values: for each label, the seconds at each size.
        path_stem: the files without their endings; missing folders are created.
        xlabel: the label of the horizontal axis.

    Returns:
        The PNG and the SVG file.
    """
    with matplotlib_style():
        figure = new_figure(7.5, 4.4)
        axes = figure.add_axes((0.1, 0.12, 0.54, 0.8))
        axes.set(xlabel=xlabel, ylabel="seconds", yscale="log")
        from matplotlib.ticker import FuncFormatter  # noqa: PLC0415

        axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, place: f"{seconds:g}"))
        _logarithmic(axes, sizes)
        for at, (label, seconds) in enumerate(values.items()):
            style = group_style(at)
            axes.plot(sizes, seconds, marker=style.marker, color=style.color, linestyle=style.line_style, label=label)
        _finish(axes, zero=False)
        return save_figure(figure, path_stem)


def _style(kind: str) -> Any:
    return group_style(list(KINDS).index(kind))


def _line(axes: "Axes", xs: Sequence[int], rows: Sequence[Row], at: int | None = None) -> None:
    """Draw a method's ratios with their quartiles, and its bounds."""
    style = _style(rows[0]["kind"]) if at is None else group_style(at)
    label = KINDS[rows[0]["kind"]].label if at is None else rows[0]["label"]
    lows, middles, highs = zip(*(row["ratio"] for row in rows), strict=True)
    axes.plot(xs, middles, marker=style.marker, color=style.color, linestyle="-", label=wrap_label(label, 44))
    axes.vlines(xs, lows, highs, style.color, linewidth=0.8)
    bounds = [row["bound"] for row in rows]
    if KINDS[rows[0]["kind"]].speculative and None not in bounds:
        axes.plot(xs, bounds, marker=style.marker, markersize=3, color=style.color, linestyle="--", linewidth=0.9)


def _logarithmic(axes: "Axes", sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
    axes.xaxis.minorticks_off()


def _finish(axes: "Axes", *, zero: bool = True) -> None:
    """Add the legend beside the plot. `zero` starts the vertical axis at 0 and explains the dashed bounds."""
    handles, labels = axes.get_legend_handles_labels()
    if zero:
        from matplotlib.lines import Line2D  # noqa: PLC0415

        axes.set_ylim(bottom=0)
        handles.append(Line2D([], [], color="0.35", linestyle="--", linewidth=0.9))
        labels.append("dashed: the bound")
    axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5))
