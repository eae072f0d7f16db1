"""What the processes of a run tell each other: errors, settings, and whether they share a folder."""

import pytest
from thread_processes import launch

from transformers_kad.recipes import processes as module
from transformers_kad.recipes.arguments import ModelArguments
from transformers_kad.recipes.processes import Processes, assign_devices


def test_without_a_launcher_there_is_one_process(tmp_path):
    processes = Processes()
    assert (processes.index, processes.number, processes.is_main) == (0, 1, True)
    assert processes.gather("a") == ["a"]
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.run(lambda: 1) == processes.run_in_main(lambda: 1) == 1
    processes.check_equal({"seed": 0})
    processes.check_shared(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_work_is_shared_without_rest_or_repetition():
    parts = launch(3, lambda processes: processes.share(list(range(8))))
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_what_the_main_process_finds_is_known_to_all():
    calls = []

    def find():
        calls.append(1)
        return {"left": 3}

    assert launch(3, lambda processes: processes.run_in_main(find)) == [{"left": 3}] * 3
    assert calls == [1]


def test_an_error_in_one_process_ends_all():
    def fail(processes):
        def load():
            if processes.index == 1:
                raise FileNotFoundError("no model here\nand more")
            return processes.index

        return processes.run(load)

    first, second, third = launch(3, fail)
    assert isinstance(second, FileNotFoundError)
    for error in (first, third):
        assert isinstance(error, ValueError)
        assert str(error).startswith("The run ends because of an error in process 1 on ")
        assert str(error).endswith(": no model here")


def test_other_settings_of_one_process_end_all():
    errors = launch(3, lambda processes: processes.check_equal({"seed": max(processes.index, 1), "base": "b"}))
    message = "All processes of a run need the same settings, but seed is 1 in process 0 and 2 in process 2."
    assert [str(error) for error in errors] == [message] * 3
    assert launch(2, lambda processes: processes.check_equal({"seed": 1})) == [None, None]


def test_a_folder_that_is_not_shared_ends_all(tmp_path):
    def check(processes):
        processes.check_shared(tmp_path / ("a" if processes.index < 2 else "b"), patience=0.2)

    errors = launch(3, check)
    for error in errors:
        assert isinstance(error, ValueError)
        assert f"Process 0 writes into '{tmp_path / 'a'}' on " in str(error)
        assert f"process 2 did not find in '{tmp_path / 'b'}' on " in str(error)
        assert "Choose an --output in a folder that all machines share" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert list((tmp_path / "a").iterdir()) == []


def test_a_folder_that_appears_late_is_waited_for(tmp_path, monkeypatch):
    """As on a network file system: the file is there, and another machine does not see it yet."""
    looks = []
    monkeypatch.setattr(module.time, "sleep", lambda seconds: looks.append(1))
    exists = module.Path.exists
    monkeypatch.setattr(module.Path, "exists", lambda path: len(looks) > 2 and exists(path))
    assert launch(2, lambda processes: processes.check_shared(tmp_path)) == [None, None]
    assert len(looks) > 2


def test_a_lost_process_is_an_error_that_says_how_to_go_on(monkeypatch):
    def closed(values, value, group):
        raise RuntimeError("Connection closed by peer")

    processes = Processes()
    processes._group = "of two processes"
    monkeypatch.setattr(module.torch.distributed, "all_gather_object", closed)
    with pytest.raises(ConnectionError, match=r"same command.*continues the run"):
        processes.gather(1)


@pytest.mark.parametrize(
    ("process", "processes", "gpus", "expected"),
    [(0, 1, 4, (None, "auto")), (1, 2, 0, (None, "auto")), (1, 2, 2, ([1], "cuda:1")), (1, 2, 5, ([2, 3], "cuda:2"))],
)
def test_each_process_gets_its_own_gpus(process, processes, gpus, expected):
    models = ModelArguments()
    assign_devices(models, process, processes, gpus)
    assert (models.gpus, models.device) == expected


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ValueError, match="3 processes on one machine need a GPU each, but it has 2"):
        assign_devices(ModelArguments(), 0, 3, 2)
