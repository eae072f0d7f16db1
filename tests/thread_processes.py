"""Several processes of a run, played by threads of one process."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers_kad.recipes.processes import Processes

TIMEOUT = 20  # seconds that a thread waits for the others


class ThreadProcesses(Processes):
    """The processes as thread `index` sees them; `board` and `barrier` belong to all threads."""

    def __init__(self, index: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.index, self.number = index, len(board)
        self._board, self._barrier = board, barrier

    def gather(self, value: Any) -> list[Any]:
        """See `Processes.gather`."""
        self._board[self.index] = value
        self._barrier.wait(TIMEOUT)
        values = list(self._board)
        self._barrier.wait(TIMEOUT)
        return values


def launch(number: int, function: Callable[[Processes], Any]) -> list[Any]:
    """What a function returns, or the exception that it raises, in each of so many processes at once."""
    board: list[Any] = [None] * number
    barrier = threading.Barrier(number)

    def run(index: int) -> Any:
        try:
            return function(ThreadProcesses(index, board, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(number) as threads:
        return list(threads.map(run, range(number)))
