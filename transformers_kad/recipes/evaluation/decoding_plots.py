"""Plots of what happened while texts were decoded, one panel for each method, as PNG and SVG."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..plot_style import (
    PathStem,
    matplotlib_style,
    new_figure,
    percent_axis,
    save_figure,
    whole_number_axis,
    wrap_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_acceptance_lengths(
    histograms: Mapping[str, Sequence[int]], path_stem: PathStem, *, title: str = ""
) -> list[Path]:
    """Plot the number of accepted draft tokens per round and its mean, in one panel for each method.

    A method that drafted nothing is left out, and a note names it.

    Args:
        histograms: for each method, entry k is the number of rounds that emitted k draft tokens.
        path_stem: the files without their endings; missing folders are created.
        title: the heading.

    Returns:
        The PNG and the SVG file.

    Raises:
        ValueError: no method drafted anything, or a count is negative.
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
        whole_number_axis(panels[0], 8)
        panels[0].set(xlim=(-0.7, longest - 0.3), ylim=(0, 1.08 * highest))
        percent_axis(panels[0])
        _add_notes(figure, {"Left out, nothing was drafted": [m for m in histograms if m not in shown]})
        return save_figure(figure, path_stem)


def plot_deferral_positions(
    masses: Mapping[str, Sequence[float | None]],
    path_stem: PathStem,
    *,
    title: str = "",
    counts: Mapping[str, Sequence[int]] | None = None,
) -> list[Path]:
    """Plot the mean deferral mass D at each position of the text, in one panel for each method.

    A method whose rule has no deferral mask has no D. It is left out, and a note names it.

    Args:
        masses: for each method, the mean D at positions 0, 1, ... of the generated text; None if it is not known.
        path_stem: the files without their endings; missing folders are created.
        title: the heading.
        counts: for each method, the number of texts that reach each position. They are shown behind the masses, which
            are noisier the fewer texts there are.

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
        whole_number_axis(panels[0], 5)
        panels[0].set(xlim=(-0.02 * longest - 0.5, 1.02 * longest - 0.5), ylim=(0, 1.05))
        notes = {"Left out, no deferral mass": [method for method in masses if method not in shown]}
        if counts is not None:
            notes["Grey"] = [f"texts that reach the position, 1 on the axis = {most:,}"]
        _add_notes(figure, notes)
        return save_figure(figure, path_stem)


def _panels(headings: Mapping[str, str], title: str, xlabel: str, ylabel: str) -> "tuple[Figure, list[Axes]]":
    """A figure with one small plot for each method on common axes. `headings` are the lines below their names."""
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
    """Write notes below the plot, at least one line for each heading that has entries."""
    width = int(figure.get_figwidth() * 15)
    lines = [wrap_label(f"{heading}: {', '.join(entries)}.", width) for heading, entries in notes.items() if entries]
    if lines:
        figure.text(0.01, -0.1 / figure.get_figheight(), "\n".join(lines), va="top")
