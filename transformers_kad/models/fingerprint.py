"""What a model computes, in one value: whether a cache that it filled earlier still belongs to it."""

from collections.abc import Hashable, Iterator
from itertools import chain

import torch
from torch import nn

# An odd number far from small multiples of powers of two: 2^64 / golden ratio, as a signed integer.
FACTOR = -7046029254386353131
CHUNK = 512  # words that are added up before a factor tells their place
SMALL = 2**14  # elements of a tensor in which the place of each one counts
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def fingerprint(model: nn.Module) -> Hashable:
    """A value that changes when the model's outputs can change: weights, buffers, adapters, settings, device, mode.

    Nothing is trusted to announce a change: fused optimizers, `parameter.data`, pruning and a change of dtype there
    and back raise no version counter. So every weight and buffer is read once, which takes at most about as long as
    one step of the model. Weights that lie on the disk (the meta device) are told apart by their identity alone.

    Also seen: the modules' classes, replaced `forward` methods and plain settings (numbers, booleans, strings), the
    model's configuration, whether `torch.autocast` is on, and which forward hooks are registered. Not seen is what a
    hook computes, and an exchange of weights within 4 KiB of a large tensor.
    """
    tensors = [*chain(model.named_parameters(), model.named_buffers())]
    kinds = tuple((name, id(t), t.dtype, tuple(t.shape), str(t.device)) for name, t in tensors)
    device_types = sorted({t.device.type for _, t in tensors} - {"meta"})
    return hash((kinds, _checksums([t for _, t in tensors]), _settings(model), *map(_autocast, device_types)))


def _autocast(device_type: str) -> Hashable:
    """The precision that `torch.autocast` computes in now, if it is on."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _settings(model: nn.Module) -> Hashable:
    """What decides a model's outputs besides its tensors."""
    modules = tuple(
        (
            type(module),
            id(vars(module).get("forward")),  # of one that took the place of its class's
            tuple((name, value) for name, value in vars(module).items() if _is_setting(name, value)),
            tuple(module._forward_hooks),
            tuple(module._forward_pre_hooks),
            _adapter_state(module),
        )
        for module in model.modules()
    )
    return modules, repr(getattr(model, "config", None))


def _is_setting(name: str, value: object) -> bool:
    return isinstance(value, bool | int | float | str) and not name.startswith("_")


def _adapter_state(module: nn.Module) -> Hashable:
    """Which adapters of a peft layer are on, merged, and how strong they are."""
    if not isinstance(getattr(module, "disable_adapters", None), bool):
        return None
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return str([getattr(module, name, None) for name in names])


def _checksums(tensors: list[torch.Tensor]) -> Hashable:
    """The checksum of each tensor that has data, read from each device at once."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    with torch.no_grad():
        for tensor in chain.from_iterable(map(_plain, tensors)):
            if tensor.numel() and tensor.device.type != "meta":
                by_device.setdefault(tensor.device, []).append(_checksum(tensor))
    return tuple((str(device), *torch.stack(sums).tolist()) for device, sums in by_device.items())


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold the data of one that may be a wrapper of others, as quantized and distributed ones are."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in parts:
            if torch.is_tensor(part):  # the mesh of a distributed tensor is among them
                yield from _plain(part)
    else:
        yield tensor.detach()


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit sum of a tensor's bits, a scalar. Every chunk has a factor of its own, in a small tensor every word."""
    flat = tensor.reshape(-1).contiguous()
    width, small = flat.element_size(), flat.numel() <= SMALL
    # The widest words that begin and end with the tensor; in a small one, no wider than its elements.
    bounds = (flat.numel() * width, flat.storage_offset() * width)
    fitting = (word for word in WORDS if not any(bound % word.itemsize for bound in bounds))
    words = flat.view(next(word for word in fitting if not small or word.itemsize <= width))
    size = 1 if small else CHUNK
    whole = len(words) // size * size
    sums = words[:whole].view(-1, size).sum(dim=1, dtype=torch.int64)
    sums = torch.cat([sums, words[whole:].sum(dtype=torch.int64).view(1)])
    factors = torch.arange(1, len(sums) + 1, device=sums.device) * FACTOR
    return (sums * (factors | 1)).sum()
