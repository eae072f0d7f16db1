"""Made-up points, every plot, and what the tests of plots read from their files."""

import itertools
import random
from xml.etree import ElementTree

from hypothesis import settings
from matplotlib.text import Text

from transformers_kad.recipes.evaluation.accuracy_plots import plot_accuracy_parameter, plot_accuracy_speed
from transformers_kad.recipes.evaluation.decoding_plots import plot_acceptance_lengths, plot_deferral_positions
from transformers_kad.recipes.evaluation.points import Point
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
