"""A device that is not there: tensors of the CPU that say they are elsewhere, so that each wait for them is counted.

Models and tensors are moved to `DEVICE` inside of `pretended_device()`. What they compute is computed on the CPU,
while every branch of the library and of transformers for devices other than the CPU is taken. The device is called
"meta", which is the only one besides the CPU that every build of PyTorch lets a tensor subclass claim.

A wait is whatever makes the host stand still until the device has computed all that was asked of it: reading a value
(`item`, `tolist`, `bool`), a copy from the device, a copy to it that is not `non_blocking`, and operations whose
result has as many elements as the values say (`nonzero`, a boolean mask as index, `unique`).
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import transformers_kad

DEVICE = torch.device("meta")

_aten = torch.ops.aten
# Operations that read values, whatever their arguments.
_READING = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
    _aten._unique2.default,
}
_LIBRARY = str(Path(transformers_kad.__file__).parent)
_TRANSFORMERS = str(Path(transformers.__file__).parent)
# The wrapper stands around all that `generate` does, and is not in the way of a token.
_AROUND = str(Path(_LIBRARY) / "decoding" / "generate_wrapper.py")


class PretendedTensor(torch.Tensor):
    """A tensor that says it is on `DEVICE`; `on_cpu` holds its values."""

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor) -> "PretendedTensor":
        """A tensor of the same shape, strides and type."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=DEVICE,
            requires_grad=on_cpu.requires_grad,
        )

    def __init__(self, on_cpu: torch.Tensor) -> None:
        self.on_cpu = on_cpu

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Only inside of `pretended_device` there is anything to compute with."""
        raise RuntimeError(f"{func} was called outside of `pretended_device()`.")


class Waits:
    """The waits for the device, by the place in the library that asked for them."""

    def __init__(self) -> None:
        self.places = Counter[str]()

    @property
    def count(self) -> int:
        """How many there were."""
        return self.places.total()

    def note(self) -> None:
        """Count a wait, unless nobody but `generate` itself is waiting."""
        frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(__file__)]
        ours = [frame for frame in frames if frame.filename.startswith(_LIBRARY) and frame.filename != _AROUND]
        if ours:
            inner = [f for f in frames[frames.index(ours[-1]) + 1 :] if f.filename.startswith(_TRANSFORMERS)]
            below = f" < {Path(inner[-1].filename).name}:{inner[-1].lineno} {inner[-1].name}" if inner else ""
            self.places[f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}{below}"] += 1


def _is_pretended(value: Any) -> bool:
    return isinstance(value, PretendedTensor)


class _ComputeOnCPU(TorchDispatchMode):
    """Runs operations on the values, and counts those that make the host wait."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`."""
        kwargs = dict(kwargs or {})
        takes = any(map(_is_pretended, tree_leaves((args, kwargs))))
        asked = kwargs.get("device")
        gives = takes if asked is None else torch.device(asked) == DEVICE
        if not takes and not gives:
            return func(*args, **kwargs)
        if self._makes_wait(func, args, kwargs, takes=takes, gives=gives):
            self._waits.note()
        if asked is not None:
            kwargs["device"] = torch.device("cpu") if torch.device(asked) == DEVICE else asked
        if func is _aten.copy_.default and not _is_pretended(args[0]):
            gives = False
        values = tree_map_only(PretendedTensor, lambda tensor: tensor.on_cpu, (args, kwargs))
        result = func(*values[0], **values[1])
        if not gives:
            return result
        result = tree_map_only(torch.Tensor, PretendedTensor, result)
        if not takes or asked is not None:
            return result
        return return_and_correct_aliasing(func, args, kwargs, result)

    @staticmethod
    def _makes_wait(func: Any, args: Any, kwargs: Any, *, takes: bool, gives: bool) -> bool:
        if func in _READING:
            return True
        if func is _aten._to_copy.default:
            return takes != gives and not kwargs.get("non_blocking", False)
        if func is _aten.copy_.default:
            to, source = args[:2]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return _is_pretended(to) != _is_pretended(source) and source.dim() > 0 and not non_blocking
        if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
            given = (index for index in args[1] if index is not None)
            return any(index.dtype in (torch.bool, torch.uint8) or not _is_pretended(index) for index in given)
        if func is _aten.repeat_interleave.Tensor:
            return kwargs.get("output_size") is None
        return False


class _Factories(TorchFunctionMode):
    """What PyTorch does before it dispatches an operation, and would not do for a subclass or for this device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and _is_pretended(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            sent = (torch.tensor(part).to(DEVICE) if isinstance(part, list) else part for part in index)
            args = (args[0], tuple(sent), *args[2:])
        if func is torch.Tensor.tolist and _is_pretended(args[0]):
            return args[0].cpu().tolist()
        if func is torch.Tensor.new_tensor and _is_pretended(args[0]):
            kwargs = {"dtype": args[0].dtype, "device": DEVICE, **kwargs}
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def pretended_device() -> Iterator[Waits]:
    """Inside, `DEVICE` is a device that computes; yields the waits for it."""
    waits = Waits()
    with _Factories(), _ComputeOnCPU(waits):
        yield waits
