"""Functions that are compiled once for each number of rows, and called from any thread."""

import threading
from collections.abc import Callable

import pytest
import torch

from transformers_kad.models import compiled_steps
from transformers_kad.models.compiled_steps import CompiledSteps

CPU = torch.device("cpu")


class Recorded:
    """In place of `torch.compile`: who called what was compiled, and how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings: list[dict[str, object]] = []
        self.calls: list[tuple[int, str, bool, bool]] = []
        monkeypatch.setattr(torch, "compile", self.compile)

    def compile(self, function: Callable[..., torch.Tensor], **settings: object) -> Callable[..., torch.Tensor]:
        number = len(self.settings)
        self.settings.append(settings)

        def run(*arguments: torch.Tensor) -> torch.Tensor:
            state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            self.calls.append((number, threading.current_thread().name, *state))
            return function(*arguments)

        return run


def in_new_thread(function: Callable[[], object]) -> object:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


@pytest.fixture
def with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledSteps, "records_graphs", True)


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_every_number_of_rows_has_code_of_its_own(recorded: Recorded) -> None:
    steps = CompiledSteps(double, CPU)
    for rows in (1, 2, 2, 1):
        assert steps.run(rows, torch.ones(rows)).tolist() == [2.0] * rows
    assert [number for number, *_ in recorded.calls] == [0, 1, 1, 0]
    assert all("mode" not in settings and settings["dynamic"] is False for settings in recorded.settings)
    steps.clear()
    steps.run(1, torch.ones(1))
    assert recorded.calls[-1][0] == 2


def test_without_graphs_code_runs_in_the_thread_of_the_call(recorded: Recorded) -> None:
    steps = CompiledSteps(double, CPU)
    steps.run(1, torch.ones(1))
    in_new_thread(lambda: steps.run(1, torch.ones(1)))
    assert [number for number, *_ in recorded.calls] == [0, 0]
    assert len({thread for _, thread, *_ in recorded.calls}) == 2


@pytest.mark.usefixtures("with_graphs")
def test_graphs_of_all_other_threads_are_run_by_one(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_steps, "_ISOLATES", True)
    steps = CompiledSteps(double, CPU)
    with torch.no_grad():
        steps.run(1, torch.ones(1))
    for _ in range(3):
        result = in_new_thread(lambda: steps.run(1, torch.ones(1)))
        assert isinstance(result, torch.Tensor)
        assert result.tolist() == [2.0]
    numbers, threads, grads, inference = zip(*recorded.calls, strict=True)
    assert numbers == (0, 1, 1, 1)
    assert threads[0] == threading.main_thread().name
    assert len(set(threads[1:])) == 1
    assert "kad-cuda-graphs" in threads[1]
    assert not any(grads)
    assert not any(inference)
    assert [settings["mode"] for settings in recorded.settings] == ["reduce-overhead"] * 2
    assert all(settings["isolate_recompiles"] for settings in recorded.settings)


@pytest.mark.usefixtures("with_graphs", "recorded")
def test_an_error_reaches_the_thread_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_steps, "_ISOLATES", True)

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    error = in_new_thread(lambda: CompiledSteps(fail, CPU).run(1, torch.ones(1)))
    assert isinstance(error, ValueError)
    assert str(error) == "no"


@pytest.mark.usefixtures("with_graphs", "recorded")
def test_other_threads_are_refused_where_torch_can_not_record_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_steps, "_ISOLATES", False)
    steps = CompiledSteps(double, CPU)
    steps.run(1, torch.ones(1))
    error = in_new_thread(lambda: steps.run(1, torch.ones(1)))
    assert isinstance(error, RuntimeError)
    assert "only in the main thread" in str(error)


@pytest.mark.usefixtures("with_graphs", "recorded")
def test_a_result_is_no_place_that_a_graph_writes_to_again() -> None:
    place = torch.zeros(1)
    steps = CompiledSteps(place.copy_, CPU)
    first = steps.run(1, torch.ones(1))
    steps.run(1, torch.full((1,), 5.0))
    assert first.tolist() == [1.0]


def test_code_that_was_compiled_apart_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between models of a class, whose forwards are one code object, and in spite of torch's limit of 8."""
    if not compiled_steps._ISOLATES:
        pytest.skip("this version of torch can't do it")
    graphs = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile_(function, backend=note, **settings))
    steps = CompiledSteps(double, CPU)
    for _ in range(2):
        for rows in range(1, 13):
            steps.run(rows, torch.ones(rows))
    assert len(graphs) == 12
