"""The file that a stopped run goes on with."""

import json
import os
import threading
from pathlib import Path

import pytest
from run_command import SECONDS

from transformers_kad.recipes.resumable import JsonLinesPart, JsonLinesStore

SETTINGS = {"seed": 0, "rule": "dual", "sizes": (1, 2)}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_records_are_on_the_disk_at_once_and_read_again(tmp_path):
    path = tmp_path / "made" / "results.jsonl"
    records = [{"text": "a\nb\u2028c"}, {"text": "é", "tokens": 3}]
    with JsonLinesStore(path, SETTINGS) as store:
        assert store.records == []
        for count, record in enumerate(records, start=1):
            store.append(record)
            assert lines(path) == records[:count]
    with JsonLinesStore(path, SETTINGS) as store:
        assert store.records == records
        assert store.torn is None
        store.append({"third": True})
    assert lines(path) == [*records, {"third": True}]


@pytest.mark.parametrize("torn", ['{"line": 2, "te', "{", '{"line": 2}', '{"text": "\u00e9'])
def test_a_torn_last_line_is_removed_and_reported(tmp_path, torn):
    """Even a whole object: without its newline nobody knows that it is whole."""
    path = tmp_path / "results.jsonl"
    with JsonLinesStore(path, SETTINGS) as store:
        store.append({"line": 1})
    cut = torn.encode()[:-1] if torn.endswith("\u00e9") else torn.encode()  # in the middle of a character
    path.write_bytes(path.read_bytes() + cut)
    with JsonLinesStore(path, SETTINGS) as store:
        assert store.torn.startswith(torn[:5])
        assert store.records == [{"line": 1}]
        store.append({"line": 2})
    assert lines(path) == [{"line": 1}, {"line": 2}]


def test_other_settings_are_refused_with_the_difference(tmp_path):
    path = tmp_path / "results.jsonl"
    with JsonLinesStore(path, SETTINGS) as store:
        store.append({"line": 1})
    path.write_bytes(path.read_bytes() + b'{"li')  # not touched either
    with pytest.raises(ValueError, match="seed is 0 there and 1 here; new is None there and 2 here"):
        JsonLinesStore(path, {**SETTINGS, "seed": 1, "new": 2})
    assert path.read_text() == '{"line": 1}\n{"li'


def test_results_of_unknown_settings_are_left_alone(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"line": 1}\n')
    with pytest.raises(ValueError, match=r"no 'results\.jsonl\.settings\.json' with their settings beside it"):
        JsonLinesStore(path, SETTINGS)
    assert path.read_text() == '{"line": 1}\n'


@pytest.mark.parametrize("line", ["{broken", "[1, 2]"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    with JsonLinesStore(path, SETTINGS):
        pass
    path.write_text('{"line": 1}\n' + line + '\n{"line": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 .*" + line[:2].replace("[", r"\[")):
        JsonLinesStore(path, SETTINGS)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got the folder"):
        JsonLinesStore(tmp_path, SETTINGS)


def test_two_runs_at_once_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    with JsonLinesStore(path, SETTINGS), pytest.raises(ValueError, match="Another run is writing to"):
        JsonLinesStore(path, SETTINGS)
    with JsonLinesStore(path, SETTINGS) as store:
        assert store.records == []


def test_settings_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"line": 1}\n')
    (tmp_path / "results.jsonl.settings.json").write_text("{torn")
    with pytest.raises(ValueError, match=r"results\.jsonl\.settings\.json' is not a JSON object"):
        JsonLinesStore(path, SETTINGS)


def test_a_run_that_failed_before_its_first_result_binds_nobody(tmp_path):
    path = tmp_path / "results.jsonl"
    with JsonLinesStore(path, {"seed": 0}):
        pass
    with JsonLinesStore(path, {"seed": 1}) as store:
        store.append({"line": 1})
    with pytest.raises(ValueError, match="seed is 1 there and 0 here"):
        JsonLinesStore(path, {"seed": 0})


def test_a_run_beside_another_leaves_its_settings_alone(tmp_path):
    path = tmp_path / "results.jsonl"
    with JsonLinesStore(path, {"seed": 0}) as first:
        with pytest.raises(ValueError, match="Another run is writing"):
            JsonLinesStore(path, {"seed": 1})
        first.append({"line": 1})
    with JsonLinesStore(path, {"seed": 0}) as again:
        assert again.records == [{"line": 1}]


# --- Files that are no regular files, and links -----------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ['{"a":' * 5000 + "1" + "}" * 5000, '{"a": 1, "a": 2}', '{"a": ' + "1" * 5000 + "}", "\xff"]
)
def test_a_line_that_json_cannot_be_read_from_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    with JsonLinesStore(path, SETTINGS):
        pass
    path.write_bytes(b'{"line": 1}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"results\.jsonl', line 2 "):
        JsonLinesStore(path, SETTINGS)


@pytest.mark.parametrize("settings", ['{"seed": 0, "seed": 0}', "[]", "[" * 5000, '"caf\xe9"'])
def test_settings_that_are_no_plain_object_are_named(tmp_path, settings):
    path = tmp_path / "results.jsonl"
    path.write_text('{"line": 1}\n')
    (tmp_path / "results.jsonl.settings.json").write_bytes(settings.encode("latin-1"))
    with pytest.raises(ValueError, match=r"results\.jsonl\.settings\.json' is not a JSON object"):
        JsonLinesStore(path, SETTINGS)


def test_half_a_character_is_written_and_read_again(tmp_path):
    """A lone surrogate can't be written as UTF-8, only as JSON's escape."""
    path, record = tmp_path / "results.jsonl", {"caf\ud83d": ["\udc80", "é😀", '"\\ud83d']}
    with JsonLinesStore(path, SETTINGS) as store:
        store.append(record)
    with JsonLinesStore(path, SETTINGS) as store:
        assert store.records == [record]


def test_a_link_and_the_file_that_it_leads_to_are_one_store(tmp_path):
    target, link = tmp_path / "far" / "results.jsonl", tmp_path / "link.jsonl"
    target.parent.mkdir()
    link.symlink_to(target)
    with JsonLinesStore(link, SETTINGS) as store:
        store.append({"line": 1})
    assert link.is_symlink()
    with JsonLinesStore(target, SETTINGS) as store:
        assert store.records == [{"line": 1}]
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        JsonLinesStore(link, {**SETTINGS, "seed": 1})


def test_a_device_is_written_to_and_never_read(tmp_path, monkeypatch):
    """/dev/full gives zeros without end to whoever reads it, and refuses what is written."""
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read"))
    (tmp_path / "results.jsonl").symlink_to("/dev/full")  # by a link, so that a fault can't harm the device
    store = JsonLinesStore(tmp_path / "results.jsonl", SETTINGS)
    with pytest.raises(OSError, match="No space left"):
        store.append({"line": 1})
    with pytest.raises(OSError, match="No space left"):  # what is still to be written
        store.__exit__()
    assert not list(Path("/dev").glob("*.settings.json"))


def test_a_terminal_gets_every_record():
    ours, theirs = os.openpty()
    with JsonLinesStore(os.ttyname(theirs), SETTINGS) as store:
        assert (store.records, store.torn) == ([], None)
        store.append({"line": 1})
    assert os.read(ours, 100) == b'{"line": 1}\r\n'


def test_a_pipe_gets_every_record(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    with JsonLinesStore(pipe, SETTINGS) as store:
        store.append({"line": 1})
        store.append({"line": 2})
    reader.join(timeout=SECONDS)
    assert got == ['{"line": 1}\n{"line": 2}\n']
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


# --- Several processes --------------------------------------------------------------------------------------------


def write(path, main, parts, *, complete=True):
    """A run of several processes: the lines that the main one has written, and those of others by their index."""
    with JsonLinesStore(path, SETTINGS) as store:
        for line in main:
            store.append({"line": line})
        for process, written in parts.items():
            with JsonLinesPart(path, process) as part:
                for line in written:
                    part.append({"line": line})
        if complete:
            store.complete()


def test_the_records_of_all_processes_are_put_in_order(tmp_path):
    path = tmp_path / "results[1].jsonl"
    write(path, [1, 4, 11], {1: [2, 10], 12: [3]})
    assert lines(path) == [{"line": line} for line in (1, 2, 3, 4, 10, 11)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, f"{path.name}.settings.json"]


def test_a_stopped_run_of_several_processes_is_gone_on_with(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path, [1], {1: [2, 5], 2: [3]}, complete=False)
    part = Path(f"{path}.part1")
    part.write_text(part.read_text() + '{"line": 8')
    with JsonLinesStore(path, SETTINGS) as store:
        assert sorted(record["line"] for record in store.records) == [1, 2, 3, 5]
        assert store.torn == '{"line": 8'
        store.append({"line": 4})
        store.complete()
    assert lines(path) == [{"line": line} for line in (1, 2, 3, 4, 5)]


def test_a_stop_before_a_part_is_removed_repeats_no_record(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path, [1], {1: [2, 3]}, complete=False)
    part = Path(f"{path}.part1")
    content = part.read_bytes()
    with JsonLinesStore(path, SETTINGS):
        part.write_bytes(content)
    with JsonLinesStore(path, SETTINGS) as store:
        assert store.records == [{"line": 1}, {"line": 2}, {"line": 3}]


def test_a_part_alone_holds_results_of_its_settings(tmp_path):
    """The main process may have been stopped before its first answer."""
    path = tmp_path / "results.jsonl"
    write(path, [], {1: [2]}, complete=False)
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        JsonLinesStore(path, {**SETTINGS, "seed": 1})
    with JsonLinesStore(path, SETTINGS) as store:
        assert store.records == [{"line": 2}]


def test_a_file_in_order_is_left_as_it_is(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path, [1, 2], {}, complete=False)
    before = path.stat().st_ino
    with JsonLinesStore(path, SETTINGS) as store:
        store.append({"line": 3})
        store.complete()
    assert path.stat().st_ino == before


def test_a_device_has_nothing_to_complete():
    with JsonLinesStore(os.devnull, SETTINGS) as store:
        store.append({"line": 1})
        store.complete()


# --- Damaged files ------------------------------------------------------------------------------------------------


def test_nothing_is_removed_from_a_file_that_is_refused(tmp_path):
    """The incomplete last line stays if an earlier line can't be read."""
    path = tmp_path / "results.jsonl"
    with JsonLinesStore(path, SETTINGS):
        pass
    path.write_text('{"line": 1}\n{broken\n{"line": 3')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        JsonLinesStore(path, SETTINGS)
    assert path.read_text() == '{"line": 1}\n{broken\n{"line": 3'


def test_lines_that_end_with_a_carriage_return_alone_are_no_incomplete_line(tmp_path):
    path = tmp_path / "results.jsonl"
    with JsonLinesStore(path, SETTINGS):
        pass
    path.write_bytes(b'{"line": 1}\r{"line": 2}\r')
    with pytest.raises(ValueError, match="carriage return alone"):
        JsonLinesStore(path, SETTINGS)
    assert path.read_bytes() == b'{"line": 1}\r{"line": 2}\r'


def test_records_have_the_fields_that_are_asked_for(tmp_path):
    path = tmp_path / "results.jsonl"
    with JsonLinesStore(path, SETTINGS) as store:
        store.append({"line": 1})
        store.append({"line": "2"})
    with pytest.raises(ValueError, match=r"results\.jsonl', line 2: 'line' is '2', not of type int"):
        JsonLinesStore(path, SETTINGS, fields={"line": (int,)})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ('{"line": [1]}\n', r"part1', line 1: 'line' is \[1\]"),
        ('{"line": 1, "x": 2}\n', "part1', line 1 is not equal"),
    ],
)
def test_a_part_whose_lines_do_not_belong_is_refused_and_kept(tmp_path, part, message):
    path = tmp_path / "results.jsonl"
    write(path, [1], {}, complete=False)
    Path(f"{path}.part1").write_text(part)
    with pytest.raises(ValueError, match=message):
        JsonLinesStore(path, SETTINGS)
    assert Path(f"{path}.part1").read_text() == part
    assert lines(path) == [{"line": 1}]


def test_a_line_that_is_twice_in_a_part_is_taken_over_once(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path, [1], {1: [2, 2, 3]}, complete=False)
    with JsonLinesStore(path, SETTINGS) as store:
        assert [record["line"] for record in store.records] == [1, 2, 3]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("0.5", "0.6"), "line 1 is not as it was written"),
        (lambda text: text + text.splitlines(keepends=True)[0], "line 3 is a copy of line 1"),
        (lambda text: text.replace("check", "chess"), "line 1 is not as it was written"),
    ],
)
def test_a_checked_line_that_was_changed_is_found(tmp_path, damage, message):
    path = tmp_path / "results.jsonl"
    records = [{"seconds": 0.5, "sizes": [1, 2]}, {"seconds": 0.75}]
    with JsonLinesStore(path, SETTINGS, checked=True) as store:
        for record in records:
            store.append(record)
    with JsonLinesStore(path, SETTINGS, checked=True) as store:
        assert store.records == records
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message):
        JsonLinesStore(path, SETTINGS, checked=True)


def test_a_difference_of_a_huge_setting_is_shortened(tmp_path):
    path = tmp_path / "results.jsonl"
    with JsonLinesStore(path, {"seed": "x" * 10_000}) as store:
        store.append({"line": 1})
    with pytest.raises(ValueError, match="seed is 'xxx") as error:
        JsonLinesStore(path, {"seed": 0})
    assert len(str(error.value)) < 1000
