"""What holds for every plot: files, style, title, margins, and groups that differ without colour."""

import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread
from plot_cases import ALL, assert_says

from transformers_kad.recipes.plot_style import group_style


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_files_are_written_where_asked(tmp_path, plot):
    stem = tmp_path / "new folder" / "threshold_0.4"
    paths = plot(stem)
    assert paths == [tmp_path / "new folder" / f"threshold_0.4.{ending}" for ending in ("png", "svg")]
    assert sorted(stem.parent.iterdir()) == sorted(paths)
    assert imread(paths[0]).std() > 0.05
    assert ElementTree.parse(paths[1]).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_equal_inputs_give_equal_files_whatever_the_users_style(tmp_path, plot):
    first = [path.read_bytes() for path in plot(tmp_path / "first")]
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.facecolor": "red"}):
        second = [path.read_bytes() for path in plot(tmp_path / "second")]
        assert matplotlib.rcParams["font.size"] == 20
    assert first == second


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_a_title_is_shown_as_it_is(tmp_path, plot):
    title = "Costs $5 & <b>_x_</b>, α^2 $"
    assert_says(plot(tmp_path / "plot", title=title), title)


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_nothing_is_cut_off(tmp_path, plot):
    """The margin of the picture is empty on all sides."""
    pixels = imread(plot(tmp_path / "plot", title="A title " * 30)[0])[..., :3]
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert np.all(edge == 1)


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch, plot):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[eval\]"'):
        plot(tmp_path / "plot")


def test_pyplot_is_not_touched(tmp_path):
    import matplotlib.pyplot as plt  # noqa: PLC0415

    for name, plot in ALL.items():
        plot(tmp_path / name)
    assert plt.get_fignums() == []


def test_groups_are_told_apart_without_colour():
    assert len({group_style(at).marker for at in range(12)}) == 12
    assert len({(group_style(at).marker, str(group_style(at).line_style)) for at in range(60)}) == 60
    assert all(group_style(at).line_style != group_style(at + 1).line_style for at in range(12))
