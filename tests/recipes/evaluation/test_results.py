"""Results survive stops: nothing twice, nothing lost, nothing of another configuration."""

import json
import re

import pytest

from transformers_kad.recipes.evaluation.results import ResultsFolder, config_hash

RULED = {"rounds": 2, "drafted": 4, "accepted": 3, "acceptance_histogram": [1, 2], "deferral_mass": 0.5}
CONFIG = {"task": "tiny", "method": "kad-dual", "shared": {"seed": 0}, "own": {"threshold": 0.4}}


def lines(number, size=2, config=CONFIG, **more):
    return [
        {
            "task": config["task"],
            "method": config["method"],
            "sample": 0,
            "batch": f"{config['task']}/{config['method']}/0/{number}",
            "batch_number": number,
            "batch_size": size,
            "row": row,
            "config": config_hash(config),
            "instance": f"{number}.{row}",
            "prediction": "1",
            "answer": "1",
            "correct": True,
            "error": None,
            "tokens": 3,
            "seconds": 0.5,
            **more,
        }
        for row in range(size)
    ]


def write(path, process, *batches):
    with ResultsFolder(path, process) as folder:
        for batch in batches:
            folder.append(batch)


def keys(path):
    return [(r["batch_number"], r["row"]) for r in ResultsFolder(path).read()]


def opened(path, *configs):
    with ResultsFolder(path) as folder:
        mended = folder.prepare()
        folder.describe(configs or [CONFIG])
    return mended


def test_files_of_all_processes_are_merged_in_one_order(tmp_path):
    opened(tmp_path)
    write(tmp_path, 1, lines(1), lines(10))
    write(tmp_path, 0, lines(2), lines(0))
    assert keys(tmp_path) == []
    mended = opened(tmp_path)
    assert (mended.torn, mended.incomplete) == ((), ())
    assert keys(tmp_path) == [(number, row) for number in (0, 1, 2, 10) for row in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "configs.json", "results.jsonl"]


def test_a_stop_between_merging_and_clearing_up_repeats_nothing(tmp_path):
    opened(tmp_path)
    write(tmp_path, 0, lines(0))
    part = (tmp_path / "results.0.jsonl").read_bytes()
    opened(tmp_path)
    (tmp_path / "results.0.jsonl").write_bytes(part)
    opened(tmp_path)
    assert keys(tmp_path) == [(0, 0), (0, 1)]


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_torn_batch_goes_as_a_whole_and_is_reported(tmp_path, cut):
    opened(tmp_path)
    write(tmp_path, 0, lines(0), lines(1, size=3))
    part = tmp_path / "results.0.jsonl"
    part.write_bytes(part.read_bytes()[:-cut])
    mended = opened(tmp_path)
    assert keys(tmp_path) == [(0, 0), (0, 1)]
    assert mended.incomplete == ("tiny/kad-dual/0/1",)
    assert len(mended.torn) == 1
    assert mended.torn[0].startswith('{"task": "tiny"')


def test_a_batch_that_is_made_again_behind_its_torn_beginning_counts_once(tmp_path):
    opened(tmp_path)
    write(tmp_path, 0, lines(0, size=3, run=1)[:2], lines(0, size=3, run=2))
    opened(tmp_path)
    assert [record["run"] for record in ResultsFolder(tmp_path).read()] == [2, 2, 2]


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        *((lambda line, key=key: without(line, key), f"no {key!r}") for key in lines(0)[0]),
        (lambda line: json.dumps(line | {"error": 404}), "'error' is 404"),
        (lambda line: json.dumps(line | {"row": "0"}), "'row' is '0'"),
        (lambda line: json.dumps(line | {"seconds": [1.0]}), "'seconds' is"),
        (lambda line: json.dumps(line | {"row": True}), "'row' is True"),
        (lambda line: json.dumps(line | {"seconds": float("nan")}), "'seconds' is nan"),
        (lambda line: json.dumps(line | {"tokens": -1}), "'tokens' is -1"),
        (lambda line: json.dumps(line | {"sample": 1}), "'batch' is 'tiny/kad-dual/0/2', not 'tiny/kad-dual/1/2'"),
        (lambda line: json.dumps(line | {"ended": "no"}), "'ended' is 'no'"),
        (lambda line: json.dumps(line | {"correct": None}), "'correct' is None, not true or false"),
        (lambda line: json.dumps(line | {"rounds": 2}), "no 'drafted'"),
        (lambda line: json.dumps(line | RULED | {"accepted": 9}), "'accepted' is 9, more than 'drafted', 4"),
        (lambda line: json.dumps(line | RULED | {"deferral_mass": 1.5}), "'deferral_mass' is 1.5, more than 1"),
        (json.dumps, None),
        (lambda line: json.dumps([line]), "not a JSON object"),
        (lambda line: "{", "not a JSON object"),
        (lambda line: '{"text": ' + "[" * 5000 + "]" * 5000 + "}", "not a JSON object"),
    ],
)
def test_a_line_that_is_no_result_is_named_with_file_and_number(tmp_path, faulty, message):
    """In the merged file and in that of a process."""
    opened(tmp_path)
    write(tmp_path, 0, lines(0), lines(1))
    opened(tmp_path)
    for name in ("results.jsonl", "results.1.jsonl"):
        whole = (tmp_path / "results.jsonl").read_text()
        good = [json.dumps(line) for line in lines(2)]
        (tmp_path / name).write_text("\n".join([good[0], faulty(lines(2)[1]), ""]))
        if message is None:
            opened(tmp_path)
        else:
            place = rf"{re.escape(name)}'?, line 2\b.*{re.escape(message)}"
            for refused in (lambda: opened(tmp_path), *([ResultsFolder(tmp_path).read] * (name == "results.jsonl"))):
                with pytest.raises(ValueError, match=place):
                    refused()
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / "results.jsonl").write_text(whole)


def without(line, key):
    return json.dumps({name: value for name, value in line.items() if name != key})


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a": 1}', '{"a": {"task": "tiny"}}', '{"a": ' + "[" * 5000 + "]" * 5000 + "}", "\udcff"]
)
def test_settings_that_are_none_are_named_with_their_file(tmp_path, text):
    opened(tmp_path)
    write(tmp_path, 0, lines(0))
    (tmp_path / "configs.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"configs\.json"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shared": {"seed": 1}}, "seed is 0 there and 1 here"),
        ({"own": {"threshold": 0.5}}, "threshold is 0.4 there and 0.5 here"),
        ({"method": "base", "shared": {"seed": 1}}, "'kad-dual' on 'tiny' under other settings: seed is 0 there"),
    ],
)
def test_results_under_other_settings_are_refused_with_the_difference(tmp_path, changed, message):
    opened(tmp_path)
    write(tmp_path, 0, lines(0))
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, {**CONFIG, **changed})
    assert keys(tmp_path) == [(0, 0), (0, 1)]


def test_another_method_has_settings_of_its_own_and_another_task_others_altogether(tmp_path):
    opened(tmp_path)
    write(tmp_path, 0, lines(0))
    opened(tmp_path, {**CONFIG, "method": "base", "own": {}}, {**CONFIG, "task": "svamp", "shared": {"seed": 1}})
    assert keys(tmp_path) == [(0, 0), (0, 1)]


def test_settings_without_a_result_bind_nobody(tmp_path):
    opened(tmp_path)
    other = {**CONFIG, "shared": {"seed": 1}}
    opened(tmp_path, other)
    assert list(ResultsFolder(tmp_path).configs().values()) == [other]


def test_failed_batches_are_kept_unless_they_are_to_be_tried_again(tmp_path):
    opened(tmp_path)
    write(tmp_path, 0, lines(0), lines(1, error="ValueError: too long"))
    opened(tmp_path)
    assert keys(tmp_path) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with ResultsFolder(tmp_path) as folder:
        assert folder.prepare(retry_failed=True).retried == ("tiny/kad-dual/0/1",)
    assert keys(tmp_path) == [(0, 0), (0, 1)]


def test_files_of_other_people_are_left_alone(tmp_path):
    opened(tmp_path)
    (tmp_path / "results.backup.jsonl").write_text("mine\n")
    opened(tmp_path)
    assert (tmp_path / "results.backup.jsonl").read_text() == "mine\n"


def test_half_a_character_does_not_stop_a_merge(tmp_path):
    opened(tmp_path)
    write(tmp_path, 0, lines(0, text="caf\ud83d"))
    opened(tmp_path)
    assert [record["text"] for record in ResultsFolder(tmp_path).read()] == ["caf\ud83d"] * 2


def test_what_is_appended_after_merging_is_not_lost(tmp_path):
    with ResultsFolder(tmp_path) as folder:
        folder.prepare()
        folder.describe([CONFIG])
        for number in range(3):
            folder.append(lines(number))
            folder.merge()
    assert keys(tmp_path) == [(number, row) for number in range(3) for row in (0, 1)]


def test_settings_may_be_described_one_by_one(tmp_path):
    other = {**CONFIG, "method": "proxy"}
    with ResultsFolder(tmp_path) as folder:
        folder.prepare()
        for config in (CONFIG, other):
            folder.describe([config])
            folder.append(lines(0, config=config))
    opened(tmp_path)
    assert list(ResultsFolder(tmp_path).configs().values()) == [CONFIG, other]


def test_results_that_no_settings_explain_are_refused(tmp_path):
    opened(tmp_path)
    write(tmp_path, 0, lines(0))
    opened(tmp_path)
    (tmp_path / "configs.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe"):
        opened(tmp_path)


def test_two_runs_at_once_are_refused(tmp_path):
    with ResultsFolder(tmp_path) as first, ResultsFolder(tmp_path) as second:
        first.prepare()
        with pytest.raises(ValueError, match="Another run is writing"):
            second.prepare()
    opened(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "here").write_text("")
    with pytest.raises(ValueError, match="got the file"):
        ResultsFolder(tmp_path / "here")


def test_the_hash_tells_configurations_apart_and_not_their_order():
    assert config_hash(CONFIG) == config_hash(dict(reversed(CONFIG.items())))
    assert config_hash(CONFIG) != config_hash({**CONFIG, "shared": {"seed": 1}})


def test_a_batch_of_a_billion_answers_is_interrupted_and_fills_no_memory(tmp_path):
    opened(tmp_path)
    write(tmp_path, 0, lines(0), lines(1, batch_size=10**9))
    assert opened(tmp_path).incomplete == ("tiny/kad-dual/0/1",)
    assert keys(tmp_path) == [(0, 0), (0, 1)]


def test_settings_that_do_not_have_their_hash_are_refused(tmp_path):
    opened(tmp_path)
    write(tmp_path, 0, lines(0))
    path = tmp_path / "configs.json"
    path.write_text(path.read_text().replace("0.4", "0.5"))
    with pytest.raises(ValueError, match=r"configs\.json', '\w+' is the hash of other settings"):
        opened(tmp_path)


def test_a_deferral_mass_of_one_may_be_rounded_up(tmp_path):
    opened(tmp_path)
    write(tmp_path, 0, lines(0, **RULED | {"deferral_mass": 1.0000000975348733}))
    opened(tmp_path)
    assert keys(tmp_path) == [(0, 0), (0, 1)]
