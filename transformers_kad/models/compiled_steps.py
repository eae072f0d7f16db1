"""A function that is compiled once for every shape, and can be called from any thread."""

import functools
import inspect
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")

# With this argument, functions that are compiled separately share no compiled code. Versions of torch that have it can
# record CUDA graphs in a thread other than the one that imported torch.
_ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters


@functools.cache
def _graph_thread() -> ThreadPoolExecutor:
    """The thread that runs the CUDA graphs of all calls outside the main thread."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="kad-cuda-graphs")


class CompiledSteps:
    """Compiles a function anew for every shape of its arguments, on CUDA as CUDA graphs.

    A CUDA graph of `torch.compile` belongs to the thread that recorded it (pytorch issue 123177), and a server or a
    streamer may run every call in a new thread. Calls outside the main thread are therefore run by one thread that
    the library keeps for them; it compiles for itself, once.

    Args:
        function: what is compiled. It returns a tensor.
        device: where it runs.
    """

    def __init__(self, function: Callable[..., torch.Tensor], device: torch.device) -> None:
        self._function, self._device = function, device
        self._compiled: dict[tuple[bool, Hashable], Callable[..., torch.Tensor]] = {}

    @property
    def records_graphs(self) -> bool:
        """Whether CUDA graphs are recorded."""
        return self._device.type == "cuda"

    def clear(self) -> None:
        """Forget what was compiled."""
        self._compiled.clear()

    def run(self, shape: Hashable, *arguments: Any) -> torch.Tensor:
        """Call the function with arguments of a shape, for which it has compiled code of its own.

        Raises:
            RuntimeError: this version of torch can't record CUDA graphs in this thread.
        """
        if not self.records_graphs or threading.current_thread() is threading.main_thread():
            return self._run(False, shape, arguments)
        if not _ISOLATES:
            raise RuntimeError(
                f"torch {torch.__version__} records CUDA graphs only in the main thread, and this call of `generate` "
                "runs in another: update torch, call `generate` in the main thread, or leave out `compile`."
            )
        run = _in_state_of_this_thread(functools.partial(self._run, True, shape, arguments), self._device)
        return _graph_thread().submit(run).result()

    def _run(self, in_graph_thread: bool, shape: Hashable, arguments: tuple[Any, ...]) -> torch.Tensor:
        key = (in_graph_thread, shape)
        if key not in self._compiled:
            settings: dict[str, Any] = {"isolate_recompiles": True} if _ISOLATES else {}
            if self.records_graphs:
                settings["mode"] = "reduce-overhead"
            self._compiled[key] = torch.compile(self._function, dynamic=False, **settings)
        if self.records_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        result = self._compiled[key](*arguments)
        return result.clone() if self.records_graphs else result  # the next run of a graph writes to the same place


def _in_state_of_this_thread(function: Callable[[], _Result], device: torch.device) -> Callable[[], _Result]:
    """A function that runs in another thread as in this one: without gradients, and with its stream and autocast."""
    is_autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> _Result:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, dtype=dtype, enabled=is_autocast),
            torch.cuda.stream(stream),
        ):
            return function()

    return run
