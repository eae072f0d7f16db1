"""Calls that several processes compute together, because the models are sharded over them.

Tensor and pipeline parallelism: all processes of a group (the *ranks*) make the same call, and each of them draws and
decides by itself. They have to decide alike: a rank that takes another token, or ends earlier, computes something else
than the others expect of it, and they get wrong numbers or wait for it. `RanksInStep` gives all of them the random
numbers of the first rank, and lets them compare what they have decided.

FSDP and DeepSpeed ZeRO-3: every process makes a call of its own, with texts of its own, and every forward needs a part
of the weights from each of them. A process whose texts are finished has to go on forwarding for the others. That is
what `forwards_in_step` does.
"""

import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.integrations.fsdp import is_fsdp_managed_module

from ..models.offloading import execution_device
from ..utils.transfers import send
from .call_arguments import CallArguments


class OneProcess:
    """A call that one process computes alone, so that there is nothing to agree on."""

    def begin(self, given: CallArguments) -> None:
        """The call is in order, and begins."""

    def meet_before_forwards(self) -> None:
        """The call decodes token by token."""

    def begin_round(self, decided: Sequence[int], draft_length: int) -> int:
        """A round of speculative decoding begins.

        Args:
            decided: numbers that tell what was decided in the round before, such as token ids.
            draft_length: how long the next draft is to be, as this process sees it.

        Returns:
            The draft length that counts.
        """
        return draft_length

    def end_forwards(self) -> None:
        """The forwards of a round are done."""

    def end(self, result: Any) -> None:
        """The call has returned this."""


class RanksInStep(OneProcess):
    """The processes that compute one call together, since they share a model of it.

    They *meet* before they need each other: in speculative decoding at the beginning of every round, token by token
    before every forward of a sharded model, and at the beginning and the end of the call. A rank that raises an error
    between two meetings still comes to the second, so that all other ranks raise one too. It does not come after an
    error within a forward, nor in a round before its forwards are done: the others are in a forward by then.

    Args:
        group: the process group of the ranks.
        models: the models of the call.
        device: the device of the call on this rank, for what the ranks exchange.
    """

    def __init__(self, group: "dist.ProcessGroup", models: Sequence[PreTrainedModel], device: torch.device) -> None:
        self._group, self._models, self._device = group, models, device
        self._size, self._is_first = dist.get_world_size(group), dist.get_rank(group) == 0
        self._can_meet = True  # whether the others are at a meeting next
        self._random_states: list[tuple[torch.device, torch.Tensor]] = []
        self._streamer: Any = None
        self._hooks: list[RemovableHandle] = []

    def begin(self, given: CallArguments) -> None:
        """The call is in order on this rank: meet the others, and take over the random state of the first of them.

        Only the first rank keeps its streamer, so that the text is shown once.

        Raises:
            RuntimeError: another rank raised an error, or was given other prompts or settings.
        """
        plain = {name: value for name, value in given.arguments.items() if isinstance(value, bool | int | float | str)}
        prompts = [] if given.input_ids is None else given.input_ids.flatten().tolist()
        self._meet([*repr(sorted(plain.items())).encode(), *prompts])
        self._share_random_states()
        if not self._is_first:
            self._streamer = given.arguments.pop("streamer", None)

    def meet_before_forwards(self) -> None:
        """From now on, meet before every forward of a model that the ranks share."""
        for model in dict.fromkeys(self._models):
            if sharing_group(model) is not None:
                self._hooks.append(model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
                self._hooks.append(model.register_forward_hook(self._after_forward))

    def begin_round(self, decided: Sequence[int], draft_length: int) -> int:
        """Meet before a round of speculative decoding. The draft length is that of the first rank.

        Raises:
            RuntimeError: another rank raised an error, or has decided otherwise.
        """
        draft_length = self._meet(decided, draft_length)
        self._can_meet = False
        return draft_length

    def end_forwards(self) -> None:
        """The forwards of a round are done: what follows needs no other rank."""
        self._can_meet = True

    def end(self, result: Any) -> None:
        """The call has returned this on this rank: meet the others for the last time.

        Raises:
            RuntimeError: another rank raised an error, or its texts are others.
        """
        sequences = result if torch.is_tensor(result) else getattr(result, "sequences", None)
        self._meet(sequences.flatten().tolist() if torch.is_tensor(sequences) else [])
        self._can_meet = False
        if self._streamer is not None:
            self._streamer.end()  # a thread may wait for its text

    def report_error(self) -> None:
        """Let the others know that this rank has raised an error, at their next meeting."""
        if self._can_meet:
            self._exchange(failed=True)

    def close(self) -> None:
        """Leave the models as they were, and give this rank its own random state back."""
        for hook in self._hooks:
            hook.remove()
        for device, state in self._random_states:
            _set_random_state(device, state)

    def _meet(self, decided: Sequence[int], draft_length: int = 0) -> int:
        """Compare what was decided, and return the draft length of the first rank.

        This is one collective operation over 24 bytes a rank, for whose result the host waits.
        """
        of_all = self._exchange(failed=False, decided=decided, draft_length=draft_length)
        failed = [rank for rank, (has_failed, *_) in enumerate(of_all) if has_failed]
        differing = [rank for rank, (_, checksum, _) in enumerate(of_all) if checksum != of_all[0][1]]
        self._can_meet = not (failed or differing)
        if failed:
            raise RuntimeError(
                f"The call ended with an error on rank {failed[0]} of the processes that share a model, which raises "
                "it."
            )
        if differing:
            raise RuntimeError(
                f"Rank {differing[0]} of the processes that share a model has decided otherwise than rank 0. All of "
                "them must make the same call, with the same prompts and settings, on devices that compute the same "
                "numbers, and processors and stopping criteria must not depend on the process that runs them."
            )
        return of_all[0][2]

    def _exchange(self, *, failed: bool, decided: Sequence[int] = (), draft_length: int = 0) -> list[list[int]]:
        """Of every rank whether it has failed, the checksum of what it has decided, and its draft length."""
        own = send([int(failed), zlib.crc32(array("q", decided).tobytes()), draft_length], self._device)
        of_all = [torch.empty_like(own) for _ in range(self._size)]
        self._can_meet = False
        dist.all_gather(of_all, own, group=self._group)
        values: list[list[int]] = torch.stack(of_all).tolist()
        return values

    def _share_random_states(self) -> None:
        """Give all ranks the random states of the first one, which goes on from them after the call.

        These are the states of the devices that draw: the CPU, and those of the models, in the same order everywhere.
        """
        devices = dict.fromkeys([torch.device("cpu"), *map(execution_device, self._models)])
        own = [(device, _random_state(device)) for device in devices]
        states = [state for _, state in own]
        together = torch.cat(states).to(self._device)
        self._can_meet = False
        dist.broadcast(together, group=self._group, group_src=0)
        self._can_meet = True
        if self._is_first:
            return
        self._random_states = own
        of_first = together.cpu().split([len(state) for state in states])
        for (device, _), state in zip(own, of_first, strict=True):
            _set_random_state(device, state)

    def _before_forward(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        self._meet([] if ids is None else ids.flatten().tolist())
        self._can_meet = False

    def _after_forward(self, *_: Any) -> None:
        self._can_meet = True


@contextmanager
def ranks_in_step(models: Sequence[PreTrainedModel], given: CallArguments) -> Iterator[OneProcess]:
    """The processes that share one of the models of a call, or this process alone.

    In several groups, the largest counts.
    """
    groups = [group for model in models if (group := sharing_group(model)) is not None]
    if not groups:
        yield OneProcess()
        return
    ranks = RanksInStep(max(groups, key=dist.get_world_size), models, _device_of(given))
    try:
        yield ranks
    except BaseException:
        ranks.report_error()
        raise
    finally:
        ranks.close()


@contextmanager
def forwards_in_step(given: CallArguments) -> Iterator[None]:
    """Let a base whose weights lie in shards on all processes forward as often on each of them.

    Before every forward of the base the processes count those that are about to forward. A process that needs no more
    forwards takes part with forwards over one token until the count is 0. It does so whether its call has returned
    or has raised an error, unless the error left a forward half done or is an interrupt.

    `generate` has a way of its own of doing so, `synced_gpus`, which is switched off here: it counts tokens, and in
    speculative decoding the processes need different numbers of forwards for a token. `synced_gpus=False` of the
    caller's promises equal numbers, and is left alone.
    """
    model, device = given.model, _device_of(given)
    has_others = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not has_others or given.get("synced_gpus") is False or not is_sharded(model):
        yield
        return
    given.arguments["synced_gpus"] = False
    within_forward = False

    def count(about_to_forward: bool) -> torch.Tensor:
        counted = torch.full((1,), float(about_to_forward), device=device)
        dist.all_reduce(counted)
        return counted

    def before_forward(*_: Any) -> None:
        nonlocal within_forward
        within_forward = True
        count(True)

    def after_forward(*_: Any) -> None:
        nonlocal within_forward
        within_forward = False

    def forward_for_others() -> None:
        before.remove()
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        with torch.no_grad():
            while count(False).item() > 0:
                model(input_ids=token, use_cache=False)

    before = model.register_forward_pre_hook(before_forward, prepend=True)
    after = model.register_forward_hook(after_forward)
    try:
        yield
    except Exception:
        if not within_forward:
            forward_for_others()
        raise
    else:
        forward_for_others()
    finally:
        before.remove()
        after.remove()


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a model's weights lie in shards on several processes, by FSDP or DeepSpeed ZeRO-3.

    `is_deepspeed_zero3_enabled()` does not tell: it speaks of the models that are loaded while it holds.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return True
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 (not on every platform)

    return is_fsdp_managed_module(model) or any(isinstance(module, FSDPModule) for module in model.modules())


def sharing_group(model: PreTrainedModel) -> "dist.ProcessGroup | None":
    """The processes that compute every forward of a model together; None for one that transformers loaded whole."""
    group: dist.ProcessGroup | None = None
    for dimension in ("tp", "pp"):
        if _size_of(model, dimension) > 1:
            group = model._device_mesh[dimension].get_group()
            break
    return group


def is_pipelined(model: PreTrainedModel) -> bool:
    """Whether transformers has spread the layers of a model over processes, by pipeline parallelism."""
    return _size_of(model, "pp") > 1


def _size_of(model: PreTrainedModel, dimension: str) -> int:
    """The number of processes in a dimension of the mesh that a model was loaded with; 1 without this dimension."""
    mesh = getattr(model, "_device_mesh", None)
    return 1 if mesh is None or dimension not in (mesh.mesh_dim_names or ()) else int(mesh[dimension].size())


def _device_of(given: CallArguments) -> torch.device:
    """The device of the prompts of a call."""
    for value in (given.input_ids, given.arguments.get("inputs_embeds")):
        if torch.is_tensor(value):
            return value.device
    return execution_device(given.model)


def _random_state(device: torch.device) -> torch.Tensor:
    """The state of the generator that draws on a device by default, as bytes of the host."""
    state: torch.Tensor
    state = torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return state


def _set_random_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
