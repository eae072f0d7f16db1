"""The processes of a run, on one machine or several, which divide its work among themselves."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState

from .arguments import ModelArguments
from .resumable import describe_differences

_Value = TypeVar("_Value")


# Processes wait for each other at the end of their work, and one may have much more of it than another.
TIMEOUT = timedelta(days=30)


class Processes:
    """All processes that `torchrun` has started for a run; a single one without it.

    Every method but `share` must be called by all processes, in the same order, since each of them waits for the
    others. They exchange messages by gloo also where the models are on GPUs: unlike NCCL it tells at once when another
    process has ended.

    Attributes:
        state: what accelerate knows of this process and the others.
    """

    def __init__(self) -> None:
        self.state = PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)
        self.index: int = self.state.process_index
        self.number: int = self.state.num_processes
        self._group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT) if self.number > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, which prepares the output of the run and completes it."""
        return self.index == 0

    def share(self, work: Sequence[_Value]) -> Sequence[_Value]:
        """The part of the work that belongs to this process: every n-th piece, for n processes."""
        return work[self.index :: self.number]

    def gather(self, value: _Value) -> list[_Value]:
        """The values of all processes, in the order of the processes.

        Raises:
            ConnectionError: another process has ended.
        """
        if self._group is None:
            return [value]
        values = [value] * self.number
        try:
            torch.distributed.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise ConnectionError(
                "Another process of this run has ended before the run was complete; its messages say why. What was "
                "recorded is kept: the same command, started again for all processes, continues the run."
            ) from error
        return values

    def run(self, function: Callable[[], _Value]) -> _Value:
        """Call a function in every process.

        Raises:
            ValueError: the function raised an exception in another process. Where it did so itself, that exception is
                raised.
        """
        error: Exception | None = None
        value: Any = None
        try:
            value = function()
        except Exception as raised:
            error = raised
        messages = self.gather(None if error is None else f"on {socket.gethostname()!r}: {_first_line(error)}")
        if error is not None:
            raise error
        for index, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"The run ends because of an error in process {index} {message}")
        return value

    def run_in_main(self, function: Callable[[], Any]) -> Any:
        """Call a function in the main process, and return its result in every process.

        Raises:
            ValueError: as for `run`.
        """
        return self.gather(self.run(function if self.is_main else lambda: None))[0]

    def check_equal(self, settings: Mapping[str, Any]) -> None:
        """Raise `ValueError` in every process unless all of them have the same settings."""
        first, *others = self.gather(dict(settings))
        for index, other in enumerate(others, start=1):
            differences = describe_differences(first, other, "in process 0", f"in process {index}")
            if differences:
                raise ValueError(f"All processes of a run need the same settings, but {differences}.")

    def check_shared(self, folder: Path, *, patience: float = 10.0) -> None:
        """Raise `ValueError` in every process unless the folder is the same for all of them.

        The main process creates the folder if it is missing and leaves a file in it, which all others must find.

        Args:
            folder: the folder.
            patience: how long to look for the file, in seconds, since network file systems may show it late.
        """
        mark = folder / self.gather(f".{secrets.token_hex(8)}.shared")[0]

        def leave_mark() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()

        self.run_in_main(leave_mark)
        until = time.monotonic() + patience
        while not (found := mark.exists()) and time.monotonic() < until:
            time.sleep(0.1)
        places = self.gather((found, f"{os.path.realpath(folder)!r} on {socket.gethostname()!r}"))
        self.run_in_main(mark.unlink)
        for index, (found, place) in enumerate(places):
            if not found:
                raise ValueError(
                    f"The processes of a run must write into one folder. Process 0 writes into {places[0][1]}, and "
                    f"process {index} did not find in {place} what process 0 has written. Choose an --output in a "
                    "folder that all machines share, such as one on a network file system."
                )


def _first_line(error: BaseException) -> str:
    """The first line of an error message; the type of the error if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def assign_own_devices(models: ModelArguments, state: PartialState) -> None:
    """Call `assign_devices` for this process."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    assign_devices(models, state.local_process_index, processes, torch.cuda.device_count())


def assign_devices(models: ModelArguments, process: int, processes: int, gpus: int) -> None:
    """Assign a GPU to this process, or several of them if the base is distributed over devices.

    Args:
        models: changed in place, unless the command line names a device.
        process: index of this process on this machine.
        processes: number of processes on this machine.
        gpus: number of GPUs of this machine.

    Raises:
        ValueError: there are more processes than GPUs.

    >>> models = ModelArguments(device_map="auto")
    >>> assign_devices(models, process=1, processes=2, gpus=4)
    >>> models.gpus, models.device
    ([2, 3], 'cuda:2')
    """
    if processes == 1 or gpus == 0 or models.device != "auto":
        return
    each = gpus // processes
    if each == 0:
        raise ValueError(f"{processes} processes on one machine need a GPU each, but it has {gpus}. Start fewer.")
    models.gpus = list(range(process * each, (process + 1) * each))
    models.device = f"cuda:{models.gpus[0]}"
