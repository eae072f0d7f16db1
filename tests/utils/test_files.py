"""`write_whole`: a file is as before or whole, whatever it is and whoever else writes it."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from transformers_kad.utils.files import write_whole


def test_a_file_is_written_through_a_link_and_keeps_its_permissions(tmp_path):
    target, link = tmp_path / "far" / "page.html", tmp_path / "page.html"
    target.parent.mkdir()
    link.symlink_to(Path("far") / "page.html")
    write_whole(link, "new")  # where the link led to nothing yet
    target.chmod(0o640)
    write_whole(link, "newer\n")
    assert link.is_symlink()
    assert target.read_bytes() == b"newer\n"
    assert target.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in target.parent.iterdir()] == ["page.html"]


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_whole(tmp_path / "whole", "new")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_device_stays_one_and_its_error_is_the_systems(tmp_path):
    device = tmp_path / "full"
    device.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_whole(device, "text")
    assert stat.S_ISCHR(device.stat().st_mode)
    ours, theirs = os.openpty()
    write_whole(Path(os.ttyname(theirs)), "text")
    assert os.read(ours, 100) == b"text"


@pytest.mark.parametrize("name", ["link", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_in_a_file_keeps_what_is_written_before_and_behind(tmp_path, capfd, name):
    (tmp_path / "link").symlink_to("/dev/stdout")
    print("before")
    write_whole(tmp_path / name, "page\n")
    print("behind")
    assert capfd.readouterr().out == "before\npage\nbehind\n"


def test_an_open_pipe_gets_the_text():
    ours, theirs = os.pipe()
    write_whole(Path(f"/dev/fd/{theirs}"), "page\n")
    assert os.read(ours, 100) == b"page\n"


def test_two_threads_that_write_one_file_leave_one_of_both(tmp_path):
    texts = [letter * 100_000 for letter in "abcd"]
    for _ in range(20):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda text: write_whole(tmp_path / "page", text), texts))
        assert (tmp_path / "page").read_text() in texts
    assert [entry.name for entry in tmp_path.iterdir()] == ["page"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    write_whole(tmp_path / "page", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "page", "new \ud83d")
    assert (tmp_path / "page").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page"]


def test_a_folder_that_is_missing_is_named_with_the_file(tmp_path):
    """And not the second file, which the text goes to first."""
    link = tmp_path / "page.html"
    link.symlink_to(tmp_path / "gone" / "page.html")
    with pytest.raises(FileNotFoundError, match=r"page\.html' can't be written: there is no folder '.*gone'"):
        write_whole(link, "new")
