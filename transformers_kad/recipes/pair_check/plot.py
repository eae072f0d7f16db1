"""The plot of a check, as PNG and SVG: what each parameter hands over, and where the base is sure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..plot_style import PathStem, group_style, matplotlib_style, new_figure, percent_axis, save_figure
from .verdict import MOSTLY_PROXY, OFTEN_FAILS


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
    figures, recommended = report["figures"], report["recommended"]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for rule in figures["rules"]:
        if rule["deferral_mass"] is not None:
            groups.setdefault(rule["method"].split()[0], []).append(rule)
    with matplotlib_style():
        figure = new_figure(8.6, 3.6, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for index, (name, rules) in enumerate(groups.items()):
            ordered = sorted(rules, key=lambda rule: rule["deferral_mass"])
            style = group_style(index)
            xs, ys = ([rule[key] for rule in ordered] for key in ("deferral_mass", "acceptance"))
            left.plot(
                xs, ys, marker=style.marker, linestyle=style.line_style, color=style.color, label=name, markersize=4
            )
        at = (recommended["deferral_mass"], recommended["acceptance"])
        left.plot(*at, marker="o", markersize=12, markerfacecolor="none", markeredgecolor="black", linestyle="none")
        left.annotate(
            f"start: {recommended['method']}",
            at,
            xytext=(12, -22),
            textcoords="offset points",
            va="top",
            arrowprops={"arrowstyle": "-", "color": "0.4"},
        )
        for limit, label in ((OFTEN_FAILS, "doubtful"), (MOSTLY_PROXY, "bad")):
            left.axvline(limit, color="0.6", linestyle=":", zorder=0)
            left.text(limit, 1.01, label, transform=left.get_xaxis_transform(), ha="center", color="0.3")
        left.set(xlabel="deferral mass: share of the tokens owed to the proxy", ylabel="acceptance of drafted tokens")
        left.set_xlim(-0.02, 1.02)
        left.set_ylim(top=1.005)
        percent_axis(left)
        left.legend(loc="lower right", fontsize=7)
        histogram, split = figures["confidence_histogram"], figures["confidence_split"]
        width = 1 / len(histogram)
        right.bar(
            [(at + 0.5) * width for at in range(len(histogram))], histogram, width=width, color=group_style(0).color
        )
        right.axvline(split, color="black", linestyle="--")
        right.text(split, 1.01, f"split {split:.2f}", transform=right.get_xaxis_transform(), ha="center")
        right.set(
            xlabel="probability that the base gives a token", ylabel="share of the base's probability", xlim=(0, 1)
        )
        percent_axis(right)
        figure.suptitle(f"Verdict: {report['verdict']}", x=0.01, ha="left", fontsize=10)
        return save_figure(figure, path_stem)
