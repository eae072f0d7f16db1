"""The plot of a check, as PNG and SVG: what each parameter hands over, and where the base is sure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plot_style import PathStem, group_style, matplotlib_style, new_figure, percent_axis, save_figure
from .verdict import MOSTLY_PROXY, OFTEN_FAILS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_check(report: Mapping[str, Any], path_stem: PathStem) -> list[Path]:
    """Plot acceptance against deferral mass for every rule, and the distribution of the base's probabilities.

    Args:
        report: a report with figures.
        path_stem: the files without their endings.

    Returns:
        The PNG and the SVG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with matplotlib_style():
        figure = new_figure(8.6, 3.6, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_rules(left, report["figures"]["rules"], report["recommended"])
        _draw_confidence(right, report["figures"]["confidence_histogram"], report["figures"]["confidence_split"])
        figure.suptitle(f"Verdict: {report['verdict']}", x=0.01, ha="left", fontsize=10)
        return save_figure(figure, path_stem)


def _draw_rules(axes: "Axes", rules: Sequence[Mapping[str, Any]], recommended: Mapping[str, Any]) -> None:
    """Acceptance against deferral mass, with the recommended rule and the limits of its mass."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for rule in rules:
        if rule["deferral_mass"] is not None:
            groups.setdefault(rule["method"].split()[0], []).append(rule)
    for index, (name, group) in enumerate(groups.items()):
        ordered = sorted(group, key=lambda rule: rule["deferral_mass"])
        style = group_style(index)
        xs, ys = ([rule[key] for rule in ordered] for key in ("deferral_mass", "acceptance"))
        axes.plot(xs, ys, marker=style.marker, linestyle=style.line_style, color=style.color, label=name, markersize=4)
    at = (recommended["deferral_mass"], recommended["acceptance"])
    axes.plot(*at, marker="o", markersize=12, markerfacecolor="none", markeredgecolor="black", linestyle="none")
    axes.annotate(
        f"start: {recommended['method']}",
        at,
        xytext=(12, -22),
        textcoords="offset points",
        va="top",
        arrowprops={"arrowstyle": "-", "color": "0.4"},
    )
    for limit, label in ((OFTEN_FAILS, "doubtful"), (MOSTLY_PROXY, "bad")):
        axes.axvline(limit, color="0.6", linestyle=":", zorder=0)
        axes.text(limit, 1.01, label, transform=axes.get_xaxis_transform(), ha="center", color="0.3")
    axes.set(xlabel="deferral mass: share of the tokens owed to the proxy", ylabel="acceptance of drafted tokens")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(top=1.005)
    percent_axis(axes)
    axes.legend(loc="lower right", fontsize=7)


def _draw_confidence(axes: "Axes", histogram: Sequence[float], split: float) -> None:
    """The base's probability mass by how likely a token is, with the threshold that separates sure from unsure."""
    width = 1 / len(histogram)
    centres = [(at + 0.5) * width for at in range(len(histogram))]
    axes.bar(centres, histogram, width=width, color=group_style(0).color)
    axes.axvline(split, color="black", linestyle="--")
    axes.text(split, 1.01, f"split {split:.2f}", transform=axes.get_xaxis_transform(), ha="center")
    axes.set(xlabel="probability that the base gives a token", ylabel="share of the base's probability", xlim=(0, 1))
    percent_axis(axes)
