"""Tensors on the CPU that pretend to be on MPS, the GPU of a Mac, which has no float64."""

from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

MPS, CPU = torch.device("mps"), torch.device("cpu")
MISSING_DTYPES = {torch.float64, torch.complex128}
# What may mix devices: a copy moves what is copied, and an index may be on the CPU.
_MAY_MIX = {
    torch.Tensor.to,
    torch.Tensor.copy_,
    torch.Tensor.__getitem__,
    torch.Tensor.__setitem__,
    torch.Tensor.new_tensor,
}


class MPSTensor(torch.Tensor):
    """A tensor on the CPU that says that it is on MPS."""

    device = MPS  # type: ignore[assignment]
    is_cpu, is_mps = False, True  # type: ignore[assignment]


class TimedEvent:
    """In place of an event of MPS; between two of them 2 ms go by."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.is_timed, self.is_recorded = enable_timing, False

    def record(self) -> None:
        """Stand behind what was asked for so far."""
        self.is_recorded = True

    def elapsed_time(self, end: "TimedEvent") -> float:
        """Milliseconds from this event to a later one."""
        assert all(event.is_timed and event.is_recorded for event in (self, end))
        return 2.0


class PretendedMPS(TorchFunctionMode):
    """Context manager inside of which tensors can be made on the device "mps", moved to it and back.

    As on a Mac, an operation that would give a tensor in float64 there raises `TypeError`, and one that mixes devices
    raises `RuntimeError`.
    """

    def __enter__(self) -> "PretendedMPS":
        # transformers waits for an event of the device before it reads whether it may stop.
        self._events = [patch.object(torch, "Event", MagicMock()), patch.object(torch.mps.event, "Event", TimedEvent)]
        for event in self._events:
            event.start()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        for event in self._events:
            event.stop()
        super().__exit__(*exception)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_mps = [isinstance(tensor, MPSTensor) for tensor in tensors]
        device, args, kwargs = _asked_for(function, args, kwargs)
        if any(on_mps) and function not in _MAY_MIX:
            on_cpu = [tensor for tensor, there in zip(tensors, on_mps, strict=True) if not there and tensor.dim()]
            if on_cpu:
                raise RuntimeError(f"{function} was called with tensors on mps and on cpu.")
        if device is None:
            first = on_mps[:1] if function in _MAY_MIX else on_mps
            device = MPS if any(first) else CPU
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            return tree_map(lambda leaf: _at(leaf, device), result)


def on_mps(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with weights and buffers that pretend to be on MPS."""
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = torch.nn.Parameter(_at(weight.detach(), MPS), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _at(buffer, MPS)
    return model


def _asked_for(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The device that a call names, else None, and the arguments without it."""
    if function is torch.Tensor.cpu:
        return CPU, args, kwargs
    device = kwargs.pop("device", None)
    if function is torch.Tensor.to:
        place = next((at for at, one in enumerate(args[1:], 1) if isinstance(one, str | torch.device)), None)
        if place is not None:
            device, args = args[place], (*args[:place], *args[place + 1 :])
        elif len(args) > 1 and isinstance(args[1], torch.Tensor):
            device, args = args[1].device, (args[0], args[1].dtype, *args[2:])
        if len(args) == 1 and not kwargs:
            kwargs = {"dtype": args[0].dtype}
    return (None if device is None else torch.device(device)), args, kwargs


def _at(leaf: Any, device: torch.device) -> Any:
    """A result as it is on a device."""
    if not isinstance(leaf, torch.Tensor) or (device.type == "mps") == isinstance(leaf, MPSTensor):
        return leaf
    if device.type != "mps":
        return leaf.as_subclass(torch.Tensor).clone()
    if leaf.dtype in MISSING_DTYPES:
        raise TypeError(f"Cannot make a tensor of {leaf.dtype} on mps, which has none.")
    return leaf.as_subclass(MPSTensor)
