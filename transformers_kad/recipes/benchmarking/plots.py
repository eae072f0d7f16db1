"""Plots of speed, as PNG and SVG: against the draft length, the batch size, and what a cost grows with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.plots import PathStem, group_style, matplotlib_style, new_figure, save_figure, wrap_label
from .methods import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]


def plot_draft_lengths(rows: Sequence[Row], path_stem: PathStem, *, title: str = "") -> list[Path]:
    """Plot tokens/s over the base alone against the draft length, with the bound of each, for one batch size.

    Kinds with draft lengths are lines with quartiles, their bounds dashed lines of the same colour; kinds without are
    horizontal.

    Args:
        rows: from `make_rows`.
        path_stem: the files without their endings; missing folders are made.
        title: a heading.

    Returns:
        The PNG and the SVG file; none where nothing was drafted.
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
    """Plot tokens/s over the base alone at the same batch size against the batch size, a line a method.

    Methods that draft are shown with their bounds.

    Returns:
        The PNG and the SVG file; none where only one batch size was measured.
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
    """Plot seconds against a size, both logarithmic, a line a method.

    Args:
        sizes: the sizes, rising.
        values: by label, seconds at each size.
        path_stem: the files without their endings; missing folders are made.
        xlabel: what the sizes are.

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
    """A method's ratios with their quartiles, and its bounds."""
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
    """The legend beside the plot; `zero`: ratios begin at 0, and dashed lines are bounds."""
    handles, labels = axes.get_legend_handles_labels()
    if zero:
        from matplotlib.lines import Line2D  # noqa: PLC0415

        axes.set_ylim(bottom=0)
        handles.append(Line2D([], [], color="0.35", linestyle="--", linewidth=0.9))
        labels.append("dashed: the bound")
    axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5))
